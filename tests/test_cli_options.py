"""Each option of the command line changes what is called, or is refused, or a line says that it is not used; errors are found before the work."""

import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_cli import EXAMPLE, ROOT, run
from test_cli import MODEL as LM
from transformers import AutoTokenizer

from recontrol.cli import main, parsed, parser
from recontrol.cli.options import COMMANDS, check_together
from recontrol.value import ValueFunction

GENERATE = ["generate", *LM, "--max-new-tokens", "2", "--prompt", "This film"]
JUDGE = ["judge", "--responses", "responses.jsonl", "--others", "others.jsonl"]
COLLECT = ["collect", "--model", "m", "--dataset", "Anthropic/hh-rlhf", "--out", "o"]
EVALUATE = ["evaluate", "--out", "o", "--model", "m", "--value", "v", "--dataset", "Anthropic/hh-rlhf"]
CLASSIFIER, FUNCTION, CHAT = ["--reward-model", "r"], ["--reward-model", "python:m:f"], ["--reward-model", "judge:gpt"]

pytestmark = pytest.mark.usefixtures("one_thread")


def line(capsys):
    """The error, the last line, with no traceback above it."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def process(*arguments, **keywords):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **keywords.pop("environment", {})}
    return subprocess.run([sys.executable, "-m", "recontrol", *map(str, arguments)], env=environment, **{"capture_output": True, **keywords})


def flags():
    """Every (subcommand, flag that takes a text)."""
    for name, sub in parser()._subparsers._group_actions[0].choices.items():
        for action in sub._actions:
            if action.option_strings and action.nargs is None and action.choices is None and action.help != argparse.SUPPRESS:
                yield name, action.option_strings[0]


REQUIRED = {
    "collect": COLLECT[1:],
    "relabel": ["--rollouts", "r", *CLASSIFIER],
    "train": ["--rollouts", "r", "--out", "o"],
    "generate": ["--model", "m"],
    "serve": ["--model", "m", "--bank", "b"],
    "evaluate": ["--out", "o"],
    "judge": ["--responses", "r"],
    "push": ["--value", "v"],
    "info": [],
}


@pytest.mark.parametrize(("subcommand", "flag"), list(flags()))
def test_an_empty_text_is_refused_for_every_flag(subcommand, flag, capsys):
    """As of a script's variable that is not set."""
    assert run(subcommand, *REQUIRED[subcommand], flag, "") == 2
    assert f"argument {flag}" in line(capsys)


def test_what_is_given_is_known_also_where_it_is_the_default():
    assert parsed(["generate", "--model", "m"]).given == {"model"}
    given = parsed(["generate", "--model", "m", "--seed", "0", "--split", "train", "--stop", "x", "--stop", "y", "--trace"]).given
    assert given == {"model", "seed", "split", "stop", "trace"}
    assert parsed(["evaluate", "--out", "o"]).given == {"out"} and parsed(["serve", *REQUIRED["serve"], "--", "--port", "1"]).given == {"model", "bank"}


