"""From the entries of a study to methods: which there are, what settings they take, and which of these may be lists to choose from."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
from recontrol.value import ValueFunction


@dataclass(frozen=True)
class Materials:
    """What methods are made of.

    Attributes:
        model: the language model.
        tokenizer: its tokenizer.
        reward: (prompts, responses) -> scores.
        head_weights: one a reward, where there are several.
        folder: of the study, for what is trained.
        prompts: for training.
        generation: arguments of the training's own sampling: max_new_tokens, stop_strings, batch_size.
        rollouts: of the uncontrolled model; None where a value function was given.
        value: the value function; None where no entry asks for one.
        trained: what its training took, where that is known.
        progress: show progress bars.
    """

    model: Any
    tokenizer: Any
    reward: Reward
    head_weights: Sequence[float] | None
    folder: Path
    prompts: Sequence[str]
    generation: Mapping[str, Any]
    rollouts: Rollouts | None
    value: ValueFunction | None
    trained: Training | None
    progress: bool

    @cached_property
    def single_reward(self) -> Reward:
        """The weighted sum of the rewards as one score."""
        return _Weighted(self.reward, self.head_weights) if self.head_weights is not None else self.reward

    def the_value(self) -> ValueFunction:
        """The value function, where there must be one."""
        assert self.value is not None
        return self.value

    def the_rollouts(self, kind: str) -> Rollouts:
        """The rollouts.

        Raises:
            ValueError: there are none.
        """
        if self.rollouts is None:
            raise ValueError(f"{kind} is made from rollouts, and a study with a value function of its own collects none")
        return self.rollouts


class _Weighted:
    """One score from several."""

    def __init__(self, reward: Reward, weights: Sequence[float]):
        self.reward, self.weights = reward, list(weights)
        self.name = f"{json.dumps(self.weights)} of {reward_name(reward)}"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return one_score(checked_rewards(self.reward, prompts, responses), self.weights).tolist()


@dataclass(frozen=True)
class Entry:
    """One row of the report: a method, and the settings among which one is chosen.

    Attributes:
        name: what the row is called.
        kinds: of the methods that act together, one or several.
        settings: the same settings with one number for each list, one dictionary for each choice.
        needs_value: whether a value function has to be there.
        needs_rollouts: whether rollouts of the uncontrolled model have to be there.
    """

    name: str
    kinds: tuple[str, ...]
    settings: tuple[dict[str, Any], ...]
    needs_value: bool
    needs_rollouts: bool

    def methods(self, materials: Materials) -> list[Method]:
        """One method for each choice; what has to be trained for them is trained, or read where it was before.

        Args:
            materials: what they are made of.
        """
        made = []
        for chosen in self.settings:
            parts = [KINDS[kind].make(materials, {name: given for name, given in chosen.items() if KINDS[kind].takes(name)}) for kind in self.kinds]
            made.append(parts[0] if len(parts) == 1 else Together(parts))
        return made


@dataclass(frozen=True)
class Kind:
    """How an entry becomes a method.

    Attributes:
        make: from materials and settings.
        strengths: the settings that may be lists, to choose from; the first ones must be given.
        options: further settings; "*" takes any.
        optional: the strengths that need not be given.
        needs_value: whether it is made of a value function.
        needs_rollouts: whether it is made of rollouts.
    """

    make: Callable[[Materials, dict[str, Any]], Method]
    strengths: tuple[str, ...]
    options: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    needs_value: bool = False
    needs_rollouts: bool = False

    def takes(self, name: str) -> bool:
        """Whether it has a setting of this name."""
        return name in self.strengths or name in self.options or "*" in self.options


def read_entries(entries: Sequence[Any], where: str = "methods") -> list[Entry]:
    """Check the entries of a study, before any work is done.

    Args:
        entries: mappings with "method", optionally "name", and settings.
        where: what errors begin with.

    Raises:
        ValueError: an unknown method or setting, one that is missing, or two rows of one name; it is named.
    """
    found: list[Entry] = []
    for number, entry in enumerate(entries):
        place = f"{where}[{number}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
            raise ValueError(f"{place} must be a mapping with a method, found {entry!r:.80}")
        kinds = tuple(part.strip() for part in entry["method"].split("+"))
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"{place}: found the method {unknown[0]!r}, wanted one of {', '.join(KINDS)}, or several with + between them")
        if len(kinds) > 1 and "best-of-n" in kinds:
            raise ValueError(f"{place}: best-of-n chooses between responses on its own and goes with no other method")
        settings = {name: given for name, given in entry.items() if name not in ("method", "name")}
        strange = [name for name in settings if not any(KINDS[kind].takes(name) for kind in kinds)]
        if strange:
            known = [name for kind in kinds for name in (*KINDS[kind].strengths, *KINDS[kind].options)]
            raise ValueError(f"{place}: {entry['method']} has no setting {strange[0]!r}, only {', '.join(known) or 'none'}")
        strengths = [name for kind in kinds for name in KINDS[kind].strengths]
        missing = [name for kind in kinds for name in KINDS[kind].strengths if name not in settings and name not in KINDS[kind].optional]
        if missing:
            raise ValueError(f"{place}: {entry['method']} must have {', '.join(missing)}")
        lists = {name: settings[name] if isinstance(settings[name], list) else [settings[name]] for name in strengths if name in settings}
        empty = [name for name, choices in lists.items() if not choices]
        if empty:
            raise ValueError(f"{place}: {empty[0]} must have at least one number, found an empty list")
        name = entry.get("name", entry["method"])
        if any(other.name == name for other in found):
            raise ValueError(f"{place}: two rows are called {name!r}; give one of them a name")
        choices = tuple({**settings, **dict(zip(lists, chosen, strict=True))} for chosen in itertools.product(*lists.values()))
        of_rollouts = any(KINDS[kind].needs_rollouts for kind in kinds) or isinstance(settings.get("examples"), int)
        found.append(Entry(str(name), kinds, choices, any(KINDS[kind].needs_value for kind in kinds), of_rollouts))
    return found


def _re_control(materials: Materials, settings: dict[str, Any]) -> Method:
    value = materials.the_value()
    weights = settings.get("head_weights", materials.head_weights if value.num_heads > 1 else None)
    control = Control(value, settings["alpha"], settings["n"], radius=settings.get("radius"), target=settings.get("target"), head_weights=weights)
    return ReControl(control, trained=materials.trained)


def _prefix_scorer(materials: Materials, settings: dict[str, Any]) -> Method:
    value = materials.the_value()
    weights = settings.get("head_weights", materials.head_weights if value.num_heads > 1 else None)
    return PrefixScorer(value, settings["strength"], settings.get("k", 10), head_weights=weights, trained=materials.trained)


def _prompting(materials: Materials, settings: dict[str, Any]) -> Method:
    examples = settings.get("examples", [])
    if isinstance(examples, int):
        examples = best_examples(materials.the_rollouts("prompting with examples"), examples, head_weights=materials.head_weights)
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
        makers[which](materials.the_rollouts("static editing"), head_weights=materials.head_weights).save(path)
    return StaticEditing(Direction.load(path), settings["strength"])


def _args(materials: Materials, settings: dict[str, Any]) -> Method:
    return ARGS(materials.reward, settings["w"], settings.get("k", 10), weights=materials.head_weights)


def _best_of_n(materials: Materials, settings: dict[str, Any]) -> Method:
    options = {name: settings[name] for name in ("rows_at_once", "sampling") if name in settings}
    return BestOfN(settings["n"], materials.reward, head_weights=materials.head_weights, **options)


def _dpo(materials: Materials, settings: dict[str, Any]) -> Method:
    folder = _adapter_folder(materials, "dpo", settings)
    if not folder.exists():
        options = dict(settings)
        samples, prompts = options.pop("samples", 2), materials.prompts[: options.pop("prompts", None)]
        sampling = {**materials.generation, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        pairs = make_preference_pairs(
            materials.model, materials.tokenizer, prompts, materials.single_reward, samples=samples, progress=materials.progress, **sampling
        )
        train_dpo(materials.model, materials.tokenizer, pairs.pairs, folder, progress=materials.progress, **options)
    return FineTuned(folder)


def _reinforcement(algorithm: str) -> Callable[[Materials, dict[str, Any]], Method]:
    def make(materials: Materials, settings: dict[str, Any]) -> Method:
        folder = _adapter_folder(materials, algorithm, settings)
        if not folder.exists():
            keywords = {name: materials.generation[name] for name in ("max_new_tokens", "stop_strings")}
            train_rl(
                materials.model,
                materials.tokenizer,
                materials.prompts,
                materials.single_reward,
                folder,
                algorithm=algorithm,
                progress=materials.progress,
                **{**keywords, **settings},
            )
        return FineTuned(folder)

    return make


def _adapter_folder(materials: Materials, algorithm: str, settings: dict[str, Any]) -> Path:
    """One folder for each combination of settings, so that a study goes on with what is trained."""
    folder = materials.folder / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{algorithm}-{short_hash([settings, list(materials.prompts), dict(materials.generation)])}"


KINDS: dict[str, Kind] = {
    "prompting": Kind(_prompting, (), ("template", "examples", "separator", "goal", "called")),
    "re-control": Kind(_re_control, ("alpha", "n", "target", "radius"), ("head_weights",), optional=("target", "radius"), needs_value=True),
    "prefix scorer": Kind(_prefix_scorer, ("strength",), ("k", "head_weights"), needs_value=True),
    "static editing": Kind(_static_editing, ("strength",), ("direction",), needs_rollouts=True),
    "args": Kind(_args, ("w",), ("k",)),
    "best-of-n": Kind(_best_of_n, ("n",), ("rows_at_once", "sampling")),
    "dpo": Kind(_dpo, ("beta", "learning_rate"), ("*",), optional=("learning_rate",)),
    "rloo": Kind(_reinforcement("rloo"), ("beta", "learning_rate"), ("*",), optional=("learning_rate",)),
    "grpo": Kind(_reinforcement("grpo"), ("beta", "learning_rate"), ("*",), optional=("learning_rate",)),
}
