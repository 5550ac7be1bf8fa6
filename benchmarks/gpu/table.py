"""Rows measured on a GPU as Markdown; what was planned and has no row reads "not measured"."""

from collections.abc import Iterable

from benchmarks.gpu import ascend, decode, training
from benchmarks.rows import DENSE, Row

NONE = "not measured"
OURS = {f"recontrol_{backend}": backend for backend in ascend.OURS["cuda"]}
Cases = dict[tuple[str, str], dict[str, Row]]


def tables(rows: Iterable[Row]) -> list[str]:
    """The lines of all tables, for each GPU that has rows."""
    measured = [row for row in rows if row.device]
    lines: list[str] = []
    for device in dict.fromkeys(row.device for row in measured):
        here = _newest_runs(row for row in measured if row.device == device)
        last = max(here, key=lambda row: row.date)
        versions = f"driver {last.driver}, CUDA {last.cuda}, torch {last.torch}, triton {last.triton}, commit {last.commit}, {last.date[:10]}"
        speed = max(row.copy_gb_per_s for row in here)
        cases: Cases = {}
        for row in here:
            cases.setdefault((row.suite, row.case), {})[row.variant] = row
        lines += [f"{device}, {versions}" + (f", copies at {speed:,.0f} GB/s" if speed else ""), ""]
        lines += [*_ascend(cases), "", *_decode(cases), "", *_training(cases), ""]
    return lines or [f"GPU: {NONE}.", ""]


def _newest_runs(rows: Iterable[Row]) -> list[Row]:
    """For each case the rows of its newest run alone: only variants of one run may be compared."""
    runs: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        runs.setdefault((row.suite, row.case), {}).setdefault(row.date, []).append(row)
    return [row for dates in runs.values() for row in dates[max(dates)]]


def _ascend(cases: Cases) -> list[str]:
    """Microseconds an ascent, and how many times as long the others take as the quicker of ours."""
    head = ["layers", "weights", "batch", "alpha", "n", *(f"{backend}, µs" for backend in OURS.values())]
    lines = _head([*head, "released loop", "dense", "dense, compiled", "floor", "flips a step"])
    for cell in ascend.FULL:
        found = cases.get(("ascend", cell.name), {})
        ours = _quickest(found, OURS)
        others = [_times(found.get(name), ours) for name in ("released_loop", *DENSE)]
        if not cell.released:
            others[0] = ""
        if not cell.compiled:
            others[2] = ""
        floor = found.get("floor_copy")
        above = f"{floor.p50_ms * 1e3:,.1f} µs (ours {ours.p50_ms / floor.p50_ms:.1f} x)" if floor and ours else NONE
        flips = f"{ours.flips_per_step:.1f}" if ours else NONE
        times = [_spread(found.get(name)) if cell.layers == 2 or backend != "triton" else "" for name, backend in OURS.items()]
        lines.append(_line([cell.layers, cell.weights, cell.batch, cell.step_size, cell.steps, *times, *others, above, flips]))
    return lines


def _decode(cases: Cases) -> list[str]:
    """Milliseconds a decode step, what control adds, and tokens per second."""
    head = ["Llama-7B shape", "batch", "without control, ms", *(f"{backend}, ms" for backend in OURS.values())]
    lines = _head([*head, "without control, no graph, ms", "released loop, no graph, ms", "tokens/s", "released loop, tokens/s"])
    planned = [("step in a CUDA graph", batch, decode.case(batch, False)) for batch in decode.BATCHES]
    planned += [("generate, compiled", batch, f"generate, {decode.case(batch, False)}") for batch in decode.COMPILED_BATCHES]
    for way, batch, case in planned:
        found = cases.get(("decode", case), {})
        free, ours = found.get("uncontrolled"), _quickest(found, OURS)
        controlled = [_milliseconds(row) + (f" ({row.p50_ms / free.p50_ms - 1:+.1%})" if row and free else "") for row in map(found.get, OURS)]
        others = [_milliseconds(found.get(name)) for name in ("uncontrolled_eager", "released_loop")]
        lines.append(_line([way, batch, _milliseconds(free), *controlled, *others, _speed(ours), _speed(found.get("released_loop"))]))
    return lines


def _training(cases: Cases) -> list[str]:
    """Milliseconds and peak memory of a training step."""
    case = training.case(training.RESPONSES, training.TOKENS, training.SIZE)
    found = cases.get(("training", case), {})
    lines = [case, "", *_head(["step", "ms", "beside the kernels", "peak memory"])]
    kernels = found.get("triton")
    names = {"triton": "fused Triton kernels", "torch": "PyTorch, float32", "torch_tf32": "PyTorch, tf32", "torch_autocast": "PyTorch, bfloat16 autocast"}
    for name, label in names.items():
        row = found.get(name)
        lines.append(_line([label, _milliseconds(row), _times(row, kernels), f"{row.peak_bytes / 2**30:.2f} GiB" if row else NONE]))
    return lines


def _quickest(found: dict[str, Row], names: Iterable[str]) -> Row | None:
    return min((found[name] for name in names if name in found), key=lambda row: row.p50_ms, default=None)


def _spread(row: Row | None) -> str:
    return f"{row.p50_ms * 1e3:,.1f} ({row.p20_ms * 1e3:,.1f} to {row.p80_ms * 1e3:,.1f})" if row else NONE


def _milliseconds(row: Row | None) -> str:
    return f"{row.p50_ms:,.3f} ({row.p20_ms:,.3f} to {row.p80_ms:,.3f})" if row else NONE


def _times(row: Row | None, ours: Row | None) -> str:
    return f"{row.p50_ms / ours.p50_ms:,.1f} x" if row and ours else NONE


def _speed(row: Row | None) -> str:
    return f"{1e3 * row.tokens / row.p50_ms:,.0f}" if row else NONE


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: list) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
