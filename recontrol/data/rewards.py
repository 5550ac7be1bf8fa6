"""Rewards of responses: any callable, or any sequence classifier of transformers."""

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Reward = Callable[[list[str], list[str]], Any]


class RewardModel:
    """Scores prompt and response, read together as one text, with a sequence classifier. One label is one reward.

    Texts are padded on the right. A text longer than `max_length` loses its beginning, that is, the oldest part of the
    prompt: the response is what is scored. The tokenizer is copied, so that its settings stay as they are.

    Args:
        model: a model with a sequence-classification head: `logits` of (batch, labels).
        tokenizer: its tokenizer.
        batch_size: texts in one forward call.
        max_length: tokens of a text at most, special tokens included; by default what the model and its tokenizer allow.

    Raises:
        ValueError: `batch_size` or `max_length` is not positive.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int = 16, max_length: int | None = None):
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise ValueError(f"batch_size and max_length must be at least 1, found {batch_size} and {max_length}")
        self.model = model
        self.batch_size = batch_size
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.padding_side = "right"
        self.tokenizer.truncation_side = "left"
        config: Any = model.config
        if getattr(config, "pad_token_id", None) is not None:
            # The classifier finds the end of a text by its own padding token.
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(config.pad_token_id)
        elif self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        config.pad_token_id = self.tokenizer.pad_token_id
        limits = [getattr(config, "max_position_embeddings", None), self.tokenizer.model_max_length, max_length]
        limit = min(limit for limit in limits if limit is not None)
        # A tokenizer that knows no limit says 1e30.
        self.max_length = limit if limit < 1e9 else None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        **kwargs: Any,
    ) -> "RewardModel":
        """Load any `AutoModelForSequenceClassification` and its tokenizer, from a folder or from the hub by name.

        Args:
            name_or_path: a local folder, or `owner/name` on the hub.
            batch_size: texts in one forward call.
            max_length: tokens of a text at most.
            device: where to put the model; the CPU by default.
            dtype: of the weights; by default the one they were saved in.
            kwargs: passed on to the model's `from_pretrained`, for example `device_map`.

        Raises:
            OSError: there is no such model.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(name_or_path, dtype=dtype, **kwargs)
        return cls(model if device is None else model.to(device), AutoTokenizer.from_pretrained(name_or_path), batch_size, max_length)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float] | list[list[float]]:
        """Score each response together with its prompt.

        Args:
            prompts: one a response.
            responses: the texts that follow the prompts.

        Returns:
            One float a response; with several labels one list of floats a response.
        """
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        device = next(self.model.parameters()).device
        training = self.model.training
        self.model.eval()
        scores: list[Tensor] = []
        try:
            with torch.no_grad():
                for start in range(0, len(texts), self.batch_size):
                    batch = texts[start : start + self.batch_size]
                    inputs = self.tokenizer(batch, padding=True, truncation=self.max_length is not None, max_length=self.max_length, return_tensors="pt")
                    scores.append(self.model(**inputs.to(device)).logits.float().cpu())
        finally:
            self.model.train(training)
        table = torch.cat(scores) if scores else torch.empty(0, 1)
        return table[:, 0].tolist() if table.shape[1] == 1 else table.tolist()

    @property
    def name(self) -> str:
        """What the model was loaded from."""
        return str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)


def as_reward(reward: Any) -> Reward:
    """Make a callable `(prompts, responses) -> scores` of what a user gives as the reward.

    Args:
        reward: such a callable (a `RewardModel` is one), a pair (sequence classifier, tokenizer), or the name or path
            of a sequence classifier.

    Raises:
        TypeError: it is none of these; a model alone is not enough, its tokenizer is needed too.
    """
    if isinstance(reward, str | os.PathLike):
        return RewardModel.from_pretrained(reward)
    if isinstance(reward, tuple) and len(reward) == 2 and isinstance(reward[0], nn.Module):
        return RewardModel(*reward)
    if callable(reward) and not isinstance(reward, nn.Module):
        return reward
    raise TypeError(
        "reward must be a callable (prompts, responses) -> scores, a pair (model, tokenizer), or the name of a sequence classifier; "
        f"found {type(reward).__name__}"
    )


def reward_name(reward: Reward) -> str:
    """A name for the manifest: where the model is from, or what the function is called."""
    return str(getattr(reward, "name", None) or getattr(reward, "__qualname__", None) or type(reward).__qualname__)


def checked_rewards(reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """Call a reward and check what it returns.

    Args:
        reward: (prompts, responses) -> one score, or one list of scores, a response.
        prompts: one a response.
        responses: the texts to score.

    Returns:
        (responses, scores), float32, finite.

    Raises:
        ValueError: the wrong count, lists of different lengths, what is no number, NaN or infinity; the responses are named.
    """
    scores = reward(list(prompts), list(responses))
    if isinstance(scores, Tensor):
        scores = scores.detach().float().cpu().tolist()
    try:
        scores = list(scores)
    except TypeError:
        raise ValueError(f"the reward must return one score a response: found {type(scores).__name__}, wanted {len(responses)} scores") from None
    if len(scores) != len(responses):
        raise ValueError(f"the reward must return one score a response: found {len(scores)}, wanted {len(responses)}")
    try:
        rows = [[float(score) for score in (row if hasattr(row, "__len__") and getattr(row, "ndim", None) != 0 else [row])] for row in scores]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the reward must return numbers: {error}") from error
    widths = {len(row) for row in rows}
    if len(widths) > 1 or 0 in widths:
        raise ValueError(f"the reward must return the same number of scores for every response, at least 1; found {[len(row) for row in rows]}")
    table = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), widths.pop() if widths else 1)
    broken = (~table.isfinite().all(1)).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(f"the reward returned NaN or infinity for responses {broken}: {[rows[index] for index in broken[:4]]}")
    return table
