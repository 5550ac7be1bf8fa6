import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from results import response_nll, result
from transformers import AutoModelForCausalLM, AutoTokenizer

import recontrol.methods.base
from recontrol.ascent.ascend import ascend
from recontrol.data.prompts import load_prompts
from recontrol.decoding.batches import Batch, check_lengths, generate_batch
from recontrol.decoding.controller import Controller
from recontrol.decoding.responses import Response
from recontrol.evaluation.evaluate import evaluate
from recontrol.evaluation.metrics import bootstrap_interval, diversity, similarities
from recontrol.evaluation.results import choose
from recontrol.value import ValueFunction

EXAMPLE = Path(__file__).parent.parent / "examples" / "movie_reviews"
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0}

pytestmark = pytest.mark.usefixtures("one_thread")


def letters(prompts, responses):
    return [float(response.count("e")) for response in responses]


class Encoder:
    def encode(self, texts, **kwargs):
        return [[1 + text.count("a"), 1 + text.count("o")] for text in texts]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EXAMPLE / "lm", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE / "lm")


@pytest.fixture(scope="module")
def prompts():
    texts = load_prompts(EXAMPLE / "prompts-validation.jsonl", limit=5)
    # Of different lengths, so that there is padding.
    return [text if index % 2 else text + " one of the best films of the year" for index, text in enumerate(texts)]


@pytest.fixture(scope="module")
def value():
    torch.manual_seed(0)
    return ValueFunction(256, (32,))


def test_the_uncontrolled_row_is_what_the_metrics_say(model, tokenizer, prompts):
    keywords = {"max_new_tokens": 7, "seed": 3, **SAMPLING}
    (row,) = evaluate(model, tokenizer, prompts, reward=letters, encoder=Encoder(), batch_size=2, progress=False, **keywords)
    expected = []
    for number, start in enumerate(range(0, 5, 2)):
        expected += generate_batch(model, tokenizer, prompts[start : start + 2], **{**keywords, "seed": 3 + number}).responses
    texts = [response.text for response in expected]
    assert row.responses == texts and all(texts)
    assert row.setting == (0.0, 0)
    assert row.rewards == letters(prompts, texts)
    assert row.reward == pytest.approx(sum(row.rewards) / 5)
    assert row.reward_interval == bootstrap_interval(row.rewards)
    assert row.diversity == pytest.approx(sum(map(diversity, texts)) / 5)
    assert row.coherence == pytest.approx(similarities(prompts, texts, Encoder()).mean())
    assert row.nll == pytest.approx(response_nll(model, tokenizer, prompts, [response.token_ids for response in expected]), rel=1e-5)
    assert row.length == sum(len(response.token_ids) for response in expected) / 5
    assert row.cost == 1
    assert row.tokens_per_second > 0
    assert row.edit_norm is None and row.values == [] and row.value_end is None
    assert row.perplexity == pytest.approx(math.exp(row.nll))
    assert row.kl == pytest.approx(0, abs=1e-4) and row.training == (0, 0.0, 0)


def test_a_controlled_row_is_what_the_controller_writes(model, tokenizer, prompts, value):
    keywords = {"max_new_tokens": 6, "seed": 1}
    base, row = evaluate(model, tokenizer, prompts[:2], value=value, settings=[(40.0, 20)], reward=letters, progress=False, **keywords)
    with Controller(value, 40.0, 20).attach(model):
        controlled = generate_batch(model, tokenizer, prompts[:2], **keywords).responses
    free = generate_batch(model, tokenizer, prompts[:2], **keywords).responses
    assert base.responses == [response.text for response in free]
    assert row.responses == [response.text for response in controlled] != base.responses
    assert row.setting == (40.0, 20)
    assert row.coherence is None
    # Scored by the uncontrolled model, which would have written something else.
    assert row.nll == pytest.approx(response_nll(model, tokenizer, prompts[:2], [response.token_ids for response in controlled]), rel=1e-5)
    assert row.nll > base.nll


def test_every_setting_meets_the_same_seeds(model, tokenizer, prompts, value):
    """A control too weak to change a token writes what the uncontrolled model writes, in every batch."""
    rows = evaluate(
        model, tokenizer, prompts, value=value, settings=[(1e-9, 1), (1e-9, 2)], reward=letters, max_new_tokens=5, batch_size=2, progress=False, **SAMPLING
    )
    assert rows[0].responses == rows[1].responses == rows[2].responses
    again = evaluate(model, tokenizer, prompts, reward=letters, max_new_tokens=5, batch_size=2, progress=False, seed=1, **SAMPLING)
    assert again[0].responses != rows[0].responses


