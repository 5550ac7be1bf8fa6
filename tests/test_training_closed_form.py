"""V in closed form, a block of tokens at a time, against autograd; and when it is taken."""

import pytest
import torch
from test_train import SETTINGS, made, same

from recontrol.training import fused
from recontrol.training.fused import chosen_kernel, fused_values
from recontrol.training.objectives.tokens import td_loss
from recontrol.training.train import train
from recontrol.value import ValueFunction

pytestmark = pytest.mark.usefixtures("one_thread")


def closed_form_values(value, hidden):
    return fused_values(value, hidden, "closed-form")


def gradients(values, value, upstream):
    return torch.autograd.grad(values, list(value.parameters()), upstream)


@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 20])
@pytest.mark.parametrize("units", [1, 13])
def test_values_and_gradients_are_those_of_autograd(monkeypatch, poisoned_memory, tokens, units):
    monkeypatch.setattr(fused, "TOKENS_IN_BLOCK", 7)
    value, hidden, upstream = ValueFunction(5, (units,)).double(), torch.randn(tokens, 5, dtype=torch.float64), torch.randn(tokens, 1, dtype=torch.float64)
    with torch.no_grad():
        # A unit that is always off, one that is always on, and one at 0 exactly, which counts as off.
        value.layers[0].bias[0] = -100 if tokens % 2 else 100
        value.layers[0].weight[-1] = 0
        value.layers[0].bias[-1] = 0
    found, wanted = closed_form_values(value, hidden), value(hidden)
    # Sums of some tens of float64 terms in another order.
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found, wanted, **close)
    for gradient, exact in zip(gradients(found, value, upstream), gradients(wanted, value, upstream), strict=True):
        torch.testing.assert_close(gradient, exact, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_of_any_dtype_are_read_as_they_are_stored(monkeypatch, dtype):
    """In float32, with an error against float64 that is no larger than that of autograd."""
    monkeypatch.setattr(fused, "TOKENS_IN_BLOCK", 100)
    value, hidden = ValueFunction(64, (48,)), torch.randn(500, 64).to(dtype)
    lengths, rewards = torch.full((50,), 10), torch.randn(50, 1)
    double = ValueFunction(64, (48,)).double()
    double.load_state_dict(value.state_dict())
    found = {}
    for name, of, values in (("ours", value, closed_form_values(value, hidden)), ("autograd", value, value(hidden)), ("exact", double, double(hidden))):
        assert values.dtype == of.dtype
        found[name] = torch.autograd.grad(td_loss(values, rewards, lengths), list(of.parameters()))
    for ours, autograd, exact in zip(*(found[name] for name in ("ours", "autograd", "exact")), strict=True):
        # Both are sums of 500 products rounded to 6e-8, in different orders: either may come out the better.
        assert float((ours - exact).norm()) <= 3 * float((autograd - exact).norm()) + 1e-7 * float(exact.norm())


def test_states_are_constants_and_nothing_of_a_token_is_kept_but_its_mask():
    value, hidden = ValueFunction(6, (32,)), torch.randn(50, 6, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        values = closed_form_values(value, hidden)
    assert [tensor.dtype for tensor in kept if tensor.shape == (50, 32)] == [torch.bool]
    assert not any(tensor.shape == (50, 32) and tensor.is_floating_point() for tensor in kept)
    values.sum().backward()
    assert hidden.grad is None and value.layers[0].weight.grad is not None


def test_what_is_not_finite_stays_so():
    """Else training that diverges would not be seen."""
    value, hidden = ValueFunction(4, (8,)), torch.zeros(3, 4)
    hidden[1] = float("nan")
    found = closed_form_values(value, hidden)
    assert found[1].isnan() and found[[0, 2]].isfinite().all()


def test_it_is_taken_by_default_where_it_pays_and_can_be(monkeypatch):
    hidden = torch.empty(0, 64)
    assert chosen_kernel("auto", ValueFunction(64, (1024,)), hidden) == "closed-form"
    assert chosen_kernel("auto", ValueFunction(64, (1023,)), hidden) == "torch"
    assert chosen_kernel("auto", ValueFunction(64, (1024,), 2), hidden) == chosen_kernel("auto", ValueFunction(64, (1024, 8)), hidden) == "torch"
    assert chosen_kernel("auto", ValueFunction(64, (1024,)), hidden.to("meta")) == "torch"
    assert chosen_kernel("closed-form", ValueFunction(64, (8,)), hidden) == "closed-form"
    for value, reason in (
        (ValueFunction(64, (8,), 2), "the closed form is for one head, this value function has 2"),
        (ValueFunction(64, (8, 8)), "the closed form is for two linear layers, this value function has 3"),
        (ValueFunction(64, ()), "the closed form is for two linear layers, this value function has 1"),
    ):
        with pytest.raises(RuntimeError, match=f"kernel 'closed-form' cannot run here: {reason}; choose one of 'auto', 'torch'"):
            chosen_kernel("closed-form", value, hidden)


def test_training_with_it_is_training_and_is_recorded(tmp_path, monkeypatch):
    data = made(tmp_path / "r")
    settings = {**SETTINGS, "dtype": torch.float64}
    plain, history = train(data, out=tmp_path / "plain", **settings)
    value, other = train(data, out=tmp_path / "closed", kernel="closed-form", **settings)
    assert (plain.provenance["training"]["kernel"], value.provenance["training"]["kernel"]) == ("torch", "closed-form")
    # Another order of sums in float64, 15 steps of Adam.
    for parameter, wanted in zip(value.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=1e-7, atol=1e-9)
    assert [entry["validation_mc_error"] for entry in other] == pytest.approx([entry["validation_mc_error"] for entry in history], rel=1e-7)
    monkeypatch.setattr(fused, "SMALLEST_CLOSED_FORM", 1)
    assert same(train(data, **settings)[0], value)
    with pytest.raises(ValueError, match="of a run with another kernel: found 'torch', wanted 'closed-form'"):
        train(data, out=tmp_path / "plain", **settings)
