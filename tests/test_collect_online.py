from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recontrol.data.collect import collect
from recontrol.data.online import OnlineRollouts

EXAMPLE = Path(__file__).parent.parent / "examples" / "movie_reviews"
PROMPTS = ["a film", "a very long story about the film that we saw", "it was", "the actors are good", "one"]
SAMPLING = {"max_new_tokens": 6, "num_samples": 2, "do_sample": True, "temperature": 1.0, "seed": 3}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE / "lm")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 8192, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=128)).to(torch.bfloat16).eval()


def random_scores(prompts, responses):
    """Its numbers follow from the seed of the batch."""
    return torch.randn(len(responses), 2)


def shards_of(rollouts, batches):
    """The responses of a folder, by shard."""
    start = 0
    for batch in batches:
        yield rollouts.batch(range(start, start + len(batch.lengths)))
        start += len(batch.lengths)
    assert start == len(rollouts)


@pytest.mark.parametrize("packing", [{"batch_size": 2}, {"cache_budget": 20_000}])
def test_batches_are_the_shards_that_collect_would_write(model, tokenizer, tmp_path, packing):
    online = OnlineRollouts(model, tokenizer, PROMPTS, random_scores, **SAMPLING, **packing)
    batches = list(online)
    rollouts = collect(model, tokenizer, PROMPTS, random_scores, tmp_path / "r", progress=False, **SAMPLING, **packing)
    assert len(online) == len(batches) == rollouts.manifest["num_shards"] > 1
    for found, wanted in zip(batches, shards_of(rollouts, batches), strict=True):
        assert found.states.dtype == wanted.states.dtype == torch.bfloat16
        for name in ("states", "lengths", "rewards"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert online.hidden_size == rollouts.hidden_size == 32
    manifest = {name: entry for name, entry in rollouts.manifest.items() if name in online.settings}
    assert manifest == online.settings


def test_later_passes_have_other_responses_and_any_batch_can_be_the_first(model, tokenizer):
    online = OnlineRollouts(model, tokenizer, PROMPTS, random_scores, batch_size=3, **SAMPLING)
    first = list(islice(online.batches(), 5))
    assert not torch.equal(first[0].rewards, first[2].rewards)
    for found, wanted in zip(online.batches(start=3, stop=5), first[3:], strict=True):
        assert torch.equal(found.states, wanted.states) and torch.equal(found.rewards, wanted.rewards)
    texts = [[record["prompt"] for record in scored.records] for scored in online.responses(0, 4)]
    assert texts[0] == texts[2] and texts[1] == texts[3] and texts[0] != texts[1]


def test_the_model_may_be_used_between_batches_and_is_left_as_it_was(model, tokenizer):
    wanted = list(OnlineRollouts(model, tokenizer, PROMPTS, random_scores, batch_size=3, **SAMPLING))
    model.train()
    try:
        found = []
        for batch in OnlineRollouts(model, tokenizer, PROMPTS, random_scores, batch_size=3, **SAMPLING):
            found.append(batch)
            torch.randn(3)
            model(torch.ones(1, 4, dtype=torch.int64))
        assert model.training and not model.lm_head._forward_pre_hooks
    finally:
        model.eval()
    assert all(torch.equal(one.states, other.states) for one, other in zip(found, wanted, strict=True))


def test_an_iterator_that_is_dropped_lets_go_of_the_model(model, tokenizer):
    batches = OnlineRollouts(model, tokenizer, PROMPTS, random_scores, batch_size=3, **SAMPLING).batches()
    next(batches)
    assert model.lm_head._forward_pre_hooks
    batches.close()
    assert not model.lm_head._forward_pre_hooks


def test_batches_without_responses_are_passed_over(model, tokenizer):
    free = next(OnlineRollouts(model, tokenizer, PROMPTS, random_scores, batch_size=1, max_new_tokens=2).responses())
    stop = free.records[0]["response"][:2]
    online = OnlineRollouts(model, tokenizer, PROMPTS[:1], random_scores, batch_size=1, max_new_tokens=2, stop_strings=[stop])
    assert list(online) == []
    assert [scored.left_out["empty"] for scored in online.responses(0, 1)] == [1]


def test_what_collect_refuses_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="no prompts"):
        OnlineRollouts(model, tokenizer, [], random_scores)
    with pytest.raises(ValueError, match=r"batch 0 \(prompts 0, 1\): .*found 1, wanted 2"):
        list(OnlineRollouts(model, tokenizer, PROMPTS[:2], lambda prompts, responses: [0.0], max_new_tokens=2))
