import pytest
from generating import TOKENIZER, double_llama

from recontrol.data.rollouts import Rollouts
from recontrol.decoding.batches import check_lengths, generate_batch
from recontrol.methods.prompting import INSTRUCTIONS, Prompting, best_examples

pytestmark = pytest.mark.usefixtures("one_thread")

HH = "\n\nHuman: Is it late?\n\nAssistant:"
SHP = "Human: Is it late?\nAssistant:"
EXAMPLE = ("\n\nHuman: Hi\n\nAssistant:", " Hello.")


@pytest.fixture
def rollouts(tmp_path):
    import torch

    def write(rewards, groups=None, responses=None, name="rollouts"):
        count = len(rewards)
        texts = [f" answer {index}" for index in range(count)] if responses is None else responses
        states = [torch.zeros(1, 2)] * count
        prompts = [f"question {group}" for group in (groups or range(count))]
        return Rollouts.write(tmp_path / name, states, rewards, prompts, texts, groups=groups, shard_size=2)

    return write


def test_the_prompt_stands_in_the_template_and_other_braces_are_text():
    method = Prompting('{"task": {prompt}, {0}}')
    assert method.write("{prompt}") == '{"task": {prompt}, {0}}' and method.write("x") == '{"task": x, {0}}'


def test_examples_stand_before_the_prompt():
    method = Prompting("Reviews.\n\n{prompt}", [("I liked", " it."), ("It was", " good.\n\n")])
    assert method.write("The film") == "Reviews.\n\nI liked it.\n\nIt was good.\n\nThe film"
    assert Prompting("Q: {prompt}\nA:", [("1+1", "=2")], separator="\n").write("2+2") == "Q: 1+1=2\n2+2\nA:"
    assert Prompting(examples=[("a", "b")], separator="").write("c") == "abc"
    # Nothing of the prompt is lost where nothing stands twice.
    assert Prompting("Go on:{prompt}").write("\n\nso") == "Go on:\n\nso"


@pytest.mark.parametrize("goal", INSTRUCTIONS)
def test_an_instruction_comes_before_a_dialogue(goal):
    method = Prompting.for_dialogues(goal)
    assert method.write(HH) == INSTRUCTIONS[goal] + HH
    assert method.write(SHP) == f"{INSTRUCTIONS[goal]}\n\n{SHP}"
    assert Prompting.for_dialogues(goal, [EXAMPLE]).write(HH) == f"{INSTRUCTIONS[goal]}{EXAMPLE[0]} Hello.{HH}"
    assert method.label == f"prompting (template {goal})"
    # What would be taken for a turn of the dialogue.
    assert "Human" not in INSTRUCTIONS[goal] and "Assistant:" not in INSTRUCTIONS[goal]


def test_the_instructions_are_three_and_another_goal_is_refused():
    assert len(set(INSTRUCTIONS.values())) == 3
    assert Prompting.for_dialogues() == Prompting.for_dialogues("helpful and harmless") != Prompting.for_dialogues("helpful")
    with pytest.raises(ValueError, match="unknown goal 'witty'; choose one of 'helpful', 'harmless', 'helpful and harmless'"):
        Prompting.for_dialogues("witty")


def test_tables_show_few_words_and_the_identity_has_all():
    long = Prompting("word\n" * 20 + "{prompt}", [EXAMPLE])
    other = Prompting("word\n" * 21 + "{prompt}", [EXAMPLE])
    assert long.settings == {"template": "word " * 8 + "...", "examples": 1} == other.settings
    assert long.identity == [long.template, [list(EXAMPLE)], "\n\n"] != other.identity
    assert Prompting(examples=[EXAMPLE]).label == "prompting (examples 1)"
    assert Prompting("Short: {prompt}").label == "prompting (template Short: {prompt})"
    assert Prompting("Short: {prompt}", name="short").label == "prompting (template short)"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("no place",), ValueError, "exactly once, found it 0 times in 'no place'"),
        (("{prompt} {prompt}",), ValueError, "found it 2 times"),
        ((), ValueError, "neither a template nor examples"),
        ((3,), TypeError, "template must be a text, found int"),
        (("{prompt}", [("a", "b"), "ab"]), ValueError, r"example 1 must be a pair of texts \(prompt, response\), found 'ab'"),
        (("{prompt}", [("a", "b", "c")]), ValueError, "example 0 must be a pair of texts"),
        (("{prompt}", [("a", 1)]), ValueError, "example 0 must be a pair of texts"),
        (("{prompt}", [("ask", " \n")]), ValueError, "example 0 has a blank response, to the prompt 'ask'"),
    ],
)
def test_what_is_no_prompting_is_refused_when_it_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        Prompting(*arguments)


def test_the_model_reads_what_was_written():
    model = double_llama()
    method = Prompting("Say: {prompt}")
    found = method.respond(model, TOKENIZER, ["or", "to be"], max_new_tokens=6).responses
    assert found == generate_batch(model, TOKENIZER, ["Say: or", "Say: to be"], max_new_tokens=6).responses
    assert found != generate_batch(model, TOKENIZER, ["or", "to be"], max_new_tokens=6).responses
    # Before any work, by what a comparison asks.
    check_lengths(model, TOKENIZER, ["x" * 56], 6)
    with pytest.raises(ValueError, match=r"leave no room for 6 new tokens in a context of 64: 0 \(61 tokens\)"):
        check_lengths(model, TOKENIZER, [method.write("x" * 56)], 6)


def test_the_best_response_of_each_of_the_best_prompts_is_an_example(rollouts):
    stored = rollouts([0.1, 0.9, 0.8, 0.2, 0.9, -1.0], groups=[0, 1, 1, 2, 3, 3])
    expected = [("question 2", " answer 3"), ("question 3", " answer 4"), ("question 1", " answer 1")]
    assert best_examples(stored) == expected == best_examples(stored.path)
    assert best_examples(stored, 1) == expected[-1:]
    assert Prompting(examples=best_examples(stored, 2)).write("?") == "question 3 answer 4\n\nquestion 1 answer 1\n\n?"


def test_several_rewards_want_weights(rollouts):
    stored = rollouts([[1.0, 0.0], [0.0, 3.0], [2.0, 0.5]])
    assert best_examples(stored, 1, head_weights=[1, 0]) == [("question 2", " answer 2")]
    assert best_examples(stored, 1, head_weights=[0.5, 1.0]) == [("question 1", " answer 1")]
    with pytest.raises(ValueError, match="found 2 rewards a response: give head_weights, 2 numbers"):
        best_examples(stored, 1)
    with pytest.raises(ValueError, match="head_weights must be 2 numbers, one a reward, found 1"):
        best_examples(stored, 1, head_weights=[1.0])
    with pytest.raises(ValueError, match="head_weights must be finite"):
        best_examples(stored, 1, head_weights=[1.0, float("nan")])


def test_examples_that_are_not_there_are_refused(rollouts):
    stored = rollouts([1.0, 2.0, 3.0], groups=[0, 0, 1])
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"count must be from 1 to 2, the prompts of .*, found {count}"):
            best_examples(stored, count)
    silent = rollouts([1.0, 2.0], responses=["", ""], name="silent")
    with pytest.raises(ValueError, match=r"the responses \[1\] of .*, which are among the best, have no text"):
        best_examples(silent, 1)