def test_rules_name_flags_that_there_are():
    subs = parser()._subparsers._group_actions[0].choices
    for name, rules in COMMANDS["together"].items():
        known = {flag for sub in (subs.values() if name == "all" else [subs[name]]) for action in sub._actions for flag in action.option_strings}
        known |= {"a classifier as --reward-model", "--reward-model judge:NAME"}
        for rule in rules:
            assert rule.keys() - {"options"} <= {"with", "without", "unused"} and len(rule) == 2
            assert {flag for flags in rule.values() for flag in flags} <= known


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GENERATE, "--steps", "30"], "--steps: found without --value"),
        ([*GENERATE, "--step-size", "0.5", "--radius", "1"], "--step-size, --radius: found without --value"),
        ([*GENERATE, "--backend", "oracle"], "--backend: found without --value"),
        ([*GENERATE, "--allow-other-model"], "--allow-other-model: found without --value"),
        ([*GENERATE, "--target", "1"], "--target: found without --value"),
        ([*GENERATE, "--limit", "1"], "--limit: found without --dataset"),
        ([*GENERATE, "--split", "train"], "--split: found without --dataset"),
        ([*GENERATE, "--max-prompt-tokens", "9"], "--max-prompt-tokens: found without --dataset"),
        (["generate", *LM, "--dataset", "d", "--human", "User", "--chat-template"], "--human: found beside --chat-template"),
        (["generate", *LM, "--dataset", "FILE", "--split", "test"], "is a file and has no splits"),
        ([*COLLECT, *CLASSIFIER, "--skip-equal"], "--skip-equal: found without --pairs"),
        ([*COLLECT, "--pairs", "--num-samples", "2"], "--num-samples: found beside --pairs"),
        ([*COLLECT, "--pairs", "--temperature", "0.5"], "--temperature: found beside --pairs"),
        ([*COLLECT, "--pairs", "--reward-template", "{prompt}{response}"], "--reward-template: found without a classifier as --reward-model"),
        ([*COLLECT, *FUNCTION, "--reward-batch-size", "4"], "--reward-batch-size: found without a classifier"),
        ([*COLLECT, *CLASSIFIER, "--judge-range", "1,5"], "--judge-range: found without --reward-model judge:NAME"),
        ([*COLLECT, *CLASSIFIER, "--judge-cache", "c"], "--judge-cache: found without --reward-model judge:NAME or --judge"),
        (["relabel", "--rollouts", "r", *FUNCTION, "--device", "cpu"], "--device: found without a classifier"),
        ([*EVALUATE, *CLASSIFIER, "--validation-limit", "3"], "--validation-limit: found without --validation-prompts or --validation-split"),
        ([*EVALUATE, *CLASSIFIER, "--dry-run"], "--dry-run goes with --config"),
        (["evaluate", "--out", "o", "--config", "hh-rlhf-vicuna-7b", "--seeds", "1", "--top-k", "5"], "found --seeds, --top-k beside it"),
        ([*JUDGE, "--judge", "gpt", "--split", "train"], "--split: found without --preferred"),
        ([*JUDGE, "--judge", "gpt", "--judge-range", "1,5"], "--judge-range: found without --reward-model judge:NAME"),
        ([*JUDGE, "--judge", "gpt", "--answer-tokens", "5"], "--answer-tokens: found without --estimate"),
        ([*JUDGE, "--judge", "gpt", "--reward-batch-size", "5"], "--reward-batch-size: found without a classifier"),
        ([*JUDGE, *CLASSIFIER, "--prices", "1,2"], "--prices: found without --judge"),
        ([*JUDGE, *CLASSIFIER, "--judge-instructions", "f"], "--judge-instructions: found without --judge"),
        (["judge", "--responses", "r", "--judge", "g", "--preferred", "d", "--human", "U", "--tokenizer", "t"], "--human: found beside --tokenizer"),
        (["push", "--value", "v", "--card", "--private"], "--private: found beside --card"),
        (["train", "--rollouts", "r", "--out", "o", "--validation-fraction", "0", "--patience", "3"], "--patience: found with --validation-fraction 0"),
        (["train", "--rollouts", "r", "--out", "o", *["--compare", "v"] * 5], "--compare: found 5 value functions, wanted at most 4"),
    ],
    ids=lambda given: given[:40] if isinstance(given, str) else "",
)
def test_an_option_without_use_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    """Before anything is loaded or written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "I"}\n')
    before = sorted(tmp_path.iterdir())
    assert run(*["prompts.jsonl" if each == "FILE" else each for each in arguments]) == 2
    assert message in line(capsys) and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [*COLLECT, *CHAT, "--judge-range", "1,5", "--judge-url", "u", "--judge-cache", "c"],
        [*COLLECT, *FUNCTION, *CLASSIFIER, "--reward-batch-size", "4"],
        [*COLLECT, "--pairs", "--skip-equal", "--storage", "int8"],
        ["generate", *LM, "--dataset", "d", "--human", "User", "--split", "test", "--limit", "2"],
        [*JUDGE, "--judge", "gpt", "--judge-url", "u", "--estimate", "--answer-tokens", "9", "--prices", "1,2"],
        [*EVALUATE, *CLASSIFIER, "--validation-split", "x", "--validation-limit", "3"],
        ["push", "--value", "v", "--card", "--repo", "a/b"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_options_that_go_together_are_taken(arguments):
    check_together(parsed(arguments))


def test_a_plan_says_what_it_does_not_use(tmp_path, capsys, caplog):
    assert run(*GENERATE, "--plan", "--out", tmp_path / "r.jsonl", "--top-k", 5, "--value", "v") == 0
    assert "not used with --plan: --value, --out, --top-k" in caplog.text and not (tmp_path / "r.jsonl").exists()
    assert "cache of a token" in capsys.readouterr().out


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    shutil.copytree(EXAMPLE / "lm", path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}"
        "{% endif %}Review of {{ m['content'] }}:{% endfor %}"
    )
    tokenizer.save_pretrained(path)
    return path


def test_the_chat_template_is_used_for_prompts_too(chat_model, capsys):
    assert run("generate", "--model", chat_model, "--max-new-tokens", 2, "--prompt", "Alien", "--chat-template", "--device", "cpu") == 0
    assert capsys.readouterr().out.startswith("Review of Alien:")


class TestMendable:
    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
    def test_a_pointer_of_git_lfs_in_place_of_a_file(self, name, tmp_path, capsys):
        shutil.copytree(EXAMPLE / "lm", tmp_path / "lm")
        (tmp_path / "lm" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        assert run("generate", "--model", tmp_path / "lm", "--prompt", "x", "--max-new-tokens", 2) == 2
        assert line(capsys).startswith("recontrol: error: ")

    def test_damaged_weights_are_named(self, tmp_path, capsys):
        shutil.copytree(EXAMPLE / "reward", tmp_path / "reward")
        (tmp_path / "reward" / "model.safetensors").write_bytes(b"version")
        (tmp_path / "p.jsonl").write_text('{"prompt": "I"}\n')
        assert run("collect", *LM, "--dataset", tmp_path / "p.jsonl", "--reward-model", tmp_path / "reward", "--out", tmp_path / "o") == 2
        assert f"{tmp_path / 'reward'} cannot be loaded" in line(capsys)

    def test_a_template_that_does_not_take_a_dialogue(self, chat_model, tmp_path, capsys):
        (tmp_path / "hh.jsonl").write_text(json.dumps({"chosen": "\n\nAssistant: Hello\n\nHuman: Hi\n\nAssistant: Yes"}) + "\n")
        assert run("generate", "--model", chat_model, "--dataset", tmp_path / "hh.jsonl", "--chat-template", "--device", "cpu") == 2
        assert "Conversation roles must alternate" in line(capsys)

    @pytest.mark.parametrize("device", ["cuda:99", "mps", "abacus", "cuda:x"])
    def test_a_device_that_is_not_there(self, device, tmp_path, capsys):
        assert run("generate", "--model", EXAMPLE / "lm", "--device", device, "--prompt", "x") == 2
        assert f"the device {device!r} cannot be used here" in line(capsys)

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), OverflowError("int too large"), Exception("bare")])
    def test_errors_that_are_one_line(self, error, monkeypatch, capsys):
        monkeypatch.setattr("recontrol.ascent.backends.backend_info", lambda: (_ for _ in ()).throw(error))
        assert run("info") == 2
        assert line(capsys) == f"recontrol: error: {str(error) or type(error).__name__}"

    @pytest.mark.parametrize("error", [KeyError, IndexError, AttributeError, AssertionError, NameError])
    def test_mistakes_of_ours_are_not(self, error, monkeypatch):
        monkeypatch.setattr("recontrol.ascent.backends.backend_info", lambda: (_ for _ in ()).throw(error("mistake")))
        with pytest.raises(error):
            main(["info"])

    def test_yaml_with_a_key_twice(self, tmp_path, capsys):
        (tmp_path / "s.yaml").write_text("seed: 1\nmodel: {name: a}\nseed: 2\n")
        assert run("evaluate", "--config", tmp_path / "s.yaml", "--out", tmp_path / "o") == 2
        assert "found a key twice among ['seed', 'model', 'seed']" in line(capsys)

    def test_a_reader_that_goes_away_is_quiet(self):
        """As of `recontrol info | head -1`."""
        reader, writer = os.pipe()
        os.close(reader)
        done = process("info", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b"")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_output_that_cannot_be_printed(self):
        with open("/dev/full", "w") as full:
            done = process("info", capture_output=False, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2 and done.stderr == "recontrol: error: [Errno 28] No space left on device\n"

    def test_a_terminal_that_knows_ascii_alone(self):
        done = process(*GENERATE[:-1], "Café", environment={"PYTHONIOENCODING": "ascii"}, text=True)
        assert done.returncode == 0 and done.stdout.startswith("Caf\\xe9"), done.stderr


class TestOutputs:
    """What cannot be written is found before the model responds."""

    @pytest.fixture
    def places(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_text("before")
        (tmp_path / "p.jsonl").write_text('{"prompt": "I"}\n')
        (tmp_path / "r.jsonl").write_text('{"prompt": "I", "response": " x"}\n')
        torch.manual_seed(0)
        ValueFunction(256, (8,)).save_pretrained(tmp_path / "v")
        return tmp_path

    @pytest.fixture
    def no_work(self, monkeypatch):
        def work(*_, **__):
            raise AssertionError("this is work")

        for name in ("cli.options.load_model", "cli.options.load_reward", "studies.study.ModelSection.load", "studies.study.RewardSection.load"):
            monkeypatch.setattr(f"recontrol.{name}", work)

    @pytest.mark.parametrize("out", ["folder", "file/x.jsonl", "file/a/x.jsonl", "x" * 300])
    @pytest.mark.parametrize("command", [GENERATE, ["judge", "--responses", "r.jsonl", "--others", "r.jsonl", *CLASSIFIER]], ids=["generate", "judge"])
    def test_a_file(self, command, out, places, no_work, capsys):
        assert run(*command, "--out", out) == 2
        assert f"could not write {out}: " in line(capsys) and (places / "file").read_text() == "before"

    @pytest.mark.parametrize("out", ["file", "file/x"])
    @pytest.mark.parametrize(
        "command",
        [
            ["collect", *LM, "--dataset", "p.jsonl", *CLASSIFIER],
            ["evaluate", *LM, "--dataset", "p.jsonl", *CLASSIFIER, "--value", "v"],
            ["evaluate", "--config", "hh-rlhf-vicuna-7b"],
        ],
        ids=["collect", "evaluate", "study"],
    )
    def test_a_folder(self, command, out, places, no_work, capsys):
        assert run(*command, "--out", out) == 2
        assert f"could not write {out}: " in line(capsys) and (places / "file").read_text() == "before"

    def test_a_folder_in_place_of_a_report(self, places, no_work, capsys):
        (places / "o" / "report.html").mkdir(parents=True)
        assert run("evaluate", "--config", "hh-rlhf-vicuna-7b", "--out", "o") == 2
        assert "could not write o/report.html: Is a directory" in line(capsys)

    def test_a_full_disk(self, places, no_work, capsys, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_bytes", full)
        assert run(*GENERATE, "--out", "x.jsonl") == 2
        assert "could not write x.jsonl: No space left on device" in line(capsys)

    def test_links_lead_to_the_file_and_pipes_are_written_to(self, places, capsys):
        (places / "target.jsonl").write_text("before")
        (places / "link.jsonl").symlink_to("target.jsonl")
        assert run(*GENERATE, "--out", "link.jsonl") == 0
        assert (places / "link.jsonl").is_symlink() and json.loads((places / "target.jsonl").read_text())["prompt"] == "This film"
        os.mkfifo(places / "pipe")
        read = []
        reader = threading.Thread(target=lambda: read.append((places / "pipe").read_text()))
        reader.start()
        assert run(*GENERATE, "--out", "pipe") == 0
        reader.join(timeout=30)
        assert read == [(places / "target.jsonl").read_text()] and (places / "pipe").is_fifo()

    def test_standard_output_is_a_file_like_another(self, places):
        done = process(*GENERATE, "--out", "/dev/stdout", text=True)
        assert json.loads(done.stdout)["prompt"] == "This film", done.stderr


# What ends a command, and what it loads before; all of it is recorded.
ENDS = (
    "generation.generate.generate",
    "generation.plan.make_plan",
    "data.collect.collect",
    "data.collect.collect_pairs",
    "data.relabel.relabel",
    "training.train.train",
    "studies.run.StudyRun",
    "evaluation.win_rate.win_rate",
    "value.ValueFunction.push_to_hub",
    "value.card.model_card",
)
PROMPTS = ["I", "This", "The", "A"]
LOADED = {
    "studies.study.load_language_model": (None, None),
    "studies.study.load_reward": "reward",
    "decoding.loading.load_value_function": ValueFunction(4, (2,)),
    "value.ValueFunction.from_pretrained": ValueFunction(4, (2,)),
    "data.prompts.load_prompts": ["I"],
    "data.prompts.load_pairs": [("I", "a", "b")],
    "data.prompts.load_prompts_with_preferred": (PROMPTS, [" other"] * 4),
    "evaluation.judges.PairwiseJudge": None,
    "evaluation.judges.RewardJudge": None,
    "data.prompts.render_prompt": "rendered",
    "value.files.local_folder": Path("v"),
    "data.shards.read_manifest": {},
}
BASES = {
    "collect": [*COLLECT, "--reward-model", "r"],
    "collect --pairs": [*COLLECT, "--pairs"],
    "collect judge": [*COLLECT, *CHAT],
    "relabel": ["relabel", *REQUIRED["relabel"]],
    "train": ["train", *REQUIRED["train"]],
    "generate --prompt": ["generate", "--model", "m", "--prompt", "I"],
    "generate --dataset": ["generate", "--model", "m", "--dataset", "Anthropic/hh-rlhf", "--value", "v"],
    "evaluate": [*EVALUATE, *CLASSIFIER],
    "judge": [*JUDGE, "--judge", "gpt"],
    "judge --preferred": ["judge", "--responses", "responses.jsonl", "--preferred", "d", *CLASSIFIER],
    "push": ["push", "--value", "v", "--repo", "a/b"],
    "push --card": ["push", "--value", "v", "--card"],
}
# Values that are not the default; the others by what a flag takes.
VALUES = {
    **{"--dtype": "float16", "--device": "meta", "--storage": "int8", "--batching": "static", "--cache-budget": "1GiB", "--hidden-dims": "7", "--seed": "7"},
    **{"--objective": "mc", "--td-lambda": "0.5", "--schedule": "cosine", "--compute-dtype": "bfloat16", "--kernel": "torch", "--head-weights": "2"},
    **{"--judge-range": "1,5", "--judge-request": "{}", "--prices": "1,2", "--step-sizes": "2", "--steps": "7", "--reward-model": "other"},
    **{
        "--method": "other",
        "--against": "other",
        "--reward-template": "{prompt} {response}",
        "--judge-instructions": "asked.txt",
        "--others": "third",
        "--preferred": "d",
        "--tokenizer": str(EXAMPLE / "lm"),
    },
}
# What is done with what the command has found, rather than what is called.
NEITHER = [("generate --prompt", "--no-stop"), ("judge", "--out"), ("judge --preferred", "--out")]
AFTER = {"--verbose", "--debug", "--help", "--report", "--plan", "--estimate"}


def cases():
    for name, base in BASES.items():
        for action in parser()._subparsers._group_actions[0].choices[base[0]]._actions:
            flag = action.option_strings[-1] if action.option_strings else ""
            if flag not in {*AFTER, *base, ""} and (name, flag) not in NEITHER and action.help != argparse.SUPPRESS:
                yield name, flag, [flag] if action.nargs == 0 else [flag, VALUES.get(flag, "3")]


class Reached(ValueError):
    """The command has come to its work."""


@pytest.fixture
def called(tmp_path, monkeypatch):
    """The calls that a command makes, by name, with their arguments in words."""
    monkeypatch.chdir(tmp_path)
    for name in ("responses.jsonl", "others.jsonl", "third"):
        lines = [{"method": name, "prompt": prompt, "response": f" of {name}"} for prompt in PROMPTS]
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in lines))
    (tmp_path / "asked.txt").write_text("{prompt} {first} {second}")
    calls = []

    def record(name, result):
        def call(*arguments, **keywords):
            calls.append((name, repr([vars(each) if hasattr(each, "__dict__") else each for each in (*arguments, *keywords.values())]), sorted(keywords)))
            if name in ENDS:
                raise Reached
            return result

        return call

    for name in ENDS:
        monkeypatch.setattr(f"recontrol.{name}", record(name, None))
    for name, result in LOADED.items():
        monkeypatch.setattr(f"recontrol.{name}", record(name, result))

    def of(arguments):
        calls.clear()
        assert run(*arguments) in (0, 2)
        return [call for call in calls if call[0] != "data.shards.read_manifest"]

    return of


@pytest.mark.parametrize(("name", "flag", "given"), list(cases()))
def test_each_flag_changes_what_is_called_or_is_refused_or_is_said(name, flag, given, called, capsys, caplog):
    base = called(BASES[name])
    assert base and base[-1][0] in ENDS, capsys.readouterr().err
    capsys.readouterr()
    found = called([*BASES[name], *given])
    words = capsys.readouterr().err
    refused = not (found and found[-1][0] in ENDS)
    assert refused or found != base or "not used" in caplog.text
    # By a line that speaks of it.
    assert not refused or flag[2:].replace("-", "") in words.replace("-", "").replace("_", "").lower() or "the method 'other'" in words, words


def test_every_subcommand_is_covered():
    assert set(REQUIRED) == {name for name, _ in flags()} | {"info"}
    assert {base[0] for base in BASES.values()} == set(REQUIRED) - {"info", "serve"}
