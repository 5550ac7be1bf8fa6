"""One run of fine-tuning, whatever trains: a copy that shares the weights, checkpoints to go on from, what it cost, and the adapter in the end."""

import contextlib
import copy
import importlib
import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import huggingface_hub
import numpy
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from recontrol.data.settings import IGNORED
from recontrol.decoding.batches import seeded
from recontrol.decoding.fingerprint import difference
from recontrol.evaluation.peak_memory import PeakMemory
from recontrol.files import LOCK_NAME, check_same_settings, read_json, write_json, writing_lock

FORMAT = "recontrol.fine_tuning"
# Beside the adapter: what it was trained with, and what that cost.
RECORD_NAME = "fine_tuning.json"
SETTINGS_NAME = "settings.json"
# In a checkpoint, written last: one without it was not finished.
COST_NAME = "cost.json"


@dataclass(frozen=True)
class FineTuningRun:
    """A finished run; in its folder as `fine_tuning.json`, beside the adapter.

    Attributes:
        path: the folder of the adapter, as `adapter` and `peft.PeftModel.from_pretrained` take it.
        settings: all that the result depends on.
        trainable_parameters: how many numbers were trained.
        seconds: wall-clock time of training, over all sessions of a run that was stopped; without sampling the pairs of DPO.
        peak_bytes: memory at most, beyond that in use before: allocated on the CUDA device, else resident memory of the process.
        history: one dict an optimisation step, by the trainer's names ("step", "loss", "reward", ...).
    """

    path: Path
    settings: dict[str, Any]
    trainable_parameters: int
    seconds: float
    peak_bytes: int
    history: list[dict[str, float]]

    @classmethod
    def read(cls, path: str | os.PathLike) -> Self:
        """The run that wrote a folder.

        Args:
            path: the folder.

        Raises:
            FileNotFoundError: it holds no run.
            ValueError: its record is damaged, or not one of ours.
        """
        file = Path(path) / RECORD_NAME
        content = read_json(file)
        found = content.pop("format", None) if isinstance(content, dict) else type(content).__name__
        if found != FORMAT:
            raise ValueError(f"{file} is not the record of a run of fine-tuning: found format {found!r}, wanted {FORMAT!r}")
        return cls(path=Path(path), **content)


def fine_tune(
    model: Any,
    tokenizer: Any,
    out: str | os.PathLike,
    settings: dict[str, Any],
    make_trainer: Callable[[Any, Any, Path], Any],
    *,
    keep: tuple[str, ...],
    progress: bool,
) -> FineTuningRun:
    """Train an adapter, or go on with a run that was stopped, or read what is finished.

    Checkpoints are in a folder beside `out` until the adapter is there, whole.

    Args:
        model: the language model; it is left as it was.
        tokenizer: its tokenizer; it is left as it was.
        out: the folder of the adapter.
        settings: all that the result depends on, with `model_settings`; its "seed" seeds the generators, and the caller's are left as they were.
        make_trainer: makes the trainer of a copy of the model, a copy of the tokenizer and a folder for checkpoints.
        keep: the trainer's names of what the history has of each step.
        progress: show a progress bar.

    Raises:
        ValueError: the folder holds something else, or a run with other settings; the setting is named, with what was found and wanted.
        RuntimeError: another run is writing there, or this is one of several processes.
    """
    out = Path(out)
    settings = json.loads(json.dumps(settings, default=str))
    if (out / RECORD_NAME).is_file():
        run = FineTuningRun.read(out)
        _compare(run.settings, settings, model, out)
        return run
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something else than an adapter of this package; use another folder")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RuntimeError(f"fine-tuning runs in one process, found {os.environ['WORLD_SIZE']}: start it without a launcher")
    folder = out.with_name(f"{out.name}.training")
    with writing_lock(folder):
        if (folder / SETTINGS_NAME).is_file():
            _compare(read_json(folder / SETTINGS_NAME), settings, model, folder)
        elif foreign := sorted(path.name for path in folder.iterdir() if path.name != LOCK_NAME):
            raise ValueError(f"{folder} is wanted for checkpoints and holds {', '.join(foreign[:4])}; move it away")
        else:
            write_json(folder / SETTINGS_NAME, settings)
        checkpoint = _last_checkpoint(folder)
        before = {"seconds": 0.0, "peak_bytes": 0} if checkpoint is None else read_json(checkpoint / COST_NAME)
        with _shared_copy(model) as twin, _quiet(progress), _generators_kept(settings["seed"]), PeakMemory(model.device) as memory:
            trainer = make_trainer(twin, copy.deepcopy(tokenizer), folder)
            cost = _Cost(before, memory)
            trainer.add_callback(cost)
            # Without a progress bar it would print each step.
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            history = [{name: step[name] for name in ("step", *keep) if name in step} for step in trainer.state.log_history if "loss" in step]
            trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
            run = FineTuningRun(out, settings, trainable, **cost.now(), history=history)
            _write(run, trainer, folder / "adapter")
        if out.exists():
            out.rmdir()
        os.replace(folder / "adapter", out)
        shutil.rmtree(folder)
    return run


