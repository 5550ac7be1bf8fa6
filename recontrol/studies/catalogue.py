"""From the entries of a study to methods: which there are, what settings they take, and which of these may be lists to choose from."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from recontrol import methods
from recontrol.data.rewards import Reward, checked_rewards, reward_name
from recontrol.decoding.control import Control
from recontrol.evaluation.measure import short_hash
from recontrol.methods.base import one_score

# A run of a study, which imports this module: it has the study, model, tokenizer, reward, folder, prompts, rollouts and value function of the methods.
Run = Any


@dataclass(frozen=True)
class Entry:
    """One row of the report: the kinds of the methods that act together, and the settings among which one is chosen."""

    name: str
    kinds: tuple[str, ...]
    settings: tuple[dict[str, Any], ...]

    def methods(self, run: Run) -> list[methods.Method]:
        """One method for each choice; what has to be trained for them is trained, or read where it was before."""
        kinds = [KINDS[kind] for kind in self.kinds]
        made = [[kind.make(run, {name: given for name, given in chosen.items() if kind.takes(name)}) for kind in kinds] for chosen in self.settings]
        return [parts[0] if len(parts) == 1 else methods.Together(parts) for parts in made]


@dataclass(frozen=True)
class Kind:
    """How an entry becomes a method: `strengths` may be lists, and those in `needed` must be given; "*" in `options` takes any."""

    make: Callable[[Run, dict[str, Any]], methods.Method]
    strengths: tuple[str, ...]
    needed: tuple[str, ...]
    options: tuple[str, ...] = ()

    def takes(self, name: str) -> bool:
        """Whether it has a setting of this name."""
        return name in self.strengths or name in self.options or "*" in self.options


def read_entries(entries: Sequence[Any], where: str = "methods") -> list[Entry]:
    """Check the entries of a study, before any work is done; ValueError names an unknown method or setting, one that is missing, or two rows of one name."""
    found: list[Entry] = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
            raise ValueError(f"{where}[{number}] must be a mapping with a method, found {entry!r:.80}")
        method, name = entry["method"], str(entry.get("name", entry["method"]))
        settings = {setting: given for setting, given in entry.items() if setting not in ("method", "name")}
        names = tuple(part.strip() for part in method.split("+"))
        kinds = [KINDS[kind] for kind in names if kind in KINDS]
        known = [setting for kind in kinds for setting in (*kind.strengths, *kind.options)]
        strengths = [setting for kind in kinds for setting in kind.strengths if setting in settings]
        lists = {setting: settings[setting] if isinstance(settings[setting], list) else [settings[setting]] for setting in strengths}
        for wrong, message in (
            ([kind for kind in names if kind not in KINDS], f"found the method '{{}}', wanted one of {', '.join(KINDS)}, or several with + between them"),
            (names if len(names) > 1 and "best-of-n" in names else (), "best-of-n chooses between responses on its own and goes with no other method"),
            ([each for each in settings if not any(kind.takes(each) for kind in kinds)], f"{method} has no setting '{{}}', only {', '.join(known) or 'none'}"),
            ([each for kind in kinds for each in kind.needed if each not in settings], f"{method} must have {{}}"),
            ([each for each, choices in lists.items() if not choices], "{} must have at least one number, found an empty list"),
            ([other.name for other in found if other.name == name], "two rows are called '{}'; give one of them a name"),
        ):
            if wrong:
                raise ValueError(f"{where}[{number}]: {message.format(', '.join(map(str, wrong)))}")
        choices = tuple({**settings, **dict(zip(lists, chosen, strict=True))} for chosen in itertools.product(*lists.values()))
        found.append(Entry(name, names, choices))
    return found


# The settings of an ascent, in a study as in the paper.
CONTROL = {{"step_size": "alpha", "steps": "n"}.get(each.name, each.name): each.name for each in dataclasses.fields(Control) if each.name != "value"}


def _single_reward(run: Run) -> Reward:
    """One score from several, where the study weighs them."""
    weights = run.study.reward.head_weights
    if weights is None:
        return run.reward

    def weighted(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return one_score(checked_rewards(run.reward, prompts, responses), weights).tolist()

    weighted.name = f"{json.dumps(list(weights))} of {reward_name(run.reward)}"  # type: ignore[attr-defined]
    return weighted


def _weighted(run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the weights of the heads, those of the study where an entry has none of its own."""
    return {"head_weights": run.study.reward.head_weights if run.value.num_heads > 1 else None, **settings}


