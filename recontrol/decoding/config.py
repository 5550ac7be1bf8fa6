"""How responses are decoded: one value that collection, methods, evaluation and studies hand on."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recontrol.checks import integer


def listed_stop_strings(stop_strings: str | Sequence[str] | None) -> list[str]:
    """The stop strings as a list; one text is one of them. What is no text, or is empty, is a ValueError."""
    stops = [stop_strings] if isinstance(stop_strings, str) else list([] if stop_strings is None else stop_strings)
    if any(not isinstance(stop, str) or not stop for stop in stops):
        raise ValueError(f"stop_strings must be texts that are not empty, found {stops!r}")
    return stops


@dataclass(frozen=True)
class Decoding:
    """The settings of decoding, the same for every prompt of a call.

    Args:
        max_new_tokens: length of a response at most, in tokens.
        batch_size: prompts decoded at once; None is the default of whoever decodes.
        seed: of sampling; batch b is decoded with `seed + b`.
        stop_strings: strings at which a response ends; it is cut before the first token that touches one.
        options: of `model.generate`, as {"do_sample": True, "temperature": 1.0}; without do_sample the model is greedy, whatever its own default.
    """

    max_new_tokens: int = 128
    batch_size: int | None = None
    seed: int = 0
    stop_strings: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, given in (("max_new_tokens", self.max_new_tokens), ("batch_size", self.batch_size)):
            if given is not None and integer(name, given) < 1:
                raise ValueError(f"{name} must be an integer of at least 1, found {given!r}")
        object.__setattr__(self, "seed", integer("seed", self.seed))
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, found {self.seed}")
        object.__setattr__(self, "stop_strings", tuple(listed_stop_strings(self.stop_strings)))
        object.__setattr__(self, "options", dict(self.options))

    @classmethod
    def of(cls, decoding: "Decoding | None" = None, **keywords: Any) -> "Decoding":
        """A decoding with some settings replaced, from keywords as public functions take them: what is no field is an option of `model.generate`."""
        base = decoding or cls()
        given = {each.name: keywords.pop(each.name) for each in dataclasses.fields(cls) if each.name in keywords}
        return dataclasses.replace(base, **{**given, "options": {**base.options, **given.get("options", {}), **keywords}})
