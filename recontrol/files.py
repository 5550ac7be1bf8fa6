"""Writing files whole or not at all, reading JSON, and one run at a time in a folder."""

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_numbers = itertools.count()
# The names of the temporary files that this process is writing now.
_open: set[str] = set()


@contextlib.contextmanager
def write_aside(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, moved over it (a link's target) on success, removed on an error; a device or pipe is written as it is."""
    target, aside = _places(path)
    _open.add(aside.name)
    try:
        yield aside
        if aside != target:
            if target.exists():
                shutil.copymode(target, aside)
            os.replace(aside, target)
    except OSError as error:
        _remove(aside, target)
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}; the previous file, if any, is untouched") from error
    except BaseException:
        _remove(aside, target)
        raise
    finally:
        _open.discard(aside.name)


def _places(path: str | os.PathLike) -> tuple[Path, Path]:
    """The file that a path leads to, and the temporary one beside it; twice the path itself where nothing can be moved over it."""
    given, target = Path(path), Path(os.path.realpath(path))
    if given.is_block_device():
        raise OSError(errno.EINVAL, f"could not write {path}: it is a disk")
    # What /dev/stdout leads to may be a file, which others write too.
    stream = re.match(r"/(proc/|dev/fd/|dev/std\w+$)", os.path.abspath(path))
    if stream or (given.exists() and not (given.is_file() or given.is_dir())):
        return given, given
    # Numbered, because several threads may write the same file.
    return target, target.with_name(f".{target.name}.{next(_numbers)}.{os.getpid()}.part")


def check_output(path: str | os.PathLike, *, folder: bool = False) -> Path:
    """The path of a file or folder that is to be written; what stands in the way is an OSError now, rather than after the work. The folder is made."""
    path = target = aside = Path(path)
    try:
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
        if not folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target, aside = _places(path / "output" if folder else path)
        if aside != target:
            aside.write_bytes(bytes(4096))
            aside.unlink()
    except OSError as error:
        _remove(aside, target)
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}; nothing was done") from error
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that no longer run (see `write_aside`); those that are being written stay."""
    for part in folder.glob(".*.part"):
        match = re.fullmatch(r"\..+\.(\d+)\.part", part.name)
        if match and part.name not in _open and not _alive(int(match[1])):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let a Ctrl-C take effect at the end of the short block, since compiled code such as safetensors turns it into an error of its own."""
    # Only the main thread hears of interrupts, and may say what happens at one.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[Any, ...]] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        # None: the handler was not set by Python, and cannot be put back by it.
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
    if caught and callable(before):
        before(*caught[0])


def _remove(aside: Path, target: Path) -> None:
    # Where it cannot even be removed, the error that led here says more.
    with contextlib.suppress(OSError):
        if aside != target:
            aside.unlink()


def _alive(process: int) -> bool:
    """Whether another process has this number; a file that bears our own and is not open was left by one that had it before."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return process != os.getpid()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as indented JSON to `path`, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file; a ValueError if it is not JSON, for example cut in the middle."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the file is damaged or not one of ours") from error


def check_same_settings(found: dict[str, Any], wanted: dict[str, Any], what: str, *, ignored: Collection[str] = ()) -> None:
    """Refuse with a ValueError what was begun with other settings; `what` is the beginning of the message, `ignored` are names that may differ."""
    for name in sorted((found.keys() | wanted.keys()) - set(ignored)):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{what} another {name}: found {found.get(name)!r}, wanted {wanted.get(name)!r}; use the same settings to go on with it, or another folder"
            )


@contextlib.contextmanager
def writing_lock(folder: Path, first: bool = True) -> Iterator[Callable[[], None]]:
    """Hold a folder's lock inside the block; the `first` process of a run is alone until it calls the `share` that is yielded, then the others join."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; rollouts are written into a folder")
    check_output(folder, folder=True)
    if fcntl is None:
        logger.warning("this system has no flock: nothing keeps two runs from writing into %s at once", folder)
        yield lambda: None
        return
    # The file stays: if it were removed, the next run and one that still waits for it could hold two files of this name.
    with (folder / LOCK_NAME).open("a") as file:

        def hold(kind: int) -> None:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"another run is writing into {folder}: wait until it has ended, or use another folder") from None

        hold(fcntl.LOCK_EX if first else fcntl.LOCK_SH)
        yield lambda: hold(fcntl.LOCK_SH)
