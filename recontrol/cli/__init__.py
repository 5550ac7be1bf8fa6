"""The command line: `recontrol collect | relabel | train | generate | serve | evaluate | judge | push | info`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from recontrol.cli import collect, evaluate, generate, info, judge, push, relabel, serve, train
from recontrol.version import __version__

SUBCOMMANDS = {
    "collect": collect,
    "relabel": relabel,
    "train": train,
    "generate": generate,
    "serve": serve,
    "evaluate": evaluate,
    "judge": judge,
    "push": push,
    "info": info,
}
DESCRIPTION = "Align a language model at test time by editing the hidden states it reads (RE-Control, Kong et al. 2024)."
EPILOG = """\
the whole method, in this order:
  recontrol collect    let the uncontrolled model respond to prompts; keep its hidden states and rewards
  recontrol train      train a value function on them
  recontrol evaluate   compare step sizes and numbers of steps on other prompts
  recontrol generate   decode under control

beside it:
  recontrol relabel    score the responses of rollouts again, with another reward
  recontrol judge      win rate of responses against others, by a language model or a reward model
  recontrol serve      serve the model over HTTP, each request under its own control
  recontrol push       upload a value function to the hub
  recontrol info       say what runs here

`recontrol SUBCOMMAND --help` says the rest. Models and data sets are names on the hub or local paths."""
# Exit status of a process that was told to stop by Ctrl-C, as shells have it.
INTERRUPTED = 130
# Characters of an error's message that are printed.
LONGEST = 800


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 2 an error that the user can mend, 130 interrupted.

    Args:
        arguments: what follows the program's name; those of the process by default.
    """
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="recontrol: %(message)s")
    try:
        options.run(options)
    except KeyboardInterrupt:
        print(f"\nrecontrol: interrupted; {options.after_interrupt}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        if options.debug:
            raise
        # Some libraries write paragraphs; what is wrong comes first.
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"recontrol: error: {message if len(message) <= LONGEST else message[:LONGEST] + ' ... (the rest with --debug)'}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def parser() -> argparse.ArgumentParser:
    """The parser of the command and its subcommands."""
    top = argparse.ArgumentParser("recontrol", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"recontrol {__version__}")
    subcommands = top.add_subparsers(required=True, title="subcommands", dest="subcommand")
    for name, module in SUBCOMMANDS.items():
        sub = subcommands.add_parser(
            name, help=module.HELP, description=module.DESCRIPTION, epilog=module.EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_options(sub)
        group = sub.add_argument_group("messages")
        group.add_argument("--verbose", action="store_true", help="say more about what is done")
        group.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=module.run, after_interrupt=module.AFTER_INTERRUPT)
    return top
