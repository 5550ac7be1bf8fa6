"""`recontrol generate`."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recontrol.cli import options as shared
from recontrol.configs import from_flags
from recontrol.decoding.control import Control

if TYPE_CHECKING:
    from recontrol.generation.plan import Plan
    from recontrol.generation.requests import Generation, StreamedToken

HELP = "respond to prompts, under control or not"
DESCRIPTION = "Respond to prompts, under control when a value function is given. Responses are printed, or written as lines of JSON."
EPILOG = """\
examples:
  recontrol generate --model lmsys/vicuna-7b-v1.5 --value value/hh --step-size 0.5 --steps 30 --prompt "Human: How do I apologise?\\n\\nAssistant:"
  recontrol generate --model lmsys/vicuna-7b-v1.5 --value value/hh --dataset Anthropic/hh-rlhf --split test --limit 100 --out responses.jsonl
  recontrol generate --model lmsys/vicuna-7b-v1.5 --dataset Anthropic/hh-rlhf --split test --batch-size 256 --cache-budget 40GiB --plan"""
AFTER_INTERRUPT = "no file was written"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    parser.add_argument("--prompt", action="append", type=shared.escaped, metavar="TEXT", help=r"a prompt, \n is a line break; may be given again")
    parser.add_argument("--out", metavar="FILE", help="write lines of JSON with prompt, response and finish (default: print them)")
    parser.add_argument("--trace", action="store_true", help="write with each token V before and after, the norm of the edit, and the divergence it made")
    parser.add_argument("--plan", action="store_true", help="only say what the key/value cache takes, and how many prompts are decoded at once")
    group = parser.add_argument_group("batches")
    group.add_argument(
        "--batching",
        choices=("auto", "continuous", "static"),
        default="auto",
        help="continuous: a prompt joins the batch when there is room, paged cache; static: padded batches, one after the other "
        "(default: auto, continuous where it is possible)",
    )
    group.add_argument("--cache-budget", metavar="SIZE", help="memory for the key/value cache, for example 40GiB (default: half of what is free)")
    shared.add_model_options(parser)
    shared.add_control_options(parser, default="none, no control")
    shared.add_prompt_options(parser, default="none, give --prompt")
    shared.add_generation_options(parser)


def run(options: argparse.Namespace) -> None:
    """Respond, or say how that would be done."""
    if bool(options.prompt) == bool(options.dataset):
        raise ValueError("give either --prompt or --dataset")
    if options.trace and not (options.value and options.out):
        raise ValueError("--trace needs --value and --out: there is nothing to record without control, and nowhere to write it without a file")
    if options.plan:
        print(_plan(options))
        return
    from recontrol.decoding.loading import load_value_function
    from recontrol.generation.generate import generate

    decoding = shared.decoding(options)
    model, tokenizer = shared.load_model(options)
    prompts = _prompts(options, tokenizer)
    control = from_flags(Control, options, value=load_value_function(options.value, model)) if options.value else None
    keywords = {
        "max_new_tokens": decoding.max_new_tokens,
        "stop_strings": decoding.stop_strings,
        "seed": decoding.seed,
        "batch_size": decoding.batch_size,
        "batching": options.batching,
        "cache_budget": options.cache_budget,
        "backend": options.backend,
        "allow_other_model": options.allow_other_model,
        **decoding.options,
    }
    if options.out:
        _write(options.out, prompts, generate(model, tokenizer, prompts, control, trace=options.trace, progress=True, **keywords))
    else:
        _print(prompts, generate(model, tokenizer, prompts, control, stream=True, **keywords))


def _prompts(options: argparse.Namespace, tokenizer: Any) -> list[str]:
    return options.prompt or shared.load_prompts(options, tokenizer, options.dataset, options.split, options.limit)


def _plan(options: argparse.Namespace) -> "Plan":
    """The plan, from the model's config and tokenizer; its weights are not loaded."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from recontrol.generation.plan import make_plan
    from recontrol.generation.requests import token_ids
    from recontrol.studies.study import device_of

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = AutoConfig.from_pretrained(options.model)
    dtype = getattr(torch, options.dtype) if options.dtype != "auto" else config.get_text_config().dtype or torch.float32
    lengths = [len(ids) + options.max_new_tokens for ids in token_ids(tokenizer, _prompts(options, tokenizer))]
    return make_plan(config, dtype, lengths, device=device_of(options.device), cache_budget=options.cache_budget, batch_size=options.batch_size)


def _print(prompts: list[str], tokens: "Iterator[StreamedToken]") -> None:
    """Print each response as soon as it and those before it are finished."""
    finished: dict[int, str] = {}
    shown = 0
    for token in tokens:
        if token.response is not None:
            finished[token.index] = token.response.text
        while shown in finished:
            print(f"{prompts[shown]}{finished.pop(shown)}\n", flush=True)
            shown += 1


def _write(out: str, prompts: list[str], responses: "list[Generation]") -> None:
    """Write a line of JSON for each response."""
    from recontrol.data.dialogue import turns_entry
    from recontrol.files import write_aside

    lines = []
    for prompt, response in zip(prompts, responses, strict=True):
        line: dict[str, Any] = {"prompt": prompt, **turns_entry(prompt), "response": response.text, "finish": response.finish}
        if response.trace is not None:
            line["trace"] = dataclasses.asdict(response.trace)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside:
        aside.write_text("".join(lines), encoding="utf-8")
