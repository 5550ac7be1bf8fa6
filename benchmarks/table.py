"""Render the newest recorded rows as Markdown.

python -m benchmarks.table [rows.csv]: all tables of a processor, or of a GPU (its file may still be missing).
python -m benchmarks.table --summary: the figures of the README's first screen.
"""

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.rows import COMPARED, DATA, GPU_DATA, OURS, Row, by_case, latest, ratio, read_rows


def ascend_table(cases: list[dict[str, Row]]) -> list[str]:
    """Our milliseconds per ascent (median; 20th to 80th percentile), and how they compare."""
    head = ["layers", "weights", "batch", "alpha", "n", "recontrol, ms", *COMPARED.values(), "flips a step"]
    lines = [_line(head), _line(["---"] * len(head))]
    for variants in cases:
        ours = variants[OURS]
        cells = [ours.layers, ours.weights, ours.batch, ours.step_size, ours.steps, f"{ours.p50_ms:.2f} ({ours.p20_ms:.2f} to {ours.p80_ms:.2f})"]
        for name in COMPARED:
            times = ratio(variants, name)
            if times is None:
                cells.append("")
            else:
                cells.append(f"{times:.1f} x" if name.startswith("floor") else f"{variants[name].p50_ms:,.1f} ms ({times:.0f} x)")
        lines.append(_line([*cells, f"{ours.flips_per_step:.1f}"]))
    return lines


def decode_table(cases: list[dict[str, Row]]) -> list[str]:
    """Tokens per second without control, with it, and with the released loop."""
    names = {"uncontrolled": "without control", OURS: "recontrol", "released_loop": "released loop"}
    head = ["value function", "batch", "alpha", "n", *(f"{label}, tokens/s" for label in names.values()), "time of control"]
    lines = [_line(head), _line(["---"] * len(head))]
    for variants in cases:
        ours = variants[OURS]
        speeds = [f"{1e3 * variants[name].tokens / variants[name].p50_ms:,.0f}" if name in variants else "" for name in names]
        cost = ours.p50_ms / variants["uncontrolled"].p50_ms - 1
        lines.append(_line([f"{ours.layers} layers, {ours.width} wide", ours.batch, ours.step_size, ours.steps, *speeds, f"{cost:+.0%}"]))
    return lines


def generate_table(cases: list[dict[str, Row]]) -> list[str]:
    """For each way of batching tokens per second without control and with it, what becomes of the cache, and peak of memory under control."""
    ways = {
        "continuous": (OURS, "uncontrolled"),
        "padded, by length": ("static", "static_uncontrolled"),
        "padded, as given, released loop": ("released_loop", "released_uncontrolled"),
    }
    head = ["batches", "prompts", "without control, tokens/s", "with control, tokens/s", "time of control"]
    head += ["wasted cache", "cache", "read at once", "peak memory"]
    lines = [_line(head), _line(["---"] * len(head))]
    for variants in cases:
        for label, (name, free) in ways.items():
            ours, other = variants[name], variants[free]
            speeds = [f"{1e3 * row.tokens / row.p50_ms:,.0f}" for row in (other, ours)]
            sizes = [f"{size / 2**20:,.1f} MiB" for size in (ours.cache_bytes, ours.needed_cache_bytes, ours.peak_bytes)]
            cost = f"{ours.p50_ms / other.p50_ms - 1:+.0%}"
            lines.append(_line([label, f"{ours.batch}, {ours.detail}", *speeds, cost, f"{ours.wasted_cache:.0%}", *sizes]))
    return lines


def growth_table(cases: list[dict[str, Row]]) -> list[str]:
    """Tokens per second and peak of memory as the data grow, and those of the released code's way."""
    head = ["data", "tokens", "recontrol, tokens/s", "released code, tokens/s", "recontrol, peak", "released code, peak"]
    lines = [_line(head), _line(["---"] * len(head))]
    for variants in cases:
        both = [variants[OURS], variants["released_code"]]
        speeds = [f"{1e3 * row.tokens / row.p50_ms:,.0f}" for row in both]
        peaks = [f"{row.peak_bytes / 2**20:,.0f} MiB" for row in both]
        lines.append(_line([f"{both[0].suite}: {both[0].detail}", f"{both[0].tokens:,}", *speeds, *peaks]))
    return lines


