"""What every method of alignment is to a comparison: a way of responding to a batch of prompts."""

import contextlib
import hashlib
from abc import ABC
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from recontrol.decoding.batches import Batch, generate_batch


class Training(NamedTuple):
    """What a method had to be trained, before it could respond.

    Attributes:
        parameters: numbers that were trained; 0 where nothing was.
        seconds: wall-clock time of the training; None where it is not known.
        peak_bytes: memory at most, beyond that of the process before; None where it is not known.
    """

    parameters: int = 0
    seconds: float | None = 0.0
    peak_bytes: int | None = 0


def tensors_checksum(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of some tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Method(ABC):
    """A way of responding to prompts, made once and used for any number of batches.

    A subclass says what it changes of the model's own way: the text of the prompt (`write`), or what goes on inside the model and behind its
    logits (`applied`). One that decodes several responses to a prompt, to choose between them, has a `respond` of its own. The language model is
    the caller's and is left as it was.

    Attributes:
        kind: what the method is called in tables; methods of one kind differ in `settings`.
    """

    kind: ClassVar[str]

    @property
    def settings(self) -> dict[str, Any]:
        """What tells this one from others of its kind, by name, ready for JSON."""
        return {}

    @property
    def identity(self) -> Any:
        """What else its responses depend on, ready for JSON: weights and texts that have no place in a table, as a checksum for example."""
        return None

    @property
    def label(self) -> str:
        """The kind and the settings, in words."""
        listed = ", ".join(f"{name} {setting:g}" if isinstance(setting, float) else f"{name} {setting}" for name, setting in self.settings.items())
        return f"{self.kind} ({listed})" if listed else self.kind

    @property
    def training(self) -> Training:
        """What had to be trained for it."""
        return Training()

    @property
    def divergence(self) -> float | None:
        """KL to the uncontrolled model in nats a response, where a formula gives it; None where it has to be measured token by token."""
        return None

    def write(self, prompt: str) -> str:
        """The text that the model is given for a prompt."""
        return prompt

    def edit(self, states: Tensor) -> Tensor | None:
        """(rows, hidden_size) -> the same states as this method lets the model read them; None where it edits none."""
        return None

    @contextlib.contextmanager
    def applied(self, model: Any, tokenizer: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> Iterator[list[LogitsProcessor]]:
        """Change the model inside the block; yield what has to be done to its logits.

        Args:
            model: the language model.
            tokenizer: its tokenizer.
            prompts: as the caller gave them, not as they were written.
            options: of `model.generate`.
        """
        yield []

    def respond(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        seed: int = 0,
        stop_strings: Sequence[str] | None = None,
        **generation_kwargs: Any,
    ) -> Batch:
        """Respond to one batch of prompts.

        Args:
            model: a causal language model, with nothing attached to it.
            tokenizer: its tokenizer; its padding settings are neither used nor changed.
            prompts: the texts to respond to.
            max_new_tokens: length of a response at most, in tokens.
            seed: of sampling; the caller's generators are left as they were.
            stop_strings: strings at which a response ends; it is cut before the first token that touches one.
            generation_kwargs: passed on to `model.generate`; without do_sample the model is greedy, whatever its own default. Logits processors among
                them come after the method's own.

        Raises:
            ValueError: no prompts, or an option that does not go with one response a prompt.
        """
        last = generation_kwargs.pop("logits_processor", None) or []
        written = [self.write(prompt) for prompt in prompts]
        with self.applied(model, tokenizer, prompts, generation_kwargs) as processors:
            options = {**generation_kwargs, "logits_processor": LogitsProcessorList([*processors, *last])}
            return generate_batch(model, tokenizer, written, max_new_tokens=max_new_tokens, seed=seed, stop_strings=stop_strings, **options)


@dataclass(frozen=True)
class Uncontrolled(Method):
    """The language model as it is."""

    kind = "uncontrolled"


@dataclass(frozen=True, eq=False)
class Together(Method):
    """Several methods at once, for example a prompt and control: texts are written by the last first, logits are changed by the first first.

    Args:
        methods: at least one; each must change the model's own way of responding, not respond on its own.

    Raises:
        ValueError: no methods, or one that responds on its own (it can be given another method to choose from instead).
    """

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
    def settings(self) -> dict[str, Any]:
        """Those of all."""
        return {name: setting for method in self.methods for name, setting in method.settings.items()}

    @property
    def identity(self) -> Any:
        """Those of all."""
        return [method.identity for method in self.methods]

    @property
    def training(self) -> Training:
        """The sum."""
        parts = [method.training for method in self.methods]
        seconds, peaks = [part.seconds for part in parts], [part.peak_bytes for part in parts]
        return Training(
            sum(part.parameters for part in parts),
            None if None in seconds else sum(filter(None, seconds)),
            None if None in peaks else max(filter(None, peaks), default=0),
        )

    def write(self, prompt: str) -> str:
        """The text that the model is given for a prompt."""
        for method in reversed(self.methods):
            prompt = method.write(prompt)
        return prompt

    def edit(self, states: Tensor) -> Tensor | None:
        """The states as the one method that edits them lets the model read them; a model bears no two."""
        return next((edited for method in self.methods if (edited := method.edit(states)) is not None), None)

    @contextlib.contextmanager
    def applied(self, model: Any, tokenizer: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> Iterator[list[LogitsProcessor]]:
        """Change the model inside the block as all methods do.

        Args:
            model: the language model.
            tokenizer: its tokenizer.
            prompts: as the caller gave them.
            options: of `model.generate`.
        """
        with contextlib.ExitStack() as stack:
            yield [processor for method in self.methods for processor in stack.enter_context(method.applied(model, tokenizer, prompts, options))]
