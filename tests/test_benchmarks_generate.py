"""The benchmark of batches of mixed lengths: what becomes of the cache, the responses of every way, and the rows and table of them."""

import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from controlled import llama
from generating import continuous_only
from test_benchmarks import made_up

# Last, so that an installed recontrol comes before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_generate, generation, memory, rows, table
from benchmarks.cache_use import CacheUse, padded, paged

pytestmark = pytest.mark.usefixtures("one_thread", "quick_collection")
COUNT, BUDGET, LONGEST = 3, "1MiB", 60


@pytest.fixture(scope="module")
def work():
    """Few and short prompts under a budget that holds one of the longest."""
    return generation.Work(COUNT, BUDGET, LONGEST)


@pytest.fixture(scope="module")
def alone(work):
    """What each prompt gets alone, with control and without."""
    return {controlled: work.alone(controlled) for controlled in (True, False)}


def test_cache_of_padded_batches_is_counted_by_hand():
    # Two rows of 5 + 3 - 1 places; one row of 4 + 2 - 1. Places read: 5 and 2 + 2, then 4 + 1.
    # At once: 5 + 2, then 2 + 1 of the second alone; then 4 and 5.
    assert padded([5, 2, 4], [1, 3, 2], [[0, 1], [2]]) == CacheUse(handed_out=14 + 5, read=5 + 4 + 5, most_held=14, most_read=7)
    assert padded([5, 2, 4], [1, 3, 2], [[0], [1], [2]]).wasted == 0
    assert padded([8, 2], [1, 1], [[0, 1]]).wasted == 6 / 16


def test_cache_of_blocks_is_counted_by_hand():
    # Places needed: 5, 4 and 5; in blocks of four 8, 4 and 8.
    found = paged([5, 2, 4], [1, 3, 2], most_read=9, blocks=6, block_tokens=4)
    assert found == CacheUse(handed_out=20, read=14, most_held=24, most_read=9)
    assert found.wasted == 6 / 20


def test_padded_batches_hold_what_is_counted():
    """The cache that `model.generate` leaves has as many places."""
    model = llama()
    found = model.generate(torch.ones(3, 5, dtype=torch.long), max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    keys = found.past_key_values.layers[0].keys
    assert keys.shape[0] * keys.shape[2] == padded([5, 5, 5], [4, 4, 4], [range(3)]).most_held


def test_prompts_have_mixed_lengths_and_do_not_overlap(work):
    lengths = [len(prompt) for prompt in work.prompts]
    assert len(set(lengths)) > 1 and all(generation.SHORTEST <= length <= LONGEST for length in lengths)
    assert {prompt[0] for prompt in work.prompts} == {work.tokenizer.bos_token_id}
    texts = ["one two three", "four five six seven eight nine ten"] * 20
    pieces = generation.mixed_prompts(work.tokenizer, texts, 3, 30)
    joined = work.tokenizer("\n".join(texts), add_special_tokens=False).input_ids
    assert [token for piece in pieces for token in piece[1:]] == joined[: sum(map(len, pieces)) - 3]
    with pytest.raises(ValueError, match="too few tokens for 3 prompts"):
        generation.mixed_prompts(work.tokenizer, texts[:2], 3, 30)


@continuous_only
def test_every_way_gives_each_prompt_what_it_gets_alone(work, alone):
    assert alone[True] != alone[False]
    ends = [generation.ENDS_EVERY - (len(prompt) - 1) % generation.ENDS_EVERY for prompt in work.prompts]
    assert [len(response) for response in alone[True]] == [len(response) for response in alone[False]] == ends
    for variant, (_, controlled) in generation.WAYS.items():
        assert work.generate(variant) == alone[controlled], variant


@continuous_only
def test_cache_use_follows_from_how_each_way_batches(work, alone, monkeypatch):
    responses = alone[False]
    plan, lengths = work.plan, [len(prompt) for prompt in work.prompts]
    counts = [len(response) for response in responses]
    # Of 1 MiB one block of 16 tokens takes 96 KiB.
    assert (plan.bytes_per_token, plan.blocks, plan.block_tokens) == (6144, 10, 16)
    one_by_one = work.cache_use("released", responses)
    assert work.batches_as_given == [[row] for row in range(COUNT)] and one_by_one.wasted == 0
    assert work.cache_use("static", responses) == padded(lengths, counts, plan.static_batches())
    continuous = work.cache_use("continuous", responses)
    assert continuous.most_held == plan.blocks * plan.block_tokens
    assert continuous.read == one_by_one.read and 0 < continuous.wasted < 15 * COUNT / continuous.handed_out
    # Some are under way together, and never more than the blocks hold.
    assert one_by_one.most_read < continuous.most_read <= continuous.most_held
    monkeypatch.setattr(work, "prompts", work.prompts[:1])
    assert work.cache_use("continuous", responses[:1]).most_read == lengths[0] + counts[0] - 1


def test_a_worker_generates_at_each_line(work, alone, monkeypatch, capsys):
    monkeypatch.setattr(generation, "Work", lambda count, budget: {(COUNT, BUDGET): work}[count, budget])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    generation.main(["static", str(COUNT), BUDGET])
    ready, *found = capsys.readouterr().out.splitlines()
    assert ready == "ready" and len(found) == 2
    assert all(json.loads(line)["responses"] == alone[True] and json.loads(line)["peak_bytes"] >= 0 for line in found)


def worker_of(script, tmp_path, monkeypatch):
    """A worker whose process is not Python but a shell script."""
    path = tmp_path / "script"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(path))
    return generation.Worker("static", 1, BUDGET)


