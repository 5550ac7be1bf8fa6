"""`recontrol.generate`: responses to many prompts, each under a control of its own."""

import contextlib
import logging
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal, overload

from tqdm.auto import tqdm

from recontrol.checks import integer
from recontrol.decoding.batches import (
    REFUSED,
    check_options,
    check_token_counts,
    effective,
    eos_tokens,
    evaluation_mode,
    greedy_unless_asked,
    padding_token,
    seeded,
)
from recontrol.decoding.control import Control
from recontrol.decoding.hooks import output_embedding
from recontrol.decoding.responses import StopStrings, listed_stop_strings, make_response
from recontrol.generation import continuous, static, trial
from recontrol.generation.plan import Plan, batches_of, make_plan, tells_its_cache
from recontrol.generation.requests import Generation, Options, Request, StreamedToken, listed_controls, token_ids
from recontrol.generation.steering import Steering

logger = logging.getLogger("recontrol")

BATCHINGS = ("auto", "continuous", "static")
_ONE_EACH = "there is one response to a prompt; repeat the prompt"
_OWN_CACHE = "batches have a cache of their own; for a static one there is recontrol.StaticDecoder"
_OWN_INPUTS = "inputs are made from the prompts"
NOT_TAKEN = {
    **REFUSED,
    "streamer": "use stream=True",
    "num_return_sequences": _ONE_EACH,
    "num_beams": _ONE_EACH,
    **dict.fromkeys(("past_key_values", "cache_implementation", "use_cache", "compile_config"), _OWN_CACHE),
    **dict.fromkeys(("input_ids", "inputs", "attention_mask", "inputs_embeds"), _OWN_INPUTS),
    **dict.fromkeys(("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"), "a step is one token a row"),
}


@overload
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    control: Control | Sequence[Control | None] | None = ...,
    *,
    stream: Literal[False] = ...,
    **options: Any,
) -> list[Generation]: ...


@overload
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    control: Control | Sequence[Control | None] | None = ...,
    *,
    stream: Literal[True],
    **options: Any,
) -> Iterator[StreamedToken]: ...


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    control: Control | Sequence[Control | None] | None = None,
    *,
    max_new_tokens: int = 128,
    stop_strings: str | Sequence[str] | None = None,
    seed: int = 0,
    batching: str = "auto",
    cache_budget: int | str | None = None,
    batch_size: int | None = None,
    block_tokens: int | None = None,
    stream: bool = False,
    trace: bool = False,
    progress: bool = False,
    backend: str = "auto",
    allow_other_model: bool = False,
    **generation_kwargs: Any,
) -> list[Generation] | Iterator[StreamedToken]:
    """Respond to prompts, each under its own control: y_t ~ softmax(W_lm (o_t + u_t)), u_t by the control of the prompt.

    Only the states that are read to sample a new token are edited, never those of prompt positions before the last, and the key/value cache
    is not touched. What one prompt gets does not depend on its neighbours' controls, and greedy tokens not on the batch, but for
    rounding of the model's own sums where two tokens are equally likely. Sampled tokens depend on the seed and on the batch.

    Batching is "continuous" (transformers' own, with paged cache: a prompt joins when there are free blocks, and makes room when it is finished)
    or "static" (padded batches, decoded to the end one after the other); "auto" is continuous where model, options and release of
    transformers allow it, and logs the reason where not. Each response says which it was.

    The model is left as it was: after an error, after Ctrl-C, and when a stream is closed early. Meanwhile it must not be used elsewhere.

    Args:
        model: a causal language model of transformers, without a `Controller`.
        tokenizer: its tokenizer; its padding settings are neither used nor changed.
        prompts: texts, or lists of token ids.
        control: for all prompts, or a list with one for each; None leaves a prompt alone.
        max_new_tokens: length of a response at most, in tokens.
        stop_strings: strings at which a response ends; it is cut before the first token that touches one.
        seed: of sampling; the caller's generators are left as they were.
        batching: "auto", "continuous" or "static".
        cache_budget: bytes for the key/value cache, or a text such as "8GiB"; by default half of the memory that is free.
        batch_size: prompts decoded at once at most; by default 32 on the CPU, and on a GPU no limit but the cache.
        block_tokens: tokens of a block of paged cache; by default 256 on a GPU, else 16.
        stream: return an iterator that yields a `StreamedToken` whenever there is a token, and one with the response when a prompt is finished.
        trace: record V before and after, the norm of the edit and the divergence that it made, token by token.
        progress: show a bar that counts finished prompts; without `stream` only.
        backend: of the ascent, as for `recontrol.ascend`.
        allow_other_model: accept value functions that were trained on the states of another model.
        generation_kwargs: passed on to transformers, such as do_sample and temperature; without do_sample the model is greedy, whatever its own default.

    Returns:
        One `Generation` a prompt, in the order of the prompts; with `stream`, the iterator.

    Raises:
        TypeError: prompts or controls of the wrong kind, or a value function that does not go with the model's dtype.
        ValueError: prompts without tokens, too long for the model or the budget, as many controls as there are not prompts, a value function of
            another size, device or model, an option that does not go with batches, or one that rules out the batching asked for.
        RuntimeError: a `Controller` is attached, the backend cannot run here, edits do not reach the logits, or transformers failed.

    Source: Kong et al. 2024, section 4.3 (test-time intervention).
    """
    output_embedding(model)
    ids = token_ids(tokenizer, prompts)
    requests = [Request(each, chosen) for each, chosen in zip(ids, listed_controls(control, len(ids)), strict=True)]
    options = checked_options(model, tokenizer, generation_kwargs, max_new_tokens, stop_strings, seed, stream)
    check_token_counts(model, [len(each) for each in ids], max_new_tokens)
    lengths = [len(each) + max_new_tokens for each in ids]
    chosen = _chosen(batching, model, options)
    plan: Plan | list[list[int]]
    if chosen == "static" and cache_budget is None and not tells_its_cache(model.config):
        plan = batches_of(lengths, batch_size)
    else:
        made = make_plan(model.config, model.dtype, lengths, device=model.device, cache_budget=cache_budget, batch_size=batch_size, block_tokens=block_tokens)
        # Prompts that do not fit are refused before any work is done.
        plan = made.static_batches() if chosen == "static" else made.checked()
    keywords = {"backend": backend, "allow_other_model": allow_other_model, "trace": trace}
    running = _run(model, tokenizer, requests, plan, options, keywords)
    if stream:
        return running
    responses: dict[int, Generation] = {}
    with contextlib.closing(running), tqdm(total=len(ids), unit="prompt", disable=not progress) as bar:
        for token in running:
            if token.response is not None:
                responses[token.index] = token.response
                bar.update()
    return [responses[index] for index in range(len(ids))]


