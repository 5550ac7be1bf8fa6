"""`recontrol collect`."""

import argparse
import os

from recontrol.cli import options as shared


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    from recontrol.configs import add_flags
    from recontrol.data.settings import Collection

    shared.add_options(parser, "collect")
    # Prompts that are too long are left out when they are loaded.
    add_flags(parser, Collection, leave_out=("max_prompt_tokens", "unique_prompts"))
    shared.add_options(parser, "language model", "prompts")
    shared.add_options(parser, "reward", "generation", default="none")
    parser.set_defaults(batch_size=None)


def run(options: argparse.Namespace) -> None:
    """Collect rollouts."""
    from recontrol.configs import from_flags
    from recontrol.data.collect import collect, collect_pairs
    from recontrol.data.prompts import load_pairs
    from recontrol.data.settings import Collection
    from recontrol.files import check_output

    if options.reward_model is None and not options.pairs:
        raise ValueError("--reward-model is needed, except with --pairs, where chosen responses get reward 1 and rejected ones 0")
    # Better found before a model is loaded than after it.
    check_output(options.out, folder=True)
    model, tokenizer = shared.load_model(options)
    if options.pairs:
        how = {name: getattr(options, name) for name in ("limit", "chat_template", "human", "max_prompt_tokens", "skip_equal")}
        pairs = load_pairs(options.dataset, options.split, tokenizer=tokenizer, **how)
        settings = {name: getattr(options, name) for name in ("max_new_tokens", "batch_size", "cache_budget", "skip_equal", "storage")}
        reward = options.reward_model and shared.load_reward(options)
        rollouts = collect_pairs(model, tokenizer, pairs, options.out, reward=reward, **settings)
    else:
        prompts, reward = shared.load_prompts(options, tokenizer), shared.load_reward(options)
        collection = from_flags(Collection, options)
        rollouts = collect(model, tokenizer, prompts, reward, options.out, decoding=shared.decoding(options), collection=collection)
    if os.environ.get("RANK", "0") == "0":
        means = ", ".join(f"{mean:.3f}" for mean in rollouts.rewards.mean(0).tolist())
        print(f"{rollouts.describe()}; average reward {means}: {options.out}")
