"""From the entries of a study to methods: which there are, what settings they take, and which of these may be lists to choose from."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from recontrol.data.rewards import Reward, checked_rewards, reward_name
from recontrol.data.rollouts import Rollouts
from recontrol.decoding.control import Control
from recontrol.evaluation.measure import short_hash
from recontrol.methods import (
    ARGS,
    BestOfN,
    Direction,
    FineTuned,
    Method,
    PrefixScorer,
    Prompting,
    ReControl,
    StaticEditing,
    Together,
    Training,
    best_examples,
    make_preference_pairs,
    mean_difference,
    reward_direction,
    train_dpo,
    train_rl,
)
from recontrol.methods.base import one_score
from recontrol.studies.study import Study
from recontrol.value import ValueFunction


class Materials(Protocol):
    """What methods are made of; a run of a study is one. Rollouts and value function are made when they are first asked for."""

    study: Study
    model: Any
    tokenizer: Any
    reward: Reward
    folder: Path
    train_prompts: list[str]
    progress: bool

    @property
    def rollouts(self) -> Rollouts:
        """Of the uncontrolled model."""

    @property
    def value(self) -> ValueFunction:
        """The value function."""

    @property
    def trained(self) -> Training | None:
        """What its training took, where that is known."""


@dataclass(frozen=True)
class Entry:
    """One row of the report: the kinds of the methods that act together, and the settings among which one is chosen."""

    name: str
    kinds: tuple[str, ...]
    settings: tuple[dict[str, Any], ...]

    def methods(self, materials: Materials) -> list[Method]:
        """One method for each choice; what has to be trained for them is trained, or read where it was before."""
        made = []
        for chosen in self.settings:
            parts = [KINDS[kind].make(materials, {name: given for name, given in chosen.items() if KINDS[kind].takes(name)}) for kind in self.kinds]
            made.append(parts[0] if len(parts) == 1 else Together(parts))
        return made


@dataclass(frozen=True)
class Kind:
    """How an entry becomes a method: `strengths` are the settings that may be lists, and must be given but for `optional`; "*" in `options` takes any."""

    make: Callable[[Materials, dict[str, Any]], Method]
    strengths: tuple[str, ...]
    options: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def takes(self, name: str) -> bool:
        """Whether it has a setting of this name."""
        return name in self.strengths or name in self.options or "*" in self.options


def read_entries(entries: Sequence[Any], where: str = "methods") -> list[Entry]:
    """Check the entries of a study, before any work is done; ValueError names an unknown method or setting, one that is missing, or two rows of one name."""
    found: list[Entry] = []
    for number, entry in enumerate(entries):
        place = f"{where}[{number}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
            raise ValueError(f"{place} must be a mapping with a method, found {entry!r:.80}")
        kinds = tuple(part.strip() for part in entry["method"].split("+"))
        settings = {name: given for name, given in entry.items() if name not in ("method", "name")}
        lists = _lists(entry["method"], kinds, settings, place)
        name = str(entry.get("name", entry["method"]))
        if any(other.name == name for other in found):
            raise ValueError(f"{place}: two rows are called {name!r}; give one of them a name")
        choices = tuple({**settings, **dict(zip(lists, chosen, strict=True))} for chosen in itertools.product(*lists.values()))
        found.append(Entry(name, kinds, choices))
    return found


def _lists(method: str, kinds: tuple[str, ...], settings: dict[str, Any], place: str) -> dict[str, list[Any]]:
    """The settings to choose among, each as a list."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"{place}: found the method {unknown[0]!r}, wanted one of {', '.join(KINDS)}, or several with + between them")
    if len(kinds) > 1 and "best-of-n" in kinds:
        raise ValueError(f"{place}: best-of-n chooses between responses on its own and goes with no other method")
    strange = [name for name in settings if not any(KINDS[kind].takes(name) for kind in kinds)]
    if strange:
        known = [name for kind in kinds for name in (*KINDS[kind].strengths, *KINDS[kind].options)]
        raise ValueError(f"{place}: {method} has no setting {strange[0]!r}, only {', '.join(known) or 'none'}")
    missing = [name for kind in kinds for name in KINDS[kind].strengths if name not in settings and name not in KINDS[kind].optional]
    if missing:
        raise ValueError(f"{place}: {method} must have {', '.join(missing)}")
    strengths = [name for kind in kinds for name in KINDS[kind].strengths if name in settings]
    lists = {name: settings[name] if isinstance(settings[name], list) else [settings[name]] for name in strengths}
    empty = [name for name, choices in lists.items() if not choices]
    if empty:
        raise ValueError(f"{place}: {empty[0]} must have at least one number, found an empty list")
    return lists


class _Weighted:
    """One score from several."""

    def __init__(self, reward: Reward, weights: Sequence[float]):
        self.reward, self.weights = reward, list(weights)
        self.name = f"{json.dumps(self.weights)} of {reward_name(reward)}"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return one_score(checked_rewards(self.reward, prompts, responses), self.weights).tolist()


def _single_reward(materials: Materials) -> Reward:
    weights = materials.study.reward.head_weights
    return materials.reward if weights is None else _Weighted(materials.reward, weights)


# The settings of an ascent, in a study as in the paper.
CONTROL = {{"step_size": "alpha", "steps": "n"}.get(each.name, each.name): each.name for each in dataclasses.fields(Control) if each.name != "value"}


