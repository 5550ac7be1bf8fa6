from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, FalconConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from recontrol.data.collect import collect
from recontrol.decoding.packing import byte_count, cache_bytes_per_token, pack_by_length

EXAMPLE = Path(__file__).parent.parent / "examples" / "movie_reviews"
LLAMA = {"vocab_size": 8192, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
# 3 layers, keys and values, 2 heads of 8 numbers.
NUMBERS_PER_TOKEN = 3 * 2 * 2 * 8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE / "lm")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, max_position_embeddings=512, eos_token_id=2)).double().eval()


def lengths_of(prompts, responses):
    return [float(len(response)) for response in responses]


def test_the_bytes_of_a_token_are_those_of_the_cache(model):
    with torch.no_grad():
        cache = model(torch.ones(1, 7, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes_per_token(model.config, model.dtype) * 7 == held


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (LlamaConfig(**LLAMA), NUMBERS_PER_TOKEN),
        (LlamaConfig(**LLAMA, head_dim=16), 2 * NUMBERS_PER_TOKEN),
        (LlamaConfig(**{**LLAMA, "num_key_value_heads": None}), 2 * NUMBERS_PER_TOKEN),
        (GPT2Config(n_embd=32, n_layer=3, n_head=4), 2 * NUMBERS_PER_TOKEN),
        (FalconConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, multi_query=True), NUMBERS_PER_TOKEN // 2),
        (FalconConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, new_decoder_architecture=True, num_kv_heads=2), NUMBERS_PER_TOKEN),
    ],
    ids=["grouped", "head size", "all heads", "GPT-2", "one head", "new Falcon"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_config_tells_the_sizes(config, numbers, dtype):
    assert cache_bytes_per_token(config, dtype) == numbers * dtype.itemsize


def test_a_config_without_sizes_is_refused():
    with pytest.raises(ValueError, match=r"num_hidden_layers=None.*use batch_size"):
        cache_bytes_per_token(PretrainedConfig(), torch.float32)


def test_batches_fit_are_sorted_and_hold_everything_once():
    lengths = torch.randint(1, 100, (257,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = pack_by_length(lengths, 1000, 2, rows_per_entry=2)
    assert sorted(place for batch in batches for place in batch) == list(range(257))
    for batch, following in zip(batches, [*batches[1:], []], strict=True):
        longest = max(lengths[place] for place in batch)
        assert 2 * 2 * len(batch) * longest <= 1000
        if following:
            assert min(lengths[place] for place in batch) >= max(lengths[place] for place in following)
            # As many as fit.
            assert 2 * 2 * (len(batch) + 1) * longest > 1000


def test_a_batch_has_no_more_entries_than_asked_for():
    assert [len(batch) for batch in pack_by_length([5] * 7, 10**9, 1, largest=3)] == [3, 3, 1]
    assert pack_by_length([5] * 7, 10**9, 1) == [[0, 1, 2, 3, 4, 5, 6]]


def test_entries_that_do_not_fit_alone_are_named():
    with pytest.raises(ValueError, match=r"2 entries does not fit into 100 bytes: 13, 11; the longest needs 2 rows \* 12 tokens \* 5 bytes = 120 bytes"):
        pack_by_length([3, 11, 2, 12], 100, 5, rows_per_entry=2, names=[10, 11, 12, 13])
    assert pack_by_length([], 100, 5) == []


@pytest.mark.parametrize(("size", "count"), [(7, 7), ("8GiB", 8 * 2**30), ("500MB", 500 * 10**6)])
def test_sizes_are_numbers_or_texts(size, count):
    assert byte_count(size) == count


@pytest.mark.parametrize("size", ["many", "", 0, -5])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="a size "):
        byte_count(size)


def test_collect_packs_by_length_and_greedy_responses_stay_the_same(model, tokenizer, tmp_path):
    prompts = ["a film", "a very long story about the film that we saw yesterday", "it was", "the actors of this film are good", "one"]
    plain = collect(model, tokenizer, prompts, lengths_of, tmp_path / "plain", max_new_tokens=4, progress=False)
    counts = [len(ids) for ids in tokenizer(prompts).input_ids]
    budget = 2 * (max(counts) + 4) * NUMBERS_PER_TOKEN * 8
    packed = collect(model, tokenizer, prompts, lengths_of, tmp_path / "packed", max_new_tokens=4, cache_budget=budget, progress=False)
    assert packed.manifest["cache_budget"] == budget and packed.manifest["batch_size"] is None and plain.manifest["batch_size"] == 16
    assert packed.manifest["num_shards"] == 2 and plain.manifest["num_shards"] == 1
    assert set(packed.groups[:2].tolist()) == set(sorted(range(5), key=lambda index: -counts[index])[:2])
    responses = {record["index"]: record["response"] for record in plain.records()}
    assert {record["index"]: record["response"] for record in packed.records()} == responses
    assert all(record["prompt"] == prompts[record["index"]] for record in packed.records())
    # The same call opens it.
    again = collect(model, tokenizer, prompts, lengths_of, tmp_path / "packed", max_new_tokens=4, cache_budget=budget, progress=False)
    assert torch.equal(again.lengths, packed.lengths)
    with pytest.raises(ValueError, match="another cache_budget"):
        collect(model, tokenizer, prompts, lengths_of, tmp_path / "packed", max_new_tokens=4, cache_budget=budget + 1, progress=False)


def test_a_budget_that_is_too_small_is_refused_before_any_work(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="1 entries does not fit into 1000 bytes: 0; the longest needs 3 rows"):
        options = {"max_new_tokens": 4, "num_samples": 3, "do_sample": True, "cache_budget": 1000, "progress": False}
        collect(model, tokenizer, ["a film"], lengths_of, tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


def test_prompts_that_repeat_are_responded_to_once(model, tokenizer, tmp_path, caplog):
    prompts = ["a film", "it was", "a film", "one", "it was", "a film"]
    once = collect(model, tokenizer, prompts, lengths_of, tmp_path / "once", max_new_tokens=3, progress=False)
    assert once.groups.tolist() == [0, 1, 3]
    assert once.manifest["num_prompts"] == 6 and once.manifest["duplicate_prompts"] == 3
    assert "3 of 6 prompts repeat others" in caplog.text
    each = collect(model, tokenizer, prompts, lengths_of, tmp_path / "each", max_new_tokens=3, unique_prompts=False, progress=False)
    assert each.groups.tolist() == [0, 1, 2, 3, 4, 5]


def test_responses_that_repeat_are_kept_once_on_request(model, tokenizer, tmp_path):
    # Of two tokens only, each response is one of few.
    options = {"max_new_tokens": 1, "num_samples": 6, "do_sample": True, "top_k": 2, "seed": 1, "progress": False}
    every = collect(model, tokenizer, ["a film", "it was"], lengths_of, tmp_path / "all", **options)
    assert len(every) == 12
    kept = collect(model, tokenizer, ["a film", "it was"], lengths_of, tmp_path / "unique", unique_responses=True, **options)
    ids = every.token_ids(range(12)).tolist()
    first = [place for place in range(12) if ids[place] not in ids[6 * (place // 6) : place]]
    assert len(first) < 12
    assert kept.token_ids(range(len(kept))).tolist() == [ids[place] for place in first]
    assert kept.groups.tolist() == [place // 6 for place in first]
    assert [record["sample"] for record in kept.records()] == [place % 6 for place in first]
    assert torch.equal(kept.batch(range(len(kept)))[0], every.batch(first)[0])
