"""Value functions that the release before wrote are read, and climbed as it climbed them."""

import json
from pathlib import Path

import pytest
import torch

import recontrol as rc

OLD = Path(__file__).resolve().parent / "old_files"
EXPECTED = json.loads((OLD / "expected.json").read_text())
HIDDEN = torch.linspace(-1, 1, 18).reshape(3, 6)
HEAD_WEIGHTS = {"value-heads": torch.tensor([1.0, 0.5])}
# Six products of at most a dozen terms of size one, each rounded once: the processor decides in which order they are added.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("backend", ["cpu", "torch", "oracle"])
@pytest.mark.parametrize("name", ["value", "value-heads", "value-sum"])
def test_a_value_function_gives_what_it_gave(name, backend):
    value = rc.ValueFunction.from_pretrained(OLD / name)
    edited = rc.ascend(HIDDEN, value, 0.3, 5, head_weights=HEAD_WEIGHTS.get(name), backend=backend)
    torch.testing.assert_close(value(HIDDEN), torch.tensor(EXPECTED[name]["values"]), **TOLERANCE)
    torch.testing.assert_close(edited, torch.tensor(EXPECTED[name]["edited"]), **TOLERANCE)


def test_what_is_beside_the_weights_is_read():
    assert rc.ValueFunction.from_pretrained(OLD / "value").provenance == {"note": "two layers"}
    heads = rc.ValueFunction.from_pretrained(OLD / "value-heads")
    assert (heads.hidden_dims, heads.reward_mean, heads.reward_std) == ((8, 4), (1.0, -1.0), (2.0, 0.5))
    assert [term["weight"] for term in rc.ValueFunction.from_pretrained(OLD / "value-sum").provenance["terms"]] == [0.7, 0.3]


def test_a_file_of_the_released_code_is_the_same_value_function():
    assert torch.equal(rc.ValueFunction.from_released(OLD / "released.pth")(HIDDEN), rc.ValueFunction.from_pretrained(OLD / "value")(HIDDEN))
