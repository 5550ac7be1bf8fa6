"""Decoding one prompt under many settings of control at once: settings share a row until their tokens part, then the row forks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList

from recontrol.ascend import ascend
from recontrol.decoding.control import Control
from recontrol.decoding.controller import CACHE_NAMES
from recontrol.decoding.divergence import divergence
from recontrol.decoding.editing import Editing, check_fit
from recontrol.generation.requests import Options, Trace
from recontrol.tuning.gumbel import add_gumbel


@dataclass(frozen=True)
class _Row:
    """One row of the batch.

    Attributes:
        prompt: its number.
        settings: which settings have chosen these tokens.
        tokens: the new ones.
    """

    prompt: int
    settings: list[int]
    tokens: list[int]


class ForkedDecoding(Editing):
    """Decodes prompts under several settings, each distinct prefix once.

    At every decode step the state o_t of a row is edited for each setting of the row, in one ascent with a step size and a number of steps
    for each, and all edits go through the output embedding and what the model does to logits after it. Settings that choose the same
    token have the same next state, since edits never enter the key/value cache; for each other token the row is copied, cache included.

    Args:
        model: a causal language model of transformers.
        controls: the settings; they share the value function, and differ in step size and steps alone.
        backend: as for `recontrol.ascend`.
        allow_other_model: accept a value function that was trained on the states of another model.
        trace: record what the edits do. The unedited states then go through the output embedding too.

    Attributes:
        tokens: by (setting, prompt), the tokens chosen.
        traces: by (setting, prompt); with `trace` only.
        decoded: by setting, the decode steps that were run for it.
        shared: by setting, the decode steps that were run for a setting before it in the list and served it as well.
        forward_calls: of the model.

    Raises:
        TypeError, ValueError, RuntimeError: as `Controller.attach`.
    """

    def __init__(self, model: Any, controls: Sequence[Control], *, backend: str = "auto", allow_other_model: bool = False, trace: bool = False):
        super().__init__(model)
        first = controls[0]
        self.control = first
        self.backend = backend
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.traces: dict[tuple[int, int], Trace] | None = {} if trace else None
        self.decoded, self.shared = Counter[int](), Counter[int]()
        self.forward_calls = 0
        self._batch: list[int] = []
        self._rows: list[_Row] = []
        check_fit(self, first.value, allow_other_model)
        device, wide = first.value.device, torch.float64 if first.value.dtype == torch.float64 else torch.float32
        self._step_size = torch.tensor([control.step_size for control in controls], dtype=wide, device=device)
        self._steps = torch.tensor([control.steps for control in controls], device=device)
        self._head_weights = None if first.head_weights is None else torch.tensor(first.head_weights, dtype=wide, device=device)
        # A backend that cannot run says so here, and what it precomputes from the weights is ready.
        self._edit(torch.zeros(1, first.value.hidden_size, dtype=self.dtype(), device=device), [(_Row(0, [0], []), 0)])
        with self._attaching():
            self._hooks.append(self.embedding.register_forward_pre_hook(self._before_embedding))

    def decode(self, batch: Sequence[int], ids: list[list[int]], options: Options, criteria: StoppingCriteriaList, sampled: bool) -> None:
        """Decode some prompts to the end.

        Args:
            batch: the numbers of the prompts.
            ids: their tokens.
            options: how responses are generated.
            criteria: when a response ends, beside its length and end-of-sequence tokens.
            sampled: choose tokens with Gumbel noise, not greedily.
        """
        width = max(map(len, ids))
        # On the left, so that the last position is the prompt's last for every row.
        inputs = torch.tensor([[options.pad_id] * (width - len(row)) + row for row in ids], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.model.device)

        def loop(
            model: Any, input_ids: Tensor, logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList, generation_config: Any, **kwargs: Any
        ) -> Tensor:
            self._batch = list(batch)
            self._rows = [_Row(prompt, list(range(len(self._steps))), []) for prompt in batch]
            try:
                while self._rows:
                    input_ids, kwargs = self._step(model, input_ids, kwargs, logits_processor, stopping_criteria, options.seed if sampled else None)
            finally:
                self._rows = []
            return input_ids

        # `generate` prepares caches, processors and criteria as ever, and leaves the decoding to this loop.
        self.model.generate(
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=options.max_new_tokens,
            stopping_criteria=criteria,
            custom_generate=loop,
            **{"pad_token_id": options.pad_id, "disable_compile": True, **options.generation},
        )

    def _step(
        self, model: Any, input_ids: Any, kwargs: dict[str, Any], processors: LogitsProcessorList, criteria: StoppingCriteriaList, seed: int | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """One token for each setting of each row; the rows that go on, and the arguments of the model for them."""
        rows, position = self._rows, len(self._rows[0].tokens)
        prefill = {"is_first_iteration": True} if position == 0 else {"next_sequence_length": 1 if kwargs["use_cache"] else None}
        outputs = model(**model.prepare_inputs_for_generation(input_ids, **prefill, **kwargs), return_dict=True)
        self._count(rows)
        pairs = _pairs(rows)
        places = torch.tensor([place for place, row in enumerate(rows) for _ in row.settings], device=input_ids.device)
        logits = outputs.logits[:, -1]
        if self.traces is not None:
            for (row, setting), moved in zip(pairs, divergence(logits[: len(pairs)], logits[len(pairs) :][places]).tolist(), strict=True):
                self.traces[setting, row.prompt].divergence.append(moved)
        # As `generate` has it: processors get float32.
        scores = logits[: len(pairs)].to(dtype=torch.float32, device=input_ids.device, copy=True)
        if processors:
            scores = self._processed(processors, input_ids[places], scores, [row.prompt for row, _ in pairs])
        if seed is not None:
            scores = add_gumbel(scores, [row.prompt for row, _ in pairs], position, seed)
        chosen = iter(scores.argmax(-1).tolist())
        forks = [(place, fork) for place, row in enumerate(rows) for fork in _forks(row, chosen)]
        parents = torch.tensor([place for place, _ in forks], device=input_ids.device)
        newest = torch.tensor([fork.tokens[-1] for _, fork in forks], device=input_ids.device)
        input_ids = torch.cat([input_ids[parents], newest[:, None]], dim=-1)
        done = criteria(input_ids, None).tolist()
        for (_, fork), ended in zip(forks, done, strict=True):
            if ended:
                self.tokens |= {(setting, fork.prompt): fork.tokens for setting in fork.settings}
        live = [place for place, ended in enumerate(done) if not ended]
        self._rows = [forks[place][1] for place in live]
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        if live and parents[live].tolist() != list(range(len(rows))):
            kwargs = _taken(kwargs, parents[live])
        return input_ids[live], kwargs

    def _processed(self, processors: LogitsProcessorList, input_ids: Any, scores: Tensor, prompts: Sequence[int]) -> Tensor:
        """Scores as `generate` would process them. Some processors know the rows of the batch, so they are always shown one row a prompt."""
        of_prompt = {prompt: [place for place, other in enumerate(prompts) if other == prompt] for prompt in self._batch}
        processed = scores.clone()
        for turn in range(max(map(len, of_prompt.values()))):
            # Any row stands in for a prompt that is finished, or has fewer settings left that differ.
            shown = [places[turn] if turn < len(places) else 0 for places in of_prompt.values()]
            result = processors(input_ids[shown], scores[shown])
            meant = [slot for slot, places in enumerate(of_prompt.values()) if turn < len(places)]
            processed[[shown[slot] for slot in meant]] = result[meant]
        return processed

    def _count(self, rows: Sequence[_Row]) -> None:
        self.forward_calls += 1
        self.decoded.update(row.settings[0] for row in rows)
        self.shared.update(setting for row in rows for setting in row.settings[1:])

    # How many rows there are changes from step to step: the compiler would compile each step anew.
    @torch.compiler.disable
    def _before_embedding(self, embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if self._sign is not None:
            return (hidden * self._sign, *args[1:])
        if self._paused or not self._rows:
            return None
        # (rows, hidden_size), each the state that is read to sample the next token
        states = hidden[:, -1]
        pairs = _pairs(self._rows)
        places = torch.tensor([place for place, row in enumerate(self._rows) for _ in row.settings], device=hidden.device)
        read = self._edit(states[places], pairs)
        if self.traces is not None:
            read = torch.cat([read, states])
        return (read[:, None], *args[1:])

    def _edit(self, states: Tensor, pairs: Sequence[tuple[_Row, int]]) -> Tensor:
        """One ascent with a setting for each row. From o_t each time: a state that is edited on from another's was rounded on the way."""
        which = torch.tensor([setting for _, setting in pairs], device=states.device)
        result = ascend(
            states,
            self.control.value,
            self._step_size[which],
            self._steps[which],
            radius=self.control.radius,
            target=self.control.target,
            head_weights=self._head_weights,
            return_trace=self.traces is not None,
            backend=self.backend,
        )
        if not isinstance(result, tuple):
            return result
        edited, path = result
        if self.traces is not None and self.attached:
            norms = (edited.float() - states.float()).norm(dim=-1)
            for (row, setting), before, after, norm in zip(pairs, path[:, 0].tolist(), path[:, -1].tolist(), norms.tolist(), strict=True):
                trace = self.traces.setdefault((setting, row.prompt), Trace())
                trace.value_before.append(before)
                trace.value_after.append(after)
                trace.edit_norm.append(norm)
        return edited


def _pairs(rows: Sequence[_Row]) -> list[tuple[_Row, int]]:
    """Each row with each of its settings."""
    return [(row, setting) for row in rows for setting in row.settings]


def _forks(row: _Row, chosen: Any) -> list[_Row]:
    """The rows that a row becomes, from an iterator over the tokens that its settings have chosen."""
    groups: dict[int, list[int]] = {}
    for setting in row.settings:
        groups.setdefault(next(chosen), []).append(setting)
    return [_Row(row.prompt, settings, [*row.tokens, token]) for token, settings in groups.items()]


def _taken(kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The arguments of the next call of the model for some of the rows, or for several copies of one."""
    taken = dict(kwargs)
    for name, given in kwargs.items():
        if name in CACHE_NAMES and given is not None:
            given.reorder_cache(rows)
        elif isinstance(given, Tensor) and given.dim() > 1:
            # Positions have several axes in some models, (axes, rows, tokens).
            taken[name] = given.index_select(-2, rows.to(given.device))
    return taken
