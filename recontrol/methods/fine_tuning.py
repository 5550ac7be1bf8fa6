"""Fine-tuning as the reference beside control at test time: LoRA adapters by DPO, or by RLOO or GRPO in the place of PPO, through TRL and PEFT."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from recontrol.data.batches import some
from recontrol.data.pairs import Preference
from recontrol.data.rewards import as_reward, reward_name
from recontrol.data.sampling import token_counts
from recontrol.data.settings import model_settings, texts_checksum
from recontrol.decoding.batches import check_lengths, eos_tokens
from recontrol.decoding.model_config import context_length
from recontrol.decoding.responses import listed_stop_strings, make_response
from recontrol.methods.fine_tuning_run import FineTuningRun, check_plain, fine_tune, fine_tuning_package
from recontrol.methods.preferences import check_uncontrolled, single_scores

# The online algorithms, with the classes that TRL has for them.
ONLINE = {"rloo": ("RLOOConfig", "RLOOTrainer"), "grpo": ("GRPOConfig", "GRPOTrainer")}


def train_dpo(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Preference],
    out: str | os.PathLike,
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    beta: float = 0.1,
    learning_rate: float = 5e-6,
    epochs: float = 1,
    batch_size: int = 16,
    micro_batch_size: int | None = None,
    max_length: int = 1024,
    add_eos: bool = False,
    gradient_checkpointing: bool = True,
    save_steps: int = 100,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> FineTuningRun:
    r"""Train a LoRA adapter on preferences: the mean of -log sigmoid(beta (log p(y+|x)/p0(y+|x) - log p(y-|x)/p0(y-|x))) goes down.

    p is the model with the adapter, p0 without. A run that was stopped goes on from its last checkpoint by the same call; one that is
    finished is read. The model, its tokenizer and the caller's generators are left as they were; weights are not copied.

    Args:
        model: a causal language model without adapters.
        tokenizer: its tokenizer, with an end-of-sequence token.
        pairs: of `make_preference_pairs`, or of `load_pairs`. Prompt and response are tokenised together.
        out: the folder of the adapter; checkpoints are in a folder beside it until it is there.
        rank: of B A.
        alpha: the adapter's product is scaled by alpha / rank; None is twice the rank.
        dropout: on the input of A.
        target_modules: names of the layers that get an adapter; by default all linear ones but the output embedding.
        beta: how much the adapter is held to p0.
        learning_rate: of AdamW, falling to 0 linearly.
        epochs: passes over the pairs; may be a fraction.
        batch_size: pairs in an optimisation step.
        micro_batch_size: pairs in a forward pass; None is all of the step.
        max_length: tokens of prompt and response together; responses are cut there, and at the end of the model's context.
        add_eos: put an end-of-sequence token behind each response that has none: for pairs of whole responses from a data set. Pairs of
            `make_preference_pairs` have it where the model wrote it.
        gradient_checkpointing: compute activations twice, to keep fewer of them.
        save_steps: optimisation steps between two checkpoints.
        seed: of the adapter's first weights and the order of the pairs.
        progress: show a progress bar.
        options: further fields of `trl.DPOConfig`, for example warmup_steps=0.1.

    Returns:
        The run, with what it cost; `adapter` puts its result on the model.

    Raises:
        ImportError: the extra `fine-tuning` (the packages trl and peft) is not installed.
        ValueError: no pairs, pairs of equal responses or whose prompts fill `max_length` (they are named), a tokenizer without end-of-sequence
            token, sizes that do not divide, an option that is an argument here, a model with adapters or under control, or a folder that holds
            something else.
        RuntimeError: another run is writing into the folder, or this is one of several processes.

    Source: Rafailov et al. 2023, equation 7; Hu et al. 2021, section 4.1.
    """
    trl, peft = fine_tuning_package("trl"), fine_tuning_package("peft")
    _check_sizes(batch_size, micro_batch_size)
    _check_model(model, tokenizer)
    pairs = [Preference(*pair) for pair in pairs]
    if not pairs:
        raise ValueError("there are no pairs to train on")
    equal = [index for index, pair in enumerate(pairs) if pair.chosen == pair.rejected]
    if equal:
        raise ValueError(f"{len(equal)} pairs have equal responses, so that there is nothing to prefer: {some(equal)}")
    context = context_length(model.config) or max_length
    longest = min(max_length, context)
    too_long = [index for index, count in enumerate(token_counts(tokenizer, [pair.prompt for pair in pairs])) if count >= longest]
    if too_long:
        raise ValueError(f"{len(too_long)} pairs have prompts that leave no room for a response in {longest} tokens: {some(too_long)}")
    lora = _lora(peft, rank, alpha, dropout, target_modules)
    chosen = _arguments(model, learning_rate, epochs, batch_size, micro_batch_size, gradient_checkpointing, seed)
    chosen = _with_options({**chosen, "beta": beta, "max_length": longest}, options)
    settings = {"algorithm": "dpo", **chosen, "add_eos": add_eos, "lora": _described(lora), "pairs_sha256": texts_checksum(pairs), "num_pairs": len(pairs)}

    def make_trainer(twin: Any, tokenizer: Any, folder: Path) -> Any:
        from datasets import Dataset

        ends = [{f"{name}_ends": add_eos or getattr(pair, name).endswith(tokenizer.eos_token) for name in ("chosen", "rejected")} for pair in pairs]
        rows = Dataset.from_list([{**pair._asdict(), **end} for pair, end in zip(pairs, ends, strict=True)])
        arguments = trl.DPOConfig(**chosen, **_where(folder, model, save_steps, progress))
        trainer = trl.DPOTrainer(twin, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
        # TRL ends every response; one that was cut at the most tokens allowed would teach the model to stop there.
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
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    beta: float = 0.05,
    learning_rate: float = 1e-5,
    epochs: float = 1,
    batch_size: int = 64,
    micro_batch_size: int | None = None,
    temperature: float = 1.0,
    stop_strings: Sequence[str] | None = None,
    gradient_checkpointing: bool = True,
    save_steps: int = 100,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> FineTuningRun:
    r"""Train a LoRA adapter on the reward of the model's own responses: the mean of r(x, y) - beta log(p(y|x) / p0(y|x)) goes up.

    RLOO, the default, takes as the baseline of a response the mean over the other responses to its prompt; GRPO takes that of all, divides by
    their standard deviation, and has the KL in the loss. Both clip the ratio of probabilities as PPO does. PPO itself is no longer in TRL: its
    trainer went to `trl.experimental` in 2025 and was removed in 2026 as unmaintained (pull request 7020 of huggingface/trl). Its critic, a second
    model to train, is what RLOO replaces by more samples; the authors of RLOO found it no worse than PPO at less memory.

    Sampling is from the whole distribution. A run that was stopped goes on from its last checkpoint by the same call; one that is finished
    is read. The model, its tokenizer and the caller's generators are left as they were; weights are not copied.

    Args:
        model: a causal language model without adapters.
        tokenizer: its tokenizer, with an end-of-sequence token.
        prompts: the texts to respond to, at least as many as a step needs, which is `batch_size / samples`; a step that the last ones do not fill is left out.
        reward: see `as_reward`; one score a response.
        out: the folder of the adapter; checkpoints are in a folder beside it until it is there.
        algorithm: "rloo" or "grpo".
        max_new_tokens: length of a response at most, in tokens.
        samples: responses to each prompt, at least 2.
        rank: of B A.
        alpha: the adapter's product is scaled by alpha / rank; None is twice the rank.
        dropout: on the input of A.
        target_modules: names of the layers that get an adapter; by default all linear ones but the output embedding.
        beta: price of a nat of KL to the model without adapter.
        learning_rate: of AdamW, falling to 0 linearly.
        epochs: passes over the prompts; may be a fraction.
        batch_size: responses in an optimisation step, generated at once.
        micro_batch_size: responses in a forward pass of training; None is all of the step.
        temperature: of sampling.
        stop_strings: strings at which a response ends; the reward is that of the text before, cut as elsewhere.
        gradient_checkpointing: compute activations twice, to keep fewer of them.
        save_steps: optimisation steps between two checkpoints.
        seed: of the adapter's first weights, the order of the prompts, and sampling.
        progress: show a progress bar.
        options: further fields of `trl.RLOOConfig` or `trl.GRPOConfig`, for example max_steps=500.

    Returns:
        The run, with what it cost; `adapter` puts its result on the model.

    Raises:
        ImportError: the extra `fine-tuning` (the packages trl and peft) is not installed.
        ValueError: another algorithm, too few prompts, prompts that are empty or too long, a tokenizer without end-of-sequence token, sizes that
            do not divide, an option that is an argument here, a model with adapters or under control, a folder that holds something else, or a
            reward that returns NaN, the wrong count or several scores a response.
        RuntimeError: another run is writing into the folder, or this is one of several processes.

    Source: Ahmadian et al. 2024, section 3 (RLOO); Shao et al. 2024, section 4.1 (GRPO); Hu et al. 2021, section 4.1.
    """
    trl, peft = fine_tuning_package("trl"), fine_tuning_package("peft")
    if algorithm not in ONLINE:
        raise ValueError(f"algorithm must be one of {', '.join(ONLINE)}, found {algorithm!r}")
    _check_sizes(batch_size, micro_batch_size)
    if samples < 2 or batch_size % samples:
        raise ValueError(f"samples must be at least 2 and divide batch_size={batch_size}, found {samples}")
    _check_model(model, tokenizer)
    check_lengths(model, tokenizer, prompts, max_new_tokens)
    order = _order(len(prompts), epochs, seed)
    if len(order) < batch_size // samples:
        raise ValueError(
            f"a step of {batch_size} responses, {samples} to each prompt, needs {batch_size // samples} prompts, found {len(order)} in {epochs:g} epochs"
        )
    score, stops = as_reward(reward), listed_stop_strings(stop_strings)
    lora = _lora(peft, rank, alpha, dropout, target_modules)
    # All epochs are one to TRL, whose own order would begin anew where a run goes on.
    chosen = _arguments(model, learning_rate, 1, batch_size, micro_batch_size, gradient_checkpointing, seed) | {"shuffle_dataset": False}
    chosen |= {"beta": beta, "num_generations": samples, "max_completion_length": max_new_tokens, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    if stops:
        # TRL looks for the end-of-sequence token alone: with it as the filling, nothing that comes after a stop string is trained on.
        chosen["generation_kwargs"] = {"stop_strings": stops, "pad_token_id": tokenizer.eos_token_id}
    chosen = _with_options(chosen, options)
    settings = {"algorithm": algorithm, **chosen, "epochs": epochs, "lora": _described(lora), "stop_strings": stops, "reward": reward_name(score)}
    settings |= {"prompts_sha256": texts_checksum(prompts), "num_prompts": len(prompts)}

    def make_trainer(twin: Any, tokenizer: Any, folder: Path) -> Any:
        from datasets import Dataset

        if stops:
            # It wants to know how tokens are written to find stop strings.
            twin.generate = functools.partial(twin.generate, tokenizer=tokenizer)
        config, trainer = (getattr(trl, name) for name in ONLINE[algorithm])
        return trainer(
            twin,
            reward_funcs=_reward_of_tokens(score, tokenizer, eos_tokens(twin, {}) | {tokenizer.eos_token_id}, stops),
            args=config(**chosen, **_where(folder, model, save_steps, progress)),
            train_dataset=Dataset.from_dict({"prompt": [prompts[index] for index in order]}),
            processing_class=tokenizer,
            peft_config=lora,
        )

    keep = ("reward", "reward_std", "kl", "entropy", "completions/mean_length")
    return fine_tune(model, tokenizer, out, {**model_settings(model, tokenizer), **settings}, make_trainer, keep=keep, progress=progress)


def _reward_of_tokens(score: Callable[..., Any], tokenizer: Any, eos_ids: set[int], stops: list[str]) -> Callable[..., list[float]]:
    """The reward as TRL calls it; the texts are cut and decoded as they are everywhere else here, not as TRL does."""

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        before = tokenizer(list(prompts)).input_ids
        responses = [make_response(tokenizer, ids, new, eos_ids, stops) for ids, new in zip(before, completion_ids, strict=True)]
        return single_scores(score, prompts, [response.text for response in responses]).tolist()

    return reward


def _order(count: int, epochs: float, seed: int) -> list[int]:
    """The prompts of all epochs, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    permutations = [torch.randperm(count, generator=generator) for _ in range(math.ceil(epochs))]
    return torch.cat(permutations)[: round(epochs * count)].tolist() if permutations else []


