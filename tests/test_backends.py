"""Which backend runs: the one asked for or none, the first that can with "auto", and `backend_info` says so."""

import importlib.util
import inspect
import json
import logging
import re
import sys

import pytest
import torch
from oracle import RUNNING, runs_on_cpu

import recontrol as rc
from recontrol import _C
from recontrol.ascent import backends
from recontrol.ascent.arguments import AscentArguments, normalise
from recontrol.ascent.backends import BACKENDS, capturable, extension, names, order

CHOICES = "choose one of 'auto', 'cpu', 'torch', 'cuda', 'triton', 'oracle'"
SIZE = 6
LOAD_ERROR = "the C++ extension could not be loaded (no such thing); install recontrol with a C++ compiler at hand"

# Ascents that the C++ backend cannot run, and why.
BEYOND_CPU = {
    "float64": ((8,), torch.float64, "it computes in float32, the tensors are float64"),
    "one layer": ((), torch.float32, "it has kernels for two and three linear layers, this value function has 1"),
    "four layers": ((8, 7, 6), torch.float32, "it has kernels for two and three linear layers, this value function has 4"),
}


@pytest.fixture(autouse=True)
def nothing_logged_yet(monkeypatch):
    monkeypatch.setattr(backends, "_logged", set())


@pytest.fixture
def unloaded(monkeypatch):
    """As if the extension had not been found."""
    monkeypatch.setattr(extension, "load_error", LOAD_ERROR)
    monkeypatch.setattr(extension, "module", None)


@pytest.fixture
def used(monkeypatch):
    """The names of the backends that run, in order."""
    found: list[str] = []
    for name, backend in BACKENDS.items():

        def run(*arguments, name=name, original=backend.run):
            found.append(name)
            return original(*arguments)

        monkeypatch.setattr(backend, "run", run)
    return found


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def make(dims=(8,), dtype=torch.float32):
    return torch.randn(3, SIZE, dtype=dtype), rc.ValueFunction(SIZE, dims).to(dtype)


def arguments_of(hidden, value) -> AscentArguments:
    return normalise(hidden, value, 0.5, 3, None, None, None, None)


def logged(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "recontrol"]


class TestByName:
    @pytest.mark.parametrize("name", RUNNING)
    def test_it_is_the_one_that_runs(self, used, name):
        hidden, value = make()
        for _ in range(2):
            rc.ascend(hidden, value, backend=name)
        assert used == [name, name]

    @pytest.mark.parametrize("dims,dtype,reason", BEYOND_CPU.values(), ids=BEYOND_CPU)
    def test_it_raises_rather_than_let_another_run(self, used, caplog, dims, dtype, reason):
        caplog.set_level(logging.INFO, "recontrol")
        hidden, value = make(dims, dtype)
        with pytest.raises(RuntimeError, match=exactly(f"backend 'cpu' cannot run here: {reason}; {CHOICES}")):
            rc.ascend(hidden, value, backend="cpu")
        assert used == [] and logged(caplog) == []
        # The others run it.
        for name in ("torch", "oracle"):
            rc.ascend(hidden, value, backend=name)
        assert used == ["torch", "oracle"]

    def test_without_the_extension_the_reason_is_that_of_its_loading(self, unloaded, used):
        with pytest.raises(RuntimeError, match=exactly(f"backend 'cpu' cannot run here: {LOAD_ERROR}; {CHOICES}")):
            rc.ascend(*make(), backend="cpu")
        assert used == []

    def test_states_that_are_not_on_the_cpu(self):
        """Seen before a kernel reads an address of another device."""
        hidden, value = make()
        hidden, value = hidden.to("meta"), value.to("meta")
        with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run here: it runs on the CPU, the tensors are on meta; choose one of"):
            backends.choose("cpu", arguments_of(hidden, value), value.prepared())
        assert backends.choose("auto", arguments_of(hidden, value), value.prepared()) is BACKENDS["torch"]

    @pytest.mark.parametrize("name", ["gpu", "", "Auto", None])
    def test_an_unknown_one_names_the_choices(self, used, name):
        hidden, value = make()
        for choose in (lambda: rc.ascend(hidden, value, backend=name), lambda: backends.choose(name, arguments_of(hidden, value), value.prepared())):
            with pytest.raises(ValueError, match=exactly(f"unknown backend {name!r}; {CHOICES}")):
                choose()
        assert used == []

    def test_the_choices_are_those_of_the_documentation(self):
        documented = re.search(r"backend: (.*?)\. A\s+backend asked for by name", inspect.getdoc(rc.ascend), re.DOTALL)[1]
        assert re.findall(r'"([\w-]+)"', documented) == ["auto", *BACKENDS]


