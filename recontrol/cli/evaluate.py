"""`recontrol evaluate`."""

import argparse
import itertools
from pathlib import Path

from recontrol.cli import options as shared

HELP = "compare step sizes, numbers of steps and other methods with the uncontrolled model"
DESCRIPTION = """\
Decode prompts without control and under each setting, and measure reward, diversity, coherence, likelihood, speed and the
cost of control. With --validation-prompts or --validation-split, the setting with the largest coherence + diversity +
average reward there is marked, as in the paper. Prints a table, and writes report.json, report.png and responses.jsonl. The same
command goes on with what was stopped.

With --config, a whole study: rollouts and a value function are made where the file asks for them, settings are chosen on
validation prompts for each of its methods (RE-Control, prompting, static editing, ARGS, prefix scorer, best-of-n, LoRA DPO,
RLOO and GRPO), and report.html, report.json, report.csv and responses.jsonl are written. These are in the package:
hh-rlhf-vicuna-7b, hh-rlhf-falcon-7b, shp-vicuna-7b, shp-llama3-8b."""
EPILOG = """\
examples:
  recontrol evaluate --config hh-rlhf-vicuna-7b --dry-run --out out/dry-run
  recontrol evaluate --config hh-rlhf-vicuna-7b --out out/hh-rlhf-vicuna-7b
  recontrol evaluate --model lmsys/vicuna-7b-v1.5 --value value/hh --dataset Anthropic/hh-rlhf --split test --limit 300 \\
      --validation-split "train[-100:]" --step-sizes 0.25,0.5,1 --steps 30,50 --reward-model argsearch/llama-7b-rm-float32 \\
      --encoder princeton-nlp/sup-simcse-bert-base-uncased --dtype bfloat16 --out report/hh"""
AFTER_INTERRUPT = "no report was written; repeat the command to go on"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the report is written")
    parser.add_argument("--config", metavar="FILE", help="a study: a YAML file, or the name of one of the package (default: the options below say what to do)")
    parser.add_argument("--dry-run", action="store_true", help="with --config: try all of it on small random models and data that are made here, in a minute")
    parser.add_argument(
        "--step-sizes", type=shared.listed(shared.positive_float), default=(0.25, 0.5, 1.0), metavar="A,...", help="step sizes (default: 0.25,0.5,1)"
    )
    parser.add_argument("--steps", type=shared.listed(shared.positive_int), default=(30,), metavar="N,...", help="gradient steps a token (default: 30)")
    parser.add_argument(
        "--seeds", type=shared.positive_int, default=1, metavar="N", help="how many times the prompts are decoded, each with seeds of its own (default: 1)"
    )
    parser.add_argument(
        "--encoder",
        metavar="NAME",
        help="sentence encoder for the coherence, loaded by sentence-transformers, of the extra `coherence` (default: none, no coherence)",
    )
    shared.add_model_options(parser, default="that of --config")
    shared.add_value_options(parser, default="that of --config")
    shared.add_prompt_options(parser, default="that of --config", split="test")
    group = parser.add_argument_group("choice")
    group.add_argument("--validation-prompts", metavar="NAME", help="data set to choose the setting on (default: --dataset, if a split is given)")
    group.add_argument("--validation-split", metavar="SPLIT", help="its split; a file has none (default: validation)")
    group.add_argument("--validation-limit", type=shared.positive_int, metavar="N", help="use the first N validation prompts (default: all)")
    shared.add_reward_options(parser, default="that of --config")
    shared.add_generation_options(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluate, and write the report."""
    needed = {"--model": options.model, "--value": options.value, "--dataset": options.dataset, "--reward-model": options.reward_model}
    if options.config is not None:
        given = [name for name, option in needed.items() if option is not None]
        if given:
            raise ValueError(f"--config says what to do; found {', '.join(given)} beside it")
        _run_config(options)
        return
    missing = [name for name, option in needed.items() if option is None]
    if missing or options.dry_run:
        raise ValueError("--dry-run goes with --config" if options.dry_run else f"{', '.join(missing)} must be given, or --config")
    from recontrol.evaluation.evaluate import evaluate
    from recontrol.evaluation.metrics import load_encoder
    from recontrol.evaluation.results import choose
    from recontrol.reports.report import save_report, table

    stops = shared.stop_strings(options)
    # A folder that cannot be written is better found before the work than after it.
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = shared.load_model(options)
    prompts = shared.load_prompts(options, tokenizer, options.dataset, options.split, options.limit)
    validation_prompts = None
    if options.validation_prompts or options.validation_split:
        source, split = options.validation_prompts or options.dataset, options.validation_split or "validation"
        validation_prompts = shared.load_prompts(options, tokenizer, source, split, options.validation_limit)
        if validation_prompts == prompts:
            raise ValueError(f"the validation prompts are the prompts that are reported on ({source}): choose on others")
    keywords = {
        "value": shared.load_value(options, model),
        "settings": list(itertools.product(options.step_sizes, options.steps)),
        "reward": shared.load_reward(options),
        "encoder": None if options.encoder is None else load_encoder(options.encoder),
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "stop_strings": stops,
        "head_weights": options.head_weights,
        "controller_options": shared.controller_options(options),
        **shared.generation_options(options),
    }
    validation, chosen = None, None
    if validation_prompts is not None:
        validation = evaluate(model, tokenizer, validation_prompts, out=out / "validation", **keywords)
        chosen = choose(validation).setting
        print(f"validation prompts ({len(validation_prompts)}):\n{table(validation, chosen)}\n")
    results = evaluate(model, tokenizer, prompts, out=out / "test", seeds=options.seeds, **keywords)
    print(f"prompts ({len(prompts)}):\n{table(results, chosen)}")
    about = {name: value for name, value in vars(options).items() if name not in ("run", "after_interrupt", "debug", "verbose", "subcommand")}
    save_report(options.out, results, prompts, chosen=chosen, validation=validation, about=about)
    print(f"\nreport.json, report.png and responses.jsonl are in {options.out}")


def _run_config(options: argparse.Namespace) -> None:
    """Run a study, and write its report."""
    from recontrol.reports.report_files import save_findings
    from recontrol.studies.dry_run import small
    from recontrol.studies.run import run_study
    from recontrol.studies.study import load_study

    study = load_study(options.config)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.dry_run:
        study = small(study, out / "made-up")
    findings = run_study(study, out)
    save_findings(out, findings, study, command=f"recontrol evaluate --config {options.config} --out {options.out}")
    print(f"report.html, report.json, report.csv and responses.jsonl are in {out}")
