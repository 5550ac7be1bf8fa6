"""What of the plugin of vLLM needs no vLLM; the rest is in tests/vllm_plugin."""

import importlib.util
import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import recontrol as rc
from recontrol.cli import main
from recontrol.vllm_plugin.self_test import prove
from recontrol.vllm_plugin.settings import MOST_STEPS, Settings, as_json, parse_control
from recontrol.vllm_plugin.steering import RequestControls
from recontrol.vllm_plugin.wrapping import wrap

pytestmark = pytest.mark.usefixtures("one_thread")
HIDDEN = 16
CPU = torch.device("cpu")


def value_function(seed, *hidden_dims, heads=1):
    torch.manual_seed(seed)
    return rc.ValueFunction(HIDDEN, hidden_dims or (24,), heads)


@pytest.fixture(scope="module")
def values():
    return {"helpful": value_function(1), "harmless": value_function(2, 20, 12), "both": value_function(3, heads=2)}


@pytest.fixture
def bank(tmp_path, values):
    for name, value in values.items():
        value.save_pretrained(tmp_path / "bank" / name)
    return tmp_path / "bank"


def test_a_control_is_a_mapping_or_json(values):
    given = {"value": "both", "step_size": 0.25, "steps": 7, "radius": 2, "target": -1.5, "head_weights": [1, -0.5]}
    for sent in (given, json.dumps(given)):
        control = parse_control(sent, values)
        found = (control.value, control.step_size, control.steps, control.radius, control.target, control.head_weights)
        assert found == (values["both"], 0.25, 7, 2.0, -1.5, (1.0, -0.5))
    plain = parse_control({"value": "helpful"}, values)
    assert (plain.step_size, plain.steps, plain.radius, plain.target) == (0.5, 30, None, None)
    assert parse_control(None, values) is None and parse_control("null", values) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", 'must be JSON such as {"value": "name"'),
        ("[" * 100_000, "must be JSON"),
        (3, "control must be a mapping of names to settings, found int"),
        ({"step_size": 0.5}, "one of 'helpful', 'harmless', 'both'; it is missing"),
        ({"value": "unknown"}, "found 'unknown'"),
        ({"value": "../bank/helpful"}, r"found '\.\./bank/helpful'"),
        ({"value": "/etc"}, "found '/etc'"),
        ({"value": ["helpful"]}, "found \\['helpful'\\]"),
        ({"value": "helpful", "alpha": 1}, "control: found alpha, wanted some of value, step_size"),
        ({"value": "helpful", "backend": "reference"}, "found backend, wanted some of value"),
        ({"value": "helpful", "steps": 2.5}, r"steps must be int, found 2\.5"),
        ({"value": "helpful", "steps": MOST_STEPS + 1}, f"steps must be {MOST_STEPS} or less, found {MOST_STEPS + 1}"),
        ({"value": "helpful", "step_size": -1}, "step_size must be finite and 0 or more, found -1"),
        ({"value": "helpful", "step_size": 10**400}, "step_size must be a finite number, found one too large for a float"),
        ({"value": "both", "head_weights": [1, 10**400]}, r"head_weights\[1\] must be a finite number"),
        ('{"value": "helpful", "step_size": NaN}', "step_size must be finite"),
        ({"value": "helpful", "radius": "1"}, "radius must be float, found '1'"),
        ({"value": "helpful", "target": float("inf")}, "target must be finite"),
        ({"value": "both"}, "has 2 heads: give head_weights"),
        ({"value": "both", "head_weights": [1]}, "head_weights must be 2 numbers"),
        ({"value": "x" * 5000}, "x{90,}\\.\\.\\.$"),
        ({"value": "helpful", "step_size": 1e39}, "step_size must be within the range of float32, found 1e\\+39"),
        ({"value": "both", "head_weights": [1, 1e39]}, "head_weights must be within the range of float32"),
    ],
)
def test_a_malformed_control_is_refused(values, given, message):
    with pytest.raises(ValueError, match=message):
        parse_control(given, values)


@pytest.mark.parametrize(
    "given",
    [
        {"value": np.str_("both"), "step_size": np.float32(0.25), "steps": np.int64(7), "radius": torch.tensor(2.0), "head_weights": np.array([1, -0.5])},
        {"value": "both", "step_size": 0.25, "steps": 7, "radius": 2, "head_weights": (torch.tensor(1), np.float16(-0.5))},
        np.str_('{"value": "both", "step_size": 0.25, "steps": 7, "radius": 2, "head_weights": [1, -0.5]}'),
    ],
    ids=["numpy", "torch in a tuple", "a text of numpy"],
)
def test_numbers_of_other_libraries_can_be_sent(values, given):
    sent = as_json(given)
    assert type(sent) is str
    for each in (given, sent):
        control = parse_control(each, values)
        assert (control.step_size, control.steps, control.radius, control.head_weights) == (0.25, 7, 2.0, (1.0, -0.5))
    with pytest.raises(ValueError, match="a control must be JSON"):
        parse_control({"value": "both", "step_size": object()}, values)