def checked_options(
    model: Any, tokenizer: Any, generation_kwargs: dict[str, Any], max_new_tokens: int, stop_strings: str | Sequence[str] | None, seed: int, stream: bool
) -> Options:
    """What `generate` is asked for.

    Args:
        model: the language model, whose generation config fills gaps.
        tokenizer: its tokenizer.
        generation_kwargs: options of transformers.
        max_new_tokens: length of a response at most.
        stop_strings: strings at which a response ends.
        seed: of sampling.
        stream: whether tokens are wanted as they come.

    Raises:
        TypeError, ValueError: as `generate`.
    """
    if integer("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    check_options(generation_kwargs, NOT_TAKEN)
    for name in ("num_beams", "num_return_sequences"):
        if (effective(model, generation_kwargs, name) or 1) != 1:
            raise ValueError(f"the generation config asks for {name}={effective(model, generation_kwargs, name)}: {_ONE_EACH}")
    padding = generation_kwargs.get("pad_token_id")
    stops = listed_stop_strings(stop_strings)
    return Options(
        max_new_tokens=max_new_tokens,
        generation={**greedy_unless_asked(generation_kwargs), **generation_kwargs},
        eos_ids=frozenset(eos_tokens(model, generation_kwargs)),
        pad_id=padding_token(tokenizer) if padding is None else padding,
        stop_strings=tuple(stops),
        ends=StopStrings(tokenizer, stops, 0).ends if stops else None,
        streaming=stream,
        seed=integer("seed", seed),
    )


def _chosen(batching: str, model: Any, options: Options) -> str:
    """How prompts are batched."""
    if batching not in BATCHINGS:
        raise ValueError(f"batching must be one of {', '.join(map(repr, BATCHINGS))}, found {batching!r}")
    if batching == "static":
        return batching
    reason = continuous.why_not(model, options) or trial.why_not(model)
    if reason is None:
        return "continuous"
    if batching == "continuous":
        raise ValueError(f"batching='continuous' cannot be had here: {reason}; use batching='static' or 'auto'")
    logger.info("batching is static: %s", reason)
    return "static"


def _run(
    model: Any, tokenizer: Any, requests: Sequence[Request], plan: Plan | list[list[int]], options: Options, keywords: dict[str, Any]
) -> Generator[StreamedToken, None, None]:
    """The hooks are in place from the first token on until the last, or until the iterator is closed."""
    new: list[list[int]] = [[] for _ in requests]
    batching = "continuous" if isinstance(plan, Plan) else "static"
    with contextlib.ExitStack() as stack:
        stack.enter_context(seeded(options.seed))
        stack.enter_context(evaluation_mode(model))
        steering = stack.enter_context(Steering(model, [request.control for request in requests], **keywords))
        engine = (
            continuous.tokens(model, requests, plan, steering, options) if isinstance(plan, Plan) else static.tokens(model, requests, plan, steering, options)
        )
        for index, token in stack.enter_context(contextlib.closing(engine)):
            if token is not None:
                new[index].append(token)
                yield StreamedToken(index, token, None)
                continue
            response = make_response(tokenizer, requests[index].ids, new[index], options.eos_ids, options.stop_strings)
            trace = steering.traces.get(index)
            cut = None if trace is None else trace.cut(len(response.token_ids))
            yield StreamedToken(index, None, Generation(response.token_ids, response.text, response.finish, batching, cut))
