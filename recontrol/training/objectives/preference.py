"""The objective on pairs of responses: a margin between their last tokens, and on request a regulariser and a regression."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from recontrol.training.data import Standardisation, TrainingData, parts, read
from recontrol.training.objectives.base import Objective, Values
from recontrol.training.objectives.tokens import doubts_about_prediction, held_out_error, td_loss
from recontrol.training.pairs import Pairs, preference_pairs

# In validation, to bound memory.
PROMPTS_AT_ONCE = 256


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean over pairs of -log sigmoid(V(chosen) - V(rejected)), the negative log-likelihood of Bradley and Terry's model.

    Args:
        chosen: (pairs,), V at the last token of the response that was preferred.
        rejected: (pairs,), V at the last token of the other one.

    Returns:
        The loss, a scalar; log 2 where V is the same for both.

    Source: Ashrafi et al. 2026 (Pref-CTRL, arXiv 2604.23543), margin loss.
    """
    return -logsigmoid(chosen - rejected).mean()


def preference_regulariser(generated: Tensor, chosen: Tensor) -> Tensor:
    """Mean over pairs of (V(generated) - V(chosen))^2, which keeps the margin from growing without end.

    Args:
        generated: (pairs,), V at the last token of a response of the model itself.
        chosen: (pairs,), V at the last token of the response that was preferred for the same prompt.

    Returns:
        The regulariser, a scalar.

    Source: Ashrafi et al. 2026 (Pref-CTRL, arXiv 2604.23543), regulariser loss.
    """
    return (generated - chosen).square().mean()


def order_scores(chosen: Tensor, rejected: Tensor) -> Tensor:
    """How many pairs, the sum of their `preference_loss`, and how many V has right; one with equal values counts half."""
    loss = preference_loss(chosen.double(), rejected.double()) * len(chosen) if len(chosen) else torch.zeros((), dtype=torch.float64)
    right = (chosen > rejected).sum() + (chosen == rejected).sum() / 2
    return torch.stack([torch.tensor(float(len(chosen)), dtype=torch.float64), loss.cpu(), right.double().cpu()])


