"""Fine-tuning as a reference: pairs, DPO, RLOO and GRPO on a tiny model, which is left as it was."""

import copy
import importlib
import random
import string
import sys
import warnings

import numpy
import pytest
import torch
from controlled import hooks_on, llama, unchanged, value_function
from test_controller_models import PROMPT, logits_of
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import recontrol as rc
from recontrol.data.prompts import Preference
from recontrol.methods import fine_tuning
from recontrol.methods.adapters import RECORD_NAME, FineTuningRun, adapter
from recontrol.methods.fine_tuning import STATE_NAME, make_preference_pairs, train_dpo, train_rl

pytestmark = pytest.mark.usefixtures("one_thread")

PAD, EOS = 0, 1


def letters_tokenizer():
    """One token a letter: with a small vocabulary a small model has something to learn in a few steps."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *string.ascii_lowercase, " "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


TOKENIZER = letters_tokenizer()
PAIRS = [Preference("i saw this", " movie and it was good", " film"), Preference("the plot", " was a delight", " was so bad that i left<eos>")] * 4
PROMPTS = ["i saw this", "the plot of", "a film about a", "well"]
DPO = {"rank": 4, "learning_rate": 1e-2, "batch_size": 4, "gradient_checkpointing": False, "progress": False}
RL = {"rank": 4, "learning_rate": 1e-2, "batch_size": 16, "max_new_tokens": 6, "gradient_checkpointing": False, "progress": False}


def tiny(**changes):
    return llama(**{"vocab_size": len(TOKENIZER), "eos_token_id": EOS, "pad_token_id": PAD, "initializer_range": 0.2, **changes})


def vowels(prompts, responses):
    return [float(sum(response.count(vowel) for vowel in "aeiou")) for response in responses]


def log_probability(model, prompt, response):
    ids = TOKENIZER(prompt + response, return_tensors="pt").input_ids
    start = len(TOKENIZER(prompt).input_ids)
    with torch.no_grad():
        log_probabilities = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
    return log_probabilities.gather(1, ids[0, start:, None]).sum().item()


def state_of(model):
    """All that training might leave behind on a model."""
    weights = {name: (parameter.detach().clone(), parameter.requires_grad, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    modules = [(name, type(module), module.training, sorted(vars(module))) for name, module in model.named_modules()]
    return weights, modules, model.config.to_dict(), model.generation_config.to_dict(), hooks_on(model)


def assert_same(found, wanted):
    assert found[1:] == wanted[1:]
    assert found[0].keys() == wanted[0].keys()
    for name, (weight, wants_gradient, place) in wanted[0].items():
        assert torch.equal(found[0][name][0], weight) and found[0][name][1:] == (wants_gradient, place), name


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def dpo(model, tmp_path_factory):
    """A finished run, three epochs of two steps."""
    return train_dpo(model, TOKENIZER, PAIRS, tmp_path_factory.mktemp("dpo") / "adapter", epochs=3, **DPO)


def test_the_best_response_is_preferred_to_the_worst(model):
    found = make_preference_pairs(model, TOKENIZER, PROMPTS, vowels, samples=5, max_new_tokens=6, batch_size=3, temperature=1.0, progress=False)
    again = make_preference_pairs(model, TOKENIZER, PROMPTS, vowels, samples=5, max_new_tokens=6, batch_size=3, temperature=1.0, progress=False)
    assert found == again and [pair.prompt for pair in found.pairs] == PROMPTS and found.left_out == {"equal": 0, "empty": 0}
    for pair, margin in zip(found.pairs, found.margins, strict=True):
        chosen, rejected = vowels([pair.prompt] * 2, [text.removesuffix("<eos>") for text in pair[1:]])
        assert chosen - rejected == margin > 0
    fewer = make_preference_pairs(model, TOKENIZER, PROMPTS, vowels, max_new_tokens=6, batch_size=3, progress=False)
    assert sum(fewer.margins) / len(fewer.margins) < sum(found.margins) / len(found.margins)


def test_an_ending_that_the_model_wrote_is_part_of_the_pair(model):
    """One that was cut has none."""
    found = make_preference_pairs(model, TOKENIZER, PROMPTS, vowels, samples=16, max_new_tokens=20, progress=False, suppress_tokens=[PAD])
    texts = [text for pair in found.pairs for text in pair[1:]]
    lengths = {text: len(TOKENIZER(text).input_ids) for text in texts}
    ended = [text for text in texts if text.endswith("<eos>")]
    assert ended and len(ended) < len(texts)
    assert all(lengths[text] <= 20 and (text in ended or lengths[text] == 20) for text in texts)


def test_prompts_whose_responses_score_equally_have_no_pair(model, caplog):
    def only_the_first(prompts, responses):
        return [score if prompt == PROMPTS[0] else 1.0 for prompt, score in zip(prompts, vowels(prompts, responses), strict=True)]

    with caplog.at_level("INFO"):
        found = make_preference_pairs(model, TOKENIZER, PROMPTS, only_the_first, samples=4, max_new_tokens=6, progress=False)
    assert [pair.prompt for pair in found.pairs] == PROMPTS[:1] and found.left_out == {"equal": 3, "empty": 0}
    assert "left out 3 of 4 prompts" in caplog.text
    with pytest.raises(ValueError, match="of 4 prompts, 4 have equal rewards"):
        make_preference_pairs(model, TOKENIZER, PROMPTS, lambda prompts, responses: [1.0] * len(prompts), max_new_tokens=4, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "samples must be at least 2, found 1"),
        ({"do_sample": False}, "greedy decoding would write the same response 2 times"),
        ({"num_return_sequences": 3}, "leave num_return_sequences at 1"),
        ({"reward": lambda prompts, responses: [[1.0, 2.0]] * len(prompts)}, "needs one score a response, found 2"),
        ({"prompts": []}, "no prompts"),
    ],
)
def test_what_makes_no_pairs_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        make_preference_pairs(model, TOKENIZER, **{"prompts": PROMPTS, "reward": vowels, "max_new_tokens": 4, "progress": False, **options})


def test_pairs_are_not_those_of_a_model_under_control(model):
    with rc.Controller(value_function(model.config.hidden_size), 1.0, 2).attach(model):
        for call in (lambda: make_preference_pairs(model, TOKENIZER, PROMPTS, vowels), lambda: train_dpo(model, TOKENIZER, PAIRS, "unused")):
            with pytest.raises(ValueError, match="must be the uncontrolled one, found a controller"):
                call()


def test_dpo_prefers_the_chosen_response_of_each_pair(model, dpo):
    before = {text: log_probability(model, pair.prompt, text) for pair in PAIRS for text in pair[1:]}
    with adapter(model, dpo.path):
        gains = [[log_probability(model, pair.prompt, text) - before[text] for text in pair[1:]] for pair in PAIRS]
    assert all(chosen > rejected + 0.5 for chosen, rejected in gains)
    margins = [step["rewards/margins"] for step in dpo.history]
    assert len(margins) == 6 and margins[0] == 0 and margins[-1] > margins[1] > 0
    assert {text: log_probability(model, pair.prompt, text) for pair in PAIRS for text in pair[1:]} == before


def test_a_run_says_what_it_cost(dpo):
    layers = 7 * tiny().config.num_hidden_layers
    assert dpo.trainable_parameters % DPO["rank"] == 0 and dpo.trainable_parameters > layers * DPO["rank"]
    assert dpo.seconds > 0 and dpo.peak_bytes >= 0
    assert FineTuningRun.read(dpo.path) == dpo
    assert dpo.settings["algorithm"] == "dpo" and dpo.settings["num_pairs"] == 8


@pytest.mark.parametrize(
    "state", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["no_grad", "inference_mode", "autocast"]
)
def test_training_does_not_depend_on_what_the_caller_has_set(model, dpo, tmp_path, state):
    with state():
        again = train_dpo(model, TOKENIZER, PAIRS, tmp_path / "adapter", epochs=3, **DPO)
    for entry, wanted in zip(again.history, dpo.history, strict=True):
        assert {name: number for name, number in entry.items() if name != "cost"} == {name: number for name, number in wanted.items() if name != "cost"}


def test_training_leaves_the_model_the_tokenizer_and_the_generators(tmp_path, capsys):
    model, tokenizer = tiny().train(), copy.deepcopy(TOKENIZER)
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(model.config.hidden_size)
    before, settings = state_of(model), repr(tokenizer)
    draws = []
    for call in (
        lambda: None,
        lambda: train_dpo(model, tokenizer, PAIRS, tmp_path / "dpo", max_steps=1, **{**DPO, "gradient_checkpointing": True}),
        lambda: train_rl(model, tokenizer, PROMPTS, vowels, tmp_path / "rl", stop_strings=["zebra"], **{**RL, "gradient_checkpointing": True}),
    ):
        random.seed(7), numpy.random.seed(7), torch.manual_seed(7)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            call()
        draws.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
        assert_same(state_of(model), before)
        assert repr(tokenizer) == settings and torch.equal(model.model.norm.weight.grad, torch.ones(model.config.hidden_size))
    assert draws[1:] == draws[:1] * 2
    printed = capsys.readouterr()
    assert printed.out == "" and "%|" not in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpo", "rl"]


def test_a_response_that_was_cut_is_not_taught_to_end_there(model, tmp_path):
    """What is trained on is the response as it stands, and with `add_eos` an end behind each."""
    pair = Preference("i saw this", " movie", " film<eos>")
    wanted = {False: [log_probability(model, pair.prompt, text) for text in pair[1:]]}
    wanted[True] = [log_probability(model, pair.prompt, " movie<eos>"), wanted[False][1]]
    for add_eos, values in wanted.items():
        run = train_dpo(model, TOKENIZER, [pair] * 4, tmp_path / str(add_eos), max_steps=1, add_eos=add_eos, **DPO)
        assert [run.history[0][f"logps/{name}"] for name in ("chosen", "rejected")] == pytest.approx(values, rel=1e-5)
    assert wanted[True][0] < wanted[False][0]


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_the_reward_goes_up(model, tmp_path, algorithm):
    run = train_rl(model, TOKENIZER, PROMPTS, vowels, tmp_path / "adapter", algorithm=algorithm, epochs=10, beta=0.0, **RL)
    rewards = [step["reward"] for step in run.history]
    assert len(rewards) == 10 and sum(rewards[-3:]) > 1.2 * sum(rewards[:3])
    assert run.settings["algorithm"] == algorithm


def test_the_reward_sees_what_stands_before_a_stop_string(model, tmp_path):
    seen = []

    def reward(prompts, responses):
        seen.extend(responses)
        return vowels(prompts, responses)

    train_rl(model, TOKENIZER, PROMPTS, reward, tmp_path / "free", **{**RL, "learning_rate": 0.0})
    free = list(seen)
    seen.clear()
    train_rl(model, TOKENIZER, PROMPTS, reward, tmp_path / "stopped", stop_strings=["e"], **{**RL, "learning_rate": 0.0})
    # The same draws up to there: what was cut is the beginning of what was written.
    assert any("e" in response for response in free)
    assert seen == [response.split("e")[0] for response in free]


@pytest.mark.parametrize("kind", ["dpo", "rl"])
def test_a_run_that_was_stopped_goes_on(model, tmp_path, kind, monkeypatch):
    def train(out, **changes):
        if kind == "dpo":
            return train_dpo(model, TOKENIZER, PAIRS, out, epochs=3, save_steps=2, **{**DPO, **changes})
        return train_rl(model, TOKENIZER, PROMPTS, vowels, out, epochs=6, save_steps=2, **{**RL, **changes})

    whole = train(tmp_path / "whole")

    class Stopping(fine_tuning._Cost):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fine_tuning, "_Cost", Stopping)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken")
    left = tmp_path / "broken.training"
    assert not (tmp_path / "broken").exists() and (left / "checkpoint-4" / STATE_NAME).is_file()
    # As if it had been killed while it wrote the next one.
    (left / "checkpoint-6").mkdir()
    with pytest.raises(ValueError, match="another learning_rate: found"):
        train(tmp_path / "broken", learning_rate=7.0)
    resumed = train(tmp_path / "broken")
    assert not left.exists() and resumed.history == whole.history
    files = [(run.path / "adapter_model.safetensors").read_bytes() for run in (whole, resumed)]
    assert files[0] == files[1]
    written = (tmp_path / "broken" / RECORD_NAME).stat().st_mtime_ns
    assert train(tmp_path / "broken") == resumed and (tmp_path / "broken" / RECORD_NAME).stat().st_mtime_ns == written


def test_an_adapter_is_on_inside_the_block_alone(model, dpo):
    before = state_of(model)
    with unchanged(model):
        plain = logits_of(model, input_ids=PROMPT)
        with adapter(model, dpo.path):
            changed = logits_of(model, input_ids=PROMPT)
            with pytest.raises(ValueError, match=r"must have no adapter, found one on model\.layers\.0"), adapter(model, dpo.path):
                pass
            with pytest.raises(ValueError, match="must have no adapter"):
                train_dpo(model, TOKENIZER, PAIRS, "unused", **DPO)
            assert torch.equal(logits_of(model, input_ids=PROMPT), changed) and not torch.equal(changed, plain)
        assert_same(state_of(model), before)
        with pytest.raises(KeyboardInterrupt), adapter(model, dpo.path):
            raise KeyboardInterrupt
        assert_same(state_of(model), before)
        with adapter(model, dpo.path):
            assert torch.equal(logits_of(model, input_ids=PROMPT), changed)


def test_an_adapter_is_what_peft_makes_of_it(model, dpo):
    """Also through the model's own `generate`, and under control."""
    import peft

    other = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(dpo.path)).eval()
    generate = {"max_new_tokens": 6, "do_sample": False}
    wanted = other.generate(input_ids=PROMPT, **generate)
    draws = torch.get_rng_state()
    with adapter(model, dpo.path):
        assert torch.equal(draws, torch.get_rng_state())
        assert torch.equal(model.generate(input_ids=PROMPT, **generate), wanted)
        uncontrolled = logits_of(model, input_ids=PROMPT)
        with rc.Controller(value_function(model.config.hidden_size), 5.0, 9).attach(model):
            assert not torch.equal(logits_of(model, input_ids=PROMPT), uncontrolled)
    assert not torch.equal(model.generate(input_ids=PROMPT, **generate), wanted)


