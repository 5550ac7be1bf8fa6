"""Fingerprints of language models: a few of their weights, which identify a model in any dtype."""

import functools
import logging
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from recontrol.checks import first_few
from recontrol.decoding.hooks import embedding_owner, output_embedding
from recontrol.value.provenance import fingerprint_hash as fingerprint_hash

# Once each.
_say = functools.cache(logging.getLogger("recontrol").warning)

MATRICES = 64
OUTPUT_ELEMENTS = 32
OUTPUT_EMBEDDING = "output_embedding"
CONFIG_FIELDS = ("model_type", "hidden_size", "vocab_size", "num_hidden_layers")
# The exponent and mantissa of these are those of one weight; 8-bit and 4-bit ones need scales that lie elsewhere.
READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# bfloat16 rounds by up to 0.4 %, float16 by up to 3e-8 where it is subnormal.
RELATIVE_TOLERANCE = 0.01
ABSOLUTE_TOLERANCE = 1e-6
# Where adapters and the compiler keep the module that they wrap; the rest of the wrapper is theirs.
WRAPPED = ("base_layer", "original_module", "token_adapter", "_orig_mod")


def model_fingerprint(model: Any) -> dict[str, Any]:
    """Describe a language model so that it can be recognised, as JSON: its name and sizes, and one weight from each of up to 64 matrices.

    Adapters (LoRA) do not show, unless they are merged into the weights.

    Args:
        model: a causal language model of transformers, possibly wrapped.
    """
    owner = embedding_owner(model, output_embedding(model))
    parameters = _parameters(owner)
    readable = [name for name in sorted(parameters) if _readable(parameters[name])]
    names = [name for name in readable if name != OUTPUT_EMBEDDING]
    # Evenly spread, with the first and the last.
    count = min(MATRICES, len(names))
    chosen = [names[i * (len(names) - 1) // max(count - 1, 1)] for i in range(count)] + [OUTPUT_EMBEDDING] * (OUTPUT_EMBEDDING in readable)
    # Not `text_config`: for BART it counts the layers of the decoder, and files that exist hold the other number.
    config = owner.config.get_text_config()
    return {
        "name": getattr(owner.config, "_name_or_path", ""),
        **{field: getattr(config, field, None) for field in CONFIG_FIELDS},
        "samples": {name: _samples(name, parameters[name]) for name in chosen},
    }


def difference(recorded: dict[str, Any], model: Any) -> str | None:
    """The first difference of a model from a fingerprint, in sizes or weights; None if there is none. A warning names weights that cannot be read here."""
    owner = embedding_owner(model, output_embedding(model))
    config = owner.config.get_text_config()
    name = recorded.get("name") or "the recorded model"
    for field in CONFIG_FIELDS:
        if (wanted := recorded.get(field, found := getattr(config, field, None))) != found:
            return f"{field} is {found}, that of {name} is {wanted}"
    parameters, places = _parameters(owner), {place for place, _ in _inside(owner)}
    samples, unread = recorded.get("samples", {}), []
    for parameter, wanted in samples.items():
        if not _readable(parameters.get(parameter)):
            if parameter not in parameters and parameter.rpartition(".")[0] not in places:
                return f"the model has no weight {parameter}, {name} has"
            unread.append(parameter)
            continue
        found = _samples(parameter, parameters[parameter])
        pairs = enumerate(zip(found, wanted, strict=False))
        apart = [place for place, (a, b) in pairs if not abs(a - b) <= RELATIVE_TOLERANCE * max(abs(a), abs(b)) + ABSOLUTE_TOLERANCE]
        if apart or len(found) != len(wanted):
            first = [*apart, 0][0]
            return f"the weights differ from those of {name}: in {parameter} {found[first]:.6g} was found, {wanted[first]:.6g} was wanted"
    if unread:
        _say(f"{len(unread)} of {len(samples)} weights of {name} cannot be read here and are not compared: {first_few(unread)}")
    return None


def _parameters(owner: Any) -> dict[str, Tensor]:
    """The model's matrices by their names without wrapping; the output embedding under a name of its own, tied or not."""
    _, embedding = next(_inside(output_embedding(owner)))
    # Under its first name, where several places share it.
    found = {id(getattr(embedding, "weight", None)): (OUTPUT_EMBEDDING, getattr(embedding, "weight", None))}
    for place, module in _inside(owner):
        for name, parameter in module._parameters.items():
            found.setdefault(id(parameter), (f"{place}.{name}".lstrip("."), parameter))
    return {name: parameter for name, parameter in found.values() if isinstance(parameter, Tensor) and parameter.dim() >= 2 and parameter.numel()}


def _inside(module: nn.Module, place: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and all in it, with their places; a wrapper is the module that it wraps."""
    while (wrapped := next((module._modules[name] for name in WRAPPED if module._modules.get(name) is not None), None)) is not None:
        module = wrapped
    yield place, module
    for name, child in module.named_children():
        yield from _inside(child, f"{place}.{name}".lstrip("."))


def _readable(parameter: Tensor | None) -> bool:
    # What is more than a tensor, such as a quantised or a sharded one, may be of these dtypes and cannot be indexed.
    plain = parameter if type(parameter) in (Tensor, nn.Parameter) else None
    return plain is not None and plain.dtype in READABLE and not plain.is_meta


def _samples(name: str, parameter: Tensor) -> list[float]:
    """Weights at places that follow from the parameter's name and shape."""
    count = OUTPUT_ELEMENTS if name == OUTPUT_EMBEDDING else 1
    start = zlib.crc32(name.encode())
    places = [(start + i * parameter.numel() // count) % parameter.numel() for i in range(count)]
    # Indexed in every dimension: flattening would copy a matrix that is not contiguous.
    index = torch.unravel_index(torch.tensor(places, device=parameter.device), parameter.shape)
    return parameter.detach()[index].double().tolist()
