"""`recontrol push`."""

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    parser.add_argument("--value", required=True, metavar="FOLDER", help="written by `recontrol train`")
    parser.add_argument("--repo", metavar="NAME", help="owner/name on the hub; made if there is none (default: none, with --card)")
    parser.add_argument("--private", action="store_true", help="make a new repository private (default: as the owner's settings say)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to, made if there is none (default: main)")
    parser.add_argument("--pull-request", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--message", default="Upload value function", metavar="TEXT", help="of the commit (default: Upload value function)")
    parser.add_argument("--card", action="store_true", help="print the model card and upload nothing")


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
