"""Tokens per second of the example model: uncontrolled, under control, and with the released code's loop."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, AutoTokenizer

import recontrol
from benchmarks.baselines import released_loop
from benchmarks.race import REPLAY, Timing, Variant, race
from benchmarks.value_nets import initialised
from recontrol import ValueFunction

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "movie_reviews"
VARIANTS = ("recontrol", "uncontrolled", "released_loop")
STEP_SIZE, STEPS = 0.5, 30


@dataclass(frozen=True)
class Cell:
    """One case; the value function has two linear layers as initialised, for the trained one of the demo costs the same."""

    width: int
    batch: int
    new_tokens: int = 32

    @property
    def name(self) -> str:
        """In words."""
        return f"movie_reviews, {self.new_tokens} new tokens, value function {self.width} wide, batch {self.batch}, alpha {STEP_SIZE}, n {STEPS}"

    @property
    def id(self) -> str:
        """For pytest's -k, for example "decode-w1024-b8"."""
        return f"decode-w{self.width}-b{self.batch}"


FULL = [Cell(width, batch) for width in (1024, 4096) for batch in (1, 8)]
SMOKE = [Cell(64, 2, 4)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cells = SMOKE if metafunc.config.getoption("smoke") else FULL
    pairs = [(cell, variant) for cell in cells for variant in VARIANTS]
    metafunc.parametrize(("cell", "variant"), pairs, ids=[f"{cell.id}-{variant}" for cell, variant in pairs])


@pytest.mark.benchmark(timer=REPLAY.time)
def bench_decode(benchmark: Any, races: Any, smoke: bool, cell: Cell, variant: str) -> None:
    """The first variant of a case runs them all in turn; each test then shows its own."""
    races.replay(benchmark, cell.name, variant, lambda: run(cell, budget=0.05 if smoke else 3.0, most_rounds=3 if smoke else 15))


@functools.cache
def prompts(batch: int) -> Any:
    """The first test prompts, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "lm", padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    lines = (EXAMPLE / "prompts-test.jsonl").read_text(encoding="utf-8").splitlines()[:batch]
    return tokenizer([json.loads(line)["prompt"] for line in lines], return_tensors="pt", padding=True)


def hook_released_loop(model: Any, value: ValueFunction) -> RemovableHandle:
    """Edit every state that reaches the output embedding, by the released code's loop, until the hook is removed."""

    def edit(_: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        states = inputs[0]
        return (released_loop(states.flatten(0, -2), value, STEP_SIZE, STEPS).view_as(states),)

    return model.get_output_embeddings().register_forward_pre_hook(edit)


def generation(model: Any, cell: Cell) -> Callable[[], Tensor]:
    """Greedy decoding of a fixed number of tokens; returns the new ones, (batch, new_tokens)."""
    inputs = prompts(cell.batch)
    length = {"max_new_tokens": cell.new_tokens, "min_new_tokens": cell.new_tokens}
    return lambda: model.generate(**inputs, **length, do_sample=False)[:, inputs["input_ids"].shape[1] :]


def run(cell: Cell, budget: float, most_rounds: int) -> tuple[dict[str, Timing], dict[str, dict[str, Any]]]:
    """Measure one case; each variant has its own copy of the model, so that attaching is not part of the time.

    Raises:
        AssertionError: the first token under control is not the one of the released loop.
    """
    models = {name: AutoModelForCausalLM.from_pretrained(EXAMPLE / "lm", dtype=torch.float32).eval() for name in VARIANTS}
    value = initialised(models["recontrol"].config.hidden_size, (cell.width,))
    hook_released_loop(models["released_loop"], value)
    with recontrol.Controller(value, STEP_SIZE, STEPS).attach(models["recontrol"]):
        variants = [Variant(name, generation(model, cell), "greedy", 3) for name, model in models.items()]
        timings = race(variants, budget, most_rounds)
    ours, released = (timings[name].result for name in ("recontrol", "released_loop"))
    assert torch.equal(ours[:, 0], released[:, 0]), f"{cell.name}: first tokens {ours[:, 0].tolist()}, by the released loop {released[:, 0].tolist()}"
    shared = {
        "suite": "decode",
        "layers": 2,
        "weights": "initialised",
        "batch": cell.batch,
        "hidden_size": value.hidden_size,
        "width": cell.width,
        "step_size": STEP_SIZE,
        "steps": STEPS,
        "dtype": "float32",
        "tokens": cell.batch * cell.new_tokens,
    }
    return timings, {variant.name: {**shared, "detail": variant.detail} for variant in variants}
