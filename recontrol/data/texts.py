"""Rollouts from texts that exist already: single responses, or pairs of a chosen and a rejected one."""

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from recontrol.data.given import GivenResponses
from recontrol.data.pairs import Preference
from recontrol.data.rollouts import Rollouts
from recontrol.data.storage import check_storage
from recontrol.data.writing import write_rollouts


def collect_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    out: str | os.PathLike,
    *,
    reward: Any = None,
    rewards: Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
    append_eos: bool = True,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    cache_budget: int | str | None = None,
    storage: str | None = None,
    progress: bool = True,
) -> Rollouts:
    """Run given responses through the model, and store the hidden states at their positions with their rewards.

        tokens = tokenizer(prompt) + tokenizer(response, without special tokens) + EOS if asked for

    Time index: as in `collect`, state t of a response is the hidden state at the position before its token t, the one
    whose logits would have sampled it; state 0 is that of the last prompt position, the last one is that of EOS. Prompt and response are
    cut into tokens on their own, as in decoding, where the prompt's tokens are fixed before the first new one.

    A batch is one forward call, without logits except at one position. It is written, resumed and shared between processes as in `collect`.

    Args:
        model: a causal language model, on any device, of any dtype.
        tokenizer: its tokenizer.
        prompts: one a response; responses to equal prompts are one group.
        responses: the texts that follow the prompts, with the space between the two, where there is one.
        out: the folder of the rollouts.
        reward: what scores prompts and responses, as for `collect`.
        rewards: instead of `reward`, one number a response, or one list of numbers.
        append_eos: put the end-of-sequence token behind each response: the texts end there. False for texts that were cut.
        max_new_tokens: cut longer responses to so many tokens; the cut text is what is scored and recorded.
        batch_size: responses in a batch and a shard, in their order; None is 16, or no limit with a `cache_budget`.
        cache_budget: pack responses of similar length so that tokens * rows * bytes of a token in the key/value cache fits, as in `collect`.
        storage: how states are kept, as in `collect`.
        progress: show a progress bar.

    Returns:
        The rollouts, opened.

    Raises:
        TypeError: a prompt or response is not text, or `reward` is nothing that can be called.
        ValueError: counts that differ, rewards that are not finite, texts without tokens or too long for the model's context (they are named),
            no end-of-sequence token, or a folder with other settings or of another model or tokenizer.
        RuntimeError: another run is writing into the folder.
        OSError: the disk is full; the message names the file, and the shards before it stay.

    Source: Kong et al. 2024, section 4.2, for responses of another origin.
    """
    check_storage(storage)
    source = GivenResponses(
        model,
        tokenizer,
        prompts,
        responses,
        reward=reward,
        rewards=rewards,
        append_eos=append_eos,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        cache_budget=cache_budget,
    )
    return write_rollouts(source, out, storage=storage, unit="text", progress=progress)


def collect_pairs(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Preference | Sequence[str]],
    out: str | os.PathLike,
    *,
    reward: Any = None,
    append_eos: bool = True,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    cache_budget: int | str | None = None,
    skip_equal: bool = False,
    storage: str | None = None,
    progress: bool = True,
) -> Rollouts:
    """Run chosen and rejected responses through the model, for training by preference. As `collect_texts` otherwise.

    The two responses of a pair are next to each other, in one shard. Their lines have `pair`, the pair's number, and `preference`,
    "chosen" or "rejected"; `index` is the number of the first pair with the same prompt.

    Args:
        model: a causal language model, on any device, of any dtype.
        tokenizer: its tokenizer.
        pairs: (prompt, chosen, rejected) each, as from `load_pairs`.
        out: the folder of the rollouts.
        reward: what scores prompts and responses, as for `collect`; None gives 1 to chosen and 0 to rejected responses.
        append_eos: put the end-of-sequence token behind each response.
        max_new_tokens: cut longer responses to so many tokens.
        batch_size: pairs in a batch and a shard; None is 16, or no limit with a `cache_budget`.
        cache_budget: pack pairs of similar length, as in `collect_texts`.
        skip_equal: leave out pairs whose two responses are the same once they are cut into tokens, which are refused otherwise.
        storage: how states are kept, as in `collect`.
        progress: show a progress bar.

    Returns:
        The rollouts, opened.

    Raises:
        ValueError: no pairs, pairs of equal responses, perhaps only when they are cut to `max_new_tokens` (they are named), and what
            `collect_texts` refuses.
    """
    check_storage(storage)
    listed = [Preference(*pair) for pair in pairs]
    source = GivenResponses(
        model,
        tokenizer,
        [pair.prompt for pair in listed for _ in range(2)],
        [response for pair in listed for response in pair[1:]],
        reward=reward,
        rewards=[1.0, 0.0] * len(listed) if reward is None else None,
        append_eos=append_eos,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        cache_budget=cache_budget,
        paired=True,
        skip_equal=skip_equal,
    )
    return write_rollouts(source, out, storage=storage, unit="pair", progress=progress)
