"""`recontrol judge`."""

import argparse
from pathlib import Path
from typing import Any

from recontrol.cli import options as shared

FORMAT = "recontrol.win_rate"
FORMAT_VERSION = 1
# What a file need not say of how it was made.
NOT_DESCRIBED = ("run", "parser", "given", "after_interrupt", "debug", "verbose", "subcommand", "estimate")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    shared.add_options(parser, "responses", "the judge", "judge", "reward", default="none")
    # The name of --preferred before.
    parser.add_argument("--references", dest="preferred", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    """Judge, or estimate."""
    from recontrol.evaluation.judges import CHARACTERS_PER_TOKEN
    from recontrol.evaluation.win_rate import win_rate
    from recontrol.files import check_output, write_json
    from recontrol.version import __version__

    if (options.judge is None) == (options.reward_model is None):
        raise ValueError("give either --judge NAME, a chat model, or --reward-model NAME, a reward held out from training")
    if options.out is not None and not options.estimate:
        check_output(options.out)
    prompts, responses, others = (column[: options.limit] for column in _pairs(options))
    judge = _judge(options)
    if options.estimate:
        counted = judge.estimate(prompts, responses, others, answer_tokens=options.answer_tokens)
        cost = "" if counted.cost is None else f", about {counted.cost:.4g} in the currency of the prices"
        questions = f"about {counted.input_tokens} tokens of questions (characters / {CHARACTERS_PER_TOKEN})"
        answers = f"{counted.output_tokens} of answers ({options.answer_tokens} each)"
        print(f"{len(prompts)} pairs: {counted.requests} requests that the cache does not answer, {questions} and {answers}{cost}")
        return
    result = win_rate(prompts, responses, others, judge)
    print(f"{len(prompts)} pairs: {result}")
    if options.out is None:
        return
    content = result.to_dict()
    columns = zip(prompts, responses, others, content.pop("verdicts"), strict=True)
    about = {name: value for name, value in vars(options).items() if name not in NOT_DESCRIBED}
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
