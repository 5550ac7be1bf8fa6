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
    r"""Let the uncontrolled model respond to prompts, store its hidden states and the rewards of the responses, and open the rollouts.

        rc.collect(model, tokenizer, prompts, reward, "rollouts", max_new_tokens=64, batch_size=32, do_sample=True, temperature=1.0)

    Time index: the state stored for the new token y_t is the hidden state (after the final norm, the input of the output embedding) at the position
    whose logits sampled y_t; for the first new token that is the last prompt position. The step that samples the end-of-sequence token is kept and is
    the last. A response is cut before the first token that touches a stop string, and is dropped if nothing is left; the reward is that of the cut text.

    Each batch is one shard and has its own seed: memory does not grow, and the same call resumes a run that was killed, with the same result, bit for
    bit. In several processes (`accelerate launch`), each makes its share. Another batching gives other random numbers, but the same distribution.

    Args:
        model: a causal language model, on any device, of any dtype.
        tokenizer: its tokenizer; its settings are neither used for padding nor changed.
        prompts: the texts to respond to.
        reward: a callable (prompts, responses) -> one score (or list of scores) a response, a pair (sequence classifier, tokenizer), the name or path
            of a sequence classifier, or a list of these, or a dictionary of these by name, which become several heads.
        out: the folder of the rollouts.
        decoding: how responses are decoded. `batch_size` is the prompts in a batch and a shard, 16 by default, or no limit with a `cache_budget`;
            `batch_size * num_samples` rows are generated at once. Batch b is generated and scored with `seed + b`; the caller's generators stay as they were.
        collection: what is collected and how it is kept.
        progress: show a progress bar.
        keywords: settings of `Decoding` and `Collection` by name, in place of those objects or on top of them; all others are passed on to
            `model.generate`, for example do_sample=True. Without do_sample the model is greedy, whatever its own default.

    Raises:
        TypeError, ValueError: what is given is not of this kind: prompts that are empty, too long or over the budget alone, an option of `generate` that
            does not go with recording, a folder of other settings or models, or a reward that returns NaN or the wrong count (the batch is named).
        RuntimeError, OSError: another run is writing into the folder, or the disk is full; as after every error, the shards before stay.

    Source: Kong et al. 2024, section 4.2 (training data of the value function).
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

        tokens = tokenizer(prompt) + tokenizer(response, without special tokens) + EOS if asked for

    Time index: as in `collect`, state t of a response is the hidden state at the position before its token t, the one whose logits would have sampled
    it. Prompt and response are tokenised on their own, as in decoding. A batch is one forward call, written, resumed and shared as in `collect`.

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
        cache_budget: pack responses of similar length, as in `Collection`.
        storage: how states are kept, as in `Collection`.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError, RuntimeError, OSError: as for `collect`; counts that differ, responses without tokens, or no end-of-sequence token.
    """
    scores = {"reward": reward, "rewards": rewards, "append_eos": append_eos, "max_new_tokens": max_new_tokens}
    source = GivenResponses(model, tokenizer, prompts, responses, Packing(batch_size, cache_budget), **scores)
    return write_rollouts(source, out, storage, "text", progress)


def collect_pairs(
    model: Any, tokenizer: Any, pairs: Sequence[Preference | Sequence[str]], out: str | os.PathLike, *, skip_equal: bool = False, **options: Any
) -> Rollouts:
    """Run chosen and rejected responses through the model, as `collect_texts` does, for training by preference, and open the rollouts.

    The two responses of a pair are next to each other, in one shard. Their lines have `pair`, the pair's number, and `preference`, "chosen" or
    "rejected"; `index` is the number of the first pair with the same prompt.

    Args:
        model: a causal language model, on any device, of any dtype.
        tokenizer: its tokenizer.
        pairs: (prompt, chosen, rejected) each, as from `load_pairs`.
        out: the folder of the rollouts.
        skip_equal: leave out pairs whose two responses have the same tokens, which are refused otherwise.
        options: those of `collect_texts`: reward (by default chosen responses get 1 and rejected ones 0), append_eos, max_new_tokens, batch_size (in
            pairs), cache_budget, storage and progress.

    Raises:
        ValueError: pairs of equal responses, perhaps only when cut to `max_new_tokens`, and as for `collect_texts`.
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
