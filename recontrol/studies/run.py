"""Running a study: rollouts, value function, the methods, the choice among their settings, the comparison, win rates."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from recontrol.data.collect import collect
from recontrol.data.prompts import load_prompts, load_prompts_with_references, turn_marks
from recontrol.data.rewards import Reward
from recontrol.data.rewards.loading import load_reward
from recontrol.data.rollouts import Rollouts
from recontrol.decoding.loading import load_language_model, load_value_function
from recontrol.evaluation.evaluate import evaluate
from recontrol.evaluation.frontier import choose_at_kl
from recontrol.evaluation.judges import PairwiseJudge, RewardJudge
from recontrol.evaluation.metrics import load_encoder
from recontrol.evaluation.results import Result, choose
from recontrol.evaluation.win_rate import WinRate, win_rate
from recontrol.files import read_json, write_json
from recontrol.methods import Method, Training
from recontrol.methods.control import training_of
from recontrol.methods.peak_memory import PeakMemory
from recontrol.reports.findings import Findings
from recontrol.studies.catalogue import Materials, read_entries
from recontrol.studies.study import SourceSection, Study
from recontrol.training.train import train
from recontrol.value import ValueFunction

logger = logging.getLogger(__name__)

# Between the seeds of rollouts, of validation and of the test: no batch of one has the seed of a batch of another.
SEEDS_APART = 1_000_000


def run_study(study: Study, out: str | os.PathLike, *, progress: bool = True) -> Findings:
    """Do all that a study says; what was done before in the same folder is not done again.

    Args:
        study: what to do.
        out: folder for rollouts, value function, adapters and responses.
        progress: show progress bars.

    Returns:
        What was found.

    Raises:
        ValueError, FileNotFoundError: an entry, a source or a setting that cannot be, before any work is done, or a folder of another study.
        ImportError: a package of an extra is wanted and missing.
    """
    folder = Path(out)
    entries = read_entries(study.methods)
    folder.mkdir(parents=True, exist_ok=True)
    reward = _reward(study, study.reward.names)
    judge = None if study.wins is None else _judge(study)
    chosen_model = study.model
    model, tokenizer = load_language_model(chosen_model.name, dtype=chosen_model.dtype, device=_device(chosen_model.device), revision=chosen_model.revision)
    sources = (study.prompts.test, study.prompts.train, study.prompts.validation)
    prompts, train_prompts, validation_prompts = (_read(study, tokenizer, source) for source in sources)
    for name, others in (("train", train_prompts), ("validation", validation_prompts)):
        if others and set(others) == set(prompts):
            raise ValueError(f"prompts.{name} are the prompts that are reported on; use others")
    stops = _stops(study)
    generation = {"max_new_tokens": study.generation.max_new_tokens, "batch_size": study.generation.batch_size, "stop_strings": stops}
    rollouts, value, trained = None, None, None
    if study.value is not None:
        value = load_value_function(study.value, model)
    elif any(entry.needs_value or entry.needs_rollouts for entry in entries):
        options = {**generation, **study.generation.options, **study.collect}
        rollouts, _ = timed(
            folder,
            "collect",
            lambda: collect(model, tokenizer, train_prompts, reward, folder / "rollouts", **{"seed": study.seed, "progress": progress, **options}),
        )
        if any(entry.needs_value for entry in entries):
            value, trained = _train(study, rollouts, folder, model, progress)
    materials = Materials(model, tokenizer, reward, study.reward.head_weights, folder, train_prompts, generation, rollouts, value, trained, progress)
    made = {entry.name: entry.methods(materials) for entry in entries}
    keywords = {
        "value": value,
        "reward": reward,
        "head_weights": study.reward.head_weights,
        "encoder": None if study.encoder is None else _encoder(study.encoder),
        "progress": progress,
        **generation,
        **study.generation.options,
    }
    validation, groups, chosen = _choose(study, model, tokenizer, validation_prompts, made, folder, keywords)
    methods = [method for kept in chosen.values() for method in kept]
    names = ["uncontrolled", *(name if len(kept) == 1 else method.label for name, kept in chosen.items() for method in kept)]
    seed = study.seed + 2 * SEEDS_APART
    results = evaluate(model, tokenizer, prompts, methods=methods, seed=seed, seeds=study.seeds, out=folder / "test", **keywords)
    wins, against = _wins(study, judge, results, prompts, tokenizer)
    return Findings(results, names, prompts, validation, groups, wins, against)


def timed(folder: Path, name: str, work: Callable[[], Any]) -> tuple[Any, float]:
    """Do a step of a study and add its seconds to those of earlier tries that were stopped.

    Args:
        folder: of the study.
        name: of the step.
        work: what it does; quick where it was done before.

    Returns:
        Its result, and the seconds that the step took when it was done.
    """
    path = folder / "seconds.json"
    known = read_json(path) if path.exists() else {}
    done = known.get(name, {"seconds": 0.0, "finished": False})
    began, finished = time.perf_counter(), False
    try:
        result = work()
        finished = True
    finally:
        if not done["finished"]:
            known[name] = {"seconds": done["seconds"] + time.perf_counter() - began, "finished": finished}
            write_json(path, known)
    return result, known[name]["seconds"]


def _reward(study: Study, names: list[str]) -> Reward:
    section = study.reward
    return load_reward(names, batch_size=section.batch_size, template=section.template, device=_device(section.device))


def _device(given: str | None) -> str:
    return given or ("cuda" if torch.cuda.is_available() else "cpu")


def _read(study: Study, tokenizer: Any, source: SourceSection | None, *, references: bool = False) -> list[str]:
    """The prompts of a source, or the preferred responses to them: each distinct prompt once, since data sets of comparisons repeat them."""
    if source is None:
        return []
    chosen = study.prompts
    keywords: dict[str, Any] = {"human": chosen.human, "chat_template": chosen.chat_template, "max_prompt_tokens": chosen.max_tokens}
    if references:
        prompts, wanted = load_prompts_with_references(source.source, source.split, tokenizer=tokenizer, **keywords)
    else:
        wanted = prompts = load_prompts(source.source, source.split, tokenizer=tokenizer, **keywords)
    first = {prompt: number for number, prompt in reversed(list(enumerate(prompts)))}
    return [wanted[number] for number in sorted(first.values())][: source.limit]


def _stops(study: Study) -> list[str]:
    prompts = study.prompts
    return turn_marks(prompts.test.source, prompts.human, prompts.chat_template) if study.generation.stop is None else study.generation.stop


def _train(study: Study, rollouts: Rollouts, folder: Path, model: Any, progress: bool) -> tuple[ValueFunction, Training]:
    """The value function, and what its training took; the collection of the rollouts is not in it, which other methods need as well."""
    device = model.get_output_embeddings().weight.device
    record = folder / "value" / "training.json"
    with PeakMemory(device) as peak:
        options = {"seed": study.seed, "device": device, "progress": progress, **study.train}
        (value, _), seconds = timed(folder, "train", lambda: train(rollouts, out=folder / "value", **options))
    if not record.exists():
        write_json(record, {"peak_bytes": peak.bytes})
    return value, training_of(value)._replace(seconds=seconds, peak_bytes=read_json(record)["peak_bytes"])


def _encoder(name: str) -> Any:
    """A sentence encoder; "package:NAME" is one that an installed package carries in it, and names by its `get_model_path`."""
    kind, _, rest = name.partition(":")
    if kind != "package":
        return load_encoder(name)
    import importlib

    return load_encoder(importlib.import_module(rest).get_model_path())


def _judge(study: Study) -> Callable[..., Any]:
    assert study.wins is not None
    kind, _, rest = study.wins.judge.partition(":")
    if kind == "judge":
        return PairwiseJudge(rest, base_url=study.wins.url, cache=study.wins.cache)
    return RewardJudge(_reward(study, [study.wins.judge]))


def _choose(
    study: Study, model: Any, tokenizer: Any, prompts: Sequence[str], made: dict[str, list[Method]], folder: Path, keywords: dict[str, Any]
) -> tuple[list[Result], dict[str, list[int]], dict[str, list[Method]]]:
    """(results on validation prompts, which of them belong to which row, the methods of each row that are kept)."""
    methods = [method for several in made.values() for method in several]
    if not prompts or not methods:
        return [], {}, made
    results = evaluate(model, tokenizer, prompts, methods=methods, seed=study.seed + SEEDS_APART, out=folder / "validation", **keywords)
    groups, chosen = {}, {}
    place = 1
    for name, several in made.items():
        groups[name] = list(range(place, place + len(several)))
        by_label = {method.label: method for method in several}
        chosen[name] = [by_label[_best(study.choose, results[place : place + len(several)]).method]]
        place += len(several)
    return results, groups, chosen


def _best(rule: str | dict[str, float], results: Sequence[Result]) -> Result:
    """By the rule of the study; of a row whose KL is not known, by the paper's."""
    if rule == "reward":
        return max(results, key=lambda result: result.reward)
    if rule == "paper" or any(result.kl is None for result in results):
        return choose(results)
    assert isinstance(rule, dict)
    within = [result for result in results if result.kl is not None and result.kl <= rule["kl"]]
    if not within:
        closest = min(results, key=lambda result: result.kl or 0)
        logger.warning("no setting of %s stays within %g nats; the closest is taken, %s", closest.kind, rule["kl"], closest.method)
        return closest
    return choose_at_kl(within, rule["kl"])


def _wins(
    study: Study, judge: Callable[..., Any] | None, results: Sequence[Result], prompts: list[str], tokenizer: Any
) -> tuple[list[WinRate | None], str | None]:
    if judge is None or study.wins is None:
        return [None] * len(results), None
    others = results[0].responses
    if study.wins.against == "references":
        others = _read(study, tokenizer, study.prompts.test, references=True) * study.seeds
    asked = prompts * study.seeds
    judged = [None if others is result.responses else win_rate(asked, result.responses, others, judge) for result in results]
    return judged, study.wins.against
