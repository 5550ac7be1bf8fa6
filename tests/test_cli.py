import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import recontrol
from recontrol.cli import main, options, parser
from recontrol.data.rollouts import Rollouts
from recontrol.decoding.fingerprint import model_fingerprint
from recontrol.reports.report_files import as_yaml
from recontrol.training.config import TrainConfig
from recontrol.training.data import LARGEST_BATCH, MINIBATCHES
from recontrol.value import ValueFunction

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "movie_reviews"
MODEL = ["--model", str(EXAMPLE / "lm"), "--dtype", "float32", "--device", "cpu"]
REWARD = ["--reward-model", str(EXAMPLE / "reward")]
TRAIN = ["train", "--rollouts", "missing", "--out", "missing"]
SUBCOMMANDS = ("collect", "relabel", "train", "generate", "serve", "evaluate", "judge", "push", "info")

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments):
    """The exit status of the command."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code or 0


def process(*arguments, **keywords):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keywords)


@pytest.fixture(scope="module")
def value_folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("value")
    ValueFunction(256, (16,)).save_pretrained(path)
    return path


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ["This film is", "I never", "The actors in it", "One of"]))
    return path


@pytest.fixture(scope="module")
def rollout_folder(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("rollouts") / "r"
    return Rollouts.write(path, [torch.randn(2, 4, generator=generator) for _ in range(40)], torch.randn(40, generator=generator)).path


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_help_says_defaults_and_shows_an_example(subcommand, capsys):
    assert run(subcommand, "--help") == 0
    text = capsys.readouterr().out
    assert "example" in text and f"recontrol {subcommand} " in text
    sub = parser()._subparsers._group_actions[0].choices[subcommand]
    for action in sub._actions:
        assert action.help, action.option_strings
        if action.help == argparse.SUPPRESS:
            continue
        # Whoever may leave an option out is told what happens then; flags are off.
        if not action.required and action.nargs != 0 and action.dest != "prompt":
            assert "default" in action.help, action.option_strings


def test_examples_in_the_help_are_accepted(capsys):
    for name, sub in parser()._subparsers._group_actions[0].choices.items():
        commands = sub.epilog.replace("\\\n", " ").splitlines()[1:]
        assert commands
        for command in commands:
            program, *arguments = shlex.split(command)
            assert program == "recontrol" and parser().parse_args(arguments).subcommand == name


def test_help_and_version_need_no_heavy_import(capsys):
    loaded = loaded_by("from recontrol.cli import parser; parser()")
    assert "recontrol.cli.evaluate" in loaded
    assert not {"transformers", "datasets", "matplotlib", "sentence_transformers", "recontrol.data.collect", "recontrol.evaluation.evaluate"} & loaded
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == f"recontrol {recontrol.__version__}"


def loaded_by(code):
    return set(process("-c", f"{code}; import sys; print(*sys.modules)").communicate()[0].split())


def test_module_and_subcommands(capsys):
    done = process("-m", "recontrol", "info", "--json")
    out, err = done.communicate()
    assert done.returncode == 0, err
    found, here = json.loads(out), json.loads(json.dumps(recontrol.backend_info()))
    # These tests run on one thread; a process of its own does as it likes.
    assert found["backends"]["cpu"].pop("threads") >= 1 == here["backends"]["cpu"].pop("threads")
    assert found == here
    assert run() == 2
    assert ",".join(SUBCOMMANDS) in capsys.readouterr().err
    assert run("fly") == 2


def test_info_in_words(capsys):
    assert run("info") == 0
    text = capsys.readouterr().out
    info = recontrol.backend_info()
    assert f"auto  {info['auto']}\n" in text
    for name in info["backends"]:
        assert f"\n  {name}\n" in text
    assert "True" not in text and "{" not in text


def test_the_whole_method(tmp_path, prompt_file, capsys):
    """collect, train, evaluate, generate."""
    size = ["--max-new-tokens", 6, "--batch-size", 2]
    rollouts, value, report = tmp_path / "rollouts", tmp_path / "value", tmp_path / "report"
    collect = ["collect", *MODEL, *REWARD, "--dataset", prompt_file, "--out", rollouts, "--temperature", 0.7, "--num-samples", 2, *size]
    assert run(*collect) == 0
    opened = Rollouts(rollouts)
    assert len(opened) == 8 and opened.manifest["generation"] == {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6}
    assert f"{opened.describe()}; average reward {opened.rewards.mean():.3f}" in capsys.readouterr().out
    assert run("train", "--rollouts", rollouts, "--out", value, "--hidden-dims", "24,8", "--epochs", 2, "--validation-fraction", 0.25) == 0
    assert ValueFunction.from_pretrained(value).hidden_dims == (24, 8)
    validation = tmp_path / "validation.jsonl"
    validation.write_text('{"prompt": "I have seen"}\n{"prompt": "We went to see"}\n')
    choice = ["--validation-prompts", validation, "--step-sizes", "0.25,0.5", "--steps", "3,4"]
    assert run("evaluate", *MODEL, *REWARD, "--value", value, "--dataset", prompt_file, "--limit", 3, "--out", report, *choice, *size) == 0
    out = capsys.readouterr().out
    assert "validation prompts (2):" in out and "\nprompts (3):" in out and "* chosen" in out and out.count("alpha 0.25, n 4") == 2
    content = json.loads((report / "report.json").read_text())
    assert [(row["step_size"], row["steps"]) for row in content["results"]] == [(0, 0), (0.25, 3), (0.25, 4), (0.5, 3), (0.5, 4)]
    assert content["study"]["model"]["name"] == str(EXAMPLE / "lm") and content["study"]["methods"][0]["alpha"] == [0.25, 0.5]
    assert len(content["validation"]) == 5 and content["chosen"][0] in [row["name"] for row in content["results"]]
    assert "RE-Control (alpha 0.25, n 4)" in (report / "report.html").read_text(encoding="utf-8")
    # The page's study says the same as the options: with it, everything is read.
    (tmp_path / "same.yaml").write_text(as_yaml(content["study"]), encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in (report / "test").rglob("*.json")}
    assert run("evaluate", "--config", tmp_path / "same.yaml", "--out", report) == 0
    assert {path: path.stat().st_mtime_ns for path in (report / "test").rglob("*.json")} == before
    assert json.loads((report / "report.json").read_text())["results"] == content["results"]
    out_file = tmp_path / "new" / "responses.jsonl"
    assert run("generate", *MODEL, "--value", value, "--dataset", prompt_file, "--limit", 3, "--out", out_file, *size) == 0
    lines = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["This film is", "I never", "The actors in it"]
    assert all(line["response"] and line["finish"] == "length" for line in lines)


def train_call(monkeypatch, *arguments):
    """The settings and the other arguments that the command hands to `train`."""
    calls = []
    monkeypatch.setattr("recontrol.training.train.train", lambda rollouts, config, **keywords: (calls.append((config, {"rollouts": rollouts, **keywords})), []))
    assert run("train", "--rollouts", "r", "--out", "v", *arguments) == 0
    return calls[0]


def test_what_is_not_asked_of_train_is_as_in_the_function(monkeypatch, capsys):
    config, others = train_call(monkeypatch)
    assert config == TrainConfig()
    assert others == {"rollouts": "r", "out": "v", "device": None, "log_with": None, "checkpoint_every": 1}
    assert run("train", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, words in {
        "learning_rate": "0.0001",
        "epochs": "100",
        "patience": "10",
        "validation_fraction": "0.1",
        "td_lambda": "0.0",
        "kernel": "auto",
    }.items():
        assert f"(default: {words})" in text and str(getattr(config, name)) == words
    assert "by default a twentieth of those trained on, at least 1 and at most the paper's 512" in text and (LARGEST_BATCH, MINIBATCHES) == (512, 20)


def test_collect_runs_pairs_through_the_model(tmp_path, capsys):
    lines = [{"prompt": "This film", "chosen": " is good", "rejected": " is bad"}, {"prompt": "The", "chosen": " end", "rejected": " end"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["collect", "--pairs", *MODEL, "--dataset", tmp_path / "pairs.jsonl", "--out", tmp_path / "r", "--storage", "int8", "--cache-budget", "1GB"]
    assert run(*arguments) == 2
    assert "nothing to prefer: line 2" in capsys.readouterr().err
    assert run(*arguments, "--skip-equal") == 0
    assert "2 responses, 6 tokens, states of 256 numbers as int8" in capsys.readouterr().out
    assert [record["preference"] for record in Rollouts(tmp_path / "r").records()] == ["chosen", "rejected"]


def test_what_is_asked_of_train_is_handed_over(monkeypatch):
    wanted = {"hidden_dims": (8, 4), "seed": 3, "learning_rate": 0.01, "batch_size": 5, "epochs": 7, "patience": 2}
    wanted |= {"validation_fraction": 0.3, "td_lambda": 0.95, "kernel": "torch"}
    arguments = ["--hidden-dims", "8,4", "--seed", 3, "--learning-rate", 0.01, "--batch-size", 5, "--epochs", 7, "--patience", 2]
    arguments += ["--validation-fraction", 0.3, "--td-lambda", 0.95, "--checkpoint-every", 50, "--kernel", "torch", "--device", "meta"]
    wanted |= {"objective": "preference", "preference_regression": 0.5, "preference_regulariser": 1.0, "normalise_rewards": True}
    wanted |= {"weight_decay": 0.1, "warmup_steps": 9, "schedule": "cosine", "max_gradient_norm": 2.0, "ema_decay": 0.99}
    wanted |= {"compute_dtype": "bfloat16"}
    arguments += ["--objective", "preference", "--preference-regression", 0.5, "--preference-regulariser", 1, "--normalise-rewards"]
    arguments += ["--weight-decay", 0.1, "--warmup-steps", 9, "--schedule", "cosine", "--max-gradient-norm", 2, "--ema-decay", 0.99]
    arguments += ["--compute-dtype", "bfloat16", "--log-with", "tensorboard"]
    config, others = train_call(monkeypatch, *arguments)
    assert config == TrainConfig(**wanted)
    # Every setting that has a flag differs from its default here, so that none is forgotten.
    assert [name for name, setting in vars(config).items() if setting == getattr(TrainConfig(), name)] == ["dtype"]
    assert others == {"rollouts": "r", "out": "v", "device": "meta", "log_with": "tensorboard", "checkpoint_every": 50}
    ends, _ = train_call(monkeypatch, "--validation-fraction", 0, "--td-lambda", 1)
    assert (ends.validation_fraction, ends.td_lambda) == (0.0, 1.0)
    assert train_call(monkeypatch, "--td-lambda", 0)[0].td_lambda == 0.0
    with pytest.warns(DeprecationWarning, match="'reference' is now 'released'"):
        assert train_call(monkeypatch, "--objective", "reference")[0].objective == "released"


def test_train_is_done_once_and_other_settings_are_refused(rollout_folder, tmp_path, capsys):
    command = ["train", "--rollouts", rollout_folder, "--out", tmp_path / "v", "--hidden-dims", "8", "--epochs", 2, "--device", "cpu", "--td-lambda", 0.95]
    assert run(*command) == 0
    assert f"value function: {tmp_path / 'v'}" in capsys.readouterr().out
    assert ValueFunction.from_pretrained(tmp_path / "v").provenance["training"]["td_lambda"] == 0.95
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "v").iterdir()}
    assert run(*command, "--checkpoint-every", 4) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "v").iterdir()} == before
    assert run(*command, "--td-lambda", 0.5) == 2
    assert "another td_lambda: found 0.95, wanted 0.5; use the same settings to go on with it, or another folder" in one_line(capsys)


def test_evaluate_is_greedy_and_chooses_nothing_by_default(tmp_path, prompt_file, value_folder, capsys):
    arguments = [*MODEL, *REWARD, "--value", value_folder, "--dataset", prompt_file, "--limit", 2, "--max-new-tokens", 3, "--step-sizes", "1e-6"]
    assert run("evaluate", *arguments, "--out", tmp_path / "report") == 0
    assert "chosen" not in capsys.readouterr().out
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert content["chosen"] == [] and content["validation"] is None
    # Greedy, and the step is too small to matter.
    assert content["results"][0]["reward"] == pytest.approx(content["results"][1]["reward"])


def test_generate_prints_and_control_matters(value_folder, capsys):
    common = ["generate", *MODEL, "--prompt", r"A film.\nIt", "--max-new-tokens", 5]
    assert run(*common) == 0
    free = capsys.readouterr().out
    assert free.startswith("A film.\nIt") and len(free) > 14
    assert run(*common, "--value", value_folder, "--step-size", 1e-7) == 0
    assert capsys.readouterr().out == free
    assert run(*common, "--value", value_folder, "--step-size", 50, "--steps", 60) == 0
    controlled = capsys.readouterr().out
    assert controlled != free
    # No further than this norm: the same as no control.
    assert run(*common, "--value", value_folder, "--step-size", 50, "--steps", 60, "--radius", 1e-6) == 0
    assert capsys.readouterr().out == free


def test_a_value_function_of_another_model_is_refused_unless_allowed(tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "lm")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    ValueFunction(256, (8,), provenance={"base_model": model_fingerprint(model)}).save_pretrained(tmp_path)
    arguments = ["generate", *MODEL, "--prompt", "I", "--max-new-tokens", 2, "--value", tmp_path]
    assert run(*arguments) == 2
    assert "trained for another model" in one_line(capsys)
    assert run(*arguments, "--allow-other-model") == 0


def one_line(capsys):
    """The error, which is the last line, with no traceback above it."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = text.strip().splitlines()
    assert lines[-1].startswith("recontrol: error: ") and sum(line.startswith("recontrol: error") for line in lines) == 1
    return lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collect", "--model", "no/such/model", *REWARD, "--dataset", "PROMPTS", "--out", "OUT"], "no/such/model"),
        (["collect", *MODEL, *REWARD, "--dataset", "missing.jsonl", "--out", "OUT"], "no prompts at 'missing.jsonl'"),
        (["collect", *MODEL, *REWARD, "--dataset", "PROMPTS", "--out", "OUT", "--num-samples", "2"], "needs do_sample=True"),
        (["collect", *MODEL, *REWARD, "--dataset", "PROMPTS", "--out", "OUT", "--cache-budget", "much"], 'a text such as "8GiB"'),
        (["collect", *MODEL, "--dataset", "PROMPTS", "--out", "OUT"], "--reward-model is needed, except with --pairs"),
        (["collect", *MODEL, "--pairs", "--dataset", "PROMPTS", "--out", "OUT"], "has no pairs: beside prompt it must have the columns chosen, rejected"),
        (
            ["collect", *MODEL, *REWARD, "--dataset", "PROMPTS", "--out", "OUT", "--max-new-tokens", "511"],
            "leave no room for 511 new tokens in a context of 512",
        ),
        (["collect", *MODEL, "--reward-model", "no/such/reward", "--dataset", "PROMPTS", "--out", "OUT"], "no/such/reward"),
        (["collect", *MODEL, *REWARD, "--dataset", "PROMPTS", "--chat-template", "--out", "OUT"], "no chat template"),
        (["generate", *MODEL], "give either --prompt or --dataset"),
        (["generate", *MODEL, "--prompt", "I", "--dataset", "PROMPTS"], "give either --prompt or --dataset"),
        (["generate", *MODEL, "--prompt", "I", "--value", "missing"], "no value function at 'missing'"),
        (["generate", *MODEL, "--prompt", "I", "--value", "missing.pth"], "missing.pth"),
        (["generate", *MODEL, "--prompt", "I", "--value", "VALUE", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["generate", *MODEL, "--prompt", "I", "--value", "VALUE", "--head-weights", "1,2"], "head_weights must be 1 numbers"),
        (["generate", *MODEL, "--prompt", "I", "--stop", "x", "--no-stop"], "exclude each other"),
        (["train", "--rollouts", "missing", "--out", "OUT"], "missing is no rollout folder: manifest.json is missing"),
        (["train", "--rollouts", "ROLLOUTS", "--out", "PROMPTS"], "prompts.jsonl is a file; training writes into a folder"),
        (["train", "--rollouts", "ROLLOUTS", "--out", "VALUE"], "config.json, model.safetensors but no history.json"),
        (["train", "--rollouts", "ROLLOUTS", "--out", "OUT", "--seed", "-1"], "seed must be an integer of at least 0 and below 2**63, found -1"),
        (["evaluate", *MODEL, *REWARD, "--value", "VALUE", "--dataset", "PROMPTS", "--out", "PROMPTS"], "File exists"),
        (
            ["evaluate", *MODEL, *REWARD, "--value", "VALUE", "--dataset", "PROMPTS", "--out", "OUT", "--validation-prompts", "PROMPTS"],
            "are the prompts that are reported on",
        ),
    ],
)
def test_user_errors_are_one_line(arguments, message, tmp_path, prompt_file, value_folder, rollout_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"OUT": tmp_path / "out", "PROMPTS": prompt_file, "VALUE": value_folder, "ROLLOUTS": rollout_folder}
    assert run(*(places.get(argument, argument) for argument in arguments)) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", *MODEL, "--steps", "0"], "--steps: must be at least 1, found 0"),
        (["generate", *MODEL, "--step-size", "nan"], "--step-size: must be a number above 0, found nan"),
        (["generate", *MODEL, "--step-size", "-1"], "--step-size"),
        (["evaluate", *MODEL, "--step-sizes", "0.5,,1"], "--step-sizes: invalid list of positive float value: '0.5,,1'"),
        ([*TRAIN, "--validation-fraction", "1"], "validation_fraction must be at least 0 and below 1, found 1.0"),
        ([*TRAIN, "--td-lambda", "1.5"], "td_lambda must be between 0 and 1, found 1.5"),
        ([*TRAIN, "--td-lambda", "nan"], "td_lambda must be between 0 and 1, found nan"),
        (["train", "--checkpoint-every", "0"], "--checkpoint-every: must be at least 1, found 0"),
        ([*TRAIN, "--batch-size", "0"], "batch_size must be an integer of at least 1, found 0"),
        ([*TRAIN, "--patience", "-1"], "patience must be an integer of at least 1, found -1"),
        ([*TRAIN, "--learning-rate", "inf"], "learning_rate must be finite and above 0, found inf"),
        (["train", "--kernel", "cuda"], "--kernel: invalid choice: 'cuda'"),
        ([*TRAIN, "--objective", "ppo"], "unknown objective 'ppo'; choose one of 'td'"),
        ([*TRAIN, "--warmup-steps", "-1"], "warmup_steps must be an integer of at least 0 and below 2**63, found -1"),
        ([*TRAIN, "--weight-decay", "nan"], "weight_decay must be finite and at least 0, found nan"),
        ([*TRAIN, "--ema-decay", "1"], "ema_decay must be between 0 and 1, or None, found 1.0"),
        (["generate", *MODEL, "--stop", ""], "must not be empty"),
        (["generate", *MODEL, "--dtype", "int8"], "invalid choice: 'int8'"),
        ([*TRAIN, "--seed", str(10**30)], "seed must be an integer of at least 0 and below 2**63"),
        (["generate", "--model", "m", "--prompt", "I", "--seed", str(10**30)], "seed must be below 2**63"),
        (["collect"], "the following arguments are required: --out, --model, --dataset"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="give either"):
        main(["generate", *MODEL, "--debug"])


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    def broken():
        raise KeyError("mistake")

    monkeypatch.setattr("recontrol.ascent.backends.backend_info", broken)
    with pytest.raises(KeyError):
        main(["info"])


