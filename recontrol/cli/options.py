"""What the subcommands share; heavy imports are inside the functions that need them, so that `--help` answers at once."""

import argparse
import importlib.resources
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recontrol.ascent import backends
from recontrol.configs import add_flags, listed
from recontrol.decoding.config import Decoding
from recontrol.decoding.control import Control

if TYPE_CHECKING:
    from recontrol.studies.study import JudgeSection, RewardSection

logger = logging.getLogger(__name__)

# What the subcommands say of themselves, and their options by groups.
COMMANDS = yaml.safe_load((importlib.resources.files("recontrol.cli") / "commands.yaml").read_text(encoding="utf-8"))


def _number(name: str, kind: Callable[[str], Any], wanted: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """The type of a flag whose number must fit."""

    def read(text: str) -> Any:
        number = kind(text)
        if not fits(number):
            raise argparse.ArgumentTypeError(f"must be {wanted}, found {text}")
        return number

    read.__name__ = name
    return read


positive_int = _number("positive int", int, "at least 1", lambda number: number >= 1)
positive_float = _number("positive float", float, "a number above 0", lambda number: math.isfinite(number) and number > 0)
finite_float = _number("finite float", float, "finite", math.isfinite)


def escaped(text: str) -> str:
    r"""A text in which \n and \t stand for a line break and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, found {text!r}")
    return content


# By the names in commands.yaml.
TYPES: dict[str, Callable[[str], Any]] = {
    "positive_int": positive_int,
    "positive_ints": listed(positive_int),
    "positive_float": positive_float,
    "positive_floats": listed(positive_float),
    "floats": listed(float),
    "finite_floats": listed(finite_float),
    "escaped": escaped,
    "json_object": json_object,
}


def add_options(parser: argparse.ArgumentParser, *groups: str, default: str | None = None) -> None:
    """The options of a subcommand itself and of groups; what is `needed` may be left out where `default` says in words what happens then."""
    for name in groups:
        group: Any = parser if name in COMMANDS else parser.add_argument_group(name)
        for flag, given in COMMANDS["options"][name].items():
            keywords = {word: TYPES[setting] if word == "type" else setting for word, setting in given.items() if word != "needed"}
            if "needed" in given:
                keywords |= {"required": default is None, "help": given["help"] + ("" if default is None else f" (default: {default})")}
            group.add_argument(flag, **keywords)
        if name == "control":
            types = {"step_size": positive_float, "steps": positive_int, "radius": positive_float, "target": finite_float}
            several = ("step_size", "steps") if "evaluate" in groups else ()
            add_flags(group, Control, leave_out=("value", *several), types={**types, "head_weights": listed(finite_float)})
            group.add_argument("--backend", default="auto", metavar="NAME", help=f"{', '.join(backends.names())}; see `recontrol info` (default: auto)")
        if name == "generation":
            add_flags(group, Decoding, leave_out=("batch_size", "stop_strings", "options"), types={"max_new_tokens": positive_int})


def check_together(options: argparse.Namespace) -> None:
    """Refuse options without those that they are of, or beside those that leave no use for them, by the rules in commands.yaml; say which ones are not used."""
    there = {f"--{name.replace('_', '-')}" for name in options.given}
    kinds = {name.partition(":")[0] for name in getattr(options, "reward_model", None) or []}
    there |= {"--reward-model judge:NAME"} if "judge" in kinds else set()
    there |= {"a classifier as --reward-model"} if kinds - {"judge", "python"} else set()
    for rule in COMMANDS["together"]["all"] + COMMANDS["together"].get(options.subcommand, []):
        found = ", ".join(flag for flag in rule["options"] if flag in there)
        if found and "with" in rule and not there & set(rule["with"]):
            raise ValueError(f"{found}: found without {' or '.join(rule['with'])}, and has no use then")
        if found and (others := [flag for flag in rule.get("without", ()) if flag in there]):
            raise ValueError(f"{found}: found beside {' and '.join(others)}, and has no use there")
        if found and (others := [flag for flag in rule.get("unused", ()) if flag in there]):
            logger.warning("not used with %s: %s", " and ".join(others), found)
    for split, sources in {"split": ("dataset", "preferred"), "validation_split": ("validation_prompts", "dataset")}.items():
        source = next((given for name in sources if (given := getattr(options, name, None))), "")
        if split in options.given and Path(source).is_file():
            raise ValueError(f"--{split.replace('_', '-')}: {source} is a file and has no splits; --limit takes its first prompts")


def decoding(options: argparse.Namespace) -> Decoding:
    """How responses are decoded."""
    return Decoding(options.max_new_tokens, options.batch_size, options.seed, stop_strings(options), generation_options(options))


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments for `model.generate`."""
    if not (options.sample or options.temperature or options.top_p or options.top_k):
        return {"do_sample": False}
    return {"do_sample": True, "temperature": options.temperature or 1.0, "top_p": options.top_p or 1.0, "top_k": options.top_k or 0}


def stop_strings(options: argparse.Namespace) -> list[str]:
    """The texts at which a response is cut."""
    from recontrol.data.prompts import turn_marks

    if options.no_stop and options.stop:
        raise ValueError("--stop and --no-stop exclude each other")
    return [] if options.no_stop else options.stop or turn_marks(options.dataset, options.human, options.chat_template)


def load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """(language model, tokenizer)."""
    from recontrol.studies.study import ModelSection

    return ModelSection(options.model, options.dtype, options.device).load()


def load_prompts(options: argparse.Namespace, tokenizer: Any) -> list[str]:
    """The prompts, written as the options say."""
    from recontrol.data.prompts import load_prompts, render_prompt

    if given := getattr(options, "prompt", None):
        return [render_prompt(tokenizer, prompt) for prompt in given] if options.chat_template else given
    how = {name: getattr(options, name) for name in ("limit", "chat_template", "human", "max_prompt_tokens")}
    return load_prompts(options.dataset, options.split, tokenizer=tokenizer, **how)


def judge_section(options: argparse.Namespace) -> "JudgeSection":
    """How a chat model is asked."""
    from recontrol.studies.study import JudgeSection

    return JudgeSection(options.judge_url, tuple(options.judge_range), options.judge_cache, options.judge_concurrency, options.judge_request)


def reward_section(options: argparse.Namespace, head_weights: list[float] | None = None) -> "RewardSection":
    """What responses are scored by."""
    from recontrol.studies.study import RewardSection

    names, batch_size, template = options.reward_model, options.reward_batch_size, options.reward_template
    return RewardSection(names, head_weights, batch_size, template, options.device, judge=judge_section(options))


def load_reward(options: argparse.Namespace) -> Any:
    """The reward."""
    return reward_section(options).load()
