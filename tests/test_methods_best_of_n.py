import math
from types import SimpleNamespace

import pytest
import torch
from controlled import hooks_on
from generating import ENDING, NEW, PROMPTS, TOKENIZER, double_llama, value
from transformers import GenerationConfig

import recontrol as rc
import recontrol.methods.best_of_n
from recontrol.decoding.batches import generate_batch
from recontrol.methods.base import Uncontrolled
from recontrol.methods.best_of_n import BestOfN
from recontrol.methods.control import ReControl
from recontrol.methods.prompting import Prompting

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLING = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "seed": 5, "eos_token_id": ENDING}


def small_letters(prompts, responses):
    return [sum(letter.islower() for letter in response) for response in responses]


@pytest.fixture(scope="module")
def model():
    return double_llama()


def respond(method, model, prompts=PROMPTS, **options):
    return method.respond(model, TOKENIZER, prompts, **{**SAMPLING, **options})


@pytest.mark.parametrize("inner", [Uncontrolled(), ReControl(rc.Control(value(64), 3.0, 9))], ids=["uncontrolled", "recontrol"])
def test_the_best_of_one_is_the_response_of_the_inner_method(model, inner):
    alone = respond(inner, model)
    found = respond(BestOfN(1, small_letters, inner), model)
    assert found.responses == alone.responses and found.steps == alone.steps
    assert hooks_on(model) == []


def test_the_response_with_the_largest_reward_is_kept(model):
    sampled = generate_batch(model, TOKENIZER, [prompt for prompt in PROMPTS for _ in range(4)], **SAMPLING)
    rewards = small_letters([], [response.text for response in sampled.responses])
    expected = [max(range(4 * place, 4 * place + 4), key=rewards.__getitem__) for place in range(len(PROMPTS))]
    found = respond(BestOfN(4, small_letters), model)
    assert found.responses == [sampled.responses[index] for index in expected]
    assert found.steps == sampled.steps
    # Not always the first, so that there was something to choose.
    assert any(index % 4 for index in expected)
    assert respond(BestOfN(4, lambda prompts, responses: [0.0] * len(responses)), model).responses == sampled.responses[::4]


def test_the_same_as_with_several_sequences_a_prompt(model):
    """`generate` repeats the prompts itself; the rewards tell which sample of each is asked for."""
    ids = torch.tensor(TOKENIZER(["or not"]).input_ids)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "eos_token_id": ENDING, "pad_token_id": 0, "num_return_sequences": 3}
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :].tolist()
    for place, row in enumerate(rows):
        method = BestOfN(3, lambda prompts, responses, place=place: [float(index == place) for index in range(len(responses))])
        kept = respond(method, model, ["or not"]).responses[0].token_ids
        assert row[: len(kept)] == kept and set(row[len(kept) :]) <= {0}


def test_rewards_see_the_prompts_as_they_were_given_and_the_model_as_they_were_written(model):
    seen = []

    def reward(prompts, responses):
        seen.extend(prompts)
        return small_letters(prompts, responses)

    inner = Prompting("Say: {prompt}")
    found = respond(BestOfN(2, reward, inner), model)
    assert seen == [prompt for prompt in PROMPTS for _ in range(2)]
    written = [inner.write(prompt) for prompt in PROMPTS]
    assert found.responses == respond(BestOfN(2, small_letters), model, written).responses != respond(BestOfN(2, small_letters), model).responses
    assert BestOfN(2, reward, inner).write("x") == "Say: x"


class Counting(Uncontrolled):
    """Notes how many rows it is applied to, and what each round gave."""

    def __init__(self):
        object.__setattr__(self, "rows", [])

    def applied(self, model, tokenizer, prompts, options):
        self.rows.append(len(prompts))
        return super().applied(model, tokenizer, prompts, options)


@pytest.mark.parametrize(("at_once", "rows"), [(None, [15]), (15, [15]), (14, [12, 3]), (6, [6, 6, 3]), (1, [3] * 5)])
def test_rows_are_decoded_in_rounds(model, at_once, rows):
    inner, scored = Counting(), []

    def reward(prompts, responses):
        scored.append(list(zip(prompts, responses, strict=True)))
        return small_letters(prompts, responses)

    # Hardly ever ended, so that no two samples of a prompt are equal by chance.
    batch = respond(BestOfN(5, reward, inner, rows_at_once=at_once), model, PROMPTS[:3], eos_token_id=2)
    assert inner.rows == rows and [len(pairs) for pairs in scored] == [15]
    by_prompt = {prompt: [response for asked, response in scored[0] if asked == prompt] for prompt in PROMPTS[:3]}
    # Every round has a seed of its own, so no sample comes twice.
    assert all(len(set(responses)) == 5 for responses in by_prompt.values())
    assert [response.text for response in batch.responses] == [max(of, key=lambda text: small_letters([], [text])[0]) for of in by_prompt.values()]
    assert batch.steps == NEW * len(rows)


