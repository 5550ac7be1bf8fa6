"""The optimiser's settings: what each of them does, and that a run with all of them goes on after a break as if there had been none."""

import math

import pytest
import torch
from test_checkpoint import count_updates, interrupt, made
from test_train import same

from recontrol.training.config import TrainConfig
from recontrol.training.distributed import Processes
from recontrol.training.fused import low_precision_values
from recontrol.training.loop import Learner, rate
from recontrol.training.train import train
from recontrol.value import ValueFunction

SETTINGS = {"hidden_dims": (16,), "learning_rate": 1e-2, "epochs": 3, "batch_size": 6, "progress": False, "device": "cpu"}
EVERYTHING = {"weight_decay": 0.1, "warmup_steps": 4, "schedule": "cosine", "max_gradient_norm": 0.2, "ema_decay": 0.8, "compute_dtype": torch.bfloat16}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    return made(tmp_path_factory.mktemp("data") / "r")


@pytest.fixture(scope="module")
def plain(rollouts):
    return train(rollouts, **SETTINGS)[0]


def test_the_learning_rate_rises_and_falls_as_said():
    cosine = TrainConfig(learning_rate=2.0, warmup_steps=4, schedule="cosine")
    assert [rate(cosine, step, 24) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert [rate(cosine, step, 24) for step in (4, 9, 14, 24)] == pytest.approx([2, 1 + math.sqrt(0.5), 1, 0])
    constant = TrainConfig(learning_rate=2.0, warmup_steps=2)
    assert [rate(constant, step, 24) for step in (0, 1, 2, 23)] == [1.0, 2.0, 2.0, 2.0]
    # More of warm-up than there is to train, and a single step.
    assert rate(TrainConfig(learning_rate=2.0, warmup_steps=10, schedule="cosine"), 3, 4) == 0.8
    assert rate(TrainConfig(learning_rate=2.0, schedule="cosine"), 0, 1) == 2.0


def test_a_run_takes_its_steps_with_those_learning_rates(rollouts, monkeypatch):
    rates = []
    update = Learner.update

    def recording(self, objective, batch, learning_rate):
        result = update(self, objective, batch, learning_rate)
        rates.append(self.optimizer.param_groups[0]["lr"])
        return result

    monkeypatch.setattr(Learner, "update", recording)
    train(rollouts, warmup_steps=3, schedule="cosine", **SETTINGS)
    # 36 responses to train on, hence 6 mini-batches in each of 3 epochs.
    config = TrainConfig(learning_rate=1e-2, warmup_steps=3, schedule="cosine")
    assert rates == [rate(config, step, 18) for step in range(18)]


@pytest.mark.parametrize("option", EVERYTHING)
def test_each_setting_changes_the_result_and_is_recorded(rollouts, plain, option):
    value, history = train(rollouts, **{option: EVERYTHING[option]}, **SETTINGS)
    assert not same(value, plain) and all(math.isfinite(entry["validation_mc_error"]) for entry in history)
    wanted = "bfloat16" if option == "compute_dtype" else EVERYTHING[option]
    assert value.provenance["training"][option] == wanted and value.dtype == torch.float32
    assert plain.provenance["training"][option] == (None if option in ("max_gradient_norm", "ema_decay", "compute_dtype") else getattr(TrainConfig(), option))


def one_step(gradient, **settings):
    value = ValueFunction(2, (), 1)
    with torch.no_grad():
        value.layers[0].weight.copy_(torch.tensor([[1.0, -2.0]]))

    class Task:
        def backward(self, values_of, batch):
            value.layers[0].weight.grad = torch.tensor([gradient])
            value.layers[0].bias.grad = torch.zeros(1)
            return 3.0, 2

    learner = Learner(value, TrainConfig(learning_rate=0.1, **settings), value, Processes())
    assert learner.update(Task(), torch.arange(2), 0.1) == (3.0, 2)
    return learner


def test_weights_decay_apart_from_the_gradient():
    """AdamW: w <- (1 - lr decay) w, then the step of Adam, whose size is lr."""
    weight = one_step([4.0, 0.0], weight_decay=0.5).value.layers[0].weight
    torch.testing.assert_close(weight, torch.tensor([[0.95 - 0.1, -2 * 0.95]]))


def test_long_gradients_are_cut_and_short_ones_are_not():
    for gradient, norm in (([3.0, 4.0], 0.5), ([0.03, 0.04], 0.05)):
        learner = one_step(gradient, max_gradient_norm=0.5)
        # Adam's first moment after a step is a tenth of the gradient.
        moment = learner.optimizer.state_dict()["state"][0]["exp_avg"]
        assert float(10 * moment.norm()) == pytest.approx(norm, rel=1e-4)


def test_the_average_starts_at_the_first_step_and_follows():
    learner = one_step([1.0, 1.0], ema_decay=0.75)
    first = learner.value.layers[0].weight.detach().clone()
    assert torch.equal(learner.judged.layers[0].weight, first)
    with torch.no_grad():
        learner.value.layers[0].weight.add_(1)
    learner.average.update_parameters(learner.value)
    torch.testing.assert_close(learner.judged.layers[0].weight, first + 0.25)


def test_products_of_few_bits_leave_weights_and_gradients_whole():
    value, hidden = ValueFunction(64, (48, 32), 2), torch.randn(200, 64)
    found, wanted = low_precision_values(value, hidden, torch.bfloat16), value(hidden)
    gradients = torch.autograd.grad(found.sum(), list(value.parameters()))
    # bfloat16 rounds to 2^-9 of a number, in the states, two weights and two layers of activations.
    assert found.dtype == torch.float32 and 0 < float((found - wanted).detach().norm() / wanted.detach().norm()) < 5 * 2**-9
    for gradient, exact in zip(gradients, torch.autograd.grad(wanted.sum(), list(value.parameters())), strict=True):
        # And it switches units whose activation is nearly 0, about 2^-9 of them, whose part of the norm is the root of that.
        assert gradient.dtype == torch.float32 and float((gradient - exact).norm() / exact.norm()) < 2 * 2**-4.5


@pytest.mark.parametrize("objective", ["td", "preference"])
def test_a_run_with_all_of_them_goes_on_to_the_bit(rollouts, tmp_path, monkeypatch, objective):
    settings = {**SETTINGS, **EVERYTHING, "objective": objective, "batch_size": 3 if objective == "preference" else 6}
    value, history = train(rollouts, out=tmp_path / "whole", **settings)
    batches = 6 if objective == "td" else 3
    for _ in range(2):
        with monkeypatch.context() as patch:
            count_updates(patch, batches - 1, interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(rollouts, out=tmp_path / "broken", **settings)
    with monkeypatch.context() as patch:
        done = count_updates(patch)
        again, history_again = train(rollouts, out=tmp_path / "broken", **settings)
    assert len(done) == 3 * batches - 2 * (batches - 1)
    assert same(again, value) and history_again == history
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "broken" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"weight_decay": number}, "weight_decay must be finite and at least 0") for number in (-0.1, math.nan, math.inf)),
        *(({"warmup_steps": number}, f"warmup_steps must be an integer of at least 0 and below .*, found {number}") for number in (-1, 1.5)),
        ({"schedule": "linear"}, "unknown schedule 'linear'; choose one of 'constant', 'cosine'"),
        *(({"max_gradient_norm": number}, "max_gradient_norm must be finite and above 0, or None") for number in (0.0, math.nan)),
        *(({"ema_decay": number}, "ema_decay must be between 0 and 1, or None") for number in (0.0, 1.0, math.nan)),
        ({"compute_dtype": torch.float16}, "compute_dtype must be bfloat16, or None for that of the weights, found 'float16'"),
        ({"compute_dtype": torch.bfloat16, "kernel": "triton"}, "compute_dtype is for kernel 'torch', found it with 'triton'"),
    ],
)
def test_settings_that_cannot_be_are_refused(rollouts, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(rollouts, out=tmp_path / "v", **SETTINGS, **options)
    assert not (tmp_path / "v").exists()
