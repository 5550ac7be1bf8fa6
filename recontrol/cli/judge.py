"""`recontrol judge`."""

import argparse
from pathlib import Path
from typing import Any

from recontrol.cli import options as shared

HELP = "win rate of responses against others, by a language model or a reward model"
DESCRIPTION = """\
Compare responses with others to the same prompts: with the responses that the data set prefers, as in the paper, or with those
of another method. A chat model (--judge) sees each pair in both orders and must prefer a response in both for it to win; or a
reward model (--reward-model) decides, which must be another than the one of training. Prints (wins + ties / 2) / pairs with
its interval. --estimate says what asking would cost, and asks nothing."""
EPILOG = """\
examples:
  recontrol judge --responses report/hh/responses.jsonl --method re-control --preferred Anthropic/hh-rlhf --judge gpt-4o \\
      --judge-cache judge.sqlite --prices 2.5,10 --estimate
  recontrol judge --responses report/hh/responses.jsonl --method re-control --against uncontrolled --reward-model other/reward --out win-rate.json
  recontrol judge --responses mine.jsonl --others theirs.jsonl --judge qwen3 --judge-url http://localhost:8000/v1"""
AFTER_INTERRUPT = "answers so far are in the file of --judge-cache, if one was given: repeat the command to go on from there"
FORMAT = "recontrol.win_rate"
FORMAT_VERSION = 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    group = parser.add_argument_group("responses")
    group.add_argument(
        "--responses", required=True, metavar="FILE", help="the responses to judge: lines with prompt and response, such as an evaluation's responses.jsonl"
    )
    group.add_argument("--method", metavar="LABEL", help="judge the lines with this `method` (default: all lines, if they are of one)")
    group.add_argument("--others", metavar="FILE", help="what they are compared with, such lines too (default: --responses, if --against is given)")
    group.add_argument("--against", metavar="LABEL", help="compare with the lines with this `method` (default: all lines of --others, if they are of one)")
    group.add_argument("--preferred", metavar="NAME", help="compare with the preferred responses of this data set or .jsonl file (default: none)")
    # Its name before.
    group.add_argument("--references", dest="preferred", help=argparse.SUPPRESS)
    group.add_argument("--split", default="test", metavar="SPLIT", help="of a data set of the hub; a file has none (default: test)")
    group.add_argument("--human", default="Human", metavar="WORD", help="what marks the user's turns in the prompts (default: Human)")
    group.add_argument("--tokenizer", metavar="NAME", help="if the prompts were written with a chat template: the model it is of (default: none)")
    group.add_argument("--limit", type=shared.positive_int, metavar="N", help="judge the first N responses (default: all)")
    group = parser.add_argument_group("judge")
    group.add_argument("--judge", metavar="NAME", help="chat model that is asked which response is better (default: none, give --reward-model)")
    group.add_argument(
        "--judge-instructions",
        metavar="FILE",
        help="what it is asked, a text with {prompt}, {first} and {second}; it must ask for A, B or C (default: built in)",
    )
    group.add_argument(
        "--prices", type=shared.listed(float), metavar="IN,OUT", help="of a million tokens of questions and of answers, for the cost (default: none, no cost)"
    )
    group.add_argument("--estimate", action="store_true", help="print how many requests and tokens are needed and what they cost, and send nothing")
    group.add_argument(
        "--answer-tokens",
        type=shared.positive_int,
        default=4,
        metavar="N",
        help="of an answer, for --estimate; a judge that thinks takes hundreds (default: 4)",
    )
    group.add_argument("--device", metavar="DEVICE", help="of the reward model: cpu, cuda, cuda:1, mps, or auto (default: cuda if there is one, else cpu)")
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
        estimate = judge.estimate(prompts, responses, others, answer_tokens=options.answer_tokens)
        print(
            f"{len(prompts)} pairs: {estimate.requests} requests that the cache does not answer, about {estimate.input_tokens} tokens of questions "
            f"(characters / {CHARACTERS_PER_TOKEN}) and {estimate.output_tokens} of answers ({options.answer_tokens} each)"
            + ("" if estimate.cost is None else f", about {estimate.cost:.4g} in the currency of the prices")
        )
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
    from recontrol.data.prompts import load_prompts_with_references
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
    preferred = load_prompts_with_references(options.preferred, options.split, human=options.human, **template)
    return pair_up(lines, [Line(prompt, reference) for prompt, reference in zip(*preferred, strict=True)])


def _judge(options: argparse.Namespace) -> Any:
    from recontrol.evaluation.judges import INSTRUCTIONS, PairwiseJudge, RewardJudge

    if options.judge is None:
        return RewardJudge(shared.load_reward(options))
    instructions = INSTRUCTIONS if options.judge_instructions is None else Path(options.judge_instructions).read_text(encoding="utf-8")
    return PairwiseJudge(options.judge, instructions=instructions, price_per_million=options.prices, **shared.judge_section(options).server)
