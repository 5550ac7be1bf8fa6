"""`Control`: what it accepts is what `Controller` accepts."""

import dataclasses

import numpy as np
import pytest
import torch

import recontrol as rc
from recontrol.generation.requests import listed_controls, token_ids

VALUE = rc.ValueFunction(4, (8,))
HEADS = rc.ValueFunction(4, (8,), 2)
KINDS = [rc.Control, rc.Controller]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_numbers_come_out(kind):
    control = kind(HEADS, np.float32(0.25), np.int64(3), radius=torch.tensor(2.0).item(), target=1, head_weights=torch.tensor([1, 2]))
    found = (control.step_size, control.steps, control.radius, control.target, control.head_weights)
    assert found == (0.25, 3, 2.0, 1.0, (1.0, 2.0)) and [type(each) for each in found[:4]] == [float, int, float, float]


def test_by_place_and_by_default():
    assert rc.Control(VALUE, 0.1, 2, 3.0, 4.0) != rc.Control(VALUE, 0.1, 2, 3.0, 4.0)
    control = rc.Control(VALUE)
    assert (control.step_size, control.steps, control.radius, control.target, control.head_weights) == (0.5, 30, None, None, None)
    assert dataclasses.replace(control, steps=2).steps == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        control.steps = 3


REFUSED = {
    "no value function": ({"value": torch.nn.Linear(4, 1)}, TypeError, "value must be a recontrol.ValueFunction, found Linear"),
    "step size": ({"step_size": -0.1}, ValueError, "step_size must be finite and 0 or more, found -0.1"),
    "step size NaN": ({"step_size": float("nan")}, ValueError, "step_size must be finite"),
    "step size text": ({"step_size": "1"}, TypeError, "step_size must be a number, found '1'"),
    "steps": ({"steps": 2.0}, TypeError, "steps must be an integer, found 2.0"),
    "steps below 0": ({"steps": -1}, ValueError, "steps must be 0 or more, found -1"),
    "radius": ({"radius": -1}, ValueError, "radius must be finite and 0 or more, found -1"),
    "target": ({"target": float("inf")}, ValueError, "target must be finite, found inf"),
    "no head weights": ({"value": HEADS}, ValueError, "the value function has 2 heads: give head_weights, 2 numbers"),
    "head weights": ({"value": HEADS, "head_weights": [1]}, ValueError, "head_weights must be 2 numbers, one a head, found 1"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments, error, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(**{"value": VALUE, **arguments})


def test_one_control_stands_for_all_prompts():
    control = rc.Control(VALUE)
    assert listed_controls(control, 2, torch.float32) == [control, control]
    assert listed_controls(None, 2, torch.float32) == [None, None]
    assert listed_controls((None, control), 2, torch.float32) == [None, control]


def test_numbers_of_other_libraries_are_token_ids():
    assert token_ids(None, [np.array([1, 2]), torch.tensor([3]), range(2)]) == [[1, 2], [3], [0, 1]]
