"""Responses that exist already, run through the model batch by batch: the states at their positions, and their rewards."""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recontrol.checks import first_few
from recontrol.data.batches import ScoredResponses
from recontrol.data.dialogue import turns_entry
from recontrol.data.identity import fingerprint
from recontrol.data.prompts import check_equal
from recontrol.data.rewards import as_reward, checked_rewards, reward_name
from recontrol.data.settings import model_settings, texts_checksum
from recontrol.decoding.batches import TOKENISED_AT_ONCE, check_lengths, check_tokens, effective, evaluation_mode, seeded
from recontrol.decoding.config import Decoding
from recontrol.decoding.hooks import input_device, output_embedding
from recontrol.decoding.model_config import context_length
from recontrol.decoding.packing import Packing
from recontrol.decoding.responses import decode_after

logger = logging.getLogger(__name__)


class GivenResponses:
    """Responses that exist already, as `SampledResponses` are sampled; with `paired`, an entry is two rows, the chosen and the rejected response."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        responses: Sequence[str],
        packing: Packing,
        *,
        reward: Any = None,
        rewards: Any = None,
        append_eos: bool = True,
        max_new_tokens: int | None = None,
        paired: bool = False,
        skip_equal: bool = False,
    ):
        self.model, self.tokenizer, self.prompts, self.responses, self.paired = model, tokenizer, prompts, responses, paired
        if len(prompts) != len(responses):
            raise ValueError(f"found {len(responses)} responses to {len(prompts)} prompts, wanted one prompt a response")
        if (reward is None) == (rewards is None):
            raise ValueError("give either reward, which scores the responses, or rewards, their scores")
        Decoding(max_new_tokens=max_new_tokens)  # type: ignore[arg-type]
        self.score = None if reward is None else as_reward(reward)
        self.rewards = None if rewards is None else checked_rewards(lambda *_: rewards, prompts, responses)
        check_lengths(model, tokenizer, prompts, 1)
        others = [row for row, response in enumerate(responses) if not isinstance(response, str)]
        if others:
            raise TypeError(f"responses must be a list of texts, found {type(responses[others[0]]).__name__} at {first_few(others)}")
        self.eos, self.max_new_tokens = _end_of_sequence(model, tokenizer) if append_eos else None, max_new_tokens
        self.rows_per_entry = 2 if paired else 1
        lengths, equal = self._checked_lengths()
        kept = sorted(set(range(len(lengths))) - set(equal))
        check_equal("tokens of the responses", equal, kept, skip_equal)
        self.batches = packing.batches(model, kept, lambda: [lengths[entry] for entry in kept], self.rows_per_entry)
        first: dict[str, int] = {}
        self.groups = [first.setdefault(prompt, row // self.rows_per_entry) for row, prompt in enumerate(prompts)]
        given = "1 chosen, 0 rejected" if paired else "given"
        self.settings = {**model_settings(model, tokenizer), "reward": given if self.score is None else reward_name(self.score)}
        self.settings["reward_sha256"] = None if self.score is None else fingerprint(self.score)
        self.settings["rewards_sha256"] = None if self.rewards is None else texts_checksum(self.rewards.tolist())
        self.settings |= {"prompts_sha256": texts_checksum(prompts), "responses_sha256": texts_checksum(responses), "num_prompts": len(first)}
        self.settings |= {"left_out": len(equal), "responses": "chosen and rejected" if paired else "given"}
        self.settings |= {"append_eos": append_eos, "max_new_tokens": max_new_tokens, **dataclasses.asdict(packing), "num_shards": len(self.batches)}

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[int], ScoredResponses]]:
        """Put the model into evaluation mode inside the block, for a function from a batch's number to its responses."""
        with evaluation_mode(self.model):
            yield self._make

    def _make(self, number: int) -> ScoredResponses:
        entries = self.batches[number]
        rows = [entry * self.rows_per_entry + place for entry in entries for place in range(self.rows_per_entry)]
        prompts = [self.prompts[row] for row in rows]
        prompt_ids, new_ids, texts = self._tokens(rows)
        if self.score is None:
            rewards = self.rewards[rows]  # type: ignore[index]
        else:
            try:
                # Seeded batch by batch, so that a reward that draws random numbers gives the same in a run that was resumed.
                with seeded(number):
                    rewards = checked_rewards(self.score, prompts, texts)
            except ValueError as error:
                raise ValueError(f"batch {number} ({'pairs' if self.paired else 'responses'} {first_few(entries)}): {error}") from error
        records: list[dict[str, Any]] = []
        for row, prompt, text, reward, new in zip(rows, prompts, texts, rewards.tolist(), new_ids, strict=True):
            finish = "eos" if self.eos is not None and new[-1] == self.eos else "length"
            pair = {"pair": row // 2, "preference": ("chosen", "rejected")[row % 2]} if self.paired else {}
            scored = {"response": text, "reward": reward, "finish": finish}
            records.append({"index": self.groups[row], "prompt": prompt, **turns_entry(prompt), **scored, **pair})
        token_ids = torch.tensor([token for new in new_ids for token in new], dtype=torch.int64, device="cpu")
        return ScoredResponses(states_of(self.model, prompt_ids, new_ids), token_ids, list(map(len, new_ids)), records, {})

    def _tokens(self, rows: Sequence[int]) -> tuple[list[list[int]], list[list[int]], list[str]]:
        """The tokens of prompts and responses, and the responses as they are scored, for some rows."""
        prompts = self.tokenizer([self.prompts[row] for row in rows]).input_ids
        texts = [self.responses[row] for row in rows]
        new = self.tokenizer(texts, add_special_tokens=False).input_ids
        for place, ids in enumerate(new):
            if self.eos is not None and ids[-1:] != [self.eos]:
                ids = [*ids, self.eos]
            if self.max_new_tokens is not None and len(ids) > self.max_new_tokens:
                ids = ids[: self.max_new_tokens]
                texts[place] = decode_after(self.tokenizer, prompts[place], ids, skip_special_tokens=True)
            new[place] = list(ids)
        return prompts, new, texts

    def _checked_lengths(self) -> tuple[list[int], list[int]]:
        """Tokens of each entry's longest row that the model reads, and the pairs of equal responses; refuses rows that the model cannot read."""
        lengths: list[int] = []
        empty: list[int] = []
        equal: list[int] = []
        cut = 0
        for start in range(0, len(self.prompts), TOKENISED_AT_ONCE):
            rows = range(start, min(start + TOKENISED_AT_ONCE, len(self.prompts)))
            prompts, new, texts = self._tokens(rows)
            check_tokens(self.model, new, start, "responses")
            cut += sum(text is not self.responses[row] for row, text in zip(rows, texts, strict=True))
            empty += [row for row, ids in zip(rows, new, strict=True) if not ids]
            # The last token of a row is never read.
            lengths += [len(prompt) + len(ids) - 1 for prompt, ids in zip(prompts, new, strict=True)]
            if self.paired:
                equal += [rows[place] // 2 for place in range(0, len(rows), 2) if new[place] == new[place + 1]]
        if cut:
            logger.warning("%d of %d responses are longer than max_new_tokens, %d, and are cut there", cut, len(self.responses), self.max_new_tokens)
        if empty:
            raise ValueError(f"{len(empty)} responses have no tokens: {first_few(empty)}")
        context = context_length(self.model.config)
        too_long = [f"{row} ({length} tokens)" for row, length in enumerate(lengths) if context is not None and length > context]
        if too_long:
            raise ValueError(f"{len(too_long)} prompts with their responses are longer than the model's context of {context}: {first_few(too_long)}")
        return [max(lengths[row : row + self.rows_per_entry]) for row in range(0, len(lengths), self.rows_per_entry)], equal


def states_of(model: Any, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
    """Run rows of tokens in one forward call: the states that read the position before each new token, (new tokens, hidden_size), on the CPU."""
    ids = [(prompt + new)[:-1] for prompt, new in zip(prompts, responses, strict=True)]
    width = max(map(len, ids))
    # On the right: no position sees what comes after it, so the padding changes nothing but rounding.
    inputs = torch.tensor([row + [row[-1]] * (width - len(row)) for row in ids], device=input_device(model))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=input_device(model))
    seen: list[Tensor] = []

    def keep(embedding: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0].detach())
        # Logits are made at one position only.
        return args[0][:, -1:], *args[1:]

    hook = output_embedding(model).register_forward_pre_hook(keep, prepend=True)
    # Compiled code would not run the hook; where nothing is compiled, asking for it would load the compiler.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        with torch.no_grad(), eager:
            model(input_ids=inputs, attention_mask=mask, use_cache=False)
    finally:
        hook.remove()
    shapes = [tuple(states.shape[:2]) for states in seen]
    if shapes != [tuple(inputs.shape)]:
        raise RuntimeError(f"the model ran its output embedding on {shapes} positions in one forward call, wanted once on {tuple(inputs.shape)}")
    return torch.cat([row[len(prompt) - 1 : len(prompt) + len(new) - 1].cpu() for row, prompt, new in zip(seen[0], prompts, responses, strict=True)])


def _end_of_sequence(model: Any, tokenizer: Any) -> int:
    """The token that ends a response: the tokenizer's own where the model stops at it, else the first that the model stops at."""
    stops = effective(model, {}, "eos_token_id")
    stops = [] if stops is None else torch.as_tensor(stops, device="cpu").reshape(-1).tolist()
    eos = tokenizer.eos_token_id if not stops or tokenizer.eos_token_id in stops else stops[0]
    if eos is None:
        raise ValueError("neither the model nor its tokenizer has an end-of-sequence token to put behind the responses; use append_eos=False")
    return eos
