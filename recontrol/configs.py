"""Settings as dataclasses: flags, YAML keys and the documentation of both come from the fields and the `Args:` section of the docstring."""

import argparse
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")


def field_docs(config: type) -> dict[str, str]:
    """What the docstring of a config says of each field, on one line."""
    lines = inspect.cleandoc(config.__doc__ or "").splitlines()
    found: dict[str, str] = {}
    if "Args:" not in lines:
        return found
    name = ""
    for line in lines[lines.index("Args:") + 1 :]:
        if line and not line.startswith(" "):
            break
        entry = re.match(r" {4}(\w+): (.*)", line)
        if entry:
            name, found[name] = entry[1], entry[2]
        elif line.strip():
            found[name] += " " + line.strip()
    return found


def add_flags(parser: Any, config: type, *, leave_out: Collection[str] = (), types: Mapping[str, Callable[[str], Any]] | None = None) -> None:
    """A flag for each field of a config, with its default and documentation; `types` read the text of some flags more strictly."""
    hints, docs = typing.get_type_hints(config), field_docs(config)
    for each in dataclasses.fields(config):
        if each.name in leave_out:
            continue
        kinds = [kind for kind in _kinds(hints[each.name]) if kind is not type(None)]
        factory: Any = each.default_factory
        required = each.default is dataclasses.MISSING and factory is dataclasses.MISSING
        default = None if required else factory() if each.default is dataclasses.MISSING else each.default
        keywords: dict[str, Any] = {"default": default, "dest": each.name, "required": required}
        shown = docs.get(each.name, "").replace("%", "%%")
        if bool in kinds:
            keywords["action"] = argparse.BooleanOptionalAction if default else "store_true"
            del keywords["required"]
        elif typing.get_origin(kinds[0]) is Literal:
            keywords["choices"] = [choice for choice in typing.get_args(kinds[0]) if choice is not None]
        else:
            keywords |= {"type": (types or {}).get(each.name) or _reader(kinds[0]), "metavar": each.name.split("_")[-1].upper()}
        if not required and "action" not in keywords:
            shown += f" (default: {','.join(map(str, default)) if isinstance(default, tuple | list) else 'none' if default is None else default})"
        parser.add_argument(f"--{each.name.replace('_', '-')}", help=shown, **keywords)


def from_flags(config: type[Config], options: argparse.Namespace, **others: Any) -> Config:
    """The config that parsed flags describe; `others` are fields that have no flag."""
    names = [each.name for each in dataclasses.fields(config)]  # type: ignore[arg-type]
    return config(**{**{name: getattr(options, name) for name in names if hasattr(options, name)}, **others})


def from_mapping(config: type[Config], content: Any, where: str) -> Config:
    """A config from the mapping of a YAML or JSON file, with the configs inside it; a ValueError names the place of what is wrong."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping of names to settings, found {type(content).__name__}")
    hints = typing.get_type_hints(config)
    fields = {each.name: each for each in dataclasses.fields(config)}  # type: ignore[arg-type]
    unknown = sorted(str(name) for name in content if name not in fields)
    if unknown:
        raise ValueError(f"{where}: found {', '.join(unknown)}, wanted some of {', '.join(fields)}")
    needed = [name for name, each in fields.items() if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in content and type(None) not in _kinds(hints[name])]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} must be given")
    given = {name: _entry(hints[name], entry, f"{where}: {name}") for name, entry in content.items()}
    try:
        return config(**{name: None for name in needed if name not in given}, **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _entry(hint: Any, entry: Any, where: str) -> Any:
    kinds = _kinds(hint)
    if Any in kinds or (entry is None and type(None) in kinds):
        return entry
    section = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    if section is not None:
        return from_mapping(typing.cast(type, section), entry, where)
    kinds = [kind for kind in kinds if kind is not type(None)]
    for kind in kinds:
        origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
        if origin is Literal:
            if entry in inner:
                return entry
        elif origin in (list, tuple, Sequence) and not isinstance(entry, str):
            if isinstance(entry, list | tuple):
                return (list if origin is list else tuple)(_entry(inner[0] if inner else Any, each, f"{where}[{number}]") for number, each in enumerate(entry))
        # YAML reads 1 as an integer, and true as no number.
        elif origin is float and type(entry) is int:
            try:
                return float(entry)
            except OverflowError:
                raise ValueError(f"{where} must be a finite number, found one too large for a float") from None
        elif isinstance(entry, origin) and not (isinstance(entry, bool) and origin is not bool):
            return entry
    raise ValueError(f"{where} must be {' or '.join(_named(kind) for kind in kinds)}, found {entry!r}")


def _named(kind: Any) -> str:
    """A type in the words of a YAML file."""
    origin = typing.get_origin(kind) or kind
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return "list" if origin in (tuple, Sequence) else origin.__name__


def _kinds(hint: Any) -> list[Any]:
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def _reader(kind: Any) -> Callable[[str], Any]:
    """From the text of a flag to a value of this type."""
    if (typing.get_origin(kind) or kind) not in (tuple, list, Sequence):
        return kind
    return listed(typing.get_args(kind)[0])


def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Comma-separated entries of one kind."""

    def read(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    read.__name__ = f"list of {kind.__name__}"
    return read
