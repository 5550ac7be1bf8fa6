"""Running a study: rollouts, value function, the methods, the choice among their settings, the comparison, win rates."""

import importlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from recontrol.data.collect import collect
from recontrol.data.prompts import load_prompts, load_prompts_with_references
from recontrol.data.rollouts import Rollouts
from recontrol.decoding.loading import load_value_function
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
from recontrol.reports.comparison import Findings
from recontrol.studies.catalogue import read_entries
from recontrol.studies.study import SourceSection, Study
from recontrol.training.train import train
from recontrol.value import ValueFunction

logger = logging.getLogger(__name__)


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
        ImportError: a package of an extra is missing.
    """
    return StudyRun(study, out, progress=progress).findings()


class StudyRun:
    """The steps of a study: each is done when its result is first asked for, and read where it was done before in the same folder.

    Args:
        study: what to do.
        out: folder for what is made.
        progress: show progress bars.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `run_study`.
    """

    def __init__(self, study: Study, out: str | os.PathLike, *, progress: bool = True):
        self.study, self.folder, self.progress = study, Path(out), progress
        self.entries = read_entries(study.methods)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.reward = study.reward.load()
        self.judge = None if study.wins is None else self._judge()
        self.encoder = None if study.encoder is None else _encoder(study.encoder)
        self.model, self.tokenizer = study.model.load()
        self.prompts, self.train_prompts, self.validation_prompts = map(self._read, (study.prompts.test, study.prompts.train, study.prompts.validation))
        for name, others in (("train", self.train_prompts), ("validation", self.validation_prompts)):
            if others and set(others) == set(self.prompts):
                raise ValueError(f"prompts.{name} are the prompts that are reported on; use others")

    @cached_property
    def rollouts(self) -> Rollouts:
        """Of the uncontrolled model on the prompts for training; ValueError where a value function was given, for which none are collected."""
        study = self.study
        if study.value is not None:
            raise ValueError("rollouts are needed, and a study with a value function of its own collects none")
        options = {"seed": study.seed, "progress": self.progress, **self._decoding(), **study.collect}
        return timed(self.folder, "collect", lambda: collect(self.model, self.tokenizer, self.train_prompts, self.reward, self.folder / "rollouts", **options))[
            0
        ]

    @cached_property
    def value(self) -> ValueFunction:
        """The value function that was given, or one trained on the rollouts."""
        return load_value_function(self.study.value, self.model) if self.study.value is not None else self._trained[0]

    @property
    def trained(self) -> Training | None:
        """What the training of the value function took; None for one that was given."""
        return None if self.study.value is not None else self._trained[1]

    @cached_property
    def _trained(self) -> tuple[ValueFunction, Training]:
        """The collection of the rollouts, which other methods need as well, is not part of what training took."""
        device, rollouts = self.model.get_output_embeddings().weight.device, self.rollouts
        folder = self.folder / "value"
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
        groups, chosen = {}, []
        place = 1
        for name, several in self.methods.items():
            groups[name] = list(range(place, place + len(several)))
            chosen.append(_best(self.study.choose, results[place : place + len(several)]).method)
            place += len(several)
        return results, groups, chosen

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
        results = self.test(methods)
        wins, against = self._wins(results)
        return Findings(results, names, self.prompts, validation, groups, chosen, wins, against)

    def _evaluate(self, part: str, place: int, prompts: list[str], methods: Sequence[Method], seeds: int = 1) -> list[Result]:
        study = self.study
        # Whether or not a method has asked for it, a value function that is there is recorded along responses.
        value = self.value if study.value is not None else self.__dict__.get("value")
        return evaluate(
            self.model,
            self.tokenizer,
            prompts,
            value=value,
            methods=methods,
            reward=self.reward,
            encoder=self.encoder,
            head_weights=study.reward.head_weights,
            seed=study.seed + place * study.seeds_apart,
            seeds=seeds,
            out=self.folder / part,
            progress=self.progress,
            **self._decoding(),
        )

    def _decoding(self) -> dict[str, Any]:
        decoding = self.study.generation
        sizes = {} if decoding.batch_size is None else {"batch_size": decoding.batch_size}
        return {"max_new_tokens": decoding.max_new_tokens, "stop_strings": list(decoding.stop_strings), **sizes, **decoding.options}

    def _read(self, source: SourceSection | None, *, preferred: bool = False) -> list[str]:
        """The prompts of a source, or the preferred responses to them: each distinct prompt once, since data sets of comparisons repeat them."""
        if source is None:
            return []
        chosen = self.study.prompts
        keywords: dict[str, Any] = {"human": chosen.human, "chat_template": chosen.chat_template, "max_prompt_tokens": chosen.max_tokens}
        if preferred:
            prompts, wanted = load_prompts_with_references(source.source, source.split, tokenizer=self.tokenizer, **keywords)
        else:
            wanted = prompts = load_prompts(source.source, source.split, tokenizer=self.tokenizer, **keywords)
        first = {prompt: number for number, prompt in reversed(list(enumerate(prompts)))}
        return [wanted[number] for number in sorted(first.values())][: source.limit]

    def _judge(self) -> Callable[..., Any]:
        assert self.study.wins is not None
        section = self.study.wins
        kind, _, rest = section.judge.partition(":")
        return PairwiseJudge(rest, base_url=section.url, cache=section.cache) if kind == "judge" else RewardJudge(self.study.reward.load([section.judge]))

    def _wins(self, results: Sequence[Result]) -> tuple[list[WinRate | None], str | None]:
        if self.study.wins is None or self.judge is None:
            return [None] * len(results), None
        others = results[0].responses
        if self.study.wins.against == "preferred":
            others = self._read(self.study.prompts.test, preferred=True) * self.study.seeds
        asked = self.prompts * self.study.seeds
        judged = [None if others is result.responses else win_rate(asked, result.responses, others, self.judge) for result in results]
        return judged, self.study.wins.against


def timed(folder: Path, name: str, work: Callable[[], Any]) -> tuple[Any, float]:
    """(result of a step of a study, seconds that it took when it was done): earlier tries that were stopped count, reading what is finished does not."""
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


def _encoder(name: str) -> Any:
    """A sentence encoder; "package:NAME" is one that an installed package carries in it, and names by its `get_model_path`."""
    kind, _, rest = name.partition(":")
    return load_encoder(importlib.import_module(rest).get_model_path() if kind == "package" else name)


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
