"""Identities by content: what a reward, or another object that a run depends on, is made of, whatever it is called."""

import dis
import hashlib
import json
import re
import sys
import types
from collections.abc import Mapping, Set
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Methods by which code changes what it keeps between calls: such a record is no part of what a function is.
CHANGES = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popleft", "remove", "discard", "clear", "write"}
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def fingerprint(thing: Any) -> str:
    """SHA-256 of content: of a function its code, defaults, closure and the globals that it reads; of a model its weights; of an object its class and
    attributes, or what its attribute `identity` says. What code itself changes from call to call, and packages that are installed, count by name alone.
    """
    return hashlib.sha256(repr(_parts(thing, {})).encode()).hexdigest()


def unknown(found: Mapping[str, Any], *names: str) -> set[str]:
    """Those fingerprints that a release before did not write, and which therefore say nothing."""
    return {name for name in names if name not in found}


def tensors_checksum(tensors: Any) -> str:
    """SHA-256 of the bytes of some tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        # What lies elsewhere has no bytes here.
        digest.update(str(tuple(tensor.shape)).encode() if tensor.is_meta else tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parts(thing: Any, seen: dict[int, int]) -> Any:
    """The content as nested tuples whose text is the same in every process."""
    if thing is None or isinstance(thing, bool | int | float | complex | str | bytes):
        return type(thing).__name__, str(thing) if isinstance(thing, str) else repr(thing)
    if id(thing) in seen:
        return "again", seen[id(thing)]
    seen[id(thing)] = len(seen)
    name = f"{getattr(thing, '__module__', None) or type(thing).__module__}.{getattr(thing, '__qualname__', None) or type(thing).__qualname__}"
    if isinstance(thing, Tensor | np.ndarray):
        tensor = torch.as_tensor(thing) if isinstance(thing, Tensor) or thing.dtype.kind in "biufc" else None
        return (str(thing.dtype), repr(thing)) if tensor is None else (str(tensor.dtype), tuple(tensor.shape), tensors_checksum([tensor]))
    if isinstance(thing, nn.Module):
        weights = thing.state_dict()
        return type(thing).__qualname__, [(key, str(each.dtype), tuple(each.shape)) for key, each in weights.items()], tensors_checksum(weights.values())
    if not isinstance(thing, type) and (identity := getattr(thing, "identity", None)) is not None:
        return "identity", _parts(identity, seen)
    if hasattr(thing, "get_vocab"):
        return type(thing).__qualname__, _tokenizer(thing)
    if isinstance(thing, partial):
        return "partial", _parts(thing.func, seen), _parts(thing.args, seen), _parts(thing.keywords, seen)
    if isinstance(thing, Mapping):
        return "mapping", sorted((repr(_parts(key, {})), _parts(thing[key], seen)) for key in thing)
    if isinstance(thing, Set):
        return "set", sorted(repr(_parts(each, {})) for each in thing)
    if isinstance(thing, list | tuple):
        return "sequence", [_parts(each, seen) for each in thing]
    if isinstance(thing, types.ModuleType):
        return "module", thing.__name__
    if isinstance(thing, types.MethodType):
        return "method", _parts(thing.__func__, seen), _parts(thing.__self__, seen)
    if isinstance(thing, types.FunctionType):
        return _function(thing, name, seen)
    if isinstance(thing, type):
        return _class(thing, seen)
    if _installed(type(thing).__module__) and not type(thing).__module__.startswith("recontrol."):
        # With an address it is a lock, a generator or the like, which has no content.
        return name, "" if ADDRESS.search(repr(thing)) else repr(thing)
    changed = {each for function in _methods(type(thing)) if function.__name__ not in ("__init__", "__post_init__") for each in _changed(function.__code__)}
    kept = {key: each for key, each in getattr(thing, "__dict__", {}).items() if key not in changed}
    return _parts(type(thing), seen), _parts(kept, seen)


def _function(function: types.FunctionType, name: str, seen: dict[int, int]) -> Any:
    if _installed(function.__module__):
        return "function", name
    code, changed = function.__code__, _changed(function.__code__)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    read = {each: function.__globals__[each] for each in _read(code) if each in function.__globals__}
    # An empty cell is that of a name which is not set yet.
    read |= {each: cell.cell_contents for each, cell in cells.items() if cell != types.CellType()}
    return (
        "function",
        _code(code),
        _parts([function.__defaults__, function.__kwdefaults__, getattr(function, "head_names", None)], seen),
        [(each, _parts(read[each], seen)) for each in sorted(read.keys() - changed)],
    )


def _class(kind: type, seen: dict[int, int]) -> Any:
    if _installed(kind.__module__):
        return "class", f"{kind.__module__}.{kind.__qualname__}"
    plain = {key: each for key, each in vars(kind).items() if not key.startswith("__") and not callable(each) and not hasattr(each, "__get__")}
    return "class", kind.__qualname__, [_parts(each, seen) for each in _methods(kind)], _parts(plain, seen), [_parts(base, seen) for base in kind.__bases__]


def _methods(kind: type) -> list[types.FunctionType]:
    """The functions of a class's own body, those inside properties and class methods too."""
    inner = (getattr(each, "__func__", None) or getattr(each, "fget", None) or each for _, each in sorted(vars(kind).items(), key=lambda item: item[0]))
    return [each for each in inner if isinstance(each, types.FunctionType)]


def _installed(module: str | None) -> bool:
    """Whether a module is of Python, of an installed package, or of this one."""
    top = (module or "").partition(".")[0]
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return (top in sys.stdlib_module_names and top != "__main__") or top in ("builtins", "recontrol") or "site-packages" in file or "dist-packages" in file


def _code(code: types.CodeType) -> Any:
    """Instructions, constants and names, without the numbers of lines."""
    plain = [sorted(map(repr, each)) if isinstance(each, frozenset) else each for each in code.co_consts]
    constants = [_code(each) if isinstance(each, types.CodeType) else repr(each) for each in plain]
    return code.co_code.hex(), constants, code.co_names


def _nested(code: types.CodeType) -> list[types.CodeType]:
    return [code, *(inner for each in code.co_consts if isinstance(each, types.CodeType) for inner in _nested(each))]


def _read(code: types.CodeType) -> set[str]:
    """The globals that code reads."""
    return {step.argval for each in _nested(code) for step in dis.get_instructions(each) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}


def _changed(code: types.CodeType) -> set[str]:
    """The attributes, globals and names of a closure that code sets, or changes by a method or an index."""
    names: set[str] = set()
    for each in _nested(code):
        loaded: list[str] = []
        for step in dis.get_instructions(each):
            if step.opname in ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF"):
                names.add(step.argval)
            elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
                names.update(loaded[-2:])
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in CHANGES:
                names.update(loaded[-1:])
            elif step.opname in ("LOAD_ATTR", "LOAD_GLOBAL", "LOAD_DEREF"):
                loaded.append(step.argval)
    return names


def _tokenizer(tokenizer: Any) -> Any:
    """All that it cuts texts by; how the last call padded and cut its rows does not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else {key: rule for key, rule in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}
    content = [rules or sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
