"""Writing files so that a killed process never leaves a half-written one that looks whole."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def write_aside(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success move it over `path`, on any error remove it.

    Raises:
        OSError: the disk is full or the folder cannot be written; the message names `path`.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}; the previous file, if any, is untouched") from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that no longer run (see `write_aside`); those of a live process stay."""
    for part in folder.glob(".*.part"):
        match = re.fullmatch(r"\..+\.(\d+)\.part", part.name)
        if match and not _alive(int(match[1])):
            part.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as indented JSON to `path`, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is not JSON (for example cut in the middle).
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the file is damaged or not one of ours") from error
