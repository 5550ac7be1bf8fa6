"""The recorded numbers: one CSV row per variant of a case, and the ratios between variants."""

import csv
import dataclasses
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from recontrol.files import write_aside

DATA = Path(__file__).resolve().parent / "data" / "cpu.csv"
GPU_DATA = DATA.with_name("gpu.csv")
OURS = "recontrol"
DENSE = ("dense", "dense_compiled")
# What the ratios are taken against, in the order in which they are shown.
COMPARED = {
    "released_loop": "released loop",
    "frozen_loop": "frozen loop",
    "best_dense": "best dense",
    "floor_once": "floor, bytes once",
    "floor_read": "floor, read",
    "floor_copy": "floor, copy",
}


@dataclass(frozen=True)
class Row:
    """One variant of one case.

    Args:
        commit: commit of the checkout, with "-dirty" where it had changes.
        date: start of the run, UTC, ISO 8601.
        cpu: processor.
        instruction_set: which build of the C++ kernel ran.
        threads: threads of torch and of the kernel.
        torch: version.
        recontrol: version.
        suite: "ascend", "decode", "generate", "training", "collect" or "train".
        case: what is measured, in words; variants of one case were interleaved.
        layers: linear layers of the value function.
        weights: "initialised" or "trained".
        batch: hidden states, or sequences; of "generate" all prompts.
        hidden_size: width of the hidden state.
        width: units of each hidden layer of the value function.
        step_size: alpha.
        steps: n.
        dtype: of hidden states and weights.
        variant: what ran, for example "recontrol" or "released_loop".
        detail: which form of it.
        rounds: how many rounds the percentiles are of.
        p20_ms: 20th percentile of milliseconds per ascent of the batch, per `generate` (on a GPU per decode step), per step of training, or
            of a whole collection or epoch.
        p50_ms: median.
        p80_ms: 80th percentile.
        tokens: new tokens of all sequences in what the percentiles are of, or tokens trained on; 0 for an ascent.
        bytes_moved: see `benchmarks.traffic`; 0 for decoding.
        bytes_once: see `benchmarks.traffic`; 0 for decoding.
        flips_per_step: see `benchmarks.traffic`; 0 for decoding.
        device: the GPU; empty where a processor did the work, and so are the next three.
        driver: version of its driver.
        cuda: version that torch was built for.
        triton: version.
        copy_gb_per_s: measured speed of a large copy on the device, bytes read and bytes written; 0 on a processor.
        peak_bytes: most memory in use at once, beyond what was there before, on the device or of the process; 0 where it is not measured.
        wasted_cache: share of the key/value cache handed out that never holds a token that is read; like the next two of "generate" only, see
            `benchmarks.cache_use`.
        cache_bytes: key/value cache held at once at most.
        needed_cache_bytes: what of it one step reads at most: the bytes that have to exist.
    """

    commit: str
    date: str
    cpu: str
    instruction_set: str
    threads: int
    torch: str
    recontrol: str
    suite: str
    case: str
    layers: int
    weights: str
    batch: int
    hidden_size: int
    width: int
    step_size: float
    steps: int
    dtype: str
    variant: str
    detail: str
    rounds: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    tokens: int = 0
    bytes_moved: int = 0
    bytes_once: int = 0
    flips_per_step: float = 0.0
    device: str = ""
    driver: str = ""
    cuda: str = ""
    triton: str = ""
    copy_gb_per_s: float = 0.0
    peak_bytes: int = 0
    wasted_cache: float = 0.0
    cache_bytes: int = 0
    needed_cache_bytes: int = 0


COLUMNS = [field.name for field in dataclasses.fields(Row)]
# Files that were written before a column came have rows without it.
REQUIRED = [field.name for field in dataclasses.fields(Row) if field.default is dataclasses.MISSING]
_TYPES: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Row)}


def percentiles(seconds: list[float]) -> dict[str, Any]:
    """The columns `rounds`, `p20_ms`, `p50_ms` and `p80_ms`."""
    p20, p50, p80 = (round(float(ms), 4) for ms in numpy.percentile(numpy.array(seconds) * 1e3, [20, 50, 80]))
    return {"rounds": len(seconds), "p20_ms": p20, "p50_ms": p50, "p80_ms": p80}


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file, whole or not at all.

    Raises:
        ValueError: the file has other columns.
        OSError: it cannot be written.
    """
    kept = read_rows(path) if path.exists() else []
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in [*kept, *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside:
        aside.write_text(text.getvalue(), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a CSV file, oldest first.

    Raises:
        ValueError: the file has other columns, or a value that is not of its column's type.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        found = list(reader.fieldnames or [])
        if not set(REQUIRED) <= set(found) <= set(COLUMNS):
            raise ValueError(f"{path} does not hold benchmark rows: found columns {found}, wanted {COLUMNS}")
        return [Row(**{name: _TYPES[name](text) for name, text in record.items()}) for record in reader]


def latest(rows: Iterable[Row]) -> list[Row]:
    """For each machine, suite, case and variant its newest row, in order of first appearance."""
    newest: dict[tuple, Row] = {}
    for row in rows:
        key = (row.device or row.cpu, row.threads, row.suite, row.case, row.variant)
        if key not in newest or row.date >= newest[key].date:
            newest[key] = row
    return list(newest.values())


def by_case(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """The variants of each case by name, with "best_dense", the quicker of the dense ones; rows of one run only."""
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.device or row.cpu, row.threads, row.date, row.suite, row.case), {})[row.variant] = row
    for variants in cases.values():
        dense = [variants[name] for name in DENSE if name in variants]
        if dense:
            variants["best_dense"] = min(dense, key=lambda row: row.p50_ms)
    return list(cases.values())


def ratio(variants: dict[str, Row], against: str) -> float | None:
    """Median of `against` over the median of ours (for a floor: how many times the floor ours takes); None where one is missing."""
    if OURS not in variants or against not in variants:
        return None
    ours, other = variants[OURS].p50_ms, variants[against].p50_ms
    return ours / other if against.startswith("floor") else other / ours


def ratio_lines(rows: Iterable[Row]) -> list[str]:
    """For each case one line of text: our median, and how it compares."""
    lines = []
    for variants in by_case(rows):
        first = next(iter(variants.values()))
        parts = [f"{first.suite}: {first.case}:"]
        if OURS in variants:
            parts.append(f"{variants[OURS].p50_ms:.2f} ms")
        for name, label in COMPARED.items():
            times = ratio(variants, name)
            if times is not None:
                parts.append(f"| {times:.1f} x the {label}" if name.startswith("floor") else f"| {label} takes {times:.1f} x")
        if "static" in variants and OURS in variants:
            ours, static = variants[OURS], variants["static"]
            waste = f"waste {static.wasted_cache:.0%} of their cache, ours {ours.wasted_cache:.0%}"
            parts.append(f"| static batches take {static.p50_ms / ours.p50_ms:.1f} x and {waste}")
        if "uncontrolled" in variants and OURS in variants:
            parts.append(f"| {variants[OURS].p50_ms / variants['uncontrolled'].p50_ms:.2f} x uncontrolled")
        if "released_code" in variants and OURS in variants:
            ours, released = variants[OURS], variants["released_code"]
            parts.append(
                f"| released code takes {released.p50_ms / ours.p50_ms:.1f} x the time and {released.peak_bytes / max(1, ours.peak_bytes):.1f} x the memory"
            )
        if first.suite == "ascend":
            parts.append(f"| {first.flips_per_step:.1f} flips a step")
        lines.append(" ".join(parts))
    return lines
