"""Many settings decoded together give what each of them gives alone, and each distinct prefix is decoded once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from controlled import Failing, unchanged
from generating import ENDING, NEW, PROMPTS, TOKENIZER, alone, double_llama, generate, value
from test_generate_trace import scaled
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

import recontrol as rc
from recontrol.data.prompts import load_prompts
from recontrol.decoding.generation import generate_batch
from recontrol.tuning import next_token
from recontrol.tuning.gumbel import GumbelNoise, add_gumbel
from recontrol.tuning.next_token import path_of_steps
from recontrol.tuning.sweep import sweep_settings, sweep_steps

EXAMPLE = Path(__file__).parent.parent / "examples" / "movie_reviews"
STEPS = [0, 2, 5, 12]
FEW = PROMPTS[:4]
EQUALLY_LONG = [prompt[:13] for prompt in PROMPTS if len(prompt) >= 13]
TOKENS = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, "vocab_size": 98, "initializer_range": 0.5, "tie_word_embeddings": False}

pytestmark = pytest.mark.usefixtures("one_thread", "quick_collection")


def sweep(model, value, step_size, steps=STEPS, prompts=PROMPTS, **options):
    return sweep_steps(model, TOKENIZER, prompts, value, step_size, steps, **{"max_new_tokens": NEW, "eos_token_id": ENDING, **options})


def ids(responses):
    return [response.token_ids for response in responses]


def build(kind, config, **sizes):
    torch.manual_seed(0)
    return kind(config(**sizes, **TOKENS)).double().eval()


CONTROLS = {
    "two layers": lambda: {"value": value(64), "step_size": 1.5},
    "three layers": lambda: {"value": value(64, 32, seed=2), "step_size": 1.5},
    "radius": lambda: {"value": value(64), "step_size": 1.5, "radius": 3.0},
    "target": lambda: {"value": value(64), "step_size": 0.1, "target": 1.5},
    "weighted sum": lambda: {"value": 0.7 * value(64) + 2 * value(16, seed=4), "step_size": 0.8},
    "heads": lambda: {"value": value(48, heads=2, seed=3), "step_size": 1.0, "head_weights": [1.0, -2.0]},
}


@pytest.mark.parametrize("make", CONTROLS.values(), ids=CONTROLS)
def test_every_setting_gets_the_tokens_that_it_gets_alone(make):
    model, options = double_llama(), make()
    found = sweep(model, prompts=PROMPTS[:5], **options)
    for n in STEPS:
        keywords = {name: given for name, given in options.items() if name not in ("value", "step_size")}
        control = rc.Control(options["value"], options["step_size"], n, **keywords)
        assert ids(found.responses[n]) == [alone(model, prompt, control) for prompt in PROMPTS[:5]]
    # Without both of these the comparison would show nothing.
    assert 0.1 < found.saved < 0.9
    assert ids(found.responses[0]) != ids(found.responses[12])


# With padding, where the attention bears it in float64.
MODELS = {
    "logits scaled after the output embedding": (scaled, FEW),
    "learned positions": (lambda: build(GPT2LMHeadModel, GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=64), FEW),
    "no positions": (lambda: build(BloomForCausalLM, BloomConfig, hidden_size=32, n_layer=2, n_head=4), EQUALLY_LONG),
    "softcapped logits and sliding windows": (
        lambda: build(
            Gemma2ForCausalLM,
            Gemma2Config,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=4,
            final_logit_softcapping=2.0,
        ),
        EQUALLY_LONG,
    ),
}


@pytest.mark.parametrize("make, prompts", MODELS.values(), ids=MODELS)
def test_other_models(make, prompts):
    model, climbed = make(), value(64)
    found = sweep(model, climbed, 2.0, prompts=prompts)
    for n in STEPS:
        # A token that is chosen and happens to be the padding ends nothing here.
        control = rc.Control(climbed, 2.0, n)
        assert ids(found.responses[n]) == [ids(generate(model, [prompt], control, batching="static"))[0] for prompt in prompts]
    assert found.saved > 0 and ids(found.responses[0]) != ids(found.responses[12])


@pytest.mark.parametrize("batch_size", [3, 16])
def test_each_distinct_prefix_is_decoded_once(batch_size):
    found = sweep(double_llama(), value(64), 1.5, batch_size=batch_size)
    prefixes = {
        (prompt, *response.token_ids[:t])
        for responses in found.responses.values()
        for prompt, response in enumerate(responses)
        for t in range(len(response.token_ids))
    }
    assert sum(found.decoded_tokens.values()) == len(prefixes)
    for n, responses in found.responses.items():
        assert found.decoded_tokens[n] + found.shared_tokens[n] == sum(map(len, ids(responses)))
    total = sum(len(response.token_ids) for responses in found.responses.values() for response in responses)
    assert found.saved == pytest.approx(1 - len(prefixes) / total)
    longest = [max(len(responses[prompt].token_ids) for responses in found.responses.values()) for prompt in range(len(PROMPTS))]
    assert found.forward_calls == max(longest) if batch_size == 16 else max(longest) < found.forward_calls < sum(longest)


def test_settings_that_agree_share_everything_and_one_setting_nothing():
    model, climbed = double_llama(), value(64)
    same = sweep_settings(model, TOKENIZER, PROMPTS, climbed, [(0.0, 0), (0.0, 5), (0.5, 0)], max_new_tokens=NEW, eos_token_id=ENDING)
    assert same.saved == pytest.approx(2 / 3) and same.decoded_tokens[0.0, 5] == same.decoded_tokens[0.5, 0] == 0
    assert ids(same.responses[0.5, 0]) == ids(generate(model))
    assert sweep(model, climbed, 1.5, [5]).saved == 0


def test_a_grid_of_step_sizes_is_one_decode_too():
    model, climbed = double_llama(), value(64)
    settings = [(0.5, 6), (1.5, 6), (1.5, 2)]
    found = sweep_settings(model, TOKENIZER, PROMPTS, climbed, settings, max_new_tokens=NEW, eos_token_id=ENDING)
    for step_size, n in settings:
        assert ids(found.responses[step_size, n]) == ids(generate(model, PROMPTS, rc.Control(climbed, step_size, n)))
    assert found.saved > 0 and found.forward_calls == max(len(each) for responses in found.responses.values() for each in ids(responses))


def test_responses_end_at_stop_strings():
    model, climbed = double_llama(), value(64)
    plain = [response.text for n in (2, 6) for response in sweep(model, climbed, 1.5, [2, 6]).responses[n]]
    stop = next(text[3:5] for text in plain if len(text) > 8)
    found = sweep(model, climbed, 1.5, [2, 6], stop_strings=stop)
    for n in (2, 6):
        wanted = generate(model, PROMPTS, rc.Control(climbed, 1.5, n), stop_strings=stop)
        assert [(r.token_ids, r.text, r.finish) for r in found.responses[n]] == [(r.token_ids, r.text, r.finish) for r in wanted]
    assert {"stop", "eos"} <= {response.finish for responses in found.responses.values() for response in responses}


def test_options_of_generate_hold_for_every_setting():
    """Also where they look at the tokens before."""
    model, climbed = double_llama(), value(64)
    found = sweep(model, climbed, 1.5, prompts=FEW, repetition_penalty=3.0)
    for n in STEPS:
        assert ids(found.responses[n]) == [alone(model, prompt, rc.Control(climbed, 1.5, n), repetition_penalty=3.0) for prompt in FEW]
    plain = sweep(model, climbed, 1.5, prompts=FEW)
    assert any(ids(found.responses[n]) != ids(plain.responses[n]) for n in STEPS)


def test_sampled_settings_get_the_same_noise_and_the_samples_that_they_get_alone():
    model, climbed = double_llama(), value(64)
    sampling = {"prompts": FEW, "do_sample": True, "temperature": 0.7, "top_k": 20, "seed": 3}
    found = sweep(model, climbed, 1.5, **sampling)
    for n in STEPS:
        for place, prompt in enumerate(FEW):
            noise = GumbelNoise([place], len(prompt), seed=3)
            processors = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), noise]
            assert found.responses[n][place].token_ids == alone(model, prompt, rc.Control(climbed, 1.5, n), logits_processor=processors)
    assert found.saved > 0.05
    assert ids(found.responses[0]) != ids(sweep(model, climbed, 1.5, [0], prompts=FEW).responses[0])
    assert ids(found.responses[0]) != ids(sweep(model, climbed, 1.5, [0], **{**sampling, "seed": 4}).responses[0])
    assert ids(found.responses[5]) == ids(sweep(model, climbed, 1.5, [5], batch_size=3, **sampling).responses[5])


def test_the_largest_noisy_score_is_a_sample():
    scores = torch.tensor([0.5, -1.0, 2.0, float("-inf"), 0.0])
    draws = 20_000
    noisy = add_gumbel(scores.expand(draws, 5), range(draws), 7, seed=0)
    shares = np.bincount(noisy.argmax(-1), minlength=5) / draws
    wanted = scores.softmax(-1).numpy()
    # Five standard errors.
    assert (np.abs(shares - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / draws)).all() and shares[3] == 0


def test_noise_is_a_function_of_seed_prompt_and_position():
    scores = torch.zeros(3, 9)
    noise = add_gumbel(scores, [4, 5, 4], 1, seed=2)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(add_gumbel(scores[:1], [5], 1, seed=2)[0], noise[1])
    for position, seed in ((0, 2), (1, 3)):
        assert not torch.equal(add_gumbel(scores[:1], [4], position, seed), noise[:1])


def test_traces_are_those_of_generate():
    model, climbed = double_llama(), value(64)
    found = sweep(model, climbed, 1.5, trace=True)
    for n in STEPS:
        for response, wanted in zip(found.responses[n], generate(model, PROMPTS, rc.Control(climbed, 1.5, n), trace=True), strict=True):
            assert len(response.trace.divergence) == len(response.token_ids)
            for name, numbers in vars(wanted.trace).items():
                torch.testing.assert_close(getattr(response.trace, name), numbers, rtol=1e-5, atol=1e-5)
    assert sweep(model, climbed, 1.5, [2]).responses[2][0].trace is None


def test_the_movie_review_model_in_float32():
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "lm", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "lm")
    prompts = load_prompts(EXAMPLE / "prompts-validation.jsonl", limit=4)
    torch.manual_seed(1)
    climbed = rc.ValueFunction(256, (128,))
    found = sweep_steps(model, tokenizer, prompts, climbed, 2.0, [10, 20, 50], max_new_tokens=12)
    for n in (10, 20, 50):
        with rc.Controller(climbed, 2.0, n).attach(model):
            wanted = generate_batch(model, tokenizer, prompts, max_new_tokens=12)
        assert found.responses[n] and ids(found.responses[n]) == ids(wanted.responses)
    assert 0 < found.saved < 2 / 3


def test_the_model_is_left_as_it_was():
    model, climbed = double_llama(), value(64)
    with unchanged(model):
        before = torch.random.get_rng_state()
        sweep(model, climbed, 1.5, [2, 6], do_sample=True)
        assert torch.equal(torch.random.get_rng_state(), before)
        # Three calls of the model prove that edits reach the logits, then the decoding begins.
        Failing(model.model.layers[0], RuntimeError("out of memory"), call=6)
        with pytest.raises(RuntimeError, match="out of memory"):
            sweep(model, climbed, 1.5, [2, 6])


def test_what_is_asked_wrongly_is_named_before_anything_is_decoded():
    model, climbed = double_llama(), value(64)
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for wanted, step_size, steps, options in [
        ("found \\[\\]", 1.0, [], {}),
        ("each once, found \\[\\(1.0, 2\\), \\(1.0, 2\\)\\]", 1.0, [2, 2], {}),
        ("step_size must be finite and 0 or more, found -1.0", -1.0, [2], {}),
        ("batch_size must be at least 1, found 0", 1.0, [2], {"batch_size": 0}),
        ("num_return_sequences=2", 1.0, [2], {"num_return_sequences": 2}),
        ("custom_generate", 1.0, [2], {"custom_generate": print}),
        ("leave no room for 64 new tokens", 1.0, [2], {"max_new_tokens": 64}),
        ("there are no prompts", 1.0, [2], {"prompts": []}),
    ]:
        with pytest.raises(ValueError, match=wanted):
            sweep(model, climbed, step_size, steps, **options)
    with pytest.raises(TypeError, match=r"steps must be an integer, found 2\.5"):
        sweep(model, climbed, 1.0, [2.5])
    with rc.Controller(climbed, self_check=False).attach(model), pytest.raises(RuntimeError, match="attached to this LlamaForCausalLM already"):
        sweep(model, climbed, 1.0, [2])
    assert calls == []


def recorded(count=20):
    torch.manual_seed(5)
    return torch.randn(count, 32, dtype=torch.float64)


@pytest.mark.parametrize("make, scale", [(double_llama, 1.0), (scaled, 0.25)], ids=["llama", "logits scaled after the output embedding"])
@pytest.mark.parametrize("options", [{}, {"radius": 1.0}, {"target": 1.5}])
def test_the_path_at_given_states(monkeypatch, make, scale, options):
    monkeypatch.setattr(next_token, "STATES_AT_ONCE", 7)
    model, climbed, states = make(), value(64), recorded()
    climbed.reward_mean, climbed.reward_std = (3.0,), (2.0,)
    points = path_of_steps(model, states, climbed, 0.4, [0, 3, 9], **options)
    assert [(point.step_size, point.steps) for point in points] == [(0.4, 0), (0.4, 3), (0.4, 9)]
    head = model.get_output_embeddings()
    for point in points:
        edited = rc.reference.ascend(states, climbed, 0.4, point.steps, **options)
        with torch.no_grad():
            log_p, log_q = ((scale * head(each)).log_softmax(-1) for each in (edited, states))
            v = climbed(edited).mean()
        wanted = [v, 2 * v + 3, (edited - states).norm(dim=-1).mean(), (log_p.exp() * (log_p - log_q)).sum(-1).mean()]
        torch.testing.assert_close([point.value, point.reward, point.edit_norm, point.kl], [float(each) for each in wanted], rtol=1e-5, atol=1e-6)
    assert points[0].edit_norm == points[0].kl == 0 < points[1].kl < points[2].kl


def test_the_path_of_a_sum_of_heads_and_what_is_asked_wrongly():
    model, climbed, states = double_llama(), value(48, heads=2), recorded()
    with unchanged(model):
        (point,) = path_of_steps(model, states, climbed, 0.4, [5], head_weights=[1.0, -2.0])
        weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
        edited = rc.reference.ascend(states, climbed, 0.4, 5, head_weights=weights)
        assert point.value == pytest.approx(float((climbed(edited).detach() @ weights).mean()))
        with pytest.raises(ValueError, match="the value function has 2 heads"):
            path_of_steps(model, states, climbed, 0.4)
        for given in (states[:0], states[0], states[:, :5], None):
            with pytest.raises(ValueError, match=r"states must be a tensor of shape \(states, 32\)"):
                path_of_steps(model, given, value(64), 0.4)
        with pytest.raises(ValueError, match="no numbers of steps"):
            path_of_steps(model, states, value(64), 0.4, [])
