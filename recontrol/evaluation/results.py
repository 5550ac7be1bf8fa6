"""The result of a method on a set of prompts, over batches and seeds, and the paper's rule for choosing among settings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from recontrol.evaluation.measure import Answer, Cell
from recontrol.evaluation.metrics import bootstrap_interval
from recontrol.methods.base import Method, Training, Uncontrolled, one_score
from recontrol.methods.control import ReControl

UNCONTROLLED = Uncontrolled.kind


@dataclass
class Result:
    """The result of one method on a set of prompts.

    Lists with an entry a response are in the order of the prompts, seed after seed. Intervals, (low, high), are 95 % percentile bootstrap intervals over
    prompts: the seeds of a prompt are averaged first, since responses to the same prompt are not independent.

    Args:
        method, kind, settings: its label ("uncontrolled" for the model alone), the name that methods of other settings share, and the settings by name.
        step_size, steps, seeds: alpha and n, 0 unless the method is RE-Control alone; how many seeds.
        reward, reward_interval, head_rewards: mean over responses, with several rewards of their weighted sum; then the mean of each, else empty.
        diversity, coherence: mean of prod_{n=2..4} (1 - rep_n); mean cosine of the embeddings of prompt and response, None without an encoder.
        nll, perplexity: nats a response token under the uncontrolled model, at temperature 1, and exp(nll); None where no response has a token.
        kl, kl_interval: nats a response, mean of sum_t KL(p_t || p0_t) along responses; None where a method does not show its distributions.
        length, tokens_per_second: mean tokens kept in a response, the end-of-sequence token included; tokens kept over the seconds of generation alone.
        cost, added_seconds: time of a decode step over the uncontrolled one's; minus it, for each row of the batch. Medians over batches.
        peak_bytes: peak memory during generation, beyond that before it; the largest of any batch.
        edit_norm: mean |u| over some responses' tokens, in units of the hidden state; None where no state is edited.
        value_end, training: mean of V at the states read for the last tokens, in the unit of the reward, None without V; the cost of training.
        rewards, kls, responses, answers: of each response its reward, KL (empty with `kl` None), text, and everything that is known of it.
    """

    method: str
    kind: str
    settings: dict[str, Any]
    step_size: float
    steps: int
    seeds: int
    reward: float
    reward_interval: tuple[float, float]
    head_rewards: list[float]
    diversity: float
    coherence: float | None
    nll: float | None
    perplexity: float | None
    kl: float | None
    kl_interval: tuple[float, float] | None
    length: float
    tokens_per_second: float
    cost: float
    added_seconds: float
    peak_bytes: int
    edit_norm: float | None
    value_end: float | None
    training: Training
    rewards: list[float] = field(repr=False)
    kls: list[float] = field(repr=False)
    responses: list[str] = field(repr=False)
    answers: list[Answer] = field(repr=False)

    @property
    def setting(self) -> tuple[float, int]:
        """(step_size, steps); (0.0, 0) for what is no RE-Control alone."""
        return self.step_size, self.steps

    @property
    def values(self) -> list[list[float]]:
        """V(o_t) for each token t of each response, o_t the state read to sample it, before the edit; empty where V was not recorded."""
        return [answer.values for answer in self.answers if answer.values is not None]

    def summary(self) -> dict[str, Any]:
        """The numbers by name, ready for JSON, without those of single responses."""
        content = {each.name: getattr(self, each.name) for each in fields(self) if each.repr}
        return {**content, "training": self.training._asdict()}


def summarise(method: Method, cells: Sequence[Cell], base: Sequence[Cell], head_weights: Sequence[float] | None) -> Result:
    """The result of one method from all of its cells, seed after seed, the same batches for each, and the same cells of the uncontrolled model."""
    answers = [answer for cell in cells for answer in cell.answers]
    seeds = len({cell.seed for cell in cells})
    table = torch.tensor([answer.scores for answer in answers], dtype=torch.float64, device="cpu")
    rewards = one_score(table, head_weights).numpy()
    tokens = sum(answer.tokens for answer in answers)
    nll = sum(answer.nll for answer in answers) / tokens if tokens else None
    kls = [answer.kl for answer in answers if answer.kl is not None]
    kls = kls if len(kls) == len(answers) else []
    step, base_step = (np.array([cell.seconds / cell.steps for cell in each]) for each in (cells, base))
    step_size, steps = (method.control.step_size, method.control.steps) if isinstance(method, ReControl) else (0.0, 0)
    return Result(
        method=method.label,
        kind=method.kind,
        settings=method.settings,
        step_size=step_size,
        steps=steps,
        seeds=seeds,
        reward=float(rewards.mean()),
        reward_interval=bootstrap_interval(by_prompt(rewards, seeds)),
        head_rewards=table.mean(0).tolist() if table.shape[1] > 1 else [],
        diversity=float(np.mean([answer.diversity for answer in answers])),
        coherence=None if any(answer.coherence is None for answer in answers) else _mean(answer.coherence for answer in answers),
        nll=nll,
        perplexity=None if nll is None else float(np.exp(min(nll, 700))),
        kl=_mean(kls),
        kl_interval=bootstrap_interval(by_prompt(np.array(kls), seeds)) if kls else None,
        length=tokens / len(answers),
        tokens_per_second=tokens / sum(cell.seconds for cell in cells),
        cost=float(np.median(step / base_step)),
        added_seconds=float(np.median((step - base_step) / [len(cell.answers) for cell in cells])),
        peak_bytes=max(cell.peak_bytes for cell in cells),
        edit_norm=_mean(cell.edit_norm for cell in cells),
        value_end=_mean(answer.values[-1] for answer in answers if answer.values),
        training=method.training,
        rewards=rewards.tolist(),
        kls=kls,
        responses=[answer.text for answer in answers],
        answers=answers,
    )


def by_prompt(numbers: np.ndarray, seeds: int) -> np.ndarray:
    """(seeds * prompts,), seed after seed -> (prompts,), the mean over seeds."""
    return numbers.reshape(seeds, -1).mean(0)


def choose(results: Sequence[Result]) -> Result:
    """The setting with the largest coherence + diversity + average reward: the paper's rule (Kong et al. 2024, section 5), for validation prompts.

    The scale of the reward decides how much of the others is given up for it. A coherence that was not measured counts as 0.

    Args:
        results: from `evaluate`, of one kind of method and the uncontrolled model, which is no candidate; ValueError where there is no other.
    """
    candidates = [result for result in results if result.kind != UNCONTROLLED]
    if not candidates:
        raise ValueError("there is no controlled setting to choose from")
    return max(candidates, key=lambda result: (result.coherence or 0.0) + result.diversity + result.reward)


def _mean(numbers: Iterable[float | None]) -> float | None:
    """The mean of those that were measured; None without any."""
    found = [number for number in numbers if number is not None]
    return float(np.mean(found)) if found else None
