"""docs/integrations.md: its blocks run in order, and the result of each integration is compared with `model.generate` under the same controller."""

import contextlib
import dataclasses
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from test_docs import ROOT, fences
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, dynamic_module_utils

for package in ("trl", "peft", "fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason=f"{package} is not installed; it is in the extra `dev`")

PAGE = ROOT / "docs" / "integrations.md"
# The port of the page; the test replaces it by a free one.
PORT = "8000"
NEW = {"max_new_tokens": 24, "do_sample": False}
# All given, because a pipeline has its own defaults.
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # TRL's own use of transformers, and its warning that an argument is experimental.
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning", "ignore:You are using 'rollout_func':UserWarning"),
]


@contextlib.contextmanager
def server(command, port, folder):
    """Run the server of a shell block, from its first answer until the end of the `with` block."""
    words = shlex.split(command)
    log = folder / "server.log"
    with log.open("w") as output:
        # transformers copies the code of model folders into its cache of modules: use a temporary one.
        environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
        process = subprocess.Popen([Path(sys.executable).parent / words[0], *words[1:]], env=environment, stdout=output, stderr=output)
        try:
            until = time.monotonic() + 120
            while not answers(f"http://localhost:{port}/health"):
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(30)


def answers(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.fixture(scope="module")
def page(tmp_path_factory, one_thread):
    """The names that the page defines, after all its blocks have run in an empty folder that has only `examples` in it."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "examples").symlink_to(ROOT / "examples")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    text = PAGE.read_text(encoding="utf-8").replace(PORT, port)
    commands, namespace = fences(text, "sh"), {"__name__": "integrations"}
    with contextlib.chdir(folder), contextlib.ExitStack() as running:
        for line, code in fences(text, "python"):
            while commands and commands[0][0] < line:
                running.enter_context(server(commands.pop(0)[1], port, folder))
            exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), namespace)
    assert not commands
    return {**namespace, "folder": folder}


def text_of(page, tokens):
    return page["tokenizer"].decode(tokens, skip_special_tokens=True)


def response(page, model, prompt, controller=None, **options):
    """The new tokens of `generate` for one prompt, under control or not."""
    inputs = page["tokenizer"](prompt, return_tensors="pt")
    torch.manual_seed(0)
    with controller.attach(model) if controller else contextlib.nullcontext():
        return model.generate(**inputs, **NEW | options)[0, inputs.input_ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def expected(page):
    """The controlled response to the page's first prompt, which differs from the uncontrolled one."""
    controlled = response(page, page["model"], page["texts"][0], page["controller"])
    assert controlled != response(page, page["model"], page["texts"][0])
    return controlled


def test_a_pipeline_answers_batches_as_generate_answers_each_prompt(page, expected):
    wanted = [text_of(page, response(page, page["model"], text, page["controller"])) for text in page["texts"]]
    assert [answer[0]["generated_text"] for answer in page["answers"]] == wanted
    assert wanted[0] == text_of(page, expected)


@pytest.mark.parametrize("options", [SAMPLING, {"num_beams": 3}], ids=["sampling", "beam search"])
def test_a_pipeline_gives_the_tokens_of_generate(page, options):
    text, pipe = page["texts"][0], page["pipe"]

    def tokens():
        torch.manual_seed(0)
        inputs = page["tokenizer"](text, return_tensors="pt").input_ids
        return pipe(text, return_tensors=True, **NEW | options)[0]["generated_token_ids"][inputs.shape[1] :]

    with page["controller"].attach(pipe.model):
        controlled = tokens()
    assert controlled == response(page, page["model"], text, page["controller"], **options)
    assert controlled != tokens() == response(page, page["model"], text, **options)


def test_a_streamer_gets_the_controlled_response(page, expected):
    assert page["streamed"] == text_of(page, expected)


def test_a_draft_model_changes_no_token(page, expected):
    assert page["assisted"][0, page["inputs"].input_ids.shape[1] :].tolist() == expected
    # Sampling accepts proposals by another rule; with one token left to choose from, it must give the same response.
    only = {"do_sample": True, "top_k": 1}
    assert response(page, page["model"], page["texts"][0], page["controller"], assistant_model=page["draft"], **only) == expected


def test_an_adapted_model_is_controlled(page, expected):
    """New adapters change nothing. Trained ones, on the output embedding too, match the model they are merged into."""
    from peft import LoraConfig, get_peft_model

    assert page["by_adapted"][0, page["inputs"].input_ids.shape[1] :].tolist() == expected
    fresh = AutoModelForCausalLM.from_pretrained(page["folder"] / "served")
    fresh.config.tie_word_embeddings, fresh.lm_head.weight = False, torch.nn.Parameter(fresh.lm_head.weight.detach().clone())
    adapted = get_peft_model(fresh, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])).eval()
    torch.manual_seed(0)
    # The merged weights count as another model.
    controller = dataclasses.replace(page["controller"], allow_other_model=True)

    @torch.no_grad()
    def logits(model, controlled=True):
        with controller.attach(model) if controlled else contextlib.nullcontext():
            return model(**page["inputs"]).logits

    with torch.no_grad():
        base = logits(adapted)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    trained, free = logits(adapted), logits(adapted, controlled=False)
    # Rounding of the merged products, on logits of about 10.
    torch.testing.assert_close(trained, logits(adapted.merge_and_unload()), rtol=1e-4, atol=1e-3)
    assert all((trained - other).abs().max() > 0.1 for other in (free, base))


