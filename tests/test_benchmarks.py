"""A number may appear only behind a green test: the baselines do what they are compared for, and the rows and ratios are right."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

# Last, so that an installed recontrol comes before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import baselines, pipeline, race, rows, table, traffic, value_nets
from recontrol import ascend, oracle

SETTINGS = [(0.5, 7), (0.2, 1), (1.0, 30)]
DENSE = [(layout, along) for layout in baselines.LAYOUTS for along in ("rows", "columns")]


def double(layers, batch, hidden_size=37, width=53):
    """A value function and hidden states in float64, where rounding hides no mistake."""
    value = value_nets.initialised(hidden_size, (width, width + 4)[: layers - 1]).double()
    return value, value_nets.draw_hidden(batch, hidden_size, seed=3)[0].double()


def assert_same_edit(got, wanted, hidden):
    # A few hundred sums of products in float64.
    assert (got - wanted).norm() <= 1e-12 * (wanted - hidden).norm()


@pytest.mark.parametrize(("step_size", "steps"), SETTINGS)
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("loop", [baselines.released_loop, baselines.frozen_loop])
def test_loops_agree_with_the_oracle(loop, layers, step_size, steps):
    value, hidden = double(layers, batch=3)
    before = hidden.clone()
    assert_same_edit(loop(hidden, value, step_size, steps), oracle.ascend(hidden, value, step_size, steps), hidden)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize(("step_size", "steps"), SETTINGS)
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize(("layout", "along"), DENSE)
def test_dense_agrees_with_the_oracle(layout, along, layers, step_size, steps):
    value, hidden = double(layers, batch=1 if layout == "vector" else 5)
    dense = baselines.Dense(value, layout, along)
    assert_same_edit(dense(hidden, step_size, steps), oracle.ascend(hidden, value, step_size, steps), hidden)


def test_compiled_dense_runs_the_compiled_step(monkeypatch):
    value, hidden = double(2, batch=2)
    calls = []
    monkeypatch.setattr(baselines, "_compiled_step", lambda *arguments: calls.append(1) or baselines._step(*arguments))
    baselines.Dense(value, "rows")(hidden, 0.5, 5)
    assert calls == []
    compiled = baselines.Dense(value, "rows", compiled=True)(hidden, 0.5, 5)
    assert len(calls) == 4
    assert_same_edit(compiled, oracle.ascend(hidden, value, 0.5, 5), hidden)


def test_released_loop_accumulates_parameter_gradients_and_the_frozen_one_does_not():
    value, hidden = double(2, batch=2)
    baselines.frozen_loop(hidden, value, 0.5, 3)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in value.parameters())
    baselines.released_loop(hidden, value, 0.5, 1)
    once = value.layers[0].weight.grad.clone()
    baselines.released_loop(hidden, value, 0.5, 1)
    torch.testing.assert_close(value.layers[0].weight.grad, 2 * once, rtol=1e-14, atol=0)


def test_best_dense_is_one_of_the_layouts_that_fit():
    value, hidden = double(2, batch=1)
    assert baselines.best_dense(hidden, value, 0.5).layout in baselines.LAYOUTS
    assert baselines.best_dense(hidden.repeat(2, 1), value, 0.5).layout != "vector"


def test_quickest_picks_the_candidate_that_takes_least_time(monkeypatch):
    clock = race.ReplayClock()
    monkeypatch.setattr(baselines.time, "perf_counter", clock.time)

    def work(seconds):
        clock._now += seconds

    assert baselines.quickest([3.0, 1.0, 2.0], work) == 1.0


@pytest.mark.parametrize("megabytes", [1, 300])
def test_floor_reads_the_bytes_asked_for(megabytes):
    floor = baselines.Floor(megabytes * 2**20)
    assert sum(source.numel() * source.element_size() for source in floor._sources) == megabytes * 2**20
    for reader in floor._readers.values():
        assert float(reader(floor._sources[0]).sum()) == floor._sources[0].numel()
    floor.copy()
    assert bool(floor._target[: floor._sources[-1].shape[0]].all())


def test_traffic_of_two_layers_is_counted_by_hand():
    # Unit 0 is on and stays on; unit 1 is on and is pushed off by the first step; unit 2 is off and stays off.
    value = value_nets.initialised(2, (3,))
    with torch.no_grad():
        value.layers[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
        value.layers[0].bias.copy_(torch.tensor([0.0, 2.5, -9.0]))
        value.layers[1].weight.copy_(torch.tensor([[3.0, 1.0, 1.0]]))
    counted = traffic.traffic(torch.tensor([[1.0, 0.0]]), value, step_size=1.0, steps=3)
    # All of W1 (3 x 2); rows of W1 (2 wide) and of G (3 wide) of two active units and of one that flipped.
    assert counted == traffic.Traffic(bytes_moved=4 * (6 + 3 * (2 + 3)), bytes_once=4 * (6 + 2 * 3), flips_per_step=0.5)


def test_traffic_of_three_layers_is_counted_by_hand():
    # All units are on and stay on, so that a step moves only the rows of W2^T.
    value = value_nets.initialised(2, (3, 4))
    with torch.no_grad():
        for parameter in value.parameters():
            parameter.fill_(1.0)
    counted = traffic.traffic(torch.ones(1, 2), value, step_size=0.5, steps=3)
    # W1, then W2^T, W2 and G, then twice W2^T for the steps that are followed by another, and W1 for the edit.
    assert counted == traffic.Traffic(bytes_moved=4 * (6 + 12 + 12 + 9 + 2 * 12 + 6), bytes_once=4 * (6 + 12 + 9), flips_per_step=0)


@pytest.mark.parametrize("layers", [2, 3])
def test_traffic_of_a_batch_shares_rows_and_grows_with_steps(layers):
    value, hidden = double(layers, batch=1)
    alone, twice, longer = (traffic.traffic(*case) for case in ((hidden, value, 0.5, 9), (hidden.repeat(2, 1), value, 0.5, 9), (hidden, value, 0.5, 90)))
    assert alone == twice
    assert longer.bytes_moved > alone.bytes_moved
    assert alone.bytes_moved > alone.bytes_once >= 8 * sum(layer.weight.numel() for layer in value.layers[:1])


def test_training_on_the_made_up_states_finds_their_signal():
    value = value_nets.initialised(64, (128,))
    hidden, _ = value_nets.draw_hidden(4, 64, seed=5)
    start = value(hidden)
    assert value_nets.fit(value) > 0.2
    assert not torch.equal(value(hidden), start)
    assert all(parameter.grad is None for parameter in value.parameters())
    assert (ascend(hidden, value, 0.5, 5) != hidden).any()


def test_trained_networks_are_kept_and_made_again_for_another_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(value_nets.RECIPE, "adam_steps", 2)
    calls = []
    monkeypatch.setattr(value_nets, "fit", lambda value: calls.append(1) or 0.5)
    first, second = value_nets.trained(8, (16,)), value_nets.trained(8, (16,))
    assert len(calls) == 1
    assert torch.equal(first.layers[0].weight, second.layers[0].weight)
    monkeypatch.setitem(value_nets.RECIPE, "adam_steps", 3)
    value_nets.trained(8, (16,))
    assert len(calls) == 2


def test_race_takes_turns_and_spreads_the_rounds_of_slow_variants(monkeypatch):
    clock, order = race.ReplayClock(), []
    monkeypatch.setattr(race.time, "perf_counter", clock.time)

    def takes(name, seconds):
        def run():
            order.append(name)
            clock._now += seconds
            return name * 2

        return run

    variants = [
        race.Variant("a", takes("a", 1.0)),
        race.Variant("b", takes("b", 2.0)),
        race.Variant("c", takes("c", 9.0)),
        race.Variant("d", takes("d", 9.0), least_rounds=2),
    ]
    timings = race.race(variants, budget=4.0, most_rounds=10)
    # A first round each; that of c, which is over the budget, counts.
    assert "".join(order) == "abcd" + "a" + "abd" + "a" + "abd"
    assert {name: timing.seconds for name, timing in timings.items()} == {"a": [1.0] * 4, "b": [2.0] * 2, "c": [9.0], "d": [9.0] * 2}
    assert timings["c"].result == "cc"


def test_replay_shows_the_recorded_times():
    clock, shown = race.ReplayClock(), []

    class Pedantic:
        def pedantic(self, target, rounds):
            for _ in range(rounds):
                start = clock.time()
                target()
                shown.append(clock.time() - start)

    clock.replay(Pedantic(), [0.5, 2.0, 0.25])
    assert shown == [0.5, 2.0, 0.25]


def made_up(variant, p50_ms, **changes):
    row = rows.Row(
        commit="abc", date="2026-01-01T00:00:00+00:00", cpu="a processor, made up", instruction_set="avx2", threads=2, torch="2.13.0", recontrol="0.1.0",
        suite="ascend", case="2 layers, batch 1", layers=2, weights="trained", batch=1, hidden_size=4096, width=4096, step_size=0.5, steps=30, dtype="float32",
        variant=variant, detail="", rounds=5, p20_ms=p50_ms - 1, p50_ms=p50_ms, p80_ms=p50_ms + 1, flips_per_step=12.3,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


ASCENT = [
    made_up("recontrol", 8.0),
    made_up("released_loop", 1600.0),
    made_up("frozen_loop", 400.0),
    made_up("dense", 240.0),
    made_up("dense_compiled", 200.0),
    made_up("floor_once", 4.0),
    made_up("floor_read", 5.0),
    made_up("floor_copy", 10.0),
]
DECODE = [
    made_up(variant, ms, suite="decode", case="decode, batch 8", batch=8, tokens=256)
    for variant, ms in (("recontrol", 110.0), ("uncontrolled", 100.0), ("released_loop", 400.0))
]


def test_percentiles_are_in_milliseconds():
    assert rows.percentiles([0.001 * k for k in range(11)]) == {"rounds": 11, "p20_ms": 2.0, "p50_ms": 5.0, "p80_ms": 8.0}


def test_rows_come_back_as_written_and_are_added_to(tmp_path):
    path = tmp_path / "data" / "cpu.csv"
    rows.append_rows(path, ASCENT)
    rows.append_rows(path, DECODE)
    assert rows.read_rows(path) == ASCENT + DECODE
    assert path.read_text().count("commit,date") == 1
    assert [file.name for file in path.parent.iterdir()] == ["cpu.csv"]


def test_a_foreign_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "cpu.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"found columns \['a', 'b'\]"):
        rows.append_rows(path, ASCENT)
    assert path.read_text() == "a,b\n1,2\n"


def test_ratios_of_made_up_rows():
    (variants,) = rows.by_case(ASCENT)
    wanted = {"released_loop": 200.0, "frozen_loop": 50.0, "best_dense": 25.0, "floor_once": 2.0, "floor_read": 1.6, "floor_copy": 0.8}
    assert {name: rows.ratio(variants, name) for name in rows.COMPARED} == wanted
    (line,) = rows.ratio_lines(ASCENT)
    for part in ("8.00 ms", "released loop takes 200.0 x", "best dense takes 25.0 x", "1.6 x the floor, read", "12.3 flips a step"):
        assert part in line
    assert "released" not in rows.ratio_lines([row for row in ASCENT if row.variant != "released_loop"])[0]
    assert "1.10 x uncontrolled" in rows.ratio_lines(DECODE)[0]


def test_table_shows_the_newest_rows():
    newer = [dataclasses.replace(row, date="2026-02-02T00:00:00+00:00", p50_ms=row.p50_ms / 2) for row in ASCENT]
    text = table.render([*newer, *ASCENT, *DECODE])
    assert "| 2 | trained | 1 | 0.5 | 30 | 4.00 (7.00 to 9.00) | 800.0 ms (200 x) | 200.0 ms (50 x) | 100.0 ms (25 x) | 2.0 x | 1.6 x | 0.8 x | 12.3 |" in text
    assert "8.00" not in text
    assert "| 2 layers, 4096 wide | 8 | 0.5 | 30 | 2,560 | 2,327 | 640 | +10% |" in text
    header, rule, *_ = [line for line in text.splitlines() if line.startswith("|")]
    assert header.count("|") == rule.count("|") == 14


def test_growth_is_shown_beside_that_of_the_released_code():
    shared = {"suite": "collect", "case": "c", "detail": "64 prompts", "tokens": 2048}
    ours = dataclasses.replace(DECODE[0], variant="recontrol", p50_ms=1000.0, peak_bytes=2**20, **shared)
    released = dataclasses.replace(DECODE[0], variant="released_code", p50_ms=4000.0, peak_bytes=5 * 2**20, **shared)
    (line,) = rows.ratio_lines([ours, released])
    assert "released code takes 4.0 x the time and 5.0 x the memory" in line
    assert "| collect: 64 prompts | 2,048 | 2,048 | 512 | 1 MiB | 5 MiB |" in table.render([ours, released])


@pytest.mark.parametrize("kind", ["collect", "train"])
def test_both_ways_of_the_pipeline_see_the_same_tokens(kind, tmp_path):
    if kind == "train":
        pipeline.prepare(tmp_path, 5)
    tokens = {variant: pipeline.WORK[kind, variant](tmp_path, 5)() for variant in ("recontrol", "released_code")}
    assert tokens["recontrol"] == tokens["released_code"] > 0
    held = torch.load(tmp_path / pipeline.RELEASED_FILE)
    if kind == "train":
        assert int(held["mask"].sum()) == tokens["recontrol"]
    else:
        assert held.shape[:2] == (5, pipeline.NEW_TOKENS)


def test_the_pipeline_tells_seconds_bytes_and_tokens(tmp_path, capsys):
    pipeline.main(["prepare", str(tmp_path), "5"])
    pipeline.main(["train", "recontrol", str(tmp_path), "5"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["seconds"] > 0 and found["peak_bytes"] >= 0 and found["tokens"] > 0


def test_commit_and_cache_size_are_known():
    from benchmarks.environment import environment, last_level_cache_bytes

    assert set(environment()) == set(rows.COLUMNS[:7])
    assert last_level_cache_bytes() >= 2**20
