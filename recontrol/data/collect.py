"""Collecting rollouts: hidden states and rewards of responses that the uncontrolled model samples, or of responses that exist already."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from recontrol.data.given import GivenResponses
from recontrol.data.processes import writing_together
from recontrol.data.prompts import Preference
from recontrol.data.rollouts import Rollouts
from recontrol.data.sampling import SampledResponses
from recontrol.data.settings import IGNORED, Collection
from recontrol.data.shards import MANIFEST_NAME, RolloutWriter, check_storage, read_manifest
from recontrol.decoding.config import Decoding
from recontrol.decoding.fingerprint import difference
from recontrol.decoding.packing import Packing

logger = logging.getLogger(__name__)


def collect(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Any,
    out: str | os.PathLike,
    *,
    decoding: Decoding | None = None,
    collection: Collection | None = None,
    progress: bool = True,
    **keywords: Any,
) -> Rollouts:
    """Let the uncontrolled model respond to prompts, store its hidden states and the rewards of the responses, and open the rollouts.

    Time index: the state stored for a new token is the hidden state (after the final norm, the input of the output embedding) at the position whose
    logits sampled it. The end-of-sequence token is kept; a response is cut before a stop string, scored as cut, and dropped if nothing is left.
    Each batch is one shard with its own seed: the same call resumes a run that was killed, bit for bit. Several processes share the batches.

    Args:
        model: a causal language model, on any device, of any dtype.
        tokenizer: its tokenizer, which is not changed.
        prompts: the texts to respond to.
        reward: a callable (prompts, responses) -> one score (or list of scores) a response, a pair (sequence classifier, tokenizer), the name or path
            of a sequence classifier, or a list of these, or a dictionary of these by name, which become several heads.
        out: the folder of the rollouts.
        decoding: how responses are decoded; `batch_size` counts prompts, and batch b has the seed `seed + b`.
        collection: what is collected and how it is kept.
        progress: show a progress bar.
        keywords: settings of `Decoding` and `Collection` by name, on top of those objects; others are passed on to `model.generate` (greedy by default).

    Raises TypeError, ValueError: what is given does not go together, or a reward returns NaN or the wrong count (the batch is named). RuntimeError, OSError:
    another run is writing into the folder, or the disk is full; the shards before stay. Source: Kong et al. 2024, section 4.2.
    """
    source = SampledResponses(model, tokenizer, prompts, reward, decoding, collection, **keywords)
    if source.duplicates and source.collection.unique_prompts:
        logger.warning("%d of %d prompts repeat others and are responded to once; num_samples asks for several responses", source.duplicates, len(prompts))
    return write_rollouts(source, out, source.collection.storage, "prompt", progress)


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
    """Run given responses through the model, store the hidden states at their positions with their rewards, and open the rollouts.

    Prompt and response are tokenised on their own. Time index, resuming, sharing and errors are those of `collect`.

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
        cache_budget: as in `Collection`.
        storage: as in `Collection`.
        progress: show a progress bar.
    """
    scores = {"reward": reward, "rewards": rewards, "append_eos": append_eos, "max_new_tokens": max_new_tokens}
    source = GivenResponses(model, tokenizer, prompts, responses, Packing(batch_size, cache_budget), **scores)
    return write_rollouts(source, out, storage, "text", progress)


def collect_pairs(
    model: Any, tokenizer: Any, pairs: Sequence[Preference | Sequence[str]], out: str | os.PathLike, *, skip_equal: bool = False, **options: Any
) -> Rollouts:
    """Run chosen and rejected responses through the model, as `collect_texts` does, for training by preference, and open the rollouts.

    The two of a pair are in one shard; their lines have `pair`, its number, and `preference`, "chosen" or "rejected".

    Args:
        model: as for `collect_texts`.
        tokenizer: as for `collect_texts`.
        pairs: (prompt, chosen, rejected) each, as from `load_pairs`.
        out: the folder of the rollouts.
        skip_equal: leave out pairs whose two responses have the same tokens (perhaps only when cut), which are refused otherwise with a ValueError.
        options: those of `collect_texts`; by default chosen responses get 1 and rejected ones 0, and `batch_size` counts pairs.
    """
    listed = [Preference(*pair) for pair in pairs]
    prompts = [pair.prompt for pair in listed for _ in range(2)]
    responses = [response for pair in listed for response in pair[1:]]
    rewards = [1.0, 0.0] * len(listed) if options.get("reward") is None else None
    packing = Packing(options.pop("batch_size", None), options.pop("cache_budget", None))
    storage, progress = options.pop("storage", None), options.pop("progress", True)
    source = GivenResponses(model, tokenizer, prompts, responses, packing, rewards=rewards, paired=True, skip_equal=skip_equal, **options)
    return write_rollouts(source, out, storage, "pair", progress)


def write_rollouts(source: SampledResponses | GivenResponses, out: str | os.PathLike, storage: str | None, unit: str, progress: bool) -> Rollouts:
    """Make the batches of a source that a folder does not have yet, one shard each, and open the folder; several processes share them."""
    check_storage(storage)
    out = Path(out)
    if (out / MANIFEST_NAME).exists() and (recorded := read_manifest(out).get("base_model")) and (other := difference(recorded, source.model)):
        raise ValueError(f"{out} holds rollouts of another model: {other}; use another folder")
    left_out: Counter[str] = Counter()
    with writing_together(out, lambda first: RolloutWriter(out, source.settings, IGNORED, storage, first)) as (peers, writer), source.opened() as make:

        def write(number: int) -> None:
            made = make(number)
            writer.write(number, made.states, made.token_ids, made.lengths, made.records)
            left_out.update(made.left_out)

        peers.make_shards(writer.has, write, list(map(len, source.batches)), out, unit, progress)
        if peers.index == 0:
            writer.finish()
    if left_out["empty"]:
        logger.warning("dropped %d responses that a stop string cut to nothing", left_out["empty"])
    if left_out["repeated"]:
        logger.info("left out %d responses that were sampled before for the same prompt", left_out["repeated"])
    return Rollouts(out)