def test_the_server_gives_the_controlled_response(page, expected):
    assert page["served"] == text_of(page, expected)
    assert "".join(page["chunks"]) == page["served"] and len(page["chunks"]) > 3


def test_a_folder_with_its_own_generation_is_controlled_where_its_code_is_trusted(page, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(page["folder"])
    free = response(page, page["model"], page["texts"][0])
    untrusted = AutoModelForCausalLM.from_pretrained("served")
    assert response(page, untrusted, page["texts"][0]) == free != expected
    trusted = AutoModelForCausalLM.from_pretrained("served", trust_remote_code=True)
    assert response(page, trusted, page["texts"][0]) == expected
    # Some callers pass the tokens as a positional argument.
    assert trusted.generate(page["inputs"].input_ids, **NEW)[0].tolist()[-len(expected) :] == expected
    # The forward call, which a trainer uses, is uncontrolled.
    assert torch.equal(trusted(**page["inputs"]).logits, untrusted(**page["inputs"]).logits)
    # Without its value function it raises and does not respond uncontrolled.
    monkeypatch.chdir(tmp_path)
    trusted.generate.func.__globals__["controller"].cache_clear()
    with pytest.raises((OSError, ValueError), match="value"):
        response(page, trusted, page["texts"][0])


class Replay:
    """Replaces `LlamaForCausalLM.generate`: records calls and results, or returns recorded results."""

    def __init__(self, monkeypatch, recorded=None):
        self.calls = []
        original = LlamaForCausalLM.generate

        def generate(model, **options):
            torch.manual_seed(7)
            self.calls.append((options, original(model, **options) if recorded is None else recorded[len(self.calls)][1]))
            # Shuffling afterwards must not depend on whether anything was sampled.
            torch.manual_seed(7)
            return self.calls[-1][1]

        monkeypatch.setattr(LlamaForCausalLM, "generate", generate)


def new_trainer(page, kind, folder):
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    torch.manual_seed(0)
    # beta adds a reference model, the policy without its adapters. Two iterations over the samples add log-probabilities of an old policy.
    arguments = getattr(trl, f"{kind}Config")(
        str(folder), learning_rate=0.01, beta=0.1, num_iterations=2, max_steps=2, per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, eval_strategy="no", per_device_eval_batch_size=4,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": page["prompts"][:4]})
    return getattr(trl, f"{kind}Trainer")(
        AutoModelForCausalLM.from_pretrained(page["folder"] / "served"),
        lambda completions, **columns: [float(len(set(completion))) for completion in completions],
        args=arguments, train_dataset=data, eval_dataset=data, processing_class=page["tokenizer"], peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_under_control_trl_samples_controlled_rollouts_and_trains_the_free_model_on_them(page, kind, tmp_path, monkeypatch):
    """With log-probabilities of the controlled policy, the weights would differ from those of training on given responses."""
    trainer = new_trainer(page, kind, tmp_path)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    with monkeypatch.context() as patch:
        rollouts = Replay(patch)
        with page["controller"].attach(trainer.model) as handle:
            trainer.train()
    assert len(rollouts.calls) == 1 and handle.edited_rows > 8

    twin = new_trainer(page, kind, tmp_path)
    options, tokens = rollouts.calls[0]
    torch.manual_seed(7)
    assert not torch.equal(twin.model.generate(**options), tokens)
    with page["controller"].attach(twin.model):
        torch.manual_seed(7)
        assert torch.equal(twin.model.generate(**options), tokens)

    with monkeypatch.context() as patch:
        Replay(patch, rollouts.calls)
        twin.train()
    trained, wanted = dict(trainer.model.named_parameters()), dict(twin.model.named_parameters())
    assert all(torch.equal(trained[name], wanted[name]) for name in wanted)
    assert not all(torch.equal(trained[name], before[name]) for name in before)


def test_the_pages_trainers_made_their_steps(page):
    # Eight responses each: all under control, then half of them.
    assert [len(scores) for scores in page["scores"]] == [8, 8] and page["trainer"].state.global_step == 1
    assert 8 < page["handle"].edited_rows <= 8 * 16


def test_logged_completions_are_controlled(page, tmp_path):
    pytest.importorskip("pandas", reason="pandas is not installed; TRL makes its table with it")
    from trl import LogCompletionsCallback

    trainer, new = new_trainer(page, "GRPO", tmp_path), 12
    callback = LogCompletionsCallback(trainer, GenerationConfig(max_new_tokens=new, eos_token_id=2, pad_token_id=0), freq=1)
    tables = []
    for controller in (page["controller"], None):
        callback.table, callback._last_logged_step = [], -1
        with controller.attach(trainer.model) if controller else contextlib.nullcontext():
            callback.on_step_end(trainer.args, trainer.state, trainer.control, processing_class=page["tokenizer"])
        tables.append([row[2] for row in callback.table])
        assert tables[-1] == [text_of(page, response(page, page["model"], prompt, controller, max_new_tokens=new)) for prompt in page["prompts"][:4]]
    assert tables[0] != tables[1]
