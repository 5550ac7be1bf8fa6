"""`recontrol collect`."""

import argparse

from recontrol.cli import options as shared

HELP = "let the uncontrolled model respond to prompts, and keep its hidden states and rewards"
DESCRIPTION = """\
Let the uncontrolled model respond to prompts, keep the hidden state that it read to sample each token, and score the
responses. One shard is written for each batch; a run that was stopped goes on where it was when the command is repeated."""
EPILOG = """\
example:
  recontrol collect --model lmsys/vicuna-7b-v1.5 --dataset Anthropic/hh-rlhf --split "train[:-100]" \\
      --reward-model argsearch/llama-7b-rm-float32 --dtype bfloat16 --out rollouts/hh-train"""
AFTER_INTERRUPT = "the batches that were finished are kept: repeat the command to go on from there"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the rollouts are written")
    parser.add_argument("--num-samples", type=shared.positive_int, default=1, metavar="N", help="responses to each prompt; above 1 with --sample (default: 1)")
    shared.add_model_options(parser)
    shared.add_prompt_options(parser)
    shared.add_reward_options(parser)
    shared.add_generation_options(parser)


def run(options: argparse.Namespace) -> None:
    """Collect rollouts."""
    from recontrol.data.collect import collect

    model, tokenizer = shared.load_model(options)
    rollouts = collect(
        model,
        tokenizer,
        shared.load_prompts(options, tokenizer, options.dataset, options.split, options.limit),
        shared.load_reward(options),
        options.out,
        max_new_tokens=options.max_new_tokens,
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        seed=options.seed,
        stop_strings=shared.stop_strings(options),
        **shared.generation_options(options),
    )
    means = ", ".join(f"{mean:.3f}" for mean in rollouts.rewards.mean(0).tolist())
    print(f"{len(rollouts)} responses, {rollouts.num_tokens} tokens, average reward {means}: {options.out}")
