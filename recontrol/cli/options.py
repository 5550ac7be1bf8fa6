"""What the subcommands share: options, what they accept, and how models, prompts and rewards are loaded.

Heavy imports are inside the functions that need them, so that `--help` answers at once.
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from recontrol.ascent import backends
from recontrol.configs import add_flags
from recontrol.decoding.config import Decoding
from recontrol.decoding.control import Control

if TYPE_CHECKING:
    from recontrol.studies.study import JudgeSection, RewardSection

DTYPES = ("auto", "float32", "bfloat16", "float16")
# The device of a reward model.
REWARD_DEVICE = "of a sequence classifier: cpu, cuda, cuda:1, mps, or auto (default: cuda if there is one, else cpu)"


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


def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Comma-separated entries of one kind."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(entry) for entry in text.split(","))

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def escaped(text: str) -> str:
    r"""A text in which \n and \t stand for a line break and a tab."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
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


def _stated(default: str | None) -> str:
    return "" if default is None else f" (default: {default})"


def add_model_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """--model, --dtype, --device. Here and below, what has no default in words must be given."""
    add = parser.add_argument_group("language model").add_argument
    add("--model", required=default is None, metavar="NAME", help="causal language model: a name on the hub, or a folder" + _stated(default))
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, the dtype they were saved in)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps, or auto for all GPUs (default: cuda if there is one, else cpu)")


def add_control_options(parser: argparse.ArgumentParser, default: str | None = None, leave_out: tuple[str, ...] = ()) -> None:
    """--value, what steers the ascent, and where it runs."""
    group = parser.add_argument_group("control")
    words = "value function: a folder written by `recontrol train`, a name on the hub, or a .pth file of the released code" + _stated(default)
    group.add_argument("--value", required=default is None, metavar="PATH", help=words)
    types = {"step_size": positive_float, "steps": positive_int, "radius": positive_float, "target": finite_float, "head_weights": listed(finite_float)}
    add_flags(group, Control, leave_out=("value", *leave_out), types=types)
    group.add_argument("--backend", default="auto", metavar="NAME", help=f"{', '.join(backends.names())}; see `recontrol info` (default: auto)")
    group.add_argument("--allow-other-model", action="store_true", help="accept a value function that was trained on the states of another model")


def add_prompt_options(parser: argparse.ArgumentParser, default: str | None = None, split: str = "train") -> None:
    """--dataset, --split, --limit and how prompts are written."""
    add = parser.add_argument_group("prompts").add_argument
    words = "a name on the hub such as Anthropic/hh-rlhf or stanfordnlp/SHP, or a .jsonl file with a column prompt, chosen or history" + _stated(default)
    add("--dataset", required=default is None, metavar="NAME", help=words)
    add("--split", default=split, metavar="SPLIT", help=f"of a data set of the hub; a file has none (default: {split})")
    add("--limit", type=positive_int, metavar="N", help="use the first N prompts (default: all)")
    add("--max-prompt-tokens", type=positive_int, default=512, metavar="N", help="leave out longer prompts (default: 512, as in the paper)")
    add("--human", default="Human", metavar="WORD", help="what marks the user's turns, as the model was trained (default: Human)")
    add("--chat-template", action="store_true", help="write the dialogue with the tokenizer's chat template")


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Length, batches, sampling and stop strings."""
    group = parser.add_argument_group("generation")
    add_flags(group, Decoding, leave_out=("batch_size", "stop_strings", "options"), types={"max_new_tokens": positive_int})
    add = group.add_argument
    add("--batch-size", type=positive_int, default=16, metavar="N", help="prompts decoded at once at most (default: 16)")
    add("--sample", action="store_true", help="sample; implied by the next three (default: greedy)")
    add("--temperature", type=positive_float, metavar="T", help="of sampling (default: 1)")
    add("--top-p", type=positive_float, metavar="P", help="sample from the likeliest tokens of this total probability (default: 1, all)")
    add("--top-k", type=positive_int, metavar="K", help="sample from the K likeliest tokens (default: all)")
    words = r"cut responses before this text, \n is a line break; may be given again (default: a further turn of the user in dialogues without a chat template)"
    add("--stop", action="append", type=escaped, metavar="TEXT", help=words)
    add("--no-stop", action="store_true", help="cut responses nowhere")


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
    from recontrol.data.prompts import load_prompts

    how = {name: getattr(options, name) for name in ("limit", "chat_template", "human", "max_prompt_tokens")}
    return load_prompts(options.dataset, options.split, tokenizer=tokenizer, **how)


def add_reward_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """--reward-model, and how sequence classifiers and judges are used."""
    add = parser.add_argument_group("reward").add_argument
    words = "sequence classifier that scores prompt and response as one text: name or folder; or judge:NAME, a chat model that is asked for a score; or "
    words += "python:MODULE:FUNCTION, a function (prompts, responses) -> scores. Given again, each reward becomes a head" + _stated(default)
    add("--reward-model", action="append", required=default is None, metavar="NAME", help=words)
    add("--reward-batch-size", type=positive_int, default=16, metavar="N", help="texts scored at once (default: 16)")
    words = r"how the classifier's texts are written: a text with {prompt} and {response} in it, \n is a line break, or chat, its chat template "
    add("--reward-template", type=escaped, metavar="TEXT", help=words + "(default: prompt and response one after the other; for UltraRM its own)")
    add("--judge-url", metavar="URL", help="server of the judge, with /v1; its key is OPENAI_API_KEY (default: OPENAI_BASE_URL, else OpenAI's)")
    add("--judge-range", type=listed(finite_float), default=(1.0, 10.0), metavar="A,B", help="lowest and highest score (default: 1,10)")
    add("--judge-cache", metavar="FILE", help="keep the judge's answers in this file, and do not ask again (default: none)")
    add("--judge-concurrency", type=positive_int, default=8, metavar="N", help="requests to the judge at a time (default: 8)")
    add("--judge-request", type=json_object, metavar="JSON", help='further fields of each request to the judge (default: {"temperature": 0})')


def judge_section(options: argparse.Namespace) -> "JudgeSection":
    """How a chat model is asked."""
    from recontrol.studies.study import JudgeSection

    return JudgeSection(options.judge_url, options.judge_range, options.judge_cache, options.judge_concurrency, options.judge_request)


def reward_section(options: argparse.Namespace, head_weights: list[float] | None = None) -> "RewardSection":
    """What responses are scored by."""
    from recontrol.studies.study import RewardSection

    names, batch_size, template = options.reward_model, options.reward_batch_size, options.reward_template
    return RewardSection(names, head_weights, batch_size, template, options.device, judge=judge_section(options))


def load_reward(options: argparse.Namespace) -> Any:
    """The reward."""
    return reward_section(options).load()
