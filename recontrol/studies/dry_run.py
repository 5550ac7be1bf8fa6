"""A study on small random models and data that are made here: proof that all of it runs, before hours are spent on it."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from recontrol.data.rewards.model import HEAD
from recontrol.files import write_aside
from recontrol.studies.study import ModelSection, RewardSection, SourceSection, Study

# What prompts are made of.
TEXT = "the a my one people film story question answer help think say make want know good bad fair kind honest why how when who not never very"
WORDS = TEXT.split()
# Prompts of each part, tokens of a response, and units of a hidden layer.
COUNTS, NEW_TOKENS, WIDTH = {"train": 24, "validation": 6, "test": 8}, 8, 32
# Of the tokenizer.
TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
# What fine-tuning is cut down to.
FINE_TUNING = {"batch_size": 4, "epochs": 1, "rank": 2, "micro_batch_size": None}


def small(study: Study, out: Path) -> Study:
    """The same study, with models and data made in a folder; architectures, columns, methods and settings stay, coherence and win rate are left out."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    # A study with a value function of its own has no prompts for training.
    sources = {"train": study.prompts.train or study.prompts.test, "validation": study.prompts.validation, "test": study.prompts.test}
    files: dict[str, Any] = {name: source and _source(source, out, name) for name, source in sources.items()}
    made = ByteLevelBPETokenizer()
    # Without a bar, which it would print.
    made.train_from_iterator([TEXT] * 4, vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    rewards = [_save_reward(name, tokenizer, out / f"reward-{number}") for number, name in enumerate(study.reward.names)]
    return dataclasses.replace(
        study,
        model=ModelSection(_save_model(study.model.name, tokenizer, out / "lm"), "float32", "cpu"),
        prompts=dataclasses.replace(study.prompts, **files, chat_template=False),
        reward=RewardSection(rewards, study.reward.head_weights, 4, study.reward.template),
        methods=[_small_method(entry) for entry in study.methods],
        generation=dataclasses.replace(study.generation, max_new_tokens=NEW_TOKENS, batch_size=4),
        train={**study.train, "hidden_dims": [WIDTH] * len(study.train.get("hidden_dims", (0,))), "epochs": 2},
        value=None,
        encoder=None,
        wins=None,
    )


def _small_method(entry: dict[str, Any]) -> dict[str, Any]:
    """Training is cut short; a list of settings is cut to two, which is enough to choose."""
    cut = {name: given[:2] if isinstance(given, list) and name not in ("head_weights", "examples") else given for name, given in entry.items()}
    return {**cut, **(FINE_TUNING if entry.get("method") in ("dpo", "rloo", "grpo") else {})}


def _source(source: SourceSection, out: Path, name: str) -> SourceSection:
    """A file with the columns of the source, as far as prompts and references are read from them."""
    generator = random.Random(name)

    def text(low: int, high: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))

    rows: list[dict[str, Any]] = []
    for _ in range(COUNTS[name]):
        if "hh-rlhf" in source.source.lower():
            dialogue = f"\n\nHuman: {text(4, 12)}?\n\nAssistant:"
            rows.append({"chosen": f"{dialogue} {text(3, 8)}.", "rejected": f"{dialogue} {text(3, 8)}."})
        elif "shp" in source.source.lower():
            rows.append({"history": text(6, 20), "human_ref_A": text(3, 8), "human_ref_B": text(3, 8), "labels": generator.randint(0, 1)})
        else:
            rows.append({"prompt": text(4, 12)})
    path = out / f"{name}.jsonl"
    with write_aside(path) as aside:
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SourceSection(str(path), "train", None)


def _save_model(name: str, tokenizer: Any, path: Path) -> str:
    """A model of the architecture that the name says: Falcon's, else Llama's, whose own Vicuna and Llama 3 are."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    if "falcon" in name.lower():
        config: Any = AutoConfig.for_model("falcon", **sizes, **TOKENS, multi_query=True, parallel_attn=True, new_decoder_architecture=False)
    else:
        config = LlamaConfig(**sizes, **TOKENS, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=1024)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def _save_reward(name: str, tokenizer: Any, path: Path) -> str:
    """UltraRM's architecture, else a sequence classifier."""
    layers: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 1}
    config = LlamaConfig(**layers, **TOKENS, vocab_size=len(tokenizer), max_position_embeddings=1024)
    model = LlamaForSequenceClassification(config)
    weights = {weight.replace("score", HEAD) if "ultrarm" in name.lower() else weight: tensor for weight, tensor in model.state_dict().items()}
    model.save_pretrained(path, state_dict=weights)
    tokenizer.save_pretrained(path)
    return str(path)
