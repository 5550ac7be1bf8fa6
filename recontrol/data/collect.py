"""Collecting rollouts: responses of the uncontrolled model, the hidden states it read to sample each token, and their rewards."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from recontrol.data.rewards import Reward, as_reward, checked_rewards, reward_name
from recontrol.data.rollouts import Rollouts
from recontrol.data.shards import MANIFEST_NAME, RolloutWriter, read_manifest
from recontrol.decoding.fingerprint import difference, model_fingerprint
from recontrol.decoding.generation import REFUSED as REFUSED_IN_BATCHES
from recontrol.decoding.generation import check_lengths, check_options, effective, evaluation_mode, greedy_unless_asked, respond, seeded
from recontrol.decoding.recording import HiddenStateRecorder, record_hidden_states
from recontrol.decoding.responses import Response, listed_stop_strings

logger = logging.getLogger(__name__)

# One forward call must sample one token for each row, from a seed, until EOS, the length or a stop string.
REFUSED = {
    **REFUSED_IN_BATCHES,
    "num_return_sequences": "use num_samples",
    "max_time": "the result would depend on the machine's speed",
    "assistant_model": "several tokens come from one forward call",
    "prompt_lookup_num_tokens": "several tokens come from one forward call",
    "output_hidden_states": "hidden states are recorded already",
}


def collect(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Any,
    out: str | os.PathLike,
    *,
    max_new_tokens: int = 128,
    num_samples: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    stop_strings: Sequence[str] | None = None,
    max_prompt_tokens: int | None = None,
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

    Args:
        model: a causal language model, on any device, of any dtype.
        tokenizer: its tokenizer; its settings are neither used for padding nor changed.
        prompts: the texts to respond to.
        reward: a callable (prompts, responses) -> one score (or list of scores) a response, a pair (sequence classifier,
            tokenizer), or the name or path of a sequence classifier.
        out: the folder of the rollouts.
        max_new_tokens: length of a response at most, in tokens.
        num_samples: responses to each prompt; more than one needs do_sample=True.
        batch_size: prompts in a batch and a shard; `batch_size * num_samples` rows are generated at once.
        seed: batch b is generated and scored with `seed + b`; the caller's generators are left as they were.
        stop_strings: strings at which a response ends, for example the mark of a further turn, "\n\nHuman:".
        max_prompt_tokens: refuse longer prompts; by default, what leaves room for `max_new_tokens` in the model's context.
        progress: show a progress bar.
        generation_kwargs: passed on to `model.generate`, for example do_sample=True, temperature=1.0. Without
            do_sample the model is greedy, whatever its own default.

    Returns:
        The rollouts, opened.

    Raises:
        TypeError: `reward` is nothing that can be called, a prompt is not text.
        ValueError: no prompts, prompts that are empty or too long (they are named), an option of `generate` that does
            not go with recording, a folder with other settings or of another model, or a reward that returns NaN or the
            wrong count (the batch is named; the shards before it stay).
        OSError: the disk is full; the message names the file, and the shards before it stay.

    Source: Kong et al. 2024, section 4.2 (training data of the value function).
    """
    score = as_reward(reward)
    stops = listed_stop_strings(stop_strings)
    options = {**greedy_unless_asked(generation_kwargs), **generation_kwargs, "max_new_tokens": max_new_tokens}
    _check_options(model, options, num_samples, batch_size)
    check_lengths(model, tokenizer, prompts, max_new_tokens, max_prompt_tokens)
    starts = range(0, len(prompts), batch_size)
    _check_model(out, model)
    settings = {
        "base_model": model_fingerprint(model),
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": str(getattr(tokenizer, "name_or_path", type(tokenizer).__name__)),
        "reward": reward_name(score),
        "generation": options,
        "generation_defaults": model.generation_config.to_diff_dict() | {"transformers_version": None},
        "num_samples": num_samples,
        "stop_strings": stops,
        "seed": seed,
        "prompts_sha256": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "num_prompts": len(prompts),
        "batch_size": batch_size,
        "num_shards": len(starts),
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__, "device": str(model.device)},
    }
    writer = RolloutWriter(out, json.loads(json.dumps(settings, default=_describe)), ignored=("base_model", "made_with"))
    missing = [number for number in range(len(starts)) if not writer.has(number)]
    dropped = 0
    bar = tqdm(total=len(prompts), initial=min(batch_size * (len(starts) - len(missing)), len(prompts)), unit="prompt", disable=not progress)
    try:
        with bar, evaluation_mode(model), record_hidden_states(model) as recorder:
            for number in missing:
                batch = list(prompts[starts[number] : starts[number] + batch_size])
                with seeded(seed + number):
                    responses, states = _respond(model, tokenizer, batch, recorder, stops, {**options, "num_return_sequences": num_samples})
                    dropped += _write(writer, number, starts[number], batch, responses, states, score)
                bar.update(len(batch))
    except KeyboardInterrupt:
        kept = sum(map(writer.has, range(len(starts))))
        logger.warning("interrupted: %d of %d shards are in %s; the same call goes on from there", kept, len(starts), out)
        raise
    if dropped:
        logger.warning("dropped %d responses that a stop string cut to nothing", dropped)
    return Rollouts(out)


