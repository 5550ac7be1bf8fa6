"""What everything that edits the states of a model shares: whether a value function fits it, and proof that edits reach the logits."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from recontrol.decoding.fingerprint import difference
from recontrol.decoding.hooks import Attachment, attachments, forget_compiled, input_width
from recontrol.decoding.model_config import padding_token, text_config, vocabulary_size
from recontrol.value import ValueFunction


class Editing(Attachment):
    """Hooks that edit the input of a model's output embedding. Only one such set at a time.

    Args:
        model: a causal language model of transformers.

    Raises:
        TypeError, ValueError: `model` is no model with an output embedding.
        RuntimeError: another one is attached.
    """

    def __init__(self, model: Any):
        super().__init__(model)
        # While edits are proved to reach the logits: what the state is multiplied by.
        self._sign: Tensor | None = None
        if any(isinstance(other, Editing) for other in attachments(self.embedding)):
            kind = type(self.owner).__name__
            raise RuntimeError(f"a Controller, or what else edits states, is attached to this {kind} already; detach it first, or leave its with block")

    @contextlib.contextmanager
    def _attaching(self, *, self_check: bool = True) -> Iterator[None]:
        """Put the hooks in place inside the block; afterwards edits are proved to reach the logits. After an error nothing is attached."""
        try:
            yield
            forget_compiled()
            if self_check:
                self._check_that_edits_reach_the_logits()
        except BaseException:
            self.detach()
            raise

    def _check_that_edits_reach_the_logits(self) -> None:
        """Negate the state of one token: the logits must change, and must not when it is left as it is."""
        with contextlib.ExitStack() as paused:
            # A recorder must not take the probe for a token.
            for other in attachments(self.embedding):
                if other is not self:
                    paused.enter_context(other.pause())
            plain, again, negated = (self._probe(sign) for sign in (1.0, 1.0, -1.0))
        # Some models have logits that are minus infinity; kernels that are not deterministic make small differences.
        noise, change = ((other - plain).nan_to_num(0, 0, 0).abs().max() for other in (again, negated))
        if not change > 2 * noise:
            raise RuntimeError(
                f"edits do not reach the logits: with the input of get_output_embeddings() negated, the logits of this {type(self.owner).__name__} "
                f"changed by {change:.3g} (and by {noise:.3g} without), so it does not compute them through get_output_embeddings(); nothing is attached"
            )

    @torch.no_grad()
    def _probe(self, sign: float) -> Tensor:
        """The logits after one token, its state multiplied by `sign`."""
        config = text_config(self.owner.config)
        # The embedding of padding is often zero, and so would be the state.
        known = (getattr(config, "bos_token_id", None), 0, 1)
        token = next(token for token in known if isinstance(token, int) and token != padding_token(config) and 0 <= token < (vocabulary_size(config) or 2))
        ids = torch.tensor([[token]], device=self.owner.device)
        cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        self._sign = torch.tensor(sign)
        try:
            # Each run starts from the generators' present state, so dropout falls on the same units, and leaves them there.
            with torch.random.fork_rng(devices=cuda):
                output = self.model(input_ids=ids, use_cache=False)
        finally:
            self._sign = None
        return (output[0] if isinstance(output, tuple) else output.logits).detach().float().clone()


def check_fit(attached: Attachment, value: ValueFunction, allow_other_model: bool) -> None:
    """Refuse a value function that cannot be, or should not be, used on the states that a model's output embedding reads.

    Args:
        attached: hooks on the model.
        value: the value function.
        allow_other_model: accept one that was trained on the states of another model.

    Raises:
        TypeError: float64 meets another dtype.
        ValueError: another size, another device, or trained for another model.
    """
    kind = type(attached.owner).__name__
    width = input_width(attached.owner, attached.embedding)
    if value.hidden_size != width:
        raise ValueError(f"the value function is for hidden states of size {value.hidden_size}, the output embedding of this {kind} reads size {width}")
    weight = getattr(attached.embedding, "weight", None)
    device = weight.device if isinstance(weight, Tensor) and not weight.is_meta else value.device
    if value.device != device:
        raise ValueError(f"the value function is on {value.device}, the output embedding on {device}; move one of them, as by value.to({str(device)!r})")
    if (attached.dtype() == torch.float64) != (value.dtype == torch.float64):
        raise TypeError(f"float64 goes with float64 only: the model is {attached.dtype()}, the value function is {value.dtype}")
    # A weighted sum has the provenance of each of its terms.
    for provenance in () if allow_other_model else (value.provenance, *value.provenance.get("terms", ())):
        recorded = provenance.get("base_model")
        # A name alone, as one may write by hand, proves nothing.
        other = difference(recorded, attached.model) if isinstance(recorded, dict) else None
        if other is not None:
            raise ValueError(f"the value function was trained for another model: {other}; attach it anyway with allow_other_model=True")