def _without_added_eos(row: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_ids": row[f"{name}_ids"] if row[f"{name}_ends"] else row[f"{name}_ids"][:-1] for name in ("chosen", "rejected")}


def _lora(peft: Any, rank: int, alpha: float | None, dropout: float, target_modules: str | Sequence[str]) -> Any:
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    scale = 2 * rank if alpha is None else alpha
    return peft.LoraConfig(r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")


def _described(lora: Any) -> dict[str, Any]:
    targets = lora.target_modules if isinstance(lora.target_modules, str) else sorted(lora.target_modules)
    return {"rank": lora.r, "alpha": lora.lora_alpha, "dropout": lora.lora_dropout, "target_modules": targets}


def _arguments(
    model: Any, learning_rate: float, epochs: float, batch_size: int, micro_batch_size: int | None, gradient_checkpointing: bool, seed: int
) -> dict[str, Any]:
    """Fields of a trainer's config that the result depends on."""
    at_once = micro_batch_size or batch_size
    return {
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": batch_size // at_once,
        "gradient_checkpointing": gradient_checkpointing,
        # The dtype of the model's own weights; those of the adapter are float32.
        "bf16": model.dtype == torch.bfloat16,
        "fp16": model.dtype == torch.float16,
        "disable_dropout": True,
        "seed": seed,
    }


def _where(folder: Path, model: Any, save_steps: int, progress: bool) -> dict[str, Any]:
    """Fields of a trainer's config that the result does not depend on."""
    return {
        "output_dir": str(folder),
        "save_strategy": "steps",
        "save_steps": save_steps,
        # One more than is needed, in case the newest is cut off while it is written.
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": not progress,
        "use_cpu": model.device.type == "cpu",
        "dataloader_pin_memory": model.device.type == "cuda",
    }


def _with_options(chosen: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    taken = sorted(options.keys() & {*chosen, "output_dir", "report_to", "save_strategy", "logging_steps", "disable_tqdm", "use_cpu"})
    if taken:
        raise ValueError(f"{', '.join(taken)} cannot be among the options of the trainer: set here, or an argument under another name")
    return {**chosen, **options}


def _check_sizes(batch_size: int, micro_batch_size: int | None) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    if micro_batch_size is not None and (micro_batch_size < 1 or batch_size % micro_batch_size):
        raise ValueError(f"micro_batch_size must divide batch_size={batch_size}, found {micro_batch_size}")


def _check_model(model: Any, tokenizer: Any) -> None:
    check_uncontrolled(model)
    check_plain(model)
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError("fine-tuning needs a tokenizer with an end-of-sequence token, found none: set tokenizer.eos_token")
