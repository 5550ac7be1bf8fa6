"""Collecting rollouts: hidden states and rewards of responses that the uncontrolled model samples, or of responses that exist already."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from recontrol.data.batches import Source
from recontrol.data.config import Collection
from recontrol.data.given import GivenResponses
from recontrol.data.pairs import Preference
from recontrol.data.processes import Peers, writing_together
from recontrol.data.rollouts import Rollouts
from recontrol.data.sampling import SampledResponses
from recontrol.data.settings import IGNORED
from recontrol.data.shards import MANIFEST_NAME, RolloutWriter, read_manifest
from recontrol.data.storage import check_storage
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
    r"""Let the uncontrolled model respond to prompts, and store its hidden states and the rewards of the responses.

        rc.collect(model, tokenizer, prompts, reward, "rollouts", max_new_tokens=64, batch_size=32, do_sample=True, temperature=1.0)

    Time index: the state stored for the new token y_t is the hidden state (after the final norm, the input of the output
    embedding) at the position whose logits sampled y_t; for the first new token that is the last prompt position. The
    step that samples the end-of-sequence token is kept and is the last. A response is cut before the first token that
    touches a stop string, the reward is that of the cut text, and a response of which nothing is left is dropped.

    Each batch is written as one shard, so memory does not grow, and the same call resumes a run that was killed: each batch has its own
    seed, and the result is the same, bit for bit, as that of a run without a break. A second run into the same folder is refused.

    Launched in several processes (`accelerate launch`), each makes its share of the shards; the result is that of one process on
    the same kind of device.

    How prompts are batched changes which random numbers a prompt gets, since a batch has one seed, and how padding rounds. It does not change
    the distribution: each response is a sample of the same model, and greedy ones differ by no more than rounding.

    Args:
        model: a causal language model, on any device, of any dtype.
        tokenizer: its tokenizer; its settings are neither used for padding nor changed.
        prompts: the texts to respond to.
        reward: a callable (prompts, responses) -> one score (or list of scores) a response, a pair (sequence classifier,
            tokenizer), the name or path of a sequence classifier, or a list of these, or a dictionary of these by name, which become several heads.
        out: the folder of the rollouts.
        decoding: how responses are decoded. `batch_size` is the prompts in a batch and a shard, 16 by default, or no limit with a
            `cache_budget`; `batch_size * num_samples` rows are generated at once. Batch b is generated and scored with `seed + b`; the caller's
            random generators are left as they were.
        collection: what is collected and how it is kept.
        progress: show a progress bar.
        keywords: settings of `Decoding` (max_new_tokens, batch_size, seed, stop_strings) and of `Collection` (num_samples, cache_budget,
            max_prompt_tokens, unique_prompts, unique_responses, storage) by name, in place of those objects or on top of them; all others are
            passed on to `model.generate`, for example do_sample=True. Without do_sample the model is greedy, whatever its own default.

    Returns:
        The rollouts, opened.

    Raises:
        TypeError: `reward` is not callable, or a prompt is not text.
        ValueError: no prompts, prompts that are empty, too long or over the budget alone (they are named), an option of `generate` that
            does not go with recording, a folder with other settings or of another model or tokenizer, or a reward that returns
            NaN or the wrong count (the batch is named; the shards before it stay).
        RuntimeError: another run is writing into the folder.
        OSError: the disk is full; the message names the file, and the shards before it stay.

    Source: Kong et al. 2024, section 4.2 (training data of the value function).
    """
    source = SampledResponses(model, tokenizer, prompts, reward, decoding, collection, **keywords)
    if source.duplicates and source.collection.unique_prompts:
        logger.warning("%d of %d prompts repeat others and are responded to once; num_samples asks for several responses", source.duplicates, len(prompts))
    return write_rollouts(source, out, storage=source.collection.storage, progress=progress)


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
    tokenised on their own, as in decoding, where the prompt's tokens are fixed before the first new one.

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
        TypeError: a prompt or response is not text, or `reward` is not callable.
        ValueError: counts that differ, rewards that are not finite, texts without tokens or too long for the model's context (they are named),
            no end-of-sequence token, or a folder with other settings or of another model or tokenizer.
        RuntimeError: another run is writing into the folder.
        OSError: the disk is full; the message names the file, and the shards before it stay.

    Source: Kong et al. 2024, section 4.2, for responses of another origin.
    """
    source = GivenResponses(
        model,
        tokenizer,
        prompts,
        responses,
        Packing(batch_size, cache_budget),
        reward=reward,
        rewards=rewards,
        append_eos=append_eos,
        max_new_tokens=max_new_tokens,
    )
    return write_rollouts(source, out, storage=storage, unit="text", progress=progress)


