"""What a study is made of: the sections of its YAML file, checked before any work is done."""

import dataclasses
import importlib.resources
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

# The studies that come with the package.
SETTINGS = importlib.resources.files("recontrol.studies") / "settings"


@dataclass(frozen=True)
class ModelSection:
    """The language model.

    Attributes:
        name: on the hub, or a folder.
        dtype: of its weights, "auto" for the one they were saved in.
        device: "cuda", "cpu", or "auto" to spread it over all GPUs; None is a GPU if there is one.
        revision: branch, tag or commit on the hub.
    """

    name: str
    dtype: str = "auto"
    device: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class SourceSection:
    """Where prompts come from.

    Attributes:
        source: data set of the hub, or a file.
        split: of a data set of the hub.
        limit: the first so many.
    """

    source: str
    split: str = "train"
    limit: int | None = None


@dataclass(frozen=True)
class PromptsSection:
    """The prompts of each part of the study, and how they are written.

    Attributes:
        train: for rollouts, and whatever else is trained.
        validation: that settings are chosen on; None chooses nothing, and all settings are reported.
        test: that is reported on.
        human: what marks the user's turns.
        chat_template: write dialogues with the tokenizer's chat template.
        max_tokens: longer prompts are left out.
    """

    train: SourceSection | None
    test: SourceSection
    validation: SourceSection | None = None
    human: str = "Human"
    chat_template: bool = False
    max_tokens: int = 512


@dataclass(frozen=True)
class RewardSection:
    """What responses are scored by.

    Attributes:
        names: as `--reward-model` of the command line takes them: classifiers, "judge:NAME", "python:MODULE:FUNCTION".
        head_weights: one number for each where there are several: their weighted sum is the reward that is reported.
        batch_size: texts scored at once.
        template: how a classifier's texts are written.
        device: of classifiers; None is a GPU if there is one.
    """

    names: list[str]
    head_weights: list[float] | None = None
    batch_size: int = 16
    template: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class WinSection:
    """Who is asked which of two responses is better.

    Attributes:
        judge: a name as in `RewardSection`: "judge:NAME" is asked for both orders of each pair, others score one response at a time.
        against: "uncontrolled", or "references" for the data set's preferred responses.
        cache: file that keeps the judge's answers.
        url: of the judge's server.
    """

    judge: str
    against: str = "uncontrolled"
    cache: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class GenerationSection:
    """How responses are decoded, the same for all methods.

    Attributes:
        max_new_tokens: length at most.
        batch_size: prompts at once.
        stop: strings at which a response is cut; None cuts the data sets of dialogues before a further turn of the user, others nowhere.
        options: of `model.generate`, do_sample for example.
    """

    max_new_tokens: int = 128
    batch_size: int = 16
    stop: list[str] | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"do_sample": False})


@dataclass(frozen=True)
class Study:
    """A whole study.

    Attributes:
        model: the language model.
        prompts: the data.
        reward: the reward.
        methods: one entry for each row of the report, see `recontrol.studies.catalogue`.
        generation: of evaluation.
        collect: arguments of `recontrol.collect`; sampling is that of `generation` where it is not given here.
        train: arguments of `recontrol.train`.
        value: a folder, a name on the hub or a .pth file: a value function that is there already; nothing is collected or trained for it.
        encoder: sentence encoder for the coherence.
        wins: the win rate; None for none.
        choose: "paper" is the largest coherence + diversity + reward, "reward" the largest reward, {"kl": 5.0} the largest reward within so many nats.
        seeds: how many times the test prompts are decoded.
        seed: of everything that is drawn.
    """

    model: ModelSection
    prompts: PromptsSection
    reward: RewardSection
    methods: list[dict[str, Any]]
    generation: GenerationSection = field(default_factory=GenerationSection)
    collect: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    value: str | None = None
    encoder: str | None = None
    wins: WinSection | None = None
    choose: str | dict[str, float] = "paper"
    seeds: int = 1
    seed: int = 0


