"""How much cache a generation takes, and how many prompts fit."""

import pytest
import torch
from transformers import LlamaConfig

from recontrol.generation import plan as planning
from recontrol.generation.plan import batches_of, free_bytes, make_plan, tells_its_cache

CONFIG = LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2)
# 3 layers * 2 heads * (8 + 8) numbers * 2 bytes.
PER_TOKEN = 192
LENGTHS = [10, 20, 33, 64, 5]


def plan(lengths=LENGTHS, **options):
    return make_plan(CONFIG, torch.bfloat16, lengths, **{"cache_budget": 16 * PER_TOKEN * 8, "block_tokens": 16, **options})


def test_blocks_follow_from_the_budget():
    made = plan()
    assert (made.bytes_per_token, made.block_bytes, made.blocks) == (PER_TOKEN, 16 * PER_TOKEN, 8)
    assert made.blocks_needed == [1, 2, 3, 4, 1]
    # 8 blocks: two prompts of 4 blocks, or three of 11 / 5.
    assert (made.longest_at_once, made.average_at_once) == (2, 3)
    assert made.checked() is made


def test_no_more_blocks_than_the_prompts_at_once_can_need():
    assert plan(cache_budget="1GB").blocks == 11
    assert plan(cache_budget="1GB", batch_size=2).blocks == 7
    assert plan(cache_budget="1GB", batch_size=2).average_at_once == 2


def test_static_batches_are_the_longest_first_and_fit():
    made = plan(cache_budget=66 * PER_TOKEN)
    assert made.static_batches() == [[3], [1, 2], [0, 4]]
    assert plan(cache_budget="1GB", batch_size=2).static_batches() == [[2, 3], [0, 1], [4]]


def test_prompts_that_never_fit_are_named():
    with pytest.raises(ValueError, match=r"1 prompts do not fit into 3 blocks of 16 tokens even alone: 3 \(64 tokens\); give a larger cache_budget"):
        plan(cache_budget=3 * 16 * PER_TOKEN).checked()


def test_in_words():
    words = str(plan())
    for line in (
        f"cache of a token: {PER_TOKEN} bytes over all layers",
        f"budget:           {16 * PER_TOKEN * 8} bytes, 128 tokens",
        "prompts:          5, the longest 64 tokens with its response, all 132 tokens",
        f"blocks:           8 of 16 tokens ({16 * PER_TOKEN} bytes each); all prompts at once need 11",
        "at once:          2 as long as the longest, 3 of average length, 5 at most",
        # Of 64 tokens there fit 2, and of 20 the other 3: 2 * 64 + 3 * 20 = 188 tokens for 132.
        "static batches:   2, the largest of 3 prompts; 30% of their cache is padding",
    ):
        assert line in words.splitlines()


def test_defaults(monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda device: 2000 * PER_TOKEN)
    made = plan([900] * 40, cache_budget=None, block_tokens=None)
    assert (made.budget, made.block_tokens, made.blocks, made.batch_size) == (1000 * PER_TOKEN, 16, 62, 32)
    on_gpu = plan([900] * 40, cache_budget=None, block_tokens=None, device="cuda:1")
    assert (on_gpu.block_tokens, on_gpu.batch_size) == (256, 40)
    # A batch has room for a token of every prompt.
    assert plan([9] * 3000, batch_size=3000).batch_tokens >= 3000


def test_there_is_memory():
    assert free_bytes("cpu") > 1_000_000


REFUSED = {
    "no prompts": ({"lengths": []}, "there are no prompts to plan for"),
    "no rows": ({"batch_size": 0}, "batch_size must be an integer of at least 1, found 0"),
    "tiny blocks": ({"block_tokens": 2}, "block_tokens must be an integer of at least 4, found 2"),
    "half a block": ({"cache_budget": 16 * PER_TOKEN - 1}, "a cache budget of 3071 bytes is less than one block of 16 tokens, 3072 bytes"),
    "no size": ({"cache_budget": "much"}, 'a size is a number of bytes or a text such as "8GiB"'),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_planned_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_without_a_known_cache_there_is_a_number_of_prompts():
    class Recurrent:
        def get_text_config(self, decoder=None):
            return self

    assert tells_its_cache(CONFIG) and not tells_its_cache(Recurrent())
    assert batches_of([3, 9, 5], 2) == [[1, 2], [0]]
    assert [len(batch) for batch in batches_of([4] * 70, None)] == [32, 32, 6]
