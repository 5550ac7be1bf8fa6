"""A decode step of Llama-7B's shape on a GPU: uncontrolled, under control, and with the released code's loop."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.bench_decode import STEP_SIZE, STEPS, hook_released_loop
from benchmarks.gpu.ascend import OURS
from benchmarks.gpu.llama import DecodeStep, llama, prompts
from benchmarks.gpu.records import Outcome
from benchmarks.gpu.timing import measure_on
from benchmarks.race import Variant, race
from benchmarks.value_nets import initialised
from recontrol import Controller, ValueFunction
from recontrol.ascent.backends import BACKENDS
from recontrol.decoding.static_decoder import StaticDecoder

BATCHES, TINY_BATCHES = (1, 8, 32), (2,)
# Compiling takes minutes for each.
COMPILED_BATCHES = (1,)
PROMPT_TOKENS, NEW_TOKENS = 128, 32
MAX_TOKENS = 256
# The slow ones are measured over fewer tokens.
FEW_TOKENS = 4


def run(device: torch.device, tiny: bool = False) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """The step alone, as it is in a CUDA graph."""
    for batch in TINY_BATCHES if tiny else BATCHES:
        yield case(batch, tiny), functools.partial(measure, batch, device, tiny)


def run_compiled(device: torch.device, tiny: bool = False) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """`generate` through `StaticDecoder`: the step compiled, in a CUDA graph, and all that transformers does around it."""
    for batch in COMPILED_BATCHES:
        yield f"generate, {case(batch, tiny)}", functools.partial(measure_compiled, batch, device, tiny)


def case(batch: int, tiny: bool) -> str:
    """In words."""
    return f"{'tiny Llama' if tiny else 'Llama-7B shape'}, batch {batch}, {PROMPT_TOKENS} tokens in the prompts, alpha {STEP_SIZE}, n {STEPS}"


def backends(device: torch.device) -> list[str]:
    """Those of ours that can run here, and not in an interpreter."""
    status = {name: BACKENDS[name].status() for name in OURS[device.type] if name in BACKENDS}
    return [name for name, known in status.items() if known["available"] and not known.get("interpreted")]


def value_function(model: Any) -> ValueFunction:
    """As initialised, which costs more than a trained one: more units flip."""
    size = model.config.hidden_size
    return initialised(size, (size,)).to(model.device, torch.bfloat16).requires_grad_(False)


def measure(batch: int, device: torch.device, tiny: bool) -> Outcome:
    """Time the step of one batch size; the variants share the model, and each has a cache and a graph of its own."""
    model = llama(device, tiny)
    value, ids, outcome = value_function(model), prompts(model, batch, PROMPT_TOKENS), Outcome()
    make = functools.partial(DecodeStep, model, ids, MAX_TOKENS)
    steps = {"uncontrolled": make(), "uncontrolled_eager": make(captured=False)}
    details = {"uncontrolled": "CUDA graph", "uncontrolled_eager": "no graph"}
    for backend in backends(device):
        name = f"recontrol_{backend}"
        with outcome.attempt(name), Controller(value, STEP_SIZE, STEPS, backend=backend).attach(model) as handle:
            step, eager, counted = make(), make(captured=False), handle.edited_rows
            step(), eager()
            # The step itself, and nothing around it, counts what it edits: captured, too.
            assert handle.edited_rows - counted == 2 * batch, f"{handle.edited_rows - counted} states were edited, wanted {2 * batch}"
            torch.testing.assert_close(step.logits, eager.logits)
            steps["uncontrolled"]()
            assert not torch.equal(step.logits, steps["uncontrolled"].logits), "the edit does not reach the logits"
            steps[name], details[name] = step, f"CUDA graph, backend {backend}"
    variants = [Variant(name, functools.partial(step, NEW_TOKENS), details[name], 3, NEW_TOKENS) for name, step in steps.items()]
    released = Hooked(model, copy.deepcopy(value).float().requires_grad_(), functools.partial(make(captured=False), FEW_TOKENS))
    with outcome.attempt("released_loop"):
        released()
        variants.append(Variant("released_loop", released, "float32 value function, no graph", 3, FEW_TOKENS))
    outcome.timings = race(variants, 0.01 if tiny else 2.0, 2 if tiny else 20, measure_on(device))
    return described(outcome, variants, batch, value)


class Hooked:
    """Runs something with the released code's loop on the model, and with nothing on it between the runs."""

    def __init__(self, model: Any, value: ValueFunction, work: Callable[[], object]) -> None:
        self._model, self._value, self._work = model, value, work

    def __call__(self) -> object:
        """Run it."""
        hook = hook_released_loop(self._model, self._value)
        try:
            return self._work()
        finally:
            hook.remove()


def measure_compiled(batch: int, device: torch.device, tiny: bool) -> Outcome:
    """Time `generate`; each variant has a model of its own, for attaching has everything compiled again."""
    model, outcome = llama(device, tiny), Outcome()
    free, value = copy.deepcopy(model), value_function(model)
    ids = prompts(model, batch, PROMPT_TOKENS)
    backend = backends(device)[0]
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    with Controller(value, STEP_SIZE, STEPS, backend=backend).attach(model) as handle:
        variants = []
        for name, which, detail in (("uncontrolled", free, "compiled"), (f"recontrol_{backend}", model, f"compiled, backend {backend}")):
            decoder = StaticDecoder(which, batch, MAX_TOKENS)
            for _ in range(3):
                decoder.generate(ids, **options)
            variants.append(Variant(name, functools.partial(decoder.generate, ids, **options), detail, 3, NEW_TOKENS))
        counted = handle.edited_rows
        outcome.timings = race(variants, 0.01 if tiny else 4.0, 2 if tiny else 20, measure_on(device))
        assert handle.edited_rows > counted, "nothing was edited while it was timed"
    return described(outcome, variants, batch, value)


def described(outcome: Outcome, variants: list[Variant], batch: int, value: ValueFunction) -> Outcome:
    """The outcome with the columns of its rows."""
    outcome.columns = {variant.name: {"detail": variant.detail} for variant in variants}
    outcome.shared = {
        "suite": "decode",
        "layers": 2,
        "weights": "initialised",
        "batch": batch,
        "hidden_size": value.hidden_size,
        "width": value.hidden_dims[0],
        "step_size": STEP_SIZE,
        "steps": STEPS,
        "dtype": "bfloat16",
        "tokens": batch,
    }
    return outcome
