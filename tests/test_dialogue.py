"""Prompts with turns: what a text tells of them, and what each reader writes from them."""

import copy
import json
import pickle

import pytest
import torch
from test_prompts import HH, write_lines
from test_rewards import REWARD, small_classifier
from transformers import AutoTokenizer

import recontrol as rc
from recontrol.data.dialogue import Prompt, prompt_of, read_turns, readable, render, render_prompt, turns_entry
from recontrol.methods import Prompting

TEMPLATE = "Human: {prompt}\nAssistant: {response}"
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [/]{% endfor %}"
OF_LM = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
OF_LM += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ALTERNATING = "{% for m in messages %}{% if m['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
ALTERNATING += "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['role'] }}] {{ m['content'] }} [/]{% endfor %}"


def tokenizer_with(template):
    tokenizer = AutoTokenizer.from_pretrained(REWARD)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def lm():
    return tokenizer_with(OF_LM)


@pytest.fixture(scope="module")
def model():
    return small_classifier(1, pad_token_id=0)


def written(model, prompt, response=" Fine.", template="chat", chat=CHAT):
    return rc.RewardModel(model, tokenizer_with(chat), template=template)._write(prompt, response)


@pytest.mark.parametrize(
    ("text", "turns", "begun"),
    [
        ("Who?", [("user", "Who?")], ""),
        ("\n\nHuman: Who?\n\nAssistant:", [("user", "Who?")], ""),
        ("Human: Who?\n\nAssistant: Me.\n\nHuman: Why?\n\nAssistant:", [("user", "Who?"), ("assistant", "Me."), ("user", "Why?")], ""),
        ("Human: Who?\nAssistant:", [("user", "Who?")], ""),
        ("Human: Who?\n\nNot you.\nAssistant:", [("user", "Who?\n\nNot you.")], ""),
        ("\n\nUser: Who?\n\nAssistant: Well, ", [("user", "Who?")], "Well, "),
        ("\n\nHuman: One\n\nHuman: two\n\nAssistant:", [("user", "One\n\ntwo")], ""),
        ("Be brief.\n\nHuman: Who?\n\nAssistant:", [("system", "Be brief."), ("user", "Who?")], ""),
        ("System: Be brief.\n\nHuman: Who?\n\nAssistant:", [("system", "Be brief."), ("user", "Who?")], ""),
        ("Explain this:\n\nHuman: to err.", [("user", "Explain this:\n\nHuman: to err.")], ""),
    ],
)
def test_what_a_text_tells(text, turns, begun):
    assert read_turns(text) == (tuple(turns), begun)


@pytest.mark.parametrize(
    "text", ["<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "[INST] Who? [/INST]", "USER: Who? ASSISTANT:", "Who?\n### Response:"]
)
def test_what_cannot_be_told_apart_is_refused_where_turns_are_needed(model, text):
    with pytest.raises(ValueError, match="cannot be told apart"):
        written(model, text)
    # Read as one text it needs no turns.
    assert written(model, text, template=None) == text + " Fine."
    assert written(model, Prompt(text, [("user", "Who?")], chat_template=True)) == "[user] Who? [/][assistant] Fine. [/]"


def test_each_side_writes_the_turns_in_its_own_template(model, lm, tmp_path):
    path = write_lines(tmp_path / "hh.jsonl", HH[:1])
    turns = "[user] Hi Human: what is an Assistant: ? [/][assistant] A helper. [/][user] And more? [/][assistant] Fine. [/]"
    marked = "Human: Hi Human: what is an Assistant: ?\nAssistant: A helper.\nHuman: And more?\nAssistant: Fine."
    plain, user, chat = rc.load_prompts(path), rc.load_prompts(path, human="User"), rc.load_prompts(path, tokenizer=lm, chat_template=True)
    for (prompt,) in (plain, user, chat):
        assert written(model, prompt) == turns
        assert written(model, prompt, template="Q: {prompt} A: {response}</s>") == (
            "Q: Hi Human: what is an Assistant: ? A: A helper.</s>\nQ: And more? A: Fine.</s>"
        )
    assert written(model, user[0], template=TEMPLATE) == written(model, chat[0], template=TEMPLATE) == marked
    # With its own marks it is left as it is.
    assert written(model, plain[0], template=TEMPLATE) == plain[0] + " Fine."
    # Without a template: as the data set writes it, but never in the language model's.
    assert written(model, user[0], template=None) == user[0] + " Fine."
    assert written(model, chat[0], template=None) == turns
    assert written(model, chat[0], template=None, chat=None) == written(model, chat[0], template="{prompt}{response}") == plain[0] + " Fine."
    assert readable(chat[0]) == plain[0] and readable(user[0]) == user[0]


def test_a_begun_answer_goes_on(model, lm):
    prompt = "\n\nHuman: Who?\n\nAssistant: Su"
    assert written(model, prompt, "re, I am.") == "[user] Who? [/][assistant] Sure, I am. [/]"
    rendered = render_prompt(lm, prompt)
    assert rendered == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nSu"
    assert written(model, rendered, "re, I am.") == "[user] Who? [/][assistant] Sure, I am. [/]"
    assert written(model, rendered, "re, I am.", TEMPLATE) == "Human: Who?\nAssistant: Sure, I am."


def test_templates_that_refuse():
    strict = tokenizer_with(ALTERNATING)
    assert render(strict, [("system", "Be brief."), ("user", "Who?")]).endswith("[user] Be brief.\n\nWho? [/]")
    with pytest.raises(ValueError, match="cannot write turns of assistant, user: roles must alternate"):
        render(strict, [("assistant", "Hi"), ("user", "Who?")])


def test_a_prompt_is_its_text_and_keeps_its_turns():
    prompt = Prompt("<|x|>Who?", [("user", "Who?")], "We", True)
    for same in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt)), prompt_of(json.loads(json.dumps({"prompt": prompt, **turns_entry(prompt)})))):
        assert same == "<|x|>Who?" and (same.turns, same.begun, same.chat_template) == ((("user", "Who?"),), "We", True)
    # A text that tells its turns needs no others beside it.
    assert turns_entry(Prompt("\n\nHuman: Who?\n\nAssistant:")) == turns_entry("Who?") == {}
    assert Prompt("x", [{"role": "user", "content": "Who?"}]).turns == (("user", "Who?"),)
    for turns in ([("user",)], [("user", 3)], [("tool", "x")]):
        with pytest.raises(ValueError, match="turns must be pairs"):
            Prompt("x", turns)


def test_rollouts_and_files_of_responses_keep_turns(lm, tmp_path):
    prompt = rc.load_prompts(write_lines(tmp_path / "hh.jsonl", HH[:1]), tokenizer=lm, chat_template=True)[0]
    rollouts = rc.Rollouts.write(tmp_path / "r", [torch.zeros(1, 2)], [0.0], [prompt], ["Fine."])
    seen = []

    def score(prompts, responses):
        seen.extend(prompts)
        return [1.0]

    rc.relabel(rollouts, score, progress=False)
    assert seen == [prompt] and seen[0].turns == prompt.turns and seen[0].chat_template
    from recontrol.evaluation.response_files import read_responses

    (line,) = read_responses(write_lines(tmp_path / "responses.jsonl", rollouts.records()))
    assert line.prompt.turns == prompt.turns


def test_prompting_keeps_the_turns():
    prompt = Prompt("\n\nHuman: Who?\n\nAssistant:")
    told = Prompting.for_dialogues().write(prompt)
    assert told.startswith("Below is") and told.turns == prompt.turns and isinstance(told, Prompt)
