"""ARGS: the k likeliest tokens are scored by the reward of the text that they would make, and only what has to be scored is."""

import itertools

import pytest
import torch
from generating import double_llama
from test_controller_models import GATED
from test_generation import BYTE_LEVEL, Letters
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from recontrol.methods import Method, Together, Uncontrolled
from recontrol.methods.reranking import ARGS

PROMPTS = ["To be", "or not", "to be, that is", "?"]
WIDTH = max(map(len, PROMPTS))
VOCABULARY, NEW = 98, 5
EPS = torch.finfo(torch.float32).eps
SAMPLING = {"do_sample": True, "top_k": 0, "eos_token_id": None}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return double_llama()


class Counting:
    """A reward that depends on prompt and response, in sixteenths, so that float32 holds it; keeps what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, responses):
        self.calls.append(list(zip(prompts, responses, strict=True)))
        return [self.of(prompt, response) for prompt, response in self.calls[-1]]

    @staticmethod
    def of(prompt, response):
        return len(prompt) / 16 + sum(ord(letter) * (place + 1) % 7 for place, letter in enumerate(response)) / 4


class Spy(LogitsProcessor):
    """Keeps what goes into the sampling."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        self.steps.append((input_ids.clone(), scores.clone()))
        return scores


def steps_of(method, model, prompts=PROMPTS, tokenizer=None, **options):
    """The batch, and each step's (input_ids, scores)."""
    spy = Spy()
    options = {"max_new_tokens": NEW, "seed": 3, **SAMPLING, **options}
    return method.respond(model, tokenizer or Letters(), prompts, logits_processor=[spy], **options), spy.steps


def next_logits(model, ids):
    """(vocabulary,) float32, as `generate` hands them over."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()


class Prefixed(Method):
    """The model is given another text than the caller's."""

    kind = "prefixed"

    def write(self, prompt):
        return f"Say: {prompt}"


