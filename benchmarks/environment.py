"""What the numbers were measured on."""

import datetime
import functools
import os
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
MEASURED = ("csrc", "kernels", "recontrol", "benchmarks/*.py", "benchmarks/gpu/*.py", "setup.py", "pyproject.toml", "examples")
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


@functools.cache
def gpu_environment() -> dict[str, Any]:
    """The GPU, its driver, and versions: the columns that only rows of a GPU fill."""
    import triton

    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
        driver = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {"device": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda or torch.version.hip or "", "triton": triton.__version__}


def commit() -> str:
    """The commit checked out, with "-dirty" where what is measured differs from it; outside a checkout RECONTROL_COMMIT, or "unknown"."""
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        return name + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED) else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RECONTROL_COMMIT", "unknown")


def last_level_cache_bytes() -> int:
    """The size of the largest cache of the first core; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=USUAL_CACHE_BYTES)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
