"""Requests in vLLM's engine, compared with `model.generate` and with each other."""

import ast
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from served import ABSENT, CONTROLS, CROWDED, DRAFTS, ENGINE, MAX_TOKENS, MODEL, PROMPTS, controller, counted, parameters, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def engine(environment):
    from vllm import LLM

    # Ready for adapters: their layer wraps the one that is hooked.
    engine = LLM(str(MODEL), **{**ENGINE, **CROWDED}, enable_lora=True, disable_log_stats=False)
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def alone(engine):
    """The tokens of each prompt under each control, asked for one at a time."""
    return {(prompt, number): tokens(engine, [prompt], [control])[0] for prompt in PROMPTS for number, control in enumerate(CONTROLS)}


@pytest.fixture(scope="module")
def generated(bank):
    """The same from `model.generate` in this process, under Controller."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), AutoTokenizer.from_pretrained(MODEL)
    found = {}
    for number, control in enumerate(CONTROLS):
        handle = None if control in (ABSENT, None) else controller(bank, control).attach(model)
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")
            new = model.generate(**ids, max_new_tokens=MAX_TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
            found[prompt, number] = new.tolist()
        if handle is not None:
            handle.detach()
    return found


def test_greedy_tokens_are_those_of_generate_under_the_controller(alone, generated):
    assert alone == generated


def test_each_control_changes_what_is_said(alone):
    """Else the comparison would say nothing."""
    for number, control in enumerate(CONTROLS):
        changed = [alone[prompt, number] != alone[prompt, 0] for prompt in PROMPTS]
        assert not any(changed) if control in (ABSENT, None) else any(changed), control


def test_requests_in_one_batch_get_what_they_get_alone(engine, alone):
    """More requests than fit at once, of different lengths: they come and go, wait, and lose their blocks and begin again."""
    asked = [(prompt, number) for number in range(len(CONTROLS)) for prompt in PROMPTS] * 2
    lengths = [3 + place % (MAX_TOKENS - 2) for place in range(len(asked))]
    outputs = engine.generate(
        [prompt for prompt, _ in asked],
        [parameters(CONTROLS[number], max_tokens=length) for (_, number), length in zip(asked, lengths, strict=True)],
        use_tqdm=False,
    )
    found = [list(output.outputs[0].token_ids) for output in outputs]
    assert found == [alone[key][:length] for key, length in zip(asked, lengths, strict=True)]
    assert counted(engine, "num_preemptions") > 0


def test_log_probabilities_of_the_prompt_are_those_without_control(engine):
    steered, plain = (
        engine.generate(PROMPTS[2], parameters(control, max_tokens=1, prompt_logprobs=2, logprobs=2), use_tqdm=False)[0] for control in (CONTROLS[1], ABSENT)
    )
    assert steered.prompt_logprobs == plain.prompt_logprobs
    # Those of new tokens are of the distribution that was sampled from.
    assert steered.outputs[0].logprobs != plain.outputs[0].logprobs


def test_several_samples_of_one_request_share_its_control(engine, alone):
    output = engine.generate(PROMPTS[0], parameters(CONTROLS[1], temperature=1e-4, n=3), use_tqdm=False)[0]
    assert [list(sample.token_ids) for sample in output.outputs] == [alone[PROMPTS[0], 1]] * 3


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"value": "../bank/up"}, r"one of 'both', 'deep', 'other', 'up'; found '\.\./bank/up'"),
        ({"value": "up", "steps": 10**9}, "steps must be 1000 or less"),
        ({"value": "up", "alpha": 1}, "control: found alpha, wanted some of value"),
        ("{", "must be JSON"),
    ],
)
def test_a_malformed_control_is_refused_and_the_engine_goes_on(engine, alone, control, message):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=message):
        engine.generate(PROMPTS[0], parameters(control), use_tqdm=False)
    assert tokens(engine, PROMPTS[:1], CONTROLS[1:2]) == [alone[PROMPTS[0], 1]]


@pytest.fixture
def start(environment, tmp_path):
    """Start an engine in a process of its own; what it printed and its exit status."""

    def started(code, folder, **options):
        program = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from served import *\n"
            "if __name__ == '__main__':\n"
            "    from vllm import LLM\n"
            f"    engine = LLM(str(MODEL), **ENGINE, **{options!r})\n"
            f"    {code}\n"
        )
        (tmp_path / "script.py").write_text(program)
        command = [sys.executable, tmp_path / "script.py", Path(__file__).parent]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, env={**os.environ, "RECONTROL_BANK": str(folder)}, start_new_session=True, **streams) as process:
            try:
                output, _ = process.communicate(timeout=400)
            finally:
                # The processes that it started, too, which would wait for it forever.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return output, process.returncode

    return started


def test_an_engine_does_not_start_without_its_bank(start, tmp_path):
    output, status = start("print('STARTED')", tmp_path / "missing")
    assert status != 0 and "missing, which is no folder" in output and "STARTED" not in output


def test_two_tensor_parallel_ranks_with_draft_tokens_say_the_same(start, bank, alone):
    """Rows of draft tokens are edited like others, since the model samples from them."""
    code = "print('FOUND', ([tokens(engine, [text] * len(CONTROLS), CONTROLS) for text in PROMPTS], counted(engine, 'spec_decode_num_accepted_tokens')))"
    output, status = start(code, bank, tensor_parallel_size=2, disable_log_stats=False, **DRAFTS)
    assert status == 0, output[-3000:]
    line = next(line for line in output.splitlines() if line.startswith("FOUND"))
    found, accepted = ast.literal_eval(line.removeprefix("FOUND ").strip())
    assert accepted > 0
    assert found == [[alone[prompt, number] for number in range(len(CONTROLS))] for prompt in PROMPTS]