class Preference(Objective):
    """Only last tokens matter to margin and regulariser; the regression is on all tokens of the model's own responses."""

    name, loss_name, online = "preference", "train_preference_loss", False
    takes = ("td_lambda", "preference_regression", "preference_regulariser")
    td_lambda: float
    preference_regression: float
    preference_regulariser: float

    def check(self) -> None:
        """As `Objective.check`."""
        self.predicts_reward = self.preference_regression > 0
        if self.td_lambda and not self.preference_regression:
            raise ValueError(f"the objective 'preference' without preference_regression has no td_lambda, found {self.td_lambda!r}")

    def describe(self) -> str:
        """As `Objective.describe`."""
        terms = ["preference margin -log sigmoid(V(chosen) - V(rejected)) on last tokens"]
        if self.preference_regression:
            terms.append(f"{self.preference_regression:g} times semi-gradient TD({self.td_lambda:g}), reward at the last token, no discount")
        if self.preference_regulariser:
            terms.append(f"{self.preference_regulariser:g} times the squared gap between generated and chosen responses")
        return " + ".join(terms)

    def bind(self, data: TrainingData) -> None:
        """As `Objective.bind`: find the pairs on both sides of the split, and the responses to regress on."""
        rollouts, self.data = data.rollouts, data
        pairs = preference_pairs(rollouts)
        if self.preference_regulariser and not len(pairs.anchor):
            raise ValueError(
                f"preference_regulariser draws the model's own responses to the chosen ones, and {rollouts.path} has no responses to prompts with pairs "
                "beside those labelled chosen and rejected"
            )
        self.pairs, self.held_out = pairs.of(rollouts.groups[data.held_in]), pairs.of(rollouts.groups[data.held_out])
        self.labels = (self.pairs.margin, self.held_out.margin)
        for which, found, wanted in (("trained on", self.pairs, True), ("held out", self.held_out, len(data.held_out) > 0)):
            if wanted and not len(found.margin):
                raise ValueError(f"the prompts {which} have no pair; use another seed or validation_fraction, or more rollouts")
        self.regressed = torch.zeros(len(rollouts), dtype=torch.bool)
        self.standardisation = Standardisation.none(rollouts.num_heads, data.rewards.dtype)
        if self.preference_regression:
            self.regressed = pairs.generated if pairs.generated.any() else ~pairs.generated
            own = self.regressed[data.held_in]
            if not own.any():
                raise ValueError("the prompts trained on have no response for preference_regression; use another seed or validation_fraction, or more rollouts")
            self.standardisation = Standardisation.of(data.rewards[own])
        # What V is multiplied by in all three terms.
        self.unit = torch.ones_like(self.standardisation.scale) if data.normalise_rewards else self.standardisation.scale

    def units(self, epoch: int) -> Tensor:
        """As `Objective.units`: prompts."""
        return self.pairs.margin_prompts.unique()

    def backward(self, values_of: Values, batch: Tensor) -> tuple[float, int]:
        """As `Objective.backward`: the mean of the margin loss is over pairs."""
        share = self.data.processes.share(batch)
        pairs, own = self.pairs.of(batch), self.pairs.of(share)
        if self.preference_regression:
            self._regress(values_of, batch, share)
        if not len(own.margin):
            return 0.0, len(pairs.margin)
        last = self._last_values(values_of, own)
        margin = preference_loss(*_both(last, own.margin))
        loss = margin * (len(own.margin) / len(pairs.margin))
        if self.preference_regulariser and len(own.anchor):
            gap = preference_regulariser(*_both(last, own.anchor))
            loss = loss + self.preference_regulariser * gap * (len(own.anchor) / len(pairs.anchor))
        loss.backward()
        return float(margin.detach()) * len(own.margin), len(pairs.margin)

    @torch.no_grad()
    def validate(self, values_of: Values) -> dict[str, float | None]:
        """As `Objective.validate`: means of `order_scores`, in nats and as a share, and with regression the scores of `HeldOutError`."""
        prompts = self.held_out.margin_prompts.unique()
        if not len(prompts):
            return {}
        found = torch.zeros(3, dtype=torch.float64)
        for own in self.data.processes.share(prompts).split(PROMPTS_AT_ONCE):
            pairs = self.held_out.of(own)
            if len(pairs.margin):
                found += order_scores(*_both(self._last_values(values_of, pairs), pairs.margin))
        count, loss, right = map(self.data.processes.add_up, found.tolist())
        entry: dict[str, float | None] = {"validation_preference_loss": loss / count, "validation_preference_accuracy": right / count}
        if self.preference_regression and len(responses := self._responses_of(prompts)):
            entry |= held_out_error(values_of, self.data, responses, self.standardisation, self.td_lambda)
        return entry

    def score(self, entry: Mapping[str, Any]) -> float | None:
        """Minus the loss of the order of pairs."""
        return -entry["validation_preference_loss"] if "validation_preference_loss" in entry else None

    def doubts(self, entry: Mapping[str, Any]) -> list[str]:
        """As `Objective.doubts`."""
        found, accuracy = doubts_about_prediction(entry), entry.get("validation_preference_accuracy")
        if accuracy is not None and accuracy <= 0.5:
            found.append(f"on prompts held out the value function orders pairs no better than a coin (accuracy {accuracy:.3g}): it needs more pairs")
        return found

    def _regress(self, values_of: Values, batch: Tensor, share: Tensor) -> None:
        tokens = int(self.data.rollouts.lengths[self._responses_of(batch)].sum())
        for states, rewards, lengths in read(self.data.rollouts, self._responses_of(share), self.standardisation):
            values = values_of(states)
            unit = self.unit.to(values)
            loss = td_loss(values * unit, rewards.to(values.device) * unit, lengths.to(values.device), self.td_lambda)
            (self.preference_regression * loss * (len(values) / tokens)).backward()

    def _responses_of(self, prompts: Tensor) -> Tensor:
        """The responses to some prompts that the regression is on."""
        return (torch.isin(self.data.rollouts.groups, prompts) & self.regressed).nonzero()[:, 0]

    def _last_values(self, values_of: Values, pairs: Pairs) -> Tensor:
        """V at the last tokens of the responses in pairs, in the unit of the margin; (responses, num_heads), 0 for all other responses."""
        rollouts = self.data.rollouts
        tables = [pairs.margin, pairs.anchor] if self.preference_regulariser else [pairs.margin]
        responses = torch.cat([table[:, :2].flatten() for table in tables]).unique()
        rows = []
        for part in parts(responses, rollouts.lengths):
            states, lengths, _ = rollouts.batch(part)
            rows.append(states[lengths.cumsum(0) - 1].clone())
        values = values_of(torch.cat(rows))
        values = values * self.unit.to(values)
        return values.new_zeros(len(rollouts), rollouts.num_heads).index_copy(0, responses.to(values.device), values)


def _both(last: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """V of the first and of the second response of each row of a table of `Pairs`."""
    first, second, heads = table.to(last.device).T
    return last[first, heads], last[second, heads]