def _respond(
    model: Any, tokenizer: Any, prompts: list[str], recorder: HiddenStateRecorder, stop_strings: list[str], options: dict[str, Any]
) -> tuple[list[Response], Tensor]:
    """Generate one batch: the responses, row by row, and the states (steps, rows, hidden_size); state t sampled token t."""
    recorder.clear()
    batch = respond(model, tokenizer, prompts, stop_strings, options)
    rows = len(batch.responses)
    if len(recorder.steps) != batch.steps or any(len(step) != rows for step in recorder.steps):
        shapes = {tuple(step.shape) for step in recorder.steps}
        raise RuntimeError(
            f"the model ran {len(recorder.steps)} times, with hidden states {shapes}, to sample {batch.steps} tokens for {rows} rows; wanted one run a token: "
            "an option of generate samples in another way"
        )
    states = torch.stack(list(recorder.steps)).cpu()
    recorder.clear()
    return batch.responses, states


def _write(writer: RolloutWriter, number: int, first: int, prompts: list[str], responses: list[Response], states: Tensor, score: Reward) -> int:
    """Score one batch and write its shard; returns how many responses were dropped because nothing was left of them."""
    samples = len(responses) // len(prompts)
    rows = [row for row, response in enumerate(responses) if response.token_ids]
    try:
        rewards = checked_rewards(score, [prompts[row // samples] for row in rows], [responses[row].text for row in rows]) if rows else torch.empty(0, 1)
    except ValueError as error:
        raise ValueError(f"batch {number} (prompts {first} to {first + len(prompts) - 1}): {error}; the shards written before stay in {writer.path}") from error
    records = [
        {
            "index": first + row // samples,
            "sample": row % samples,
            "prompt": prompts[row // samples],
            "response": responses[row].text,
            "reward": reward,
            "finish": responses[row].finish,
        }
        for row, reward in zip(rows, rewards.tolist(), strict=True)
    ]
    lengths = [len(responses[row].token_ids) for row in rows]
    packed = torch.cat([states[:0, 0], *(states[:length, row] for row, length in zip(rows, lengths, strict=True))])
    token_ids = torch.tensor([token for row in rows for token in responses[row].token_ids], dtype=torch.int64)
    writer.write(number, packed, token_ids, lengths, records)
    return len(responses) - len(rows)


def _check_options(model: Any, options: dict[str, Any], num_samples: int, batch_size: int) -> None:
    for name, value in {"max_new_tokens": options["max_new_tokens"], "num_samples": num_samples, "batch_size": batch_size}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, found {value!r}")
    check_options(options, REFUSED)
    if (beams := effective(model, options, "num_beams") or 1) != 1:
        raise ValueError(f"num_beams must be 1, found {beams}: the rollouts must be what the model samples")
    if num_samples > 1 and not effective(model, options, "do_sample"):
        raise ValueError(f"num_samples={num_samples} needs do_sample=True: greedy decoding would write the same response {num_samples} times")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"collect needs a decoder-only causal language model, found {type(model).__name__}")


def _check_model(out: str | os.PathLike, model: Any) -> None:
    if (Path(out) / MANIFEST_NAME).exists() and (recorded := read_manifest(Path(out)).get("base_model")):
        other = difference(recorded, model)
        if other:
            raise ValueError(f"{out} holds rollouts of another model: {other}; use another folder")


def _describe(value: Any) -> Any:
    """What stands for an option of `generate` in the manifest."""
    return value.to_diff_dict() | {"transformers_version": None} if isinstance(value, GenerationConfig) else type(value).__qualname__