def _head_weights(materials: Materials, settings: dict[str, Any]) -> Any:
    return settings.get("head_weights", materials.study.reward.head_weights if materials.value.num_heads > 1 else None)


def _re_control(materials: Materials, settings: dict[str, Any]) -> Method:
    of_control = {CONTROL[name]: given for name, given in settings.items() if name in CONTROL}
    control = Control(materials.value, **{**of_control, "head_weights": _head_weights(materials, settings)})
    beside = {name: given for name, given in settings.items() if name not in CONTROL}
    return ReControl(control, trained=materials.trained, **beside)


def _prefix_scorer(materials: Materials, settings: dict[str, Any]) -> Method:
    weights = _head_weights(materials, settings)
    return PrefixScorer(materials.value, settings["strength"], settings.get("k", 10), head_weights=weights, trained=materials.trained)


def _prompting(materials: Materials, settings: dict[str, Any]) -> Method:
    examples = settings.get("examples", [])
    if isinstance(examples, int):
        examples = best_examples(materials.rollouts, examples, head_weights=materials.study.reward.head_weights)
    pairs = [tuple(pair) for pair in examples]
    if "goal" in settings:
        return Prompting.for_dialogues(settings["goal"], pairs)
    keywords = {name: settings[name] for name in ("separator",) if name in settings}
    return Prompting(settings.get("template", "{prompt}"), pairs, name=settings.get("called"), **keywords)


def _static_editing(materials: Materials, settings: dict[str, Any]) -> Method:
    which = settings.get("direction", "reward")
    makers: dict[str, Callable[..., Direction]] = {"reward": reward_direction, "mean-difference": mean_difference}
    if which not in makers:
        raise ValueError(f"the direction of static editing must be one of {', '.join(makers)}, found {which!r}")
    path = materials.folder / "directions" / f"{which}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        makers[which](materials.rollouts, head_weights=materials.study.reward.head_weights).save(path)
    return StaticEditing(Direction.load(path), settings["strength"])


def _args(materials: Materials, settings: dict[str, Any]) -> Method:
    return ARGS(materials.reward, settings["w"], settings.get("k", 10), weights=materials.study.reward.head_weights)


def _best_of_n(materials: Materials, settings: dict[str, Any]) -> Method:
    options = {name: settings[name] for name in ("rows_at_once", "sampling") if name in settings}
    return BestOfN(settings["n"], materials.reward, head_weights=materials.study.reward.head_weights, **options)


def _dpo(materials: Materials, settings: dict[str, Any]) -> Method:
    folder = _adapter_folder(materials, "dpo", settings)
    if not folder.exists():
        options = dict(settings)
        samples, prompts = options.pop("samples", 2), materials.train_prompts[: options.pop("prompts", None)]
        sampling = {**_generation(materials), "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "progress": materials.progress}
        pairs = make_preference_pairs(materials.model, materials.tokenizer, prompts, _single_reward(materials), samples=samples, **sampling)
        train_dpo(materials.model, materials.tokenizer, pairs.pairs, folder, progress=materials.progress, **options)
    return FineTuned(folder)


def _reinforcement(algorithm: str) -> Callable[[Materials, dict[str, Any]], Method]:
    def make(materials: Materials, settings: dict[str, Any]) -> Method:
        folder = _adapter_folder(materials, algorithm, settings)
        if not folder.exists():
            generation = _generation(materials)
            options = {name: generation[name] for name in ("max_new_tokens", "stop_strings")} | settings
            what = (materials.model, materials.tokenizer, materials.train_prompts, _single_reward(materials), folder)
            train_rl(*what, algorithm=algorithm, progress=materials.progress, **options)
        return FineTuned(folder)

    return make


def _generation(materials: Materials) -> dict[str, Any]:
    """Of the training's own sampling."""
    decoding = materials.study.generation
    return {"max_new_tokens": decoding.max_new_tokens, "batch_size": decoding.batch_size or 16, "stop_strings": list(decoding.stop_strings)}


def _adapter_folder(materials: Materials, algorithm: str, settings: dict[str, Any]) -> Path:
    """One folder for each combination of settings, so that a study goes on with what is trained."""
    folder = materials.folder / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{algorithm}-{short_hash([settings, materials.train_prompts, _generation(materials)])}"


KINDS: dict[str, Kind] = {
    "prompting": Kind(_prompting, (), ("template", "examples", "separator", "goal", "called")),
    "re-control": Kind(
        _re_control,
        strengths=tuple(name for name in CONTROL if name != "head_weights"),
        options=("head_weights", "backend", "allow_other_model"),
        optional=tuple(name for name in CONTROL if name not in ("alpha", "n")),
    ),
    "prefix scorer": Kind(_prefix_scorer, ("strength",), ("k", "head_weights")),
    "static editing": Kind(_static_editing, ("strength",), ("direction",)),
    "args": Kind(_args, ("w",), ("k",)),
    "best-of-n": Kind(_best_of_n, ("n",), ("rows_at_once", "sampling")),
    "dpo": Kind(_dpo, ("beta", "learning_rate"), ("*",), optional=("learning_rate",)),
    "rloo": Kind(_reinforcement("rloo"), ("beta", "learning_rate"), ("*",), optional=("learning_rate",)),
    "grpo": Kind(_reinforcement("grpo"), ("beta", "learning_rate"), ("*",), optional=("learning_rate",)),
}