def load_study(source: str | os.PathLike) -> Study:
    """Read a study.

    Args:
        source: a YAML file, or the name of a study that comes with the package (`study_names`).

    Raises:
        FileNotFoundError: there is neither such a file nor such a study.
        ValueError: no YAML, a section that is missing, unknown or of the wrong type; it is named.
    """
    path = Path(source)
    if path.is_file():
        text, where = path.read_text(encoding="utf-8"), str(path)
    elif str(source) in study_names():
        text, where = (SETTINGS / f"{source}.yaml").read_text(encoding="utf-8"), str(source)
    else:
        raise FileNotFoundError(f"no study at {str(source)!r}: there is no such file; the package has {', '.join(study_names())}")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML: {error}") from error
    return make_study(content, where)


def study_names() -> list[str]:
    """The studies that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in SETTINGS.iterdir() if entry.name.endswith(".yaml"))


def make_study(content: Any, where: str = "study") -> Study:
    """Check what was read.

    Args:
        content: mappings, lists and scalars, as a YAML file has them.
        where: what errors begin with.

    Raises:
        ValueError: a section that is missing, unknown or of the wrong type; it is named.
    """
    study = _section(Study, content, where)
    if study.seeds < 1:
        raise ValueError(f"{where}: seeds must be at least 1, found {study.seeds}")
    rule = study.choose
    if rule not in ("paper", "reward") and not (isinstance(rule, dict) and set(rule) == {"kl"} and isinstance(rule["kl"], int | float) and rule["kl"] > 0):
        raise ValueError(f"{where}: choose must be 'paper', 'reward' or {{'kl': nats}}, found {rule!r}")
    if study.wins is not None and study.wins.against not in ("uncontrolled", "references"):
        raise ValueError(f"{where}: wins.against must be 'uncontrolled' or 'references', found {study.wins.against!r}")
    if study.value is None and study.prompts.train is None:
        raise ValueError(f"{where}: without a value there must be prompts.train to make one from")
    if not study.reward.names:
        raise ValueError(f"{where}: reward.names must have at least one name")
    return study


def _section(kind: Any, content: Any, where: str) -> Any:
    """A dataclass from a mapping, with the sections in it."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping of names to settings, found {type(content).__name__}")
    hints = typing.get_type_hints(kind)
    fields = {each.name: each for each in dataclasses.fields(kind)}
    unknown = sorted(str(name) for name in content if name not in fields)
    if unknown:
        raise ValueError(f"{where}: found {', '.join(unknown)}, wanted some of {', '.join(fields)}")
    missing = [
        name
        for name, each in fields.items()
        if name not in content and each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING and type(None) not in _kinds(hints[name])
    ]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} must be given")
    given = {name: _entry(hints[name], entry, f"{where}: {name}") for name, entry in content.items()}
    return kind(**{name: None for name in fields if name not in given and fields[name].default is dataclasses.MISSING and _optional(hints[name])}, **given)


def _entry(hint: Any, entry: Any, where: str) -> Any:
    kinds = _kinds(hint)
    if entry is None and type(None) in kinds:
        return None
    section = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    if section is not None:
        return _section(section, entry, where)
    wanted = [typing.get_origin(kind) or kind for kind in kinds if kind is not type(None)]
    # YAML reads 1 as an integer, and true as no number.
    fits = any((isinstance(entry, kind) and not (isinstance(entry, bool) and kind is not bool)) or (kind is float and type(entry) is int) for kind in wanted)
    if not fits:
        raise ValueError(f"{where} must be {' or '.join(kind.__name__ for kind in wanted)}, found {entry!r}")
    inner = typing.get_args(kinds[0]) if wanted[0] is list else ()
    if inner and inner[0] in (str, float):
        for number, each in enumerate(entry):
            _entry(inner[0], each, f"{where}[{number}]")
    return float(entry) if float in wanted and type(entry) is int else entry


def _kinds(hint: Any) -> list[Any]:
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def _optional(hint: Any) -> bool:
    return type(None) in _kinds(hint)
