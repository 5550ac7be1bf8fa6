"""`recontrol train`."""

import argparse
import os
from typing import Any

from recontrol.checks import required
from recontrol.cli import options as shared
from recontrol.configs import add_flags, from_flags
from recontrol.training.config import TrainConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    add_flags(parser.add_argument_group("training"), TrainConfig, leave_out=("dtype",))
    shared.add_options(parser, "train")


def run(options: argparse.Namespace) -> None:
    """Train, and save the value function."""
    config = from_flags(TrainConfig, options)
    if "patience" in options.given and not options.validation_fraction:
        raise ValueError("--patience: found with --validation-fraction 0, which leaves nothing to stop by")
    if len(options.compare) > 4:
        raise ValueError(f"--compare: found {len(options.compare)} value functions, wanted at most 4")

    from recontrol.training.train import train
    from recontrol.value import ValueFunction

    # What the report is made of and with is better missed before the training.
    compared = {folder: ValueFunction.from_pretrained(folder) for folder in options.compare}
    if options.report or compared:
        required("matplotlib", "report")
    others = {name: getattr(options, name) for name in ("out", "device", "log_with", "checkpoint_every")}
    value, _ = train(options.rollouts, config, **others)
    # Of several processes, the first one writes and speaks.
    if os.environ.get("RANK", "0") == "0":
        if options.report or options.compare:
            _report(options, {options.out: value, **{folder: other.to(value.device) for folder, other in compared.items()}})
        print(f"value function: {options.out}")


def _report(options: argparse.Namespace, named: dict[str, Any]) -> None:
    """Compare value functions on the responses that the first was not trained on."""
    from recontrol.data.rollouts import Rollouts
    from recontrol.training.data import split_by_prompt
    from recontrol.training.diagnosis import diagnose, save_diagnosis, table

    rollouts = Rollouts(options.rollouts)
    held_in, held_out = split_by_prompt(rollouts.groups, options.validation_fraction, options.seed)
    diagnoses = {name: diagnose(each, rollouts, held_out if len(held_out) else held_in) for name, each in named.items()}
    save_diagnosis(options.out, diagnoses)
    print(f"{'prompts held out' if len(held_out) else 'the prompts trained on, for lack of others'}, {next(iter(diagnoses.values())).responses} responses")
    print(table(diagnoses))
