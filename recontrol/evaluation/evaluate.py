"""Comparing settings of control on the same prompts: reward, diversity, coherence, likelihood, speed and what control costs."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from recontrol.ascend import ascend
from recontrol.data.rewards import as_reward, checked_rewards
from recontrol.decoding.controller import Controller
from recontrol.decoding.generation import Batch, check_lengths, check_options, evaluation_mode, finishing_tokens, generate_batch
from recontrol.decoding.hooks import attachments, output_embedding
from recontrol.decoding.recording import record_hidden_states
from recontrol.decoding.responses import Response, listed_stop_strings
from recontrol.evaluation.metrics import bootstrap_interval, diversity, load_encoder, response_nll, similarities
from recontrol.value import ValueFunction

logger = logging.getLogger(__name__)

# Decode steps of the unmeasured generation that comes first: threads start, and what the ascent precomputes is made.
WARM_UP_TOKENS = 2


@dataclass
class Result:
    """What one setting does on a set of prompts.

    Attributes:
        step_size: alpha; 0 where the model is uncontrolled.
        steps: n; 0 where the model is uncontrolled.
        reward: mean over responses.
        reward_interval: (low, high), 95 % percentile bootstrap interval of that mean.
        diversity: mean over responses of prod_{n=2..4} (1 - rep_n).
        coherence: mean cosine of the sentence embeddings of prompt and response; None without an encoder.
        nll: nats a response token under the uncontrolled model, at temperature 1; None where no response has a token.
        length: mean number of tokens kept in a response, the end-of-sequence token included.
        tokens_per_second: response tokens kept over the seconds of generation, without scoring and warm-up.
        cost: time of a decode step over that of the uncontrolled model for the same batch, median over batches.
        edit_norm: mean |u| over the first responses' tokens, in units of the hidden state; None where it was not recorded.
        rewards: one a response, in the order of the prompts.
        responses: the texts.
        values: V(o_t) for each token t of the first few responses, o_t being the state read to sample it, before its edit.
    """

    step_size: float
    steps: int
    reward: float
    reward_interval: tuple[float, float]
    diversity: float
    coherence: float | None
    nll: float | None
    length: float
    tokens_per_second: float
    cost: float
    edit_norm: float | None
    rewards: list[float] = field(repr=False)
    responses: list[str] = field(repr=False)
    values: list[list[float]] = field(default_factory=list, repr=False)

    @property
    def setting(self) -> tuple[float, int]:
        """(step_size, steps); (0.0, 0) where the model is uncontrolled."""
        return self.step_size, self.steps

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


@dataclass
class _Arm:
    """A setting and what has been generated with it so far."""

    setting: tuple[float, int]
    controller: Controller | None = None
    batches: list[Batch] = field(default_factory=list)
    states: Tensor | None = None

    @property
    def responses(self) -> list[Response]:
        return [response for batch in self.batches for response in batch.responses]


def evaluate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    value: ValueFunction | None = None,
    settings: Sequence[tuple[float, int]] | None = None,
    reward: Any,
    encoder: Any = None,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    stop_strings: Sequence[str] | None = None,
    head_weights: Sequence[float] | None = None,
    controller_options: dict[str, Any] | None = None,
    num_traces: int = 4,
    progress: bool = True,
    **generation_kwargs: Any,
) -> list[Result]:
    """Decode the same prompts without control and under each setting, and measure the responses.

    Every batch is decoded by all settings in turn, beginning with another one each time, from the same seed: what the
    machine does meanwhile meets them all alike.

    Args:
        model: a causal language model with no controller attached.
        tokenizer: its tokenizer.
        prompts: the texts to respond to.
        value: the value function to climb; needed with `settings`.
        settings: pairs (step_size, steps) to compare with the uncontrolled model; None for the uncontrolled model alone.
        reward: as for `collect`: a callable (prompts, responses) -> scores, a pair (sequence classifier, tokenizer), or
            a name or path.
        encoder: sentence encoder for the coherence: a name or path for sentence-transformers, or an object with
            `encode`; None leaves the coherence out.
        max_new_tokens: length of a response at most, in tokens.
        batch_size: prompts decoded at once.
        seed: batch b is decoded with `seed + b` by every setting.
        stop_strings: strings at which a response ends, for example the mark of a further turn.
        head_weights: one weight a reward, where there are several: their weighted sum is climbed and reported.
        controller_options: further arguments of `Controller`, for example {"radius": 5.0}.
        num_traces: of how many first responses V is recorded along the tokens.
        progress: show a progress bar.
        generation_kwargs: passed on to `model.generate`; without do_sample the model is greedy.

    Returns:
        One result for the uncontrolled model, then one for each setting, in order.

    Raises:
        TypeError: `reward` is nothing that can be called.
        ValueError: a controller is attached to the model, no prompts or too long ones (they are named), settings without
            a value function or with a negative or NaN number in them, several rewards without `head_weights`, or a reward
            that returns NaN or the wrong count.

    Source: Kong et al. 2024, section 5 (evaluation metrics).
    """
    score = as_reward(reward)
    encoder = None if encoder is None else load_encoder(encoder)
    check_options(generation_kwargs)
    check_lengths(model, tokenizer, prompts, max_new_tokens)
    _check_numbers(batch_size=batch_size, max_new_tokens=max_new_tokens)
    if attachments(output_embedding(model)):
        raise ValueError("something is attached to the model already: detach it, so that the uncontrolled model can be measured")
    # Rows that ended are not edited, whatever `generate` fills them with.
    controls = {"stop_token_ids": finishing_tokens(model, tokenizer, generation_kwargs), **(controller_options or {})}
    arms = [_Arm((0.0, 0)), *_arms(value, settings, head_weights, controls)]
    options = {"stop_strings": listed_stop_strings(stop_strings), **generation_kwargs}
    batches = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    for arm in arms:
        with _under(arm, model):
            warm_up = generate_batch(model, tokenizer, batches[0], max_new_tokens=min(WARM_UP_TOKENS, max_new_tokens), seed=seed, **options)
        if arm.controller is not None:
            # Proved once for each setting; the batches need not wait for it.
            arm.controller = replace(arm.controller, self_check=False)
    # A reward that cannot be used should say so before everything is decoded.
    _one_reward(checked_rewards(score, batches[0], [response.text for response in warm_up.responses]), head_weights)
    with tqdm(total=len(prompts) * len(arms), unit="response", disable=not progress) as bar:
        for number, batch in enumerate(batches):
            turn = number % len(arms)
            for arm in arms[turn:] + arms[:turn]:
                with contextlib.ExitStack() as stack:
                    recorder = stack.enter_context(record_hidden_states(model)) if value is not None and number == 0 and num_traces > 0 else None
                    stack.enter_context(_under(arm, model))
                    arm.batches.append(generate_batch(model, tokenizer, batch, max_new_tokens=max_new_tokens, seed=seed + number, **options))
                if recorder is not None and all(len(step) == len(batch) for step in recorder.steps):
                    # (steps, traces, hidden_size)
                    arm.states = torch.stack([step[:num_traces] for step in recorder.steps])
                bar.update(len(batch))
    texts = [[response.text for response in arm.responses] for arm in arms]
    cosines = [None] * len(arms) if encoder is None else _coherences(list(prompts), texts, encoder)
    rows = zip(arms, texts, cosines, strict=True)
    results = []
    for arm, responses, cosine in tqdm(rows, total=len(arms), desc="scoring", unit="setting", disable=not progress):
        rewards = _one_reward(checked_rewards(score, prompts, responses), head_weights)
        ids = [response.token_ids for response in arm.responses]
        with evaluation_mode(model):
            nll = response_nll(model, tokenizer, prompts, ids, batch_size=batch_size)
        values, edit_norm = _traces(arm, value, head_weights)
        tokens_per_second, cost = _speed(arm, arms[0])
        results.append(
            Result(
                step_size=arm.setting[0],
                steps=arm.setting[1],
                reward=float(rewards.mean()),
                reward_interval=bootstrap_interval(rewards),
                diversity=float(np.mean([diversity(text) for text in responses])),
                coherence=cosine,
                nll=None if np.isnan(nll) else nll,
                length=float(np.mean([len(tokens) for tokens in ids])),
                tokens_per_second=tokens_per_second,
                cost=cost,
                edit_norm=edit_norm,
                rewards=rewards.tolist(),
                responses=responses,
                values=values,
            )
        )
    return results


def choose(results: Sequence[Result]) -> Result:
    """The setting with the largest coherence + diversity + average reward: the paper's rule, for validation prompts.

    The three are added as they are, so the scale of the reward decides how much of the others is given up for it. A
    coherence that was not measured counts as 0 for all.

    Args:
        results: from `evaluate`; the uncontrolled model is no candidate.

    Returns:
        The best of the controlled ones, the first of equals.

    Raises:
        ValueError: there is no controlled one.

    Source: Kong et al. 2024, section 5 (choice of step size and number of updates).
    """
    controlled = [result for result in results if result.steps]
    if not controlled:
        raise ValueError("there is no controlled setting to choose from")
    return max(controlled, key=lambda result: (result.coherence or 0.0) + result.diversity + result.reward)


def _arms(
    value: ValueFunction | None, settings: Sequence[tuple[float, int]] | None, head_weights: Sequence[float] | None, options: dict[str, Any]
) -> list[_Arm]:
    if not settings:
        return []
    if value is None:
        raise ValueError("settings of control need a value function")
    arms = []
    for step_size, steps in settings:
        if step_size == 0 or steps == 0:
            raise ValueError(f"found the setting step_size {step_size}, steps {steps}: the uncontrolled model is always measured, leave it out")
        arms.append(_Arm((step_size, steps), Controller(value, step_size, steps, head_weights=head_weights, **options)))
    return arms


def _under(arm: _Arm, model: Any) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if arm.controller is None else arm.controller.attach(model)


def _coherences(prompts: list[str], texts: list[list[str]], encoder: Any) -> list[float]:
    """The coherence of each setting; together, so that the prompts are encoded once."""
    cosines = similarities(prompts * len(texts), [text for responses in texts for text in responses], encoder)
    return [float(mean) for mean in cosines.reshape(len(texts), -1).mean(1)]


def _speed(arm: _Arm, base: _Arm) -> tuple[float, float]:
    """(response tokens a second, median over batches of the time of a decode step over that of the uncontrolled model)."""
    # The states of the first batch were recorded, which takes time too.
    first = 1 if len(arm.batches) > 1 else 0
    pairs = list(zip(arm.batches, base.batches, strict=True))[first:]
    ratios = [(one.seconds / one.steps) / (other.seconds / other.steps) for one, other in pairs]
    return sum(one.tokens for one, _ in pairs) / sum(one.seconds for one, _ in pairs), float(np.median(ratios))


def _one_reward(table: Tensor, head_weights: Sequence[float] | None) -> np.ndarray:
    """(responses, rewards) -> (responses,), float64."""
    scores = table.double().numpy()
    if head_weights is None:
        if scores.shape[1] != 1:
            raise ValueError(f"the reward returns {scores.shape[1]} scores a response; head_weights must say how they are added")
        return scores[:, 0]
    if len(head_weights) != scores.shape[1]:
        raise ValueError(f"found {len(head_weights)} head_weights for {scores.shape[1]} rewards")
    return scores @ np.asarray(head_weights, dtype=np.float64)


@torch.no_grad()
def _traces(arm: _Arm, value: ValueFunction | None, head_weights: Sequence[float] | None) -> tuple[list[list[float]], float | None]:
    """V of each token's state, response by response, and the mean norm of their edits."""
    if arm.states is None or value is None:
        return [], None
    # Finished rows go on being recorded; only the states that sampled a token that was kept count.
    rows = [arm.states[: len(response.token_ids), row].to(value.device) for row, response in enumerate(arm.responses[: arm.states.shape[1]])]
    weights = torch.tensor([1.0] if head_weights is None else head_weights, device=value.device)
    traces = [(value(states).float() @ weights).tolist() for states in rows]
    states = torch.cat(rows)
    if arm.controller is None or not len(states):
        return traces, None
    c = arm.controller
    edited = cast(Tensor, ascend(states, value, c.step_size, c.steps, radius=c.radius, target=c.target, head_weights=weights, backend=c.backend))
    return traces, float((edited.float() - states.float()).norm(dim=-1).mean())


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be an integer of at least 1, found {number!r}")
