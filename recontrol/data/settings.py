"""What the manifest of rollouts says of the language model, its tokenizer and the texts."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from recontrol.checks import dtype_name
from recontrol.decoding.fingerprint import model_fingerprint

# Names in the manifest that may differ between runs that go on with one another: what they say is compared in other ways.
IGNORED = ("base_model", "made_with", "tokenizer")
PROBE = "\n\nHuman: Caf\u00e9s  aren't 100% open?\n\nAssistant:"


def model_settings(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The language model, its tokenizer, and what they run on."""
    return {
        "base_model": model_fingerprint(model),
        "model_dtype": dtype_name(model.dtype),
        "tokenizer": str(getattr(tokenizer, "name_or_path", type(tokenizer).__name__)),
        # Of the vocabulary and of how it cuts one text: two with the same one read texts as the same tokens.
        "tokenizer_sha256": texts_checksum([sorted((token, int(number)) for token, number in tokenizer.get_vocab().items()), tokenizer(PROBE).input_ids]),
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__, "device": str(model.device)},
    }


def texts_checksum(texts: Sequence[Any]) -> str:
    """SHA-256 of a list of texts, or of anything else that JSON can hold."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
