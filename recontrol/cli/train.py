"""`recontrol train`."""

import argparse
from typing import Any

from recontrol.cli import options as shared

HELP = "train a value function on rollouts"
DESCRIPTION = """\
Train a value function on rollouts: the Bellman target with the reward at the last token, early stopping on prompts that
are held out. A run that was stopped goes on from its last checkpoint when the command is repeated; the command of a finished
one changes nothing. Several processes, started by `accelerate launch -m recontrol train ...` or torchrun, share each mini-batch."""
EPILOG = """\
examples, the last two of which show what the mistakes of the released code cost:
  recontrol train --rollouts rollouts/hh-train --hidden-dims 4096,4096 --out value/hh
  recontrol train --rollouts rollouts/hh-train --objective reference --out value/reference
  recontrol train --rollouts rollouts/hh-train --out value/td --compare value/reference"""
AFTER_INTERRUPT = "what was done up to the last checkpoint is kept: repeat the command to go on from there"


def share_or_none(text: str) -> float:
    """A number inside (0, 1), or 0."""
    return 0.0 if float(text) == 0 else shared.fraction(text)


def share_or_all(text: str) -> float:
    """A number inside [0, 1]."""
    return 1.0 if float(text) == 1 else share_or_none(text)


def number_from_zero(text: str) -> float:
    """A finite number of at least 0."""
    number = shared.finite_float(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, found {text}")
    return number


def count_from_zero(text: str) -> int:
    """An integer of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, found {text}")
    return number


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    _add_objective(parser.add_argument_group("objective"))
    _add_optimiser(parser.add_argument_group("optimiser"))
    parser.add_argument("--rollouts", required=True, metavar="FOLDER", help="written by `recontrol collect`")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the value function, the history of its training and checkpoints are written")
    parser.add_argument(
        "--hidden-dims",
        type=shared.listed(shared.positive_int),
        default=(4096,),
        metavar="N,...",
        help="widths of the hidden layers (default: 4096, the paper's two linear layers)",
    )
    parser.add_argument(
        "--batch-size",
        type=shared.positive_int,
        metavar="N",
        help="responses (preference: prompts) in a mini-batch at most (default: a twentieth of those trained on, at least 1 and at most the paper's 512)",
    )
    parser.add_argument("--epochs", type=shared.positive_int, default=100, metavar="N", help="passes over the training data at most (default: 100)")
    parser.add_argument(
        "--patience",
        type=shared.positive_int,
        default=10,
        metavar="N",
        help="stop after N epochs in a row that predict the rewards of the prompts held out no better than the best one before (default: 10)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=share_or_none,
        default=0.1,
        metavar="F",
        help="share of the prompts held out, below 1; 0 trains on all of them, for all epochs (default: 0.1)",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=shared.positive_int,
        default=1,
        metavar="N",
        help="mini-batches between checkpoints, which is what a kill loses at most; there is one after each epoch too (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights, the split and the order (default: 0)")
    parser.add_argument(
        "--kernel",
        choices=("auto", "torch", "closed-form", "triton"),
        default="auto",
        help="what computes the values and their gradient: torch (autograd), closed-form (for two linear layers and one reward, without stored "
        "activations), or the fused Triton kernels for two linear layers, whose speed on a GPU has not been measured (default: auto)",
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 or mps (default: cuda if there is one, else cpu)")
    parser.add_argument("--log-with", metavar="TRACKER", help="tracker of accelerate that gets the history, such as tensorboard (default: none)")
    parser.add_argument(
        "--report",
        action="store_true",
        help="show how V goes with the final reward along the responses held out, and write diagnosis.json and diagnosis.png into --out",
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="FOLDER",
        help="another value function for that report, such as one trained with --objective reference; may be given up to four times (default: none)",
    )


def _add_objective(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--objective",
        choices=("td", "td-lambda", "mc", "preference", "reference"),
        help="td: the paper's; td-lambda: with some of the final reward in the targets; mc: regression of the final reward at every token; "
        "preference: order pairs of responses to a prompt; reference: the released code's loss with its mistakes, for comparison only "
        "(default: td, or td-lambda with --td-lambda)",
    )
    group.add_argument(
        "--td-lambda",
        type=share_or_all,
        default=0.0,
        metavar="L",
        help="mixes the final reward into the targets, from 0, the value of the next state only, to 1, the final reward only; "
        "values such as 0.95 need far fewer epochs on small data (default: 0, as in the paper)",
    )
    group.add_argument(
        "--preference-regression",
        type=number_from_zero,
        default=0.0,
        metavar="W",
        help="weight of the TD loss beside preferences, on the responses that the model itself generated (default: 0)",
    )
    group.add_argument(
        "--preference-regulariser",
        type=number_from_zero,
        default=0.0,
        metavar="W",
        help="weight of what keeps the margin between preferred and other responses from growing without end (default: 0)",
    )
    group.add_argument(
        "--normalise-rewards",
        action="store_true",
        help="leave V in standard deviations from the mean reward, and store both in it (default: V is in the unit of the reward)",
    )


def _add_optimiser(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--learning-rate", type=shared.positive_float, default=1e-4, metavar="LR", help="of Adam (default: 1e-4)")
    group.add_argument("--weight-decay", type=number_from_zero, default=0.0, metavar="W", help="of AdamW (default: 0, which is Adam)")
    group.add_argument("--warmup-steps", type=count_from_zero, default=0, metavar="N", help="mini-batches over which the learning rate rises (default: 0)")
    group.add_argument(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="of the learning rate; cosine falls to 0 at the last of --epochs (default: constant)",
    )
    group.add_argument("--max-gradient-norm", type=shared.positive_float, metavar="G", help="cut longer gradients to this norm (default: none)")
    group.add_argument(
        "--ema-decay", type=shared.fraction, metavar="D", help="keep an exponential moving average of the weights, with a decay such as 0.99 (default: none)"
    )
    group.add_argument(
        "--compute-dtype",
        choices=("bfloat16",),
        help="of the products of the hidden layers in training; weights and optimiser stay float32 (default: float32)",
    )


def run(options: argparse.Namespace) -> None:
    """Train, and save the value function."""
    import os

    import torch

    from recontrol.training.train import train

    names = (
        "hidden_dims",
        "seed",
        "out",
        "objective",
        "td_lambda",
        "preference_regression",
        "preference_regulariser",
        "normalise_rewards",
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "schedule",
        "max_gradient_norm",
        "ema_decay",
        "batch_size",
        "epochs",
        "patience",
        "validation_fraction",
        "checkpoint_every",
        "device",
        "kernel",
        "log_with",
    )
    compute_dtype = getattr(torch, options.compute_dtype) if options.compute_dtype else None
    result = train(options.rollouts, compute_dtype=compute_dtype, **{name: getattr(options, name) for name in names})
    # Of several processes, the first one writes and speaks.
    if os.environ.get("RANK", "0") == "0":
        if options.report or options.compare:
            _report(options, result[0])
        print(f"value function: {options.out}")


def _report(options: argparse.Namespace, value: Any) -> None:
    """Compare value functions on the responses that the first was not trained on."""
    from recontrol.data.rollouts import Rollouts
    from recontrol.training.data import split_by_prompt
    from recontrol.training.diagnosis import diagnose, save_diagnosis, table
    from recontrol.value import ValueFunction

    rollouts = Rollouts(options.rollouts)
    held_in, held_out = split_by_prompt(rollouts.groups, options.validation_fraction, options.seed)
    named = {options.out: value} | {folder: ValueFunction.from_pretrained(folder, device=value.device) for folder in options.compare}
    diagnoses = {name: diagnose(each, rollouts, held_out if len(held_out) else held_in) for name, each in named.items()}
    save_diagnosis(options.out, diagnoses)
    print(f"{'prompts held out' if len(held_out) else 'the prompts trained on, for lack of others'}, {next(iter(diagnoses.values())).responses} responses")
    print(table(diagnoses))
