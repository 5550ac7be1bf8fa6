"""What a study is made of: the sections of its YAML file, checked before any work is done. docs/study.md says what each key is."""

import dataclasses
import importlib.resources
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from recontrol.checks import renamed, usable_device
from recontrol.configs import from_mapping
from recontrol.data.prompts import turn_marks
from recontrol.data.rewards import Reward
from recontrol.data.rewards.loading import load_reward
from recontrol.data.settings import Collection
from recontrol.decoding.config import Decoding
from recontrol.decoding.loading import load_language_model
from recontrol.evaluation.judges import PairwiseJudge, RewardJudge
from recontrol.training.config import TrainConfig

# The studies that come with the package.
SETTINGS = importlib.resources.files("recontrol.studies") / "settings"
# Of `generation`, where a study says nothing else.
GENERATION: dict[str, Any] = {"batch_size": 16, "options": {"do_sample": False}}


@dataclass(frozen=True)
class ModelSection:
    """The language model: on the hub or a folder; `device` None is a GPU if there is one, "auto" all of them."""

    name: str
    dtype: str = "auto"
    device: str | None = None
    revision: str | None = None

    def load(self) -> tuple[Any, Any]:
        """(language model, tokenizer)."""
        return load_language_model(self.name, dtype=self.dtype, device=device_of(self.device), revision=self.revision)


@dataclass(frozen=True)
class SourceSection:
    """Where prompts come from: a data set of the hub, or a file; `limit` keeps the first so many."""

    source: str
    split: str = "train"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, found {self.limit}")
        if "[" in self.split and Path(self.source).is_file():
            raise ValueError(f"{self.source} is a file and has no splits, found {self.split}; limit takes its first prompts")


@dataclass(frozen=True)
class PromptsSection:
    """The prompts of each part of the study, and how they are written; without `validation` nothing is chosen, and all settings are reported."""

    train: SourceSection | None
    test: SourceSection
    validation: SourceSection | None = None
    human: str = "Human"
    chat_template: bool = False
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.chat_template and self.human != "Human":
            raise ValueError(f"human has no use with chat_template, which has marks of its own; found {self.human!r}")


@dataclass(frozen=True)
class JudgeSection:
    """How a chat model is asked for scores: its server, its lowest and highest score, the file that keeps its answers."""

    url: str | None = None
    range: tuple[float, float] = (1.0, 10.0)
    cache: str | None = None
    concurrency: int = 8
    request: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if len(self.range) != 2:
            raise ValueError(f"the judge's range must be two numbers, found {len(self.range)}")

    @property
    def server(self) -> dict[str, Any]:
        """The arguments that every judge takes for its server."""
        return {"base_url": self.url, "cache": self.cache, "concurrency": self.concurrency, "request": self.request}


@dataclass(frozen=True)
class RewardSection:
    """What responses are scored by: names as `--reward-model` takes them; of several rewards the weighted sum is reported."""

    names: list[str]
    head_weights: list[float] | None = None
    batch_size: int = 16
    template: str | None = None
    device: str | None = None
    dtype: str = "auto"
    judge: JudgeSection = field(default_factory=JudgeSection)

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("names must have at least one name")
        kinds = {name.partition(":")[0] for name in self.names}
        if self.judge != JudgeSection() and "judge" not in kinds:
            raise ValueError("the settings of a judge have no use: none of names is judge:NAME")
        if self.template is not None and kinds <= {"judge", "python"}:
            raise ValueError("template has no use: none of names is a sequence classifier")

    def load(self, names: list[str] | None = None) -> Reward:
        """The reward, or that of other names used in the same way."""
        options: dict[str, Any] = {name: getattr(self, name) for name in ("batch_size", "template", "dtype")}
        return load_reward(names or self.names, **options, device=device_of(self.device), judge_range=self.judge.range, judge=self.judge.server)


@dataclass(frozen=True)
class WinSection:
    """Who is asked which of two responses is better: "judge:NAME" for both orders of each pair, a reward for one response at a time."""

    judge: str
    against: str = "uncontrolled"
    cache: str | None = None
    url: str | None = None

    def __post_init__(self) -> None:
        if self.against == "references":
            renamed("against: references", "against: preferred")
            object.__setattr__(self, "against", "preferred")
        if self.against not in ("uncontrolled", "preferred"):
            raise ValueError(f"against must be 'uncontrolled' or 'preferred', found {self.against!r}")
        if (self.cache or self.url) and not self.judge.startswith("judge:"):
            raise ValueError(f"cache and url are of a judge:NAME, found {self.judge!r}")

    def load(self, reward: RewardSection) -> Callable[..., Any]:
        """The judge; a reward is used as that of the study."""
        kind, _, rest = self.judge.partition(":")
        return PairwiseJudge(rest, base_url=self.url, cache=self.cache) if kind == "judge" else RewardJudge(reward.load([self.judge]))