class TestScores:
    @pytest.mark.parametrize("beams", [1, 2])
    def test_logit_and_reward_of_each_candidate(self, model, beams):
        """Written out for one row after the other, without padding."""
        reward, k = Counting(), 4
        _, steps = steps_of(ARGS(reward, 1.5, k), model, num_beams=beams)
        assert len(steps) == NEW
        for ids, scores in steps:
            for row, tokens in enumerate(ids.tolist()):
                prompt = PROMPTS[row // beams]
                logits = next_logits(model, tokens[WIDTH - len(prompt) :])
                # Beam search hands over log-probabilities.
                logits = logits.log_softmax(-1) if beams > 1 else logits
                wanted = torch.full((VOCABULARY,), -torch.inf)
                for token in logits.topk(k).indices.tolist():
                    text = Letters().decode([*tokens[WIDTH:], token], skip_special_tokens=True)
                    wanted[token] = logits[token] + 1.5 * Counting.of(prompt, text)
                finite = wanted.isfinite()
                assert torch.equal(scores[row].isfinite(), finite) and finite.sum() == k
                # One rounding of the logit and one of the sum.
                assert (scores[row] - wanted)[finite].abs().max() <= 4 * EPS * (wanted[finite].abs().max() + logits.abs().max())

    def test_greedy_takes_the_highest_score_and_sampling_one_of_k(self, model):
        method = ARGS(Counting(), 2.0, 3)
        _, steps = steps_of(method, model, do_sample=False, top_k=None)
        for (_, scores), (ids, _) in itertools.pairwise(steps):
            assert torch.equal(ids[:, -1], scores.argmax(-1))
        _, sampled = steps_of(method, model)
        chosen = torch.stack([scores.gather(1, ids[:, -1:]) for (_, scores), (ids, _) in itertools.pairwise(sampled)])
        assert chosen.isfinite().all() and not torch.equal(sampled[-1][0], steps[-1][0])

    def test_weight_and_k(self, model):
        """Without weight and with all candidates nothing is changed; the default weight is 1, of 10 candidates."""
        plain, free = steps_of(Uncontrolled(), model)
        batch, steps = steps_of(ARGS(Counting(), 0, VOCABULARY), model)
        assert batch.responses == plain.responses and all(torch.equal(one[1], other[1]) for one, other in zip(steps, free, strict=True))
        default = ARGS(Counting())
        assert default.settings == {"w": 1.0, "k": 10} and default.label == "ARGS (w 1, k 10)" and default.training.parameters == 0
        scores, unweighted = (steps_of(method, model)[1][0][1] for method in (default, ARGS(Counting(), 0.0)))
        assert scores.isfinite().sum(1).tolist() == [10] * 4 and not torch.equal(scores, unweighted)

    def test_rewards_rise(self, model):
        reward = Counting()
        free, guided = (method.respond(model, Letters(), PROMPTS, max_new_tokens=8, eos_token_id=None) for method in (Uncontrolled(), ARGS(reward, 3.0)))
        of_free, of_guided = (sum(reward([*PROMPTS], [response.text for response in batch.responses])) for batch in (free, guided))
        assert of_guided > of_free + 1

    def test_several_rewards(self, model):
        """A list of rewards and their weights give what the weighted sum gives."""
        lengths = lambda prompts, responses: [float(len(response)) for response in responses]  # noqa: E731
        both = ARGS([Counting(), lengths], 1.0, 4, weights=[0.5, -2])
        added = ARGS(lambda prompts, responses: [Counting.of(*pair) * 0.5 - 2 * len(pair[1]) for pair in zip(prompts, responses, strict=True)], 1.0, 4)
        assert both.settings["weights"] == (0.5, -2.0)
        for one, other in zip(steps_of(both, model)[1], steps_of(added, model)[1], strict=True):
            assert torch.equal(one[1], other[1])


class TestWhatIsScored:
    def test_the_prompt_as_the_caller_gave_it(self, model):
        reward = Counting()
        steps_of(Together([Prefixed(), ARGS(reward, 1.0, 3)]), model)
        assert {prompt for call in reward.calls for prompt, _ in call} == set(PROMPTS)
        # The first letters only, nothing of the prompt as it was written.
        assert {len(response) for _, response in reward.calls[0]} <= {0, 1}

    def test_one_call_a_step_and_equal_texts_once(self, model):
        """Two equal prompts have the same candidates, and all that is special adds no text."""
        reward = Counting()
        steps_of(ARGS(reward, 1.0, VOCABULARY), model, ["To be", "To be", "or"], max_new_tokens=1)
        (asked,) = reward.calls
        # 95 letters and the empty text, in the place of <pad>, <bos> and <eos>.
        assert len(asked) == len(set(asked)) == 2 * 96

    def test_ended_rows_are_not_scored_and_endings_are_as_finished_texts(self, model):
        ending = [2, *range(40, 48)]
        reward = Counting()
        batch, steps = steps_of(ARGS(reward, 0.25, VOCABULARY), model, max_new_tokens=12, eos_token_id=ending)
        finish = [response.finish for response in batch.responses]
        assert "eos" in finish and len({len(response.token_ids) for response in batch.responses}) > 1
        for step, asked in enumerate(reward.calls):
            alive = {prompt for prompt, response in zip(PROMPTS, batch.responses, strict=True) if step < len(response.token_ids)}
            assert {prompt for prompt, _ in asked} == alive
        assert len(reward.calls) == len(steps)
        # <eos> adds no text, so what it finishes is the text that was there before.
        before = Letters().decode(steps[1][0][0, WIDTH:].tolist(), skip_special_tokens=True)
        assert (PROMPTS[0], before) in reward.calls[1] and len(before) == 1

    def test_the_text_of_a_response_is_one_that_was_scored(self):
        """Byte-level tokens: a space belongs to the word behind it, and a character may be several tokens."""
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**GATED, "vocab_size": len(BYTE_LEVEL), "initializer_range": 0.5})).double().eval()
        prompts = ["The film was", "I", "Caf\u00e9 \U0001f600 and"]
        reward = Counting()
        batch, _ = steps_of(ARGS(reward, 1.0, 6), model, prompts, BYTE_LEVEL, max_new_tokens=6)
        assert {(prompt, response.text) for prompt, response in zip(prompts, batch.responses, strict=True)} <= set(reward.calls[-1])
        assert any(response.startswith(" ") for call in reward.calls for _, response in call)

    def test_rewards_on_any_device_and_of_any_type(self, model):
        """Tensors and numpy numbers are scores like others."""
        reward = Counting()
        _, steps = steps_of(ARGS(reward, 1.0, 3), model)
        _, same = steps_of(ARGS(lambda prompts, responses: torch.tensor(reward(prompts, responses), dtype=torch.float64), 1.0, 3), model)
        assert all(torch.equal(one[1], other[1]) for one, other in zip(steps, same, strict=True))


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"reward": 3}, TypeError, "reward must be a callable"),
            ({"k": 0}, ValueError, "k must be an integer of at least 1, found 0"),
            ({"w": float("inf")}, ValueError, "w must be finite, found inf"),
            ({"w": "1"}, TypeError, "w must be a number, found '1'"),
            ({"weights": 1.0}, TypeError, "weights must be a sequence of numbers, found 1.0"),
            ({"reward": [len, len]}, ValueError, "found 2 rewards a response: give weights, 2 numbers"),
            ({"reward": [len, len], "weights": [1]}, ValueError, "weights must be 2 numbers, one a reward, found 1"),
        ],
    )
    def test_arguments(self, options, error, message):
        with pytest.raises(error, match=message):
            ARGS(**{"reward": Counting(), **options})

    def test_what_the_reward_returns(self, model):
        for returned, message in ((lambda prompts, responses: [[1.0, 2.0]] * len(responses), "found 2 rewards"), (lambda *texts: [], "found 0, wanted")):
            with pytest.raises(ValueError, match=message):
                steps_of(ARGS(returned), model)


def test_identity_is_the_reward():
    assert ARGS(Counting()).identity == "Counting"
    assert ARGS({"help": Counting(), "harm": Counting()}, weights=[1, 1]).identity == ["help: Counting", "harm: Counting"]


def test_a_fresh_processor_a_batch(model):
    """Batches of other widths, one after the other, with one object."""
    method = ARGS(Counting(), 1.0, 5)
    alone = [method.respond(model, Letters(), [prompt], max_new_tokens=NEW).responses[0] for prompt in PROMPTS]
    assert method.respond(model, Letters(), PROMPTS, max_new_tokens=NEW).responses == alone
