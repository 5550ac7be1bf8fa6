"""A language model of Llama-7B's shape with random weights, and its decode step, captured in a CUDA graph or not."""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.gpu.timing import Captured
from recontrol.decoding.static_decoder import cache_name

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
TINY_SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
SEED_WEIGHTS, SEED_PROMPTS = 10, 11


@functools.cache
def llama(device: torch.device, tiny: bool) -> Any:
    """The model in bfloat16, made on the device."""
    config = LlamaConfig(**(TINY_SHAPE if tiny else SHAPE), max_position_embeddings=4096)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(SEED_WEIGHTS)
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def prompts(model: Any, batch: int, tokens: int) -> Tensor:
    """Random tokens, (batch, tokens), none of them special."""
    generator = torch.Generator().manual_seed(SEED_PROMPTS)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


class DecodeStep:
    """Greedy decoding with a static cache, one token a row and call; it can be taken back to the end of the prompts.

    The hooks that are on the model when this is made stay in what is captured.

    Args:
        model: a Llama on its device.
        ids: (batch, tokens), the prompts, not padded.
        max_tokens: prompt and new tokens of a row at most.
        captured: in a CUDA graph, where there is a GPU.

    Attributes:
        logits: (batch, vocabulary), those of the last step.
        ids: (batch, 1), the tokens that the last step chose.
    """

    @torch.no_grad()
    def __init__(self, model: Any, ids: Tensor, max_tokens: int, captured: bool = True) -> None:
        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=max_tokens)
        self._name = cache_name(model)
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{self._name: self._cache}).logits
        self._start = ids.shape[1]
        self._first = logits[:, -1].argmax(-1, keepdim=True)
        self._slots = torch.arange(max_tokens, device=ids.device)
        self._position = torch.full((1, 1), self._start, device=ids.device)
        self._lengths = [layer.cumulative_length for layer in self._cache.layers]
        self.ids, self.logits = self._first.clone(), torch.zeros_like(logits[:, -1])
        self._step = Captured(self._run, ids.device) if captured else self._run
        self.rewind()

    def rewind(self) -> None:
        """Back to the end of the prompts; what the cache holds beyond is not looked at."""
        for counter in (self._position, *self._lengths):
            counter.fill_(self._start)
        self.ids.copy_(self._first)

    @torch.no_grad()
    def __call__(self, tokens: int = 1) -> Tensor:
        """Decode so many tokens of each row from the end of the prompts, and return the last, (batch, 1)."""
        self.rewind()
        for _ in range(tokens):
            self._step()
        return self.ids

    def _run(self) -> None:
        # The mask and the positions are on the device: what is captured must follow them.
        mask = (self._slots <= self._position)[None, None].expand(self.ids.shape[0], 1, 1, -1)
        output = self._model(input_ids=self.ids, attention_mask=mask, position_ids=self._position, use_cache=True, **{self._name: self._cache})
        self.logits.copy_(output.logits[:, -1])
        self.ids.copy_(self.logits.argmax(-1, keepdim=True))
        self._position.add_(1)
