"""Trying many settings of control on the same prompts, for less than decoding with each of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import StoppingCriteriaList

from recontrol import backends
from recontrol.decoding.control import Control, integer
from recontrol.decoding.generation import REFUSED, check_options, check_token_counts, effective, evaluation_mode
from recontrol.decoding.responses import StopStrings, make_response
from recontrol.generation.generate import checked_options
from recontrol.generation.plan import batches_of
from recontrol.generation.requests import Generation, token_ids
from recontrol.tuning.forking import ForkedDecoding
from recontrol.value import ValueFunction


@dataclass(frozen=True)
class StepSweep:
    """Responses to the same prompts under several settings. The key of a setting is n for `sweep_steps`, (step_size, n) for `sweep_settings`.

    Attributes:
        responses: by setting, one a prompt, in the order of the prompts.
        decoded_tokens: by setting, decode steps that were run for it, the first token's included.
        shared_tokens: by setting, decode steps that were run for an earlier setting and served this one as well. Decoding with this setting
            alone takes decoded_tokens + shared_tokens.
        forward_calls: of the model, over all settings.
    """

    responses: dict[Any, list[Generation]]
    decoded_tokens: dict[Any, int]
    shared_tokens: dict[Any, int]
    forward_calls: int

    @property
    def saved(self) -> float:
        """The share of decode steps that decoding with each setting alone would have taken, and that were not run: shared / (decoded + shared)."""
        shared = sum(self.shared_tokens.values())
        return shared / (sum(self.decoded_tokens.values()) + shared)


def sweep_steps(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    value: ValueFunction,
    step_size: float,
    steps: Sequence[int] = (10, 20, 30, 50),
    **options: Any,
) -> StepSweep:
    """Respond to prompts under each number of steps: `sweep_settings` for one step size.

    Args:
        model: as for `sweep_settings`.
        tokenizer: likewise.
        prompts: likewise.
        value: likewise.
        step_size: alpha.
        steps: the numbers of steps to try, each once; 0 is the uncontrolled model.
        options: the other arguments of `sweep_settings`.

    Returns:
        The responses by n.

    Raises:
        What `sweep_settings` raises.
    """
    found = sweep_settings(model, tokenizer, prompts, value, [(step_size, n) for n in steps], **options)
    return StepSweep(
        responses={n: given for (_, n), given in found.responses.items()},
        decoded_tokens={n: count for (_, n), count in found.decoded_tokens.items()},
        shared_tokens={n: count for (_, n), count in found.shared_tokens.items()},
        forward_calls=found.forward_calls,
    )


def sweep_settings(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    value: ValueFunction,
    settings: Sequence[tuple[float, int]],
    *,
    max_new_tokens: int = 128,
    stop_strings: str | Sequence[str] | None = None,
    radius: float | None = None,
    target: float | None = None,
    head_weights: Sequence[float] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    trace: bool = False,
    backend: str = "auto",
    allow_other_model: bool = False,
    **generation_kwargs: Any,
) -> StepSweep:
    """Respond to prompts under each setting: y_t = argmax(W_lm (o_t + u_t) [/ T + g_t]), every distinct prefix decoded once.

    o_t depends on the tokens before it and not on earlier edits, which never enter the key/value cache. So while two settings have chosen
    the same tokens they have the same state, and one decode step serves both; where their tokens part, the row forks, and both go on from
    there. Each setting gets the tokens that decoding with it alone would give, but for rounding of the model's own sums where two
    tokens are equally likely: rows of a batch may be summed in another order. How much is saved depends on how long settings agree (`StepSweep`).

    With `do_sample=True` the tokens are sampled by Gumbel-max, with noise g_t that depends on seed, prompt and t alone (`GumbelNoise`): the
    distribution is that of `model.generate` with the same temperature, top_k and top_p, the samples are others. All settings get the same noise, so
    forks stay exact, and differences between settings have less variance than with samples of their own.

    Args:
        model: a causal language model of transformers, without a `Controller`; it is left as it was.
        tokenizer: its tokenizer.
        prompts: texts, or lists of token ids.
        value: the value function to climb.
        settings: pairs (step_size, steps), each once; (0.0, 0) is the uncontrolled model.
        max_new_tokens: length of a response at most, in tokens.
        stop_strings: strings at which a response ends; it is cut before the first token that touches one.
        radius: cut the edit where its norm reaches this, for all settings.
        target: climb towards this value instead of upward, for all settings.
        head_weights: (num_heads,) numbers, the objective is the weighted sum of the heads; required if there are several.
        seed: of the noise with `do_sample=True`, 0 or more.
        batch_size: prompts decoded at once; where all settings part there are as many rows a prompt as settings.
        trace: record V before and after, the norm of the edit and the divergence that it made, token by token.
        backend: of the ascent, as for `recontrol.ascend`.
        allow_other_model: accept a value function that was trained on the states of another model.
        generation_kwargs: passed on to `model.generate`; without do_sample the model is greedy.

    Returns:
        The responses by (step_size, steps), and what was shared.

    Raises:
        TypeError: prompts or settings of the wrong kind, or a value function that does not go with the model's dtype.
        ValueError: no settings or one twice, prompts without tokens or too long for the model, a number that is negative or NaN, a value function of
            another size, device or model, or an option that does not go with one row of new tokens a prompt.
        RuntimeError: a `Controller` is attached, the backend cannot run here, or edits do not reach the logits.

    Source: Kong et al. 2024, section 5 (choice of step size and number of updates); Gumbel-max: Gumbel 1954.
    """
    # What this does in place of the decoding of `generate` is not for others to replace.
    check_options(generation_kwargs, {**REFUSED, "custom_generate": "the settings are decoded together"})
    backends.check_name(backend)
    pairs = [(step_size, steps) for step_size, steps in settings]
    if not pairs or len(set(pairs)) != len(pairs):
        raise ValueError(f"settings must be one or more pairs (step_size, steps), each once, found {pairs}")
    controls = [Control(value, step_size, steps, radius, target, head_weights=head_weights) for step_size, steps in pairs]
    if integer("batch_size", batch_size) < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    options = checked_options(model, tokenizer, generation_kwargs, max_new_tokens, stop_strings, seed, stream=False)
    ids = token_ids(tokenizer, prompts)
    check_token_counts(model, list(map(len, ids)), max_new_tokens)
    sampled = bool(effective(model, dict(options.generation), "do_sample"))
    with evaluation_mode(model), ForkedDecoding(model, controls, backend=backend, allow_other_model=allow_other_model, trace=trace) as decoding:
        for batch in batches_of(list(map(len, ids)), batch_size):
            rows = [ids[prompt] for prompt in batch]
            stops = [StopStrings(tokenizer, options.stop_strings, max(map(len, rows)))] if options.stop_strings else []
            decoding.decode(batch, rows, options, StoppingCriteriaList(stops), sampled)

    def response(setting: int, prompt: int) -> Generation:
        kept = make_response(tokenizer, ids[prompt], decoding.tokens[setting, prompt], options.eos_ids, options.stop_strings)
        cut = None if decoding.traces is None else decoding.traces[setting, prompt].cut(len(kept.token_ids))
        return Generation(kept.token_ids, kept.text, kept.finish, "static", cut)

    return StepSweep(
        {pair: [response(setting, prompt) for prompt in range(len(ids))] for setting, pair in enumerate(pairs)},
        {pair: decoding.decoded[setting] for setting, pair in enumerate(pairs)},
        {pair: decoding.shared[setting] for setting, pair in enumerate(pairs)},
        decoding.forward_calls,
    )
