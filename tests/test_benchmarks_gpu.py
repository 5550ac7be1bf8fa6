"""The benchmarks for a GPU, run on the CPU in tiny sizes, so that no mistake in them waits for a GPU; and the table of their rows."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from controlled import Operations
from test_benchmarks import made_up

# Last, so that an installed recontrol comes before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import race, rows, table, value_nets
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import ascend, decode, dense, llama, timing, training
from recontrol import Controller, oracle

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def quick_compiler(monkeypatch):
    """Compiles as the benchmark does, but makes no code."""
    monkeypatch.setattr(dense, "_compiled_step", torch.compile(dense._step, dynamic=False, fullgraph=True, backend="eager"))
    torch.compiler.reset()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Trained networks go to a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(value_nets.RECIPE, "adam_steps", 2)


def measured(capsys, tmp_path, *arguments):
    path = tmp_path / "gpu.csv"
    code = command.main([*arguments, "--device", "cpu", "--tiny", "--rows", str(path)])
    return code, rows.read_rows(path) if path.exists() else [], capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is no interpreter of Triton kernels, and the benchmark itself can be run")
def test_every_suite_runs(quick_compiler, own_cache, capsys, tmp_path):
    code, found, printed = measured(capsys, tmp_path, "ascend", "training", "decode", "compiled")
    assert code == 0, printed
    by_suite = {(row.suite, row.case): set() for row in found}
    for row in found:
        by_suite[row.suite, row.case].add(row.variant)
    everywhere = {"recontrol_cpu", "dense", "floor_once", "floor_copy"}
    two, trained, three, train, step, generate = by_suite.values()
    assert two == {*everywhere, "recontrol_triton", "dense_compiled", "released_loop"}
    assert trained == {*everywhere, "recontrol_triton", "dense_compiled"}
    assert three == {*everywhere, "released_loop"}
    assert train == {"torch", "triton"}
    assert step == {"uncontrolled", "uncontrolled_eager", "recontrol_cpu", "released_loop"}
    assert generate == {"uncontrolled", "recontrol_cpu"}
    assert all(row.p50_ms > 0 for row in found if not row.variant.startswith("floor"))
    assert {row.weights for row in found} == {"initialised", "trained"}


def test_what_fails_is_said_and_loses_nothing_else(own_cache, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ascend, "TINY", ascend.TINY[2:])
    # A backend whose edit is wrong has no row.
    honest = ascend._ours
    monkeypatch.setattr(ascend, "_ours", lambda hidden, value, setting, backend: 2 * honest(hidden, value, setting, backend))
    monkeypatch.setattr(decode, "measure", lambda *_: 1 / 0)
    code, found, printed = measured(capsys, tmp_path, "decode", "ascend")
    assert code == 1
    assert {row.variant for row in found} == {"dense", "released_loop", "floor_once", "floor_copy"}
    assert "recontrol_cpu: AssertionError: the edit is off by" in printed
    assert "FAILED decode: tiny Llama, batch 2" in printed and "ZeroDivisionError" in printed


def test_cases_that_come_too_late_are_named_and_not_begun(capsys, tmp_path):
    code, found, printed = measured(capsys, tmp_path, "ascend", "--seconds", "-1")
    assert (code, found) == (1, [])
    assert printed.count("not begun") == len(ascend.TINY)


@pytest.mark.parametrize("along", ["rows", "columns"])
# In bfloat16 c and S are rounded by 2^-9 each, and in three layers the activations too, on which the sign of every unit above depends.
@pytest.mark.parametrize(("form", "layers", "error"), [("float32", 2, 1e-5), ("float32", 3, 1e-5), ("bfloat16", 2, 5e-3), ("bfloat16", 3, 5e-2)])
def test_dense_forms_agree_with_the_oracle(form, error, along, layers):
    value = value_nets.initialised(37, (53, 57)[: layers - 1]).bfloat16()
    hidden = value_nets.draw_hidden(5, 37, seed=3)[0]
    wanted = oracle.ascend(hidden, value, 0.5, 7, dtype=torch.float64)
    found = dense.DenseForm(value, form, along)(hidden, 0.5, 7)
    assert (found - wanted).norm() <= error * (wanted - hidden).norm()


def test_copies_of_a_network_are_many_enough_and_leave_the_original_alone(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    assert timing.copies_for(1300, CPU) == 4
    assert timing.copies_for(10**6, CPU) == 2
    made = ascend.copies(2, "initialised", 16, CPU)
    assert len(made) >= 2 and len({value.layers[0].weight.data_ptr() for value in made}) == len(made)
    assert {value.dtype for value in made} == {torch.bfloat16}
    assert ascend.network(2, "initialised", 16, CPU).dtype == torch.float32


def test_the_decode_step_chooses_the_tokens_of_generate_again_and_again():
    model = llama.LlamaForCausalLM(llama.LlamaConfig(**llama.TINY_SHAPE, initializer_range=0.5)).eval()
    ids = llama.prompts(model, 2, 5)
    step = llama.DecodeStep(model, ids, 16)
    free = step(8).tolist(), step.logits.clone()
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert free[0] == wanted[:, -1:].tolist() == step(8).tolist()
    value = value_nets.initialised(64, (32,))
    with Controller(value, 20.0, 20, backend="oracle").attach(model) as handle:
        step(8)
        assert handle.edited_rows == 2 * 8 and not torch.equal(step.logits, free[1])


def test_nothing_in_the_decode_step_waits_for_the_device_or_copies_from_the_host():
    """What would break off the recording of a CUDA graph."""
    model = llama.llama(CPU, tiny=True)
    step = llama.DecodeStep(model, llama.prompts(model, 2, 5), 16)
    with Controller(decode.value_function(model), 0.5, 30, radius=1.0, backend="cpu").attach(model), Operations() as operations:
        step._run()
    assert "recontrol::ascend" in operations.names and not {*Operations.UNCAPTURABLE} & {*operations.names}


def test_the_step_of_training_moves_its_own_weights_only():
    value = value_nets.initialised(16, (8,))
    hidden, wanted = torch.randn(6, 16).bfloat16(), torch.randn(6, 1)
    before = value.layers[0].weight.clone()
    step = training.Step(value, training.plain, hidden, wanted)
    step()
    assert torch.equal(value.layers[0].weight, before) and not torch.equal(step.value.layers[0].weight, before)


def test_a_round_of_several_repeats_counts_as_one_of_them():
    seconds = iter([8.0, 8.0, 4.0, 2.0])
    (timed,) = race.race([race.Variant("a", lambda: "done", repeats=4)], 24.0, 9, lambda run: (next(seconds), run())).values()
    assert (timed.seconds, timed.result) == ([2.0, 1.0, 0.5], "done")


def test_files_from_before_a_column_came_are_read(tmp_path):
    path = tmp_path / "old.csv"
    rows.append_rows(path, [made_up("recontrol", 8.0)])
    lines = [line.split(",") for line in path.read_text().replace(", ", "; ").splitlines()]
    later = ["device", "driver", "cuda", "triton", "copy_gb_per_s", "peak_bytes", "wasted_cache", "cache_bytes", "needed_cache_bytes"]
    assert lines[0][-9:] == later
    path.write_text("".join(",".join(line[:-9]).replace("; ", ", ") + "\n" for line in lines))
    assert rows.read_rows(path) == [made_up("recontrol", 8.0)]
    path.write_text("".join(",".join(line[1:]).replace("; ", ", ") + "\n" for line in lines))
    with pytest.raises(ValueError, match="does not hold benchmark rows"):
        rows.read_rows(path)


def on_gpu(variant, p50_ms, **changes):
    known = {"device": "a GPU, made up", "driver": "1.2", "cuda": "13.0", "triton": "3.6", "copy_gb_per_s": 3000.0}
    return made_up(variant, p50_ms, **{**known, **changes})


def test_the_table_of_a_gpu_says_what_was_not_measured():
    case = ascend.FULL[0]
    newer = {"case": case.name, "date": "2026-02-02T00:00:00+00:00"}
    found = [
        on_gpu("recontrol_cuda", 0.9, case=case.name),
        on_gpu("recontrol_triton", 0.8, case=case.name),
        on_gpu("recontrol_cuda", 2.0, **newer),
        on_gpu("dense", 8.0, **newer),
        on_gpu("floor_copy", 1.0, **newer),
        *(on_gpu(name, ms, suite="decode", case=decode.case(8, False), tokens=8) for name, ms in (("uncontrolled", 2.0), ("recontrol_cuda", 2.5))),
        *(on_gpu(name, ms, suite="training", case=training.case(512, 128, 4096), peak_bytes=2**31) for name, ms in (("triton", 2.0), ("torch", 5.0))),
    ]
    text = table.render_gpu([*found, made_up("recontrol", 8.0)])
    assert "a GPU, made up, driver 1.2, CUDA 13.0, torch 2.13.0, triton 3.6, commit abc, 2026-02-02, copies at 3,000 GB/s" in text
    # Rows of an older run are not mixed in.
    nothing = "not measured"
    line = ("2", "initialised", "1", "0.5", "30", "2,000.0 (1,000.0 to 3,000.0)", *[nothing] * 2, "4.0 x", nothing, "1,000.0 µs (ours 2.0 x)", "12.3")
    assert f"| {' | '.join(line)} |" in text
    line = ("step in a CUDA graph", "8", "2.000 (1.000 to 3.000)", "2.500 (1.500 to 3.500) (+25.0%)", *[nothing] * 3, "3,200", nothing)
    assert f"| {' | '.join(line)} |" in text
    assert "| PyTorch, float32 | 5.000 (4.000 to 6.000) | 2.5 x | 2.00 GiB |" in text
    assert "| PyTorch, tf32 | not measured | not measured | not measured |" in text
    assert sum(line.startswith(("| 2 |", "| 3 |")) for line in text.splitlines()) == len(ascend.FULL)
    assert "made up" not in table.render(row for row in found)
    assert table.render_gpu([made_up("recontrol", 8.0)]).strip() == "GPU: not measured."


def test_the_newest_row_of_each_device_is_kept_apart():
    one, other = on_gpu("dense", 1.0), on_gpu("dense", 2.0, device="another")
    assert rows.latest([one, other, dataclasses.replace(one, date="2026-03-03T00:00:00+00:00")])[1] == other
