from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from recontrol.data.rewards import RewardModel, as_reward, checked_rewards, reward_name

REWARD = Path(__file__).parent.parent / "examples" / "movie_reviews" / "reward"
PROMPTS = ["I saw this movie with my", "The", "Wow, I can't believe people consider"]
RESPONSES = [" wife and we loved every minute of it, wonderful.", " worst film I have ever seen. Awful, boring, stupid.", " this good"]


@pytest.fixture(scope="module")
def pair():
    return AutoModelForSequenceClassification.from_pretrained(REWARD, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(REWARD)


def one_by_one(pair, texts, max_length=512):
    model, tokenizer = pair
    rows = [tokenizer(text).input_ids for text in texts]
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row[:1] + row[1:][-(max_length - 1) :]])).logits for row in rows])


def test_prompt_and_response_are_scored_together(pair):
    scores = RewardModel(*pair)(PROMPTS, RESPONSES)
    alone = one_by_one(pair, [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)])[:, 0]
    torch.testing.assert_close(torch.tensor(scores), alone, rtol=1e-5, atol=1e-5)
    assert scores[0] > 0 > scores[1]
    assert RewardModel(*pair)(PROMPTS[::-1], RESPONSES) != scores


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_padding_does_not_change_a_score(pair, batch_size):
    scores = RewardModel(*pair, batch_size=batch_size)(PROMPTS, RESPONSES)
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(RewardModel(*pair, batch_size=1)(PROMPTS, RESPONSES)), rtol=1e-5, atol=1e-5)


def test_a_long_text_loses_its_beginning(pair):
    prompt, response = "good " * 600, "terrible " * 20
    alone = one_by_one(pair, [prompt + response])
    assert torch.equal(torch.tensor(RewardModel(*pair)([prompt], [response])), alone[:, 0])
    short = RewardModel(*pair, max_length=12)([prompt], [response])
    assert torch.equal(torch.tensor(short), one_by_one(pair, [prompt + response], max_length=12)[:, 0])
    assert short[0] < alone[0, 0]


def test_the_tokenizer_and_the_mode_of_the_model_are_left_alone(pair):
    model, tokenizer = pair
    tokenizer.padding_side = "left"
    before = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token)
    model.train()
    try:
        RewardModel(model, tokenizer)(PROMPTS, RESPONSES)
        assert model.training
    finally:
        model.eval()
    assert (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token) == before


def small_classifier(labels, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=8192, num_labels=labels, **sizes, **config)).eval()


def test_several_labels_are_several_rewards(pair):
    scores = RewardModel(small_classifier(3, pad_token_id=0), pair[1])(PROMPTS, RESPONSES)
    assert [len(row) for row in scores] == [3, 3, 3]
    assert checked_rewards(RewardModel(small_classifier(3, pad_token_id=0), pair[1]), PROMPTS, RESPONSES).shape == (3, 3)


@pytest.mark.parametrize("pad", [None, 5])
def test_a_model_without_padding_token_or_with_another_one_scores_the_same(pair, pad):
    wanted = RewardModel(small_classifier(1, pad_token_id=0), pair[1])(PROMPTS, RESPONSES)
    found = RewardModel(small_classifier(1, pad_token_id=pad), pair[1])(PROMPTS, RESPONSES)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_from_pretrained_keeps_the_dtype_of_the_file():
    reward = RewardModel.from_pretrained(REWARD, batch_size=2)
    assert reward.model.dtype == torch.bfloat16 and reward.batch_size == 2
    assert reward.name == str(REWARD)
    assert all(isinstance(score, float) for score in reward(PROMPTS, RESPONSES))


def test_as_reward_takes_what_a_user_has(pair):
    def length(prompts, responses):
        return [len(response) for response in responses]

    assert as_reward(length) is length
    assert reward_name(length).endswith("length")
    model = RewardModel(*pair)
    assert as_reward(model) is model
    assert as_reward(pair)(PROMPTS, RESPONSES) == model(PROMPTS, RESPONSES)
    assert reward_name(as_reward(str(REWARD))) == str(REWARD)
    with pytest.raises(TypeError, match="found LlamaForSequenceClassification"):
        as_reward(pair[0])
    with pytest.raises(TypeError, match="found float"):
        as_reward(1.0)


@pytest.mark.parametrize(
    "scores",
    [
        [1.0, 2.0, 3.0],
        [1, 2, 3],
        [[1.0], [2.0], [3.0]],
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([1.0, 2.0, 3.0]).numpy(),
        [torch.tensor(1.0), torch.tensor(2.0), torch.tensor([3.0])],
        (score for score in (1.0, 2.0, 3.0)),
    ],
)
def test_scores_in_every_form(scores):
    found = checked_rewards(lambda prompts, responses: scores, PROMPTS, RESPONSES)
    assert found.dtype == torch.float32 and torch.equal(found, torch.tensor([[1.0], [2.0], [3.0]]))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, float("nan"), float("inf")], r"NaN or infinity for responses \[1, 2\]"),
        ([[1.0, 2.0], [1.0, 2.0], [1.0, float("nan")]], r"NaN or infinity for responses \[2\]"),
        ([1.0, 2.0], "found 2, wanted 3"),
        ([], "found 0, wanted 3"),
        (torch.zeros(4, 1), "found 4, wanted 3"),
        (1.0, "found float, wanted 3 scores"),
        (None, "found NoneType, wanted 3 scores"),
        ([[1.0], [1.0, 2.0], [1.0]], r"same number of scores.*\[1, 2, 1\]"),
        ([[], [], []], "at least 1"),
        ([1.0, None, 2.0], "must return numbers"),
        (["good", "bad", "good"], "must return numbers"),
    ],
)
def test_broken_scores_are_named(scores, message):
    with pytest.raises(ValueError, match=message):
        checked_rewards(lambda prompts, responses: scores, PROMPTS, RESPONSES)


def test_sizes_must_be_positive(pair):
    with pytest.raises(ValueError, match="at least 1, found 0"):
        RewardModel(*pair, batch_size=0)
