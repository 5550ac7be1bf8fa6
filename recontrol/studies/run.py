"""Running a study: rollouts, value function, the methods, the choice among their settings, the comparison, win rates."""

import dataclasses
import importlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from recontrol.data.collect import collect
from recontrol.data.prompts import load_prompts, load_prompts_with_preferred
from recontrol.data.rollouts import Rollouts
from recontrol.decoding.loading import load_value_function
from recontrol.evaluation.evaluate import evaluate
from recontrol.evaluation.frontier import choose_at_kl
from recontrol.evaluation.metrics import load_encoder
from recontrol.evaluation.results import Result, choose
from recontrol.evaluation.win_rate import win_rate
from recontrol.files import check_output, read_json, write_json
from recontrol.methods import Method, Training
from recontrol.methods.control import training_of
from recontrol.methods.peak_memory import PeakMemory
from recontrol.reports.comparison import Findings
from recontrol.studies.catalogue import read_entries
from recontrol.studies.study import SourceSection, Study
from recontrol.training.train import train
from recontrol.value import ValueFunction

logger = logging.getLogger(__name__)


class StudyRun:
    """The steps of a study, each done when its result is first asked for, or read where it was done before; what cannot be is an error before any work."""

    def __init__(self, study: Study, out: str | os.PathLike, *, progress: bool = True):
        self.study, self.folder, self.progress = study, Path(out), progress
        self.entries = read_entries(study.methods)
        unused = [f"{name}, since it has a value" for name in ("collect", "train") if study.value is not None and getattr(study, name)]
        unused += ["choose, since it has no validation prompts"] if study.choose != "paper" and study.prompts.validation is None else []
        for each in unused:
            logger.warning("the study does not use its %s", each)
        check_output(self.folder, folder=True)
        self.reward = study.reward.load()
        self.judge: Any = study.wins and study.wins.load(study.reward)
        # "package:NAME" is an encoder that an installed package carries in it, and names by its `get_model_path`.
        kind, _, package = (study.encoder or "").partition(":")
        self.encoder = study.encoder and load_encoder(importlib.import_module(package).get_model_path() if kind == "package" else study.encoder)
        self.model, self.tokenizer = study.model.load()
        self.prompts, self.train_prompts, self.validation_prompts = map(self._read, (study.prompts.test, study.prompts.train, study.prompts.validation))
        for name, others in (("train", self.train_prompts), ("validation", self.validation_prompts)):
            if others and set(others) == set(self.prompts):
                raise ValueError(f"prompts.{name} are the prompts that are reported on; use others")

    @cached_property
    def rollouts(self) -> Rollouts:
        """Of the uncontrolled model on the prompts for training; ValueError where a value function was given, for which none are collected."""
        if self.study.value is not None:
            raise ValueError("rollouts are needed, and a study with a value function of its own collects none")
        decoding, collection = self.study.collected()
        what = (self.model, self.tokenizer, self.train_prompts, self.reward, self.folder / "rollouts")
        return timed(self.folder, "collect", lambda: collect(*what, decoding=decoding, collection=collection, progress=self.progress))[0]

    @property
    def value(self) -> ValueFunction:
        """The value function that was given, or one trained on the rollouts."""
        return self._trained[0]

    @property
    def trained(self) -> Training | None:
        """What the training of the value function took, without the rollouts, which other methods need as well; None for one that was given."""
        return self._trained[1]

    @cached_property
    def _trained(self) -> tuple[ValueFunction, Training | None]:
        if self.study.value is not None:
            return load_value_function(self.study.value, self.model), None
        device, rollouts, folder = self.model.get_output_embeddings().weight.device, self.rollouts, self.folder / "value"
        options = {"seed": self.study.seed, "device": device, "progress": self.progress, **self.study.train}
        with PeakMemory(device) as peak:
            (value, _), seconds = timed(self.folder, "train", lambda: train(rollouts, out=folder, **options))
        if not (folder / "training.json").exists():
            write_json(folder / "training.json", {"peak_bytes": peak.bytes})
        return value, training_of(value)._replace(seconds=seconds, peak_bytes=read_json(folder / "training.json")["peak_bytes"])

    @cached_property
    def methods(self) -> dict[str, list[Method]]:
        """By the name of a row, one method for each of its settings."""
        return {entry.name: entry.methods(self) for entry in self.entries}

    @cached_property
    def choice(self) -> tuple[list[Result], dict[str, list[int]], list[str]]:
        """(results on validation prompts, which of them are the settings of each row, labels of the chosen ones); empty where nothing is chosen."""
        methods = [method for several in self.methods.values() for method in several]
        if not self.validation_prompts or not methods:
            return [], {}, []
        results = self._evaluate("validation", 1, self.validation_prompts, methods)
        places = itertools.count(1)
        groups = {name: [next(places) for _ in several] for name, several in self.methods.items()}
        return results, groups, [_best(self.study.choose, [results[place] for place in group]).method for group in groups.values()]

    def test(self, methods: Sequence[Method]) -> list[Result]:
        """The uncontrolled model and these methods on the test prompts."""
        return self._evaluate("test", 2, self.prompts, methods, seeds=self.study.seeds)

    def findings(self) -> Findings:
        """All of it."""
        validation, groups, chosen = self.choice
        names, methods = ["uncontrolled"], []
        for name, several in self.methods.items():
            kept = [method for method in several if not chosen or self.study.report == "all" or method.label in chosen]
            names += [name] if len(kept) == 1 and self.study.report == "chosen" else [method.label for method in kept]
            methods += kept
        results, seeds, section = self.test(methods), self.study.seeds, self.study.wins
        found = Findings(results, names, self.prompts, validation, groups, chosen)
        if section is None:
            return found
        others = results[0].responses if section.against == "uncontrolled" else self._read(self.study.prompts.test, preferred=True) * seeds
        judged = [None if others is each.responses else win_rate(self.prompts * seeds, each.responses, others, self.judge) for each in results]
        return dataclasses.replace(found, wins=judged, against=section.against)

    def _evaluate(self, name: str, part: int, prompts: list[str], methods: Sequence[Method], seeds: int = 1) -> list[Result]:
        # Whether or not a method has asked for it, a value function that is there is recorded along responses.
        value = self.value if self.study.value is not None or "_trained" in vars(self) else None
        measured: dict[str, Any] = {"reward": self.reward, "encoder": self.encoder, "head_weights": self.study.reward.head_weights, "value": value}
        options: dict[str, Any] = {"out": self.folder / name, "progress": self.progress, "decoding": self.study.decoding(part), "seeds": seeds}
        return evaluate(self.model, self.tokenizer, prompts, methods=methods, **measured, **options)

    def _read(self, source: SourceSection | None, *, preferred: bool = False) -> list[str]:
        """The prompts of a source, or the preferred responses to them: each distinct prompt once, since data sets of comparisons repeat them."""
        if source is None:
            return []
        chosen = self.study.prompts
        written: dict[str, Any] = {"human": chosen.human, "chat_template": chosen.chat_template, "max_prompt_tokens": chosen.max_tokens}
        load = load_prompts_with_preferred if preferred else load_prompts
        found: Any = load(source.source, source.split, tokenizer=self.tokenizer, **written)
        prompts, wanted = found if preferred else (found, found)
        first = dict(zip(reversed(prompts), reversed(wanted), strict=True))
        return [first[prompt] for prompt in dict.fromkeys(prompts)][: source.limit]


