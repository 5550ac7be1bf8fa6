"""Comparing methods on the same prompts: reward, diversity, coherence, likelihood, divergence, speed and cost."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from recontrol.data.rewards import as_reward, checked_rewards, reward_name
from recontrol.data.settings import model_settings, texts_checksum
from recontrol.decoding.batches import check_lengths, check_options
from recontrol.decoding.control import Control
from recontrol.decoding.hooks import attachments, output_embedding
from recontrol.decoding.responses import listed_stop_strings
from recontrol.evaluation.cells import Cells
from recontrol.evaluation.measure import Cell, Measure
from recontrol.evaluation.metrics import load_encoder
from recontrol.evaluation.results import Result, summarise
from recontrol.methods.base import Method, Uncontrolled, tensors_checksum
from recontrol.methods.control import ReControl
from recontrol.methods.base import one_score
from recontrol.value import ValueFunction

# Decode steps of the unmeasured generation that comes first: threads start, and what the ascent precomputes is made.
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
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    seeds: int = 1,
    stop_strings: Sequence[str] | None = None,
    head_weights: Sequence[float] | None = None,
    controller_options: dict[str, Any] | None = None,
    out: str | os.PathLike | None = None,
    progress: bool = True,
    **generation_kwargs: Any,
) -> list[Result]:
    """Decode the same prompts by each method, and measure the responses.

    Every batch is decoded by all methods in turn, beginning with another one each time, from the same seed: what the machine does meanwhile meets
    them all alike. With `out`, each batch of each method is a file there as soon as it is done; the same call goes on with what is missing, and one with
    more methods or seeds adds them (their speed is then compared with that of the uncontrolled model at another time).

    Args:
        model: a causal language model with no controller attached.
        tokenizer: its tokenizer.
        prompts: the texts to respond to.
        value: the value function to climb; needed with `settings`. Its V is recorded along the responses of all methods.
        settings: pairs (step_size, steps): RE-Control with `value`.
        methods: others to compare, see `recontrol.methods`. The uncontrolled model is always measured and needs no mention.
        reward: as for `collect`: a callable (prompts, responses) -> scores, a pair (sequence classifier, tokenizer), or
            a name or path, or several of these.
        encoder: sentence encoder for the coherence: a name or path for sentence-transformers, or an object with
            `encode`; None leaves the coherence out.
        max_new_tokens: length of a response at most, in tokens.
        batch_size: prompts decoded at once.
        seed: the first seed; batch b is decoded with `seed + b` by every method.
        seeds: how many times all prompts are decoded; run i begins with `seed + 1000 i`, or beyond the batches of the run before it.
        stop_strings: strings at which a response ends, for example the mark of a further turn.
        head_weights: one weight a reward, where there are several: their weighted sum is reported, and climbed by `settings`.
        controller_options: further arguments of `Control` for `settings`, for example {"radius": 5.0}, and `backend` and `allow_other_model`.
        out: folder for what is done; None keeps it in memory.
        progress: show a progress bar.
        generation_kwargs: passed on to `model.generate`; without do_sample the model is greedy.

    Returns:
        One result for the uncontrolled model, then one for each setting, then one for each method, in order.

    Raises:
        TypeError: `reward` is nothing that can be called.
        ValueError: a controller is attached to the model, no prompts or too long ones (they are named), settings without
            a value function or with a negative or NaN number in them, two methods of the same label, several rewards without `head_weights`, a reward
            that returns NaN or the wrong count, or a folder with an evaluation of other settings.

    Source: Kong et al. 2024, section 5 (evaluation metrics).
    """
    score = as_reward(reward)
    check_options(generation_kwargs)
    for name, number in {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "seeds": seeds}.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} must be an integer of at least 1, found {number!r}")
    compared = [Uncontrolled(), *_settings(value, settings, head_weights, controller_options or {}), *methods]
    _check_methods(compared)
    check_lengths(model, tokenizer, prompts, max_new_tokens)
    for method in compared:
        written = [method.write(prompt) for prompt in prompts]
        if written != list(prompts):
            check_lengths(model, tokenizer, written, max_new_tokens)
    if attachments(output_embedding(model)):
        raise ValueError("something is attached to the model already: detach it, so that the uncontrolled model can be measured")
    options = {"stop_strings": listed_stop_strings(stop_strings), **generation_kwargs}
    about = {
        **{name: entry for name, entry in model_settings(model, tokenizer).items() if name != "made_with"},
        "prompts_sha256": texts_checksum(prompts),
        "reward": reward_name(score),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
        "encoder": encoder if encoder is None or isinstance(encoder, str) else type(encoder).__name__,
        "value_sha256": None if value is None else tensors_checksum(value.parameters()),
        "head_weights": head_weights,
        "options": {name: repr(option) for name, option in options.items()},
    }
    cells = None if out is None else Cells(Path(out), about)
    batches = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    # So far apart that no two runs share a batch's seed.
    runs = [seed + number * max(1000, len(batches)) for number in range(seeds)]
    found = {} if cells is None else _found(cells, compared, runs, len(batches))
    todo = [(run, number) for run in runs for number in range(len(batches)) if any((method.label, run, number) not in found for method in compared)]
    if todo:
        encoder = None if encoder is None else load_encoder(encoder)
        measure = Measure(model, tokenizer, score, value, head_weights, encoder, max_new_tokens, options)
        _warm_up(measure, [method for method in compared if any((method.label, run, number) not in found for run, number in todo)], batches[0])
    with tqdm(total=len(prompts) * len(compared) * seeds, unit="response", disable=not progress) as bar:
        bar.update(sum(len(cell.answers) for cell in found.values()))
        for run, number in todo:
            turn = number % len(compared)
            for method in compared[turn:] + compared[:turn]:
                if (method.label, run, number) in found:
                    continue
                cell = measure(method, batches[number], run, number, num_pieces=PIECES if number == 0 else 0)
                found[method.label, run, number] = cell
                if cells is not None:
                    cells.save(method, cell)
                bar.update(len(cell.answers))
    rows = [[found[method.label, run, number] for run in runs for number in range(len(batches))] for method in compared]
    return [summarise(method, row, rows[0], head_weights) for method, row in zip(compared, rows, strict=True)]


def _settings(
    value: ValueFunction | None, settings: Sequence[tuple[float, int]] | None, head_weights: Sequence[float] | None, options: dict[str, Any]
) -> list[Method]:
    """RE-Control by each pair."""
    if not settings:
        return []
    if value is None:
        raise ValueError("settings of control need a value function")
    beside = {name: options[name] for name in ("backend", "allow_other_model") if name in options}
    of_control = {name: option for name, option in options.items() if name not in beside}
    methods: list[Method] = []
    for step_size, steps in settings:
        if step_size == 0 or steps == 0:
            raise ValueError(f"found the setting step_size {step_size}, steps {steps}: the uncontrolled model is always measured, leave it out")
        methods.append(ReControl(Control(value, step_size, steps, head_weights=head_weights, **of_control), **beside))
    return methods


def _check_methods(methods: Sequence[Method]) -> None:
    labels = set()
    for method in methods:
        if not isinstance(method, Method):
            raise TypeError(f"methods must be of recontrol.methods, found {type(method).__name__}")
        if method.label in labels:
            raise ValueError(f"two methods are called {method.label!r}: their results could not be told apart")
        labels.add(method.label)


def _found(cells: Cells, methods: Sequence[Method], runs: Sequence[int], batches: int) -> dict[tuple[str, int, int], Cell]:
    loaded = {(method.label, run, number): cells.load(method, run, number) for method in methods for run in runs for number in range(batches)}
    return {key: cell for key, cell in loaded.items() if cell is not None}


def _warm_up(measure: Measure, methods: Sequence[Method], prompts: Sequence[str]) -> None:
    """Let every method decode a little: what is wrong with a method or a reward shows before the work, and threads and caches are ready."""
    for method in methods:
        warm_up = method.respond(measure.model, measure.tokenizer, prompts, max_new_tokens=min(WARM_UP_TOKENS, measure.max_new_tokens), **measure.options)
        if method is methods[0]:
            scores = checked_rewards(measure.reward, prompts, [response.text for response in warm_up.responses])
            one_score(scores, measure.head_weights)
