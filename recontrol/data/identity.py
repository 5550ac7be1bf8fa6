"""Identities by content: what a reward, or another object that a run depends on, is made of, whatever it is called."""

import contextlib
import dis
import hashlib
import inspect
import json
import re
import sys
import types
from collections.abc import Iterable, Mapping, Set
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Methods by which code changes what it keeps between calls: such a record is no part of what a function is.
CHANGES = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popleft", "remove", "discard", "clear", "write"}
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def fingerprint(thing: Any) -> str:
    """SHA-256 of content: a function's code and what it reads, a model's weights, an object's class and attributes, or its `identity`."""
    return hashlib.sha256(repr(_parts(thing, {})).encode()).hexdigest()


def unknown(found: Mapping[str, Any], *names: str) -> set[str]:
    """Those fingerprints that a release before did not write, and which therefore say nothing."""
    return {name for name in names if name not in found}


def tensors_checksum(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of some tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        # What accelerate keeps elsewhere, or torchao packs, has no bytes here.
        with contextlib.suppress(RuntimeError, TypeError):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parts(thing: Any, seen: dict[int, Any]) -> Any:
    """The content as nested tuples whose text is the same in every process."""
    name = f"{getattr(thing, '__module__', None) or type(thing).__module__}.{getattr(thing, '__qualname__', None) or type(thing).__qualname__}"
    if thing is None or isinstance(thing, bool | int | float | complex | str | bytes):
        return name, repr(thing)
    if id(thing) in seen:
        return "again", seen[id(thing)][0]
    # Kept, so that no other object takes its place in memory.
    seen[id(thing)] = (len(seen), thing)
    # Statically, since some objects have every attribute.
    if not isinstance(thing, type) and inspect.getattr_static(thing, "identity", None) is not None:
        return "identity", _parts(thing.identity, seen)
    if isinstance(thing, np.ndarray):
        return name, str(thing.dtype), _parts(thing.tolist(), seen)
    if isinstance(thing, Tensor | nn.Module):
        weights = thing.state_dict() if isinstance(thing, nn.Module) else {"": thing}
        return name, [(key, str(each.dtype), tuple(each.shape)) for key, each in weights.items()], tensors_checksum(weights.values())
    if hasattr(thing, "get_vocab"):
        return name, _tokenizer(thing)
    if isinstance(thing, Mapping):
        return "mapping", sorted((repr(_parts(key, {})), _parts(thing[key], seen)) for key in thing)
    if isinstance(thing, Set):
        return "set", sorted(repr(_parts(each, {})) for each in thing)
    if isinstance(thing, list | tuple):
        return "sequence", [_parts(each, seen) for each in thing]
    if isinstance(thing, partial | types.MethodType):
        inner = (thing.func, thing.args, thing.keywords) if isinstance(thing, partial) else (thing.__func__, thing.__self__)
        return name, _parts(inner, seen)
    return _made_by_code(thing, name, seen)


def _made_by_code(thing: Any, name: str, seen: dict[int, Any]) -> Any:
    """The content of a function, a class, a module or an object."""
    own = isinstance(thing, types.FunctionType | type)
    module = str(thing.__module__ if own else type(thing).__module__)
    file, top = getattr(sys.modules.get(module), "__file__", None) or "", module.partition(".")[0]
    installed = top != "__main__" and ("site-packages" in file or "dist-packages" in file or top in {*sys.stdlib_module_names, "builtins", "recontrol"})
    if isinstance(thing, types.ModuleType) or (installed and (own or top != "recontrol")):
        # With an address it is a lock, a generator or the like, which has no content.
        return name if own or ADDRESS.search(repr(thing)) or isinstance(thing, types.ModuleType) else (name, repr(thing))
    if isinstance(thing, types.FunctionType):
        code, (read, changed) = thing.__code__, _names(thing.__code__)
        found = {each: thing.__globals__[each] for each in read if each in thing.__globals__}
        # An empty cell is that of a name which is not set yet.
        found |= {each: cell.cell_contents for each, cell in zip(code.co_freevars, thing.__closure__ or (), strict=True) if cell != types.CellType()}
        kept = {each: value for each, value in found.items() if each not in changed}
        return _code(code), _parts([thing.__defaults__, thing.__kwdefaults__, kept], seen)
    kind = thing if isinstance(thing, type) else type(thing)
    bodies = [getattr(each, "__func__", None) or getattr(each, "fget", None) or each for each in vars(kind).values()]
    functions = [each for each in bodies if isinstance(each, types.FunctionType)]
    if own:
        plain = {key: each for key, each in vars(kind).items() if not (key.startswith("__") or callable(each) or hasattr(each, "__get__"))}
        return name, [_parts(each, seen) for each in (*functions, plain, *kind.__bases__)]
    changed = {each for body in functions if body.__name__ not in ("__init__", "__post_init__") for each in _names(body.__code__)[1]}
    return _parts(kind, seen), _parts({key: each for key, each in getattr(thing, "__dict__", {}).items() if key not in changed}, seen)


def _code(code: types.CodeType) -> Any:
    """Instructions, constants and names, without the numbers of lines."""
    plain = [sorted(map(repr, each)) if isinstance(each, frozenset) else each for each in code.co_consts]
    return code.co_code.hex(), [_code(each) if isinstance(each, types.CodeType) else repr(each) for each in plain], code.co_names


def _names(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The globals that code reads; the attributes, globals and names of a closure that it sets, or changes by a method or an index."""
    read, changed = set(), set()
    loaded: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF"):
            changed.add(step.argval)
        elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            changed.update(loaded[-2:])
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in CHANGES:
            changed.update(loaded[-1:])
        elif step.opname.startswith("LOAD_") and isinstance(step.argval, str) and step.opname != "LOAD_CONST":
            loaded.append(step.argval)
            read.add(step.argval)
    for inner in (each for each in code.co_consts if isinstance(each, types.CodeType)):
        for names, more in zip((read, changed), _names(inner), strict=True):
            names |= more
    return read, changed


def _tokenizer(tokenizer: Any) -> str:
    """All that it cuts texts by; how the last call padded and cut its rows does not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else {key: rule for key, rule in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}
    content = [rules or sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
