"""Comparing methods on the same prompts: reward, diversity, coherence, likelihood, divergence, speed and cost."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm

from recontrol.checks import integer
from recontrol.data.identity import ADDRESS, fingerprint
from recontrol.data.rewards import as_reward, checked_rewards, reward_name
from recontrol.data.settings import model_settings, texts_checksum
from recontrol.decoding.batches import check_lengths, check_options
from recontrol.decoding.config import Decoding
from recontrol.decoding.control import Control
from recontrol.evaluation.measure import Cells, Measure
from recontrol.evaluation.metrics import load_encoder
from recontrol.evaluation.results import Result, summarise
from recontrol.files import check_output
from recontrol.methods.base import Method, Uncontrolled, check_uncontrolled, one_score, tensors_checksum
from recontrol.methods.control import ReControl
from recontrol.value import ValueFunction

logger = logging.getLogger(__name__)

BATCH_SIZE = 16
# Decode steps of the unmeasured generation that comes first: threads start, and the ascent prepares the value function.
WARM_UP_TOKENS = 2
# For how many first responses of each method the text is kept token by token, to be shown beside V.
PIECES = 4


def evaluate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    value: ValueFunction | None = None,
    settings: Sequence[tuple[float, int]] | None = None,
    methods: Sequence[Method] = (),
    reward: Any,
    encoder: Any = None,
    seeds: int = 1,
    head_weights: Sequence[float] | None = None,
    controller_options: dict[str, Any] | None = None,
    out: str | os.PathLike | None = None,
    progress: bool = True,
    decoding: Decoding | None = None,
    **keywords: Any,
) -> list[Result]:
    """Decode the same prompts by each method, and measure the responses: one result for the uncontrolled model, then for each setting and each method.

    Every batch is decoded by all methods in turn from the same seed, each time beginning with another method, so that disturbances of the machine affect
    all alike. With `out`, the same call continues with what is missing; one with more methods or seeds adds them.

    Args:
        model: a causal language model with no controller attached.
        tokenizer: its tokenizer.
        prompts: the texts to respond to.
        value: the value function to climb; needed with `settings`. Its V is recorded along the responses of all methods.
        settings: pairs (step_size, steps): RE-Control with `value`.
        methods: others to compare, see `recontrol.methods`. The uncontrolled model is always measured and needs no mention.
        reward: as for `collect`: a callable (prompts, responses) -> scores, a pair (sequence classifier, tokenizer), a name or path, or several of these.
        encoder: of sentences, for the coherence: a name or path for sentence-transformers, or an object with `encode`; None leaves the coherence out.
        seeds: how many times all prompts are decoded; run i begins with `seed + 1000 i`, or beyond the batches of the run before it.
        head_weights: one weight a reward, where there are several: their weighted sum is reported, and climbed by `settings`.
        controller_options: further arguments of `Control` for `settings`, for example {"radius": 5.0}, and `backend` and `allow_other_model`.
        out: folder with a file for each batch of each method, as soon as it is done; None keeps it in memory.
        progress: show a progress bar.
        decoding: how; `batch_size` is 16 unless given, `seed` is that of the first run.
        keywords: settings of `Decoding` by name (max_new_tokens=64), and options of `model.generate` (do_sample=True); without do_sample the model is greedy.

    Raises TypeError, ValueError: something is attached to the model, no prompts or too long ones, settings that are no control, two methods of the same
    label, several rewards without `head_weights`, a reward that returns NaN or the wrong count, or a folder of other settings.
    Source: Kong et al. 2024, section 5 (evaluation metrics).
    """
    decoding = Decoding.of(decoding, **keywords)
    batch_size = decoding.batch_size or BATCH_SIZE
    decoding = dataclasses.replace(decoding, batch_size=batch_size)
    measure = Measure(model, tokenizer, as_reward(reward), value, head_weights, encoder, decoding)
    if integer("seeds", seeds) < 1:
        raise ValueError(f"seeds must be an integer of at least 1, found {seeds!r}")
    compared = [Uncontrolled(), *_settings(value, settings or (), head_weights, **(controller_options or {})), *methods]
    _check(measure, compared, prompts)
    batches = [(number, list(prompts[start : start + batch_size])) for number, start in enumerate(range(0, len(prompts), batch_size))]
    # So far apart that no two runs share a batch's seed.
    runs = [decoding.seed + number * max(1000, len(batches)) for number in range(seeds)]
    cells = Cells(out, _about(measure, prompts), compared)
    stale = [(each.label, run, number) for each in compared for run in runs for number, _ in batches if cells.known(each.label, run, number)]
    stale = [key for key in stale if cells[key].reward not in (None, measure.reward_sha256)]
    if stale:
        logger.warning("the reward has changed since: the responses of %d batches are scored again", len(stale))
    for key in stale:
        cells.add(measure.scored(cells[key], batches[key[2]][1]))
    turns = [compared[number % len(compared) :] + compared[: number % len(compared)] for number, _ in batches]
    todo = [(method, batch, run, number) for run in runs for number, batch in batches for method in turns[number] if not cells.known(method.label, run, number)]
    if controller_options and not settings:
        raise ValueError("controller_options are for settings, found none of these")
    if todo:
        if out is not None:
            check_output(out, folder=True)
        measure = dataclasses.replace(measure, encoder=None if encoder is None else load_encoder(encoder))
        # Every method decodes a little: errors of a method or a reward show before the work, and threads and caches are ready.
        few, first = dataclasses.replace(decoding, max_new_tokens=min(WARM_UP_TOKENS, decoding.max_new_tokens), seed=0), batches[0][1]
        warm = [method.respond(model, tokenizer, first, few) for method in compared if any(method is each[0] for each in todo)]
        one_score(checked_rewards(measure.reward, first, [response.text for response in warm[0].responses]), head_weights)
    done = len(prompts) * len(compared) * seeds - sum(len(batch) for _, batch, _, _ in todo)
    with tqdm(total=len(prompts) * len(compared) * seeds, initial=done, unit="response", disable=not progress) as bar:
        for method, batch, run, number in todo:
            cells.add(measure(method, batch, run, number, num_pieces=PIECES if number == 0 else 0))
            bar.update(len(batch))
    rows = [[cells[method.label, run, number] for run in runs for number, _ in batches] for method in compared]
    return [summarise(method, row, rows[0], head_weights) for method, row in zip(compared, rows, strict=True)]


def _about(measure: Measure, prompts: Sequence[str]) -> dict[str, Any]:
    """What all cells of an evaluation have in common, ready for JSON."""
    decoding, encoder, value = measure.decoding, measure.encoder, measure.value
    options = {"stop_strings": list(decoding.stop_strings), **decoding.options}
    return {
        **{name: entry for name, entry in model_settings(measure.model, measure.tokenizer).items() if name != "made_with"},
        "prompts_sha256": texts_checksum(prompts),
        "reward": reward_name(measure.reward),
        "max_new_tokens": decoding.max_new_tokens,
        "batch_size": decoding.batch_size,
        "seed": decoding.seed,
        "encoder": encoder if encoder is None or isinstance(encoder, str) else type(encoder).__name__,
        "value_sha256": None if value is None else tensors_checksum(value.parameters()),
        "head_weights": measure.head_weights,
        # Where an object lies in memory is no part of what it is.
        "options": {name: ADDRESS.sub("", repr(option)) for name, option in options.items()},
        "encoder_sha256": None if encoder is None or isinstance(encoder, str) else fingerprint(encoder),
        "options_sha256": fingerprint(options),
    }


def _settings(value: ValueFunction | None, settings: Sequence[tuple[float, int]], head_weights: Sequence[float] | None, **options: Any) -> Iterator[ReControl]:
    """RE-Control by each pair."""
    beside = {name: options.pop(name) for name in ("backend", "allow_other_model") if name in options}
    for step_size, steps in settings:
        if value is None:
            raise ValueError("settings of control need a value function")
        if step_size == 0 or steps == 0:
            raise ValueError(f"found the setting step_size {step_size}, steps {steps}: the uncontrolled model is always measured, leave it out")
        yield ReControl(Control(value, step_size, steps, head_weights=head_weights, **options), **beside)


def _check(measure: Measure, methods: Sequence[Method], prompts: Sequence[str]) -> None:
    """Refuse before any work what could not be measured."""
    check_options(measure.decoding.options)
    labels = set()
    for method in methods:
        if not isinstance(method, Method):
            raise TypeError(f"methods must be of recontrol.methods, found {type(method).__name__}")
        if method.label in labels:
            raise ValueError(f"two methods are called {method.label!r}: their results could not be told apart")
        labels.add(method.label)
    check_lengths(measure.model, measure.tokenizer, prompts, measure.decoding.max_new_tokens)
    for method in methods:
        written = [method.write(prompt) for prompt in prompts]
        if written != list(prompts):
            check_lengths(measure.model, measure.tokenizer, written, measure.decoding.max_new_tokens)
    check_uncontrolled(measure.model)
