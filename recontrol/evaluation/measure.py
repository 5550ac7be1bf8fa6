"""One method on one batch of prompts: its responses, their measurements, and the files that keep them."""

import dataclasses
import hashlib
import inspect
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from recontrol.data.dialogue import readable
from recontrol.data.identity import fingerprint, unknown
from recontrol.data.rewards import checked_rewards
from recontrol.data.rewards.checks import Reward
from recontrol.decoding.batches import evaluation_mode
from recontrol.decoding.config import Decoding
from recontrol.decoding.divergence import divergence
from recontrol.decoding.hooks import input_device
from recontrol.decoding.recording import record_hidden_states
from recontrol.decoding.responses import Response, decode_after
from recontrol.evaluation.metrics import diversity, similarities
from recontrol.files import check_same_settings, read_json, remove_leftovers, write_aside, write_json
from recontrol.methods.base import Method
from recontrol.methods.peak_memory import PeakMemory
from recontrol.value import ValueFunction

# For how many responses of a batch the edits are computed again, to measure them.
EDITED_ROWS = 4
FORMAT = "recontrol.evaluation"
FORMAT_VERSION = 1
LONGEST_NAME = 60


@dataclass
class Answer:
    """One response and its measurements.

    `nll` and `kl` are sums over the tokens, in nats, `kl` None for a method that does not show its distributions. `values` is V(o_t) for each token, before
    the edit, in the unit of the reward; `pieces` is what each token adds to the text, for the first responses.
    """

    text: str
    tokens: int
    finish: str
    scores: list[float]
    diversity: float
    coherence: float | None
    nll: float
    kl: float | None
    values: list[float] | None = None
    pieces: list[str] | None = None


@dataclass
class Cell:
    """One method on one batch of prompts with one seed: batch b is decoded with `seed + b`.

    `seconds` are those of generation alone; `steps` is the length of the longest response, at least 1, whatever was decoded for it; `peak_bytes` is beyond
    the memory before; `edit_norm` is the mean |u| of the first responses' states, None for a method that edits none.
    """

    label: str
    seed: int
    batch: int
    seconds: float
    steps: int
    peak_bytes: int
    edit_norm: float | None
    answers: list[Answer] = field(repr=False)
    # The fingerprint of what scored the answers; None where it was not kept.
    reward: str | None = None


