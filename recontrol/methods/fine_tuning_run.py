"""One run of a TRL trainer on a copy of the model that shares its weights: checkpoints, cost, and the adapter in the end."""

import contextlib
import copy
import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from recontrol.checks import required
from recontrol.data.settings import IGNORED
from recontrol.decoding.batches import seeded
from recontrol.decoding.fingerprint import difference
from recontrol.files import LOCK_NAME, check_same_settings, read_json, write_json, writing_lock
from recontrol.methods.adapters import EXTRA, RECORD_NAME, FineTuningRun, flags_kept
from recontrol.methods.peak_memory import PeakMemory

SETTINGS_NAME = "settings.json"
# In a checkpoint, written last: one without it was not finished.
COST_NAME = "cost.json"


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
    """Train an adapter, or continue a run that was stopped, or read a finished one; `settings` is all that the result depends on.

    `make_trainer` gets a copy of the model, a copy of the tokenizer and a folder for checkpoints, beside `out`; `keep` names the columns of the history.
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
        elif any(path.name != LOCK_NAME for path in folder.iterdir()):
            raise ValueError(f"{folder} is needed for checkpoints and holds something else; move it away")
        else:
            write_json(folder / SETTINGS_NAME, settings)
        checkpoint = _last_checkpoint(folder)
        with _shared_copy(model) as twin, _quiet(progress), _generators_kept(settings["seed"]), PeakMemory(model.device) as memory:
            trainer = make_trainer(twin, copy.deepcopy(tokenizer), folder)
            cost = _Cost(checkpoint, memory)
            trainer.add_callback(cost)
            # Without a progress bar it would print each step.
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            history = [{name: step[name] for name in ("step", *keep) if name in step} for step in trainer.state.log_history if "loss" in step]
            trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
            run = FineTuningRun(out, settings, trainable, **cost.now(), history=history)
            finished = folder / "adapter"
            shutil.rmtree(finished, ignore_errors=True)
            # Embeddings are never trained here; asked whether they were, PEFT would look for the base model on the hub.
            trainer.model.save_pretrained(finished, save_embedding_layers=False)
            run.write(finished)
        if out.exists():
            out.rmdir()
        os.replace(finished, out)
        shutil.rmtree(folder)
    return run


class _Cost(TrainerCallback):
    """Time and memory, over all sessions of a run; written into each checkpoint once that is whole."""

    def __init__(self, checkpoint: Path | None, memory: PeakMemory):
        self._before = {"seconds": 0.0, "peak_bytes": 0} if checkpoint is None else read_json(checkpoint / COST_NAME)
        self._memory, self._start = memory, time.perf_counter()

    def now(self) -> dict[str, Any]:
        seconds = self._before["seconds"] + time.perf_counter() - self._start
        return {"seconds": seconds, "peak_bytes": max(self._before["peak_bytes"], self._memory.bytes)}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / COST_NAME, self.now())


@contextlib.contextmanager
def _shared_copy(model: Any) -> Iterator[Any]:
    """A copy of the modules on the same weights: trainers put adapters, hooks and a new `forward` on the model that they train."""
    with flags_kept(model):
        yield copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """No telemetry, no deprecation warnings about the trainer's own calls, and progress bars of the preparation only if asked for."""
    datasets, hub = required("datasets", EXTRA), huggingface_hub.constants
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


def _compare(found: dict[str, Any], wanted: dict[str, Any], model: Any, where: Path) -> None:
    check_same_settings(found, wanted, f"{where} is of a run with", ignored=IGNORED)
    other = difference(found["base_model"], model)
    if other:
        raise ValueError(f"{where} is of a run on another model: {other}; use another folder")
