"""What is collected and how it is kept, and what the manifest of rollouts says of the language model, its tokenizer and the texts."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch

from recontrol.checks import dtype_name, integer
from recontrol.data.shards import check_storage
from recontrol.decoding.fingerprint import model_fingerprint

# Names in the manifest that may differ between runs that go on with one another: what they say is compared in other ways.
IGNORED = ("base_model", "made_with", "tokenizer")
PROBE = "\n\nHuman: Caf\u00e9s  aren't 100% open?\n\nAssistant:"


@dataclass(frozen=True)
class Collection:
    """The settings of collecting rollouts, beside those of `Decoding`.

    Args:
        num_samples: responses to each prompt; more than one needs sampling.
        cache_budget: memory for the key/value cache of a batch, in bytes or as a text such as 8GiB. Prompts are sorted by length, the longest first,
            and packed so that (prompt + max_new_tokens) * rows * bytes of a token fits. Without it, batches hold batch_size prompts in their order.
        max_prompt_tokens: refuse longer prompts; by default, what leaves room for the response in the model's context.
        unique_prompts: respond once to prompts with the same text, under the index of the first one; num_samples gives several responses.
            False responds to each, in groups of their own. The manifest counts duplicates either way.
        unique_responses: keep equal responses to a prompt once. Then a likely response weighs no more than a rare one in training, and V is no
            longer the expected reward of what the model samples.
        storage: how hidden states are kept; int8 has a scale for each token and takes half of what bfloat16 takes. By default the model's own dtype.
    """

    num_samples: int = 1
    cache_budget: str | int | None = None
    max_prompt_tokens: int | None = None
    unique_prompts: bool = True
    unique_responses: bool = False
    storage: Literal["float32", "bfloat16", "float16", "float64", "int8"] | None = None

    def __post_init__(self) -> None:
        integer("num_samples", self.num_samples, 1)
        check_storage(self.storage)


def model_settings(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The language model, its tokenizer, and what they run on."""
    return {
        "base_model": model_fingerprint(model),
        "model_dtype": dtype_name(model.dtype),
        "tokenizer": str(getattr(tokenizer, "name_or_path", type(tokenizer).__name__)),
        # Of the vocabulary and of how it cuts one text: two with the same one read texts as the same tokens.
        "tokenizer_sha256": texts_checksum([sorted((token, int(number)) for token, number in tokenizer.get_vocab().items()), tokenizer(PROBE).input_ids]),
        "made_with": {"torch": torch.__version__, "transformers": version("transformers"), "device": str(model.device)},
    }


def texts_checksum(texts: Sequence[Any]) -> str:
    """SHA-256 of a list of texts, or of anything else that JSON can hold."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
