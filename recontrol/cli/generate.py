"""`recontrol generate`."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from recontrol.cli import options as shared
from recontrol.configs import from_flags
from recontrol.decoding.control import Control

if TYPE_CHECKING:
    from recontrol.generation.plan import Plan
    from recontrol.generation.requests import StreamedToken


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    shared.add_options(parser, "generate", "batches", "language model")
    shared.add_options(parser, "control", default="none, no control")
    shared.add_options(parser, "prompts", "generation", default="none, give --prompt")


def run(options: argparse.Namespace) -> None:
    """Respond, or say how that would be done."""
    if bool(options.prompt) == bool(options.dataset):
        raise ValueError("give either --prompt or --dataset")
    if options.trace and not (options.value and options.out):
        raise ValueError("--trace needs --value and --out: there is nothing to record without control, and nowhere to write it without a file")
    if options.plan:
        print(_plan(options))
        return
    from recontrol.data.dialogue import turns_entry
    from recontrol.decoding.loading import load_value_function
    from recontrol.files import check_output, write_aside
    from recontrol.generation.generate import generate

    decoding = shared.decoding(options)
    if options.out:
        check_output(options.out)
    model, tokenizer = shared.load_model(options)
    prompts = shared.load_prompts(options, tokenizer)
    control = from_flags(Control, options, value=load_value_function(options.value, model)) if options.value else None
    how = {name: getattr(options, name) for name in ("batching", "cache_budget", "backend", "allow_other_model")}
    if not options.out:
        _print(prompts, generate(model, tokenizer, prompts, control, decoding=decoding, stream=True, **how))
        return
    lines = []
    responses = generate(model, tokenizer, prompts, control, decoding=decoding, trace=options.trace, progress=True, **how)
    for prompt, response in zip(prompts, responses, strict=True):
        trace = {} if response.trace is None else {"trace": dataclasses.asdict(response.trace)}
        lines.append(
            json.dumps({"prompt": prompt, **turns_entry(prompt), "response": response.text, "finish": response.finish, **trace}, ensure_ascii=False) + "\n"
        )
    with write_aside(options.out) as aside:
        aside.write_text("".join(lines), encoding="utf-8")


def _plan(options: argparse.Namespace) -> "Plan":
    """The plan, from the model's config and tokenizer; its weights are not loaded."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from recontrol.decoding.model_config import text_config
    from recontrol.generation.plan import make_plan
    from recontrol.generation.requests import token_ids
    from recontrol.studies.study import device_of

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = AutoConfig.from_pretrained(options.model)
    dtype = getattr(torch, options.dtype) if options.dtype != "auto" else text_config(config).dtype or torch.float32
    prompts = shared.load_prompts(options, tokenizer)
    lengths = [len(ids) + options.max_new_tokens for ids in token_ids(tokenizer, prompts)]
    return make_plan(config, dtype, lengths, device=device_of(options.device), cache_budget=options.cache_budget, batch_size=options.batch_size)


def _print(prompts: list[str], tokens: Iterator["StreamedToken"]) -> None:
    """Print each response as soon as it and those before it are finished."""
    finished: dict[int, str] = {}
    shown = 0
    for token in tokens:
        if token.response is not None:
            finished[token.index] = token.response.text
        while shown in finished:
            print(f"{prompts[shown]}{finished.pop(shown)}\n", flush=True)
            shown += 1
