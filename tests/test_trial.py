"""The trial of continuous batching: what it finds, and that it leaves no trace."""

import pytest
import torch
from controlled import hooks_on, llama, value_function
from generating import continuous_only
from test_controller_models import SMALL
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import recontrol as rc
from recontrol.decoding.recording import record_hidden_states
from recontrol.generation import trial

pytestmark = [pytest.mark.usefixtures("one_thread", "quick_collection"), continuous_only]


@pytest.fixture(autouse=True)
def _untried(monkeypatch):
    monkeypatch.setattr(trial, "_tried", {})


def test_a_model_that_runs_is_tried_once_and_left_as_it_was(monkeypatch):
    model, controller = llama().train(), rc.Controller(value_function(32), self_check=False)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with record_hidden_states(model) as recorder, controller.attach(model) as handle:
        assert trial.why_not(model) is None
        assert recorder.steps == [] and handle.edited_rows == 0
    assert torch.equal(torch.rand(1), expected) and model.training and hooks_on(model) == []
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(trial, "_try", lambda model, owner: "tried again")
    assert trial.why_not(model) is None
    assert trial.why_not(llama(num_hidden_layers=3)) == "tried again"


def test_a_manager_that_cannot_be_made_leaves_the_attention_as_it_was(monkeypatch):
    model = llama()

    def failing(**keywords):
        model.set_attn_implementation("eager")
        raise ValueError("no such layer")

    monkeypatch.setattr(model, "init_continuous_batching", failing, raising=False)
    assert "no such layer" in trial.why_not(model) and model.config._attn_implementation == "sdpa"


def test_what_transformers_cannot_run_has_a_reason(monkeypatch):
    monkeypatch.setattr(trial, "_respond", lambda model, prompts: (_ for _ in ()).throw(TypeError("no such cache")))
    assert trial.why_not(llama()) == "transformers' continuous batching fails with LlamaForCausalLM: no such cache"


def test_states_that_differ_from_those_of_a_plain_call_have_a_reason(monkeypatch):
    respond = trial._respond

    def wrong(model, prompts):
        """As if positions were counted over both prompts."""
        return [(prompt[::-1], new) for prompt, new in respond(model, prompts)]

    monkeypatch.setattr(trial, "_respond", wrong)
    assert "LlamaForCausalLM has other states than alone, by " in trial.why_not(llama())


def test_auto_is_static_where_the_trial_fails(monkeypatch, caplog):
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=48)).eval()
    reason = trial.why_not(model)
    if reason is None:
        pytest.skip("this release of transformers runs GPT-NeoX in continuous batches")
    control = rc.Control(value_function(32), 0.5, 3)

    class Numbers:
        pad_token_id, eos_token_id = 0, 2

        def decode(self, ids, **options):
            return " ".join(map(str, ids))

    with caplog.at_level("INFO", logger="recontrol"):
        found = rc.generate(model, Numbers(), [[5, 6, 7], [8]], control, max_new_tokens=3)
    assert {each.batching for each in found} == {"static"} and reason in caplog.text
    with pytest.raises(ValueError, match="batching='continuous' cannot be had here: transformers' continuous batching fails with GPTNeoXForCausalLM"):
        rc.generate(model, Numbers(), [[5, 6, 7]], control, batching="continuous")
