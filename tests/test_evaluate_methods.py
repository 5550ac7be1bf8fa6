"""Comparing methods: what is measured of each, several seeds, and runs that go on where they were stopped."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from recontrol.data.prompts import load_prompts
from recontrol.decoding.batches import generate_batch
from recontrol.decoding.control import Control
from recontrol.evaluation.evaluate import evaluate
from recontrol.evaluation.metrics import bootstrap_interval
from recontrol.methods import Method, ReControl, Together, Uncontrolled
from recontrol.value import ValueFunction

EXAMPLE = Path(__file__).parent.parent / "examples" / "movie_reviews"
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 6, "batch_size": 2, "progress": False}

pytestmark = pytest.mark.usefixtures("one_thread")


def letters(prompts, responses):
    return [float(response.count("e")) for response in responses]


# Functions that score alike, whatever else they do, say so.
letters.identity = "letters"


@dataclass(frozen=True)
class Sharper(Method):
    """Divides the logits, which is what a temperature does, but as a part of the method."""

    kind = "sharper"
    factor: float = 2.0

    @property
    def settings(self):
        return {"factor": self.factor}

    def applied(self, model, tokenizer, prompts, options):
        import contextlib

        factor = self.factor

        class Times(LogitsProcessor):
            def __call__(self, input_ids, scores):
                return scores * factor

        return contextlib.nullcontext([Times()])


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EXAMPLE / "lm", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE / "lm")


@pytest.fixture(scope="module")
def prompts():
    return load_prompts(EXAMPLE / "prompts-validation.jsonl", limit=4)


@pytest.fixture(scope="module")
def value():
    torch.manual_seed(0)
    return ValueFunction(256, (32,))


@torch.no_grad()
def divergence(model, tokenizer, prompt, ids, logits_of):
    """sum_t KL(softmax(logits_of(states, logits)) || softmax(logits)) along one response, from one plain forward call."""
    prompt_ids = tokenizer(prompt).input_ids
    output = model(torch.tensor([prompt_ids + ids]), output_hidden_states=True)
    where = slice(len(prompt_ids) - 1, len(prompt_ids) + len(ids) - 1)
    states, logits = output.hidden_states[-1][0, where], output.logits[0, where].double()
    p, q = logits_of(states, logits).double().log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def test_the_divergence_is_summed_over_the_tokens_of_each_response(model, tokenizer, prompts, value):
    control = Control(value, 20.0, 10)
    methods = [ReControl(control), Sharper(1.5)]
    base, steered, sharper = evaluate(model, tokenizer, prompts, methods=methods, reward=letters, **{**SAMPLING, "batch_size": 4})
    assert base.kl == pytest.approx(0, abs=1e-4)

    def edited(states, logits):
        return model.lm_head(methods[0].edit(states))

    for row, method, logits_of in ((steered, methods[0], edited), (sharper, methods[1], lambda states, logits: logits * 1.5)):
        made = method.respond(model, tokenizer, prompts, max_new_tokens=6, seed=0, do_sample=True, temperature=1.0, top_k=0)
        assert row.responses == [response.text for response in made.responses]
        expected = [divergence(model, tokenizer, prompt, each.token_ids, logits_of) for prompt, each in zip(prompts, made.responses, strict=True)]
        assert row.kls == pytest.approx(expected, rel=1e-3) and min(expected) > 0.1
        assert row.kl == pytest.approx(sum(expected) / 4, rel=1e-3)
        assert row.kl_interval == bootstrap_interval(row.kls)
    assert steered.edit_norm > 0 and sharper.edit_norm is None


def test_a_response_that_ends_counts_no_further(model, tokenizer, prompts):
    ids = generate_batch(model, tokenizer, prompts[:2], max_new_tokens=6).responses[0].token_ids
    end = next(token for place, token in enumerate(ids) if place >= 2 and token not in ids[:place])
    keywords = {"methods": [Sharper(1.5)], "reward": letters, "progress": False, "max_new_tokens": 6}
    _, whole = evaluate(model, tokenizer, prompts[:2], **keywords)
    _, cut = evaluate(model, tokenizer, prompts[:2], **keywords, eos_token_id=end)
    assert cut.answers[0].tokens == ids.index(end) + 1 < 6 == whole.answers[0].tokens
    assert 0 < cut.kls[0] < whole.kls[0]


def test_rows_that_are_not_those_of_the_responses_are_not_measured(model, tokenizer, prompts, value):
    @dataclass(frozen=True)
    class FirstOfTwo(Method):
        """Decodes every prompt twice, as one that chooses does."""

        kind = "first of two"

        def respond(self, model, tokenizer, prompts, decoding=None, **keywords):
            made = generate_batch(model, tokenizer, [*prompts, *prompts], decoding, **keywords)
            made.responses = made.responses[: len(prompts)]
            return made

    _, row = evaluate(model, tokenizer, prompts, methods=[FirstOfTwo()], value=value, reward=letters, **SAMPLING)
    assert row.kl is None and row.kls == [] and row.values == [] and row.nll > 0 and len(row.responses) == 4


def test_seeds_are_further_runs_over_all_prompts(model, tokenizer, prompts):
    (both,) = evaluate(model, tokenizer, prompts, reward=letters, seeds=2, **SAMPLING)
    (first,) = evaluate(model, tokenizer, prompts, reward=letters, **SAMPLING)
    (second,) = evaluate(model, tokenizer, prompts, reward=letters, seed=1000, **SAMPLING)
    assert both.responses == first.responses + second.responses and first.responses != second.responses
    assert (both.seeds, both.reward) == (2, pytest.approx((first.reward + second.reward) / 2))
    # Over prompts: two responses to the same prompt are no two independent ones.
    means = [(one + other) / 2 for one, other in zip(first.rewards, second.rewards, strict=True)]
    assert both.reward_interval == bootstrap_interval(means) != bootstrap_interval(both.rewards)


def test_a_run_goes_on_where_it_was_stopped(model, tokenizer, prompts, value, tmp_path):
    methods = [ReControl(Control(value, 5.0, 10)), Sharper()]
    calls = []

    def counting(prompts, responses):
        calls.append(len(responses))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return letters(prompts, responses)

    # Named as the other one, for the reward is one of the settings.
    counting.__qualname__, counting.identity = letters.__qualname__, letters.identity
    keywords = {"methods": methods, "value": value, "seeds": 2, **SAMPLING}
    whole = evaluate(model, tokenizer, prompts, reward=letters, **keywords)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, prompts, reward=counting, out=tmp_path, **keywords)
    # The first call was the warm-up's.
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed-*.json")}
    assert len(done) == 3
    rows = evaluate(model, tokenizer, prompts, reward=letters, out=tmp_path, **keywords)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert [(row.method, row.responses, row.rewards, row.kls, row.values) for row in rows] == [
        (row.method, row.responses, row.rewards, row.kls, row.values) for row in whole
    ]

    def never(prompts, responses):
        raise AssertionError

    never.__qualname__, never.identity = letters.__qualname__, letters.identity
    again = evaluate(model, tokenizer, prompts, reward=never, out=tmp_path, **keywords)
    assert again == rows
    added = evaluate(model, tokenizer, prompts, reward=letters, out=tmp_path, **{**keywords, "methods": [*methods, Sharper(3.0)]})
    assert added[:3] == rows and added[3].settings == {"factor": 3.0}


def test_a_reward_that_changed_scores_again(model, tokenizer, prompts, tmp_path, caplog):
    def score(prompts, responses):
        return [1.0] * len(responses)

    keywords = {"methods": [Sharper()], "out": tmp_path, **SAMPLING}
    first = evaluate(model, tokenizer, prompts, reward=score, **keywords)

    def score(prompts, responses):
        return [100.0 + len(response) for response in responses]

    again = evaluate(model, tokenizer, prompts, reward=score, **keywords)
    assert "the reward has changed" in caplog.text
    for before, row in zip(first, again, strict=True):
        assert row.responses == before.responses and row.rewards == [100.0 + len(response) for response in row.responses] and set(before.rewards) == {1.0}
    assert [row.rewards for row in evaluate(model, tokenizer, prompts, reward=score, **keywords)] == [row.rewards for row in again]


def test_what_belongs_to_another_evaluation_is_refused(model, tokenizer, prompts, value, tmp_path):
    keywords = {"reward": letters, "out": tmp_path, **SAMPLING}
    evaluate(model, tokenizer, prompts, methods=[ReControl(Control(value, 5.0, 10))], **keywords)
    with pytest.raises(ValueError, match="an evaluation with another max_new_tokens: found 6, wanted 7; use the same"):
        evaluate(model, tokenizer, prompts, **{**keywords, "max_new_tokens": 7})
    with pytest.raises(ValueError, match="another prompts_sha256"):
        evaluate(model, tokenizer, prompts[:3], **keywords)
    with pytest.raises(ValueError, match="another value_sha256"):
        evaluate(model, tokenizer, prompts, value=value, **keywords)
    # Another value function under the same settings has cells of its own.
    torch.manual_seed(1)
    other = ReControl(Control(ValueFunction(256, (32,)), 5.0, 10))
    assert len(list(tmp_path.glob("re-control*"))) == 1
    evaluate(model, tokenizer, prompts, methods=[other], **keywords)
    assert len(list(tmp_path.glob("re-control*"))) == 2
    damaged = next(tmp_path.glob("uncontrolled*/seed-0-batch-00001.json"))
    damaged.write_text(json.dumps({"label": "uncontrolled"}))
    with pytest.raises(ValueError, match=r"batch-00001\.json is no cell"):
        evaluate(model, tokenizer, prompts, **keywords)


def test_methods_that_cannot_be_told_apart_are_refused(model, tokenizer, prompts, value):
    keywords = {"reward": letters, **SAMPLING}
    with pytest.raises(ValueError, match=r"two methods are called 'sharper \(factor 2\)'"):
        evaluate(model, tokenizer, prompts, methods=[Sharper(), Sharper(2.0)], **keywords)
    with pytest.raises(ValueError, match="two methods are called 'uncontrolled'"):
        evaluate(model, tokenizer, prompts, methods=[Uncontrolled()], **keywords)
    with pytest.raises(TypeError, match=r"methods must be of recontrol\.methods, found Control"):
        evaluate(model, tokenizer, prompts, methods=[Control(value)], **keywords)


def test_what_a_method_writes_has_to_fit(model, tokenizer, prompts):
    @dataclass(frozen=True)
    class Long(Method):
        kind = "long"

        def write(self, prompt):
            return "a film " * 400 + prompt

    with pytest.raises(ValueError, match="4 prompts leave no room for 6 new tokens in a context of 512"):
        evaluate(model, tokenizer, prompts, methods=[Long()], reward=letters, **SAMPLING)


def test_speed_memory_and_training_are_reported(model, tokenizer, prompts, value):
    base, row = evaluate(model, tokenizer, prompts, methods=[Together([Sharper(), ReControl(Control(value, 5.0, 10))])], reward=letters, **SAMPLING)
    assert (
        row.method == "sharper (factor 2) + RE-Control (alpha 5, n 10)"
        and row.kind == "sharper + RE-Control"
        and row.settings == {"factor": 2.0, "alpha": 5.0, "n": 10}
        and row.setting == (0.0, 0)
    )
    assert row.training.parameters == sum(parameter.numel() for parameter in value.parameters()) and base.training.parameters == 0
    assert base.added_seconds == 0 and math.isfinite(row.added_seconds) and row.tokens_per_second > 0 and row.peak_bytes >= 0
    summary = json.loads(json.dumps(row.summary()))
    assert summary["training"]["parameters"] == row.training.parameters and "answers" not in summary and "rewards" not in summary


def test_pieces_are_the_text_token_by_token(model, tokenizer, prompts):
    (row,) = evaluate(model, tokenizer, prompts, reward=letters, **SAMPLING)
    shown = [answer for answer in row.answers if answer.pieces is not None]
    assert shown == row.answers[:2]
    for answer in shown:
        assert len(answer.pieces) == answer.tokens and "".join(answer.pieces) == answer.text