class _Cost(TrainerCallback):
    """Time and memory, over all sessions of a run; written into each checkpoint once that is whole."""

    def __init__(self, before: dict[str, Any], memory: PeakMemory):
        self._before, self._memory, self._start = before, memory, time.perf_counter()

    def now(self) -> dict[str, Any]:
        seconds = self._before["seconds"] + time.perf_counter() - self._start
        return {"seconds": seconds, "peak_bytes": max(self._before["peak_bytes"], self._memory.bytes)}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / COST_NAME, self.now())


def fine_tuning_package(name: str) -> Any:
    """One of the packages that fine-tuning needs and the rest of `recontrol` does not.

    Args:
        name: "trl" or "peft".

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'fine-tuning needs the package {name}: pip install "recontrol[fine-tuning]" ({error})') from error


def check_plain(model: Any) -> None:
    """Refuse a model that bears adapters.

    Args:
        model: a causal language model.

    Raises:
        ValueError: it has layers of an adapter; the first is named.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if found is not None:
        raise ValueError(f"the model must have no adapter, found one on {found}: merge it or take it off first")


@contextlib.contextmanager
def flags_kept(model: Any) -> Iterator[None]:
    """Which parameters want gradients, and the gradients that they have: as before after the block.

    Args:
        model: any module.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


@contextlib.contextmanager
def _shared_copy(model: Any) -> Iterator[Any]:
    """A model with modules and settings of its own on the same weights: trainers put adapters, hooks and a new `forward` on what they train."""
    with flags_kept(model):
        yield copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """No telemetry, no deprecation warnings about the trainer's own calls, and no progress bars of the preparation unless asked for."""
    import datasets

    hub = huggingface_hub.constants
    telemetry, bars = hub.HF_HUB_DISABLE_TELEMETRY, not datasets.are_progress_bars_disabled()
    hub.HF_HUB_DISABLE_TELEMETRY = True
    if not progress:
        datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        hub.HF_HUB_DISABLE_TELEMETRY = telemetry
        if bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _generators_kept(seed: int) -> Iterator[None]:
    """A seed inside; afterwards the caller's generators, those of Python and NumPy included, as they were."""
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with seeded(seed):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; newer ones, cut off while they were written, are removed."""
    while (newest := get_last_checkpoint(str(folder))) is not None:
        if (Path(newest) / COST_NAME).is_file():
            return Path(newest)
        shutil.rmtree(newest)
    return None


def _write(run: FineTuningRun, trainer: Any, folder: Path) -> None:
    """The adapter and the record, into a folder that nobody reads yet."""
    shutil.rmtree(folder, ignore_errors=True)
    # Embeddings are never trained here; asked whether they were, PEFT would look for the base model on the hub.
    trainer.model.save_pretrained(folder, save_embedding_layers=False)
    content = asdict(run)
    del content["path"]
    write_json(folder / RECORD_NAME, {"format": FORMAT, **content})


def _compare(found: dict[str, Any], wanted: dict[str, Any], model: Any, where: Path) -> None:
    check_same_settings(found, wanted, f"{where} is of a run with", ignored=IGNORED)
    other = difference(found["base_model"], model)
    if other:
        raise ValueError(f"{where} is of a run on another model: {other}; use another folder")
