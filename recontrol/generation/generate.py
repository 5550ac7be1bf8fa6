"""`recontrol.generate`: responses to many prompts, each under a control of its own."""

import contextlib
import functools
import logging
from collections.abc import Callable, Generator, Sequence
from typing import Any

from tqdm.auto import tqdm

from recontrol.decoding import batches
from recontrol.decoding.config import Decoding
from recontrol.decoding.control import Control
from recontrol.decoding.hooks import input_device, output_embedding
from recontrol.decoding.packing import pack_by_length
from recontrol.decoding.responses import StopStrings, make_response
from recontrol.generation import continuous, static, trial
from recontrol.generation.plan import REQUESTS_AT_ONCE, Plan, make_plan, tells_its_cache
from recontrol.generation.request_editing import RequestEditing
from recontrol.generation.requests import BatchDecoding, Generation, StreamedToken, listed_controls, token_ids

logger = logging.getLogger("recontrol")

BATCHINGS = ("auto", "continuous", "static")
ONE_EACH = "there is one response to a prompt; repeat the prompt"
OWN_CACHE = "batches have a cache of their own; for a static one there is recontrol.StaticDecoder"
NOT_TAKEN = {
    **batches.REFUSED,
    "streamer": "use stream=True",
    **dict.fromkeys(("num_return_sequences", "num_beams"), ONE_EACH),
    **dict.fromkeys(("past_key_values", "cache_implementation", "use_cache", "compile_config"), OWN_CACHE),
    **dict.fromkeys(("input_ids", "inputs", "attention_mask", "inputs_embeds"), "inputs are made from the prompts"),
    **dict.fromkeys(("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"), "a step is one token a row"),
}


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    control: Control | Sequence[Control | None] | None = None,
    *,
    decoding: Decoding | None = None,
    batching: str = "auto",
    cache_budget: int | str | None = None,
    block_tokens: int | None = None,
    stream: bool = False,
    trace: bool = False,
    progress: bool = False,
    backend: str = "auto",
    allow_other_model: bool = False,
    **keywords: Any,
) -> Any:
    """Respond to prompts, each under its own control: y_t ~ softmax(W_lm (o_t + u_t)), u_t by the control of the prompt.

    Only the states that are read to sample a new token are edited, and the key/value cache is not touched. What one prompt gets does not depend on its
    neighbours' controls, and greedy tokens not on the batch, but for rounding; sampled tokens depend on the seed and on the batch. A state stays unedited,
    with a warning, if it is not finite or its edit would leave the range of its dtype. The model is left as it was; meanwhile it must not be used elsewhere.

    Args:
        model: a causal language model of transformers, without a `Controller`.
        tokenizer: its tokenizer; its padding settings are neither used nor changed.
        prompts: texts, or lists of token ids.
        control: for all prompts, or a list with one for each; None leaves a prompt alone.
        decoding: how long responses may be, where they stop, how they are sampled.
        batching: "continuous" (paged cache), "static" (padded batches), or "auto", continuous where that can be; the reason where not is logged.
        cache_budget: bytes for the key/value cache, or a text such as "8GiB"; by default half of the memory that is free.
        block_tokens: tokens of a block of paged cache; by default 256 on a GPU, else 16.
        stream: return an iterator that yields a `StreamedToken` whenever there is a token, and one with the response when a prompt is finished.
        trace: record V before and after, the norm of the edit and the divergence that it made, token by token.
        progress: show a bar that counts finished prompts; without `stream` only.
        backend: of the ascent, as for `recontrol.ascend`.
        allow_other_model: accept value functions that were trained on the states of another model.
        keywords: settings of `Decoding` by name: `max_new_tokens` (128), `stop_strings`, `seed` (the caller's generators are left as they were), `batch_size`
            (at most so many at once; by default 32 on the CPU, and on a GPU no limit but the cache). The rest is passed on to transformers; without
            do_sample the model is greedy, whatever its own default.

    Returns list[Generation], in the order of the prompts; with `stream`, Iterator[StreamedToken]. What cannot be is a TypeError or ValueError before any work,
    and a RuntimeError where the backend cannot run here or edits do not reach the logits. Source: Kong et al. 2024, section 4.3 (test-time intervention).
    """
    output_embedding(model)
    ids = token_ids(tokenizer, prompts)
    controls = listed_controls(control, len(ids), model.dtype)
    decoding = _for_batches(model, tokenizer, Decoding.of(decoding, **keywords), stream)
    batches.check_tokens(model, ids)
    batches.check_token_counts(model, [len(each) for each in ids], decoding.max_new_tokens)
    plan = _planned(batching, model, ids, decoding, cache_budget, block_tokens)
    attach = functools.partial(RequestEditing, model, controls, backend=backend, allow_other_model=allow_other_model, trace=trace)
    running = _run(model, tokenizer, ids, plan, decoding, attach)
    if stream:
        return running
    responses: dict[int, Generation] = {}
    with contextlib.closing(running), tqdm(total=len(ids), unit="prompt", disable=not progress) as bar:
        for token in running:
            if token.response is not None:
                responses[token.index] = token.response
                bar.update()
    return [responses[index] for index in range(len(ids))]


