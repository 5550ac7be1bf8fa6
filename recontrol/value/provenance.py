"""Reading what a manifest or a provenance says."""

import hashlib
import json
from typing import Any


def fingerprint_hash(fingerprint: dict[str, Any]) -> str:
    """SHA-256 of a model's fingerprint without its name; the same model in another dtype has another."""
    content = {key: value for key, value in fingerprint.items() if key != "name"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def names_of_heads(recorded: Any, num_heads: int) -> list[str]:
    """One name a head from what is recorded of the reward, which is None where nothing is known."""
    if isinstance(recorded, list) and len(recorded) == num_heads:
        return [str(name) for name in recorded]
    name = "reward" if recorded is None else ", ".join(recorded) if isinstance(recorded, list) else str(recorded)
    return [name] if num_heads == 1 else [f"{name}: {head}" for head in range(num_heads)]