@dataclass(frozen=True)
class Study:
    """A whole study; its fields are the keys of docs/study.md."""

    model: ModelSection
    prompts: PromptsSection
    reward: RewardSection
    methods: list[dict[str, Any]]
    generation: Decoding = field(default_factory=lambda: Decoding(**GENERATION))
    # Settings of `Collection` and `Decoding`, and options of `model.generate`, beside those of `generation`.
    collect: dict[str, Any] = field(default_factory=dict)
    # Settings of `TrainConfig`.
    train: dict[str, Any] = field(default_factory=dict)
    value: str | None = None
    encoder: str | None = None
    wins: WinSection | None = None
    choose: str | dict[str, float] = "paper"
    report: Literal["chosen", "all"] = "chosen"
    seeds: int = 1
    seed: int = 0
    # So far that no batch of rollouts, validation or test has the seed of a batch of another.
    seeds_apart: int = 1_000_000

    def __post_init__(self) -> None:
        rule, budget = self.choose, self.choose.get("kl") if isinstance(self.choose, dict) else None
        if rule not in ("paper", "reward") and not (isinstance(rule, dict) and set(rule) == {"kl"} and isinstance(budget, int | float) and budget > 0):
            raise ValueError(f"choose must be 'paper', 'reward' or {{'kl': nats}}, found {rule!r}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, found {self.seeds}")
        if self.value is None and self.prompts.train is None:
            raise ValueError("without a value there must be prompts.train to make one from")
        if self.generation.seed:
            raise ValueError(f"generation has no seed of its own, found {self.generation.seed}: it is that of the study")
        # Found when the file is read, not after hours of collecting.
        from_mapping(TrainConfig, self.train, "train")
        self.collected()
        for part in (1, 2):
            self.decoding(part)

    def collected(self) -> tuple[Decoding, Collection]:
        """How rollouts are decoded, and how they are kept."""
        decoded = dict(self.collect)
        kept = {each.name: decoded.pop(each.name) for each in dataclasses.fields(Collection) if each.name in decoded}
        return Decoding.of(self.decoding(), **decoded), from_mapping(Collection, kept, "collect")

    def decoding(self, part: int = 0) -> Decoding:
        """How responses of a part of the study are decoded: 0 are the rollouts, 1 is the validation, 2 the test."""
        return dataclasses.replace(self.generation, seed=self.seed + part * self.seeds_apart)


class _NoRepeats(yaml.SafeLoader):
    """YAML in which a mapping has each key once: of two the first would be lost."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        if len(node.value) > len({str(key.value) for key, _ in node.value}):
            raise yaml.constructor.ConstructorError(None, None, f"found a key twice among {[key.value for key, _ in node.value]}", node.start_mark)
        return node


def load_study(source: str | os.PathLike) -> Study:
    """Read a study: a YAML file, or the name of one of the package; FileNotFoundError or ValueError where there is none, or what it says is wrong."""
    path: Any = Path(source)
    if not path.is_file():
        path = SETTINGS / f"{source}.yaml"
        if str(source) not in study_names():
            raise FileNotFoundError(f"no study at {str(source)!r}: there is no such file; the package has {', '.join(study_names())}")
    try:
        return make_study(yaml.load(path.read_text(encoding="utf-8"), _NoRepeats), str(source))
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no YAML: {error}") from error


def study_names() -> list[str]:
    """The studies that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in SETTINGS.iterdir() if entry.name.endswith(".yaml"))


def make_study(content: Any, where: str = "study") -> Study:
    """A study from what a YAML file has; ValueError, which begins with `where`, names a section that is missing, unknown or of the wrong type."""
    if not isinstance(content, Mapping) or not isinstance(content.get("generation", {}), Mapping):
        return from_mapping(Study, content, where)
    generation = {**GENERATION, **content.get("generation", {})}
    stops = generation.pop("stop", generation.pop("stop_strings", None))
    study = from_mapping(Study, {**content, "generation": {**generation, "stop_strings": stops or []}}, where)
    if stops is None:
        stops = turn_marks(study.prompts.test.source, study.prompts.human, study.prompts.chat_template)
    return dataclasses.replace(study, generation=dataclasses.replace(study.generation, stop_strings=stops))


def device_of(given: str | None) -> str:
    """The device asked for, else a GPU, this process's own among several processes, else the CPU."""
    own = os.environ.get("LOCAL_RANK")
    found = given or (("cuda" if own is None else f"cuda:{own}") if torch.cuda.is_available() else "cpu")
    return found if found == "auto" else str(usable_device(found))
