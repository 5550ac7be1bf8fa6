"""Tables of results: the columns with their units, for the page, the CSV file and the glossary (templates/glossary.html), and one in plain text."""

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from recontrol.evaluation.results import Result
from recontrol.reports.comparison import Row, not_told_apart

HEADER = ("setting", "reward", "95 % interval", "diversity", "coherence", "NLL", "length", "tokens/s", "cost", "|edit|")
FORMS = {"reward": ".3f", "diversity": ".3f", "coherence": ".3f", "nll": ".2f", "length": ".1f", "cost": ".2f", "edit_norm": ".2f"}
NOTE = (
    "alpha: step size, n: steps. NLL: nats a token under the uncontrolled model. length: tokens a response. "
    "cost: time of a decode step over the uncontrolled one's. |edit|: mean norm."
)
WIDTH = 120
# As wide as a digit in a column of numbers, and for what was not measured.
MINUS, DASH = "\u2212", "\u2013"
# Digits after the point beyond which a number is nothing.
SMALLEST = 4
Interval = tuple[float, float]
# A number in a table and as it is shown: `number`, `text`, `interval`, `best`.
Cell = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column with a number in each row: `key` in the CSV file, `title` and `unit` in its heading."""

    key: str
    title: str
    unit: str = ""
    # Attributes of a row: its number, the 95 % interval, and the numbers, one a response, whose mean it is if the best row is to be marked.
    path: str = ""
    interval_path: str = ""
    responses_path: str = ""
    scale: float = 1.0
    # How a number is written where intervals do not say how many digits are worth it: where there are none, or rows are not `alike` in size.
    form: str = ".3f"
    alike: bool = True

    def number(self, row: Row) -> float | None:
        """The number of a row; None where it was not measured."""
        found = _get(row, self.path or f"result.{self.key}")
        return found if found is None or self.scale == 1 else found * self.scale

    def interval(self, row: Row) -> Interval | None:
        """(low, high), 95 %; None without one."""
        return _get(row, self.interval_path)

    def write(self, number: float | None, digits: int | None = None) -> str:
        """A number with so many digits after the point, or as `form` says; None is a dash."""
        if number is None:
            return DASH
        # What is nothing beside the others is written as 0.
        number = round(number, SMALLEST) if digits is None and self.form.endswith("g") else number
        return format(number, self.form if digits is None else f".{digits}f").replace("-", MINUS)

    def cell(self, number: float | None, interval: Interval | None, digits: int | None, best: bool = False) -> Cell:
        """A number as a table shows it; `best` where the row is better than all others beyond chance."""
        shown = "" if interval is None else f"[{self.write(interval[0], digits)}, {self.write(interval[1], digits)}]"
        return {"number": number, "text": self.write(number, digits), "interval": shown, "best": best}

    def cells(self, rows: Sequence[Row]) -> list[Cell]:
        """The column in a table, one cell a row."""
        intervals = [self.interval(row) for row in rows]
        digits = interval_digits([interval for interval in intervals if interval]) if self.alike else None
        best, others = not_told_apart([_get(row, self.responses_path) for row in rows], rows[0].result.seeds) or (None, [])
        best = None if others else best
        return [self.cell(self.number(row), interval, digits, place == best) for place, (row, interval) in enumerate(zip(rows, intervals, strict=True))]


def _get(row: Row, path: str) -> Any:
    """What a row has under a path such as "result.training.seconds"; of a list, one number an entry. None without a path, and where something is None on it."""
    found: Any = row if path else None
    for name in path.split("."):
        found = [getattr(each, name) for each in found] if isinstance(found, list) else None if found is None else getattr(found, name)
    return None if isinstance(found, list) and None in found else found


def interval_digits(intervals: Sequence[Interval]) -> int | None:
    """Digits after the point so that half an interval is written with two that count; None without intervals."""
    halves = [(high - low) / 2 for low, high in intervals if high > low]
    return min(5, max(0, 1 - math.floor(math.log10(median(halves))))) if halves else None


def measured(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """The columns that have a number in some row."""
    return [column for column in columns if any(column.number(row) is not None for row in rows)]


QUALITY = (
    Column("reward", "Reward", interval_path="result.reward_interval", responses_path="result.rewards"),
    Column("gain", "Gain", "in reward", "gain", "gain_interval"),
    Column("win_rate", "Win rate", "", "win.rate", "win.interval", "win.verdicts"),
    Column("kl", "KL", "nats / response", interval_path="result.kl_interval", form=".3g", alike=False),
    Column("nll", "NLL", "nats / token", form=".2f"),
    Column("perplexity", "Perplexity", form=",.1f"),
    Column("diversity", "Diversity", responses_path="result.answers.diversity"),
    Column("coherence", "Coherence", responses_path="result.answers.coherence"),
    Column("length", "Length", "tokens", form=".1f"),
    Column("value_end", "V at the end", "in reward"),
    Column("edit_norm", "Edit", "norm", form=".2f"),
)
COST = (
    Column("tokens_per_second", "Speed", "tokens / s", form=",.1f"),
    Column("cost", "Time of a step", "x uncontrolled", form=".2f"),
    Column("added_ms_per_token", "Added", "ms / token", "result.added_seconds", scale=1000),
    Column("peak_mib", "Peak memory", "MiB", "result.peak_bytes", scale=2**-20, form=",.1f"),
    Column("trained_parameters", "Trained", "parameters", "result.training.parameters", form=",.0f"),
    Column("training_seconds", "Training", "s", "result.training.seconds", form=",.1f"),
    Column("training_peak_mib", "Training memory", "MiB", "result.training.peak_bytes", scale=2**-20, form=",.1f"),
)


def table(results: Sequence[Result], chosen: Collection[str] = (), rule: str = "the largest coherence + diversity + reward") -> str:
    """The results as aligned plain text, with a line on what the columns mean; methods whose labels are in `chosen`, by this rule, have a star."""
    rows: list[tuple[str, ...]] = [HEADER]
    for result in results:
        (low, high), speed = result.reward_interval, result.tokens_per_second
        numbers = [(getattr(result, name), form) for name, form in FORMS.items()]
        reward, *quality, cost, edit = ["-" if number is None else format(number, form) for number, form in numbers]
        measured = (reward, f"[{low:.3f}, {high:.3f}]", *quality, f"{speed:.{0 if speed >= 100 else 1}f}", f"{cost}x", edit)
        rows.append((result.method + (" *" if result.method in chosen else ""), *measured))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += textwrap.wrap(NOTE, WIDTH)
    if any(result.method in chosen for result in results):
        lines.append(f"* chosen: {rule}.")
    return "\n".join(lines)


def rule_in_words(rule: str | Mapping[str, float]) -> str:
    """What settings are chosen by."""
    if isinstance(rule, Mapping):
        return f"the largest reward within {rule['kl']:g} nats a response"
    return {"paper": "the largest coherence + diversity + reward", "reward": "the largest reward"}[rule]
