"""The first lines of a report: what was compared, and three plain statements that follow from the numbers."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from recontrol.reports.columns import QUALITY, interval_digits
from recontrol.reports.comparison import EqualKL, Row, not_told_apart, the_control
from recontrol.reports.findings import Findings
from recontrol.version import __version__

REWARD = QUALITY[0]
RULES = {"paper": "the largest coherence + diversity + reward", "reward": "the largest reward"}


def facts(findings: Findings, study: Mapping[str, Any]) -> dict[str, str]:
    """What was compared, by name; what the study does not say is left out.

    Args:
        findings: what was found.
        study: the sections of a study, ready for JSON; empty where there is none.
    """
    seeds = findings.results[0].seeds
    count = f"{len(findings.prompts)} prompts" + (f", {seeds} seeds" if seeds > 1 else ", one seed")
    model, prompts, reward, generation = (study.get(name) or {} for name in ("model", "prompts", "reward", "generation"))
    test, validation, wins, rule = prompts.get("test"), prompts.get("validation"), study.get("wins") or {}, study.get("choose")
    weights = reward.get("head_weights")
    found = {
        "Language model": _listed(model.get("name"), model.get("revision"), _prefixed("weights in ", model.get("dtype"))),
        "Test prompts": _listed(_source(test), count),
        "Reward": _listed(*reward.get("names", []), _prefixed("weighted ", weights)),
        "Value function": study.get("value") or ("trained for this study" if study else ""),
        "Decoding": _listed(
            _prefixed("at most ", generation.get("max_new_tokens"), " tokens"),
            _prefixed("batches of ", generation.get("batch_size")),
            *(f"{name} {option}" for name, option in generation.get("options", {}).items()),
        ),
        "Settings chosen": _listed(_prefixed("on ", _source(validation)), _rule(rule)) if findings.validation else "",
        "Win rate": _listed(_prefixed("judged by ", wins.get("judge")), _prefixed("against ", findings.against)) if findings.against else "",
        "Made": _listed(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", *(f"{name} {number}" for name, number in versions().items())),
        "Machine": machine(),
    }
    return {name: text for name, text in found.items() if text}


def versions() -> dict[str, str]:
    """Of the packages that the numbers depend on."""
    return {"recontrol": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "transformers")}, "Python": platform.python_version()}


def machine() -> str:
    """What this process runs on, which times and memory depend on."""
    import torch

    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{threads} CPU thread{'s' if threads > 1 else ''}"
    return f"{platform.system()} {platform.machine()}, {device}"


def statements(rows: Sequence[Row], equal: EqualKL | None) -> list[str]:
    """Who has the largest reward, who at equal divergence, and what it costs.

    Args:
        rows: of the report.
        equal: the rows at equal divergence; None where that is not known.
    """
    return [_largest(rows), _at_equal_kl(equal), _price(rows)]


def _largest(rows: Sequence[Row]) -> str:
    compared = not_told_apart([row.result.rewards for row in rows], rows[0].result.seeds)
    digits = interval_digits([row.result.reward_interval for row in rows])
    if compared is None:
        return f"Only {rows[0].name} was measured: its reward is {_with_interval(rows[0].result.reward, rows[0].result.reward_interval, digits)}."
    best, close = rows[compared[0]], [rows[place].name for place in compared[1]]
    shown = _with_interval(best.result.reward, best.result.reward_interval, digits)
    if best.gain is None:
        text = f"No method has a larger reward than the uncontrolled model, {shown}."
    else:
        text = f"{_start(best.name)} has the largest reward, {shown}: {_with_interval(best.gain, best.gain_interval, digits)} more than the uncontrolled model."
    if close:
        return f"{text} The difference from {_and(close)} may be chance."
    return f"{text} Paired by prompt, it is above every other row beyond chance."


def _at_equal_kl(equal: EqualKL | None) -> str:
    if equal is None:
        return "Nothing can be said at equal divergence: no row's was measured, or none is above 0."
    reached = [{name: entries[place] for name, entries in equal.rewards.items() if entries[place].reward is not None} for place in range(len(equal.levels))]
    shared = [place for place, entries in enumerate(reached) if len(entries) > 1]
    if not shared:
        return "Nothing can be said at equal divergence: no two rows were measured at the same one."
    # Far enough for a difference, and not so far that hardly any row is left.
    place = max([place for place in shared if 2 * len(reached[place]) >= len(equal.rewards)], default=shared[-1])
    order = sorted(reached[place].items(), key=lambda entry: -(entry[1].reward or 0.0))
    digits = interval_digits([entry.interval for _, entry in order if entry.interval])
    (name, best), *others = order
    text = f"At a divergence of {equal.levels[place]:g} nats a response, {name} has the largest reward, {_with_interval(best.reward, best.interval, digits)}"
    where = "validation" if equal.on_validation else "test"
    text += f", of the {len(order)} rows that go so far ({where} prompts, the best settings within that divergence)."
    close = [other for other, entry in others if best.interval is None or entry.interval is None or entry.interval[1] >= best.interval[0]]
    if close:
        text += f" It overlaps with the interval of {_and(close)}, so the order may be chance."
    before = [f"{other} ({REWARD.write(equal.largest[other][1], digits)} at {equal.largest[other][0]:.3g} nats)" for other in equal.better_before(place)]
    return f"{text} Without going so far, {_and(before)} {'has' if len(before) == 1 else 'have'} a larger one." if before else text


def _price(rows: Sequence[Row]) -> str:
    control = the_control(rows)
    best = max(rows, key=lambda row: row.result.reward)
    told = list(dict.fromkeys(row.name for row in (control, best) if row is not None and row.gain is not None))
    if not told:
        return "No row adds anything to the cost of the uncontrolled model."
    by_name = {row.name: row for row in rows}
    text = " ".join(_cost(by_name[name]) for name in told)
    useful = [row for row in rows if row.gain_interval is not None and row.gain_interval[0] > 0]
    if not useful:
        return f"{text} No row's gain is beyond chance."
    cheapest = min(useful, key=lambda row: row.result.cost)
    return f"{text} Of the rows whose gain is beyond chance, {cheapest.name} is the cheapest while decoding ({cheapest.result.cost:.2f} times)."


def _cost(row: Row) -> str:
    result = row.result
    text = f"{_start(row.name)} makes a decode step {result.cost:.2f} times as long ({result.added_seconds * 1000:.3g} ms more a token)"
    training = result.training
    if not training.parameters:
        return f"{text} and needs no training."
    seconds = "training" if training.seconds is None else f"{training.seconds:,.0f} s of training"
    return f"{text} and needs {seconds} of {training.parameters:,} parameters."


def _with_interval(number: float | None, interval: tuple[float, float] | None, digits: int | None) -> str:
    return f"{REWARD.write(number, digits)} {REWARD.write_interval(interval, digits)}".strip()


def _start(name: str) -> str:
    """As the first word of a sentence."""
    return name[:1].upper() + name[1:]


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _listed(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _prefixed(before: str, content: Any, after: str = "") -> str:
    return "" if content in (None, "") else f"{before}{content}{after}"


def _source(section: Mapping[str, Any] | None) -> str:
    if not section:
        return ""
    split = "" if str(section["source"]).endswith((".jsonl", ".json", ".txt")) else section.get("split")
    return _listed(section["source"], _prefixed("split ", split), _prefixed("the first ", section.get("limit")))


def _rule(rule: Any) -> str:
    if isinstance(rule, Mapping):
        return f"the largest reward within {rule['kl']:g} nats a response"
    return RULES.get(rule, json.dumps(rule) if rule else "")
