"""The command line: `recontrol collect | relabel | train | generate | serve | evaluate | judge | push | info`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from recontrol.cli import collect, evaluate, generate, info, judge, push, relabel, serve, train
from recontrol.cli.options import COMMANDS
from recontrol.version import __version__

SUBCOMMANDS = (collect, relabel, train, generate, serve, evaluate, judge, push, info)
# Exit status of a process that was told to stop by Ctrl-C, as shells have it.
INTERRUPTED = 130
# Characters of an error's message that are printed.
LONGEST = 800


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line with these arguments, by default the process's, and exit: 0 done, 2 an error that the user can mend, 130 interrupted."""
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
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("recontrol", **COMMANDS["recontrol"], formatter_class=raw)
    top.add_argument("--version", action="version", version=f"recontrol {__version__}")
    subcommands = top.add_subparsers(required=True, title="subcommands", dest="subcommand")
    for module in SUBCOMMANDS:
        name = module.__name__.rpartition(".")[2]
        texts = dict(COMMANDS[name])
        after_interrupt = texts.pop("after_interrupt")
        sub = subcommands.add_parser(name, **texts, formatter_class=raw)
        module.add_options(sub)
        group = sub.add_argument_group("messages")
        group.add_argument("--verbose", action="store_true", help="say more about what is done")
        group.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=module.run, after_interrupt=after_interrupt)
    return top
