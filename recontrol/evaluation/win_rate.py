"""Win rates: how often a response is better than another one to the same prompt, for example than the data set's preferred one."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from recontrol.data.rewards import reward_name
from recontrol.data.rewards.chat import Usage
from recontrol.evaluation.judges import Judgement
from recontrol.evaluation.metrics import bootstrap_interval


@dataclass(frozen=True)
class WinRate:
    """How often responses win against others: rate = (wins + ties / 2) / pairs, and its 95 % percentile bootstrap interval (low, high) over prompts.

    The pairs of one prompt are drawn together. The rest is as in `Judgement`; requests and tokens are those of this run, None where the server does not say.
    """

    rate: float
    interval: tuple[float, float]
    wins: int
    ties: int
    losses: int
    position_bias: float | None
    unreadable: int
    requests: int
    input_tokens: int | None
    output_tokens: int | None
    cost: float | None
    judge: str
    verdicts: list[float] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """Two or three lines for a reader."""
        low, high = self.interval
        bias, asked = self.position_bias is not None, self.position_bias is not None or self.requests > 0
        parts = [
            (True, f"win rate {self.rate:.3f}, 95 % interval [{low:.3f}, {high:.3f}]\n"),
            (True, f"wins {self.wins}, ties {self.ties}, losses {self.losses}, by {self.judge}"),
            (bias, f"; the order decided {self.position_bias or 0:.1%} of the pairs"),
            (self.unreadable, f"; no readable answer: {self.unreadable} of the ties"),
            (asked, f"\n{self.requests} requests"),
            (asked and self.input_tokens is not None, f", {self.input_tokens} tokens of questions and {self.output_tokens} of answers"),
            (asked and self.cost is not None, f", cost {self.cost or 0:.4g}"),
        ]
        return "".join(text for shown, text in parts if shown)


def win_rate(prompts: Sequence[str], responses: Sequence[str], others: Sequence[str], judge: Callable[..., Judgement | Sequence[float]]) -> WinRate:
    """The share of pairs that the response wins: (wins + ties / 2) / pairs.

    Args:
        prompts: one a pair.
        responses: that are judged.
        others: what they are compared with: another method's, or the preferred ones from `load_prompts_with_preferred`.
        judge: a `PairwiseJudge`, a `RewardJudge`, or any function (prompts, responses, others) -> verdicts, one of 1, 0.5 and 0 a pair.

    Source: Kong et al. 2024, section 5 (win rate against the preferred response of the data set).
    """
    if not prompts or not len(prompts) == len(responses) == len(others):
        raise ValueError(f"a win rate needs pairs: found {len(prompts)} prompts, {len(responses)} responses and {len(others)} others, wanted equally many")
    found = judge(prompts, responses, others)
    judgement = found if isinstance(found, Judgement) else Judgement(found)
    verdicts = [float(verdict) for verdict in judgement.verdicts]
    strange = sorted({verdict for verdict in verdicts if verdict not in (0, 0.5, 1)})
    if strange or len(verdicts) != len(prompts):
        wanted = f"1, 0.5 or 0 for each of {len(prompts)} pairs"
        raise ValueError(f"a judge must return {wanted}, found {len(verdicts)} verdicts, among them {strange or 'no other'}")
    rate = sum(verdicts) / len(verdicts)
    # One number a prompt, whose mean is the rate: the means of its verdicts, and where prompts have different numbers of pairs the linearised ratio.
    sums = dict.fromkeys(prompts, 0.0)
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        sums[prompt] += verdict - rate
    interval = bootstrap_interval([rate + each * len(sums) / len(prompts) for each in sums.values()])
    wins, ties, losses = (verdicts.count(each) for each in (1.0, 0.5, 0.0))
    told: dict[str, Any] = {name: getattr(judgement, name) for name in ("position_bias", "unreadable", "cost")}
    told |= asdict(judgement.usage or Usage(requests=0, input_tokens=None, output_tokens=None))
    return WinRate(rate, interval, wins, ties, losses, **told, judge=str(reward_name(judge)), verdicts=verdicts)
