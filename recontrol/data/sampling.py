"""Responses sampled from the uncontrolled model, batch by batch, with the hidden states that it read and their rewards."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from recontrol.data.batches import ScoredResponses, named
from recontrol.data.rewards import as_reward, checked_rewards, reward_name
from recontrol.data.settings import IGNORED, model_settings, texts_checksum
from recontrol.decoding.batches import REFUSED as REFUSED_IN_BATCHES
from recontrol.decoding.batches import TOKENISED_AT_ONCE, check_lengths, check_options, effective, evaluation_mode, greedy_unless_asked, respond, seeded
from recontrol.decoding.packing import Packing
from recontrol.decoding.recording import HiddenStateRecorder, record_hidden_states
from recontrol.decoding.responses import Response, listed_stop_strings

# One forward call must sample one token for each row, from a seed, until EOS, the length or a stop string.
REFUSED = {
    **REFUSED_IN_BATCHES,
    "num_return_sequences": "use num_samples",
    "max_time": "the result would depend on the machine's speed",
    "assistant_model": "several tokens come from one forward call",
    "prompt_lookup_num_tokens": "several tokens come from one forward call",
    "output_hidden_states": "hidden states are recorded already",
}


class SampledResponses:
    """A `Source` of responses that the model samples; see `collect` for the arguments.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: the texts to respond to.
        reward: see `as_reward`.
        max_new_tokens: length of a response at most, in tokens.
        num_samples: responses to each prompt.
        batch_size: prompts in a batch; None is 16, or no limit with a `cache_budget`.
        cache_budget: bytes for the key/value cache of a batch.
        seed: batch b is generated and scored with `seed + b`.
        stop_strings: strings at which a response ends.
        max_prompt_tokens: refuse longer prompts.
        unique_prompts: respond once to each distinct prompt.
        unique_responses: keep equal responses to a prompt once.
        generation_kwargs: passed on to `model.generate`.

    Attributes:
        duplicates: how many prompts are repetitions of others.
    """

    ignored: Sequence[str] = IGNORED

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        reward: Any,
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
        **generation_kwargs: Any,
    ):
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.score = as_reward(reward)
        self.stop_strings = listed_stop_strings(stop_strings)
        self.seed, self.unique_responses = seed, unique_responses
        packing = Packing(batch_size, cache_budget)
        options = {**greedy_unless_asked(generation_kwargs), **generation_kwargs, "max_new_tokens": max_new_tokens}
        _check_options(model, options, num_samples)
        check_lengths(model, tokenizer, prompts, max_new_tokens, max_prompt_tokens)
        self._options = {**options, "num_return_sequences": num_samples}
        first: dict[str, int] = {}
        for index, prompt in enumerate(prompts):
            first.setdefault(prompt, index)
        self.duplicates = len(prompts) - len(first)
        chosen = list(first.values()) if unique_prompts else list(range(len(prompts)))
        self.batches = packing.batches(
            model, chosen, lambda: [count + max_new_tokens for count in token_counts(tokenizer, [prompts[index] for index in chosen])], num_samples
        )
        settings = {
            **model_settings(model, tokenizer),
            "reward": reward_name(self.score),
            "generation": options,
            "generation_defaults": model.generation_config.to_diff_dict() | {"transformers_version": None},
            "num_samples": num_samples,
            "stop_strings": self.stop_strings,
            "seed": seed,
            "prompts_sha256": texts_checksum(prompts),
            "num_prompts": len(prompts),
            "duplicate_prompts": self.duplicates,
            "unique_prompts": unique_prompts,
            "unique_responses": unique_responses,
            "batch_size": packing.batch_size,
            "cache_budget": packing.cache_budget,
            "num_shards": len(self.batches),
        }
        self.settings = json.loads(json.dumps(settings, default=_describe))

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[int], ScoredResponses]]:
        """Attach a recorder and put the model into evaluation mode inside the block, for a function from a batch's number to its responses.

        Numbers beyond the last batch go over the prompts again, with seeds of their own.
        """
        with evaluation_mode(self.model), record_hidden_states(self.model) as recorder:
            yield partial(self._make, recorder)

    def _make(self, recorder: HiddenStateRecorder, number: int) -> ScoredResponses:
        entries = self.batches[number % len(self.batches)]
        prompts = [self.prompts[index] for index in entries]
        with seeded(self.seed + number):
            recorder.clear()
            responses, states = self._respond(prompts, recorder)
            recorder.clear()
            try:
                return self._score(entries, prompts, responses, states)
            except ValueError as error:
                raise ValueError(f"batch {number} (prompts {named(entries)}): {error}") from error

    def _respond(self, prompts: list[str], recorder: HiddenStateRecorder) -> tuple[list[Response], Tensor]:
        """Generate one batch: the responses, row by row, and the states (steps, rows, hidden_size); state t sampled token t."""
        batch = respond(self.model, self.tokenizer, prompts, self.stop_strings, self._options)
        rows = len(batch.responses)
        if len(recorder.steps) != batch.steps or any(len(step) != rows for step in recorder.steps):
            shapes = {tuple(step.shape) for step in recorder.steps}
            raise RuntimeError(
                f"the model ran {len(recorder.steps)} times, with hidden states {shapes}, to sample {batch.steps} tokens for {rows} rows; wanted one run a "
                "token: an option of generate samples in another way"
            )
        return batch.responses, torch.stack(list(recorder.steps)).cpu()

    def _score(self, entries: list[int], prompts: list[str], responses: list[Response], states: Tensor) -> ScoredResponses:
        """Score one batch, and pack what is kept of it."""
        samples = len(responses) // len(prompts)
        rows = [row for row, response in enumerate(responses) if response.token_ids]
        left_out = {"empty": len(responses) - len(rows)}
        if self.unique_responses:
            # The first of each; a dictionary keeps the order.
            distinct = {(row // samples, tuple(responses[row].token_ids)): row for row in reversed(rows)}
            left_out["repeated"] = len(rows) - len(distinct)
            rows = sorted(distinct.values())
        rewards = torch.empty(0, 1)
        if rows:
            rewards = checked_rewards(self.score, [prompts[row // samples] for row in rows], [responses[row].text for row in rows])
        records = [
            {
                "index": entries[row // samples],
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
        return ScoredResponses(packed, token_ids, lengths, records, left_out)


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special tokens included."""
    return [len(ids) for start in range(0, len(texts), TOKENISED_AT_ONCE) for ids in tokenizer(list(texts[start : start + TOKENISED_AT_ONCE])).input_ids]


def _check_options(model: Any, options: dict[str, Any], num_samples: int) -> None:
    for name, value in {"max_new_tokens": options["max_new_tokens"], "num_samples": num_samples}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, found {value!r}")
    check_options(options, REFUSED)
    if (beams := effective(model, options, "num_beams") or 1) != 1:
        raise ValueError(f"num_beams must be 1, found {beams}: the rollouts must be what the model samples")
    if num_samples > 1 and not effective(model, options, "do_sample"):
        raise ValueError(f"num_samples={num_samples} needs do_sample=True: greedy decoding would write the same response {num_samples} times")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"collect needs a decoder-only causal language model, found {type(model).__name__}")


def _describe(value: Any) -> Any:
    """What stands for an option of `generate` in the manifest."""
    return value.to_diff_dict() | {"transformers_version": None} if isinstance(value, GenerationConfig) else type(value).__qualname__
