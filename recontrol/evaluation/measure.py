"""One method on one batch of prompts: its responses, and everything that is measured of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recontrol.data.rewards import checked_rewards
from recontrol.data.rewards.checks import Reward
from recontrol.decoding.batches import evaluation_mode
from recontrol.decoding.recording import record_hidden_states
from recontrol.decoding.responses import Response, decode_after
from recontrol.evaluation.divergence import NextTokenRecorder, likelihoods
from recontrol.evaluation.metrics import diversity, similarities
from recontrol.methods.peak_memory import PeakMemory
from recontrol.methods.base import Method
from recontrol.value import ValueFunction

# Of how many responses of a batch the edits are made again, to measure them.
EDITED_ROWS = 4


@dataclass
class Answer:
    """One response and what was measured of it.

    Attributes:
        text: the response.
        tokens: how many were kept, the end-of-sequence token included.
        finish: "eos", "length" or "stop".
        scores: one a reward.
        diversity: prod_{n=2..4} (1 - rep_n).
        coherence: cosine of the sentence embeddings of prompt and response; None without an encoder.
        nll: nats under the uncontrolled model, at temperature 1, summed over the tokens.
        kl: KL of the distributions that the tokens were sampled from to those of the uncontrolled model, summed over the tokens, in nats; None where
            the method does not show them.
        values: V(o_t) of the state read for each token, before an edit, in the unit of the reward; None without a value function.
        pieces: what each token adds to the text; None where they are not wanted.
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
    """One method on one batch of prompts with one seed.

    Attributes:
        label: of the method.
        seed: the seed of the run; batch b is decoded with it + b.
        batch: b.
        seconds: of generation alone.
        steps: tokens kept of the longest response, at least 1: what the time of generation is divided by, however many were decoded for it.
        peak_bytes: of memory during generation, beyond that before.
        edit_norm: mean |u| of the first responses' states, in units of the hidden state; None where the method edits none.
        answers: one a prompt.
    """

    label: str
    seed: int
    batch: int
    seconds: float
    steps: int
    peak_bytes: int
    edit_norm: float | None
    answers: list[Answer] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Cell":
        """The inverse of `to_dict`.

        Raises:
            TypeError, KeyError: other fields.
        """
        return cls(**{**content, "answers": [Answer(**answer) for answer in content["answers"]]})


@dataclass(frozen=True, eq=False)
class Measure:
    """How methods are measured: the same for all that are compared.

    Args:
        model: a causal language model, nothing attached.
        tokenizer: its tokenizer.
        reward: (prompts, responses) -> scores.
        value: whose V is recorded along responses; None for none.
        head_weights: one weight a head of `value`; None for 1.
        encoder: has `encode`; None leaves the coherence out.
        max_new_tokens: length of a response at most, in tokens.
        options: `stop_strings`, and what is passed on to `model.generate`.
    """

    model: Any
    tokenizer: Any
    reward: Reward
    value: ValueFunction | None
    head_weights: Sequence[float] | None
    encoder: Any
    max_new_tokens: int
    options: dict[str, Any]

    def __call__(self, method: Method, prompts: Sequence[str], seed: int, batch: int, *, num_pieces: int = 0) -> Cell:
        """Respond by a method and measure.

        Args:
            method: the method.
            prompts: one batch of them.
            seed: of the run; sampling begins with `seed + batch`.
            batch: its number.
            num_pieces: for how many first responses the text is kept token by token.
        """
        recorder = NextTokenRecorder() if method.divergence is None else None
        processors = [] if recorder is None else [recorder]
        keywords = {**self.options, "logits_processor": [*self.options.get("logits_processor", []), *processors]}
        with record_hidden_states(self.model) as states, PeakMemory(self.model.device) as peak:
            made = method.respond(self.model, self.tokenizer, prompts, max_new_tokens=self.max_new_tokens, seed=seed + batch, **keywords)
        seconds = made.seconds - (0 if recorder is None else recorder.seconds)
        # A method that responds on its own decodes other rows than those of the responses.
        fits = type(method).respond is Method.respond and bool(states.steps)
        if not fits:
            recorder = None
        ids = [response.token_ids for response in made.responses]
        texts = [response.text for response in made.responses]
        with evaluation_mode(self.model):
            likely = likelihoods(self.model, self.tokenizer, prompts, ids, recorder, batch_size=max(1, len(prompts) // 4))
        scores = checked_rewards(self.reward, prompts, texts).double().tolist()
        cosines: Sequence[float | None] = [None] * len(texts) if self.encoder is None else similarities(prompts, texts, self.encoder).tolist()
        rows = [_row(states.steps, index, len(kept)) for index, kept in enumerate(ids)] if fits else []
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
        norm = _edit_norm(method, rows[:EDITED_ROWS])
        return Cell(method.label, seed, batch, seconds, max(1, *map(len, ids)), peak.bytes, norm, answers)

    @torch.no_grad()
    def _values(self, states: Tensor) -> list[float]:
        if self.value is None or not len(states):
            return []
        values = self.value.to_reward(self.value(states.to(self.value.device))).float()
        weights = torch.ones(values.shape[-1]) if self.head_weights is None else torch.tensor(self.head_weights)
        # Five digits are more than a plot shows.
        return [float(f"{value:.5g}") for value in (values @ weights.to(values)).tolist()]


def _row(steps: Sequence[Tensor], index: int, tokens: int) -> Tensor:
    """(tokens, hidden_size), the states that were read for the tokens of a row."""
    return torch.stack([step[index] for step in steps[:tokens]]) if tokens else steps[0][:0]


@torch.no_grad()
def _edit_norm(method: Method, rows: Sequence[Tensor]) -> float | None:
    """Mean norm of what a method adds to states."""
    kept = [row for row in rows if len(row)]
    if not kept:
        return None
    states = torch.cat(kept)
    edited = method.edit(states)
    return None if edited is None else float(np.float32((edited.float() - states.float()).norm(dim=-1).mean().item()))


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
