"""The objective on pairs of responses: a margin between their last tokens, and on request a regulariser and a regression."""

import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from recontrol.data.rollouts import Rollouts
from recontrol.training.data import Standardisation, TrainingData, parts, read
from recontrol.training.objectives.tokens import Objective, Values, held_out_error, td_loss


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean over (pairs,) of -log sigmoid(V(chosen) - V(rejected)), the negative log-likelihood of Bradley and Terry's model."""
    return -logsigmoid(chosen - rejected).mean()


def order_scores(chosen: Tensor, rejected: Tensor) -> dict[str, float | None]:
    """The `preference_loss`, in nats, and the share of pairs that V has right; one with equal values counts half."""
    chosen, rejected = chosen.double(), rejected.double()
    loss, right = preference_loss(chosen, rejected), ((chosen - rejected).sign() + 1).mean() / 2
    return {"validation_preference_loss": float(loss), "validation_preference_accuracy": float(right)}


def preference_pairs(rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
    """(chosen, rejected, head of V) of the margin and (generated, chosen, head) of the anchor, both (pairs, 3), int64, and (responses,), bool: generated.

    The labels of a prompt's lines, as `collect_pairs` writes them, say what is chosen; its other responses are the model's own. Without labels all
    are, and any two with different rewards are a pair, for each head by its own reward, the lower one the generated one of the anchor.
    """
    labelled, rewards, heads = _labelled_pairs(rollouts), rollouts.rewards.tolist(), range(rollouts.num_heads)
    generated = torch.ones(len(rollouts), dtype=torch.bool)
    generated[[index for pairs in labelled.values() for pair in pairs for index in pair]] = False
    margin: list[tuple[int, int, int]] = []
    anchor: list[tuple[int, int, int]] = []
    order = torch.argsort(rollouts.groups, stable=True)
    prompts, counts = rollouts.groups[order].unique_consecutive(return_counts=True)
    for prompt, members in zip(prompts.tolist(), order.split(counts.tolist()), strict=True):
        if prompt in labelled:
            margin += [(*pair, head) for pair in labelled[prompt] for head in heads]
            own = members[generated[members]].tolist()
            anchor += [(index, chosen, head) for index in own for chosen, _ in labelled[prompt] for head in heads]
            continue
        for pair, head in itertools.product(itertools.combinations(members.tolist(), 2), heads):
            rejected, chosen = sorted(pair, key=lambda index: rewards[index][head])
            if rewards[rejected][head] < rewards[chosen][head]:
                margin.append((chosen, rejected, head))
                anchor.append((rejected, chosen, head))
    if not margin:
        missing = "no responses are labelled chosen and rejected, and no two responses to one prompt have different rewards"
        raise ValueError(f"{rollouts.path} has no pair to learn a preference from: {missing}; collect several a prompt, or texts with preferences")
    return torch.tensor(margin), torch.tensor(anchor, dtype=torch.int64).reshape(-1, 3), generated


def _labelled_pairs(rollouts: Rollouts) -> dict[int, list[tuple[int, int]]]:
    """The pairs of chosen and rejected responses that the lines tell, by prompt."""
    found: dict[tuple[int, Any], list[tuple[str, int, str]]] = defaultdict(list)
    for index, record in enumerate(rollouts.records()):
        if (label := record.get("preference")) is not None:
            found[int(rollouts.groups[index]), record.get("pair")].append((str(label), index, record.get("response", "")))
    pairs: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for (prompt, number), responses in found.items():
        labels = [label for label, *_ in responses]
        if sorted(labels) != ["chosen", "rejected"]:
            raise ValueError(f"pair {number!r} of prompt {prompt} has responses labelled {labels}, wanted one 'chosen' and one 'rejected'")
        (_, chosen, text), (_, rejected, other) = sorted(responses)
        if text and text == other:
            raise ValueError(f"responses {chosen}, chosen, and {rejected}, rejected, to prompt {prompt} are the same text: there is nothing to prefer")
        pairs[prompt].append((chosen, rejected))
    return pairs


class Preference(Objective):
    """The terms of Ashrafi et al. 2026 (Pref-CTRL, arXiv 2604.23543): margin and regulariser on last tokens, regression on the model's own responses."""

    name, loss_name, online = "preference", "train_preference_loss", False
    takes = ("td_lambda", "preference_regression", "preference_regulariser")
    preference_regression: float
    preference_regulariser: float

    def check(self) -> None:
        """As `Objective.check`."""
        self.predicts_reward = self.preference_regression > 0
        if self.td_lambda and not self.preference_regression:
            raise ValueError(f"the objective 'preference' without preference_regression has no td_lambda, found {self.td_lambda!r}")
        self.description = "preference margin -log sigmoid(V(chosen) - V(rejected)) on last tokens"
        if self.preference_regression:
            self.description += " + {0.preference_regression:g} times semi-gradient TD({0.td_lambda:g}), reward at the last token, no discount"
        if self.preference_regulariser:
            self.description += " + {0.preference_regulariser:g} times the squared gap between generated and chosen responses"

    def bind(self, data: TrainingData) -> None:
        """As `Objective.bind`: find the pairs on both sides of the split, and the responses to regress on."""
        rollouts, self.data = data.rollouts, data
        self.margin, self.anchor, generated = preference_pairs(rollouts)
        if self.preference_regulariser and not len(self.anchor):
            missing = f"{rollouts.path} has no responses to prompts with pairs beside those labelled chosen and rejected"
            raise ValueError(f"preference_regulariser draws the model's own responses to the chosen ones, and {missing}")
        self.labels = tuple(self._of(self.margin, rollouts.groups[side]) for side in (data.held_in, data.held_out))
        # Prompts.
        self.units, self.held_out = (rollouts.groups[margin[:, 0]].unique() for margin in self.labels)
        self.regressed = generated if generated.any() else ~generated
        own = self.regressed[data.held_in]
        for fits, missing in (
            (len(self.units), "trained on have no pair"),
            (len(self.held_out) or not len(data.held_out), "held out have no pair"),
            (own.any() or not self.preference_regression, "trained on have no response for preference_regression"),
        ):
            if not fits:
                raise ValueError(f"the prompts {missing}; use another seed or validation_fraction, or more rollouts")
        # What V is multiplied by in all three terms.
        self.unit = torch.ones(rollouts.num_heads, dtype=data.rewards.dtype)
        self.standardisation = Standardisation(torch.zeros_like(self.unit), self.unit)
        if self.preference_regression:
            self.standardisation = Standardisation.of(data.rewards[own])
            self.unit = self.unit if data.normalise_rewards else self.standardisation.scale

    def backward(self, values_of: Values, batch: Tensor) -> tuple[float, int]:
        """As `Objective.backward`: the mean of the margin loss is over pairs."""
        share = self.data.processes.share(batch)
        if self.preference_regression:
            tokens = int(self.data.rollouts.lengths[self._responses_of(batch)].sum())
            for states, rewards, lengths in read(self.data.rollouts, self._responses_of(share), self.standardisation):
                values = values_of(states)
                unit = self.unit.to(values)
                part = td_loss(values * unit, rewards.to(values.device) * unit, lengths.to(values.device), self.td_lambda)
                (self.preference_regression * part * (len(values) / tokens)).backward()
        count, margin = len(self._of(self.margin, batch)), self._of(self.margin, share)
        anchor = self._of(self.anchor, share) if self.preference_regulariser else self.anchor[:0]
        if not len(margin):
            return 0.0, count
        ordered, (generated, chosen) = self._last_values(values_of, margin, anchor)
        own = preference_loss(*ordered)
        loss = own * (len(margin) / count)
        if len(anchor):
            gap = (generated - chosen).square().mean() * (len(anchor) / len(self._of(self.anchor, batch)))
            loss = loss + self.preference_regulariser * gap
        loss.backward()
        return float(own.detach()) * len(margin), count

    @torch.no_grad()
    def validate(self, values_of: Values) -> dict[str, float | None]:
        """As `Objective.validate`: `order_scores`, and with regression `held_out_scores`."""
        if not len(self.held_out):
            return {}
        own = self._of(self.margin, self.data.processes.share(self.held_out))
        found = self._last_values(values_of, own)[0].cpu() if len(own) else torch.empty(2, 0)
        entry = order_scores(*torch.cat(self.data.processes.gathered(found), dim=1))
        if self.preference_regression:
            entry |= held_out_error(values_of, self.data, self._responses_of(self.held_out), self.standardisation, self.td_lambda)
        return entry

    def score(self, entry: Mapping[str, Any]) -> float | None:
        """Minus the loss of the order of pairs."""
        return -entry["validation_preference_loss"] if "validation_preference_loss" in entry else None

    def doubts(self, entry: Mapping[str, Any]) -> list[str]:
        """As `Objective.doubts`."""
        found, accuracy = super().doubts(entry), entry.get("validation_preference_accuracy")
        if accuracy is not None and accuracy <= 0.5:
            found.append(f"on prompts held out the value function orders pairs no better than a coin (accuracy {accuracy:.3g}): it needs more pairs")
        return found

    def _responses_of(self, prompts: Tensor) -> Tensor:
        """The responses to some prompts that the regression is on."""
        return (torch.isin(self.data.rollouts.groups, prompts) & self.regressed).nonzero()[:, 0]

    def _of(self, table: Tensor, prompts: Tensor) -> Tensor:
        """The pairs of some prompts, which are given in any order."""
        return table[torch.isin(self.data.rollouts.groups[table[:, 0]], prompts)]

    def _last_values(self, values_of: Values, *tables: Tensor) -> list[Tensor]:
        """V at the last tokens of both responses of each pair of some tables, (2, pairs) each, in the unit of the margin."""
        rollouts = self.data.rollouts
        responses = torch.cat([table[:, :2].flatten() for table in tables]).unique()
        read_in_parts = map(rollouts.batch, parts(responses, rollouts.lengths))
        values = torch.cat([values_of(states[lengths.cumsum(0) - 1]) for states, lengths, _ in read_in_parts])
        last = values.new_zeros(len(rollouts), rollouts.num_heads).index_copy(0, responses.to(values.device), values * self.unit.to(values))
        return [last[table[:, :2].T, table[:, 2]] for table in (each.to(values.device) for each in tables)]
