"""Collecting rollouts: responses of the uncontrolled model, the hidden states it read to sample each token, and their rewards."""

import logging
import os
from collections.abc import Sequence
from typing import Any

from recontrol.data.rollouts import Rollouts
from recontrol.data.sampling import SampledResponses
from recontrol.data.storage import check_storage
from recontrol.data.writing import write_rollouts

logger = logging.getLogger(__name__)


def collect(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Any,
    out: str | os.PathLike,
    *,
    max_new_tokens: int = 128,
    num_samples: int = 1,
    batch_size: int | None = None,
    cache_budget: int | str | None = None,
    seed: int = 0,
    stop_strings: Sequence[str] | None = None,
    max_prompt_tokens: int | None = None,
    unique_prompts: bool = True,
    unique_responses: bool = False,
    storage: str | None = None,
    progress: bool = True,
    **generation_kwargs: Any,
) -> Rollouts:
    r"""Let the uncontrolled model respond to prompts, and store its hidden states and the rewards of the responses.

    Time index: the state stored for the new token y_t is the hidden state (after the final norm, the input of the output
    embedding) at the position whose logits sampled y_t; for the first new token that is the last prompt position. The
    step that samples the end-of-sequence token is kept and is the last. A response is cut before the first token that
    touches a stop string, the reward is that of the cut text, and a response of which nothing is left is dropped.

    One shard is written for each batch, so memory does not grow, and a killed run is taken up again where it was by the
    same call: each batch has its own seed, and the result is the same, bit for bit, as that of a run without a break.

    Launched in several processes (`accelerate launch`), each makes its share of the shards; the result is that of one process on
    the same kind of device. A second run into a folder that is being written is refused.

    How prompts are put into batches changes which draw of the model a prompt gets, since a batch has one seed, and how padding rounds, but
    not what is drawn from: each response is a sample of the same model, and greedy ones differ by no more than rounding.

    Args:
        model: a causal language model, on any device, of any dtype.
        tokenizer: its tokenizer; its settings are neither used for padding nor changed.
        prompts: the texts to respond to.
        reward: a callable (prompts, responses) -> one score (or list of scores) a response, a pair (sequence classifier,
            tokenizer), the name or path of a sequence classifier, or a list of these, or a dictionary of these by name, which become several heads.
        out: the folder of the rollouts.
        max_new_tokens: length of a response at most, in tokens.
        num_samples: responses to each prompt; more than one needs do_sample=True.
        batch_size: prompts in a batch and a shard, in their order; `batch_size * num_samples` rows are generated at once. None is 16,
            or no limit with a `cache_budget`.
        cache_budget: bytes for the key/value cache of a batch, as a number or a text such as "8GiB". Prompts are sorted by length
            and packed so that (prompt + max_new_tokens) * rows * bytes of a token fits (see `cache_bytes_per_token`); the
            longest come first. Weights and activations are not in it.
        seed: batch b is generated and scored with `seed + b`; the caller's generators are left as they were.
        stop_strings: strings at which a response ends, for example the mark of a further turn, "\n\nHuman:".
        max_prompt_tokens: refuse longer prompts; by default, what leaves room for `max_new_tokens` in the model's context.
        unique_prompts: respond once to prompts that are the same text, under the index of the first one; `num_samples` is the way to
            several responses. False responds to each, in groups of their own. The manifest counts them either way.
        unique_responses: keep equal responses to a prompt once. This saves disk, but what is likely then no longer weighs more
            in training, so V is no longer the expected reward of what the model samples.
        storage: how states are kept: "float32", "bfloat16", "float16", or "int8" with a scale for each token; None is the model's
            own dtype, without loss.
        progress: show a progress bar.
        generation_kwargs: passed on to `model.generate`, for example do_sample=True, temperature=1.0. Without
            do_sample the model is greedy, whatever its own default.

    Returns:
        The rollouts, opened.

    Raises:
        TypeError: `reward` is nothing that can be called, a prompt is not text.
        ValueError: no prompts, prompts that are empty, too long or over the budget alone (they are named), an option of `generate` that
            does not go with recording, a folder with other settings or of another model or tokenizer, or a reward that returns
            NaN or the wrong count (the batch is named; the shards before it stay).
        RuntimeError: another run is writing into the folder.
        OSError: the disk is full; the message names the file, and the shards before it stay.

    Source: Kong et al. 2024, section 4.2 (training data of the value function).
    """
    check_storage(storage)
    source = SampledResponses(
        model,
        tokenizer,
        prompts,
        reward,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        batch_size=batch_size,
        cache_budget=cache_budget,
        seed=seed,
        stop_strings=stop_strings,
        max_prompt_tokens=max_prompt_tokens,
        unique_prompts=unique_prompts,
        unique_responses=unique_responses,
        **generation_kwargs,
    )
    if source.duplicates and unique_prompts:
        logger.warning("%d of %d prompts repeat others and are responded to once; num_samples asks for several responses", source.duplicates, len(prompts))
    return write_rollouts(source, out, storage=storage, progress=progress)