def test_values_are_those_of_the_states_before_the_edit(model, tokenizer, prompts, value):
    step_size, steps = 20.0, 10
    rows = evaluate(model, tokenizer, prompts[:3], value=value, settings=[(step_size, steps)], reward=letters, max_new_tokens=6, progress=False)
    norms = []
    for row in rows:
        assert [len(trace) for trace in row.values] == [6, 6, 6]
        with Controller(value, step_size, steps).attach(model) if row.steps else torch.no_grad():
            responses = generate_batch(model, tokenizer, prompts[:3], max_new_tokens=6).responses
        for index in range(3):
            ids = tokenizer(prompts[index]).input_ids
            with torch.no_grad():
                whole = model(torch.tensor([ids + responses[index].token_ids]), output_hidden_states=True).hidden_states[-1][0]
                # The state that is read for token t is one position before it.
                states = whole[len(ids) - 1 : -1]
                assert row.values[index] == pytest.approx(value(states)[:, 0].tolist(), abs=2e-4)
            if row.steps:
                norms += (ascend(states, value, step_size, steps) - states).norm(dim=1).tolist()
    assert rows[0].edit_norm is None
    assert rows[1].edit_norm == pytest.approx(sum(norms) / len(norms), rel=1e-3)


def test_values_end_with_the_response(model, tokenizer, prompts, value):
    ids = generate_batch(model, tokenizer, prompts[:2], max_new_tokens=8).responses[0].token_ids
    end = next(token for place, token in enumerate(ids) if place >= 2 and token not in ids[:place])
    (row,) = evaluate(model, tokenizer, prompts[:2], value=value, reward=letters, max_new_tokens=8, eos_token_id=end, progress=False)
    assert len(row.values[0]) == ids.index(end) + 1 < 8
    assert row.value_end == pytest.approx((row.values[0][-1] + row.values[1][-1]) / 2)


def test_the_cost_is_the_median_of_interleaved_batches(model, tokenizer, prompts, value, monkeypatch):
    """Each batch takes its own time, and the settings take turns in being the first."""
    order = []
    slow = {None: 1.0, 0.5: 1.5, 1.0: 3.0}
    real = Controller.attach
    attached = []

    def attach(controller, model):
        attached.append(controller.step_size)
        return real(controller, model)

    def fake(model, tokenizer, prompts, decoding):
        seed = decoding.seed
        arm = attached.pop() if attached else None
        order.append((seed, arm))
        seconds = slow[arm] * 2 * 10.0**seed
        # In the third batch something else disturbs one setting.
        seconds *= 50 if (seed, arm) == (2, 0.5) else 1
        return Batch([Response([5, 6], "me", "length")] * len(prompts), 2, seconds)

    monkeypatch.setattr(Controller, "attach", attach)
    monkeypatch.setattr(recontrol.methods.base, "generate_batch", fake)
    rows = evaluate(model, tokenizer, prompts, value=value, settings=[(0.5, 3), (1.0, 3)], reward=letters, max_new_tokens=2, batch_size=1, progress=False)
    warm_up, measured = order[:3], order[3:]
    assert warm_up == [(0, None), (0, 0.5), (0, 1.0)]
    assert measured[:9] == [(0, None), (0, 0.5), (0, 1.0), (1, 0.5), (1, 1.0), (1, None), (2, 1.0), (2, None), (2, 0.5)]
    assert [row.cost for row in rows] == [1, 1.5, 3]
    assert rows[0].tokens_per_second == pytest.approx(10 / (2 * (1 + 10 + 100 + 1000 + 10000)))


def test_a_stop_string_cuts_every_setting(model, tokenizer, prompts, value):
    (free,) = evaluate(model, tokenizer, prompts[:1], reward=letters, max_new_tokens=8, progress=False)
    stop = free.responses[0][5:8]
    rows = evaluate(model, tokenizer, prompts[:1], value=value, settings=[(1e-9, 1)], reward=letters, max_new_tokens=8, stop_strings=[stop], progress=False)
    cut = free.responses[0].index(stop)
    for row in rows:
        assert free.responses[0].startswith(row.responses[0]) and len(row.responses[0]) <= cut
        # The state is there for every token kept, and for no other.
        assert len(row.values[0]) == row.length


