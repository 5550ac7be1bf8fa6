"""One run at a time writes into a folder."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"


@contextlib.contextmanager
def writing_lock(folder: Path, first: bool = True) -> Iterator[Callable[[], None]]:
    """Hold a folder's lock inside the block; the system releases it when the process ends, however it ends.

    The first process of a run holds it alone until it calls `share`; the run's other processes join after that. As long as one
    of them lives, no other run gets in.

    Args:
        folder: made if absent.
        first: whether this process starts the run, or joins it.

    Yields:
        `share`, which lets the other processes of this run in.

    Raises:
        ValueError: a file is in place of the folder.
        RuntimeError: another run is writing into the folder.
        OSError: the folder cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; rollouts are written into a folder")
    folder.mkdir(parents=True, exist_ok=True)
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
