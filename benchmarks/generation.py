"""Generation from prompts of mixed lengths in continuous and in padded batches, each way in a process of its own, with its own peak of memory.

python -m benchmarks.generation VARIANT PROMPTS BUDGET gets ready, prints a line, and then, for each line that it reads, generates once
and prints peak of memory and responses as JSON.
"""

import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import recontrol as rc
from benchmarks.baselines import released_loop
from benchmarks.cache_use import CacheUse, padded, paged
from benchmarks.memory import forget_peak, peak_beyond, peak_bytes
from benchmarks.pipeline import model_and_prompts
from benchmarks.value_nets import initialised
from recontrol.generation.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parents[1]
# By variant: how prompts are batched, and whether they are controlled.
WAYS = {
    "recontrol": ("continuous", True),
    "uncontrolled": ("continuous", False),
    "static": ("static", True),
    "static_uncontrolled": ("static", False),
    "released_loop": ("released", True),
    "released_uncontrolled": ("released", False),
}
SHORTEST, LONGEST, NEW_TOKENS = 8, 400, 64
# Responses end where a position is a multiple of this, so that they are as long with control as without. It has no factor in common with
# a block, which would else be full at the end.
ENDS_EVERY = 61
WIDTH, STEP_SIZE, STEPS = 1024, 0.5, 30
SEED_LENGTHS = 0


