import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_checkpoint import count_updates, interrupt
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recontrol.data.collect import collect
from recontrol.data.online import OnlineRollouts
from recontrol.training.train import train, train_online
from recontrol.value import ValueFunction

EXAMPLE = Path(__file__).parent.parent / "examples" / "movie_reviews"
PROMPTS = ["a film", "a very long story about the film that we saw", "it was", "the actors are good", "one", "I saw"]
SAMPLING = {"max_new_tokens": 5, "batch_size": 2, "num_samples": 3, "do_sample": True}
TRAINING = {"hidden_dims": (16,), "td_lambda": 0.95, "learning_rate": 1e-2, "epochs": 3, "kernel": "torch", "progress": False}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE / "lm")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 8192, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).eval()


def prompt_lengths(prompts, responses):
    """A reward that the first state already tells."""
    return [float(len(prompt)) for prompt in prompts]


# A function that scores alike, whatever else it does, says so.
prompt_lengths.identity = "lengths"


@pytest.fixture
def online(model, tokenizer):
    return OnlineRollouts(model, tokenizer, PROMPTS, prompt_lengths, **SAMPLING)


def weights_of(value):
    return torch.cat([parameter.detach().flatten() for parameter in value.parameters()])


def test_it_learns_while_it_samples_and_keeps_no_shard(model, tokenizer, tmp_path):
    sampling = {**SAMPLING, "max_new_tokens": 1}
    validation = collect(model, tokenizer, PROMPTS, prompt_lengths, tmp_path / "v", progress=False, seed=100, **sampling)
    online = OnlineRollouts(model, tokenizer, PROMPTS, prompt_lengths, **sampling)
    value, history = train(online, validation=validation, out=tmp_path / "out", **{**TRAINING, "learning_rate": 0.05, "epochs": 15})
    errors = [entry["validation_mc_error"] for entry in history]
    # Rewards of the prompts' lengths, whose variance is the error of a V that has learned nothing.
    assert min(errors) < 0.5 * float(validation.rewards.var(correction=0))
    assert min(errors) == value.provenance["best_epoch"]["validation_mc_error"]
    assert value.provenance["reward"] == "prompt_lengths" and value.provenance["base_model"]["hidden_size"] == 16
    assert not list((tmp_path / "out").rglob("shard-*"))
    assert torch.equal(weights_of(ValueFunction.from_pretrained(tmp_path / "out")), weights_of(value))


def test_a_run_that_is_interrupted_goes_on_bit_for_bit(model, tokenizer, online, tmp_path):
    whole, history = train(online, out=tmp_path / "whole", **TRAINING)
    calls = []

    def interrupted(prompts, responses):
        calls.append(len(prompts))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return prompt_lengths(prompts, responses)

    interrupted.__qualname__, interrupted.identity = "prompt_lengths", "lengths"
    with pytest.raises(KeyboardInterrupt):
        train(OnlineRollouts(model, tokenizer, PROMPTS, interrupted, **SAMPLING), out=tmp_path / "r", **TRAINING)
    value, again = train(online, out=tmp_path / "r", **TRAINING)
    assert again == history and torch.equal(weights_of(value), weights_of(whole))
    # A finished run is opened without work.
    assert train(online, out=tmp_path / "r", **TRAINING)[1] == history
    with pytest.raises(ValueError, match="another learning_rate"):
        train(online, out=tmp_path / "r", **{**TRAINING, "learning_rate": 1e-3})


def as_before(settings):
    """The settings of an online run as the release before wrote them."""
    kept = ("online", "validation", "hidden_dims", "seed", "objective", "td_lambda", "patience")
    optimiser = ("learning_rate", "weight_decay", "warmup_steps", "schedule", "max_gradient_norm", "ema_decay")
    return {**{name: settings[name] for name in (*kept, *optimiser)}, "passes": settings["epochs"]}


