"""Refusing a request whose control is invalid, before it is run."""

import sys
from typing import Any

from recontrol.vllm_plugin.settings import KEY, Settings, as_json
from recontrol.vllm_plugin.wrapping import wrap

# What an HTTP request is read into.
REQUESTS = (
    ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
    ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
    ("vllm.entrypoints.openai.responses.protocol", "ResponsesRequest"),
)


def install(settings: Settings) -> None:
    """Check the control of every request where vLLM checks its sampling parameters (HTTP 400), and once more where it enters the engine.

    In the process of the HTTP server it is checked before the answer begins, too: a stream that has begun has status 200 whatever comes.
    """
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.core import EngineCore

    def late(engine: EngineCore, request: Any, *args: Any, **kwargs: Any) -> None:
        check(getattr(getattr(request, "sampling_params", None), "extra_args", None), settings)

    def verified(parameters: SamplingParams, *args: Any, **kwargs: Any) -> None:
        check(parameters.extra_args, settings)
        if parameters.extra_args and KEY in parameters.extra_args:
            parameters.extra_args = {**parameters.extra_args, KEY: as_json(parameters.extra_args[KEY])}

    wrap(SamplingParams, "verify", before=verified)
    wrap(EngineCore, "preprocess_add_request", before=late)

    def early(request: Any, *args: Any, **kwargs: Any) -> None:
        check(getattr(request, "vllm_xargs", None), settings)

    def beams(request: Any, *args: Any, **kwargs: Any) -> None:
        early(request)
        if KEY in (getattr(request, "vllm_xargs", None) or {}):
            raise _refusal("beam search carries no control of a request; leave one of them out")

    for module, name in REQUESTS:
        # Other processes never load these.
        request = getattr(sys.modules.get(module), name, None)
        for method, action in (("to_sampling_params", early), ("to_beam_search_params", beams)):
            if hasattr(request, method):
                wrap(request, method, before=action)


def check(extra_args: dict[str, Any] | None, settings: Settings) -> None:
    """Refuse an invalid control as vLLM refuses other sampling parameters."""
    try:
        settings.control_of(extra_args)
    except ValueError as error:
        raise _refusal(error) from None


def _refusal(reason: object) -> Exception:
    """What vLLM takes for a client's mistake; older releases take every ValueError for one."""
    try:
        from vllm.exceptions import VLLMValidationError as Refusal
    except ImportError:
        return ValueError(f"{KEY}: {reason}")
    return Refusal(f"{KEY}: {reason}")