class TestAuto:
    def test_it_is_the_first_and_silent_where_that_can_run(self, used, caplog):
        caplog.set_level(logging.DEBUG, "recontrol")
        rc.ascend(*make())
        rc.ascend(*make((8, 7), torch.bfloat16), backend="auto")
        assert used == ["cpu", "cpu"] and logged(caplog) == []

    @pytest.mark.parametrize("dims,dtype,reason", BEYOND_CPU.values(), ids=BEYOND_CPU)
    def test_it_falls_back_and_says_why_once(self, used, caplog, dims, dtype, reason):
        caplog.set_level(logging.INFO, "recontrol")
        hidden, value = make(dims, dtype)
        edited = [rc.ascend(hidden, value) for _ in range(3)]
        assert used == ["torch"] * 3 and all(torch.equal(one, rc.ascend(hidden, value, backend="torch")) for one in edited)
        assert logged(caplog) == [f"backend 'auto' passes over 'cpu': {reason}"]
        assert [record.levelname for record in caplog.records] == ["INFO"]

    def test_each_reason_is_said_once(self, used, caplog):
        caplog.set_level(logging.INFO, "recontrol")
        for _ in range(2):
            for dims, dtype, _ in BEYOND_CPU.values():
                rc.ascend(*make(dims, dtype))
                rc.ascend(*make())
        assert used == ["torch", "cpu"] * 6
        assert logged(caplog) == [f"backend 'auto' passes over 'cpu': {reason}" for _, _, reason in BEYOND_CPU.values()]

    def test_without_the_extension(self, unloaded, used, caplog):
        caplog.set_level(logging.INFO, "recontrol")
        hidden, value = make()
        for _ in range(3):
            rc.ascend(hidden, value)
        assert used == ["torch"] * 3
        assert logged(caplog) == [f"backend 'auto' passes over 'cpu': {LOAD_ERROR}"]

    def test_it_goes_down_the_list_to_the_end(self, used, monkeypatch, caplog):
        caplog.set_level(logging.INFO, "recontrol")
        others = [name for name in BACKENDS if name != "oracle"]
        for name in others:
            monkeypatch.setattr(BACKENDS[name], "why_not", lambda *_, name=name: f"{name} is asleep")
        rc.ascend(*make())
        assert used == ["oracle"]
        assert logged(caplog) == [f"backend 'auto' passes over '{name}': {name} is asleep" for name in others]
        monkeypatch.setattr(BACKENDS["oracle"], "why_not", lambda *_: "so is the last")
        with pytest.raises(RuntimeError, match="no backend can run this ascent"):
            rc.ascend(*make())

    def test_an_error_in_a_backend_is_no_reason_to_try_the_next(self, used, monkeypatch):
        def broken(*_):
            raise RuntimeError("the kernel broke")

        monkeypatch.setattr(BACKENDS["cpu"], "run", broken)
        with pytest.raises(RuntimeError, match="the kernel broke"):
            rc.ascend(*make())
        assert used == []

    def test_compiled_functions_choose_in_the_same_way(self, used):
        hidden, value = make(dtype=torch.float64)
        torch._dynamo.reset()
        torch.compile(lambda hidden: rc.ascend(hidden, value), backend="eager", fullgraph=True)(hidden)
        assert used == ["torch"]