def test_seconds_are_those_of_generation_and_of_scoring(model, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def reward(prompts, responses):
        clock.now += 1000
        return small_letters(prompts, responses)

    monkeypatch.setattr(recontrol.methods.best_of_n, "time", clock)
    assert 1000 < respond(BestOfN(2, reward), model).seconds < 2000


def test_several_rewards_want_weights(model):
    def two(prompts, responses):
        return [[count, -2.0 * count] for count in small_letters(prompts, responses)]

    most, least = BestOfN(3, small_letters), BestOfN(3, lambda prompts, responses: [-count for count in small_letters(prompts, responses)])
    assert respond(BestOfN(3, two, head_weights=[1, 0]), model).responses == respond(most, model).responses
    assert respond(BestOfN(3, two, head_weights=[1, 1]), model).responses == respond(least, model).responses != respond(most, model).responses
    with pytest.raises(ValueError, match="found 2 rewards a response: give head_weights, 2 numbers"):
        respond(BestOfN(3, two), model)


def test_greedy_decoding_is_refused_before_any_work(model):
    inner = Counting()
    for options in ({"do_sample": False}, {"generation_config": GenerationConfig(do_sample=False)}):
        with pytest.raises(ValueError, match="best of 2 wants sampling, found greedy decoding"):
            BestOfN(2, small_letters, inner).respond(model, TOKENIZER, PROMPTS, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="best of 2 wants sampling, found greedy decoding"):
        BestOfN(2, small_letters, inner).respond(model, TOKENIZER, PROMPTS)
    with pytest.raises(ValueError, match="num_return_sequences must be left at 1: how many responses are sampled is n"):
        respond(BestOfN(2, small_letters, inner), model, num_return_sequences=2)
    with pytest.raises(ValueError, match="max_length=9 is not taken here"):
        respond(BestOfN(2, small_letters, inner), model, max_length=9)
    with pytest.raises(ValueError, match="there are no prompts"):
        respond(BestOfN(2, small_letters, inner), model, [])
    assert inner.rows == []
    config = GenerationConfig(do_sample=True, max_new_tokens=3, eos_token_id=2, pad_token_id=0)
    assert len(BestOfN(2, small_letters).respond(model, TOKENIZER, PROMPTS, max_new_tokens=3, generation_config=config).responses) == len(PROMPTS)
    greedy = BestOfN(1, small_letters).respond(model, TOKENIZER, PROMPTS, max_new_tokens=3).responses
    assert greedy == generate_batch(model, TOKENIZER, PROMPTS, max_new_tokens=3).responses


def test_its_own_sampling_takes_the_place_of_the_comparison_s(model):
    sampled = respond(BestOfN(3, small_letters), model)
    found = respond(BestOfN(3, small_letters, sampling={"do_sample": True, "top_k": 0}), model, do_sample=False)
    assert found.responses == sampled.responses


def test_responses_of_another_sampling_are_not_taken_for_these():
    cooler = BestOfN(3, small_letters, sampling={"do_sample": True, "temperature": 0.5})
    assert cooler.identity != BestOfN(3, small_letters).identity
    assert cooler.identity == BestOfN(3, small_letters, sampling={"do_sample": True, "temperature": 0.5}).identity


def test_a_reward_that_is_none_is_found(model):
    with pytest.raises(ValueError, match=r"returned NaN or infinity for responses \[1\]"):
        respond(BestOfN(2, lambda prompts, responses: [0.0, math.nan]), model, ["or"])


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((0, len), {}, ValueError, "n must be an integer of at least 1, found 0"),
        ((True, len), {}, TypeError, "n must be an integer, found True"),
        ((2, len), {"rows_at_once": 0}, ValueError, "rows_at_once must be an integer of at least 1, found 0"),
        ((2, 3), {}, TypeError, "reward must be a callable"),
        ((2, len, "RE-Control"), {}, TypeError, "inner must be a method, found str"),
        ((2, len, BestOfN(2, len)), {}, ValueError, r"best-of-n \(samples 2\) chooses between responses on its own"),
    ],
)
def test_what_is_no_best_of_n_is_refused_when_it_is_made(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        BestOfN(*arguments, **keywords)


def test_what_it_says_of_itself():
    inner = ReControl(rc.Control(value(64), 0.5, 30))
    assert BestOfN(4, len).label == "best-of-n (samples 4)"
    method = BestOfN(4, len, inner)
    assert method.label == "best-of-n + RE-Control (samples 4, alpha 0.5, n 30)"
    assert method.training == inner.training and BestOfN(4, len).training.parameters == 0
    states = torch.randn(2, 32, dtype=torch.float64)
    assert torch.equal(method.edit(states), inner.edit(states)) and BestOfN(4, len).edit(states) is None
    assert method.divergence is None
    assert BestOfN(4, len, rows_at_once=2).identity != BestOfN(4, len).identity != BestOfN(4, len, head_weights=[1.0]).identity


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_divergence_is_that_of_many_improbable_responses_and_a_bound_for_few(n):
    def exact(outcomes):
        """Of the best of n draws from equally probable outcomes with different rewards, to one draw."""
        ranks = torch.arange(outcomes + 1, dtype=torch.float64) / outcomes
        best = (ranks**n).diff()
        return float((best * (best * outcomes).clamp(min=1e-300).log()).sum())

    bound = BestOfN(n, len).divergence
    assert bound == pytest.approx(exact(100_000), abs=1e-3)
    assert exact(3) <= bound + 1e-12 and (n == 1 or exact(3) < bound - 1e-3)
