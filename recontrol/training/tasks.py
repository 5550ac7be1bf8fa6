"""What one mini-batch and one validation are: over the tokens of whole responses, or over pairs of responses."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from recontrol.data.rollouts import Rollouts
from recontrol.training.data import Standardisation, parts
from recontrol.training.distributed import Processes
from recontrol.training.held_out import HeldOutError, HeldOutPreference
from recontrol.training.objectives import Objective, preference_loss, preference_regulariser, reference_loss, td_loss
from recontrol.training.pairs import Pairs

# V of packed hidden states, (tokens, hidden_size) -> (tokens, num_heads).
Values = Callable[[Tensor], Tensor]
# In validation, to bound memory.
PROMPTS_AT_ONCE = 256


class Task(Protocol):
    """An objective on rollouts.

    Attributes:
        units: what an epoch takes in some order and mini-batches are made of: responses, or prompts.
        loss_name: of its loss in the history.
    """

    units: Tensor
    loss_name: str

    def backward(self, values_of: Values, batch: Tensor) -> tuple[float, int]:
        """Add the gradient of the mean loss of a mini-batch of `units` to the parameters; this process does its share.

        Returns:
            This process's sum of the loss in the unit of the reward, and what all processes' sum has to be divided by for the mean.
        """

    def validate(self, values_of: Values) -> dict[str, float | None]:
        """The scores on what is held out; empty if nothing is."""


class TokenTask:
    """The objectives td, td-lambda, mc and reference.

    Args:
        rollouts: the data.
        objective: one of those.
        standardisation: of the rewards; V is trained in its unit.
        held_in: responses to train on.
        held_out: responses to validate on.
        processes: the processes that share the work.
    """

    def __init__(self, rollouts: Rollouts, objective: Objective, standardisation: Standardisation, held_in: Tensor, held_out: Tensor, processes: Processes):
        self.rollouts, self.objective, self.standardisation = rollouts, objective, standardisation
        self.units, self.held_out, self.processes = held_in, held_out, processes
        self.loss_name = "train_reference_loss" if objective.name == "reference" else "train_td_loss"

    def backward(self, values_of: Values, batch: Tensor) -> tuple[float, int]:
        """As `Task.backward`: the mean is over tokens, for the reference over responses."""
        by_response = self.objective.name == "reference"
        total = len(batch) if by_response else int(self.rollouts.lengths[batch].sum())
        sum_of_losses = 0.0
        for states, rewards, lengths in read(self.rollouts, self.processes.share(batch), self.standardisation):
            values = values_of(states)
            rewards, lengths = rewards.to(values.device), lengths.to(values.device)
            count = len(lengths) if by_response else len(values)
            (self._loss(values, rewards, lengths) * (count / total)).backward()
            unit = self.standardisation.scale.to(values)
            sum_of_losses += float(self._loss(values.detach() * unit, rewards * unit, lengths)) * count
        return sum_of_losses, total

    def validate(self, values_of: Values) -> dict[str, float | None]:
        """As `Task.validate`: the scores of `HeldOutError`."""
        if not len(self.held_out):
            return {}
        return held_out_error(values_of, self.rollouts, self.held_out, self.standardisation, self.objective.td_lambda, self.processes)

    def _loss(self, values: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
        if self.objective.name == "reference":
            return reference_loss(values, rewards, lengths)
        return td_loss(values, rewards, lengths, self.objective.td_lambda)


class PreferenceTask:
    """The objective preference: a margin between the last tokens of pairs, and on request a regulariser and a regression.

    Only last tokens matter to margin and regulariser; the regression is on all tokens of `regressed`.

    Args:
        rollouts: the data.
        objective: the preference objective.
        standardisation: of the rewards that the regression is on.
        unit: (num_heads,), what V is multiplied by in all three.
        held_in: pairs to train on.
        held_out: pairs to validate on.
        regressed: (responses,), bool: those that the regression is on.
        processes: the processes that share the work.
    """

    loss_name = "train_preference_loss"

    def __init__(
        self,
        rollouts: Rollouts,
        objective: Objective,
        standardisation: Standardisation,
        unit: Tensor,
        held_in: Pairs,
        held_out: Pairs,
        regressed: Tensor,
        processes: Processes,
    ):
        self.rollouts, self.objective, self.standardisation, self.unit = rollouts, objective, standardisation, unit
        self.pairs, self.held_out, self.processes = held_in, held_out, processes
        self.units, self.regressed = held_in.margin_prompts.unique(), regressed

    def backward(self, values_of: Values, batch: Tensor) -> tuple[float, int]:
        """As `Task.backward`: the mean of the margin loss is over pairs."""
        objective, pairs = self.objective, self.pairs.of(batch)
        own = self.pairs.of(self.processes.share(batch))
        if objective.preference_regression:
            regressed = self._responses_of(batch)
            tokens = int(self.rollouts.lengths[regressed].sum())
            for states, rewards, lengths in read(self.rollouts, self._responses_of(self.processes.share(batch)), self.standardisation):
                values = values_of(states)
                unit = self.unit.to(values)
                loss = td_loss(values * unit, rewards.to(values.device) * unit, lengths.to(values.device), objective.td_lambda)
                (objective.preference_regression * loss * (len(values) / tokens)).backward()
        if not len(own.margin):
            return 0.0, len(pairs.margin)
        last = self._last_values(values_of, own)
        margin = preference_loss(last(own.margin[:, 0], own.margin[:, 2]), last(own.margin[:, 1], own.margin[:, 2]))
        loss = margin * (len(own.margin) / len(pairs.margin))
        if objective.preference_regulariser and len(own.anchor):
            gap = preference_regulariser(last(own.anchor[:, 0], own.anchor[:, 2]), last(own.anchor[:, 1], own.anchor[:, 2]))
            loss = loss + objective.preference_regulariser * gap * (len(own.anchor) / len(pairs.anchor))
        loss.backward()
        return float(margin.detach()) * len(own.margin), len(pairs.margin)

    @torch.no_grad()
    def validate(self, values_of: Values) -> dict[str, float | None]:
        """As `Task.validate`: the scores of `HeldOutPreference`, and with regression those of `HeldOutError`."""
        prompts = self.held_out.margin_prompts.unique()
        if not len(prompts):
            return {}
        found = HeldOutPreference()
        own = self.processes.share(prompts)
        for start in range(0, len(own), PROMPTS_AT_ONCE):
            pairs = self.held_out.of(own[start : start + PROMPTS_AT_ONCE])
            last = self._last_values(values_of, pairs)
            found.add(last(pairs.margin[:, 0], pairs.margin[:, 2]), last(pairs.margin[:, 1], pairs.margin[:, 2]))
        entry = self.processes.merged(found).summary()
        if self.objective.preference_regression and len(responses := self._responses_of(prompts)):
            entry |= held_out_error(values_of, self.rollouts, responses, self.standardisation, self.objective.td_lambda, self.processes)
        return entry

    def _responses_of(self, prompts: Tensor) -> Tensor:
        """The responses to some prompts that the regression is on."""
        return (torch.isin(self.rollouts.groups, prompts) & self.regressed).nonzero()[:, 0]

    def _last_values(self, values_of: Values, pairs: Pairs) -> Callable[[Tensor, Tensor], Tensor]:
        """A function from responses and heads to V at the last tokens, in the unit of the margin."""
        columns = [pairs.margin[:, :2], pairs.anchor[:, :2]] if self.objective.preference_regulariser else [pairs.margin[:, :2]]
        responses = torch.cat([column.flatten() for column in columns]).unique()
        rows = []
        for part in parts(responses, self.rollouts.lengths):
            states, lengths, _ = self.rollouts.batch(part)
            rows.append(states[lengths.cumsum(0) - 1].clone())
        values = values_of(torch.cat(rows))
        values = values * self.unit.to(values)
        rows_of = torch.full((len(self.rollouts),), -1).scatter(0, responses, torch.arange(len(responses)))
        return lambda indices, heads: values[rows_of[indices].to(values.device), heads.to(values.device)]


@torch.no_grad()
def held_out_error(
    values_of: Values, rollouts: Rollouts, responses: Tensor, standardisation: Standardisation, td_lambda: float, processes: Processes
) -> dict[str, float | None]:
    """The summary of `HeldOutError` on some responses, in the unit of the reward."""
    error = HeldOutError(rollouts.num_heads, standardisation.mean)
    for states, rewards, lengths in read(rollouts, processes.share(responses), standardisation):
        values = values_of(states)
        error.add(standardisation.undo(values), standardisation.undo(rewards.to(values)), lengths.to(values.device), td_lambda)
    return processes.merged(error).summary()


def read(rollouts: Rollouts, indices: Tensor, standardisation: Standardisation) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """States, standardised rewards and lengths of some responses, some thousand tokens at a time."""
    for part in parts(indices, rollouts.lengths):
        states, lengths, rewards = rollouts.batch(part)
        yield states, standardisation.apply(rewards), lengths