class TestInfo:
    def test_auto_is_what_runs(self, used):
        rc.ascend(*make())
        assert used == [rc.backend_info()["auto"]]

    def test_auto_is_what_runs_without_the_extension(self, unloaded, used):
        rc.ascend(*make())
        info = rc.backend_info()
        assert used == [info["auto"]] == ["torch"]
        assert info["backends"]["cpu"] == {"available": False, "reason": LOAD_ERROR}

    def test_what_is_available_runs_and_what_is_not_raises_for_the_reason_given(self, request, used):
        hidden, value = make()
        for without in (False, True):
            if without:
                request.getfixturevalue("unloaded")
            statuses = rc.backend_info()["backends"]
            assert list(statuses) == list(BACKENDS)
            available = [name for name, status in statuses.items() if status["available"]]
            assert [name for name in available if name in ("cpu", "torch", "oracle")] == ["cpu", "torch", "oracle"][without:]
            for name, status in statuses.items():
                if status["available"] and not runs_on_cpu(status):
                    continue  # on the GPU, not on the CPU
                if status["available"]:
                    assert "reason" not in status
                    rc.ascend(hidden, value, backend=name)
                    assert used.pop() == name
                else:
                    with pytest.raises(RuntimeError, match=re.escape(status["reason"])):
                        rc.ascend(hidden, value, backend=name)

    def test_it_survives_json(self, request):
        for without in (False, True):
            if without:
                request.getfixturevalue("unloaded")
            info = rc.backend_info()
            assert json.loads(json.dumps(info)) == info

    def test_versions(self):
        assert rc.backend_info()["versions"] == {"recontrol": rc.__version__, "torch": torch.__version__}

    def test_the_instruction_set_is_the_one_in_use(self):
        """Whichever of those that this processor has is chosen."""
        before, seen = _C.cpu_capability(), []
        assert rc.backend_info()["backends"]["cpu"]["instruction_set"] == before
        try:
            for name in ("avx512_bf16", "avx512", "avx2", "baseline"):
                try:
                    _C.use_cpu_capability(name)
                except ValueError:
                    continue
                seen.append(name)
                assert rc.backend_info()["backends"]["cpu"]["instruction_set"] == _C.cpu_capability() == name
        finally:
            _C.use_cpu_capability(before)
        assert before in seen and "baseline" in seen

    def test_the_number_of_threads_is_that_of_torch(self):
        before = torch.get_num_threads()
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert rc.backend_info()["backends"]["cpu"]["threads"] == threads
        finally:
            torch.set_num_threads(before)

    def test_the_compiler_is_named(self):
        assert rc.backend_info()["backends"]["cpu"]["compiler"] == _C.compiler != ""


def test_an_extension_that_cannot_be_loaded_is_remembered_with_the_error(monkeypatch):
    """A second copy of the module, imported where the import of the extension fails."""
    monkeypatch.setitem(sys.modules, "recontrol._C", None)
    spec = importlib.util.spec_from_file_location("without_extension", extension.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    assert without.module is None
    assert re.fullmatch(r"the C\+\+ extension could not be loaded \(.*recontrol\._C.*\); install recontrol with a C\+\+ compiler at hand", without.load_error)
    # The module in use is not touched by it.
    assert extension.load_error is None and BACKENDS["cpu"].status()["available"] is True


class TestDispatch:
    def test_it_takes_what_was_measured_and_then_what_can_run_everything(self):
        assert order("cpu")[:2] == ("cpu", "torch")
        assert order("cuda")[0] == order("meta")[0] == "torch"

    @pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
    def test_every_backend_is_tried_once(self, device):
        assert sorted(order(device)) == sorted(BACKENDS)

    def test_the_information_follows_the_order_and_not_the_list_of_backends(self, monkeypatch, used):
        monkeypatch.setattr(backends, "MEASURED", {"cpu": ("oracle",)})
        rc.ascend(*make())
        assert used == [rc.backend_info()["auto"]] == ["oracle"]


class TestNames:
    def test_they_are_those_that_are_accepted(self):
        assert names() == ("auto", *BACKENDS) and all(backends.check_name(name) == name for name in names())
        assert all(backend.name == name for name, backend in BACKENDS.items())

    def test_the_name_of_earlier_releases_is_accepted_with_a_warning_at_the_line_that_uses_it(self, used):
        hidden, value = make()
        with pytest.warns(DeprecationWarning, match=exactly("backend='reference' is now backend='oracle'; the old name will go")) as caught:
            rc.ascend(hidden, value, backend="reference")
        assert used == ["oracle"] and [warning.filename for warning in caught] == [__file__]
        with pytest.warns(DeprecationWarning, match="backend='reference' is now") as caught:
            controller = rc.Controller(value, backend="reference")
        assert controller.backend == "oracle" and [warning.filename for warning in caught] == [__file__]

    def test_those_that_never_wait_for_the_device(self):
        assert capturable() == ("cuda", "triton")


def test_every_backend_offers_the_same(used):
    """The same result up to rounding, the shapes and dtypes that the operator promises, and an answer to why not."""
    hidden, value = make()
    arguments, prepared = arguments_of(hidden, value), value.prepared()
    for backend in map(BACKENDS.get, RUNNING):
        assert backend.why_not(arguments, prepared) is None
        for columns in (0, 4):
            edited, trace = backend.run(arguments, prepared, columns)
            assert edited.shape == (3, SIZE) and edited.dtype == torch.float32 and trace.shape == (3, columns) and trace.dtype == torch.float32
            # Three steps of a few roundings each, relative to numbers of size one.
            torch.testing.assert_close(edited, rc.oracle.ascend(hidden, value, 0.5, 3), rtol=1e-5, atol=1e-6)
    assert used == [name for name in RUNNING for _ in range(2)]