@dataclass(frozen=True, eq=False)
class Measure:
    """The measurements of all methods of a comparison; V is recorded along responses where there is a `value`."""

    model: Any
    tokenizer: Any
    reward: Reward
    value: ValueFunction | None
    head_weights: Sequence[float] | None
    encoder: Any
    decoding: Decoding

    def __call__(self, method: Method, prompts: Sequence[str], seed: int, batch: int, *, num_pieces: int = 0) -> Cell:
        """Respond by a method, sampling with `seed + batch`, and measure; the text of the first `num_pieces` responses is kept token by token."""
        recorder = NextTokenRecorder() if method.divergence is None else None
        options = dict(self.decoding.options)
        options["logits_processor"] = [*options.get("logits_processor", []), *([] if recorder is None else [recorder])]
        decoding = dataclasses.replace(self.decoding, seed=seed + batch, options=options)
        with record_hidden_states(self.model) as states, PeakMemory(input_device(self.model)) as peak:
            made = method.respond(self.model, self.tokenizer, prompts, decoding)
        texts, ids = [response.text for response in made.responses], [response.token_ids for response in made.responses]
        # A method with a `respond` of its own decodes other rows than those of the responses.
        fits = type(method).respond is Method.respond and bool(states.steps)
        with evaluation_mode(self.model):
            likely = likelihoods(self.model, self.tokenizer, prompts, ids, recorder if fits else None, batch_size=max(1, len(prompts) // 4))
        scores = checked_rewards(self.reward, prompts, texts).double().tolist()
        asked = list(map(readable, prompts))
        cosines: Sequence[float | None] = [None] * len(texts) if self.encoder is None else similarities(asked, texts, self.encoder).tolist()
        # (tokens, hidden_size) of each response, the states that were read to sample it.
        rows = [row[: len(kept)] for row, kept in zip(torch.stack(states.steps, 1), ids, strict=False)] if fits else []
        answers = [
            Answer(
                text=response.text,
                tokens=len(response.token_ids),
                finish=response.finish,
                scores=scores[index],
                diversity=diversity(response.text),
                coherence=cosines[index],
                nll=likely[index].nll,
                kl=likely[index].kl if method.divergence is None else method.divergence,
                values=self._values(rows[index]) if fits and self.value is not None else None,
                pieces=_pieces(self.tokenizer, prompts[index], response) if index < num_pieces else None,
            )
            for index, response in enumerate(made.responses)
        ]
        seconds = made.seconds - (0 if recorder is None else recorder.seconds)
        read = torch.cat(rows[:EDITED_ROWS]) if rows else torch.zeros(0)
        with torch.no_grad():
            edited = method.edit(read) if len(read) else None
        norm = None if edited is None else float(np.float32((edited.float() - read.float()).norm(dim=-1).mean().item()))
        return Cell(method.label, seed, batch, seconds, max(1, *map(len, ids)), peak.bytes, norm, answers, self.reward_sha256)

    @cached_property
    def reward_sha256(self) -> str:
        """The fingerprint of the reward."""
        return fingerprint(self.reward)

    def scored(self, cell: Cell, prompts: Sequence[str]) -> Cell:
        """A cell with the scores of this reward in place of another's."""
        scores = checked_rewards(self.reward, prompts, [answer.text for answer in cell.answers]).double().tolist()
        answers = [dataclasses.replace(answer, scores=row) for answer, row in zip(cell.answers, scores, strict=True)]
        return dataclasses.replace(cell, answers=answers, reward=self.reward_sha256)

    @torch.no_grad()
    def _values(self, states: Tensor) -> list[float]:
        assert self.value is not None
        values = self.value.to_reward(self.value(states.to(self.value.device))).float()
        weights = values.new_tensor([1.0] * values.shape[-1] if self.head_weights is None else list(self.head_weights))
        # Five digits are more than a plot shows.
        return [float(f"{value:.5g}") for value in (values * weights).sum(-1).tolist()]


def _pieces(tokenizer: Any, prompt: str, response: Response) -> list[str]:
    """What each token adds to the text; a character of several tokens is added by the last of them."""
    ids = tokenizer(prompt).input_ids
    so_far, pieces = "", []
    for count in range(1, len(response.token_ids) + 1):
        text = decode_after(tokenizer, ids, response.token_ids[:count], skip_special_tokens=True)
        # An unfinished character is shown as a mark of replacement.
        whole = text if count == len(response.token_ids) else text.rstrip("\ufffd")
        pieces.append(whole[len(so_far) :] if whole.startswith(so_far) else "")
        so_far = whole if whole.startswith(so_far) else so_far
    return pieces


class Likelihood(NamedTuple):
    """A response under the uncontrolled model, in nats: -sum_t log p0(y_t), and sum_t KL(p_t || p0_t) where p was recorded, else None."""

    nll: float
    kl: float | None


class NextTokenRecorder(LogitsProcessor):
    """Records the (rows, vocabulary) log-probabilities of each decode step before temperature and the like, and the seconds that this took."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.seconds = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record, and return the scores unchanged."""
        start = time.perf_counter()
        # On the host, where there is room for a whole batch; the copy waits for the device, so the clock is right.
        self.steps.append(scores.float().log_softmax(-1).cpu())
        self.seconds += time.perf_counter() - start
        return scores


@torch.no_grad()
def likelihoods(
    model: Any, tokenizer: Any, prompts: Sequence[str], token_ids: Sequence[Sequence[int]], recorder: NextTokenRecorder | None = None, *, batch_size: int = 16
) -> list[Likelihood]:
    """Negative log-likelihood of each response under the uncontrolled model, and with the recorder of their generation, as one batch, the KL.

    The sum over tokens of KL(p || p0) along sampled responses is an unbiased estimate of the KL between the distributions of whole responses, for
    sampling at temperature 1 without truncation, and has less variance than the log-ratio.
    """
    if len(prompts) != len(token_ids):
        raise ValueError(f"every response needs its prompt: found {len(prompts)} prompts for {len(token_ids)} responses")
    found: list[Likelihood] = [Likelihood(0.0, None if recorder is None else 0.0)] * len(token_ids)
    rows = [(index, tokenizer(prompt).input_ids, list(ids)) for index, (prompt, ids) in enumerate(zip(prompts, token_ids, strict=True)) if len(ids)]
    rows.sort(key=lambda row: len(row[1]) + len(row[2]))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        for (index, _, ids), logits in zip(batch, _logits(model, batch), strict=True):
            nll = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(ids, device=logits.device), reduction="sum")
            found[index] = Likelihood(float(nll), None)
            if recorder is not None:
                sampled_from = torch.stack([step[index] for step in recorder.steps[: len(ids)]]).to(logits.device)
                found[index] = Likelihood(float(nll), float(divergence(sampled_from, logits).double().sum()))
    return found


def _logits(model: Any, rows: Sequence[tuple[int, list[int], list[int]]]) -> list[Tensor]:
    """Of each row (index, prompt, response) the (tokens, vocabulary) logits that sample its response."""
    texts = [prompt + ids for _, prompt, ids in rows]
    width = max(map(len, texts))
    # Right padding: no token of a response attends to it, and positions need no correction.
    inputs = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=input_device(model))
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=input_device(model))
    first = min(len(prompt) for _, prompt, _ in rows) - 1
    # With a large vocabulary the logits of prompts would be most of the memory.
    options = {"logits_to_keep": width - first} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False, **options).logits[:, first - width :]
    starts = [len(prompt) - 1 - first for _, prompt, _ in rows]
    return [scores[start : start + len(ids)] for scores, start, (_, _, ids) in zip(logits, starts, rows, strict=True)]