def test_several_rewards_are_weighted(model, tokenizer, prompts):
    two = ValueFunction(256, (16,), num_heads=2)

    def rewards(prompts, responses):
        return [[len(response), 1.0] for response in responses]

    keywords = {"value": two, "reward": rewards, "max_new_tokens": 3, "progress": False}
    rows = evaluate(model, tokenizer, prompts[:2], settings=[(0.5, 2)], head_weights=[2.0, -3.0], **keywords)
    assert rows[1].rewards == [2 * len(text) - 3 for text in rows[1].responses]
    with torch.no_grad(), Controller(two, 0.5, 2, head_weights=[2.0, -3.0]).attach(model):
        assert [response.text for response in generate_batch(model, tokenizer, prompts[:2], max_new_tokens=3).responses] == rows[1].responses
    with pytest.raises(ValueError, match="found 2 rewards a response: give head_weights, 2 numbers"):
        evaluate(model, tokenizer, prompts[:2], reward=rewards, max_new_tokens=2, progress=False)
    with pytest.raises(ValueError, match="head_weights must be 2 numbers, one a reward, found 3"):
        evaluate(model, tokenizer, prompts[:2], reward=rewards, head_weights=[1, 1, 1], max_new_tokens=2, progress=False)


def test_nothing_is_left_on_the_model_after_an_error(model, tokenizer, prompts, value):
    def broken(prompts, responses):
        raise ZeroDivisionError

    def hooks():
        # Transformers leaves some of its own on the layers, for models whose hidden states were asked for.
        return [(list(module._forward_pre_hooks.values()), list(module._forward_hooks.values())) for module in model.modules()]

    before = hooks()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, tokenizer, prompts[:1], value=value, settings=[(0.5, 2)], reward=broken, max_new_tokens=2, progress=False)
    assert hooks() == before
    with pytest.raises(ValueError, match="no_such_option"):
        evaluate(model, tokenizer, prompts[:1], value=value, settings=[(0.5, 2)], reward=letters, max_new_tokens=2, progress=False, no_such_option=1)
    assert hooks() == before


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"settings": [(0.5, 2)]}, "need a value function"),
        ({"settings": [(0.0, 2)], "value": ...}, "leave it out"),
        ({"settings": [(0.5, 0)], "value": ...}, "leave it out"),
        ({"settings": [(-0.5, 2)], "value": ...}, "step_size must be finite and 0 or more"),
        ({"settings": [(math.nan, 2)], "value": ...}, "step_size must be finite"),
        ({"settings": [(0.5, -2)], "value": ...}, "steps must be 0 or more"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"max_new_tokens": 510}, r"leave no room for 510 new tokens in a context of 512: 0 \("),
        ({"reward": lambda prompts, responses: [math.nan] * len(responses)}, "NaN"),
        ({"reward": lambda prompts, responses: [1.0]}, "found 1, wanted 2"),
        ({"num_return_sequences": 2, "do_sample": True}, "found 4 responses to 2 prompts"),
        ({"max_length": 20}, "use max_new_tokens"),
        ({"controller_options": {"radius": 1.0}, "value": ...}, "controller_options are for settings"),
    ],
)
def test_bad_input_is_refused(model, tokenizer, prompts, value, keywords, message):
    keywords = {"reward": letters, "max_new_tokens": 2, "progress": False, **{key: value if given is ... else given for key, given in keywords.items()}}
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, prompts[:2], **keywords)


