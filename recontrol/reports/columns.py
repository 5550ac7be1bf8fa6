"""The columns of a report, with their units and meanings: one list for the tables, the CSV file and the glossary."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from recontrol.reports.comparison import Row, not_told_apart

MIB = 2**20
# As wide as a digit in a column of numbers, and for what was not measured.
MINUS = "\u2212"
DASH = "\u2013"
# Digits after the point beyond which a number is nothing.
SMALLEST = 4
Interval = tuple[float, float]


@dataclass(frozen=True)
class Column:
    """A column with a number in each row: `key` in the CSV file, `title` and `unit` in its heading, `meaning` in the glossary."""

    key: str
    title: str
    unit: str
    meaning: str
    # Of a row; None where it was not measured.
    number: Callable[[Row], float | None]
    # (low, high), 95 %.
    interval: Callable[[Row], Interval | None] = lambda row: None
    # The numbers, one a response, whose mean it is, where a larger one is better and the best row is marked.
    responses: Callable[[Row], Sequence[float] | None] = lambda row: None
    # How a number is written where no interval says how many digits are worth it.
    form: str = ".3f"
    # Whether the numbers of all rows are of one size, so that their intervals say how many digits are written.
    alike: bool = True

    def write(self, number: float | None, digits: int | None = None) -> str:
        """A number with so many digits after the point, or as `form` says; None is a dash."""
        if number is None:
            return DASH
        if digits is None and self.form.endswith("g"):
            # What is nothing beside the others is written as 0.
            number = round(number, SMALLEST)
        return format(number, self.form if digits is None else f".{digits}f").replace("-", MINUS)

    def write_interval(self, interval: Interval | None, digits: int | None = None) -> str:
        """[low, high]; empty for None."""
        return "" if interval is None else f"[{self.write(interval[0], digits)}, {self.write(interval[1], digits)}]"


@dataclass(frozen=True)
class TableCell:
    """A number in a table and as it is shown; `best` where the row is better than all others beyond chance."""

    number: float | None
    text: str
    interval: str
    best: bool


def cells(column: Column, rows: Sequence[Row]) -> list[TableCell]:
    """A column of a table, one cell a row."""
    intervals = [column.interval(row) for row in rows]
    digits = interval_digits([interval for interval in intervals if interval]) if column.alike else None
    compared = not_told_apart([column.responses(row) for row in rows], rows[0].result.seeds)
    best = compared[0] if compared and not compared[1] else None
    made = []
    for place, (row, interval) in enumerate(zip(rows, intervals, strict=True)):
        number = column.number(row)
        made.append(TableCell(number, column.write(number, digits), column.write_interval(interval, digits), place == best))
    return made


def interval_digits(intervals: Sequence[Interval]) -> int | None:
    """Digits after the point so that half an interval is written with two that count; None without intervals."""
    halves = [(high - low) / 2 for low, high in intervals if high > low]
    return min(5, max(0, 1 - math.floor(math.log10(median(halves))))) if halves else None


def measured(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """The columns that have a number in some row."""
    return [column for column in columns if any(column.number(row) is not None for row in rows)]


def _of(name: str, scale: float | None = None) -> Callable[[Row], Any]:
    """What the result of a row has under a name such as "reward" or "training.seconds", in another unit."""

    def read(row: Row) -> Any:
        found = operator.attrgetter(name)(row.result)
        return found if found is None or scale is None else found * scale

    return read


def _of_wins(name: str) -> Callable[[Row], Any]:
    return lambda row: None if row.win is None else getattr(row.win, name)


def _of_answers(name: str) -> Callable[[Row], list[float] | None]:
    """One number a response, where all have one."""

    def read(row: Row) -> list[float] | None:
        found = [getattr(answer, name) for answer in row.result.answers]
        return None if None in found else found

    return read


REWARD_MEANING = (
    "Mean score of the responses; of several rewards their weighted sum. In brackets the 95 % percentile bootstrap interval over prompts: the seeds of "
    "a prompt are averaged first, since responses to the same prompt are not independent."
)
GAIN_MEANING = (
    "Reward minus that of the uncontrolled model for the same prompts. The interval is of the paired difference, prompt by prompt, so what a prompt adds "
    "to both cancels; a gain is beyond chance where 0 lies outside."
)
KL_MEANING = (
    "Divergence from the uncontrolled model: mean over responses of sum_t KL(p_t || p0_t), p_t being the distribution that token t was sampled from and "
    "p0_t that of the uncontrolled model after the same text. For best-of-n the bound ln n - (n - 1) / n."
)
WIN_MEANING = "(wins + ties / 2) / pairs, as the judge sees it; 0.5 is neither better nor worse."
DIVERSITY_MEANING = (
    "How little a response repeats itself: mean of prod_{n=2..4} (1 - rep_n), rep_n being the share of its n-grams of words that are repetitions."
)
NLL_MEANING = "Negative log-likelihood of the response tokens under the uncontrolled model at temperature 1. High for what the model would hardly write."
COHERENCE_MEANING = "Mean cosine of the sentence embeddings of prompt and response."
LENGTH_MEANING = "Mean number of tokens of a response, the end-of-sequence token included."
VALUE_MEANING = "Mean of V at the states read for the last tokens: what the value function makes of the responses. Far above the reward, it is fooled."
EDIT_MEANING = "Mean Euclidean norm of what is added to a hidden state at a decode step."
SPEED_MEANING = "Response tokens over the seconds of generation, all rows of a batch together, without scoring."
STEP_MEANING = "Time of a decode step over that of the uncontrolled model for the same batch, median over batches; 1 is free."
ADDED_MEANING = "Time of a decode step beyond the uncontrolled one's for the same batch, over the rows of the batch; median over batches."
PEAK_MEANING = "Memory during generation beyond that before it, the most of any batch."
TRAINED_MEANING = "Numbers that had to be trained before the method could respond."
TRAINING_MEANING = "Wall-clock time of the training, without the collection of rollouts."

QUALITY = (
    Column("reward", "Reward", "", REWARD_MEANING, _of("reward"), _of("reward_interval"), _of("rewards")),
    Column("gain", "Gain", "in reward", GAIN_MEANING, lambda row: row.gain, lambda row: row.gain_interval),
    Column("win_rate", "Win rate", "", WIN_MEANING, _of_wins("rate"), _of_wins("interval"), _of_wins("verdicts")),
    Column("kl", "KL", "nats / response", KL_MEANING, _of("kl"), _of("kl_interval"), form=".3g", alike=False),
    Column("nll", "NLL", "nats / token", NLL_MEANING, _of("nll"), form=".2f"),
    Column("perplexity", "Perplexity", "", "exp(NLL).", _of("perplexity"), form=",.1f"),
    Column("diversity", "Diversity", "", DIVERSITY_MEANING, _of("diversity"), responses=_of_answers("diversity")),
    Column(
        "coherence", "Coherence", "", "Mean cosine of the sentence embeddings of prompt and response.", _of("coherence"), responses=_of_answers("coherence")
    ),
    Column("length", "Length", "tokens", LENGTH_MEANING, _of("length"), form=".1f"),
    Column("value_end", "V at the end", "in reward", VALUE_MEANING, _of("value_end")),
    Column("edit_norm", "Edit", "norm", EDIT_MEANING, _of("edit_norm"), form=".2f"),
)

COST = (
    Column("tokens_per_second", "Speed", "tokens / s", SPEED_MEANING, _of("tokens_per_second"), form=",.1f"),
    Column("cost", "Time of a step", "x uncontrolled", STEP_MEANING, _of("cost"), form=".2f"),
    Column("added_ms_per_token", "Added", "ms / token", ADDED_MEANING, _of("added_seconds", 1000)),
    Column("peak_mib", "Peak memory", "MiB", PEAK_MEANING, _of("peak_bytes", 1 / MIB), form=",.1f"),
    Column("trained_parameters", "Trained", "parameters", TRAINED_MEANING, _of("training.parameters"), form=",.0f"),
    Column("training_seconds", "Training", "s", TRAINING_MEANING, _of("training.seconds"), form=",.1f"),
    Column("training_peak_mib", "Training memory", "MiB", "Memory during training beyond that before it.", _of("training.peak_bytes", 1 / MIB), form=",.1f"),
)