def test_an_adapter_of_another_model_is_refused_and_leaves_no_trace(model, dpo, tmp_path):
    other = tiny(seed=3)
    with pytest.raises(ValueError, match="was trained on another model: the weights differ"), adapter(other, dpo.path):
        pass
    with pytest.raises(FileNotFoundError, match="holds no adapter"), adapter(model, tmp_path):
        pass
    narrow = tiny(hidden_size=16, head_dim=8)
    before = state_of(narrow)
    copied = tmp_path / "bare"
    copied.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (copied / name).write_bytes((dpo.path / name).read_bytes())
    with pytest.raises(RuntimeError, match="size mismatch"), adapter(narrow, copied):
        pass
    assert_same(state_of(narrow), before)


@pytest.mark.parametrize("package", ["trl", "peft"])
def test_the_extra_is_named_where_it_is_missing(model, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"needs the package {package} .*pip install .recontrol\[fine-tuning\]"
    for call in (
        lambda: train_dpo(model, TOKENIZER, PAIRS, tmp_path / "unused"),
        lambda: train_rl(model, TOKENIZER, PROMPTS, vowels, tmp_path / "unused"),
    ):
        with pytest.raises(ImportError, match=message):
            call()
    importlib.import_module("recontrol.methods.fine_tuning")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": []}, "there are no pairs"),
        ({"pairs": [*PAIRS, Preference("a", "b", "b")]}, "1 pairs have equal responses, so that there is nothing to prefer: 8"),
        ({"max_length": 9}, "4 pairs have prompts that leave no room for a response in 9 tokens: 0, 2"),
        ({"micro_batch_size": 3}, "micro_batch_size must divide batch_size=4, found 3"),
    ],
)
def test_what_dpo_cannot_use_is_refused(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_dpo(model, TOKENIZER, **{"pairs": PAIRS, "out": tmp_path / "adapter", **DPO, **changes})
    assert list(tmp_path.iterdir()) == []


def test_what_is_set_here_is_no_option_of_the_trainer(model, tmp_path):
    with pytest.raises(TypeError, match="multiple values for keyword argument 'num_train_epochs'"):
        train_dpo(model, TOKENIZER, PAIRS, tmp_path / "adapter", num_train_epochs=2, **DPO)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "ppo"}, "algorithm must be one of rloo, grpo, found 'ppo'"),
        ({"samples": 3}, "samples must be at least 2 and divide batch_size=16, found 3"),
        ({"prompts": PROMPTS[:2]}, "a step of 16 responses, 4 to each prompt, needs 4 prompts, found 2 in 1 epochs"),
        ({"stop_strings": [""]}, "stop_strings must be texts"),
        ({"max_new_tokens": 10_000}, "leave no room for 10000 new tokens"),
    ],
)
def test_what_online_training_cannot_use_is_refused(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_rl(model, TOKENIZER, **{"prompts": PROMPTS, "reward": vowels, "out": tmp_path / "adapter", **RL, **changes})
    assert list(tmp_path.iterdir()) == []


def test_what_else_is_in_the_way_is_refused(model, dpo, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than an adapter"):
        train_dpo(model, TOKENIZER, PAIRS, tmp_path / "taken", **DPO)
    with pytest.raises(ValueError, match="is of a run with another num_train_epochs: found 3, wanted 5"):
        train_dpo(model, TOKENIZER, PAIRS, dpo.path, epochs=5, **DPO)
    with pytest.raises(ValueError, match="is of a run on another model"):
        train_dpo(tiny(seed=5), TOKENIZER, PAIRS, dpo.path, epochs=3, **DPO)
    with pytest.raises(ValueError, match="the reward returned NaN"):
        train_rl(model, TOKENIZER, PROMPTS, lambda prompts, responses: [float("nan")] * len(prompts), tmp_path / "nan", **RL)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="runs in one process, found 2"):
        train_dpo(model, TOKENIZER, PAIRS, tmp_path / "new", **DPO)