def _for_batches(model: Any, tokenizer: Any, decoding: Decoding, stream: bool) -> BatchDecoding:
    """The decoding with what the model's generation config and the tokenizer add; refuses options that do not go with batches."""
    options = dict(decoding.options)
    batches.check_options(options, NOT_TAKEN)
    for name in ("num_beams", "num_return_sequences"):
        if (given := batches.effective(model, options, name) or 1) != 1:
            raise ValueError(f"the generation config asks for {name}={given}: {ONE_EACH}")
    stops = decoding.stop_strings
    return BatchDecoding(
        **{**vars(decoding), "options": {**batches.greedy_unless_asked(options), **options}},
        eos_ids=frozenset(batches.eos_tokens(model, options)),
        pad_id=batches.padding_token(tokenizer, options),
        ends=StopStrings(tokenizer, stops, 0).ends if stops else None,
        streaming=stream,
    )


def _planned(
    batching: str, model: Any, ids: list[list[int]], decoding: BatchDecoding, cache_budget: int | str | None, block_tokens: int | None
) -> Plan | list[list[int]]:
    """The plan of continuous batches, or the static batches. Prompts that do not fit are refused before any work is done."""
    if batching not in BATCHINGS:
        raise ValueError(f"batching must be one of {', '.join(map(repr, BATCHINGS))}, found {batching!r}")
    reason = "it was asked for" if batching == "static" else continuous.why_not(model, decoding) or trial.why_not(model)
    if batching == "continuous" and reason is not None:
        raise ValueError(f"batching='continuous' cannot be had here: {reason}; use batching='static' or 'auto'")
    if batching == "auto" and reason is not None:
        logger.info("batching is static: %s", reason)
    lengths = [len(each) + decoding.max_new_tokens for each in ids]
    if reason is not None and cache_budget is None and not tells_its_cache(model.config):
        # Nothing is known of the cache: so many prompts, the longest first.
        return pack_by_length(lengths, sum(lengths) * len(lengths), 1, largest=decoding.batch_size or REQUESTS_AT_ONCE)
    limits: dict[str, Any] = {"cache_budget": cache_budget, "batch_size": decoding.batch_size, "block_tokens": block_tokens}
    plan = make_plan(model.config, model.dtype, lengths, device=input_device(model), **limits)
    return plan.checked() if reason is None else plan.static_batches()


def _run(
    model: Any, tokenizer: Any, prompts: list[list[int]], plan: Plan | list[list[int]], decoding: BatchDecoding, attach: Callable[[], RequestEditing]
) -> Generator[StreamedToken, None, None]:
    """The hooks are in place from the first token on until the last, or until the iterator is closed."""
    new: list[list[int]] = [[] for _ in prompts]
    with contextlib.ExitStack() as stack:
        stack.enter_context(batches.seeded(decoding.seed))
        stack.enter_context(batches.evaluation_mode(model))
        editing = stack.enter_context(attach())
        if isinstance(plan, Plan):
            batching, engine = "continuous", continuous.tokens(model, prompts, plan, editing, decoding)
        else:
            batching, engine = "static", static.tokens(model, prompts, plan, editing, decoding)
        for index, token in stack.enter_context(contextlib.closing(engine)):
            if token is None:
                if (edited := editing.edited.get(index, len(new[index]))) < len(new[index]):
                    raise RuntimeError(f"{len(new[index])} tokens of prompt {index} come from {edited} edited states: transformers runs the model in a new way")
                response = make_response(tokenizer, prompts[index], new[index], decoding.eos_ids, decoding.stop_strings)
                trace = editing.traces[index].cut(len(response.token_ids)) if index in editing.traces else None
                yield StreamedToken(index, None, Generation(**vars(response), batching=batching, trace=trace))
            else:
                new[index].append(token)
                yield StreamedToken(index, token, None)
