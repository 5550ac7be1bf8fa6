"""`recontrol push`."""

import argparse

from recontrol.cli import options as shared


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    shared.add_options(parser, "push")


def run(options: argparse.Namespace) -> None:
    """Upload, or print the card."""
    from recontrol.value import ValueFunction
    from recontrol.value.card import model_card
    from recontrol.value.files import local_folder

    if not options.card and not options.repo:
        raise ValueError("give --repo, or --card to print the model card")
    if options.card:
        print(model_card(local_folder(options.value), options.repo))
        return
    value = ValueFunction.from_pretrained(options.value)
    where = {"private": options.private or None, "revision": options.revision, "create_pr": options.pull_request}
    print(value.push_to_hub(options.repo, commit_message=options.message, **where))