def test_a_run_of_the_release_before_goes_on(model, tokenizer, online, tmp_path, monkeypatch):
    whole, history = train(online, out=tmp_path / "whole", **TRAINING)
    with monkeypatch.context() as patch:
        count_updates(patch, 4, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(online, out=tmp_path / "r", **TRAINING)
    content = json.loads((tmp_path / "r" / "history.json").read_text())
    (tmp_path / "r" / "history.json").write_text(json.dumps({**content, "settings": as_before(content["settings"])}))
    path = tmp_path / "r" / "checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {**metadata, "settings": json.dumps(as_before(json.loads(metadata["settings"])))})
    with pytest.raises(ValueError, match="another epochs: found 3, wanted 2"):
        train(online, out=tmp_path / "r", **{**TRAINING, "epochs": 2})
    done = count_updates(monkeypatch)
    value, again = train(online, out=tmp_path / "r", **TRAINING)
    assert len(done) == 3 * len(online) - 4 and again == history and torch.equal(weights_of(value), weights_of(whole))


def test_every_pass_samples_anew(model, tokenizer):
    seen = []

    def remembering(prompts, responses):
        seen.append(list(responses))
        return prompt_lengths(prompts, responses)

    train(OnlineRollouts(model, tokenizer, PROMPTS[:2], remembering, **SAMPLING), **TRAINING)
    # One batch a pass; the first is sampled once more for the unit of the reward.
    assert len(seen) == 4 and seen[0] == seen[1] and seen[1] != seen[2] != seen[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "preference", "td_lambda": 0.0}, "needs pairs"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, found 0"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"batch_size": 2}, "a mini-batch is a batch of OnlineRollouts, whose batch_size"),
        ({"td_lambda": 2.0}, "td_lambda must be between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(online, change, message):
    with pytest.raises(ValueError, match=message):
        train(online, **{**TRAINING, **change})


def test_validation_of_another_model_or_reward_is_refused(model, tokenizer, online, tmp_path):
    def other_reward(prompts, responses):
        return [0.0] * len(prompts)

    rollouts = collect(model, tokenizer, PROMPTS, other_reward, tmp_path / "a", progress=False, **SAMPLING)
    with pytest.raises(ValueError, match=r"another reward than what is trained on: found '.*other_reward', wanted 'prompt_lengths'"):
        train(online, validation=rollouts, **TRAINING)
    torch.manual_seed(1)
    other = LlamaForCausalLM(model.config).eval()
    rollouts = collect(other, tokenizer, PROMPTS, prompt_lengths, tmp_path / "b", progress=False, **SAMPLING)
    with pytest.raises(ValueError, match="holds rollouts of another model"):
        train(online, validation=rollouts, **TRAINING)


def test_the_old_name_warns_and_gives_the_same(online):
    options = {name: setting for name, setting in TRAINING.items() if name not in ("hidden_dims", "epochs", "kernel")}
    with pytest.warns(DeprecationWarning, match=r"train_online\(online, passes=n\) is now train\(online, epochs=n\)"):
        value, history = train_online(online, (16,), 0, passes=3, **options)
    wanted, wanted_history = train(online, **TRAINING)
    assert torch.equal(weights_of(value), weights_of(wanted)) and history == wanted_history


def test_validation_is_for_rollouts_that_are_sampled(model, tokenizer, tmp_path):
    stored = collect(model, tokenizer, PROMPTS, prompt_lengths, tmp_path / "r", progress=False, **SAMPLING)
    with pytest.raises(ValueError, match="validation is for OnlineRollouts"):
        train(stored, validation=stored, **TRAINING)


def test_rewards_may_stay_in_standard_deviations(online):
    value, _ = train(online, normalise_rewards=True, **TRAINING)
    plain, _ = train(online, **TRAINING)
    hidden = torch.randn(5, 16)
    # One product and one sum in another order.
    torch.testing.assert_close(value.to_reward(value(hidden)), plain(hidden), rtol=1e-5, atol=1e-5)
