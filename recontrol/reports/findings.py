"""What a study found, as its report takes it."""

from dataclasses import dataclass, field

from recontrol.evaluation.results import Result
from recontrol.evaluation.win_rate import WinRate


@dataclass
class Findings:
    """What a study found.

    Attributes:
        results: on the test prompts: the uncontrolled model, then one for each row.
        names: of the rows, one a result.
        prompts: the test prompts.
        validation: on the validation prompts: the uncontrolled model, then all settings of all rows; empty where there was no choice to make.
        groups: by the name of a row, which results of `validation` are its settings.
        wins: one a result; None for the uncontrolled model itself, or all where there is no judge.
        against: what the win rate compares with; None without it.
    """

    results: list[Result]
    names: list[str]
    prompts: list[str]
    validation: list[Result] = field(default_factory=list)
    groups: dict[str, list[int]] = field(default_factory=dict)
    wins: list[WinRate | None] = field(default_factory=list)
    against: str | None = None
