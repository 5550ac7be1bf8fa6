"""`recontrol relabel`."""

import argparse
import os
from pathlib import Path

from recontrol.cli import options as shared


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    shared.add_options(parser, "relabel", "reward")


def run(options: argparse.Namespace) -> None:
    """Score again."""
    from recontrol.data.relabel import relabel
    from recontrol.data.rewards.checks import names_of_heads
    from recontrol.data.shards import read_manifest
    from recontrol.files import check_output

    # A folder that is none, or cannot be written, is better found before a reward model of many gigabytes is loaded.
    read_manifest(Path(options.rollouts))
    check_output(options.out or options.rollouts, folder=True)
    rollouts = relabel(options.rollouts, shared.load_reward(options), options.out, add=options.add)
    if os.environ.get("RANK", "0") != "0":
        return
    names = names_of_heads(rollouts.manifest.get("reward"), rollouts.num_heads)
    for name, mean in zip(names, rollouts.rewards.mean(0).tolist(), strict=True):
        print(f"{name}: average {mean:.3f}")
    print(f"{len(rollouts)} responses: {rollouts.path}")
