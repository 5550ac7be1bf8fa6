"""Collection and training, each run in a process of its own, so that its peak of memory is that of the work.

python -m benchmarks.pipeline prepare FOLDER RESPONSES writes the same made-up rollouts for both ways of training;
python -m benchmarks.pipeline collect|train VARIANT FOLDER SIZE does the work, and prints seconds, bytes and tokens as JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import recontrol as rc
from benchmarks.memory import forget_peak, peak_beyond, peak_bytes

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "movie_reviews"
NEW_TOKENS, GENERATED_AT_ONCE = 32, 16
HIDDEN_SIZE, WIDTH, LONGEST, TRAINED_AT_ONCE = 512, 1024, 64, 32
RELEASED_FILE = "activations.pt"


def model_and_prompts(count: int) -> tuple[Any, Any, list[str]]:
    """The example model, its tokenizer and its first training prompts."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "lm")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    lines = (EXAMPLE / "prompts-train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return AutoModelForCausalLM.from_pretrained(EXAMPLE / "lm", dtype=torch.float32).eval(), tokenizer, [json.loads(line)["prompt"] for line in lines]


def collect_recontrol(folder: Path, size: int) -> Callable[[], int]:
    """`rc.collect`: shards on disk, of the states that are needed."""
    model, tokenizer, prompts = model_and_prompts(size)
    collect = rc.collect
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "batch_size": GENERATED_AT_ONCE, "unique_prompts": False, "progress": False}
    return lambda: int(collect(model, tokenizer, prompts, _no_reward, folder / "rollouts", do_sample=True, **options).lengths.sum())


def collect_released(folder: Path, size: int) -> Callable[[], int]:
    """The released way: `generate` returns the states of every layer and position, and one tensor holds the last layer's of all responses."""
    model, tokenizer, prompts = model_and_prompts(size)
    tokenizer.padding_side = "left"

    @torch.no_grad()
    def work() -> int:
        torch.manual_seed(0)
        kept = []
        for first in range(0, size, GENERATED_AT_ONCE):
            inputs = tokenizer(prompts[first : first + GENERATED_AT_ONCE], return_tensors="pt", padding=True)
            length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
            found = model.generate(**inputs, **length, do_sample=True, output_hidden_states=True, return_dict_in_generate=True)
            kept.append(torch.stack([layers[-1][:, -1] for layers in found.hidden_states], dim=1))
        states = torch.cat(kept)
        torch.save(states, folder / RELEASED_FILE)
        return states.shape[0] * states.shape[1]

    return work


def prepare(folder: Path, responses: int) -> None:
    """Write random states of responses of 8 to 64 tokens, once as rollouts and once as the padded tensor of the released code."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, LONGEST + 1, (responses,), generator=draw).tolist()
    states = [torch.randn(length, HIDDEN_SIZE, generator=draw) for length in lengths]
    rewards = torch.randn(responses, generator=draw)
    rc.Rollouts.write(folder / "rollouts", states, rewards)
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    torch.save({"states": padded, "mask": mask, "rewards": rewards}, folder / RELEASED_FILE)


def train_recontrol(folder: Path, size: int) -> Callable[[], int]:
    """One epoch of `rc.train`."""
    # Imported when it is first asked for.
    train = rc.train

    def work() -> int:
        rollouts = rc.Rollouts(folder / "rollouts")
        train(rollouts, (WIDTH,), epochs=1, validation_fraction=0, batch_size=TRAINED_AT_ONCE, device="cpu", progress=False)
        return int(rollouts.lengths.sum())

    return work


def train_released(folder: Path, size: int) -> Callable[[], int]:
    """One epoch of the released way: all states in memory in one padded tensor, V of padding too, and a target with gradient."""

    def work() -> int:
        held = torch.load(folder / RELEASED_FILE)
        torch.manual_seed(0)
        value = rc.ValueFunction(HIDDEN_SIZE, (WIDTH,))
        optimiser = torch.optim.Adam(value.parameters(), lr=1e-4)
        for batch in torch.randperm(size).split(TRAINED_AT_ONCE):
            states, mask, rewards = held["states"][batch], held["mask"][batch], held["rewards"][batch]
            optimiser.zero_grad()
            _squared_error(value(states)[..., 0], mask, rewards).backward()
            optimiser.step()
        return int(held["mask"].sum())

    return work


def _squared_error(values: Tensor, mask: Tensor, rewards: Tensor) -> Tensor:
    """V(s_t) against V(s_{t+1}), and against the reward at the first token, over tokens that are not padding."""
    target = torch.cat([values[:, 1:], values[:, -1:]], dim=1)
    target[:, 0] = rewards
    return ((values - target) ** 2)[mask].mean()


def _no_reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0] * len(responses)


WORK = {
    ("collect", "recontrol"): collect_recontrol,
    ("collect", "released_code"): collect_released,
    ("train", "recontrol"): train_recontrol,
    ("train", "released_code"): train_released,
}


def main(arguments: list[str]) -> None:
    """Do what the command line asks for; everything up to the work itself is neither timed nor counted."""
    if arguments[0] == "prepare":
        prepare(Path(arguments[1]), int(arguments[2]))
        return
    kind, variant, folder, size = arguments
    work = WORK[kind, variant](Path(folder), int(size))
    forget_peak()
    before, start = peak_bytes(), time.perf_counter()
    tokens = work()
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": peak_beyond(before), "tokens": tokens}))


if __name__ == "__main__":
    main(sys.argv[1:])