def test_training_that_diverges_is_a_line_not_a_traceback(monkeypatch, capsys):
    def diverging():
        raise FloatingPointError("training diverged in epoch 3")

    monkeypatch.setattr("recontrol.ascent.backends.backend_info", diverging)
    assert run("info") == 2
    assert one_line(capsys) == "recontrol: error: training diverged in epoch 3"


def test_a_long_message_is_cut(monkeypatch, capsys):
    def broken():
        raise RuntimeError("first\n  second " + "x" * 5000)

    monkeypatch.setattr("recontrol.ascent.backends.backend_info", broken)
    assert run("info") == 2
    line = one_line(capsys)
    assert line.startswith("recontrol: error: first second xxx") and len(line) < 900 and line.endswith("(the rest with --debug)")


def parsed(*arguments):
    return parser().parse_args([*arguments])


def test_sampling_is_asked_for():
    base = ["generate", "--model", "m"]
    assert options.generation_options(parsed(*base)) == {"do_sample": False}
    everything = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert options.generation_options(parsed(*base, "--sample")) == everything
    assert options.generation_options(parsed(*base, "--temperature", "0.5")) == {**everything, "temperature": 0.5}
    assert options.generation_options(parsed(*base, "--top-p", "0.9")) == {**everything, "top_p": 0.9}
    assert options.generation_options(parsed(*base, "--top-k", "5")) == {**everything, "top_k": 5}


