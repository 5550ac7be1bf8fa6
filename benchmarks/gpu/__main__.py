"""The command line of the benchmarks on a GPU; see `benchmarks.gpu`."""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.gpu import ascend, decode, training
from benchmarks.gpu.records import Outcome, record
from benchmarks.rows import GPU_DATA, Row

SUITES = {"ascend": ascend.run, "decode": decode.run, "training": training.run, "compiled": decode.run_compiled}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, add rows as cases are done, and say what failed; 1 where anything did."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure the ascent, a decode step and a training step on a GPU.")
    parser.add_argument("suites", nargs="+", choices=list(SUITES), help="what to measure, in this order")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="where (default cuda)")
    parser.add_argument("--tiny", action="store_true", help="small sizes and few rounds: shows that everything runs, its numbers mean nothing")
    parser.add_argument("--rows", type=Path, default=GPU_DATA, help=f"CSV file that the rows are added to (default {GPU_DATA})")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further case after so many seconds")
    given = parser.parse_args(arguments)
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --tiny shows that everything runs")
    start = time.monotonic()
    failures: list[str] = []
    for suite in given.suites:
        cases = list(SUITES[suite](given.device, given.tiny))
        for name, measure in tqdm(cases, desc=suite, file=sys.stderr):
            if time.monotonic() - start > given.seconds:
                failures.append(f"{suite}: {name}: not begun, {given.seconds:.0f} s are over")
                continue
            try:
                outcome = measure()
                for row in record(given.rows, name, outcome, given.device):
                    tqdm.write(_line(row), file=sys.stdout)
            except Exception as error:
                traceback.print_exc()
                outcome = Outcome(failures={"all": f"{type(error).__name__}: {error}"})
            failures += [f"{suite}: {name}: {variant}: {reason}" for variant, reason in outcome.failures.items()]
            gc.collect()
            if given.device.type == "cuda":
                torch.cuda.empty_cache()
    for failure in failures:
        print("FAILED", failure, flush=True)
    return 1 if failures else 0


def _line(row: Row) -> str:
    return f"{row.case}: {row.variant} ({row.detail}): {row.p50_ms:.4f} ms ({row.p20_ms:.4f} to {row.p80_ms:.4f})"


if __name__ == "__main__":
    sys.exit(main())
