"""How much of a key/value cache is of use: places of tokens that are handed out, and those that hold a token that is read.

The token that is sampled last is never read, so a response of r tokens to a prompt of p needs p + r - 1 places.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CacheUse:
    """Places in the cache of a whole generation.

    Attributes:
        handed_out: to all responses together; places that are used again count again.
        read: of them, those that hold a token that is read.
        most_held: places held at once at most; a paged cache is held from the beginning to the end.
        most_read: places that one step reads at most, the fewest that must exist.
    """

    handed_out: int
    read: int
    most_held: int
    most_read: int

    @property
    def wasted(self) -> float:
        """The share of places handed out that never hold a token that is read: padding, places after a response's end, the rest of a last block."""
        return (self.handed_out - self.read) / self.handed_out


def padded(prompts: Sequence[int], responses: Sequence[int], batches: Iterable[Sequence[int]]) -> CacheUse:
    """Batches padded to their longest prompt and decoded until their longest response is finished.

        handed out = sum over batches of rows * (longest prompt + longest response - 1)

    Args:
        prompts: tokens of each prompt.
        responses: tokens of each response, at least one.
        batches: which prompts go together.
    """
    held, most_read = [], 0
    for batch in batches:
        steps = max(responses[row] for row in batch)
        held.append(len(batch) * (max(prompts[row] for row in batch) + steps - 1))
        most_read = max(most_read, *(sum(prompts[row] + step for row in batch if responses[row] > step) for step in range(steps)))
    return CacheUse(sum(held), _read(prompts, responses), max(held), most_read)


def paged(prompts: Sequence[int], responses: Sequence[int], most_read: int, blocks: int, block_tokens: int) -> CacheUse:
    """Blocks that are handed out as they are needed; a response that makes room for another and comes back is counted once.

        handed out = sum over responses of block_tokens * ceil((prompt + response - 1) / block_tokens)

    Args:
        prompts: tokens of each prompt.
        responses: tokens of each response.
        most_read: places that one step read at most, which depends on when there was room for whom.
        blocks: in the cache.
        block_tokens: tokens of a block.
    """
    needed = [math.ceil((prompt + response - 1) / block_tokens) for prompt, response in zip(prompts, responses, strict=True)]
    return CacheUse(block_tokens * sum(needed), _read(prompts, responses), block_tokens * blocks, most_read)


def _read(prompts: Sequence[int], responses: Sequence[int]) -> int:
    return sum(prompts) + sum(responses) - len(responses)
