"""`recontrol train`."""

import argparse

from recontrol.cli import options as shared

HELP = "train a value function on rollouts"
DESCRIPTION = """\
Train a value function on rollouts: the Bellman target with the reward at the last token, early stopping on prompts that
are held out. A run that was stopped goes on from its last checkpoint when the command is repeated; the command of a finished
one changes nothing."""
EPILOG = """\
example:
  recontrol train --rollouts rollouts/hh-train --hidden-dims 4096,4096 --out value/hh"""
AFTER_INTERRUPT = "what was done up to the last checkpoint is kept: repeat the command to go on from there"


def share_or_none(text: str) -> float:
    """A number inside (0, 1), or 0."""
    return 0.0 if float(text) == 0 else shared.fraction(text)


def share_or_all(text: str) -> float:
    """A number inside [0, 1]."""
    return 1.0 if float(text) == 1 else share_or_none(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    parser.add_argument("--rollouts", required=True, metavar="FOLDER", help="written by `recontrol collect`")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the value function, the history of its training and checkpoints are written")
    parser.add_argument(
        "--hidden-dims",
        type=shared.listed(shared.positive_int),
        default=(4096,),
        metavar="N,...",
        help="widths of the hidden layers (default: 4096, the paper's two linear layers)",
    )
    parser.add_argument("--learning-rate", type=shared.positive_float, default=1e-4, metavar="LR", help="of Adam (default: 1e-4)")
    parser.add_argument(
        "--batch-size",
        type=shared.positive_int,
        metavar="N",
        help="responses in a mini-batch at most (default: a twentieth of those trained on, at least 1 and at most the paper's 512)",
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
        "--td-lambda",
        type=share_or_all,
        default=0.0,
        metavar="L",
        help="mixes the final reward into the targets, from 0, the value of the next state only, to 1, the final reward only; "
        "values such as 0.95 need far fewer epochs on small data (default: 0, as in the paper)",
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
        choices=("torch", "triton"),
        default="torch",
        help="what computes the values and their gradient: torch, or the fused Triton kernels for two linear layers, "
        "whose speed on a GPU has not been measured (default: torch)",
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 or mps (default: cuda if there is one, else cpu)")


def run(options: argparse.Namespace) -> None:
    """Train, and save the value function."""
    from recontrol.training.train import train

    names = (
        "hidden_dims",
        "seed",
        "out",
        "learning_rate",
        "batch_size",
        "epochs",
        "patience",
        "validation_fraction",
        "td_lambda",
        "checkpoint_every",
        "kernel",
    )
    train(options.rollouts, device=shared.device(options), **{name: getattr(options, name) for name in names})
    print(f"value function: {options.out}")
