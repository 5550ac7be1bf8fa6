"""`recontrol evaluate`."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from recontrol.checks import required
from recontrol.cli import options as shared

if TYPE_CHECKING:
    from recontrol.studies.study import Study


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    shared.add_options(parser, "evaluate", "language model", "control", "prompts", "choice", "reward", "generation", default="that of --config")
    parser.set_defaults(split="test")


def run(options: argparse.Namespace) -> None:
    """Run a study, print its tables, and write its report."""
    from recontrol.files import check_output
    from recontrol.reports.report_files import FILES, save_findings
    from recontrol.reports.table import rule_in_words, table
    from recontrol.studies.dry_run import small
    from recontrol.studies.run import StudyRun

    study, out = _study(options), Path(options.out)
    # A missing package or a folder that cannot be written is better found before the work than after it.
    for package in ("jinja2", "matplotlib"):
        required(package, "report")
    check_output(out, folder=True)
    for name in FILES:
        check_output(out / name)
    if options.dry_run:
        study = small(study, out / "made-up")
    study_run, rule = StudyRun(study, out), rule_in_words(study.choose)
    validation, _, chosen = study_run.choice
    if validation:
        print(f"validation prompts ({len(study_run.validation_prompts)}):\n{table(validation, chosen, rule)}\n")
    findings = study_run.findings()
    # Where only chosen settings are reported, a mark says nothing.
    print(f"prompts ({len(findings.prompts)}):\n{table(findings.results, chosen if study.report == 'all' else (), rule)}")
    save_findings(out, findings, study, command=f"recontrol evaluate --config {options.config} --out {options.out}" if options.config else None)
    print(f"\nreport.html, report.json, report.csv and responses.jsonl are in {out}")


def _study(options: argparse.Namespace) -> "Study":
    """The study of --config, or the one that the other options describe."""
    from recontrol.studies.catalogue import CONTROL
    from recontrol.studies.study import ModelSection, PromptsSection, SourceSection, Study, load_study

    needed = {"--model": options.model, "--value": options.value, "--dataset": options.dataset, "--reward-model": options.reward_model}
    given = [name for name, option in needed.items() if option is not None]
    if options.config is not None:
        beside = sorted(f"--{name.replace('_', '-')}" for name in options.given - {"config", "out", "dry_run", "verbose", "debug"})
        if beside:
            raise ValueError(f"--config says what to do; found {', '.join(beside)} beside it")
        return load_study(options.config)
    if options.dry_run:
        raise ValueError("--dry-run goes with --config")
    if len(given) < len(needed):
        raise ValueError(f"{', '.join(name for name in needed if name not in given)} must be given, or --config")
    validation = None
    if options.validation_prompts or options.validation_split:
        source, split = options.validation_prompts or options.dataset, options.validation_split or "validation"
        validation = SourceSection(source, split, options.validation_limit)
    test = SourceSection(options.dataset, options.split, options.limit)
    of_control = {name: getattr(options, field) for name, field in CONTROL.items() if getattr(options, field, None) is not None}
    control = {**of_control, "alpha": list(options.step_sizes), "n": list(options.steps), "backend": options.backend}
    control |= {"allow_other_model": True} if options.allow_other_model else {}
    return Study(
        model=ModelSection(options.model, options.dtype, options.device),
        prompts=PromptsSection(None, test, validation, options.human, options.chat_template, options.max_prompt_tokens),
        reward=shared.reward_section(options, options.head_weights and list(options.head_weights)),
        methods=[{"method": "re-control", "name": "RE-Control", **control}],
        generation=dataclasses.replace(shared.decoding(options), seed=0),
        value=options.value,
        encoder=options.encoder,
        report="all",
        seeds=options.seeds,
        seed=options.seed,
        seeds_apart=0,
    )