def test_a_worker_answers_when_it_is_asked(tmp_path, monkeypatch):
    with worker_of("echo ready; while read line; do echo '{\"peak_bytes\": 3}'; done", tmp_path, monkeypatch) as worker:
        assert worker.wait() == "ready\n"
        assert worker.generate() == worker.generate() == {"peak_bytes": 3}
    assert worker._process.returncode is not None


def test_a_worker_that_fails_says_why(tmp_path, monkeypatch):
    why = r"benchmarks.generation static 1 1MiB failed:\nno memory"
    with worker_of("echo no memory >&2; exit 3", tmp_path, monkeypatch) as worker, pytest.raises(RuntimeError, match=why):
        worker.wait()


@pytest.mark.skipif(not memory.FORGET.exists(), reason="only Linux forgets a peak")
def test_the_peak_is_that_since_it_was_forgotten():
    def use(megabytes):
        return len(bytes(bytearray(megabytes * 2**20)))

    use(200)
    before = memory.peak_bytes()
    memory.forget_peak()
    assert memory.peak_bytes() < before - 100 * 2**20
    start = memory.peak_bytes()
    use(64)
    assert memory.peak_bytes() >= start + 60 * 2**20


class Answers:
    """A worker that is no process.

    Args:
        responses: by variant.
    """

    responses: dict

    def __init__(self, variant, prompts, budget):
        self.variant = variant

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait(self):
        return "ready"

    def generate(self):
        return {"peak_bytes": 7, "responses": self.responses[self.variant]}


@continuous_only
def test_rows_are_of_results_that_were_proved_right(work, alone, monkeypatch):
    monkeypatch.setattr(bench_generate, "Worker", Answers)
    monkeypatch.setattr(bench_generate, "Work", lambda count, budget: work)
    monkeypatch.setattr(work, "alone", alone.get)
    Answers.responses = {variant: alone[controlled] for variant, (_, controlled) in generation.WAYS.items()}
    timings, columns = bench_generate.run(bench_generate.Cell(COUNT, BUDGET), budget=0.0, most_rounds=1)
    assert set(timings) == set(columns) == set(generation.WAYS)
    found = {variant: made_up(variant, 1.0, **{**columns[variant], "case": "c"}) for variant in columns}
    assert {row.tokens for row in found.values()} == {sum(map(len, alone[True]))}
    assert {row.peak_bytes for row in found.values()} == {7}
    ours = found["recontrol"]
    assert ours.cache_bytes == 10 * 16 * 6144 and 0 < ours.needed_cache_bytes < ours.cache_bytes and 0 < ours.wasted_cache < 1
    # One token of one response is another.
    Answers.responses["released_loop"] = [*alone[True][:-1], [alone[True][-1][0] + 1, *alone[True][-1][1:]]]
    with pytest.raises(AssertionError, match=rf"released_loop does not respond to prompts \[{COUNT - 1}\]"):
        bench_generate.run(bench_generate.Cell(COUNT, BUDGET), budget=0.0, most_rounds=1)


GENERATE = {
    variant: made_up(variant, ms, suite="generate", case="g", batch=32, detail="cache of 16MiB", tokens=1000, wasted_cache=wasted,
                     cache_bytes=3 * 2**20, needed_cache_bytes=2**21, peak_bytes=2**22)
    for variant, ms, wasted in (
        ("recontrol", 1100.0, 0.04), ("uncontrolled", 1000.0, 0.04), ("static", 2400.0, 0.25), ("static_uncontrolled", 2000.0, 0.25),
        ("released_loop", 10000.0, 0.5), ("released_uncontrolled", 4000.0, 0.5),
    )
}  # fmt: skip


def test_the_table_shows_each_way_with_its_own_cost_of_control():
    lines = [line for line in table.render(GENERATE.values()).splitlines() if line.startswith("|")]
    assert lines[0].count("|") == lines[1].count("|") == 10
    assert lines[2:] == [
        "| continuous | 32, cache of 16MiB | 1,000 | 909 | +10% | 4% | 3.0 MiB | 2.0 MiB | 4.0 MiB |",
        "| padded, by length | 32, cache of 16MiB | 500 | 417 | +20% | 25% | 3.0 MiB | 2.0 MiB | 4.0 MiB |",
        "| padded, as given, released loop | 32, cache of 16MiB | 250 | 100 | +150% | 50% | 3.0 MiB | 2.0 MiB | 4.0 MiB |",
    ]


def test_the_ratio_of_static_batches_is_told():
    (line,) = rows.ratio_lines(GENERATE.values())
    for part in ("1100.00 ms", "released loop takes 9.1 x", "static batches take 2.2 x and waste 25% of their cache, ours 4%", "1.10 x uncontrolled"):
        assert part in line
    assert "static" not in rows.ratio_lines([row for row in GENERATE.values() if row.variant != "static"])[0]


def test_rows_written_before_there_were_columns_of_the_cache_are_read(tmp_path):
    path = tmp_path / "cpu.csv"
    rows.append_rows(path, GENERATE.values())
    assert rows.read_rows(path) == list(GENERATE.values())
    short = [line.rsplit(",", 3)[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(short) + "\n")
    assert rows.read_rows(path)[0] == dataclasses.replace(GENERATE["recontrol"], wasted_cache=0.0, cache_bytes=0, needed_cache_bytes=0)
