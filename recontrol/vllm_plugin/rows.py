"""Whose states enter the logits: the controls of the rows of a batch, for each of vLLM's model runners."""

from collections.abc import Callable
from typing import Any

from recontrol.decoding.control import Control


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
        """The controls of the rows in the order of the persistent batch (`vllm.v1.worker.gpu_model_runner`).

        A request has a row for each draft token that is verified and one more. The row of a prompt that is not yet read to its end is not
        sampled from and gets None.
        """
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
