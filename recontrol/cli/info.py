"""`recontrol info`."""

import argparse
import json
from typing import Any

from recontrol.cli import options as shared


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    shared.add_options(parser, "info")


def run(options: argparse.Namespace) -> None:
    """Print `backend_info()`."""
    from recontrol.ascent.backends import backend_info

    info = backend_info()
    print(json.dumps(info, indent=2, default=str) if options.json else "\n".join(_lines(info, "")))


def _lines(entry: dict[str, Any], indent: str) -> list[str]:
    """One line an entry, nested dictionaries indented under their name."""
    lines = []
    width = max((len(str(name)) for name, value in entry.items() if not isinstance(value, dict)), default=0)
    for name, value in entry.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            shown = {True: "yes", False: "no", None: "-"}.get(value, value) if isinstance(value, bool | None) else value
            lines.append(f"{indent}{str(name).ljust(width)}  {', '.join(map(str, shown)) if isinstance(shown, list | tuple) else shown}")
    return lines