def test_further_turns_are_cut_by_default_in_dialogues_only():
    base = ["generate", "--model", "m", "--dataset"]
    assert options.stop_strings(parsed(*base, "file.jsonl")) == []
    assert options.stop_strings(parsed(*base, "Anthropic/hh-rlhf")) == ["\n\nHuman:", "\nHuman:", "Human:"]
    assert options.stop_strings(parsed(*base, "stanfordnlp/SHP", "--human", "User")) == ["\n\nUser:", "\nUser:", "User:"]
    assert options.stop_strings(parsed(*base, "Anthropic/hh-rlhf", "--chat-template")) == []
    assert options.stop_strings(parsed(*base, "Anthropic/hh-rlhf", "--no-stop")) == []
    assert options.stop_strings(parsed(*base, "Anthropic/hh-rlhf", "--stop", r"\n\n", "--stop", "END")) == ["\n\n", "END"]


def test_ctrl_c_says_how_to_go_on(tmp_path, prompt_file):
    """A second call of the same command finishes what the first began."""
    prompt_file.write_text("".join(f'{{"prompt": "Film {number} is"}}\n' for number in range(400)))
    out = tmp_path / "rollouts"
    arguments = ["-m", "recontrol", "collect", *MODEL, *REWARD, "--dataset", str(prompt_file), "--out", str(out), "--max-new-tokens", "8", "--batch-size", "1"]
    # Who runs the tests in the background may have switched interrupts off, and a child inherits that.
    running = process(*arguments, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while len(list(out.glob("shard-*.safetensors"))) < 3:
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.strip().splitlines()[-1] == "recontrol: interrupted; the batches that were finished are kept: repeat the command to go on from there"
    assert "Traceback" not in err
    assert 3 <= len(list(out.glob("shard-*.safetensors"))) < 400


def test_ctrl_c_in_train_says_how_to_go_on(rollout_folder, tmp_path):
    out = tmp_path / "value"
    arguments = ["-m", "recontrol", "train", "--rollouts", str(rollout_folder), "--out", str(out), "--hidden-dims", "8", "--device", "cpu"]
    # Long enough to be interrupted, however fast.
    endless = ["--epochs", "1000000", "--patience", "1000000"]
    running = process(*arguments, *endless, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not (out / "checkpoint.safetensors").exists():
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.strip().splitlines()[-1] == "recontrol: interrupted; what was done up to the last checkpoint is kept: repeat the command to go on from there"
    assert f"the same call goes on from the last checkpoint in {out}" in err and "Traceback" not in err
    assert sorted(path.name for path in out.iterdir()) == [".lock", "checkpoint.safetensors", "history.json"]
