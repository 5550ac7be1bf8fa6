"""Preferences of a reward between responses that the uncontrolled model samples: what DPO is trained on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from recontrol.data.pairs import Preference
from recontrol.data.rewards import Reward, as_reward, checked_rewards
from recontrol.decoding.batches import check_lengths, check_options, effective, evaluation_mode, respond, seeded
from recontrol.decoding.hooks import attachments, output_embedding
from recontrol.decoding.responses import Response, listed_stop_strings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreferencePairs:
    """The best and the worst of several responses to each prompt.

    Attributes:
        pairs: one for each prompt that has a best and a worst response, in the order of the prompts.
        margins: by how much the reward of the chosen response exceeds that of the rejected one, one a pair, above 0.
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
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    stop_strings: Sequence[str] | None = None,
    progress: bool = True,
    **generation_kwargs: Any,
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
        max_new_tokens: length of a response at most, in tokens.
        batch_size: prompts in a batch; `batch_size * samples` rows are generated at once.
        seed: batch b is sampled with `seed + b`; the caller's generators are left as they were.
        stop_strings: strings at which a response ends; it is cut before the first token that touches one.
        progress: show a progress bar.
        generation_kwargs: passed on to `model.generate`; do_sample is True unless given.

    Returns:
        The pairs, at least one, and how many prompts have none.

    Raises:
        ValueError: no prompts, prompts that are empty or too long, fewer than 2 samples, greedy decoding, an option that does not go with
            batches, something attached to the model, a reward of several scores, or no prompt with two responses of different reward.

    Source: Rafailov et al. 2023, section 4 (pairs of responses of the reference model); the reward stands for the annotator.
    """
    for name, number, least in (("samples", samples, 2), ("max_new_tokens", max_new_tokens, 1), ("batch_size", batch_size, 1)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, found {number}")
    options = {"do_sample": True, **generation_kwargs, "max_new_tokens": max_new_tokens}
    check_options(options)
    if options.get("num_return_sequences") is not None:
        raise ValueError(f"num_return_sequences={options['num_return_sequences']!r} is not taken here: use samples")
    if not effective(model, options, "do_sample"):
        raise ValueError(f"greedy decoding would write the same response {samples} times: found do_sample=False, wanted sampling")
    check_uncontrolled(model)
    check_lengths(model, tokenizer, prompts, max_new_tokens)
    score, stops = as_reward(reward), listed_stop_strings(stop_strings)
    options["num_return_sequences"] = samples
    pairs: list[Preference] = []
    margins: list[float] = []
    left_out = {"equal": 0, "empty": 0}
    with evaluation_mode(model):
        for number, first in enumerate(tqdm(range(0, len(prompts), batch_size), "sampling pairs", disable=not progress)):
            batch = list(prompts[first : first + batch_size])
            with seeded(seed + number):
                responses = respond(model, tokenizer, batch, stops, options).responses
            rows = [row for row, response in enumerate(responses) if response.token_ids]
            scores = single_scores(score, [batch[row // samples] for row in rows], [responses[row].text for row in rows])
            by_prompt: list[list[tuple[float, int]]] = [[] for _ in batch]
            for row, found in zip(rows, scores.tolist(), strict=True):
                by_prompt[row // samples].append((found, row))
            for prompt, scored in zip(batch, by_prompt, strict=True):
                if len(scored) < 2:
                    left_out["empty"] += 1
                    continue
                (best, chosen), (worst, rejected) = max(scored), min(scored)
                if best == worst:
                    left_out["equal"] += 1
                    continue
                pairs.append(Preference(prompt, _as_written(tokenizer, responses[chosen]), _as_written(tokenizer, responses[rejected])))
                margins.append(best - worst)
    if not pairs:
        raise ValueError(
            f"no prompt has two responses of different reward: of {len(prompts)} prompts, {left_out['equal']} have equal rewards and {left_out['empty']} "
            "fewer than two responses with a token; take more samples, or another reward"
        )
    if any(left_out.values()):
        logger.info("left out %d of %d prompts: %s", sum(left_out.values()), len(prompts), left_out)
    return PreferencePairs(pairs, margins, left_out)


def single_scores(reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """(responses,), the one score of each.

    Args:
        reward: a callable (prompts, responses) -> scores.
        prompts: one a response.
        responses: the texts to score.

    Raises:
        ValueError: the reward returns several scores a response, or what is refused by `checked_rewards`.
    """
    table = checked_rewards(reward, prompts, responses)
    if table.shape[1] != 1:
        raise ValueError(f"fine-tuning needs one score a response, found {table.shape[1]}: give a reward that weighs them into one")
    return table[:, 0]


def check_uncontrolled(model: Any) -> None:
    """Refuse a model that is under control, whose responses are not its own.

    Args:
        model: a causal language model.

    Raises:
        TypeError: it is none.
        ValueError: something is attached to it.
    """
    if attachments(output_embedding(model)):
        raise ValueError("the model must be the uncontrolled one, found a controller or recorder attached to it: detach it first")


def _as_written(tokenizer: Any, response: Response) -> str:
    """The text with that of the end-of-sequence token, where the model wrote one."""
    return response.text + (tokenizer.decode(response.token_ids[-1:]) if response.finish == "eos" else "")
