"""The seam for edits of a model's states: hooks, pause, the check that a value function fits, and the proof that edits reach the logits."""

import contextlib
import functools
import inspect
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recontrol.decoding.control_batch import ControlBatch
from recontrol.decoding.fingerprint import difference
from recontrol.decoding.hooks import Attachment, attachments, forget_compiled, input_device, input_width, seeded
from recontrol.decoding.model_config import padding_token, text_config, vocabulary_size
from recontrol.value import ValueFunction


class _Call(threading.local):
    """The forward call that this thread is in; one model may run in several threads at once."""

    # What `Editing.rows` said of it, and what a subclass keeps between the site and the end of the model.
    rows: Any = None
    kept: Any = None
    # Whether it has come to the site.
    reached = False

    def __reduce__(self) -> tuple[Any, ...]:
        # So that a model can be copied with its hooks.
        return (_Call, ())


class Editing(Attachment):
    """Edits the states at the one site of a model, h <- edit(h, rows). A subclass defines `edit` and, if need be, `rows`; its `__init__` ends with `attach`."""

    def __init__(self, model: Any):
        super().__init__(model)
        # Whether states are to be edited at all.
        self.steers = True
        # While edits are proved to reach the logits: the factor of the states.
        self._sign: Tensor | None = None
        # From the class, because an instance's forward may be a compiled one.
        self._parameters = [*inspect.signature(type(self.owner).forward).parameters][1:]
        self._call = _Call()
        self._batch = ControlBatch()
        self._traced_rows: tuple[Any] | None = None
        self._traced_site = False
        if any(isinstance(other, Editing) for other in attachments(self.owner)):
            found = f"is attached to this {type(self.owner).__name__} already"
            raise RuntimeError(f"a Controller, or what else edits states, {found}; detach it first, or leave its with block")

    def rows(self, given: dict[str, Any]) -> Any:
        """What is known of the rows of a forward call that begins, from its arguments by name."""
        return None

    def edit(self, hidden: Tensor, rows: Any) -> Tensor | None:
        """The states that take the place of these, (..., hidden_size); None leaves them."""
        raise NotImplementedError

    def attach(self, *, self_check: bool = True) -> None:
        """Put the hooks in place and prove that edits reach the logits. After an error nothing is attached."""
        try:
            self._hooks.append(self.owner.register_forward_pre_hook(self._before_model, with_kwargs=True))
            self._hooks.append(self.owner.register_forward_hook(self._after_model, always_call=True))
            self._hooks.append(self.site.module.register_forward_pre_hook(self._before_site, with_kwargs=True))
            forget_compiled()
            if self_check:
                self._prove()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove the hooks; the model is as it was. May be called again."""
        super().detach()
        self._batch.warn()

    def _before_model(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # What took its place would read states unedited, or edited only in part.
        if self.expects_edits() and self._path and functools.reduce(getattr, self._path.split("."), self.owner) is not self.embedding:
            raise RuntimeError(f"the output embedding of this {type(owner).__name__} was replaced after {type(self).__name__} was attached: attach again")
        # No arithmetic here: the compiler makes a graph of its own of a hook on the model that it compiles.
        rows = self.rows({**dict(zip(self._parameters, args, strict=False)), **kwargs})
        # The compiler follows attributes, but not thread-local ones; no other thread disturbs what it compiles whole.
        if torch.compiler.is_compiling():
            self._traced_rows, self._traced_site = (rows,), False
        else:
            self._traced_rows, self._call.rows, self._call.reached = None, rows, False

    def _before_site(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        hidden = self.site.states(args, kwargs)
        if torch.compiler.is_compiling():
            self._traced_site = True
        else:
            self._call.reached = True
        if self._sign is not None:
            return self.site.replaced(args, kwargs, hidden * self._sign)
        edited = None if self._paused else self.edit(hidden, self._call.rows if self._traced_rows is None else self._traced_rows[0])
        return None if edited is None else self.site.replaced(args, kwargs, edited)

    def _after_model(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Also after an error: the rows belong to one forward call.
        self._traced_rows = None
        reached = self._traced_site or (not torch.compiler.is_compiling() and self._call.reached)
        if not torch.compiler.is_compiling():
            self._call.rows = None
        # There are none after an error, and where trainers make a loss, or log-probabilities of given tokens, without them.
        if not reached and self.expects_edits() and (isinstance(output, tuple) or getattr(output, "logits", None) is not None):
            raise RuntimeError(f"this {type(owner).__name__} made logits without its output embedding, and no state was edited")

    def expects_edits(self) -> bool:
        """Whether a forward call that makes logits must come to the site."""
        return self.steers and not self._paused

    def _prove(self) -> None:
        """Negate the state of one token: the logits must change, and must not when it is left as it is."""
        logits = []
        try:
            for sign in (1.0, 1.0, -1.0):
                self._sign = torch.tensor(sign, dtype=torch.float32, device="cpu")
                logits.append(_logits_of_a_token(self).float().clone())
        finally:
            self._sign = None
        about = "the input of get_output_embeddings()", f"this {type(self.owner).__name__}"
        check_reach(*about, logits, "so it does not compute them through get_output_embeddings(); nothing is attached")


@torch.no_grad()
def _logits_of_a_token(attached: Attachment) -> Tensor:
    config = text_config(attached.owner.config)
    # The embedding of padding is often zero, and so would be the state.
    known = (getattr(config, "bos_token_id", None), 0, 1)
    token = next(token for token in known if isinstance(token, int) and token != padding_token(config) and 0 <= token < (vocabulary_size(config) or 2))
    with contextlib.ExitStack() as stack:
        # A recorder must not take this for a token.
        for each in attachments(attached.embedding):
            stack.enter_context(each.pause())
        # Each run starts from the same state of the generators, so dropout falls on the same units.
        stack.enter_context(seeded(None))
        output = attached.model(input_ids=torch.tensor([[token]], device=input_device(attached.owner)), use_cache=False)
    return output[0] if isinstance(output, tuple) else output.logits


def states_device(attached: Attachment) -> torch.device:
    """Where the states are that the output embedding reads; asked of a state where accelerate moves tensors, or there is no weight to ask."""
    weight = getattr(attached.embedding, "weight", None)
    if isinstance(weight, Tensor) and not weight.is_meta and not any(hasattr(module, "_hf_hook") for module in attached.model.modules()):
        return weight.device
    found = [input_device(attached.owner)]
    hook = attached.embedding.register_forward_pre_hook(lambda module, args, kwargs: found.append(attached.site.states(args, kwargs).device), with_kwargs=True)
    try:
        _logits_of_a_token(attached)
    finally:
        hook.remove()
    return found[-1]


def check_reach(negated: str, model: str, logits: Sequence[Tensor], hence: str) -> None:
    """Refuse a model whose logits, (plain, plain again, with states negated), change no more than kernels that are not deterministic change them."""
    # Some models have logits that are minus infinity.
    noise, change = [(other.float() - logits[0].float()).nan_to_num(0, 0, 0).abs().max().item() for other in logits[1:]]
    if not change > 2 * noise:
        raise RuntimeError(
            f"edits do not reach the logits: with {negated} negated, the logits of {model} changed by {change:.3g} (and by {noise:.3g} without), {hence}"
        )


def check_fit(attached: Attachment, value: ValueFunction, allow_other_model: bool) -> None:
    """Refuse a value function that cannot be, or should not be, used on the states that a model's output embedding reads."""
    width = input_width(attached.owner, attached.embedding)
    if value.hidden_size != width:
        reads = f"the output embedding of this {type(attached.owner).__name__} reads size {width}"
        raise ValueError(f"the value function is for hidden states of size {value.hidden_size}, {reads}")
    if value.device != (device := states_device(attached)):
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
