"""Preferences of a reward between responses that the uncontrolled model samples, for DPO."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from recontrol.data.prompts import Preference
from recontrol.data.rewards import Reward, as_reward, checked_rewards
from recontrol.decoding.batches import check_lengths, effective, generate_batch
from recontrol.decoding.config import Decoding
from recontrol.decoding.responses import Response
from recontrol.methods.base import check_uncontrolled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreferencePairs:
    """The best and the worst of several responses to each prompt.

    Attributes:
        pairs: one for each prompt that has a best and a worst response, in the order of the prompts.
        margins: reward of the chosen response minus that of the rejected one, one a pair, above 0.
        left_out: how many prompts have no pair, by the reason: "equal" (all responses have the same reward) or "empty" (fewer than two
            responses have a token).
    """

    pairs: list[Preference]
    margins: list[float]
    left_out: dict[str, int]


def make_preference_pairs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Any,
    *,
    samples: int = 2,
    decoding: Decoding | None = None,
    progress: bool = True,
    **keywords: Any,
) -> PreferencePairs:
    """Sample y_1, ..., y_n from the uncontrolled model for each prompt; prefer argmax_i r(x, y_i) to argmin_i r(x, y_i).

    A response that ended with an end-of-sequence token carries the text of that token, so that training on the pair keeps the model's own
    way of ending; one that was cut does not.

    Args:
        model: a causal language model, with nothing attached to it.
        tokenizer: its tokenizer; its padding settings are neither used nor changed.
        prompts: the texts to respond to.
        reward: see `as_reward`; one score a response.
        samples: responses to each prompt, at least 2.
        decoding: how; do_sample is True unless given. `batch_size` prompts (by default 16) are decoded at once, that is `batch_size * samples` rows.
        progress: show a progress bar.
        keywords: settings of `Decoding` by name, and options of `model.generate`.

    Returns:
        The pairs, at least one, and how many prompts have none.

    Raises:
        ValueError: no prompts, prompts that are empty or too long, fewer than 2 samples, greedy decoding, an option that does not go with
            batches, something attached to the model, a reward of several scores, or no prompt with two responses of different reward.

    Source: Rafailov et al. 2023, section 4 (pairs of responses of the initial model); the reward takes the place of the annotator.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, found {samples}")
    decoding = Decoding.of(decoding, **keywords)
    decoding = dataclasses.replace(decoding, options={"do_sample": True, **decoding.options})
    batch_size = decoding.batch_size or 16
    if decoding.options.get("num_return_sequences") is not None:
        raise ValueError(f"num_return_sequences={decoding.options['num_return_sequences']!r} is not taken here: use samples")
    if not effective(model, dict(decoding.options), "do_sample"):
        raise ValueError(f"greedy decoding would write the same response {samples} times: found do_sample=False, wanted sampling")
    check_uncontrolled(model)
    check_lengths(model, tokenizer, prompts, decoding.max_new_tokens)
    score = as_reward(reward)
    found = PreferencePairs([], [], {"equal": 0, "empty": 0})
    for number, first in enumerate(tqdm(range(0, len(prompts), batch_size), "sampling pairs", disable=not progress)):
        repeated = [prompt for prompt in prompts[first : first + batch_size] for _ in range(samples)]
        responses = generate_batch(model, tokenizer, repeated, dataclasses.replace(decoding, seed=decoding.seed + number)).responses
        _add_pairs(found, tokenizer, score, repeated, responses, samples)
    left_out = found.left_out
    if not found.pairs:
        raise ValueError(
            f"no prompt has two responses of different reward: of {len(prompts)} prompts, {left_out['equal']} have equal rewards and {left_out['empty']} "
            "fewer than two responses with a token; take more samples, or another reward"
        )
    if any(left_out.values()):
        logger.info("left out %d of %d prompts: %s", sum(left_out.values()), len(prompts), left_out)
    return found


def _add_pairs(found: PreferencePairs, tokenizer: Any, score: Reward, prompts: list[str], responses: list[Response], samples: int) -> None:
    """Add the best and the worst of each prompt's samples, which follow each other."""
    rows = [row for row, response in enumerate(responses) if response.token_ids]
    scores = dict(zip(rows, single_scores(score, [prompts[row] for row in rows], [responses[row].text for row in rows]).tolist(), strict=True))
    for start in range(0, len(prompts), samples):
        scored = [(scores[row], row) for row in range(start, start + samples) if row in scores]
        if len(scored) < 2:
            found.left_out["empty"] += 1
            continue
        (best, chosen), (worst, rejected) = max(scored), min(scored)
        if best == worst:
            found.left_out["equal"] += 1
            continue
        found.pairs.append(Preference(prompts[start], _as_written(tokenizer, responses[chosen]), _as_written(tokenizer, responses[rejected])))
        found.margins.append(best - worst)


def single_scores(reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """(responses,), the one score of each; a reward of several scores is refused."""
    table = checked_rewards(reward, prompts, responses)
    if table.shape[1] != 1:
        raise ValueError(f"fine-tuning needs one score a response, found {table.shape[1]}: give a reward that weighs them into one")
    return table[:, 0]


def _as_written(tokenizer: Any, response: Response) -> str:
    """The text with that of the end-of-sequence token, where the model wrote one."""
    return response.text + (tokenizer.decode(response.token_ids[-1:]) if response.finish == "eos" else "")
