"""`recontrol generate`: plans, batches and traces on the command line."""

import json

import pytest
import torch
from test_cli import EXAMPLE, run

import recontrol as rc

LM = EXAMPLE / "lm"
MODEL = ["generate", "--model", LM, "--dtype", "float32", "--device", "cpu"]
PROMPTS = ["--prompt", "A film", "--prompt", "It is the best that I have ever seen, and", "--prompt", "One"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def value_folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("value")
    rc.ValueFunction(256, (16,)).save_pretrained(path)
    return path


def test_the_plan_needs_no_weights(tmp_path, capsys):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((LM / name).read_bytes())
    assert run("generate", "--model", tmp_path, "--device", "cpu", "--dtype", "float32", *PROMPTS, "--plan", "--cache-budget", "1MiB") == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    per_token = int(lines["cache of a token"].split()[0])
    assert f"1048576 bytes, {1048576 // per_token} tokens" in lines["budget"]
    assert run("generate", "--model", tmp_path, "--device", "cpu", "--dtype", "bfloat16", *PROMPTS, "--plan", "--cache-budget", "1MiB") == 0
    assert f"{per_token // 2} bytes over all layers" in capsys.readouterr().out


def test_batches_print_the_same_in_the_order_of_the_prompts(value_folder, capsys):
    printed = []
    for options in (["--batching", "continuous"], ["--batching", "static", "--batch-size", 1], ["--cache-budget", "1MiB"]):
        assert run(*MODEL, *PROMPTS, "--max-new-tokens", 6, "--value", value_folder, "--step-size", 5, *options) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    places = [printed[0].index(prompt) for prompt in PROMPTS[1::2]]
    assert places == sorted(places)


def test_traces_are_written(value_folder, tmp_path):
    out = tmp_path / "new" / "responses.jsonl"
    assert run(*MODEL, *PROMPTS, "--max-new-tokens", 4, "--value", value_folder, "--trace", "--out", out) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS[1::2]
    for line in lines:
        assert set(line["trace"]) == {"value_before", "value_after", "edit_norm", "divergence"}
        assert len(line["trace"]["divergence"]) == 4 or line["finish"] == "eos"


@pytest.mark.parametrize("options", [["--trace"], ["--trace", "--value", "somewhere"], ["--trace", "--out", "somewhere"]])
def test_a_trace_of_nothing_is_refused(options, capsys):
    assert run(*MODEL, *PROMPTS, *options) == 2
    assert "--trace needs --value and --out" in capsys.readouterr().err


def test_a_budget_that_is_too_small_is_an_error_of_one_line(capsys):
    assert run(*MODEL, *PROMPTS, "--cache-budget", "200KB") == 2
    assert "prompts do not fit into" in capsys.readouterr().err.splitlines()[-1]
