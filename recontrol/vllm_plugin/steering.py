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
from recontrol.vllm_plugin.rows import RequestControls
from recontrol.vllm_plugin.self_test import prove
from recontrol.vllm_plugin.settings import BANK, KEY, Settings
from recontrol.vllm_plugin.wrapping import wrap

# Below vLLM's own logger, which shows what is said here.
logger = logging.getLogger("vllm.recontrol")


def install(settings: Settings) -> None:
    """Make every worker that is set up in this process from now on steer."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    wrap(WorkerWrapperBase, "init_device", after=lambda wrapper, *args, **kwargs: Steering(wrapper.worker, settings))


class Steering:
    """Steers one worker: u is added to the states of the requests that carry a control, y_t ~ softmax(W_lm (o_t + u_t)).

    The states are edited by a hook on the model's logits processor, and only while the model runner computes the logits that it
    samples from. Prompt log-probabilities, profiling runs and draft models use the same module at other times and are not edited.

    The worker's model runner is made and its model is not loaded yet.
    """

    def __init__(self, worker: Any, settings: Settings):
        self.worker = worker
        self.runner = worker.model_runner
        self.settings = settings
        self.bank: dict[str, ValueFunction] = {}
        self.requests = RequestControls(lambda extra_args: settings.control_of(extra_args, self.bank))
        self._hooks: list[Any] = []
        self._edit: Callable[[Tensor], Tensor] | None = None
        self._proven = False
        self._batch = ControlBatch()
        if getattr(self.runner, "is_pooling_model", False):
            raise RuntimeError(f"a pooling model samples no tokens and cannot be steered; unset {BANK}")
        # Before a model is loaded.
        for name, value in settings.known.items():
            self._check_fit(name, value)
        self._wrap_runner()
        wrap(worker, "load_model", after=lambda *args, **kwargs: self._attach())
        wrap(worker, "compile_or_warm_up_model", after=lambda *args, **kwargs: self._prove())

    def _wrap_runner(self) -> None:
        runner, run = self.runner, self.runner.execute_model
        if hasattr(runner, "input_batch") and hasattr(runner, "requests"):

            @functools.wraps(run)
            def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
                if not self._take_in(scheduler_output):
                    return run(scheduler_output, *args, **kwargs)
                # The runner puts its batch in order only now, so the controls of the rows are asked for when the states come.
                with self._armed(lambda: self.requests.rows_of_first_runner(runner, scheduler_output)):
                    return run(scheduler_output, *args, **kwargs)

        elif hasattr(runner, "req_states") and "input_batch" in inspect.signature(getattr(runner, "sample", len)).parameters:
            sample, signature = runner.sample, inspect.signature(run)

            @functools.wraps(run)
            def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
                if not signature.bind(scheduler_output, *args, **kwargs).arguments.get("dummy_run", False):
                    self._take_in(scheduler_output)
                return run(scheduler_output, *args, **kwargs)

            @functools.wraps(sample)
            def sample_steered(hidden_states: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
                rows = self.requests.rows_of_second_runner(input_batch) if len(self.requests) else []
                if not any(rows):
                    return sample(hidden_states, input_batch, *args, **kwargs)
                with self._armed(lambda: rows):
                    return sample(hidden_states, input_batch, *args, **kwargs)

            runner.sample = sample_steered
        else:
            kind = f"{type(runner).__module__}.{type(runner).__name__}"
            raise RuntimeError(f"{kind} is no model runner that the plugin recontrol knows; unset {BANK} to go without")
        runner.execute_model = execute_model

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
    def _armed(self, rows: Callable[[], list[Control | None]]) -> Iterator[None]:
        """Edit the next states that enter the logits; an error if none does inside the block."""

        def edit(hidden: Tensor) -> Tensor:
            self._batch.assign(rows())
            return self._batch.edit(hidden)

        with self._editing(edit):
            yield
            if self._edit is not None:
                raise RuntimeError("the model runner computed logits in a way that the plugin recontrol does not know, and requests would go unsteered")

    @contextlib.contextmanager
    def _editing(self, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
        self._edit = edit
        try:
            yield
        finally:
            self._edit = None

    def _before_logits(self, site: EditSite, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self._edit is None:
            return None
        # Once: a layer that wraps this one may have been called before it.
        edit, self._edit = self._edit, None
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
        processors = [module for module in model.modules() if isinstance(module, LogitsProcessor) or isinstance(_wrapped_by(module), LogitsProcessor)]
        if not processors:
            raise RuntimeError(f"{type(model).__name__} computes its logits without a LogitsProcessor and cannot be steered; unset {BANK}")
        self.bank = self.settings.load(torch.device(self.runner.device))
        if hasattr(self.runner, "model_memory_usage"):
            # So that the key/value cache leaves room for them.
            self.runner.model_memory_usage += sum(_bytes(value) for value in self.bank.values())
        # A logits processor is called with the output embedding and the states.
        sites = [EditSite(module, position=1) for module in processors]
        self._hooks = [site.module.register_forward_pre_hook(functools.partial(self._before_logits, site), with_kwargs=True) for site in sites]

    def _check_fit(self, name: str, value: ValueFunction) -> None:
        """Refuse a value function that cannot be climbed from this model's states, or was trained for another model."""
        model_config = self.worker.model_config
        width = model_config.get_hidden_size()
        if value.hidden_size != width:
            raise ValueError(f"the value function {name!r} is for hidden states of size {value.hidden_size}, the model has size {width}")
        recorded = value.provenance.get("base_model")
        for field in CONFIG_FIELDS:
            found = getattr(model_config.hf_text_config, field, None)
            if isinstance(recorded, dict) and field in recorded and recorded[field] != found:
                raise ValueError(f"the value function {name!r} was trained for another model: its {field} was {recorded[field]}, here it is {found}")

    def _prove(self) -> None:
        if self._hooks:
            prove(self.runner, self.bank, self._editing)
            logger.info("edits reach the logits; value functions: %s", ", ".join(self.bank))
        self._proven = True


def _wrapped_by(module: nn.Module) -> Any:
    return getattr(module, "base_layer", None)


def _bytes(value: ValueFunction) -> int:
    """What a value function takes on the device, with what the ascent computes from it in advance."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in value.parameters())
    return weights + 4 * value.hidden_dims[0] ** 2
