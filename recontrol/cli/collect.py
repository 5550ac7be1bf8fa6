"""`recontrol collect`."""

import argparse
import os
from typing import Any

from recontrol.cli import options as shared


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    from recontrol.configs import add_flags
    from recontrol.data.config import Collection

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
    from recontrol.configs import from_flags
    from recontrol.data.collect import collect
    from recontrol.data.config import Collection

    if options.reward_model is None and not options.pairs:
        raise ValueError("--reward-model is needed, except with --pairs, where chosen responses get reward 1 and rejected ones 0")
    model, tokenizer = shared.load_model(options)
    if options.pairs:
        rollouts = _pairs(options, model, tokenizer)
    else:
        prompts, reward = shared.load_prompts(options, tokenizer), shared.load_reward(options)
        collection = from_flags(Collection, options)
        rollouts = collect(model, tokenizer, prompts, reward, options.out, decoding=shared.decoding(options), collection=collection)
    if os.environ.get("RANK", "0") == "0":
        means = ", ".join(f"{mean:.3f}" for mean in rollouts.rewards.mean(0).tolist())
        print(f"{rollouts.describe()}; average reward {means}: {options.out}")


def _pairs(options: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    from recontrol.data.collect import collect_pairs
    from recontrol.data.pairs import load_pairs

    how = {name: getattr(options, name) for name in ("limit", "chat_template", "human", "max_prompt_tokens", "skip_equal")}
    pairs = load_pairs(options.dataset, options.split, tokenizer=tokenizer, **how)
    settings = {name: getattr(options, name) for name in ("max_new_tokens", "batch_size", "cache_budget", "skip_equal", "storage")}
    return collect_pairs(model, tokenizer, pairs, options.out, reward=options.reward_model and shared.load_reward(options), **settings)
