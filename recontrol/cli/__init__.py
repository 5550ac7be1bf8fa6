"""The command line: `recontrol collect | relabel | train | generate | serve | evaluate | judge | push | info`."""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from recontrol.cli import collect, evaluate, generate, info, judge, push, relabel, serve, train
from recontrol.cli.options import COMMANDS, check_together
from recontrol.version import __version__

SUBCOMMANDS = (collect, relabel, train, generate, serve, evaluate, judge, push, info)
# Exit statuses, as shells have them, of a process that was told to stop by Ctrl-C, and of one whose reader went away.
INTERRUPTED, NO_READER = 130, 141
# Characters of an error's message that are printed.
LONGEST = 800
# Built-in errors that a user can mend; others of them are mistakes of ours. Those that a library defines are about what it was given.
MENDABLE = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError, ArithmeticError)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line with these arguments, by default the process's, and exit: 0 done, 2 an error that the user can mend, 130 interrupted."""
    # A terminal that cannot show a character shows its number.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = parsed(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="recontrol: %(message)s")
    try:
        check_together(options)
        options.run(options)
        # What cannot be written is an error here, and not one that nobody catches when the process ends.
        print(end="", flush=True)
    except KeyboardInterrupt:
        print(f"\nrecontrol: interrupted; {options.after_interrupt}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.strerror == os.strerror(errno.EPIPE):
            # Of `recontrol ... | head`.
            _leave(NO_READER)
        if options.debug or not (isinstance(error, MENDABLE) or type(error).__module__ != "builtins" or type(error) is Exception):
            raise
        # Some libraries write paragraphs; what is wrong comes first.
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"recontrol: error: {message if len(message) <= LONGEST else message[:LONGEST] + ' ... (the rest with --debug)'}", file=sys.stderr)
        _leave(2)
    sys.exit(0)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; `given` are those that the command has, be it with their default. An empty text, as of an unset variable, ends the process."""
    options = parser().parse_args(arguments)
    unset: list[str] = []
    sub = options.parser
    # Once more, where every option has a default of its own.
    found = sub.parse_args(arguments[1:], argparse.Namespace(**dict.fromkeys(vars(options), unset)))
    options.given = {name for name, each in vars(found).items() if each is not unset and name != "vllm"}
    for name in sorted(options.given):
        given = getattr(options, name)
        if "" in (given if isinstance(given, list) else [given]):
            sub.error(f"argument --{name.replace('_', '-')}: must not be empty")
    return options


def _leave(status: int) -> NoReturn:
    """Exit; what could not be printed is dropped."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


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
        sub.set_defaults(run=module.run, after_interrupt=after_interrupt, parser=sub)
    return top