def test_an_out_that_cannot_be_written_is_refused_before_the_work(model, tokenizer, prompts, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("before")
    keywords = {"reward": letters, "max_new_tokens": 2, "progress": False}
    with pytest.raises(OSError, match="file"):
        evaluate(model, tokenizer, prompts[:2], out=tmp_path / "file" / "o", **keywords)
    done = evaluate(model, tokenizer, prompts[:2], out=tmp_path / "o", **keywords)

    def refuse(*_, **__):
        raise OSError("could not write: a full disk")

    monkeypatch.setattr("recontrol.evaluation.evaluate.check_output", refuse)
    # What is finished is read.
    assert evaluate(model, tokenizer, prompts[:2], out=tmp_path / "o", **keywords) == done
    monkeypatch.setattr(recontrol.methods.base, "generate_batch", refuse)
    with pytest.raises(OSError, match="a full disk"):
        evaluate(model, tokenizer, prompts[:2], out=tmp_path / "o", seeds=2, **keywords)


def test_a_reward_that_cannot_be_used_says_so_before_the_work(model, tokenizer, prompts, monkeypatch):
    lengths = []
    real = recontrol.methods.base.generate_batch

    def counting(model, tokenizer, prompts, decoding):
        lengths.append(decoding.max_new_tokens)
        return real(model, tokenizer, prompts, decoding)

    monkeypatch.setattr(recontrol.methods.base, "generate_batch", counting)
    with pytest.raises(ValueError, match="NaN"):
        evaluate(model, tokenizer, prompts, reward=lambda prompts, responses: [math.nan] * len(responses), max_new_tokens=50, progress=False)
    assert lengths == [2]


def test_no_prompts_and_an_attached_controller_are_refused(model, tokenizer, prompts, value):
    with pytest.raises(ValueError, match="no prompts"):
        evaluate(model, tokenizer, [], reward=letters)
    with pytest.raises(TypeError, match="list of texts"):
        evaluate(model, tokenizer, "This film", reward=letters)
    with Controller(value).attach(model), pytest.raises(ValueError, match="found a controller or recorder attached to it already"):
        evaluate(model, tokenizer, prompts, reward=letters)


def test_the_rule_of_the_paper():
    rows = [
        result(0.0, 0, [99]),
        result(0.25, 30, [1.0], diversity=0.9, coherence=0.5),
        result(0.5, 30, [1.3], diversity=0.8, coherence=0.5),
        result(1.0, 30, [1.5], diversity=0.7, coherence=0.3),
    ]
    assert choose(rows).setting == (0.5, 30)
    assert choose([*rows, replace(rows[2], steps=60)]).setting == (0.5, 30)
    assert choose([replace(row, coherence=None) for row in rows]).setting == (1.0, 30)
    with pytest.raises(ValueError, match="no controlled setting"):
        choose(rows[:1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_padding(model, tokenizer, prompts, side):
    tokenizer.padding_side = side
    together = generate_batch(model, tokenizer, prompts, max_new_tokens=8)
    alone = [generate_batch(model, tokenizer, [prompt], max_new_tokens=8).responses[0] for prompt in prompts]
    assert tokenizer.padding_side == side
    assert together.responses == alone
    assert together.steps == 8 and together.tokens == 8 * len(prompts) and together.seconds > 0


def test_generation_leaves_the_generators_and_the_mode_as_they_were(model, tokenizer, prompts):
    model.train()
    try:
        torch.manual_seed(5)
        wanted = torch.rand(3)
        torch.manual_seed(5)
        one = generate_batch(model, tokenizer, prompts, max_new_tokens=6, seed=8, **SAMPLING)
        assert torch.equal(torch.rand(3), wanted) and model.training
        assert one.responses == generate_batch(model, tokenizer, prompts, max_new_tokens=6, seed=8, **SAMPLING).responses
        assert one.responses != generate_batch(model, tokenizer, prompts, max_new_tokens=6, seed=9, **SAMPLING).responses
    finally:
        model.eval()


def test_rows_that_ended_are_not_edited(model, tokenizer, prompts, value):
    """Whatever `generate` fills them with: here with a token that is neither the model's end nor its padding."""
    ids = generate_batch(model, tokenizer, prompts[:3], max_new_tokens=8).responses[0].token_ids
    end = next(token for place, token in enumerate(ids) if place >= 2 and token not in ids[:place])
    options = {"eos_token_id": end, "pad_token_id": 77}
    control = Controller(value, 1e-9, 1)
    with control.attach(model) as handle:
        batch = generate_batch(model, tokenizer, prompts[:3], max_new_tokens=8, **options)
    assert batch.tokens < 8 * 3
    assert handle.edited_rows == batch.tokens


def test_prompts_that_are_too_long_are_named(model, tokenizer):
    long = "one two three " * 200
    with pytest.raises(ValueError, match=r"1 prompts leave no room for 16 new tokens in a context of 512: 1 \(\d+ tokens\)"):
        check_lengths(model, tokenizer, ["short", long], 16)

    def plain(texts):
        # Without a beginning-of-sequence token.
        return SimpleNamespace(input_ids=[[5] * len(text) for text in texts])

    with pytest.raises(ValueError, match=r"1 prompts have no tokens: 0$"):
        check_lengths(model, plain, ["", "short"], 16)
    check_lengths(model, tokenizer, ["short"], 16)
