"""Fingerprints of language models: a few of their weights, which identify a model in any dtype."""

import re
import zlib
from typing import Any

import torch
from torch import Tensor

from recontrol.decoding.hooks import embedding_owner, output_embedding
from recontrol.value.provenance import fingerprint_hash as fingerprint_hash

MATRICES = 64
OUTPUT_ELEMENTS = 32
OUTPUT_EMBEDDING = "output_embedding"
CONFIG_FIELDS = ("model_type", "hidden_size", "vocab_size", "num_hidden_layers")
# The exponent and mantissa of these are those of one weight; 8-bit and 4-bit ones need scales that lie elsewhere.
READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# bfloat16 rounds by up to 0.4 %, float16 by up to 3e-8 where it is subnormal.
RELATIVE_TOLERANCE = 0.01
ABSOLUTE_TOLERANCE = 1e-6
# What wrappers (adapters, for example) put around the name of a parameter.
WRAPPING = re.compile(r"^base_model\.model\.|\b_orig_mod\.|\bbase_layer\.")


def model_fingerprint(model: Any) -> dict[str, Any]:
    """Describe a language model so that it can be told from another: sizes, and one weight from each of up to 64 matrices.

    Adapters (LoRA) do not show, unless they are merged into the weights. Reading takes milliseconds, whatever the model's size.

    Args:
        model: a causal language model of transformers, possibly wrapped.

    Returns:
        a dictionary that JSON can hold: `name` (where it was loaded from), `model_type`, `hidden_size`, `vocab_size`,
        `num_hidden_layers`, and `samples`, from the name of a parameter to weights of it (32 of the output embedding, 1 of others).

    Raises:
        TypeError, ValueError: `model` is no model with an output embedding.
    """
    owner = embedding_owner(model, output_embedding(model))
    parameters = _parameters(owner)
    names = [name for name in sorted(parameters) if name != OUTPUT_EMBEDDING and _readable(parameters[name])]
    # Evenly spread, with the first and the last.
    count = min(MATRICES, len(names))
    chosen = [names[i * (len(names) - 1) // max(count - 1, 1)] for i in range(count)]
    if OUTPUT_EMBEDDING in parameters and _readable(parameters[OUTPUT_EMBEDDING]):
        chosen.append(OUTPUT_EMBEDDING)
    config = owner.config.get_text_config()
    return {
        "name": getattr(owner.config, "_name_or_path", ""),
        **{field: getattr(config, field, None) for field in CONFIG_FIELDS},
        "samples": {name: _samples(name, parameters[name]) for name in chosen},
    }


def difference(recorded: dict[str, Any], model: Any) -> str | None:
    """One sentence that names the first difference of a model from a fingerprint; None when it is the same model, perhaps in another dtype.

    Sizes must be equal and every sampled weight must agree to 1 %; the name is not compared. Quantised weights and those not on this machine are skipped.
    """
    owner = embedding_owner(model, output_embedding(model))
    config = owner.config.get_text_config()
    name = recorded.get("name") or "the recorded model"
    for field in CONFIG_FIELDS:
        found = getattr(config, field, None)
        if field in recorded and recorded[field] != found:
            return f"{field} is {found}, that of {name} is {recorded[field]}"
    parameters = _parameters(owner)
    for parameter, wanted in recorded.get("samples", {}).items():
        if parameter not in parameters:
            return f"the model has no weight {parameter}, {name} has"
        if not _readable(parameters[parameter]):
            continue
        found = _samples(parameter, parameters[parameter])
        apart = [i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if not _close(a, b)]
        if apart or len(found) != len(wanted):
            first = apart[0] if apart else 0
            return f"the weights differ from those of {name}: in {parameter} {found[first]:.6g} was found, {wanted[first]:.6g} was wanted"
    return None


def _parameters(owner: Any) -> dict[str, Tensor]:
    """The model's matrices by their names without wrapping; the output embedding under a name of its own, tied or not."""
    output = getattr(output_embedding(owner), "weight", None)
    found = {WRAPPING.sub("", name): parameter for name, parameter in owner.named_parameters() if parameter is not output}
    if isinstance(output, Tensor):
        found[OUTPUT_EMBEDDING] = output
    return {name: parameter for name, parameter in found.items() if parameter.dim() >= 2 and parameter.numel() and "lora_" not in name}


def _readable(parameter: Tensor) -> bool:
    return parameter.dtype in READABLE and not parameter.is_meta


def _samples(name: str, parameter: Tensor) -> list[float]:
    """Weights at places that follow from the parameter's name and shape."""
    count = OUTPUT_ELEMENTS if name == OUTPUT_EMBEDDING else 1
    start = zlib.crc32(name.encode())
    places = [(start + i * parameter.numel() // count) % parameter.numel() for i in range(count)]
    # Indexed in every dimension: flattening would copy a matrix that is not contiguous.
    index = torch.unravel_index(torch.tensor(places, device=parameter.device), parameter.shape)
    return parameter.detach()[index].double().tolist()


def _close(found: float, wanted: float) -> bool:
    return abs(found - wanted) <= RELATIVE_TOLERANCE * max(abs(found), abs(wanted)) + ABSOLUTE_TOLERANCE