def timed(folder: Path, name: str, work: Callable[[], Any]) -> tuple[Any, float]:
    """(result of a step of a study, seconds that it took when it was done): earlier tries that were stopped count, reading what is finished does not."""
    path = folder / "seconds.json"
    known = read_json(path) if path.exists() else {}
    done = known.setdefault(name, {"seconds": 0.0, "finished": False})
    began, finished = time.perf_counter(), done["finished"]
    try:
        result = work()
        finished = True
    finally:
        if not done["finished"]:
            done.update(seconds=done["seconds"] + time.perf_counter() - began, finished=finished)
            write_json(path, known)
    return result, done["seconds"]


def _best(rule: str | dict[str, float], results: Sequence[Result]) -> Result:
    """By the rule of the study; of a row whose KL is not known, by the paper's."""
    if rule == "reward":
        return max(results, key=lambda result: result.reward)
    if not isinstance(rule, dict) or any(result.kl is None for result in results):
        return choose(results)
    within = [result for result in results if result.kl is not None and result.kl <= rule["kl"]]
    if not within:
        closest = min(results, key=lambda result: result.kl or 0)
        logger.warning("no setting of %s stays within %g nats; the closest is taken, %s", closest.kind, rule["kl"], closest.method)
        return closest
    return choose_at_kl(within, rule["kl"])
