"""Pairs of a chosen and a rejected response to the same prompt."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recontrol.data.rollouts import Rollouts

LABELS = ("chosen", "rejected")


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses; the prompts that both answer are in rising order."""

    # (pairs, 3): indices of the chosen and the rejected response, and the head of V that orders them.
    margin: Tensor
    # (pairs, 3): indices of a response that the model itself generated and of a chosen one, and the head.
    anchor: Tensor
    # (responses,), bool: whether the model itself generated the response.
    generated: Tensor
    # (pairs,): the prompt of each row of `margin` and of `anchor`.
    margin_prompts: Tensor
    anchor_prompts: Tensor

    def of(self, prompts: Tensor) -> "Pairs":
        """The pairs of some prompts, which are given in any order."""
        margin, anchor = torch.isin(self.margin_prompts, prompts), torch.isin(self.anchor_prompts, prompts)
        return Pairs(self.margin[margin], self.anchor[anchor], self.generated, self.margin_prompts[margin], self.anchor_prompts[anchor])


def preference_pairs(rollouts: Rollouts) -> Pairs:
    """Find the pairs in rollouts.

    Where lines of a prompt say `"preference": "chosen"` or `"rejected"`, as those of `collect_pairs` do, the two with the same number `pair`
    are a pair, for every head; the prompt's other responses are the model's own. Where none says so, all are the model's own, and any two
    with different rewards are a pair, for each head by its own reward; the one with the lower reward is the generated one in `anchor`.
    """
    labelled = _labelled_pairs(rollouts)
    heads = range(rollouts.num_heads)
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
        else:
            found = _pairs_by_reward(members, rollouts.rewards)
            margin += found
            anchor += [(rejected, chosen, head) for chosen, rejected, head in found]
    if not margin:
        raise ValueError(
            f"{rollouts.path} has no pair to learn a preference from: no responses are labelled chosen and rejected, and no two responses to one prompt "
            "have different rewards; collect several responses a prompt (num_samples), or from texts with preferences"
        )
    tables = [torch.tensor(rows, dtype=torch.int64).reshape(-1, 3) for rows in (margin, anchor)]
    return Pairs(tables[0], tables[1], generated, *(rollouts.groups[table[:, 0]] for table in tables))


def _labelled_pairs(rollouts: Rollouts) -> dict[int, list[tuple[int, int]]]:
    """The pairs of chosen and rejected responses that the lines tell, by prompt."""
    found: dict[tuple[int, Any], dict[str, tuple[int, str]]] = {}
    for index, record in enumerate(rollouts.records()):
        label = record.get("preference")
        if label is None:
            continue
        key = (int(rollouts.groups[index]), record.get("pair"))
        pair = found.setdefault(key, {})
        if label not in LABELS or label in pair:
            raise ValueError(f"response {index} to prompt {key[0]} is labelled {label!r}, wanted 'chosen' and 'rejected' once each in pair {key[1]!r}")
        pair[label] = (index, record.get("response", ""))
    pairs: dict[int, list[tuple[int, int]]] = {}
    for (prompt, number), pair in found.items():
        if len(pair) < 2:
            raise ValueError(f"pair {number!r} of prompt {prompt} has no {(set(LABELS) - set(pair)).pop()} response, found only {next(iter(pair))}")
        (chosen, text), (rejected, other) = pair["chosen"], pair["rejected"]
        if text and text == other:
            raise ValueError(f"responses {chosen}, chosen, and {rejected}, rejected, to prompt {prompt} are the same text: there is nothing to prefer")
        pairs.setdefault(prompt, []).append((chosen, rejected))
    return pairs


def _pairs_by_reward(members: Tensor, rewards: Tensor) -> list[tuple[int, int, int]]:
    first, second = torch.combinations(members).T if len(members) > 1 else members.new_empty(2, 0)
    first, second = first[:, None], second[:, None]
    order = (rewards[first[:, 0]] - rewards[second[:, 0]]).sign()
    chosen, rejected = torch.where(order > 0, first, second), torch.where(order > 0, second, first)
    heads = torch.arange(rewards.shape[1]).expand_as(order)
    return [tuple(row) for row in torch.stack([chosen, rejected, heads], dim=2)[order != 0].tolist()]
