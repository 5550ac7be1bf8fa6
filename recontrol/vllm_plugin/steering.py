"""A worker of vLLM that steers: hooks where the states of sampled positions enter the logits, outside of what CUDA graphs capture."""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from recontrol.decoding.control import Control
from recontrol.decoding.control_batch import ControlBatch
from recontrol.decoding.fingerprint import CONFIG_FIELDS
from recontrol.decoding.hooks import EditSite
from recontrol.value import ValueFunction
from recontrol.vllm_plugin.self_test import prove
from recontrol.vllm_plugin.settings import BANK, KEY, Settings
from recontrol.vllm_plugin.wrapping import wrap

# Below vLLM's own logger, which shows what is said here.
logger = logging.getLogger("vllm.recontrol")


def install(settings: Settings) -> None:
    """Make every worker that is set up in this process from now on steer."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    wrap(WorkerWrapperBase, "init_device", after=lambda wrapper, *args, **kwargs: Steering(wrapper.worker, settings))


class RequestControls:
    """The controls of the requests that a worker runs; `control_of` makes them of the `extra_args` of a request."""

    def __init__(self, control_of: Callable[[Any], Control | None]):
        self._control_of = control_of
        self._controls: dict[str, Control] = {}

    def __len__(self) -> int:
        return len(self._controls)

    def step(self, scheduler_output: Any) -> bool:
        """Take in a step of the scheduler, which names new and finished requests; whether any request in it is steered."""
        for request in scheduler_output.finished_req_ids:
            self._controls.pop(request, None)
        for new in scheduler_output.scheduled_new_reqs:
            # A name may be used again for another request.
            self._controls.pop(new.req_id, None)
            control = None if new.sampling_params is None else self._control_of(new.sampling_params.extra_args)
            if control is not None and control.steps > 0:
                self._controls[new.req_id] = control
        return any(request in self._controls for request in scheduler_output.num_scheduled_tokens)

    def rows_of_first_runner(self, runner: Any, scheduler_output: Any) -> list[Control | None]:
        """The controls of the persistent batch (`vllm.v1.worker.gpu_model_runner`), one a draft token and one more; None while a prompt is being read."""
        rows: list[Control | None] = []
        for request in runner.input_batch.req_ids:
            state = runner.requests[request]
            unfinished = state.num_computed_tokens + scheduler_output.num_scheduled_tokens[request] < state.num_tokens
            drafts = scheduler_output.scheduled_spec_decode_tokens.get(request, ())
            rows += [None if unfinished else self._controls.get(request)] * (len(drafts) + 1)
        return rows

    def rows_of_second_runner(self, input_batch: Any) -> list[Control | None]:
        """The same for the batch that the other runner (`vllm.v1.worker.gpu.model_runner`) makes at each step."""
        rows: list[Control | None] = []
        ends = input_batch.num_computed_tokens_np[: input_batch.num_reqs] + input_batch.num_scheduled_tokens[: input_batch.num_reqs]
        unfinished = ends < input_batch.prefill_len_np[: input_batch.num_reqs]
        for place, request in enumerate(input_batch.req_ids[: input_batch.num_reqs]):
            number = int(input_batch.cu_num_logits_np[place + 1] - input_batch.cu_num_logits_np[place])
            rows += [None if unfinished[place] else self._controls.get(request)] * number
        return rows


class Steering:
    """Steers one worker: u is added to the states of the requests that carry a control, y_t ~ softmax(W_lm (o_t + u_t)).

    The states are edited by a hook on the model's logits processor, and only while the model runner computes the logits that it samples from. Prompt
    log-probabilities, profiling runs and draft models use the same module at other times. The worker's runner is made and its model not loaded yet.
    """

    def __init__(self, worker: Any, settings: Settings):
        self.runner, self.settings = worker.model_runner, settings
        self.bank: dict[str, ValueFunction] = {}
        self.requests = RequestControls(lambda extra_args: settings.control_of(extra_args, self.bank))
        self._hooks: list[Any] = []
        self._edit: Callable[[Tensor], Tensor] | None = None
        self._proven = False
        self._batch = ControlBatch()
        if getattr(self.runner, "is_pooling_model", False):
            raise RuntimeError(f"a pooling model samples no tokens and cannot be steered; unset {BANK}")
        config, width = worker.model_config.hf_text_config, worker.model_config.get_hidden_size()
        # Before a model is loaded.
        for name, value in settings.known.items():
            if value.hidden_size != width:
                raise ValueError(f"the value function {name!r} is for hidden states of size {value.hidden_size}, the model has size {width}")
            recorded: Any = value.provenance.get("base_model")
            for field in CONFIG_FIELDS if isinstance(recorded, dict) else ():
                found = getattr(config, field, None)
                if recorded.get(field, found) != found:
                    raise ValueError(f"the value function {name!r} was trained for another model: its {field} was {recorded[field]}, here it is {found}")
        self._wrap_runner()
        wrap(worker, "load_model", after=lambda *args, **kwargs: self._attach())
        wrap(worker, "compile_or_warm_up_model", after=lambda *args, **kwargs: self._prove())

    def _wrap_runner(self) -> None:
        runner, run = self.runner, self.runner.execute_model
        if hasattr(runner, "input_batch") and hasattr(runner, "requests"):

            @functools.wraps(run)
            def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
                # The runner puts its batch in order only now, so the controls of the rows are asked for when the states come.
                with self._armed(lambda: self.requests.rows_of_first_runner(runner, scheduler_output), self._take_in(scheduler_output)):
                    return run(scheduler_output, *args, **kwargs)

            runner.execute_model = execute_model
        elif hasattr(runner, "req_states") and "input_batch" in inspect.signature(getattr(runner, "sample", len)).parameters:
            if getattr(getattr(runner, "speculative_config", None), "enable_adaptive_verification", False):
                # Rows are put together on the device, and whose they are is not known here.
                raise RuntimeError(f"speculative decoding with enable_adaptive_verification cannot be steered; turn it off, or unset {BANK}")
            sample, signature = runner.sample, inspect.signature(run)

            def take_in(scheduler_output: Any, *args: Any, **kwargs: Any) -> None:
                if not signature.bind(scheduler_output, *args, **kwargs).arguments.get("dummy_run", False):
                    self._take_in(scheduler_output)

            @functools.wraps(sample)
            def sample_steered(hidden_states: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
                rows = self.requests.rows_of_second_runner(input_batch) if len(self.requests) else []
                with self._armed(lambda: rows, any(rows)):
                    return sample(hidden_states, input_batch, *args, **kwargs)

            wrap(runner, "execute_model", before=take_in)
            runner.sample = sample_steered
        else:
            kind = f"{type(runner).__module__}.{type(runner).__name__}"
            raise RuntimeError(f"{kind} is no model runner that the plugin recontrol knows; unset {BANK} to go without")

    def _take_in(self, scheduler_output: Any) -> bool:
        """Take in a step of the scheduler; whether rows of it are to be edited here."""
        if scheduler_output.finished_req_ids:
            self._batch.warn()
        if self._proven:
            # A rank that does not compute the logits has nothing to edit.
            return self.requests.step(scheduler_output) and bool(self._hooks)
        # Before that the runner makes up requests itself, to warm up.
        if any(KEY in (getattr(new.sampling_params, "extra_args", None) or {}) for new in scheduler_output.scheduled_new_reqs):
            raise RuntimeError("a request that carries a control came before it was proven that edits reach the logits")
        return False

    @contextlib.contextmanager
    def _armed(self, rows: Callable[[], list[Control | None]], steered: bool) -> Iterator[None]:
        """Edit the next states that enter the logits, if some are steered; an error if none enters inside the block."""

        def edit(hidden: Tensor) -> Tensor:
            self._batch.assign(rows())
            return self._batch.edit(hidden)

        with self._editing(edit if steered else None):
            yield
            if self._edit is not None:
                raise RuntimeError("the model runner computed logits in a way that the plugin recontrol does not know, and requests would go unsteered")

    @contextlib.contextmanager
    def _editing(self, edit: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
        self._edit = edit
        try:
            yield
        finally:
            self._edit = None

    def _before_logits(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self._edit is None:
            return None
        # Once: a layer that wraps this one may have been called before it.
        edit, self._edit = self._edit, None
        # A logits processor is called with the output embedding and the states.
        site = EditSite(module, position=1)
        return site.replaced(args, kwargs, edit(site.states(args, kwargs)))

    def _attach(self) -> None:
        """Load the bank and put the hooks in place; on the ranks that compute logits."""
        from vllm.distributed import get_pp_group
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        for hook in self._hooks:
            hook.remove()
        self._hooks, self.bank = [], dict(self.settings.known)
        if not get_pp_group().is_last_rank:
            return
        if getattr(self.runner, "batch_sharder", None) is not None:
            raise RuntimeError(f"sampling that is sharded over the batch (enable_batch_sharded_sampling) cannot be steered; turn it off, or unset {BANK}")
        model = self.runner.get_model()
        # Where adapters are served, the layer is called through one that wraps it.
        processors = [each for each in model.modules() if isinstance(each, LogitsProcessor) or isinstance(getattr(each, "base_layer", None), LogitsProcessor)]
        if not processors:
            raise RuntimeError(f"{type(model).__name__} computes its logits without a LogitsProcessor and cannot be steered; unset {BANK}")
        self.bank = self.settings.load(torch.device(self.runner.device))
        if hasattr(self.runner, "model_memory_usage"):
            # So that the key/value cache leaves room for them, and for what the ascent computes from them in advance.
            for value in self.bank.values():
                self.runner.model_memory_usage += sum(weight.nbytes for weight in value.parameters()) + 4 * value.hidden_dims[0] ** 2
        self._hooks = [each.register_forward_pre_hook(self._before_logits, with_kwargs=True) for each in processors]

    def _prove(self) -> None:
        if self._hooks:
            prove(self.runner, self.bank, self._editing)
            logger.info("edits reach the logits; value functions: %s", ", ".join(self.bank))
        self._proven = True
