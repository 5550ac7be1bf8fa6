"""Files of responses, as evaluations write them (`responses.jsonl`), and pairs of responses to the same prompt."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recontrol.checks import first_few
from recontrol.data.dialogue import prompt_of


class Line(NamedTuple):
    """A response in a file; `seed` is that of the run that made it, None where the file has none."""

    prompt: str
    response: str
    seed: Any = None


def read_responses(path: str | os.PathLike, method: str | None = None) -> list[Line]:
    """Read the responses of one method, in the order of the file, which has a JSON object a line: prompt, response, and maybe method, seed, index.

    `method` may be None where the file has one method only. Lines with the same index and seed are refused: they are of several settings without a label.
    """
    # Not splitlines, which also splits at characters such as U+2028 inside a text.
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    entries = [(number, _entry(path, number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    names = sorted({str(entry["method"]) for _, entry in entries if "method" in entry})
    listed = f"its methods are {', '.join(map(repr, names))}" if names else "its lines name no method"
    if method is None and len(names) > 1:
        raise ValueError(f"{path} has the responses of several methods, say which one: {listed}")
    entries = [(number, entry) for number, entry in entries if method is None or str(entry.get("method")) == method]
    if not entries:
        raise ValueError(f"{path} has no responses" + ("" if method is None else f" of the method {method!r}: {listed}"))
    seen: dict[tuple[Any, Any], int] = {}
    for number, entry in entries:
        key = (entry.get("seed"), entry.get("index"))
        if key[1] is not None and seen.setdefault(key, number) != number:
            both = f"lines {seen[key]} and {number} both have index {key[1]} and seed {key[0]}"
            raise ValueError(f"{path}: {both}: a file with the responses of several settings needs a field `method` that tells them apart")
    return [Line(prompt_of(entry), entry["response"], entry.get("seed")) for _, entry in entries]


def pair_up(lines: Sequence[Line], others: Sequence[Line]) -> tuple[list[str], list[str], list[str]]:
    """Pair each response with another one to the same prompt and of the same seed: (prompts, responses, others), in the order of `lines`.

    Where a prompt comes several times for one seed, the first response goes with the first, and so on. Others of a single seed, such as
    the preferred responses of a data set, serve every seed. Others to further prompts are ignored.
    """
    one_seed = len({other.seed for other in others}) < 2
    table = dict(zip(_keys(others, one_seed), (other.response for other in others), strict=True))
    # Counted seed by seed also where the seed is not compared.
    keys = [(None, *key[1:]) if one_seed else key for key in _keys(lines, False)]
    missing = [number for number, key in enumerate(keys) if key not in table]
    if missing:
        first = lines[missing[0]]
        complaint = f"{len(missing)} of {len(lines)} responses have no other one to the same prompt{'' if one_seed else f' and seed {first.seed}'}"
        found = f"found the prompt {first.prompt[-200:]!r}, among others to prompts such as {others[0].prompt[-200:]!r}"
        raise ValueError(f"{complaint}: {first_few(missing)}; {found}")
    return [line.prompt for line in lines], [line.response for line in lines], [table[key] for key in keys]


def _entry(path: str | os.PathLike, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}: line {number} is damaged or not JSON: {error}") from error
    if not (isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in ("prompt", "response"))):
        raise ValueError(f"{path}: line {number} must be an object with the texts prompt and response, found {line[:80]!r}")
    return entry


def _keys(lines: Sequence[Line], one_seed: bool) -> list[tuple[Any, str, int]]:
    """(seed, prompt, how many times the prompt came before for this seed) of each line."""
    seen: Counter[tuple[Any, str]] = Counter()
    keys = []
    for line in lines:
        key = (None if one_seed else line.seed, line.prompt)
        keys.append((*key, seen[key]))
        seen[key] += 1
    return keys
