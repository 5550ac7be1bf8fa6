"""Responses sampled from the uncontrolled model, batch by batch, with the hidden states that it read and their rewards."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from recontrol.checks import first_few
from recontrol.data.batches import ScoredResponses
from recontrol.data.dialogue import turns_entry
from recontrol.data.identity import fingerprint
from recontrol.data.rewards import as_reward, checked_rewards, reward_name
from recontrol.data.settings import Collection, model_settings, texts_checksum
from recontrol.decoding.batches import REFUSED as REFUSED_IN_BATCHES
from recontrol.decoding.batches import TOKENISED_AT_ONCE, check_lengths, check_options, effective, evaluation_mode, greedy_unless_asked, respond, seeded
from recontrol.decoding.config import Decoding
from recontrol.decoding.packing import Packing
from recontrol.decoding.recording import HiddenStateRecorder, record_hidden_states
from recontrol.decoding.responses import Response

# One forward call must sample one token for each row, from a seed, until EOS, the length or a stop string.
REFUSED = {
    **REFUSED_IN_BATCHES,
    "num_return_sequences": "use num_samples",
    "max_time": "the result would depend on the machine's speed",
    **dict.fromkeys(("assistant_model", "prompt_lookup_num_tokens"), "several tokens come from one forward call"),
    "output_hidden_states": "hidden states are recorded already",
}


class SampledResponses:
    """Responses that the model samples; a batch depends on its number alone, not on the batches before. See `collect` for the arguments."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        reward: Any,
        decoding: Decoding | None = None,
        collection: Collection | None = None,
        **keywords: Any,
    ):
        own = {each.name: keywords.pop(each.name) for each in dataclasses.fields(Collection) if each.name in keywords}
        self.collection = dataclasses.replace(collection or Collection(), **own)
        self.decoding = Decoding.of(decoding, **keywords)
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.score = as_reward(reward)
        max_new_tokens, samples = self.decoding.max_new_tokens, self.collection.num_samples
        self.options = {**greedy_unless_asked(dict(self.decoding.options)), **self.decoding.options, "max_new_tokens": max_new_tokens}
        packing = Packing(self.decoding.batch_size, self.collection.cache_budget)
        check_options(self.options, REFUSED)
        if (beams := effective(model, self.options, "num_beams") or 1) != 1:
            raise ValueError(f"num_beams must be 1, found {beams}: the rollouts must be what the model samples")
        if samples > 1 and not effective(model, self.options, "do_sample"):
            raise ValueError(f"num_samples={samples} needs do_sample=True: greedy decoding would write the same response {samples} times")
        check_lengths(model, tokenizer, prompts, max_new_tokens, self.collection.max_prompt_tokens)
        distinct = sorted(dict(zip(reversed(prompts), reversed(range(len(prompts))), strict=True)).values())
        self.duplicates = len(prompts) - len(distinct)
        chosen = distinct if self.collection.unique_prompts else list(range(len(prompts)))
        counts = token_counts(tokenizer, [prompts[index] for index in chosen]) if packing.cache_budget else []
        self.batches = packing.batches(model, chosen, lambda: [count + max_new_tokens for count in counts], samples)
        settings = {**model_settings(model, tokenizer), "reward": reward_name(self.score), "reward_sha256": fingerprint(self.score)}
        settings |= {"generation": self.options, "generation_defaults": model.generation_config.to_diff_dict() | {"transformers_version": None}}
        settings |= {"stop_strings": self.decoding.stop_strings, "seed": self.decoding.seed}
        settings |= {"prompts_sha256": texts_checksum(prompts), "num_prompts": len(prompts), "duplicate_prompts": self.duplicates}
        settings |= {name: getattr(self.collection, name) for name in ("num_samples", "unique_prompts", "unique_responses")}
        settings |= {**dataclasses.asdict(packing), "num_shards": len(self.batches)}
        self.settings = json.loads(json.dumps(settings, default=_describe))

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[int], ScoredResponses]]:
        """Attach a recorder inside the block, for a function from a batch's number to its responses; numbers from len(batches) are further passes."""
        with evaluation_mode(self.model), record_hidden_states(self.model) as recorder:
            yield partial(self._make, recorder)

    def _make(self, recorder: HiddenStateRecorder, number: int) -> ScoredResponses:
        entries = self.batches[number % len(self.batches)]
        prompts = [self.prompts[index] for index in entries]
        options = {**self.options, "num_return_sequences": self.collection.num_samples}
        with seeded(self.decoding.seed + number):
            recorder.clear()
            batch = respond(self.model, self.tokenizer, prompts, list(self.decoding.stop_strings), options)
            rows, shapes = len(batch.responses), [tuple(step.shape) for step in recorder.steps]
            if len(shapes) != batch.steps or any(shape[0] != rows for shape in shapes):
                raise RuntimeError(f"the model ran {len(shapes)} times, on states {set(shapes)}, for {batch.steps} tokens of {rows} rows; wanted one a token")
            # (steps, rows, hidden_size); state t sampled token t.
            states = torch.stack(list(recorder.steps)).cpu()
            recorder.clear()
            try:
                return self._score(entries, prompts, batch.responses, states)
            except ValueError as error:
                raise ValueError(f"batch {number} (prompts {first_few(entries)}): {error}") from error

    def _score(self, entries: list[int], prompts: list[str], responses: list[Response], states: Tensor) -> ScoredResponses:
        """Score one batch, and pack what is kept of it."""
        samples = self.collection.num_samples
        rows = [row for row, response in enumerate(responses) if response.token_ids]
        left_out = {"empty": len(responses) - len(rows)}
        if self.collection.unique_responses:
            distinct = {(row // samples, tuple(responses[row].token_ids)): row for row in reversed(rows)}
            left_out["repeated"] = len(rows) - len(distinct)
            rows = sorted(distinct.values())
        records: list[dict[str, Any]] = []
        for row in rows:
            index, prompt, response = entries[row // samples], prompts[row // samples], responses[row].text
            records.append({"index": index, "sample": row % samples, "prompt": prompt, **turns_entry(prompt), "response": response})
        if rows:
            rewards = checked_rewards(self.score, *([record[name] for record in records] for name in ("prompt", "response"))).tolist()
            for record, row, reward in zip(records, rows, rewards, strict=True):
                record |= {"reward": reward, "finish": responses[row].finish}
        lengths = [len(responses[row].token_ids) for row in rows]
        packed = torch.cat([states[:0, 0], *(states[:length, row] for row, length in zip(rows, lengths, strict=True))])
        token_ids = torch.tensor([token for row in rows for token in responses[row].token_ids], dtype=torch.int64, device="cpu")
        return ScoredResponses(packed, token_ids, lengths, records, left_out)


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special tokens included."""
    return [len(ids) for start in range(0, len(texts), TOKENISED_AT_ONCE) for ids in tokenizer(list(texts[start : start + TOKENISED_AT_ONCE])).input_ids]


def _describe(value: Any) -> Any:
    """What the manifest says of an option of `generate` that JSON cannot hold."""
    return value.to_diff_dict() | {"transformers_version": None} if isinstance(value, GenerationConfig) else type(value).__qualname__
