"""Rewards from a sequence classifier of transformers, UltraRM's architecture included."""

import copy
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recontrol.data.dialogue import fill, joined, render, turns_of
from recontrol.data.rewards.checks import check_fields
from recontrol.decoding.loading import loader_arguments
from recontrol.decoding.model_config import context_length, padding_token, set_padding_token, vocabulary_size

logger = logging.getLogger(__name__)

# UltraRM (Cui et al. 2023, UltraFeedback): r(text) = w . o_T, with o_T the last hidden state (after the final norm) of the last token. Such a
# checkpoint is a sequence classifier of Llama's architecture whose head has this name; its training data were written like this.
HEAD, TEMPLATE = "regression_head", "Human: {prompt}\nAssistant: {response}"


class RewardModel:
    """Scores prompt and response, read together as one text, with a sequence classifier. One label is one reward.

    Args:
        model, tokenizer: a model with a sequence-classification head, which returns `logits` of (batch, labels), and its tokenizer, which is copied.
        batch_size: texts in one forward call.
        max_length: tokens that a text keeps, its last ones, special tokens included; by default what the model and its tokenizer allow.
        template: how the text is written: None, the prompt with the response after it; a text with {prompt} and {response}, whose marks are written
            before each turn (a prompt that has them already is left as it is); or "chat", the tokenizer's chat template. For a prompt written with the
            language model's chat template, None is "chat" where the tokenizer has a chat template, else the marks of HH-RLHF.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int = 16, max_length: int | None = None, template: str | None = None):
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise ValueError(f"batch_size and max_length must be at least 1, found {batch_size} and {max_length}")
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"the reward model's tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template")
        if template not in (None, "chat"):
            check_fields("template of the reward model", template, {"prompt", "response"})
        self.model, self.batch_size, self.template = model, batch_size, template
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.truncation_side = "left"
        self._cut = False
        config: Any = model.config
        if (padding := padding_token(config)) is not None:
            set_padding_token(config, padding)
        limit = min(limit for limit in (context_length(config), self.tokenizer.model_max_length, max_length) if limit is not None)
        # A tokenizer that knows no limit says 1e30.
        self.max_length = limit if limit < 1e9 else None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        template: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        **kwargs: Any,
    ) -> "RewardModel":
        r"""Load any `AutoModelForSequenceClassification`, or a model of UltraRM's architecture, and its tokenizer, from a folder or the hub.

        `device` (by default the CPU) and `dtype` (by default as saved) are the model's, `kwargs` go to `from_pretrained`; for UltraRM's architecture
        the template None is "Human: {prompt}\nAssistant: {response}". OSError, ValueError: there is no such model, or it has no head that scores.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        load: Any = AutoModelForSequenceClassification.from_pretrained
        model, report = load(name_or_path, dtype=dtype, output_loading_info=True, **kwargs)
        if report["missing_keys"] and f"{HEAD}.weight" in report["unexpected_keys"] and model.config.model_type == "llama":
            # Two of them may not fit into memory.
            del model
            # Its checkpoints do not say how many labels they have, and two is what a config says by default.
            names = {rf"^{HEAD}\.": "score."}
            model, report = load(name_or_path, dtype=dtype, output_loading_info=True, num_labels=1, key_mapping=names, **kwargs)
            template = TEMPLATE if template is None else template
        missing = set(report["missing_keys"])
        # Where an adapter brings the head, it is loaded after this report was made.
        if missing and not getattr(model, "_hf_peft_config_loaded", False):
            found = f"its checkpoint has no weights for {', '.join(sorted(missing)[:4])}, which would be random numbers"
            raise ValueError(f"{name_or_path} is no reward model: {found}; wanted a sequence classifier, or a Llama model with a regression_head")
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **loader_arguments(kwargs))
        return cls(model if device is None else model.to(device), tokenizer, batch_size, max_length, template)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float] | list[list[float]]:
        """Score each response together with its prompt: one float a response, or with several labels one list of floats."""
        texts = [self._write(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        # Weights that are kept elsewhere are on no device.
        device = next((weights.device for weights in self.model.parameters() if not weights.is_meta), torch.device("cpu"))
        config, training = self.model.config, self.model.training
        padding = padding_token(config)
        self.model.eval()
        scores: list[Tensor] = []
        try:
            for start in range(0, len(texts), self.batch_size):
                columns = self._tokens(texts[start : start + self.batch_size])
                if padding is None:
                    # The classifier reads the last token that is no padding: any token is one that ends no text.
                    ends = {row[-1] for row in columns["input_ids"] if row}
                    set_padding_token(config, min(set(range(len(ends) + 1)) - ends))
                width, filling = max(1, *map(len, columns["input_ids"])), {"input_ids": padding_token(config)}
                padded = {name: [[*row, *[filling.get(name, 0)] * (width - len(row))] for row in rows] for name, rows in columns.items()}
                with torch.no_grad():
                    scores.append(self.model(**{name: torch.tensor(rows).to(device) for name, rows in padded.items()}).logits.float().cpu())
        finally:
            self.model.train(training)
            if padding is None:
                set_padding_token(config, None)
        table = torch.cat(scores) if scores else torch.empty(0, len(self.head_names), device="cpu")
        return table[:, 0].tolist() if table.shape[1] == 1 else table.tolist()

    def _tokens(self, texts: list[str]) -> Any:
        """The tokens of some texts, without the beginning of those that are too long; a tokenizer of another model is refused."""
        columns = self.tokenizer(texts, verbose=False)
        long = [row for row, ids in enumerate(columns["input_ids"]) if self.max_length is not None and len(ids) > self.max_length]
        if long:
            if not self._cut:
                logger.warning("%d of %d texts lost their beginning: the reward model %s reads %d tokens", len(long), len(texts), self.name, self.max_length)
            self._cut = True
            columns = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        # On a GPU the embedding would not say what is wrong, and would leave the device unusable.
        known, largest = vocabulary_size(self.model.config), max((max(ids, default=0) for ids in columns["input_ids"]), default=0)
        if isinstance(known, int) and largest >= known:
            raise ValueError(f"the tokenizer of the reward model {self.name} makes token {largest}, the model has {known}: it is another model's")
        return columns

    def _write(self, prompt: str, response: str) -> str:
        """Prompt and response as the one text that the model reads."""
        template = self.template
        if template is None and getattr(prompt, "chat_template", False) and getattr(self.tokenizer, "chat_template", None):
            template = "chat"
        if template != "chat":
            return fill(template or "{prompt}{response}", prompt, response)
        turns, begun = turns_of(prompt)
        return render(self.tokenizer, joined([*turns, ("assistant", begun + response)]))

    @property
    def name(self) -> str:
        """What the model was loaded from, and the template if there is one."""
        name = str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)
        return name if self.template is None else f"{name}, template {self.template!r}"

    @property
    def identity(self) -> Any:
        """All that a score depends on."""
        return [self.model, self.tokenizer, self.template, self.max_length]

    @property
    def head_names(self) -> list[str]:
        """One name a label: that of the model, with several labels followed by the label's."""
        labels = getattr(self.model.config, "id2label", None) or {0: ""}
        return [f"{self.name}: {labels[key]}" for key in sorted(labels, key=int)] if len(labels) > 1 else [self.name]
