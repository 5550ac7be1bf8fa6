"""Fine-tuning to compare with control at test time: pairs of responses, and LoRA adapters by DPO, RLOO or GRPO, through TRL and PEFT."""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import math
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from recontrol.ambient import shielded
from recontrol.checks import first_few, required
from recontrol.data.identity import fingerprint, unknown
from recontrol.data.prompts import Preference
from recontrol.data.rewards import Reward, as_reward, checked_rewards, reward_name
from recontrol.data.sampling import token_counts
from recontrol.data.settings import IGNORED, model_settings, texts_checksum
from recontrol.decoding.batches import check_lengths, effective, eos_tokens, generate_batch, seeded
from recontrol.decoding.config import Decoding
from recontrol.decoding.fingerprint import difference
from recontrol.decoding.model_config import context_length
from recontrol.decoding.responses import listed_stop_strings, make_response
from recontrol.files import LOCK_NAME, check_same_settings, read_json, write_json, writing_lock
from recontrol.methods.adapters import EXTRA, FORMAT, RECORD_NAME, FineTuningRun, check_plain, flags_kept
from recontrol.methods.base import check_uncontrolled
from recontrol.methods.peak_memory import PeakMemory

logger = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"
# The last file that the trainer writes into a checkpoint.
STATE_NAME = "trainer_state.json"
# What the history has of the trainer's log.
KEPT: tuple[str, ...] = ("step", "loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
KEPT += ("reward", "reward_std", "kl", "entropy", "completions/mean_length")
ONLINE = ("rloo", "grpo")


@dataclass(frozen=True)
class FineTuning:
    """The settings that `train_dpo` and `train_rl` share; the defaults of the first three are theirs.

    `beta` is the price of a nat of divergence from the model without adapter; the learning rate of AdamW falls to 0 linearly. A step has `batch_size` pairs
    or responses, a forward pass `micro_batch_size`, which divides it (None: all). B A is scaled by alpha / rank (by default alpha is twice the rank),
    `dropout` is of the input of A, and `target_modules` name the layers. `epochs` may be a fraction; `gradient_checkpointing` computes activations twice, to
    keep fewer; `save_steps` lie between two checkpoints; `seed` is of the first weights and the order.
    """

    beta: float
    learning_rate: float
    batch_size: int
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    epochs: float = 1
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = True
    save_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {self.batch_size}")
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise ValueError(f"micro_batch_size must divide batch_size={self.batch_size}, found {self.micro_batch_size}")

    @classmethod
    def split(cls, keywords: dict[str, Any], **defaults: Any) -> tuple["FineTuning", dict[str, Any]]:
        """The settings among some keywords, and the other keywords, which are fields of the trainer's config."""
        given = {each.name: keywords.pop(each.name) for each in dataclasses.fields(cls) if each.name in keywords}
        return cls(**{**defaults, **given}), keywords

    def arguments(self, model: Any, **others: Any) -> dict[str, Any]:
        """The fields of a trainer's config that the result depends on; `others` are those of one algorithm and of the caller."""
        at_once = self.micro_batch_size or self.batch_size
        same = {name: getattr(self, name) for name in ("learning_rate", "gradient_checkpointing", "seed", "beta")}
        batches = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": self.batch_size // at_once}
        # The dtype of the model's own weights; those of the adapter are float32.
        dtypes = {"bf16": model.dtype == torch.bfloat16, "fp16": model.dtype == torch.float16}
        return dict(**same, **batches, **dtypes, disable_dropout=True, **others)


@dataclass(frozen=True)
class PreferencePairs:
    """The best and the worst of several responses to each prompt, in the order of the prompts, and their difference in reward, above 0.

    `left_out` counts prompts without a pair, by the reason: "equal" (all rewards are the same) or "empty" (fewer than two responses have a token).
    """

    pairs: list[Preference]
    margins: list[float]
    left_out: dict[str, int]


def make_preference_pairs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Any,
    *,
    samples: int = 2,
    decoding: Decoding | None = None,
    progress: bool = True,
    **keywords: Any,
) -> PreferencePairs:
    """Sample y_1, ..., y_n from the uncontrolled model for each prompt; prefer argmax_i r(x, y_i) to argmin_i r(x, y_i).

    A response that the model ended has the text of its end-of-sequence token, so that training on the pair keeps the model's own endings. The reward gives
    one score a response; do_sample is True unless given; `batch_size` prompts (by default 16), that is `batch_size * samples` rows, are decoded at once.
    Source: Rafailov et al. 2023, section 4 (pairs of responses of the initial model); the reward takes the place of the annotator.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, found {samples}")
    decoding = Decoding.of(decoding, **keywords)
    decoding = dataclasses.replace(decoding, options={"do_sample": True, **decoding.options})
    batch_size = decoding.batch_size or 16
    if not effective(model, dict(decoding.options), "do_sample"):
        raise ValueError(f"greedy decoding would write the same response {samples} times: found do_sample=False, wanted sampling")
    check_uncontrolled(model)
    check_lengths(model, tokenizer, prompts, decoding.max_new_tokens)
    score = as_reward(reward)
    left_out = {"equal": 0, "empty": 0}
    found = PreferencePairs([], [], left_out)
    for number, first in enumerate(tqdm(range(0, len(prompts), batch_size), "sampling pairs", disable=not progress)):
        repeated = [prompt for prompt in prompts[first : first + batch_size] for _ in range(samples)]
        responses = generate_batch(model, tokenizer, repeated, dataclasses.replace(decoding, seed=decoding.seed + number)).responses
        rows = [row for row, response in enumerate(responses) if response.token_ids]
        scores = dict(zip(rows, single_scores(score, [repeated[row] for row in rows], [responses[row].text for row in rows]).tolist(), strict=True))
        for start in range(0, len(repeated), samples):
            order = sorted((row for row in range(start, start + samples) if row in scores), key=scores.__getitem__)
            if len(order) < 2 or scores[order[0]] == scores[order[-1]]:
                left_out["empty" if len(order) < 2 else "equal"] += 1
                continue
            rejected, chosen = order[0], order[-1]
            ends = [tokenizer.decode(responses[row].token_ids[-1:]) if responses[row].finish == "eos" else "" for row in (chosen, rejected)]
            found.pairs.append(Preference(repeated[start], responses[chosen].text + ends[0], responses[rejected].text + ends[1]))
            found.margins.append(scores[chosen] - scores[rejected])
    if not found.pairs:
        counts = f"of {len(prompts)} prompts, {left_out['equal']} have equal rewards and {left_out['empty']} fewer than two responses with a token"
        raise ValueError(f"no prompt has two responses of different reward: {counts}; take more samples, or another reward")
    if any(left_out.values()):
        logger.warning("left out %d of %d prompts: %s", sum(left_out.values()), len(prompts), left_out)
    return found


def single_scores(reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """(responses,), the one score of each; a reward of several scores is refused."""
    table = checked_rewards(reward, prompts, responses)
    if table.shape[1] != 1:
        raise ValueError(f"fine-tuning needs one score a response, found {table.shape[1]}: give a reward that weighs them into one")
    return table[:, 0]


def train_dpo(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Preference],
    out: str | os.PathLike,
    *,
    max_length: int = 1024,
    add_eos: bool = False,
    progress: bool = True,
    **keywords: Any,
) -> FineTuningRun:
    r"""Train a LoRA adapter on preferences by minimising the mean of -log sigmoid(beta (log p(y+|x)/p0(y+|x) - log p(y-|x)/p0(y-|x))).

    p is the model with the adapter, p0 without. The same call continues a run that was stopped and reads one that is finished. The model (whose weights
    are not copied), its tokenizer and the caller's generators are left as they were. `FineTuned` makes a method of the folder `out`, beside which checkpoints
    are kept until it is there. Prompt and response are tokenised together, and cut at `max_length` tokens and at the end of the model's context. `add_eos`
    ends each response with an end-of-sequence token: for whole responses of a data set; `make_preference_pairs` writes those of the model. `keywords` are
    settings of `FineTuning` (by default beta=0.1, learning_rate=5e-6, batch_size=16), and further fields of `trl.DPOConfig`. Needs the extra `fine-tuning`.
    Source: Rafailov et al. 2023, equation 7; Hu et al. 2021, section 4.1.
    """
    trl = _trl(model, tokenizer)
    chosen, options = FineTuning.split(keywords, beta=0.1, learning_rate=5e-6, batch_size=16)
    pairs = [Preference(*pair) for pair in pairs]
    longest = min(max_length, context_length(model.config) or max_length)
    if not pairs:
        raise ValueError("there are no pairs to train on")
    counts = token_counts(tokenizer, [pair.prompt for pair in pairs])
    for complaint, wrong in {
        "have equal responses, so that there is nothing to prefer": [index for index, pair in enumerate(pairs) if pair.chosen == pair.rejected],
        f"have prompts that leave no room for a response in {longest} tokens": [index for index, count in enumerate(counts) if count >= longest],
    }.items():
        if wrong:
            raise ValueError(f"{len(wrong)} pairs {complaint}: {first_few(wrong)}")
    fields = chosen.arguments(model, max_length=longest, num_train_epochs=chosen.epochs, **options)
    settings = {"algorithm": "dpo", "add_eos": add_eos, "pairs_sha256": texts_checksum(pairs), "num_pairs": len(pairs)}

    def make_trainer(twin: Any, **common: Any) -> Any:
        ends = [{f"{name}_ends": add_eos or getattr(pair, name).endswith(tokenizer.eos_token) for name in ("chosen", "rejected")} for pair in pairs]
        rows = required("datasets", EXTRA).Dataset.from_list([{**pair._asdict(), **end} for pair, end in zip(pairs, ends, strict=True)])
        trainer = trl.DPOTrainer(twin, train_dataset=rows, **common)

        # TRL ends every response; one that was cut at max_new_tokens would teach the model to stop there.
        def cut(row: dict[str, Any]) -> dict[str, Any]:
            return {f"{name}_ids": row[f"{name}_ids"][: None if row[f"{name}_ends"] else -1] for name in ("chosen", "rejected")}

        trainer.train_dataset = trainer.train_dataset.map(cut)
        return trainer

    return _fine_tune(model, tokenizer, Path(out), chosen, trl.DPOConfig, fields, settings, make_trainer, progress)


def train_rl(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Any,
    out: str | os.PathLike,
    *,
    algorithm: str = "rloo",
    max_new_tokens: int = 128,
    samples: int = 4,
    temperature: float = 1.0,
    stop_strings: Sequence[str] | None = None,
    progress: bool = True,
    **keywords: Any,
) -> FineTuningRun:
    r"""Train a LoRA adapter on the reward of the model's own responses by maximising the mean of r(x, y) - beta log(p(y|x) / p0(y|x)).

    The baseline of RLOO, the default, is the mean reward of the other responses to the prompt; GRPO takes the mean of all, divides by their standard
    deviation, and has the KL in the loss. Both clip the ratio of probabilities as PPO does. Sampling is from the whole distribution; else as `train_dpo`.
    The reward gives one score a response. A step needs `batch_size / samples` prompts; an incomplete last one is left out. Responses end before the first
    token that touches a stop string. `keywords`: `FineTuning` (beta=0.05, learning_rate=1e-5, batch_size=64 by default), and fields of TRL's config.
    Source: Ahmadian et al. 2024, section 3 (RLOO); Shao et al. 2024, section 4.1 (GRPO); Hu et al. 2021, section 4.1.
    """
    trl = _trl(model, tokenizer)
    if algorithm not in ONLINE:
        raise ValueError(f"algorithm must be one of {', '.join(ONLINE)}, found {algorithm!r}")
    chosen, options = FineTuning.split(keywords, beta=0.05, learning_rate=1e-5, batch_size=64)
    if samples < 2 or chosen.batch_size % samples:
        raise ValueError(f"samples must be at least 2 and divide batch_size={chosen.batch_size}, found {samples}")
    check_lengths(model, tokenizer, prompts, max_new_tokens)
    needed, generator = chosen.batch_size // samples, torch.Generator().manual_seed(chosen.seed)
    # All epochs are one to TRL, whose own order would begin again where a run continues.
    order = [index for _ in range(math.ceil(chosen.epochs)) for index in torch.randperm(len(prompts), generator=generator, device="cpu").tolist()]
    order = order[: round(chosen.epochs * len(prompts))]
    if len(order) < needed:
        step = f"a step of {chosen.batch_size} responses, {samples} to each prompt"
        raise ValueError(f"{step}, needs {needed} prompts, found {len(order)} in {chosen.epochs:g} epochs")
    score, stops = as_reward(reward), listed_stop_strings(stop_strings)
    sampling: dict[str, Any] = {"num_generations": samples, "max_completion_length": max_new_tokens, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    if stops:
        # TRL looks for the end-of-sequence token alone: with it as the padding, nothing that comes after a stop string is trained on.
        sampling["generation_kwargs"] = {"stop_strings": stops, "pad_token_id": tokenizer.eos_token_id}
    fields = chosen.arguments(model, **sampling, num_train_epochs=1, shuffle_dataset=False, **options)
    settings = {"algorithm": algorithm, "epochs": chosen.epochs, "stop_strings": stops, "reward": reward_name(score), "reward_sha256": fingerprint(score)}
    settings |= {"prompts_sha256": texts_checksum(prompts), "num_prompts": len(prompts)}
    config, trainer = (getattr(trl, f"{algorithm.upper()}{part}") for part in ("Config", "Trainer"))

    def make_trainer(twin: Any, **common: Any) -> Any:
        eos_ids, own = eos_tokens(twin, {}) | {tokenizer.eos_token_id}, dict(zip(prompts, prompts, strict=True))
        if stops:
            # `generate` needs the tokenizer to find stop strings.
            twin.generate = functools.partial(twin.generate, tokenizer=tokenizer)

        def of_tokens(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
            """The reward as TRL calls it; the texts are cut and decoded as everywhere else in recontrol."""
            # TRL knows texts alone.
            prompts = [own[prompt] for prompt in prompts]
            before = tokenizer(list(prompts)).input_ids
            responses = [make_response(tokenizer, ids, new, eos_ids, stops) for ids, new in zip(before, completion_ids, strict=True)]
            return single_scores(score, prompts, [response.text for response in responses]).tolist()

        rows = required("datasets", EXTRA).Dataset.from_dict({"prompt": [prompts[index] for index in order]})
        return trainer(twin, reward_funcs=of_tokens, train_dataset=rows, **common)

    return _fine_tune(model, tokenizer, Path(out), chosen, config, fields, settings, make_trainer, progress)


def _fine_tune(
    model: Any, tokenizer: Any, out: Path, chosen: FineTuning, config: Any, fields: dict, about: dict, make_trainer: Callable[..., Any], progress: bool
) -> FineTuningRun:
    """Train an adapter on a copy of the model that shares its weights, or continue a run that was stopped, or read a finished one."""
    device, targets = model.device.type, chosen.target_modules
    lora: dict[str, Any] = {"rank": chosen.rank, "alpha": 2 * chosen.rank if chosen.alpha is None else chosen.alpha, "dropout": chosen.dropout}
    lora["target_modules"] = targets if isinstance(targets, str) else sorted(targets)
    folder = out.with_name(f"{out.name}.training")
    settings = json.loads(json.dumps({**model_settings(model, tokenizer), **fields, **about, "lora": lora}, default=str))
    finished = (out / RECORD_NAME).is_file()
    if finished or (folder / SETTINGS_NAME).is_file():
        found = FineTuningRun.read(out).settings if finished else read_json(folder / SETTINGS_NAME)
        check_same_settings(found, settings, f"{out if finished else folder} is of a run with", ignored={*IGNORED, *unknown(found, "reward_sha256")})
        if other := difference(found["base_model"], model):
            raise ValueError(f"{out if finished else folder} is of a run on another model: {other}; use another folder")
    if finished:
        return FineTuningRun.read(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something else than an adapter of this package; use another folder")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RuntimeError(f"fine-tuning runs in one process, found {os.environ['WORLD_SIZE']}: start it without a launcher")
    with writing_lock(folder), _undisturbed(model, chosen.seed, progress), PeakMemory(model.device) as memory:
        if not (folder / SETTINGS_NAME).is_file() and any(path.name != LOCK_NAME for path in folder.iterdir()):
            raise ValueError(f"{folder} is needed for checkpoints and holds something else; move it away")
        write_json(folder / SETTINGS_NAME, settings)
        while (newest := get_last_checkpoint(str(folder))) is not None and not (Path(newest) / STATE_NAME).is_file():
            # Cut off while it was written.
            shutil.rmtree(newest)
        # Trainers put adapters, hooks and a new `forward` on the model that they train.
        twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        # What the result does not depend on. The second checkpoint is for the case that the newest is cut off while it is written.
        beside = {"save_strategy": "steps", "save_steps": chosen.save_steps, "save_total_limit": 2, "logging_steps": 1, "report_to": "none"}
        beside |= {"use_cpu": device == "cpu", "dataloader_pin_memory": device == "cuda", "disable_tqdm": not progress}
        renamed = {"r": lora["rank"], "lora_alpha": lora["alpha"], "lora_dropout": lora["dropout"], "target_modules": lora["target_modules"]}
        trainer = make_trainer(
            twin,
            args=config(**{**beside, **fields, "output_dir": str(folder)}),
            processing_class=copy.deepcopy(tokenizer),
            peft_config=required("peft", EXTRA).LoraConfig(**renamed, task_type="CAUSAL_LM"),
        )
        trainer.add_callback(_Cost(memory))
        # Without a progress bar it would print each step.
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=newest)
        log, trainable = trainer.state.log_history, sum(each.numel() for each in trainer.model.parameters() if each.requires_grad)
        history = [{name: step[name] for name in KEPT if name in step} for step in log if "loss" in step]
        record = {"format": FORMAT, "settings": settings, "trainable_parameters": trainable, **log[-1]["cost"], "history": history}
        # Embeddings are never trained here; asked whether they were, PEFT would look for the base model on the hub.
        trainer.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        write_json(folder / "adapter" / RECORD_NAME, record)
        # In the place of an empty folder too.
        os.replace(folder / "adapter", out)
        shutil.rmtree(folder)
    return FineTuningRun.read(out)


class _Cost(TrainerCallback):
    """Writes time and memory over all sessions of a run into the trainer's log, and so into its checkpoints."""

    def __init__(self, memory: PeakMemory):
        self._memory, self._start = memory, time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = next((step["cost"] for step in reversed(state.log_history) if "cost" in step), {"seconds": 0.0, "peak_bytes": 0})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = self._before["seconds"] + time.perf_counter() - self._start
        state.log_history[-1]["cost"] = {"seconds": seconds, "peak_bytes": max(self._before["peak_bytes"], self._memory.bytes)}


@contextlib.contextmanager
def _undisturbed(model: Any, seed: int, progress: bool) -> Iterator[None]:
    """A seed inside; afterwards flags, generators and settings of libraries as before. No telemetry, and no warnings about the trainer's own calls."""
    datasets, hub = required("datasets", EXTRA), huggingface_hub.constants
    with contextlib.ExitStack() as after, warnings.catch_warnings(action="ignore", category=FutureWarning), seeded(seed), flags_kept(model):
        after.enter_context(shielded(gradients=True))
        after.callback(random.setstate, random.getstate())
        after.callback(numpy.random.set_state, numpy.random.get_state())
        after.callback(setattr, hub, "HF_HUB_DISABLE_TELEMETRY", hub.HF_HUB_DISABLE_TELEMETRY)
        hub.HF_HUB_DISABLE_TELEMETRY = True
        if not progress and not datasets.are_progress_bars_disabled():
            after.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield


def _trl(model: Any, tokenizer: Any) -> Any:
    """The package, once the model and the tokenizer have been checked."""
    trl = required("trl", EXTRA)
    check_uncontrolled(model)
    check_plain(model)
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError("fine-tuning needs a tokenizer with an end-of-sequence token, found none: set tokenizer.eos_token")
    return trl
