"""Every prompt gets the tokens that it gets alone, whatever its neighbours are and whatever becomes of them."""

import importlib

import pytest
import torch
from controlled import hooks_on, states_read
from generating import BATCHINGS, ENDING, NEW, PROMPTS, TOKENIZER, alone, continuous_only, decoding_threads, double_llama, generate, mixed_controls, value
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

import recontrol as rc
from recontrol.decoding import control_batch
from recontrol.generation import plan

pytestmark = pytest.mark.usefixtures("one_thread", "quick_collection")


@pytest.fixture(scope="module")
def model():
    return double_llama()


@pytest.fixture(scope="module")
def controls():
    return mixed_controls()


@pytest.fixture(scope="module")
def wanted(model, controls):
    return [alone(model, prompt, control) for prompt, control in zip(PROMPTS, controls, strict=True)]


def tokens(responses):
    return [response.token_ids for response in responses]


def test_the_controls_matter_and_the_lengths_differ(model, controls, wanted):
    free = [alone(model, prompt, None) for prompt in PROMPTS]
    assert [one != other for one, other in zip(free, wanted, strict=True)] == [control is not None and control.steps > 0 for control in controls]
    assert len({len(each) for each in wanted}) > 3


# Bytes of a token of this model: 2 layers * 2 heads * (8 + 8) numbers * 8 bytes.
TOKEN = 512
SITUATIONS = {
    "all at once": {},
    "more prompts than fit at once": {"batch_size": 3},
    "one at a time": {"batch_size": 1},
    "few blocks": {"cache_budget": 20 * 4 * TOKEN, "block_tokens": 4},
    "blocks of shared prefixes": {"block_tokens": 4},
    "traced": {"trace": True},
}


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("options", SITUATIONS.values(), ids=SITUATIONS)
def test_greedy_tokens_are_those_that_each_prompt_gets_alone(batching, options, model, controls, wanted):
    responses = generate(model, control=controls, batching=batching, **options)
    assert tokens(responses) == wanted
    assert {response.batching for response in responses} == {batching}
    assert [response.finish for response in responses] == ["eos" if each[-1] in ENDING else "length" for each in wanted]
    assert [response.text for response in responses] == [TOKENIZER.decode(each, skip_special_tokens=True) for each in wanted]


@continuous_only
def test_requests_that_were_put_out_of_the_cache_and_come_back(model, controls, wanted, monkeypatch):
    manager = importlib.import_module("transformers.generation.continuous_batching.offloading_manager").OffloadingManager
    if not hasattr(manager, "offload_requests"):
        pytest.skip("this release of transformers puts requests out elsewhere")
    offload, offloaded = manager.offload_requests, []
    monkeypatch.setattr(manager, "offload_requests", lambda self: offloaded.append(0) or offload(self))
    assert tokens(generate(model, control=controls, batching="continuous", cache_budget=16 * 4 * TOKEN, block_tokens=4, trace=True)) == wanted
    assert offloaded


@continuous_only
def test_prompts_that_go_through_the_model_in_pieces(model, controls, wanted, monkeypatch):
    # No more than twice the prompts at once, so that the longest prompt takes several steps.
    monkeypatch.setattr(plan, "BATCH_TOKENS", 4)
    assert tokens(generate(model, control=controls, batching="continuous", batch_size=4)) == wanted


def test_models_whose_output_embedding_reads_all_positions(model, controls, wanted, monkeypatch):
    """So do all in the releases of transformers before 5.10."""
    monkeypatch.setattr(type(model), "_supports_logits_to_keep", lambda self: False)
    for batching in BATCHINGS:
        assert tokens(generate(model, control=controls, batching=batching, batch_size=4)) == wanted


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"cache_budget": 16 * 4 * TOKEN, "block_tokens": 4}])
def test_only_states_that_are_read_to_sample_a_token_are_edited(batching, options, model, controls, wanted, monkeypatch):
    """Neither those of the prompt, nor of padding, nor of finished rows, nor of prompts without control: they cost nothing."""
    rows = []
    climb = control_batch.ascend
    monkeypatch.setattr(control_batch, "ascend", lambda hidden, *rest, **keywords: rows.append(len(hidden)) or climb(hidden, *rest, **keywords))
    generate(model, control=controls, batching=batching, **options)
    # One call for each kind of control, when the hooks are put in place.
    groups = 6
    assert rows[:groups] == [1] * groups
    assert sum(rows[groups:]) == sum(len(each) for each, control in zip(wanted, controls, strict=True) if control is not None and control.steps)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_one_value_function_is_climbed_once_a_step(batching, model, monkeypatch):
    shared = value(64)
    calls = []
    climb = control_batch.ascend
    monkeypatch.setattr(control_batch, "ascend", lambda hidden, *rest, **keywords: calls.append(len(hidden)) or climb(hidden, *rest, **keywords))
    controls = [rc.Control(shared, 0.1 * index, index) for index in range(1, 9)]
    with states_read(model) as read:
        generate(model, control=controls, batching=batching, max_new_tokens=3, eos_token_id=2, batch_size=8)
    # One when the hooks are put in place, where the model runs three times to prove that edits reach the logits.
    assert len(calls) - 1 == len(read) - 3 and sum(calls) == 1 + 3 * 8