def _re_control(run: Run, settings: dict[str, Any]) -> methods.Method:
    control = Control(run.value, **{CONTROL[name]: given for name, given in _weighted(run, settings).items() if name in CONTROL})
    return methods.ReControl(control, trained=run.trained, **{name: given for name, given in settings.items() if name not in CONTROL})


def _prefix_scorer(run: Run, settings: dict[str, Any]) -> methods.Method:
    return methods.PrefixScorer(run.value, trained=run.trained, **_weighted(run, settings))


def _prompting(run: Run, settings: dict[str, Any]) -> methods.Method:
    others = dict(settings)
    examples = others.pop("examples", [])
    if isinstance(examples, int):
        examples = methods.best_examples(run.rollouts, examples, head_weights=run.study.reward.head_weights)
    pairs = [tuple(pair) for pair in examples]
    if "goal" in settings:
        if beside := sorted(settings.keys() & {"template", "separator", "called"}):
            raise ValueError(f"prompting: {', '.join(beside)} have no use beside goal, which has its own")
        return methods.Prompting.for_dialogues(settings["goal"], pairs)
    return methods.Prompting(examples=pairs, name=others.pop("called", None), **others)


def _static_editing(run: Run, settings: dict[str, Any]) -> methods.Method:
    which = settings.get("direction", "reward")
    makers: dict[str, Callable[..., methods.Direction]] = {"reward": methods.reward_direction, "mean-difference": methods.mean_difference}
    if which not in makers:
        raise ValueError(f"the direction of static editing must be one of {', '.join(makers)}, found {which!r}")
    path = run.folder / "directions" / f"{which}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        makers[which](run.rollouts, head_weights=run.study.reward.head_weights).save(path)
    return methods.StaticEditing(methods.Direction.load(path), settings["strength"])


def _best_of_n(run: Run, settings: dict[str, Any]) -> methods.Method:
    return methods.BestOfN(reward=run.reward, head_weights=run.study.reward.head_weights, **settings)


def _fine_tuned(algorithm: str, run: Run, settings: dict[str, Any]) -> methods.Method:
    """A LoRA adapter in a folder for each combination of settings, so that a study goes on with what is trained."""
    decoding = dataclasses.replace(run.study.generation, batch_size=run.study.generation.batch_size or 16)
    generation = {"max_new_tokens": decoding.max_new_tokens, "batch_size": decoding.batch_size, "stop_strings": list(decoding.stop_strings)}
    folder = run.folder / "adapters" / f"{algorithm}-{short_hash([settings, run.train_prompts, generation])}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        return methods.FineTuned(folder)
    options = {**settings, "progress": run.progress}
    if algorithm == "dpo":
        samples, prompts = options.pop("samples", 2), run.train_prompts[: options.pop("prompts", None)]
        sampling = dataclasses.replace(decoding, options={"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0})
        reward, progress = _single_reward(run), run.progress
        pairs = methods.make_preference_pairs(run.model, run.tokenizer, prompts, reward, samples=samples, decoding=sampling, progress=progress)
        methods.train_dpo(run.model, run.tokenizer, pairs.pairs, folder, **options)
    else:
        options = {name: generation[name] for name in ("max_new_tokens", "stop_strings")} | options
        methods.train_rl(run.model, run.tokenizer, run.train_prompts, _single_reward(run), folder, algorithm=algorithm, **options)
    return methods.FineTuned(folder)


STEERING = tuple(name for name in CONTROL if name != "head_weights")
KINDS: dict[str, Kind] = {
    "prompting": Kind(_prompting, (), (), ("template", "examples", "separator", "goal", "called")),
    "re-control": Kind(_re_control, STEERING, ("alpha", "n"), ("head_weights", "backend", "allow_other_model")),
    "prefix scorer": Kind(_prefix_scorer, ("strength",), ("strength",), ("k", "head_weights")),
    "static editing": Kind(_static_editing, ("strength",), ("strength",), ("direction",)),
    "args": Kind(lambda run, given: methods.ARGS(run.reward, given["w"], given.get("k", 10), weights=run.study.reward.head_weights), ("w",), ("w",), ("k",)),
    "best-of-n": Kind(_best_of_n, ("n",), ("n",), ("rows_at_once", "sampling")),
    **{name: Kind(partial(_fine_tuned, name), ("beta", "learning_rate"), ("beta",), ("*",)) for name in ("dpo", "rloo", "grpo")},
}
