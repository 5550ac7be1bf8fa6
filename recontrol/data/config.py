"""What is collected, and how it is kept."""

from dataclasses import dataclass
from typing import Literal

from recontrol.checks import integer
from recontrol.data.shards import check_storage


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

    Raises:
        TypeError, ValueError: `num_samples` is not a positive integer, or the storage is unknown.
    """

    num_samples: int = 1
    cache_budget: str | int | None = None
    max_prompt_tokens: int | None = None
    unique_prompts: bool = True
    unique_responses: bool = False
    storage: Literal["float32", "bfloat16", "float16", "float64", "int8"] | None = None

    def __post_init__(self) -> None:
        if integer("num_samples", self.num_samples) < 1:
            raise ValueError(f"num_samples must be an integer of at least 1, found {self.num_samples!r}")
        check_storage(self.storage)
