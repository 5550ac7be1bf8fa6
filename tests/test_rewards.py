"""Rewards: sequence classifiers, functions, several at once, and what they may return."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from recontrol.data.collect import collect
from recontrol.data.rewards import CombinedReward, RewardModel, as_reward, checked_rewards, reward_name

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.mark.parametrize("tokenizers_own", [None, "<|eos|>"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_without_padding_token_the_last_token_is_read_even_where_it_ends_the_text(pair, tokenizers_own, batch_size):
    model, tokenizer = small_classifier(1), AutoTokenizer.from_pretrained(REWARD)
    assert model.config.pad_token_id is None
    tokenizer.pad_token = tokenizer.eos_token if tokenizers_own else None
    texts = [f"{prompt}{response}{tokenizer.eos_token}" for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    found = RewardModel(model, tokenizer, batch_size, template="{prompt}{response}" + tokenizer.eos_token)(PROMPTS, RESPONSES)
    torch.testing.assert_close(torch.tensor(found), one_by_one((model, tokenizer), texts)[:, 0], rtol=1e-5, atol=1e-5)
    assert model.config.pad_token_id is None


def test_what_loads_the_model_loads_the_tokenizer(monkeypatch):
    asked = {}
    load = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **keywords: asked.update(keywords) or load(name))
    RewardModel.from_pretrained(REWARD, revision="main", token=False, local_files_only=True, attn_implementation="eager")
    assert asked == {"revision": "main", "token": False, "local_files_only": True}


def test_a_text_that_is_cut_is_said_once(pair, caplog):
    reward = RewardModel(*pair, max_length=12)
    for _ in range(2):
        reward(PROMPTS[:2], ["good " * 20, ""])
    assert caplog.text.count("lost their beginning") == 1 and "1 of 2 texts lost their beginning" in caplog.text


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
        (["12", "3", "4"], "must return numbers: found '12'"),
        ([b"12", b"3", b"4"], "must return numbers: found b'12'"),
        ("123", "found str, wanted 3 scores"),
        ({"a": 1, "b": 2, "c": 3}, "found dict, wanted 3 scores"),
        ([{1.0}, {2.0}, {3.0}], "must return numbers"),
        ([[[1.0]], [[2.0]], [[3.0]]], "must return numbers"),
        (torch.zeros(3, 1, 1).numpy(), "must return numbers"),
    ],
)
def test_broken_scores_are_named(scores, message):
    with pytest.raises(ValueError, match=message):
        checked_rewards(lambda prompts, responses: scores, PROMPTS, RESPONSES)


def test_sizes_must_be_positive(pair):
    with pytest.raises(ValueError, match="at least 1, found 0"):
        RewardModel(*pair, batch_size=0)


def test_a_checkpoint_without_a_head_is_refused(pair, tmp_path):
    """Transformers would fill the head with random numbers, and every reward would be noise."""
    LlamaForCausalLM(small_classifier(1, pad_token_id=0).config).save_pretrained(tmp_path)
    pair[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no reward model: its checkpoint has no weights for score\.weight, which would be random numbers"):
        RewardModel.from_pretrained(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(pair):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=100, num_labels=1, pad_token_id=0, **sizes))
    with pytest.raises(ValueError, match=r"makes token \d+, the model has 100: it is another model's"):
        RewardModel(model, pair[1])(PROMPTS, RESPONSES)


class TestTemplates:
    QUESTION = "Who are you?"

    def text_read(self, pair, template, prompt, response, tokenizer=None):
        """What reaches the tokenizer."""
        seen = []
        reward = RewardModel(pair[0], tokenizer or pair[1], template=template)
        original = reward.tokenizer

        def spy(batch, **options):
            seen.extend(batch)
            return original(batch, **options)

        spy.apply_chat_template, spy.bos_token, spy.bos_token_id = original.apply_chat_template, original.bos_token, original.bos_token_id
        reward.tokenizer = spy
        reward([prompt], [response])
        return seen[0]

    def test_fields_are_filled_in(self, pair):
        template = "Human: {prompt}\nAssistant: {response}"
        assert self.text_read(pair, template, self.QUESTION, " A {model}.") == "Human: Who are you?\nAssistant: A {model}."
        assert self.text_read(pair, None, self.QUESTION, " A model.") == "Who are you? A model."

    def test_a_dialogue_that_has_its_marks_is_left_as_it_is(self, pair):
        template, dialogue = "Human: {prompt}\nAssistant: {response}", "\n\nHuman: Who are you?\n\nAssistant:"
        assert self.text_read(pair, template, dialogue, " A model.") == dialogue + " A model."
        assert self.text_read(pair, template, "Human: Who?\nAssistant:", " Me.") == "Human: Who?\nAssistant: Me."

    def test_chat_template(self, pair):
        tokenizer = AutoTokenizer.from_pretrained(REWARD)
        tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        written = self.text_read(pair, "chat", self.QUESTION, " A model.", tokenizer)
        # One beginning of sequence, from wherever it comes.
        assert tokenizer(written).input_ids.count(tokenizer.bos_token_id) == 1
        assert written.removeprefix(tokenizer.bos_token) == "<user>Who are you?<assistant>A model."
        dialogue = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who are you?\n\nAssistant:"
        written = self.text_read(pair, "chat", dialogue, " A model.", tokenizer)
        assert written.removeprefix(tokenizer.bos_token) == "<user>Hi<assistant>Hello.<user>Who are you?<assistant>A model."

    @pytest.mark.parametrize("template", ["{prompt}", "{response}", "", "{prompt}{response}{score}", "{prompt}{response", "{prompt}{}{response}"])
    def test_templates_that_cannot_be_filled_in(self, pair, template):
        with pytest.raises(ValueError, match=r"template of the reward model must have \{prompt\} and \{response\} in it"):
            RewardModel(*pair, template=template)

    def test_no_chat_template(self, pair):
        with pytest.raises(ValueError, match="has no chat template"):
            RewardModel(*pair, template="chat")

    def test_the_name_tells_templates_apart(self, pair):
        assert RewardModel(*pair).name == str(REWARD)
        assert RewardModel(*pair, template="{prompt} {response}").name == f"{REWARD}, template '{{prompt}} {{response}}'"


def length(prompts, responses):
    return [len(response) for response in responses]


def letters(prompts, responses):
    return [[response.count("e"), prompt.count("e")] for prompt, response in zip(prompts, responses, strict=True)]


letters.head_names = ["e in the response", "e in the prompt"]


class TestSeveralRewards:
    def test_a_list_becomes_heads_side_by_side(self, pair):
        model = RewardModel(*pair)
        reward = as_reward([length, model, letters])
        table = checked_rewards(reward, PROMPTS, RESPONSES)
        assert torch.equal(table[:, 0], torch.tensor([float(len(response)) for response in RESPONSES]))
        assert torch.equal(table[:, 1], torch.tensor(model(PROMPTS, RESPONSES)))
        assert torch.equal(table[:, 2:], torch.tensor(letters(PROMPTS, RESPONSES)).float())
        assert reward_name(reward) == ["length", str(REWARD), "e in the response", "e in the prompt"]

    def test_a_dictionary_names_them(self, pair):
        reward = as_reward({"long": length, "counts": letters})
        assert reward_name(reward) == ["long: length", "counts: e in the response", "counts: e in the prompt"]
        assert checked_rewards(reward, PROMPTS, RESPONSES).shape == (3, 3)

    def test_equal_names_are_numbered(self):
        assert reward_name(as_reward([length, length, length])) == ["length", "length (2)", "length (3)"]

    def test_a_list_of_one_is_that_reward(self):
        assert reward_name(as_reward([length])) == "length"
        assert torch.equal(checked_rewards(as_reward([length]), PROMPTS, RESPONSES), checked_rewards(length, PROMPTS, RESPONSES))

    def test_labels_of_a_classifier_are_heads_with_names(self, pair):
        model = RewardModel(small_classifier(3, pad_token_id=0), pair[1])
        reward = as_reward([length, model])
        assert [name.split(": ")[-1] for name in reward_name(reward)] == ["length", "LABEL_0", "LABEL_1", "LABEL_2"]
        assert checked_rewards(reward, PROMPTS, RESPONSES).shape == (3, 4)

    def test_no_responses(self, pair):
        assert checked_rewards(as_reward([length, RewardModel(*pair), letters]), [], []).shape[0] == 0

    @pytest.mark.parametrize(
        "second,message",
        [
            (lambda prompts, responses: [1.0, 2.0, float("nan")], r"reward '.*<lambda>': the reward returned NaN or infinity for responses \[2\]"),
            (lambda prompts, responses: [1.0], "reward '.*<lambda>': .*found 1, wanted 3"),
            (lambda prompts, responses: [[1.0, 2.0]] * 3, "reward '.*<lambda>' returned 2 scores a response; among several rewards it must return one"),
        ],
        ids=["nan", "count", "width"],
    )
    def test_the_broken_one_is_named(self, second, message):
        with pytest.raises(ValueError, match=message):
            checked_rewards(as_reward([length, second]), PROMPTS, RESPONSES)

    def test_fewer_scores_than_names(self):
        def reward(prompts, responses):
            return [1.0] * len(responses)

        reward.head_names = ["a", "b"]
        with pytest.raises(ValueError, match=r"names 2 heads \(a, b\) and returned 1 scores a response"):
            checked_rewards(reward, PROMPTS, RESPONSES)
        with pytest.raises(ValueError, match=r"reward 'a': the reward names 2 heads"):
            checked_rewards(CombinedReward([reward, length]), PROMPTS, RESPONSES)

    @pytest.mark.parametrize("nothing", [[], {}, ()])
    def test_nothing(self, nothing):
        with pytest.raises(ValueError, match="empty list of rewards"):
            as_reward(nothing)

    def test_collecting_keeps_them_with_their_names(self, tmp_path):
        folder = REWARD.parent / "lm"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
        rollouts = collect(model, tokenizer, PROMPTS, {"long": length, "counts": letters}, tmp_path / "r", max_new_tokens=3, progress=False)
        assert rollouts.manifest["reward"] == ["long: length", "counts: e in the response", "counts: e in the prompt"]
        texts = [record["response"] for record in rollouts.records()]
        assert torch.equal(rollouts.rewards[:, 0], torch.tensor([float(len(text)) for text in texts]))
        assert torch.equal(rollouts.rewards[:, 2], torch.tensor([float(record["prompt"].count("e")) for record in rollouts.records()]))