class Cells(dict[tuple[str, int, int], Cell]):
    """The cells by label, seed and batch; with a folder, one file for each, and one with the settings that all have in common."""

    def __init__(self, folder: str | os.PathLike | None, settings: dict[str, Any], methods: Sequence[Method]):
        super().__init__()
        self._folders: dict[str, Path] = {}
        for method in [] if folder is None else methods:
            before, now = (Path(folder or "") / folder_name(method, *also) for also in ((), (method.content,)))
            # Where a release before began it, its name says nothing of the content of a reward.
            self._folders[method.label] = before if before.exists() and not now.exists() else now
        if folder is None:
            return
        wanted = json.loads(json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **settings}))
        path = Path(folder) / "settings.json"
        if path.exists():
            found = read_json(path)
            check_same_settings(found, wanted, f"{folder} has an evaluation with", ignored=unknown(found, "encoder_sha256", "options_sha256"))
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        if not path.exists():
            write_json(path, wanted)

    def known(self, label: str, seed: int, batch: int) -> bool:
        """Whether a cell is there, or can be read; a damaged file is refused."""
        path = self._path(label, seed, batch)
        if (label, seed, batch) not in self and path is not None and path.exists():
            content = read_json(path)
            try:
                self[label, seed, batch] = Cell(**{**content, "answers": [Answer(**answer) for answer in content["answers"]]})
            except (TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} is no cell of an evaluation ({error}); remove it to have it made again") from error
        return (label, seed, batch) in self

    def add(self, cell: Cell) -> None:
        """Keep a cell, and write it whole or not at all."""
        self[cell.label, cell.seed, cell.batch] = cell
        path = self._path(cell.label, cell.seed, cell.batch)
        if path is not None:
            path.parent.mkdir(exist_ok=True)
            with write_aside(path) as aside:
                aside.write_text(json.dumps(asdict(cell), ensure_ascii=False) + "\n", encoding="utf-8")

    def _path(self, label: str, seed: int, batch: int) -> Path | None:
        return self._folders[label] / f"seed-{seed}-batch-{batch:05}.json" if self._folders else None


def folder_name(method: Method, content: Any = None) -> str:
    """The label in characters that every file system takes, and a hash of label and identity, and of the content of a reward."""
    readable = re.sub(r"[^a-z0-9.]+", "-", method.label.lower()).strip("-")[:LONGEST_NAME]
    return f"{readable}-{short_hash([method.label, method.identity, *([] if content is None else [content])])}"


def short_hash(content: Any) -> str:
    """The first eight digits of the SHA-256 of the content as JSON; what JSON cannot hold is hashed as its text."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:8]