@pytest.mark.parametrize("batching", BATCHINGS)
def test_one_control_for_all_and_none(batching, model):
    control = rc.Control(value(64), 3.0, 9)
    for given in (control, None):
        assert tokens(generate(model, PROMPTS[:3], given, batching=batching)) == [alone(model, prompt, given) for prompt in PROMPTS[:3]]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_prompts_may_be_token_ids(batching, model):
    ids = TOKENIZER(PROMPTS[:3]).input_ids
    given = [ids[0], torch.tensor(ids[1]), PROMPTS[2]]
    assert tokens(generate(model, given, batching=batching)) == [alone(model, prompt, None) for prompt in PROMPTS[:3]]


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=98, n_positions=64, bos_token_id=1, eos_token_id=2, initializer_range=0.5))


def sliding():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 98}
    return MistralForCausalLM(MistralConfig(**sizes, sliding_window=8, max_position_embeddings=64, pad_token_id=0, initializer_range=0.5))


@pytest.mark.parametrize("kind", [gpt2, sliding])
def test_other_models(kind, controls):
    model = kind().double().eval()
    wanted = [alone(model, prompt, control) for prompt, control in zip(PROMPTS, controls, strict=True)]
    assert tokens(generate(model, control=controls, batching="static", batch_size=4)) == wanted
    # Continuous, but for releases of transformers in which sliding windows are wrong there.
    assert tokens(generate(model, control=controls, batch_size=4)) == wanted


@pytest.mark.parametrize("batching", BATCHINGS)
def test_half_precision(batching):
    model = double_llama().bfloat16()
    control = rc.Control(value(64).bfloat16(), 3.0, 9)
    steered, free = (generate(model, control=given, batching=batching) for given in (control, None))
    assert tokens(steered) != tokens(free)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_stream_yields_tokens_as_they_come(batching, model, controls, wanted):
    found = [[] for _ in PROMPTS]
    responses = {}
    order = []
    for token in generate(model, control=controls, batching=batching, stream=True, trace=True):
        assert token.index not in responses
        order.append(token.index)
        if token.response is None:
            found[token.index].append(token.token_id)
        else:
            assert token.token_id is None
            responses[token.index] = token.response
    assert found == wanted == [responses[index].token_ids for index in range(len(PROMPTS))]
    # Not one prompt after the other.
    assert order != sorted(order)


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("stream", [False, True])
def test_responses_are_cut_at_stop_strings(batching, stream, model):
    free = generate(model, eos_token_id=2, max_new_tokens=NEW)
    # What comes in the middle of the second response.
    stop = free[1].text[5:7]
    kept = free[1].text.index(stop)
    responses = generate(model, eos_token_id=2, batching=batching, stop_strings=stop, stream=stream)
    if stream:
        finished = {token.index: token.response for token in responses if token.response is not None}
        responses = [finished[index] for index in range(len(PROMPTS))]
    assert (responses[1].text, responses[1].finish, len(responses[1].token_ids)) == (free[1].text[:kept], "stop", kept)
    assert [response.text for response in responses] == [each.text.split(stop)[0] for each in free]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_sampling_is_seeded_and_leaves_the_generators(batching, model, controls):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    options = {"control": controls, "batching": batching, "do_sample": True, "temperature": 0.9, "top_k": 50}
    first, again, other = (generate(model, seed=seed, **options) for seed in (0, 0, 1))
    assert tokens(first) == tokens(again) != tokens(other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_the_model_is_as_it_was(batching, model, controls):
    model.train()
    implementation, settings = model.config._attn_implementation, model.generation_config.to_dict()
    generate(model, control=controls, batching=batching, trace=True)
    assert hooks_on(model) == [] and model.training and decoding_threads() == []
    assert (model.config._attn_implementation, model.generation_config.to_dict()) == (implementation, settings)
    model.eval()
