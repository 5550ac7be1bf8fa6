"""The hooks in a worker, with stand-ins for vLLM's two model runners: the second does not run without Triton on a GPU."""

import dataclasses
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from served import HIDDEN
from torch import nn

import recontrol as rc
from recontrol.vllm_plugin.settings import Settings

VOCABULARY = 50


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    import vllm.distributed

    monkeypatch.setattr(vllm.distributed, "get_pp_group", lambda: SimpleNamespace(is_last_rank=True))
    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_world_size", lambda: 1)


def model(deaf=False):
    """A model as vLLM has them: its logits come from its LogitsProcessor, or, if it is deaf, from elsewhere."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    class Logits(LogitsProcessor):
        def __init__(self):
            nn.Module.__init__(self)

        def forward(self, lm_head, hidden_states):
            return lm_head(hidden_states)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head, self.logits_processor = nn.Linear(HIDDEN, VOCABULARY), Logits()

        def compute_logits(self, hidden_states):
            return self.lm_head(hidden_states) if deaf else self.logits_processor(self.lm_head, hidden_states)

    return Model()


class Runner:
    """What both model runners have."""

    def __init__(self, deaf=False):
        self.model, self.device, self.model_config = model(deaf), torch.device("cpu"), SimpleNamespace(dtype=torch.float32)
        self.model_memory_usage = 0
        self.hidden = torch.randn(40, HIDDEN)

    def get_model(self):
        return self.model


class First(Runner):
    def __init__(self, deaf=False):
        super().__init__(deaf)
        self.input_batch, self.requests = SimpleNamespace(req_ids=[]), {}

    def execute_model(self, scheduler_output, intermediate_tensors=None):
        self.input_batch.req_ids = sorted(scheduler_output.num_scheduled_tokens, reverse=True)
        self.requests = {name: SimpleNamespace(num_computed_tokens=3, num_tokens=4) for name in self.input_batch.req_ids}
        sampled = self.model.compute_logits(self.hidden[: len(self.input_batch.req_ids)])
        self.prompt = self.model.compute_logits(self.hidden)
        return sampled

    def run(self, scheduler_output):
        return self.execute_model(scheduler_output), sorted(scheduler_output.num_scheduled_tokens, reverse=True)


class Second(Runner):
    def __init__(self, deaf=False):
        super().__init__(deaf)
        self.req_states = object()

    def execute_model(self, scheduler_output, intermediate_tensors=None, dummy_run=False):
        if dummy_run:
            return self.model.compute_logits(self.hidden)
        self.prompt = self.model.compute_logits(self.hidden)

    def sample(self, hidden_states, input_batch, grammar_output):
        return self.model.compute_logits(hidden_states)

    def run(self, scheduler_output):
        names = sorted(scheduler_output.num_scheduled_tokens)
        assert self.execute_model(scheduler_output) is None
        number = len(names)
        batch = SimpleNamespace(
            req_ids=names,
            num_reqs=number,
            num_computed_tokens_np=np.full(number, 3),
            num_scheduled_tokens=np.ones(number, int),
            prefill_len_np=np.full(number, 4),
            cu_num_logits_np=np.arange(number + 1),
        )
        return self.sample(self.hidden[:number], batch, None), names


class Worker:
    def __init__(self, runner):
        self.model_runner = runner
        self.model_config = SimpleNamespace(get_hidden_size=lambda: HIDDEN, hf_text_config=SimpleNamespace(vocab_size=VOCABULARY, model_type="llama"))

    def load_model(self):
        return "loaded"

    def compile_or_warm_up_model(self):
        return "warm"


def steered(runner, bank, default=None):
    from recontrol.vllm_plugin.steering import Steering

    worker = Worker(runner)
    Steering(worker, Settings.from_environment({"RECONTROL_BANK": str(bank), "RECONTROL_DEFAULT": default or ""}))
    assert worker.load_model() == "loaded"
    return worker


def step(scheduled, **controls):
    new = [SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=control and {"recontrol": control})) for name, control in controls.items()]
    return SimpleNamespace(num_scheduled_tokens=dict.fromkeys(scheduled, 1), scheduled_new_reqs=new, finished_req_ids=set(), scheduled_spec_decode_tokens={})


@pytest.mark.parametrize("kind", [First, Second])
def test_sampled_positions_are_edited_and_nothing_else(kind, bank):
    runner = kind()
    worker = steered(runner, bank)
    assert worker.compile_or_warm_up_model() == "warm"
    controls = {"a": {"value": "up"}, "b": None, "c": {"value": "deep", "steps": 5}}
    logits, names = runner.run(step("abc", **controls))
    for row, name in enumerate(names):
        state = runner.hidden[row : row + 1]
        if controls[name]:
            state = rc.ascend(state, rc.ValueFunction.from_pretrained(bank / controls[name]["value"]), 0.5, controls[name].get("steps", 30))
        assert torch.allclose(logits[row : row + 1], runner.model.lm_head(state), atol=1e-6)
        assert torch.allclose(logits[row], runner.model.lm_head(runner.hidden[row])) == (not controls[name])
    assert torch.equal(runner.prompt, runner.model.lm_head(runner.hidden))
    # Calls of others to the same layer are not edited.
    assert torch.equal(runner.model.compute_logits(runner.hidden), runner.prompt)
    if kind is Second:
        assert torch.equal(runner.execute_model(step("abc"), dummy_run=True), runner.prompt)
    assert runner.model_memory_usage > 4 * HIDDEN * 64


@pytest.mark.parametrize("kind", [First, Second])
def test_what_warms_up_is_not_edited_by_the_default(kind, bank):
    runner = kind()
    worker = steered(runner, bank, '{"value": "up"}')
    logits, names = runner.run(step("ab", a=None, b=None))
    assert torch.equal(logits, runner.model.lm_head(runner.hidden[: len(names)]))
    with pytest.raises(RuntimeError, match="came before it was proven"):
        runner.run(step("c", c={"value": "up"}))
    worker.compile_or_warm_up_model()
    logits, names = runner.run(step("de", d=None, e=None))
    assert not torch.allclose(logits, runner.model.lm_head(runner.hidden[: len(names)]))


@pytest.mark.parametrize("kind", [First, Second])
def test_a_model_that_edits_do_not_reach_does_not_start(kind, bank):
    worker = steered(kind(deaf=True), bank)
    with pytest.raises(RuntimeError, match="edits do not reach the logits"):
        worker.compile_or_warm_up_model()


@pytest.mark.parametrize("kind", [First, Second])
def test_a_step_in_which_no_edit_takes_place_is_an_error(kind, bank):
    runner = kind()
    steered(runner, bank).compile_or_warm_up_model()
    runner.model.compute_logits = lambda hidden: runner.model.lm_head(hidden)
    runner.run(step("b", b=None))
    with pytest.raises(RuntimeError, match="requests would go unsteered"):
        runner.run(step("a", a={"value": "up"}))


def test_what_cannot_be_steered_is_refused_before_the_model_is_loaded(bank, tmp_path):
    from recontrol.vllm_plugin.steering import Steering

    settings = Settings.from_environment({"RECONTROL_BANK": str(bank)})
    with pytest.raises(RuntimeError, match=r"Runner is no model runner that the plugin recontrol knows"):
        Steering(Worker(type("Runner", (), {"execute_model": None})()), settings)
    pooling = First()
    pooling.is_pooling_model = True
    with pytest.raises(RuntimeError, match="a pooling model samples no tokens"):
        Steering(Worker(pooling), settings)
    adaptive = Second()
    adaptive.speculative_config = SimpleNamespace(enable_adaptive_verification=True)
    with pytest.raises(RuntimeError, match="speculative decoding with enable_adaptive_verification cannot be steered"):
        Steering(Worker(adaptive), settings)
    adaptive.speculative_config.enable_adaptive_verification = False
    Steering(Worker(adaptive), settings)
    narrow, foreign = rc.ValueFunction(32, (8,)), rc.ValueFunction(HIDDEN, (8,), provenance={"base_model": {"vocab_size": 7}})
    for value, message in ((narrow, r"is for hidden states of size 32, the model has size 256"), (foreign, r"its vocab_size was 7, here it is 50")):
        value.save_pretrained(tmp_path / "bank" / "unfit")
        with pytest.raises(ValueError, match=f"the value function 'unfit' .*{message}"):
            Steering(Worker(First()), Settings.from_environment({"RECONTROL_BANK": str(tmp_path / "bank")}))


def test_this_vllm_has_what_the_plugin_asks_of_the_second_runner():
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    fields = {field.name for field in dataclasses.fields(InputBatch)}
    assert {"req_ids", "num_reqs", "num_computed_tokens_np", "num_scheduled_tokens", "prefill_len_np", "cu_num_logits_np"} <= fields
    assert "input_batch" in inspect.signature(GPUModelRunner.sample).parameters
    assert "dummy_run" in inspect.signature(GPUModelRunner.execute_model).parameters
    source = inspect.getsource(GPUModelRunner)
    assert "self.req_states" in source and "self.sample(" in source and "self.speculative_config =" in source
