"""`recontrol collect`."""

import argparse
import os
from typing import Any

from recontrol.cli import options as shared

HELP = "let the uncontrolled model respond to prompts, and keep its hidden states and rewards"
DESCRIPTION = """\
Let the uncontrolled model respond to prompts, keep the hidden state that it read to sample each token, and score the
responses. One shard is written for each batch; a run that was stopped goes on where it was when the command is repeated.
With --pairs nothing is sampled: the chosen and rejected responses of preference data are run through the model instead.
In several processes (accelerate launch --multi_gpu -m recontrol collect ..., or torchrun), each makes its share of the shards."""
EPILOG = """\
examples:
  recontrol collect --model lmsys/vicuna-7b-v1.5 --dataset Anthropic/hh-rlhf --split "train[:-100]" \\
      --reward-model argsearch/llama-7b-rm-float32 --dtype bfloat16 --cache-budget 40GiB --out rollouts/hh-train
  recontrol collect --pairs --model lmsys/vicuna-7b-v1.5 --dataset Anthropic/hh-rlhf --dtype bfloat16 --out rollouts/hh-pairs"""
AFTER_INTERRUPT = "the batches that were finished are kept: repeat the command to go on from there"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    from recontrol.configs import add_flags
    from recontrol.data.settings import Collection

    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the rollouts are written")
    parser.add_argument("--pairs", action="store_true", help="run the chosen and rejected responses of the data set through the model instead of sampling")
    parser.add_argument("--skip-equal", action="store_true", help="with --pairs, leave out pairs whose two responses are the same (default: refuse them)")
    # Prompts that are too long are left out when they are loaded.
    add_flags(parser, Collection, leave_out=("max_prompt_tokens", "unique_prompts"))
    shared.add_model_options(parser)
    shared.add_prompt_options(parser)
    shared.add_reward_options(parser, default="none")
    shared.add_generation_options(parser)
    parser.set_defaults(batch_size=None)


def run(options: argparse.Namespace) -> None:
    """Collect rollouts."""
    if options.reward_model is None and not options.pairs:
        raise ValueError("--reward-model is needed, except with --pairs, where chosen responses get reward 1 and rejected ones 0")
    model, tokenizer = shared.load_model(options)
    rollouts = (_pairs if options.pairs else _samples)(options, model, tokenizer)
    if os.environ.get("RANK", "0") == "0":
        means = ", ".join(f"{mean:.3f}" for mean in rollouts.rewards.mean(0).tolist())
        print(f"{rollouts.describe()}; average reward {means}: {options.out}")


def _samples(options: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    from recontrol.configs import from_flags
    from recontrol.data.collect import collect
    from recontrol.data.settings import Collection

    return collect(
        model,
        tokenizer,
        shared.load_prompts(options, tokenizer, options.dataset, options.split, options.limit),
        shared.load_reward(options),
        options.out,
        collection=from_flags(Collection, options),
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
        stop_strings=shared.stop_strings(options),
        **shared.generation_options(options),
    )


def _pairs(options: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    from recontrol.data.collect import collect_pairs
    from recontrol.data.prompts import load_pairs

    how = {name: getattr(options, name) for name in ("limit", "chat_template", "human", "max_prompt_tokens", "skip_equal")}
    return collect_pairs(
        model,
        tokenizer,
        load_pairs(options.dataset, options.split, tokenizer=tokenizer, **how),
        options.out,
        reward=options.reward_model and shared.load_reward(options),
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        cache_budget=options.cache_budget,
        skip_equal=options.skip_equal,
        storage=options.storage,
    )
