"""Results as a table in plain text."""

import textwrap
from collections.abc import Collection, Mapping, Sequence

from recontrol.evaluation.results import Result

HEADER = ("setting", "reward", "95 % interval", "diversity", "coherence", "NLL", "length", "tokens/s", "cost", "|edit|")
NOTE = (
    "alpha: step size, n: steps. NLL: nats a token under the uncontrolled model. length: tokens a response. "
    "cost: time of a decode step over the uncontrolled one's. |edit|: mean norm."
)
WIDTH = 120


def table(results: Sequence[Result], chosen: Collection[str] = (), rule: str = "the largest coherence + diversity + reward") -> str:
    """The results as aligned plain text, with a line on what the columns mean; methods whose labels are in `chosen`, by this rule, have a star."""
    rows = [HEADER]
    for result in results:
        low, high = result.reward_interval
        label, speed = result.method + (" *" if result.method in chosen else ""), result.tokens_per_second
        measured = {"reward": ".3f", "diversity": ".3f", "coherence": ".3f", "nll": ".2f", "length": ".1f", "cost": ".2f", "edit_norm": ".2f"}
        cells = {name: "-" if getattr(result, name) is None else format(getattr(result, name), form) for name, form in measured.items()}
        reward, diversity, coherence, nll, length, cost, edit = cells.values()
        interval, speed_text = f"[{low:.3f}, {high:.3f}]", f"{speed:.{0 if speed >= 100 else 1}f}"
        rows.append((label, reward, interval, diversity, coherence, nll, length, speed_text, f"{cost}x", edit))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += textwrap.wrap(NOTE, WIDTH)
    if any(result.method in chosen for result in results):
        lines.append(f"* chosen: {rule}.")
    return "\n".join(lines)


def rule_in_words(rule: str | Mapping[str, float]) -> str:
    """What settings are chosen by."""
    if isinstance(rule, Mapping):
        return f"the largest reward within {rule['kl']:g} nats a response"
    return {"paper": "the largest coherence + diversity + reward", "reward": "the largest reward"}[rule]