def collect_pairs(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Preference | Sequence[str]],
    out: str | os.PathLike,
    *,
    batch_size: int | None = None,
    cache_budget: int | str | None = None,
    storage: str | None = None,
    progress: bool = True,
    **options: Any,
) -> Rollouts:
    """Run chosen and rejected responses through the model, for training by preference. As `collect_texts` otherwise.

    The two responses of a pair are next to each other, in one shard. Their lines have `pair`, the pair's number, and `preference`,
    "chosen" or "rejected"; `index` is the number of the first pair with the same prompt.

    Args:
        model: a causal language model, on any device, of any dtype.
        tokenizer: its tokenizer.
        pairs: (prompt, chosen, rejected) each, as from `load_pairs`.
        out: the folder of the rollouts.
        batch_size: pairs in a batch and a shard; None is 16, or no limit with a `cache_budget`.
        cache_budget: pack pairs of similar length, as in `collect_texts`.
        storage: how states are kept, as in `collect`.
        progress: show a progress bar.
        options: reward (None gives 1 to chosen and 0 to rejected responses), append_eos and max_new_tokens as for `collect_texts`, and skip_equal=True
            to leave out pairs whose two responses have the same tokens, which are refused otherwise.

    Returns:
        The rollouts, opened.

    Raises:
        ValueError: no pairs, pairs of equal responses, perhaps only when they are cut to `max_new_tokens` (they are named), and what
            `collect_texts` refuses.
    """
    listed = [Preference(*pair) for pair in pairs]
    prompts = [pair.prompt for pair in listed for _ in range(2)]
    responses = [response for pair in listed for response in pair[1:]]
    rewards = [1.0, 0.0] * len(listed) if options.get("reward") is None else None
    source = GivenResponses(model, tokenizer, prompts, responses, Packing(batch_size, cache_budget), rewards=rewards, paired=True, **options)
    return write_rollouts(source, out, storage=storage, unit="pair", progress=progress)


def write_rollouts(source: Source, out: str | os.PathLike, *, storage: str | None = None, unit: str = "prompt", progress: bool = True) -> Rollouts:
    """Make the batches of a source that a folder does not have yet, one shard each, and open the folder.

    Several processes share the missing shards. All return once the folder is complete; if one dies, the others' shards stay, and the same
    call makes what is missing.
    """
    check_storage(storage)
    out = Path(out)
    if (out / MANIFEST_NAME).exists() and (recorded := read_manifest(out).get("base_model")) and (other := difference(recorded, source.model)):
        raise ValueError(f"{out} holds rollouts of another model: {other}; use another folder")
    with writing_together(out, lambda first: RolloutWriter(out, source.settings, IGNORED, storage, first)) as (peers, writer):
        missing = [number for number in range(len(source.batches)) if not writer.has(number)]
        # Nobody may write before all have counted.
        peers.wait()
        _make(source, writer, missing[peers.index :: peers.count], peers, unit, progress)
        peers.wait()
        if peers.first:
            writer.finish()
        peers.wait()
    return Rollouts(out)


def _make(source: Source, writer: RolloutWriter, numbers: list[int], peers: Peers, unit: str, progress: bool) -> None:
    """Make and write some batches."""
    to_do = sum(len(source.batches[number]) for number in numbers)
    total = sum(map(len, source.batches)) if peers.count == 1 else to_do
    left_out: Counter[str] = Counter()
    try:
        with tqdm(total=total, initial=total - to_do, unit=unit, disable=not progress or not peers.first) as bar, source.opened() as make:
            for number in numbers:
                try:
                    made = make(number)
                    writer.write(number, made.states, made.token_ids, made.lengths, made.records)
                except ValueError as error:
                    raise ValueError(f"{error}; the shards written before stay in {writer.path}") from error
                left_out.update(made.left_out)
                bar.update(len(source.batches[number]))
    except KeyboardInterrupt:
        kept = sum(map(writer.has, range(len(source.batches))))
        logger.warning("interrupted: %d of %d shards are in %s; the same call goes on from there", kept, len(source.batches), writer.path)
        raise
    if left_out["empty"]:
        logger.warning("dropped %d responses that a stop string cut to nothing", left_out["empty"])
    if left_out["repeated"]:
        logger.info("left out %d responses that were sampled before for the same prompt", left_out["repeated"])
