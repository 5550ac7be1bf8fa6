"""`recontrol train`."""

import argparse

from recontrol.cli import options as shared

HELP = "train a value function on rollouts"
DESCRIPTION = """\
Train a value function on rollouts: the Bellman target with the reward at the last token, early stopping on prompts that
are held out. A run that was stopped goes on from its last finished epoch when the command is repeated."""
EPILOG = """\
example:
  recontrol train --rollouts rollouts/hh-train --hidden-dims 4096,4096 --out value/hh"""
AFTER_INTERRUPT = "the epochs that were finished are kept: repeat the command to go on from there"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    parser.add_argument("--rollouts", required=True, metavar="FOLDER", help="written by `recontrol collect`")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the value function is written")
    parser.add_argument(
        "--hidden-dims",
        type=shared.listed(shared.positive_int),
        default=(4096,),
        metavar="N,...",
        help="widths of the hidden layers (default: 4096, the paper's two linear layers)",
    )
    parser.add_argument("--learning-rate", type=shared.positive_float, default=1e-4, metavar="LR", help="of Adam (default: 1e-4)")
    parser.add_argument("--batch-size", type=shared.positive_int, default=512, metavar="N", help="responses a step (default: 512)")
    parser.add_argument("--epochs", type=shared.positive_int, default=100, metavar="N", help="at most (default: 100)")
    parser.add_argument(
        "--patience", type=shared.positive_int, default=10, metavar="N", help="epochs without a better validation loss before stopping (default: 10)"
    )
    parser.add_argument("--validation-fraction", type=shared.fraction, default=0.1, metavar="F", help="share of the prompts held out (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights, the split and the order (default: 0)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 or mps (default: cuda if there is one, else cpu)")


def run(options: argparse.Namespace) -> None:
    """Train, and save the value function."""
    from recontrol.training.train import train

    names = ("hidden_dims", "seed", "out", "learning_rate", "batch_size", "epochs", "patience", "validation_fraction")
    train(options.rollouts, device=shared.device(options), **{name: getattr(options, name) for name in names})
    print(f"value function: {options.out}")
