"""`recontrol generate`."""

import argparse
import contextlib
import json
from pathlib import Path

from recontrol.cli import options as shared

HELP = "respond to prompts, under control or not"
DESCRIPTION = "Respond to prompts, under control when a value function is given. Responses are printed, or written as lines of JSON."
EPILOG = """\
examples:
  recontrol generate --model lmsys/vicuna-7b-v1.5 --value value/hh --step-size 0.5 --steps 30 --prompt "Human: How do I apologise?\\n\\nAssistant:"
  recontrol generate --model lmsys/vicuna-7b-v1.5 --value value/hh --dataset Anthropic/hh-rlhf --split test --limit 100 --out responses.jsonl"""
AFTER_INTERRUPT = "no file was written"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    parser.add_argument("--prompt", action="append", type=shared.escaped, metavar="TEXT", help=r"a prompt, \n is a line break; may be given again")
    parser.add_argument("--out", metavar="FILE", help="write lines of JSON with prompt, response and finish (default: print them)")
    shared.add_model_options(parser)
    shared.add_value_options(parser, required=False)
    parser.add_argument("--step-size", type=shared.positive_float, default=0.5, metavar="ALPHA", help="of a gradient step (default: 0.5)")
    parser.add_argument("--steps", type=shared.positive_int, default=30, metavar="N", help="gradient steps a token (default: 30)")
    shared.add_prompt_options(parser, required=False)
    shared.add_generation_options(parser)


def run(options: argparse.Namespace) -> None:
    """Respond."""
    if bool(options.prompt) == bool(options.dataset):
        raise ValueError("give either --prompt or --dataset")
    from tqdm.auto import tqdm

    from recontrol.decoding.controller import Controller
    from recontrol.decoding.generation import check_lengths, finishing_tokens, generate_batch
    from recontrol.files import write_aside

    stops = shared.stop_strings(options)
    model, tokenizer = shared.load_model(options)
    prompts = options.prompt or shared.load_prompts(options, tokenizer, options.dataset, options.split, options.limit)
    check_lengths(model, tokenizer, prompts, options.max_new_tokens)
    control: contextlib.AbstractContextManager = contextlib.nullcontext()
    if options.value:
        value = shared.load_value(options, model)
        controls = {"stop_token_ids": finishing_tokens(model, tokenizer, {}), "head_weights": options.head_weights, **shared.controller_options(options)}
        control = Controller(value, options.step_size, options.steps, **controls).attach(model)
    lines = []
    starts = range(0, len(prompts), options.batch_size)
    with control:
        # The bar would come between printed responses.
        for number, start in enumerate(tqdm(starts, unit="batch", disable=not options.out)):
            batch = prompts[start : start + options.batch_size]
            keywords = {"seed": options.seed + number, "stop_strings": stops, **shared.generation_options(options)}
            responses = generate_batch(model, tokenizer, batch, max_new_tokens=options.max_new_tokens, **keywords).responses
            for prompt, response in zip(batch, responses, strict=True):
                lines.append(json.dumps({"prompt": prompt, "response": response.text, "finish": response.finish}, ensure_ascii=False))
                if not options.out:
                    print(f"{prompt}{response.text}\n", flush=True)
    if options.out:
        path = Path(options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(path) as aside:
            aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
