"""`recontrol judge`."""

import json

import pytest
from test_cli import EXAMPLE, one_line, run
from test_judge import serve  # noqa: F401
from test_judges import longer, shown

from recontrol.cli import parser
from recontrol.data.rewards import RewardModel

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["\n\nHuman: Why?\n\nAssistant:", "\n\nHuman: Who?\n\nAssistant:"]
CHOSEN = [" a b", " a b c"]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the command is run: responses of two methods, the data set that they are of, and a module of rewards."""
    monkeypatch.chdir(tmp_path)
    texts = {"steered": [" a b c d", " a"], "uncontrolled": [" a", " a b"]}
    lines = [
        {"method": method, "seed": 0, "index": index, "prompt": prompt, "response": response, "reward": 0.5}
        for method, responses in texts.items()
        for index, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True))
    ]
    write(tmp_path / "responses.jsonl", lines)
    write(tmp_path / "steered.jsonl", [{"prompt": line["prompt"], "response": line["response"]} for line in lines[:2]])
    write(tmp_path / "hh.jsonl", [{"chosen": prompt + chosen, "rejected": prompt + " x"} for prompt, chosen in zip(PROMPTS, CHOSEN, strict=True)])
    (tmp_path / "my_rewards.py").write_text("def length(prompts, responses):\n    return [len(text) for text in responses]\n")
    return tmp_path


RESPONSES = ["--responses", "responses.jsonl", "--method", "steered"]
PREFERRED = ["--preferred", "hh.jsonl"]


def test_against_the_preferred_responses(folder, serve, capsys):  # noqa: F811
    server = serve(longer)
    server.usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    command = ["judge", *RESPONSES, *PREFERRED, "--judge", "tiny", "--judge-url", server.url, "--judge-cache", "cache", "--prices", "10,50"]
    assert run(*command, "--out", "out/win.json") == 0
    text = capsys.readouterr().out
    assert "2 pairs: win rate 0.500" in text and "wins 1, ties 0, losses 1, by judge tiny, pairwise; the order decided 0.0% of the pairs" in text
    assert "4 requests, 400 tokens of questions and 4 of answers, cost 0.0042" in text
    asked = {shown(request["messages"][0]["content"]) for request in server.requests}
    assert asked == {("a b c d", "a b"), ("a b", "a b c d"), ("a", "a b c"), ("a b c", "a")}
    content = json.loads((folder / "out" / "win.json").read_text())
    assert (content["format"], content["version"], content["rate"], content["judge"]) == ("recontrol.win_rate", 1, 0.5, "judge tiny, pairwise")
    assert content["pairs"][0] == {"prompt": PROMPTS[0], "response": " a b c d", "other": " a b", "verdict": 1.0}
    assert content["about"]["method"] == "steered" and content["about"]["judge"] == "tiny"
    # The answers are kept, and asking again costs nothing.
    assert run(*command) == 0
    assert "0 requests" in capsys.readouterr().out and len(server.requests) == 4


def test_the_old_name_of_the_option_is_taken_and_not_shown(capsys):
    assert run("judge", *RESPONSES, "--references", "hh.jsonl", "--reward-model", "python:my_rewards:length") == 0
    assert "2 pairs: win rate 0.500" in capsys.readouterr().out
    assert run("judge", "--help") == 0
    assert "--references" not in capsys.readouterr().out


def test_an_estimate_sends_nothing_and_needs_no_file(folder, serve, capsys):  # noqa: F811
    server = serve(longer)
    command = ["judge", *RESPONSES, *PREFERRED, "--judge", "tiny", "--judge-url", server.url, "--prices", "10,50", "--estimate", "--answer-tokens", 100]
    assert run(*command, "--out", "out/win.json") == 0
    text = capsys.readouterr().out
    assert "2 pairs: 4 requests that the cache does not answer, about " in text and "(characters / 4) and 400 of answers (100 each), about 0.0" in text
    assert not server.requests and not (folder / "out").exists()
    assert run(*command, "--limit", 1) == 0
    assert "1 pairs: 2 requests" in capsys.readouterr().out


def test_against_another_method_by_a_reward(capsys):
    assert run("judge", *RESPONSES, "--against", "uncontrolled", "--reward-model", "python:my_rewards:length") == 0
    text = capsys.readouterr().out
    assert "win rate 0.500" in text and "wins 1, ties 0, losses 1, by reward length" in text and "requests" not in text and "order" not in text


def test_against_another_file_by_a_sequence_classifier(folder):
    command = ["judge", "--responses", "steered.jsonl", "--others", "responses.jsonl", "--against", "uncontrolled", "--out", "win.json"]
    assert run(*command, "--reward-model", EXAMPLE / "reward", "--device", "cpu") == 0
    pairs = json.loads((folder / "win.json").read_text())["pairs"]
    assert [(pair["response"], pair["other"]) for pair in pairs] == [(" a b c d", " a"), (" a", " a b")]
    score = RewardModel.from_pretrained(EXAMPLE / "reward")
    steered, others = (score(PROMPTS, [pair[side] for pair in pairs]) for side in ("response", "other"))
    assert [pair["verdict"] for pair in pairs] == [float(one > other) for one, other in zip(steered, others, strict=True)]


def test_own_instructions_and_fields_of_the_request(folder, serve):  # noqa: F811
    server = serve(lambda text: "C")
    (folder / "ask.txt").write_text("{prompt}|{first}|{second}")
    command = ["judge", *RESPONSES, *PREFERRED, "--judge", "m", "--judge-url", server.url, "--judge-instructions", "ask.txt", "--limit", 1]
    assert run(*command, "--judge-request", '{"max_tokens": 3}') == 0
    assert {request["messages"][0]["content"].split("|", 1)[1] for request in server.requests} == {"a b c d|a b", "a b|a b c d"}
    assert {request["max_tokens"] for request in server.requests} == {3} and "temperature" not in server.requests[0]
    assert run(*command) == 0
    assert server.requests[-1]["temperature"] == 0 and "max_tokens" not in server.requests[-1]


def test_prompts_that_were_written_otherwise(folder, capsys):
    lines = [{"prompt": prompt.replace("Human:", "User:"), "response": "a"} for prompt in PROMPTS]
    write(folder / "responses.jsonl", lines)
    command = ["judge", "--responses", "responses.jsonl", *PREFERRED, "--reward-model", "python:my_rewards:length"]
    assert run(*command) == 2
    assert "2 of 2 responses have no other one to the same prompt: 0, 1; found the prompt '\\n\\nUser: Why?" in one_line(capsys)
    assert run(*command, "--human", "User") == 0


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([*RESPONSES, *PREFERRED], "give either --judge NAME, a chat model, or --reward-model NAME"),
        ([*RESPONSES, *PREFERRED, "--judge", "m", "--reward-model", "r"], "give either --judge NAME"),
        ([*RESPONSES, "--judge", "m"], "give what to compare with"),
        ([*RESPONSES, *PREFERRED, "--against", "uncontrolled", "--judge", "m"], "give what to compare with"),
        ([*RESPONSES, "--against", "steered", "--judge", "m"], "--method and --against are both 'steered'"),
        ([*RESPONSES, *PREFERRED, "--reward-model", "r", "--estimate"], "--estimate: found without --judge"),
        ([*RESPONSES[:2], *PREFERRED, "--judge", "m"], "its methods are 'steered', 'uncontrolled'"),
        ([*RESPONSES, "--against", "other", "--judge", "m"], "no responses of the method 'other': its methods are 'steered', 'uncontrolled'"),
        (["--responses", "none.jsonl", *PREFERRED, "--judge", "m"], "none.jsonl"),
        ([*RESPONSES, *PREFERRED, "--judge", "m", "--judge-url", "http://127.0.0.1:9/v1", "--prices", "1"], "must be two numbers"),
    ],
)
def test_what_is_refused(arguments, message, capsys):
    pytest.importorskip("openai")
    assert run("judge", *arguments) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("text", ["[1]", "{", "x"])
def test_fields_of_a_request_are_a_json_object(text, capsys):
    assert run("judge", *RESPONSES, *PREFERRED, "--judge", "m", "--judge-request", text) == 2
    assert "must be a JSON object, found" in capsys.readouterr().err


def test_help(capsys):
    assert run("judge", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "recontrol judge --responses" in text and "(default: test)" in text
    options = parser().parse_args(["judge", *RESPONSES, *PREFERRED])
    assert (options.answer_tokens, options.split, options.human, options.estimate, options.judge_request) == (4, "test", "Human", False, None)
