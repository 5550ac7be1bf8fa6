"""The interface of every method that a comparison knows: it responds to a batch of prompts."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from recontrol.checks import number, several
from recontrol.data.identity import tensors_checksum as tensors_checksum
from recontrol.decoding.batches import Batch, generate_batch
from recontrol.decoding.config import Decoding
from recontrol.decoding.hooks import attachments, output_embedding


class Training(NamedTuple):
    """The cost of training a method: numbers that were trained, wall-clock seconds, peak memory beyond that before; None for what is not known."""

    parameters: int = 0
    seconds: float | None = 0.0
    peak_bytes: int | None = 0


def one_score(rewards: Tensor, head_weights: Sequence[float] | None, name: str = "head_weights") -> Tensor:
    """(responses, num_heads) -> (responses,), float64: sum_k head_weights[k] * rewards[:, k]; None for the weights of a single head."""
    heads = rewards.shape[1]
    if head_weights is None and heads != 1:
        raise ValueError(f"found {heads} rewards a response: give {name}, {heads} numbers")
    weights = [1.0] if head_weights is None else [number(name, weight) for weight in several(name, head_weights)]
    if len(weights) != heads:
        raise ValueError(f"{name} must be {heads} numbers, one a reward, found {len(weights)}")
    return rewards.double() @ torch.tensor(weights, dtype=torch.float64, device=rewards.device)


def check_uncontrolled(model: Any) -> None:
    """Refuse a model with something attached: its responses would not be its own."""
    if attachments(output_embedding(model)):
        raise ValueError("the model must be the uncontrolled one, found a controller or recorder attached to it already: detach it first")


class Method:
    """A method of responding to prompts, made once and used for any number of batches.

    A subclass changes the text of the prompt (`write`), or the model and its logits while it decodes (`applied`); by default it does what its `parts` do.
    One that chooses between responses overrides `respond`. The model is left as it was. `kind` is the name of the method in tables; methods of one kind
    differ in `settings`.
    """

    kind: ClassVar[str]
    # The fields among the settings, with their names in tables.
    shown: ClassVar[Mapping[str, str]] = {}

    @property
    def parts(self) -> Sequence["Method"]:
        """The methods that this one is made of: the last writes the text first, the first changes the logits first."""
        return ()

    @property
    def settings(self) -> dict[str, Any]:
        """What distinguishes this method from others of its kind, by name, ready for JSON."""
        own = {name: given for field, name in self.shown.items() if (given := getattr(self, field)) is not None}
        return own | {name: given for part in self.parts for name, given in part.settings.items()}

    @property
    def identity(self) -> Any:
        """What else the responses depend on, ready for JSON: a checksum of weights, or texts that have no place in a table."""

    @property
    def content(self) -> Any:
        """The fingerprint of a reward that the responses depend on; releases before knew it by its name, in `identity`."""

    @property
    def label(self) -> str:
        """The kind and the settings, in words."""
        listed = ", ".join(f"{name} {setting:g}" if isinstance(setting, float) else f"{name} {setting}" for name, setting in self.settings.items())
        return f"{self.kind} ({listed})" if listed else self.kind

    @property
    def training(self) -> Training:
        """The cost of training the method: the sums, and the largest peak."""
        parameters, seconds, peaks = zip(Training(), *(part.training for part in self.parts), strict=True)
        return Training(sum(parameters), None if None in seconds else sum(seconds), None if None in peaks else max(peaks))

    @property
    def divergence(self) -> float | None:
        """KL to the uncontrolled model in nats a response, where a formula gives it; None where it is measured token by token."""

    def write(self, prompt: str) -> str:
        """The text that the model is given for a prompt."""
        for part in reversed(self.parts):
            prompt = part.write(prompt)
        return prompt

    def edit(self, states: Tensor) -> Tensor | None:
        """(rows, hidden_size) -> the edited states; None for a method that edits no states. At most one part can be attached."""
        return next((edited for part in self.parts if (edited := part.edit(states)) is not None), None)

    def attach(self, model: Any) -> contextlib.AbstractContextManager:
        """Change the model until the end of a `with` block, whatever it responds to."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def applied(self, model: Any, tokenizer: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> Iterator[list[LogitsProcessor]]:
        """`attach` inside the block, and yield the method's logits processors; `prompts` are those before `write`, `options` of `model.generate`."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.attach(model))
            yield [processor for part in self.parts for processor in stack.enter_context(part.applied(model, tokenizer, prompts, options))]

    def respond(self, model: Any, tokenizer: Any, prompts: Sequence[str], decoding: Decoding | None = None, **keywords: Any) -> Batch:
        """Respond to one batch of prompts; the caller's generators and the tokenizer's settings are left as they were.

        `keywords` are settings of `Decoding` by name, and options of `model.generate`; logits processors among them follow the method's own.
        """
        decoding = Decoding.of(decoding, **keywords)
        options = dict(decoding.options)
        given = options.pop("logits_processor", None) or []
        written = [self.write(prompt) for prompt in prompts]
        with self.applied(model, tokenizer, prompts, options) as processors:
            options["logits_processor"] = LogitsProcessorList([*processors, *given])
            return generate_batch(model, tokenizer, written, dataclasses.replace(decoding, options=options))


@dataclass(frozen=True)
class Uncontrolled(Method):
    """The language model as it is."""

    kind = "uncontrolled"


@dataclass(frozen=True, eq=False)
class Together(Method):
    """Several methods at once, none of which chooses between responses: the last writes the text first, the first changes the logits first."""

    methods: Sequence[Method]

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("found no methods to put together, wanted at least one")
        for method in self.methods:
            if type(method).respond is not Method.respond:
                raise ValueError(f"{method.label} chooses between responses on its own and cannot be put together with others")

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The kinds of all."""
        return " + ".join(method.kind for method in self.methods)

    @property
    def label(self) -> str:
        """The labels of all."""
        return " + ".join(method.label for method in self.methods)

    @property
    def parts(self) -> Sequence[Method]:
        """All of them."""
        return self.methods

    @property
    def identity(self) -> Any:
        """Those of all."""
        return [method.identity for method in self.methods]

    @property
    def content(self) -> Any:
        """Those of all, where there are any."""
        found = [method.content for method in self.methods]
        return found if any(found) else None