def render(rows: Iterable[Row]) -> str:
    """All tables of processors, one set for each run and machine whose rows are the newest."""
    parts: list[str] = []
    cases = [variants for variants in by_case(latest(row for row in rows if not row.device)) if OURS in variants]
    for machine in dict.fromkeys(_machine(variants[OURS]) for variants in cases):
        here = [variants for variants in cases if _machine(variants[OURS]) == machine]
        parts += [machine, ""]
        for suite, table in (("ascend", ascend_table), ("decode", decode_table), ("generate", generate_table)):
            chosen = [variants for variants in here if variants[OURS].suite == suite]
            if chosen:
                parts += [*table(chosen), ""]
        growing = [variants for variants in here if variants[OURS].suite in ("collect", "train")]
        if growing:
            parts += [*growth_table(growing), ""]
    return "\n".join(parts)


def _machine(row: Row) -> str:
    return f"{row.cpu}, {row.threads} threads, {row.instruction_set}, {row.dtype}, torch {row.torch}, commit {row.commit}, {row.date[:10]}"


def _line(cells: list) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


# The cases of the README's first screen: suite, width of V, batch, step size, steps.
FIRST_SCREEN_ASCENT = ("ascend", 4096, 1, 0.5, 30)
FIRST_SCREEN_DECODE = ("decode", 1024, 1, 0.5, 30)
REPORT = DATA.parents[2] / "reports" / "movie_reviews" / "report.csv"


def summary(rows: Iterable[Row]) -> str:
    """Three figures: the kernel against the released loop, what control adds to a decode step, and reward bought."""
    cases = {}
    for variants in by_case(latest(row for row in rows if not row.device)):
        ours = variants.get(OURS)
        if ours and ours.layers == 2 and ours.weights == "initialised":
            cases[ours.suite, ours.width, ours.batch, ours.step_size, ours.steps] = variants
    ascent, decode = cases[FIRST_SCREEN_ASCENT], cases[FIRST_SCREEN_DECODE]
    added = decode[OURS].p50_ms / decode["uncontrolled"].p50_ms - 1
    released = decode["released_loop"].p50_ms / decode["uncontrolled"].p50_ms - 1
    with REPORT.open(encoding="utf-8", newline="") as file:
        rewards = {row["method"]: float(row["reward"]) for row in csv.DictReader(file)}
    lines = [
        ["", "recontrol", "baseline"],
        ["---"] * 3,
        [
            "30 gradient steps on a 4096-wide V (two CPU cores)",
            f"{ascent[OURS].p50_ms:.1f} ms",
            f"released code {ascent['released_loop'].p50_ms:,.0f} ms, best dense PyTorch {ascent['best_dense'].p50_ms:.0f} ms",
        ],
        ["added to a decode step of a 6.5 M model", f"{added:+.0%}", f"released code {released:+.0%}"],
        ["reward of the movie-review model", f"{rewards['RE-Control']:.2f}", f"{rewards['uncontrolled']:.2f} uncontrolled"],
    ]
    return "\n".join(_line(line) for line in lines)


def render_gpu(rows: Iterable[Row]) -> str:
    """All tables of GPUs, one set for each."""
    from benchmarks.gpu.table import tables

    return "\n".join(tables(rows))


if __name__ == "__main__":
    if "--summary" in sys.argv:
        print(summary(read_rows(DATA)))
        sys.exit()
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    found = read_rows(path) if path.exists() or path.resolve() != GPU_DATA else []
    measured_on_gpu = path.resolve() == GPU_DATA or any(row.device for row in found)
    print(render_gpu(found) if measured_on_gpu else render(found))
