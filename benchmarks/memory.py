"""The most memory that this process has had."""

import contextlib
import re
import resource
import sys
from pathlib import Path

# Linux tells it for the process alone: what `getrusage` tells begins with the peak of the process that started this one.
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Let the peak begin anew at what is in use now, where the system can; elsewhere it is that of the whole life of the process."""
    with contextlib.suppress(OSError):
        FORGET.write_text("5")


def peak_bytes() -> int:
    """The most memory in use since the peak was forgotten, in bytes."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE) if STATUS.exists() else None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_beyond(before: int) -> int:
    """The peak beyond what `peak_bytes` said before, in bytes; 0 where there was none, for the system moves its mark late and may show less than it did."""
    return max(0, peak_bytes() - before)