def test_settings_come_from_the_environment(bank, values):
    default = json.dumps({"value": "helpful", "steps": 5})
    settings = Settings.from_environment({"RECONTROL_BANK": str(bank), "RECONTROL_DEFAULT": default})
    assert list(settings.known) == ["both", "harmless", "helpful"]
    assert all(value.device.type == "meta" for value in settings.known.values())
    loaded = settings.load(CPU)
    hidden = torch.randn(2, HIDDEN)
    assert all(torch.equal(loaded[name](hidden), value(hidden)) for name, value in values.items())
    assert settings.control_of(None, loaded).steps == settings.control_of({"other": 1}, loaded).steps == 5
    asked = settings.control_of({"recontrol": {"value": "harmless"}}, loaded)
    assert asked.value is loaded["harmless"] and asked.steps == 30
    # A request may ask for none.
    assert settings.control_of({"recontrol": None}, loaded) is None
    without = Settings.from_environment({"RECONTROL_BANK": str(bank), "RECONTROL_DEFAULT": ""})
    assert without.control_of(None) is None and without.control_of({"recontrol": {"value": "helpful"}}).steps == 30


def test_without_a_bank_a_control_is_refused_and_not_passed_over():
    settings = Settings.from_environment({})
    assert settings.control_of(None) is None and settings.control_of({"other": 1}) is None
    with pytest.raises(ValueError, match="started without RECONTROL_BANK"):
        settings.control_of({"recontrol": {"value": "helpful"}})


def test_what_is_no_bank_stops_the_start(bank, tmp_path):
    def start(folder, default=""):
        Settings.from_environment({"RECONTROL_BANK": str(folder), "RECONTROL_DEFAULT": default})

    with pytest.raises(FileNotFoundError, match="missing, which is no folder"):
        start(tmp_path / "missing")
    (tmp_path / "empty" / ".cache").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no value function"):
        start(tmp_path / "empty")
    with pytest.raises(ValueError, match="RECONTROL_DEFAULT needs RECONTROL_BANK"):
        Settings.from_environment({"RECONTROL_DEFAULT": '{"value": "helpful"}'})
    with pytest.raises(ValueError, match=r"RECONTROL_DEFAULT: value must name .*found 'other'"):
        start(bank, '{"value": "other"}')
    (bank / "helpful" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"helpful.*is not the config of a value function"):
        start(bank)
    (bank / "both" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"both is no value function: it lacks model\.safetensors"):
        start(bank)


def new(request, control=None):
    arguments = None if control is None else {"recontrol": control}
    return SimpleNamespace(req_id=request, sampling_params=SimpleNamespace(extra_args=arguments))


def step(scheduled, new_requests=(), finished=(), drafts=None):
    return SimpleNamespace(
        num_scheduled_tokens=scheduled, scheduled_new_reqs=list(new_requests), finished_req_ids=set(finished), scheduled_spec_decode_tokens=drafts or {}
    )


def names(controls, values):
    return [None if control is None else next(name for name, value in values.items() if value is control.value) for control in controls]


@pytest.fixture
def requests(bank, values):
    settings = Settings.from_environment({"RECONTROL_BANK": str(bank)})
    return RequestControls(lambda extra_args: settings.control_of(extra_args, values))


def state(computed, total):
    return SimpleNamespace(num_computed_tokens=computed, num_tokens=total)


def test_rows_follow_the_batch_while_requests_come_and_go(requests, values):
    """The first of the model runners: a batch that is kept, in an order of its own."""
    first = step({"a": 3, "b": 2, "c": 4}, [new("a", {"value": "helpful"}), new("b"), new("c", {"value": "harmless"})])
    assert requests.step(first)
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["c", "a", "b"]), requests={"a": state(0, 3), "b": state(0, 2), "c": state(0, 9)})
    # The prompt of c is not yet read to its end.
    assert names(requests.rows_of_first_runner(runner, first), values) == [None, "helpful", None]
    second = step({"b": 1, "c": 5, "a": 3}, drafts={"a": [7, 8]})
    assert requests.step(second)
    runner.input_batch.req_ids = ["c", "b", "a"]
    runner.requests = {"a": state(3, 4), "b": state(2, 3), "c": state(4, 9)}
    assert names(requests.rows_of_first_runner(runner, second), values) == ["harmless", None, "helpful", "helpful", "helpful"]
    # a is finished, and its name comes again for a request without control.
    third = step({"a": 1, "b": 1}, [new("a")], finished={"a", "c"})
    assert not requests.step(third) and len(requests) == 0


