"""Fine-tuning to compare with control at test time: LoRA adapters by DPO, RLOO or GRPO, through TRL and PEFT."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recontrol.checks import first_few, required
from recontrol.data.prompts import Preference
from recontrol.data.rewards import as_reward, reward_name
from recontrol.data.sampling import token_counts
from recontrol.data.settings import model_settings, texts_checksum
from recontrol.decoding.batches import check_lengths, eos_tokens
from recontrol.decoding.responses import listed_stop_strings, make_response
from recontrol.methods.adapters import EXTRA, FineTuningRun, check_plain
from recontrol.methods.base import check_uncontrolled
from recontrol.methods.fine_tuning_run import fine_tune
from recontrol.methods.preferences import single_scores

# The online algorithms, with the classes that TRL has for them.
ONLINE = {"rloo": ("RLOOConfig", "RLOOTrainer"), "grpo": ("GRPOConfig", "GRPOTrainer")}


@dataclass(frozen=True)
class FineTuning:
    """The settings that `train_dpo` and `train_rl` share; the defaults of the first three are theirs.

    Args:
        beta: price of a nat of divergence from the model without adapter.
        learning_rate: of AdamW, falling to 0 linearly.
        batch_size: pairs, or responses, in an optimisation step.
        rank: of B A.
        alpha: the adapter's product is scaled by alpha / rank; None is twice the rank.
        dropout: on the input of A.
        target_modules: names of the layers that get an adapter; by default all linear ones but the output embedding.
        epochs: passes over the pairs or prompts; may be a fraction.
        micro_batch_size: pairs, or responses, in a forward pass; None is all of the step.
        gradient_checkpointing: compute activations twice, to keep fewer of them.
        save_steps: optimisation steps between two checkpoints.
        seed: of the adapter's first weights and the order of the pairs or prompts.

    Raises:
        ValueError: sizes below 1, or that do not divide.
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
    def split(cls, defaults: dict[str, Any], keywords: dict[str, Any]) -> tuple["FineTuning", dict[str, Any]]:
        """The settings among some keywords, and the other keywords, which are fields of the trainer's config."""
        names = {each.name for each in dataclasses.fields(cls)}
        given = {name: setting for name, setting in keywords.items() if name in names}
        return cls(**{**defaults, **given}), {name: option for name, option in keywords.items() if name not in names}

    def lora(self) -> tuple[Any, dict[str, Any]]:
        """The config of PEFT, and its description in the record of a run."""
        targets = self.target_modules if isinstance(self.target_modules, str) else sorted(self.target_modules)
        described = {"rank": self.rank, "alpha": 2 * self.rank if self.alpha is None else self.alpha, "dropout": self.dropout, "target_modules": targets}
        config = required("peft", EXTRA).LoraConfig
        chosen = {"r": self.rank, "lora_alpha": described["alpha"], "lora_dropout": self.dropout, "target_modules": targets}
        return config(**chosen, task_type="CAUSAL_LM"), described

    def arguments(self, model: Any, options: dict[str, Any], **chosen: Any) -> dict[str, Any]:
        """The fields of a trainer's config that the result depends on; `chosen` are those of one algorithm, `options` those of the caller."""
        at_once = self.micro_batch_size or self.batch_size
        fields = {
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": self.batch_size // at_once,
            "gradient_checkpointing": self.gradient_checkpointing,
            # The dtype of the model's own weights; those of the adapter are float32.
            "bf16": model.dtype == torch.bfloat16,
            "fp16": model.dtype == torch.float16,
            "disable_dropout": True,
            "seed": self.seed,
            "beta": self.beta,
            **chosen,
        }
        taken = sorted(options.keys() & {*fields, *self.place(Path(), model, False)})
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be among the options of the trainer: set here, or an argument under another name")
        return {**fields, **options}

    def place(self, folder: Path, model: Any, progress: bool) -> dict[str, Any]:
        """The fields of a trainer's config that the result does not depend on."""
        return {
            "output_dir": str(folder),
            "save_strategy": "steps",
            "save_steps": self.save_steps,
            # One more than is needed, in case the newest is cut off while it is written.
            "save_total_limit": 2,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": not progress,
            "use_cpu": model.device.type == "cpu",
            "dataloader_pin_memory": model.device.type == "cuda",
        }


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

    p is the model with the adapter, p0 without. The same call continues a run that was stopped from its last checkpoint, and reads one that is
    finished. The model, its tokenizer and the caller's generators are left as they were; weights are not copied.

    Args:
        model: a causal language model without adapters.
        tokenizer: its tokenizer, with an end-of-sequence token.
        pairs: of `make_preference_pairs`, or of `load_pairs`. Prompt and response are tokenised together.
        out: the folder of the adapter; checkpoints are in a folder beside it until it is there.
        max_length: tokens of prompt and response together; responses are cut there, and at the end of the model's context.
        add_eos: put an end-of-sequence token behind each response that has none: for pairs of whole responses from a data set. Pairs of
            `make_preference_pairs` have it where the model wrote it.
        progress: show a progress bar.
        keywords: settings of `FineTuning` (by default beta=0.1, learning_rate=5e-6, batch_size=16), and further fields of `trl.DPOConfig`, for
            example warmup_steps=0.1.

    Returns:
        The run, with its cost; `FineTuned` makes a method of its folder.

    Raises:
        ImportError: the extra `fine-tuning` (the packages trl and peft) is not installed.
        ValueError: no pairs, pairs of equal responses or whose prompts fill `max_length` (they are named), a tokenizer without end-of-sequence
            token, sizes that do not divide, an option that is an argument here, a model with adapters or under control, or a folder that holds
            something else.
        RuntimeError: another run is writing into the folder, or this is one of several processes.

    Source: Rafailov et al. 2023, equation 7; Hu et al. 2021, section 4.1.
    """
    trl = required("trl", EXTRA)
    chosen, options = FineTuning.split({"beta": 0.1, "learning_rate": 5e-6, "batch_size": 16}, keywords)
    lora, described = chosen.lora()
    _check_model(model, tokenizer)
    pairs = [Preference(*pair) for pair in pairs]
    longest = min(max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_length)
    _check_pairs(tokenizer, pairs, longest)
    fields = chosen.arguments(model, options, max_length=longest)
    settings = {"algorithm": "dpo", **fields, "add_eos": add_eos, "lora": described, "pairs_sha256": texts_checksum(pairs), "num_pairs": len(pairs)}

    def make_trainer(twin: Any, tokenizer: Any, folder: Path) -> Any:
        ends = [{f"{name}_ends": add_eos or getattr(pair, name).endswith(tokenizer.eos_token) for name in ("chosen", "rejected")} for pair in pairs]
        rows = required("datasets", EXTRA).Dataset.from_list([{**pair._asdict(), **end} for pair, end in zip(pairs, ends, strict=True)])
        arguments = trl.DPOConfig(**fields, **chosen.place(folder, model, progress))
        trainer = trl.DPOTrainer(twin, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
        # TRL ends every response; one that was cut at max_new_tokens would teach the model to stop there.
        trainer.train_dataset = trainer.train_dataset.map(_without_added_eos)
        return trainer

    keep = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    return fine_tune(model, tokenizer, out, {**model_settings(model, tokenizer), **settings}, make_trainer, keep=keep, progress=progress)


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
    deviation, and has the KL in the loss. Both clip the ratio of probabilities as PPO does, which TRL no longer has (pull request 7020 of huggingface/trl).

    Sampling is from the whole distribution. The same call continues a run that was stopped from its last checkpoint, and reads one that is finished.
    The model, its tokenizer and the caller's generators are left as they were; weights are not copied.

    Args:
        model: a causal language model without adapters.
        tokenizer: its tokenizer, with an end-of-sequence token.
        prompts: the texts to respond to, at least the `batch_size / samples` of a step; an incomplete last step is left out.
        reward: see `as_reward`; one score a response.
        out: the folder of the adapter; checkpoints are in a folder beside it until it is there.
        algorithm: "rloo" or "grpo".
        max_new_tokens: length of a response at most, in tokens.
        samples: responses to each prompt, at least 2.
        temperature: of sampling.
        stop_strings: strings at which a response ends; it is cut before the first token that touches one.
        progress: show a progress bar.
        keywords: settings of `FineTuning` (by default beta=0.05, learning_rate=1e-5, batch_size=64), and further fields of `trl.RLOOConfig` or
            `trl.GRPOConfig`.

    Returns:
        The run, with its cost; `FineTuned` makes a method of its folder.

    Raises:
        ImportError: the extra `fine-tuning` (the packages trl and peft) is not installed.
        ValueError: another algorithm, too few prompts, prompts that are empty or too long, a tokenizer without end-of-sequence token, sizes that
            do not divide, an option that is an argument here, a model with adapters or under control, a folder that holds something else, or a
            reward that returns NaN, the wrong count or several scores a response.
        RuntimeError: another run is writing into the folder, or this is one of several processes.

    Source: Ahmadian et al. 2024, section 3 (RLOO); Shao et al. 2024, section 4.1 (GRPO); Hu et al. 2021, section 4.1.
    """
    trl = required("trl", EXTRA)
    if algorithm not in ONLINE:
        raise ValueError(f"algorithm must be one of {', '.join(ONLINE)}, found {algorithm!r}")
    chosen, options = FineTuning.split({"beta": 0.05, "learning_rate": 1e-5, "batch_size": 64}, keywords)
    lora, described = chosen.lora()
    if samples < 2 or chosen.batch_size % samples:
        raise ValueError(f"samples must be at least 2 and divide batch_size={chosen.batch_size}, found {samples}")
    _check_model(model, tokenizer)
    check_lengths(model, tokenizer, prompts, max_new_tokens)
    order = _order(len(prompts), chosen, samples)
    score, stops = as_reward(reward), listed_stop_strings(stop_strings)
    sampling: dict[str, Any] = {"num_generations": samples, "max_completion_length": max_new_tokens, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    if stops:
        # TRL looks for the end-of-sequence token alone: with it as the padding, nothing that comes after a stop string is trained on.
        sampling["generation_kwargs"] = {"stop_strings": stops, "pad_token_id": tokenizer.eos_token_id}
    # All epochs are one to TRL, whose own order would begin again where a run continues.
    fields = chosen.arguments(model, options, **sampling, num_train_epochs=1, shuffle_dataset=False)
    settings = {"algorithm": algorithm, **fields, "epochs": chosen.epochs, "lora": described, "stop_strings": stops, "reward": reward_name(score)}
    settings |= {"prompts_sha256": texts_checksum(prompts), "num_prompts": len(prompts)}

    def make_trainer(twin: Any, tokenizer: Any, folder: Path) -> Any:
        if stops:
            # `generate` needs the tokenizer to find stop strings.
            twin.generate = functools.partial(twin.generate, tokenizer=tokenizer)
        config, trainer = (getattr(trl, name) for name in ONLINE[algorithm])
        return trainer(
            twin,
            reward_funcs=_reward_of_tokens(score, tokenizer, eos_tokens(twin, {}) | {tokenizer.eos_token_id}, stops),
            args=config(**fields, **chosen.place(folder, model, progress)),
            train_dataset=required("datasets", EXTRA).Dataset.from_dict({"prompt": [prompts[index] for index in order]}),
            processing_class=tokenizer,
            peft_config=lora,
        )

    keep = ("reward", "reward_std", "kl", "entropy", "completions/mean_length")
    return fine_tune(model, tokenizer, out, {**model_settings(model, tokenizer), **settings}, make_trainer, keep=keep, progress=progress)


def _reward_of_tokens(score: Callable[..., Any], tokenizer: Any, eos_ids: set[int], stops: list[str]) -> Callable[..., list[float]]:
    """The reward as TRL calls it; the texts are cut and decoded as everywhere else in recontrol."""

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        before = tokenizer(list(prompts)).input_ids
        responses = [make_response(tokenizer, ids, new, eos_ids, stops) for ids, new in zip(before, completion_ids, strict=True)]
        return single_scores(score, prompts, [response.text for response in responses]).tolist()

    return reward


def _order(count: int, chosen: FineTuning, samples: int) -> list[int]:
    """The prompts of all epochs, each epoch in its own order."""
    generator = torch.Generator().manual_seed(chosen.seed)
    permutations = [torch.randperm(count, generator=generator) for _ in range(math.ceil(chosen.epochs))]
    order = torch.cat(permutations)[: round(chosen.epochs * count)].tolist() if permutations else []
    needed = chosen.batch_size // samples
    if len(order) < needed:
        raise ValueError(
            f"a step of {chosen.batch_size} responses, {samples} to each prompt, needs {needed} prompts, found {len(order)} in {chosen.epochs:g} epochs"
        )
    return order


def _without_added_eos(row: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_ids": row[f"{name}_ids"] if row[f"{name}_ends"] else row[f"{name}_ids"][:-1] for name in ("chosen", "rejected")}


def _check_pairs(tokenizer: Any, pairs: Sequence[Preference], longest: int) -> None:
    if not pairs:
        raise ValueError("there are no pairs to train on")
    equal = [index for index, pair in enumerate(pairs) if pair.chosen == pair.rejected]
    if equal:
        raise ValueError(f"{len(equal)} pairs have equal responses, so that there is nothing to prefer: {first_few(equal)}")
    too_long = [index for index, count in enumerate(token_counts(tokenizer, [pair.prompt for pair in pairs])) if count >= longest]
    if too_long:
        raise ValueError(f"{len(too_long)} pairs have prompts that leave no room for a response in {longest} tokens: {first_few(too_long)}")


def _check_model(model: Any, tokenizer: Any) -> None:
    check_uncontrolled(model)
    check_plain(model)
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError("fine-tuning needs a tokenizer with an end-of-sequence token, found none: set tokenizer.eos_token")