class Work:
    """The example model, a value function, and prompts of mixed lengths.

    Args:
        prompts: how many.
        budget: of the key/value cache, as for `recontrol.generate`.
        longest: tokens of a prompt at most.
    """

    def __init__(self, prompts: int, budget: str, longest: int = LONGEST):
        self.model, self.tokenizer, texts = model_and_prompts(4000)
        self.prompts = mixed_prompts(self.tokenizer, texts, prompts, longest)
        self.budget = budget
        self.value = initialised(self.model.config.hidden_size, (WIDTH,))
        self.eos: int = self.model.generation_config.eos_token_id
        self.model.register_forward_hook(self._end, with_kwargs=True)

    @property
    def plan(self) -> Plan:
        """How `recontrol.generate` batches the prompts."""
        lengths = [len(prompt) + NEW_TOKENS for prompt in self.prompts]
        return make_plan(self.model.config, self.model.dtype, lengths, cache_budget=self.budget)

    @property
    def batches_as_given(self) -> list[list[int]]:
        """Batches of neighbours, as many rows as fit if all were as long as the longest."""
        plan = self.plan
        rows = min(plan.batch_size, plan.budget // (max(plan.lengths) * plan.bytes_per_token))
        return [list(range(first, min(first + rows, len(self.prompts)))) for first in range(0, len(self.prompts), rows)]

    def generate(self, variant: str) -> list[list[int]]:
        """The greedy responses of a variant, in the order of the prompts."""
        batching, controlled = WAYS[variant]
        if batching == "released":
            return self._released(controlled)
        return [response.token_ids for response in rc.generate(*self._inputs(controlled), **self._options(batching))]

    def alone(self, controlled: bool) -> list[list[int]]:
        """The greedy responses of `model.generate` to one prompt after the other."""
        control = rc.Controller(self.value, STEP_SIZE, STEPS).attach(self.model) if controlled else contextlib.nullcontext()
        with control:
            return [self._padded([prompt])[0] for prompt in self.prompts]

    def cache_use(self, batching: str, responses: Sequence[Sequence[int]]) -> CacheUse:
        """What the batching makes of the cache; continuous batches are generated once more, to see how much a step reads."""
        lengths = [len(prompt) for prompt in self.prompts], [len(response) for response in responses]
        plan = self.plan
        if batching == "continuous":
            return paged(*lengths, self._most_read(), plan.blocks, plan.block_tokens)
        return padded(*lengths, self.batches_as_given if batching == "released" else plan.static_batches())

    def _most_read(self) -> int:
        """Keys that one step of continuous batches reads at most."""
        most = 0

        def look(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal most
            # Cumulated over the sequences of the step; by kind of attention, of which the example model has one.
            lengths = kwargs.get("cu_seq_lens_k")
            if lengths is not None:
                most = max(most, int((next(iter(lengths.values())) if isinstance(lengths, dict) else lengths)[-1]))

        handle = self.model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            self.generate("uncontrolled")
        finally:
            handle.remove()
        return most

    def _inputs(self, controlled: bool) -> tuple[Any, ...]:
        return self.model, self.tokenizer, self.prompts, rc.Control(self.value, STEP_SIZE, STEPS) if controlled else None

    def _options(self, batching: str) -> dict[str, Any]:
        return {"max_new_tokens": NEW_TOKENS, "batching": batching, "cache_budget": self.budget}

    def _released(self, controlled: bool) -> list[list[int]]:
        """Padded batches in the given order; the loop edits finished rows too."""
        with contextlib.ExitStack() as stack:
            if controlled:
                handle = self.model.get_output_embeddings().register_forward_pre_hook(self._loop)
                stack.callback(handle.remove)
            return [response for batch in self.batches_as_given for response in self._padded([self.prompts[row] for row in batch])]

    def _padded(self, prompts: list[list[int]]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.no_grad():
            rows = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)[:, width:].tolist()
        return [row[: row.index(self.eos) + 1] if self.eos in row else row for row in rows]

    def _loop(self, _: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        states = inputs[0]
        return (released_loop(states.flatten(0, -2), self.value, STEP_SIZE, STEPS).view_as(states),)

    def _end(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Let the logits ask for the end of the sequence after some positions, and never elsewhere."""
        positions, kept = kwargs.get("position_ids"), kwargs.get("logits_to_keep", 0)
        if positions is not None:
            positions = positions[:, kept] if isinstance(kept, Tensor) else positions[:, -kept:]
            output.logits[..., self.eos] = torch.where((positions + 1) % ENDS_EVERY == 0, torch.inf, -torch.inf)


def mixed_prompts(tokenizer: Any, texts: Sequence[str], count: int, longest: int) -> list[list[int]]:
    """Consecutive pieces of the joined texts; the logarithms of their lengths are spread evenly.

    Args:
        tokenizer: of the model.
        texts: joined as they come.
        count: pieces.
        longest: tokens of a piece at most, its first the one that begins a sequence.

    Raises:
        ValueError: the texts are too short.
    """
    spread = torch.rand(count, generator=torch.Generator().manual_seed(SEED_LENGTHS))
    lengths = (SHORTEST * (longest / SHORTEST) ** spread).round().int().tolist()
    tokens = iter(tokenizer("\n".join(texts), add_special_tokens=False, verbose=False).input_ids)
    pieces = [[tokenizer.bos_token_id, *itertools.islice(tokens, length - 1)] for length in lengths]
    if len(pieces[-1]) < lengths[-1]:
        raise ValueError(f"the texts have too few tokens for {count} prompts of {sum(lengths)} tokens")
    return pieces


class Worker:
    """A process that generates in one way whenever it is asked; a context manager that ends it.

    Args:
        variant: one of `WAYS`.
        prompts: how many.
        budget: of the key/value cache.
    """

    def __init__(self, variant: str, prompts: int, budget: str):
        # Closed on the way out.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "benchmarks.generation", variant, str(prompts), budget]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        # It ends at the end of its input; what is under way is of no use any more.
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def wait(self) -> str:
        """Its next line.

        Raises:
            RuntimeError: it ended, with what it wrote to its errors.
        """
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{' '.join(map(str, self._process.args[2:]))} failed:\n{self._errors.read()[-2000:]}")
        return line

    def generate(self) -> dict[str, Any]:
        """Let it generate once: "peak_bytes" so far, and "responses"."""
        if self._process.stdin:
            print(file=self._process.stdin, flush=True)
        return json.loads(self.wait())


def main(arguments: list[str]) -> None:
    """Generate at each line of the input; what is there before the first is not counted."""
    variant, prompts, budget = arguments
    work = Work(int(prompts), budget)
    everything, work.prompts = work.prompts, work.prompts[:2]
    work.generate(variant)
    work.prompts = everything
    forget_peak()
    before = peak_bytes()
    print("ready", flush=True)
    for _ in sys.stdin:
        responses = work.generate(variant)
        print(json.dumps({"peak_bytes": peak_beyond(before), "responses": responses}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
