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
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the rollouts are written")
    parser.add_argument("--num-samples", type=shared.positive_int, default=1, metavar="N", help="responses to each prompt; above 1 with --sample (default: 1)")
    parser.add_argument("--pairs", action="store_true", help="run the chosen and rejected responses of the data set through the model instead of sampling")
    parser.add_argument("--skip-equal", action="store_true", help="with --pairs, leave out pairs whose two responses are the same (default: refuse them)")
    parser.add_argument("--unique-responses", action="store_true", help="keep equal responses to a prompt once (default: keep all, each as likely as it is)")
    parser.add_argument(
        "--cache-budget",
        metavar="SIZE",
        help="memory for the key/value cache, for example 40GiB: prompts are sorted by length, and as many are decoded at once as fit "
        "(default: --batch-size prompts, in their order)",
    )
    parser.add_argument(
        "--storage",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="how hidden states are kept; int8 takes half of what bfloat16 takes (default: the dtype of the model, without loss)",
    )
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
    common = {
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "cache_budget": options.cache_budget,
        "storage": options.storage,
    }
    rollouts = _pairs(options, model, tokenizer, common) if options.pairs else _samples(options, model, tokenizer, common)
    if os.environ.get("RANK", "0") == "0":
        means = ", ".join(f"{mean:.3f}" for mean in rollouts.rewards.mean(0).tolist())
        print(f"{rollouts.describe()}; average reward {means}: {options.out}")


def _samples(options: argparse.Namespace, model: Any, tokenizer: Any, common: dict[str, Any]) -> Any:
    from recontrol.data.collect import collect

    return collect(
        model,
        tokenizer,
        shared.load_prompts(options, tokenizer, options.dataset, options.split, options.limit),
        shared.load_reward(options),
        options.out,
        num_samples=options.num_samples,
        unique_responses=options.unique_responses,
        seed=options.seed,
        stop_strings=shared.stop_strings(options),
        **common,
        **shared.generation_options(options),
    )


def _pairs(options: argparse.Namespace, model: Any, tokenizer: Any, common: dict[str, Any]) -> Any:
    from recontrol.data.pairs import load_pairs
    from recontrol.data.texts import collect_pairs

    pairs = load_pairs(
        options.dataset,
        options.split,
        limit=options.limit,
        tokenizer=tokenizer,
        chat_template=options.chat_template,
        human=options.human,
        max_prompt_tokens=options.max_prompt_tokens,
        skip_equal=options.skip_equal,
    )
    return collect_pairs(
        model, tokenizer, pairs, options.out, reward=options.reward_model and shared.load_reward(options), skip_equal=options.skip_equal, **common
    )
