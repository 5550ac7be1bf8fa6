"""More than a hundred requests under random controls: each gets what it gets alone, and nothing of them is left."""

import gc
import random

import pytest
import torch
from controlled import hooks_on, llama
from generating import BATCHINGS, PROMPTS, alone, decoding_threads, double_llama, generate, value

import recontrol as rc

pytestmark = pytest.mark.usefixtures("one_thread", "quick_collection")

REQUESTS, ANSWERS = 120, 40
# So few blocks that requests wait, and that some are put out of the cache and come back.
CROWDED = {"continuous": {"batch_size": 12, "cache_budget": 48 * 4 * 512, "block_tokens": 4}, "static": {"batch_size": 12}}


@pytest.fixture(scope="module")
def model():
    return double_llama()


@pytest.fixture(scope="module")
def requests(model):
    """Prompts, their controls, and what each gets alone, in random order; no two controls of a prompt make it say the same."""
    choose = random.Random(0)
    bank = [value(64), value(64, 32, seed=2), 0.7 * value(48, seed=3) + 2 * value(16, seed=4), value(48, heads=2, seed=5)]
    known = {}
    while len(known) < ANSWERS:
        prompt, control = choose.choice(PROMPTS), random_control(choose, bank)
        answer = alone(model, prompt, control)
        known.setdefault((prompt, tuple(answer)), (prompt, control, answer))
    found = [*known.values()] * (REQUESTS // ANSWERS)
    choose.shuffle(found)
    return found


def random_control(choose, bank):
    if choose.random() < 0.1:
        return None
    chosen = choose.choice(bank)
    return rc.Control(
        chosen,
        choose.uniform(1, 5),
        choose.randint(1, 20),
        radius=choose.choice([None, choose.uniform(0.5, 3)]),
        target=choose.choice([None, choose.uniform(-2, 2)]),
        head_weights=None if chosen.num_heads == 1 else [choose.uniform(-2, 2) for _ in range(chosen.num_heads)],
    )


def asked(requests):
    return [prompt for prompt, _, _ in requests], [control for _, control, _ in requests]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_each_of_many_requests_gets_what_it_gets_alone(batching, model, requests):
    responses = generate(model, *asked(requests), batching=batching, **CROWDED[batching])
    assert [response.token_ids for response in responses] == [answer for _, _, answer in requests]


def leave(model, requests, batching, after):
    """Close a stream after so many tokens, and look at what came until then."""
    found = [[] for _ in requests]
    stream = generate(model, *asked(requests), batching=batching, stream=True, **CROWDED[batching])
    for _, token in zip(range(after), stream, strict=False):
        if token.token_id is not None:
            found[token.index].append(token.token_id)
    stream.close()
    assert hooks_on(model) == [] and decoding_threads() == []
    assert all(answer[: len(tokens)] == tokens for tokens, (_, _, answer) in zip(found, requests, strict=True))
    assert sum(map(len, found)) >= after // 2


def alive():
    """The tensors, and all objects that the garbage collector knows."""
    gc.collect()
    objects = gc.get_objects()
    return sum(issubclass(type(each), torch.Tensor) for each in objects), len(objects)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_nothing_is_left_of_streams_that_are_left_at_any_time(batching, model, requests):
    leave(model, requests, batching, 1)
    tensors, objects = alive()
    for after in (0, 1, 30, REQUESTS * 3):
        leave(model, requests, batching, after)
    assert alive()[0] == tensors
    # A request that left one object behind would have done so 4 times.
    assert alive()[1] - objects < REQUESTS


def too_long(prompts, controls):
    for place in (7, 90):
        prompts[place] = "long" * 20


def no_control(prompts, controls):
    controls[77] = {"step_size": 1.0}


def beyond(prompts, controls):
    controls[118] = rc.Control(controls[0].value, 1e39, 3)


def weights_beyond(prompts, controls):
    controls[3] = rc.Control(value(8, heads=2).float(), 1.0, 3, head_weights=[1.0, -1e39])


FAULTS = {
    too_long: (ValueError, r"2 prompts leave no room for 14 new tokens in a context of 64: 7 \(80 tokens\), 90 \(80 tokens\)"),
    no_control: (TypeError, "found dict at 77"),
    beyond: (ValueError, r"step_size must be within the range of float32, found 1e\+39 in the control of prompt 118"),
    weights_beyond: (ValueError, r"head_weights must be within the range of float32, found \(1.0, -1e\+39\) in the control of prompt 3"),
}


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_one_fault_among_many_requests_is_named_before_the_model_runs(batching, spoil):
    model = llama(initializer_range=0.5, vocab_size=98, eos_token_id=2, pad_token_id=0, max_position_embeddings=64)
    prompts, controls = PROMPTS * (REQUESTS // len(PROMPTS)), [rc.Control(value(8).float(), 1.0, 3)] * REQUESTS
    spoil(prompts, controls)
    calls = []
    spy = model.register_forward_pre_hook(lambda module, args: calls.append(0))
    error, message = FAULTS[spoil]
    with pytest.raises(error, match=message):
        generate(model, prompts, controls, batching=batching)
    spy.remove()
    assert calls == [] and hooks_on(model) == [] and decoding_threads() == []
