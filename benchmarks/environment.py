"""What the numbers were measured on."""

import datetime
import functools
import subprocess
from pathlib import Path
from typing import Any

import cpuinfo
import torch

import recontrol

ROOT = Path(__file__).resolve().parents[1]
# Where Linux tells the size of each cache; the last index is the last level.
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# What the numbers depend on; a word changed in the README makes no other measurement of it.
MEASURED = ("csrc", "kernels", "recontrol", "benchmarks/*.py", "setup.py", "pyproject.toml", "examples")
USUAL_CACHE_BYTES = 32 * 2**20


@functools.cache
def environment() -> dict[str, Any]:
    """Commit, date (UTC), processor, instruction set of the kernel, threads and versions: the columns every row begins with."""
    status = recontrol.backend_info()["backends"]["cpu"]
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", "unknown"),
        "instruction_set": status.get("instruction_set", "none"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "recontrol": recontrol.__version__,
    }


def commit() -> str:
    """The commit checked out, with "-dirty" where what is measured differs from it; "unknown" outside a checkout."""
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        return name + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def last_level_cache_bytes() -> int:
    """The size of the largest cache of the first core; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=USUAL_CACHE_BYTES)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