def test_a_request_that_is_preempted_keeps_its_control(requests, values):
    requests.step(step({"a": 3}, [new("a", {"value": "helpful"})]))
    assert not requests.step(step({})) and len(requests) == 1
    assert requests.step(step({"a": 4}))


def test_rows_of_the_batch_that_is_made_anew(requests, values):
    """The second of the model runners."""
    requests.step(step({"a": 1, "b": 2, "c": 3}, [new("a", {"value": "helpful"}), new("b", {"value": "both", "head_weights": [1, 0]}), new("c")]))
    batch = SimpleNamespace(
        req_ids=["b", "c", "a"],
        num_reqs=3,
        num_computed_tokens_np=np.array([0, 5, 9, 0]),
        num_scheduled_tokens=np.array([2, 3, 1, 0]),
        prefill_len_np=np.array([8, 8, 4, 0]),
        cu_num_logits_np=np.array([0, 1, 2, 5]),
    )
    assert names(requests.rows_of_second_runner(batch), values) == [None, None, "helpful", "helpful", "helpful"]
    batch.num_computed_tokens_np[0] = 6
    assert names(requests.rows_of_second_runner(batch), values) == ["both", None, "helpful", "helpful", "helpful"]


class Runner:
    """As much of a model runner as the proof looks at."""

    def __init__(self, reaches):
        self.device, self.model_config = CPU, SimpleNamespace(dtype=torch.float32)
        self.edit, self.head, self.reaches = None, torch.nn.Linear(HIDDEN, 30), reaches

    def get_model(self):
        return self

    def compute_logits(self, hidden):
        return self.head(self.edit(hidden) if self.edit is not None and self.reaches else hidden)

    @contextmanager
    def editing(self, edit):
        self.edit = edit
        yield
        self.edit = None


def test_the_proof_fails_where_edits_do_not_reach_the_logits(values, monkeypatch):
    monkeypatch.setattr("recontrol.vllm_plugin.self_test._check_ranks", lambda name, edited: None)
    runner = Runner(reaches=True)
    prove(runner, values, runner.editing)
    runner = Runner(reaches=False)
    with pytest.raises(RuntimeError, match="edits do not reach the logits: with the states negated, the logits of Runner changed by 0 "):
        prove(runner, values, runner.editing)
    damaged = value_function(1)
    with torch.no_grad():
        damaged.layers[0].weight[3, 2] = float("nan")
    runner = Runner(reaches=True)
    with pytest.raises(RuntimeError, match="the value function 'damaged' gives values that are not finite"):
        prove(runner, {"damaged": damaged}, runner.editing)


def test_a_method_is_wrapped_once_and_a_missing_one_named():
    class Owner:
        def method(self, number):
            return number + 1

    seen = []
    for _ in range(2):
        wrap(Owner, "method", before=lambda owner, number: seen.append(number))
    assert Owner().method(4) == 5 and seen == [4]
    one = Owner()
    wrap(one, "method", after=lambda number: seen.append(-number))
    assert one.method(3) == Owner().method(3) == 4 and seen == [4, 3, -3, 3]
    for owner in (Owner, one):
        with pytest.raises(ImportError, match=r"no Owner\.other, which the plugin recontrol needs"):
            wrap(owner, "other")


def serve(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--model", "model", *map(str, arguments)])
    return stopped.value.code


def test_serve_says_what_to_install(bank, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert serve("--bank", bank) == 2
    assert "recontrol serve needs vLLM: pip install 'recontrol[vllm]'" in capsys.readouterr().err


def test_serve_starts_vllm_with_the_plugin_set_up(bank, monkeypatch, tmp_path, capsys):
    started = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("recontrol.cli.serve.version", lambda name: "1.0")
    monkeypatch.setattr("recontrol.cli.serve.entry_points", lambda group: [SimpleNamespace(name="recontrol")])
    monkeypatch.setattr("os.execve", lambda path, command, environment: started.append((command, environment)))
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    monkeypatch.chdir(bank.parent)
    assert serve("--bank", bank.name, "--default", '{"value": "helpful"}', "--", "--port", "8080") == 0
    command, environment = started.pop()
    assert command == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "model", "--port", "8080"]
    assert (environment["RECONTROL_BANK"], environment["RECONTROL_DEFAULT"]) == (str(bank), '{"value": "helpful"}')
    assert environment["VLLM_PLUGINS"] == "another,recontrol"
    # What cannot be meant is refused before a model is loaded.
    assert serve("--bank", bank, "--default", '{"value": "other"}') == 2 and serve("--bank", tmp_path / "none") == 2
    monkeypatch.setattr("recontrol.cli.serve.entry_points", lambda group: [])
    assert serve("--bank", bank) == 2
    assert "vLLM would not find the plugin" in capsys.readouterr().err and started == []
