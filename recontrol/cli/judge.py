"""`recontrol judge`."""

import argparse
from pathlib import Path
from typing import Any

from recontrol.cli import options as shared

FORMAT = "recontrol.win_rate"
FORMAT_VERSION = 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    add = parser.add_argument_group("responses").add_argument
    add("--responses", required=True, metavar="FILE", help="what is judged: lines with prompt and response, such as an evaluation's responses.jsonl")
    add("--method", metavar="LABEL", help="judge the lines with this `method` (default: all lines, if they are of one)")
    add("--others", metavar="FILE", help="what they are compared with, such lines too (default: --responses, if --against is given)")
    add("--against", metavar="LABEL", help="compare with the lines with this `method` (default: all lines of --others, if they are of one)")
    add("--preferred", metavar="NAME", help="compare with the preferred responses of this data set or .jsonl file (default: none)")
    # Its name before.
    add("--references", dest="preferred", help=argparse.SUPPRESS)
    add("--split", default="test", metavar="SPLIT", help="of a data set of the hub; a file has none (default: test)")
    add("--human", default="Human", metavar="WORD", help="what marks the user's turns in the prompts (default: Human)")
    add("--tokenizer", metavar="NAME", help="if the prompts were written with a chat template: the model it is of (default: none)")
    add("--limit", type=shared.positive_int, metavar="N", help="judge the first N responses (default: all)")
    add = parser.add_argument_group("judge").add_argument
    add("--judge", metavar="NAME", help="chat model that is asked which response is better (default: none, give --reward-model)")
    words = "what it is asked, a text with {prompt}, {first} and {second}; it must ask for A, B or C (default: built in)"
    add("--judge-instructions", metavar="FILE", help=words)
    words = "of a million tokens of questions and of answers, for the cost (default: none, no cost)"
    add("--prices", type=shared.listed(float), metavar="IN,OUT", help=words)
    add("--estimate", action="store_true", help="print how many requests and tokens are needed and what they cost, and send nothing")
    words = "of an answer, for --estimate; a judge that thinks takes hundreds (default: 4)"
    add("--answer-tokens", type=shared.positive_int, default=4, metavar="N", help=words)
    add("--device", metavar="DEVICE", help=shared.REWARD_DEVICE)
    parser.add_argument("--out", metavar="FILE", help="write win rate and pairs as JSON (default: only print)")
    shared.add_reward_options(parser, default="none")


def run(options: argparse.Namespace) -> None:
    """Judge, or estimate."""
    from recontrol.evaluation.judges import CHARACTERS_PER_TOKEN
    from recontrol.evaluation.win_rate import win_rate
    from recontrol.files import write_json
    from recontrol.version import __version__

    if (options.judge is None) == (options.reward_model is None):
        raise ValueError("give either --judge NAME, a chat model, or --reward-model NAME, a reward held out from training")
    if options.estimate and options.judge is None:
        raise ValueError("--estimate is for --judge: a reward model sends no requests")
    prompts, responses, others = (column[: options.limit] for column in _pairs(options))
    judge = _judge(options)
    if options.estimate:
        counted = judge.estimate(prompts, responses, others, answer_tokens=options.answer_tokens)
        cost = "" if counted.cost is None else f", about {counted.cost:.4g} in the currency of the prices"
        questions = f"about {counted.input_tokens} tokens of questions (characters / {CHARACTERS_PER_TOKEN})"
        answers = f"{counted.output_tokens} of answers ({options.answer_tokens} each)"
        print(f"{len(prompts)} pairs: {counted.requests} requests that the cache does not answer, {questions} and {answers}{cost}")
        return
    if options.out is not None:
        # A folder that cannot be written is better found before the work than after it.
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    result = win_rate(prompts, responses, others, judge)
    print(f"{len(prompts)} pairs: {result}")
    if options.out is None:
        return
    content = result.to_dict()
    columns = zip(prompts, responses, others, content.pop("verdicts"), strict=True)
    about = {name: value for name, value in vars(options).items() if name not in ("run", "after_interrupt", "debug", "verbose", "subcommand", "estimate")}
    pairs = [dict(zip(("prompt", "response", "other", "verdict"), row, strict=True)) for row in columns]
    made_with = {"recontrol": __version__}
    write_json(options.out, {"format": FORMAT, "version": FORMAT_VERSION, "made_with": made_with, "about": about, **content, "pairs": pairs})


def _pairs(options: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    from recontrol.data.prompts import load_prompts_with_preferred
    from recontrol.evaluation.response_files import Line, pair_up, read_responses

    if (options.preferred is None) == (options.others is None and options.against is None):
        raise ValueError("give what to compare with: either --preferred NAME, or --others FILE, --against LABEL or both")
    if options.others is None and options.against is not None and options.against == options.method:
        raise ValueError(f"--method and --against are both {options.method!r}: responses are compared with themselves")
    lines = read_responses(options.responses, options.method)
    if options.preferred is None:
        return pair_up(lines, read_responses(options.others or options.responses, options.against))
    template: dict[str, Any] = {}
    if options.tokenizer is not None:
        from transformers import AutoTokenizer

        template = {"tokenizer": AutoTokenizer.from_pretrained(options.tokenizer), "chat_template": True}
    preferred = load_prompts_with_preferred(options.preferred, options.split, human=options.human, **template)
    return pair_up(lines, [Line(prompt, reference) for prompt, reference in zip(*preferred, strict=True)])


def _judge(options: argparse.Namespace) -> Any:
    from recontrol.evaluation.judges import INSTRUCTIONS, PairwiseJudge, RewardJudge

    if options.judge is None:
        return RewardJudge(shared.load_reward(options))
    instructions = INSTRUCTIONS if options.judge_instructions is None else Path(options.judge_instructions).read_text(encoding="utf-8")
    return PairwiseJudge(options.judge, instructions=instructions, price_per_million=options.prices, **shared.judge_section(options).server)
