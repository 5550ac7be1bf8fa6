"""The model card of a value function, written from its provenance."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recontrol.checks import dtype_name
from recontrol.value.files import read_value
from recontrol.value.provenance import fingerprint_hash, names_of_heads

CARD_NAME = "README.md"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# At the start of an entry, or after a name given to it.
ABSOLUTE_PATH = re.compile(r"(?:^|(?<=: ))(?:/[^/,\n]+)+")
CURVE_ROWS = 20  # of the learning curve at most; the best and the last epoch are among them
# What the rollouts' manifest says that a reader of the card may want to know.
ROLLOUTS = ("num_prompts", "prompts_sha256", "num_samples", "generation", "stop_strings", "seed", "tokenizer", "model_dtype", "storage", "checksums_sha256")

USAGE = """```python
import recontrol as rc
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{model}")
tokenizer = AutoTokenizer.from_pretrained("{model}")
value = rc.ValueFunction.from_pretrained("{value}")
inputs = tokenizer("Hello", return_tensors="pt")
with rc.Controller(value, step_size=0.5, steps=30{weights}).attach(model):
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```"""


def model_card(folder: str | os.PathLike, repo_id: str | None = None) -> str:
    """Markdown with YAML front matter for the value function in a folder: how to use it and where it comes from, as far as its provenance says."""
    from huggingface_hub import ModelCard, ModelCardData

    config, tensors = read_value(Path(folder))
    size = f"{sum(math.prod(tensor.shape) for tensor in tensors.values()):,} parameters, {dtype_name(next(iter(tensors.values())).dtype)}"
    provenance = config.get("provenance") or {}
    known = {name: entry if isinstance(entry := provenance.get(name), Mapping) else {} for name in ("training", "rollouts", "data", "made_with")}
    recorded = provenance.get("base_model")
    base = recorded if isinstance(recorded, Mapping) else {"name": recorded}
    base_name = str(base.get("name") or "")
    on_hub = bool(HUB_NAME.fullmatch(base_name)) and not Path(base_name).exists()
    data = ModelCardData(library_name="recontrol", base_model=base_name if on_hub else None, tags=["recontrol", "value-function", "representation-editing"])
    shown = _without_folders(base_name) or "the language model it was trained with"
    weights = "" if config["num_heads"] == 1 else f", head_weights={[1.0] * config['num_heads']}"
    widths = " -> ".join(map(str, (config["hidden_size"], *config["hidden_dims"], config["num_heads"])))
    fingerprint = _code(fingerprint_hash(dict(base))) if "samples" in base else None
    identity: list[tuple[str, Any]] = [("base model", _code(shown)), ("fingerprint of the base model, SHA-256", fingerprint)]
    identity.append(("network", f"ReLU perceptron {widths}, {size}"))
    names, mean, std = names_of_heads(provenance.get("reward"), config["num_heads"]), config.get("reward_mean"), config.get("reward_std")
    for head, name in enumerate(names):
        identity.append(("reward" if len(names) == 1 else f"reward of head {head}", _code(_without_folders(name))))
        if mean is not None and std is not None:
            identity.append(("unit of V", f"standard deviations of {std[head]:.6g} from a mean reward of {mean[head]:.6g}"))
    identity.append(("made with", known["made_with"] or None))
    sections = [
        f"# {repo_id or 'Value function'}",
        f"A value function for RE-Control ([arXiv 2406.05954](https://arxiv.org/abs/2406.05954)): it predicts the final reward of a response from the last "
        f"hidden states of {_code(shown)}, and its gradient steers that model while it decodes. It is of use with this model alone.",
        USAGE.format(value=repo_id or "path/to/this/folder", model=base_name if on_hub else "path/to/the/model", weights=weights),
    ]
    # The provenance describes the objective, the settings only name it. The checksums under "Data" identify the rollouts better.
    objective = provenance.get("objective", known["training"].get("objective"))
    training = {"objective": None, **known["training"]} | {"objective": objective, "rollouts": None}
    data_rows = {**known["data"], **{name: entry for name, entry in known["rollouts"].items() if name in ROLLOUTS}}
    for title, content in (("What it is", identity), ("Data", data_rows.items()), ("Training", training.items())):
        rows = [(name.replace("_", " "), entry) for name, entry in content if entry is not None]
        sections += [f"## {title}", _table(("", ""), rows)] if rows else []
    curve = _curve(provenance.get("history"), provenance.get("best_epoch"))
    sections += ["## Learning curve", curve] if curve else []
    sections += [
        "## Limits",
        "The reward is what was trained on, not quality: with a step size that is too large V keeps rising while the text collapses. Choose step size and "
        "steps on prompts that were not trained on, and read the responses.",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _curve(history: Any, best: Any) -> str:
    """The learning curve as a table; empty without one."""
    epochs = [entry for entry in (history if history and isinstance(history, list) else [best]) if isinstance(entry, Mapping) and entry]
    if not epochs:
        return ""
    best_at = epochs.index(best) if best in epochs else -1
    step = max(1, -(-len(epochs) // (CURVE_ROWS - 2)))
    names = list(dict.fromkeys(name for entry in epochs for name in entry))
    rows = []
    for place in sorted({*range(0, len(epochs), step), len(epochs) - 1, best_at} - {-1}):
        numbers = [epochs[place].get(name) for name in names]
        rows.append([f"{entry:.4g}" if isinstance(entry, float) else "" if entry is None else str(entry) for entry in numbers])
        rows[-1][0] += " (best)" if place == best_at else ""
    return _table([name.replace("_", " ") for name in names], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in (header, ["---"] * len(header), *rows))


def _cell(entry: Any) -> str:
    text = ", ".join(f"{name} {content}" for name, content in entry.items()) if isinstance(entry, Mapping) else _without_folders(str(entry))
    return " ".join(text.replace("|", "\\|").split())


def _without_folders(text: str) -> str:
    """An absolute path says more about a machine than about what lies there."""
    return ABSOLUTE_PATH.sub(lambda path: path[0].rsplit("/", 1)[1], text)


def _code(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"
