"""The operators behind the ascent: what the compiler, the exporter, other modes and other threads may rely on."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import RUNNING
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import recontrol as rc

SIZE, STEPS = 5, 3
DEPTHS = {"two-layers": (7,), "three-layers": (7, 6)}
# One layout of (3, SIZE) states each.
LAYOUTS = {
    "contiguous": lambda: torch.randn(3, SIZE),
    "rows of a buffer": lambda: torch.randn(6, 9)[::2, 2:7],
    "columns of a buffer": lambda: torch.randn(3, 2 * SIZE)[:, ::2],
    "transposed": lambda: torch.randn(SIZE, 3).T,
    "one row three times": lambda: torch.randn(1, SIZE).expand(3, SIZE),
}
OPTIONAL = ("mask", "radius", "target")
GIVEN = [(), *[(name,) for name in OPTIONAL], OPTIONAL]
# Tracing with symbolic shapes takes most of the time of opcheck, and sees nothing of layouts.
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.fixture(params=["auto", *RUNNING])
def backend(request):
    return request.param


def depth_of(backend):
    """Three linear layers, or two where there are kernels for no more."""
    return DEPTHS["two-layers" if backend == "triton" else "three-layers"]


def options(rows: int, *given: str) -> dict:
    """Values of the optional arguments, one entry a row."""
    every = {"mask": torch.arange(rows) % 2 == 0, "radius": 0.05 + torch.rand(rows), "target": torch.randn(rows)}
    return {name: every[name] for name in given}


def op_arguments(hidden, value, backend, columns, *given, steps=STEPS):
    """What `rc.ascend` hands to the operator, where autograd does not watch: the weights detached."""
    weights, biases = ([tensor.detach() for tensor in tensors] for tensors in value.parameters_by_kind)
    rows, dtype = hidden.shape[0], torch.float64 if hidden.dtype == torch.float64 else torch.float32
    optional = options(rows, *given)
    numbers = [optional[name].to(dtype) if name in optional else None for name in ("radius", "target")]
    step_size, per_row = torch.rand(rows, dtype=dtype), torch.full((rows,), steps)
    heads = torch.linspace(0.5, 1, value.num_heads, dtype=dtype)
    return (hidden, weights, biases, step_size, per_row, optional.get("mask"), *numbers, heads, value._cache.key, backend, columns)


def kernel_arguments(hidden, value, columns, *given, trace=True):
    """The arguments of the C++ operator, in the order of its schema."""
    prepared, rows = value.prepared(), hidden.shape[0]
    optional = options(rows, *given)
    three = len(prepared.weights) == 3
    return (
        hidden,
        prepared.weights[0],
        prepared.wide_biases[0],
        prepared.gram,
        prepared.weights[1] if three else None,
        prepared.second_transposed if three else None,
        prepared.wide_biases[1] if three else None,
        prepared.wide_weights[-1][0],
        0.25,
        torch.rand(rows),
        torch.full((rows,), STEPS),
        *[optional.get(name) for name in OPTIONAL],
        torch.zeros(rows, hidden.shape[1], dtype=hidden.dtype),
        torch.zeros(rows, columns) if trace else None,
    )


def same(found, wanted) -> bool:
    """To the bit, and of the same make."""
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
    return all(torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride() for a, b in pairs)


class TestOpcheck:
    """torch.library.opcheck: the schema, the fake, and tracing with fixed and with symbolic shapes."""

    @pytest.mark.parametrize("given", GIVEN, ids="-".join)
    def test_ascend_with_and_without_every_optional_argument(self, backend, given):
        value = rc.ValueFunction(SIZE, (7,), num_heads=2)
        torch.library.opcheck(torch.ops.recontrol.ascend, op_arguments(torch.randn(3, SIZE), value, backend, 0, *given), test_utils=QUICK)
        torch.library.opcheck(torch.ops.recontrol.ascend, op_arguments(torch.randn(3, SIZE), value, backend, STEPS + 1, *given), test_utils=QUICK)

    @pytest.mark.parametrize("columns,given", [(0, ()), (STEPS + 1, OPTIONAL)], ids=["least", "most"])
    def test_ascend_traced(self, backend, columns, given):
        value = rc.ValueFunction(SIZE, (7,))
        torch.library.opcheck(torch.ops.recontrol.ascend, op_arguments(torch.randn(3, SIZE), value, backend, columns, *given))

    @pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
    def test_ascend_on_states_of_any_layout(self, backend, make):
        value = rc.ValueFunction(SIZE, depth_of(backend))
        torch.library.opcheck(torch.ops.recontrol.ascend, op_arguments(make(), value, backend, STEPS + 1), test_utils=QUICK)

    def test_ascend_without_rows_and_without_steps(self, backend):
        value = rc.ValueFunction(SIZE, (7,))
        for columns in (0, 1):
            for arguments in (
                op_arguments(torch.empty(0, SIZE), value, backend, columns, *OPTIONAL, steps=0),
                op_arguments(torch.randn(2, SIZE), value, backend, columns, steps=0),
            ):
                torch.library.opcheck(torch.ops.recontrol.ascend, arguments, test_utils=QUICK)

    @pytest.mark.parametrize("given", GIVEN, ids="-".join)
    @pytest.mark.parametrize("depth", DEPTHS.values(), ids=DEPTHS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_kernel(self, depth, dtype, given):
        arguments = kernel_arguments(torch.randn(3, SIZE).to(dtype), rc.ValueFunction(SIZE, depth).to(dtype), STEPS + 1, *given)
        torch.library.opcheck(torch.ops.recontrol_cpu.ascend, arguments, test_utils=QUICK)

    @pytest.mark.parametrize("depth", DEPTHS.values(), ids=DEPTHS)
    @pytest.mark.parametrize("given", [(), OPTIONAL], ids=["least", "most"])
    def test_kernel_traced(self, depth, given):
        arguments = kernel_arguments(torch.randn(3, SIZE), rc.ValueFunction(SIZE, depth), STEPS + 1, *given, trace=bool(given))
        torch.library.opcheck(torch.ops.recontrol_cpu.ascend, arguments)

    @pytest.mark.parametrize("rows", [0, 4])
    @pytest.mark.parametrize("columns", [None, 0, 2, STEPS + 4])
    def test_kernel_with_any_trace_without_rows_and_on_strided_rows(self, rows, columns):
        hidden = torch.randn(2 * rows, 9)[::2, 1:6]
        arguments = kernel_arguments(hidden, rc.ValueFunction(SIZE, (7,)), columns or 0, trace=columns is not None)
        torch.library.opcheck(torch.ops.recontrol_cpu.ascend, arguments, test_utils=QUICK)

    @pytest.mark.parametrize("rows,given", [(0, ()), *[(3, given) for given in GIVEN]], ids=str)
    def test_sound(self, rows, given):
        optional = options(rows, *given)
        arguments = [torch.randn(rows, SIZE), torch.rand(rows), torch.ones(rows, dtype=torch.int64), *[optional.get(name) for name in OPTIONAL], torch.ones(2)]
        assert torch.ops.recontrol_cpu.sound(*arguments) is True
        torch.library.opcheck(torch.ops.recontrol_cpu.sound, arguments)


class TestFake:
    @pytest.mark.parametrize("columns", [0, STEPS + 1])
    @pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
    def test_is_of_the_shape_the_dtype_and_the_strides_of_the_real_result(self, backend, make, columns):
        # The compiled backends compute in float32.
        for dtype in (torch.float32, torch.bfloat16, torch.float16, *([] if backend in ("cpu", "triton") else [torch.float64])):
            # The layout survives a change of dtype.
            arguments = op_arguments(make().to(dtype), rc.ValueFunction(SIZE, (7,)).to(dtype), backend, columns)
            real = torch.ops.recontrol.ascend(*arguments)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = torch.ops.recontrol.ascend(mode.from_tensor(arguments[0]), *arguments[1:])
            for a, b in zip(real, fake, strict=True):
                assert (a.shape, a.dtype, a.stride(), a.device, a.requires_grad) == (b.shape, b.dtype, b.stride(), b.device, b.requires_grad)

    def test_states_without_values_give_results_without_values(self, backend):
        """Under a fake mode and on the meta device, as planners of memory do it."""
        with FakeTensorMode():
            value = rc.ValueFunction(SIZE, (7,))
            hidden = torch.randn(4, SIZE, dtype=torch.bfloat16)
            found = [rc.ascend(hidden, value, steps=torch.ones(4, dtype=torch.int64), backend=backend)]
            found += rc.ascend(hidden, value, 0.5, STEPS, mask=torch.ones(4, dtype=torch.bool), radius=1.0, return_trace=True, backend=backend)
        with torch.device("meta"):
            value = rc.ValueFunction(SIZE, (7,))
        hidden = torch.empty(4, SIZE, dtype=torch.bfloat16, device="meta")
        on_meta = [rc.ascend(hidden, value, backend=backend), *rc.ascend(hidden, value, 0.5, STEPS, return_trace=True, backend=backend)]
        assert [edited.device.type for edited in found + on_meta] == ["cpu"] * 3 + ["meta"] * 3
        for edited, again, trace in (found, on_meta):
            assert edited.shape == again.shape == (4, SIZE) and edited.dtype == again.dtype == torch.bfloat16
            assert trace.shape == (4, STEPS + 1) and trace.dtype == torch.float32


def compiled(function, **keywords):
    """The function compiled into one graph, and a counter of the graphs that were made."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, **keywords), counter


@pytest.fixture
def value():
    return rc.ValueFunction(SIZE, (7,))


class TestCompile:
    @pytest.mark.parametrize("return_trace", [False, True], ids=["states", "trace"])
    def test_numbers_as_arguments(self, value, return_trace):
        """After the second float and the second int the compiler takes them as variables: any other makes no new graph."""

        def function(hidden, step_size, steps):
            return rc.ascend(hidden, value, step_size, steps, return_trace=return_trace)

        fast, graphs = compiled(function)
        hidden = torch.randn(3, SIZE)
        for step_size, steps in ((0.5, 3), (0.25, 3), (0.25, 4)):
            assert same(fast(hidden, step_size, steps), function(hidden, step_size, steps))
        made = graphs.frame_count
        for step_size, steps in ((0.7, 3), (1 / 3, 2), (1e-3, 7), (0.7, 30), (0.1, 5), (0.9, 9), (0.0, 6)):
            assert same(fast(hidden, step_size, steps), function(hidden, step_size, steps))
        assert graphs.frame_count == made

    def test_numbers_of_every_kind_make_no_new_graph(self, value):
        def function(hidden, step_size, radius, target):
            return rc.ascend(hidden, value, step_size, STEPS, radius=radius, target=target, return_trace=True)

        fast, graphs = compiled(function, dynamic=True)
        hidden = torch.randn(3, SIZE)
        for step_size, radius, target in ((0.5, 0.25, 0.75), (0.3, 0.7, -0.1), (1 / 3, 2 / 3, 1e-3), (0.1, 0.0, 11.0)):
            assert same(fast(hidden, step_size, radius, target), function(hidden, step_size, radius, target))
        assert graphs.frame_count == 1

    @pytest.mark.parametrize("return_trace", [False, True], ids=["states", "trace"])
    def test_one_entry_a_row_with_any_number_of_rows(self, value, return_trace):
        """With a trace its width is only known when the steps are: still one graph."""

        def function(hidden, step_size, steps, mask, radius):
            return rc.ascend(hidden, value, step_size, steps, mask=mask, radius=radius, return_trace=return_trace)

        fast, graphs = compiled(function, dynamic=True)
        for rows in (3, 3, 2, 8, 5, 16):
            steps = torch.randint(0, 6, (rows,))
            arguments = (torch.randn(rows, SIZE), torch.rand(rows), steps, torch.rand(rows) > 0.3, torch.rand(rows))
            assert same(fast(*arguments), function(*arguments))
        assert graphs.frame_count == 1
        # One row and none are shapes of their own to the compiler.
        for rows in (1, 0):
            arguments = (torch.randn(rows, SIZE), torch.rand(rows), torch.ones(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool), torch.rand(rows))
            assert same(fast(*arguments), function(*arguments))

    def test_the_same_shapes_are_compiled_once(self, value):
        fast, graphs = compiled(lambda hidden: rc.ascend(hidden, value), dynamic=False)
        for _ in range(4):
            hidden = torch.randn(3, SIZE)
            assert same(fast(hidden), rc.ascend(hidden, value))
        assert graphs.frame_count == 1

    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    def test_changed_weights_are_seen(self, value, backend):
        fast, graphs = compiled(lambda hidden: rc.ascend(hidden, value, return_trace=True, backend=backend))
        hidden = torch.randn(3, SIZE)
        before = fast(hidden)
        for change in (lambda weight: weight.mul_(-1.5), lambda weight: weight.copy_(torch.randn(7, SIZE))):
            with torch.no_grad():
                change(value.layers[0].weight)
            after = fast(hidden)
            fresh = rc.ValueFunction(SIZE, (7,))
            fresh.load_state_dict(value.state_dict())
            assert same(after, rc.ascend(hidden, fresh, return_trace=True, backend=backend)) and not same(after, before)
            before = after
        assert graphs.frame_count == 1

    def test_each_value_function_keeps_to_its_own_weights(self):
        """Also where they take turns in one compiled function, and after one of them is gone."""
        fast, _ = compiled(lambda hidden, value: rc.ascend(hidden, value))
        hidden, values = torch.randn(3, SIZE), [rc.ValueFunction(SIZE, (7,)) for _ in range(3)]
        for turn in (0, 1, 0, 2, 1):
            assert same(fast(hidden, values[turn]), rc.ascend(hidden, values[turn]))
        del values[1]
        assert same(fast(hidden, values[1]), rc.ascend(hidden, values[1]))

    def test_between_other_operations_and_on_strided_states(self, value):
        """The states come from a product and go into one, as between the last norm and the output embedding."""
        first, last = torch.randn(SIZE, SIZE), torch.randn(SIZE, 11)

        def function(hidden):
            return rc.ascend((hidden @ first).T.reshape(SIZE, -1).T, value) @ last

        fast, _ = compiled(function)
        hidden = torch.randn(4, SIZE)
        assert same(fast(hidden), function(hidden))

    def test_the_default_compiler_finds_the_strides_that_the_fake_promised(self, value, backend):
        """Nothing else is left to it here: all numbers come as tensors, so that no code has to be written for making them."""
        step_size, steps, heads = torch.rand(3), torch.full((3,), STEPS), torch.ones(1)

        def function(hidden):
            edited, trace = rc.ascend(hidden.T, value, step_size, steps, head_weights=heads, return_trace=True, backend=backend)
            return edited.view(-1), trace

        torch._dynamo.reset()
        hidden = torch.randn(SIZE, 3)
        assert same(torch.compile(function, fullgraph=True)(hidden), function(hidden))

    def test_errors_of_shape_come_while_compiling_and_errors_of_value_at_run_time(self, value):
        fast, _ = compiled(lambda hidden, step_size: rc.ascend(hidden, value, step_size))
        with pytest.raises(Exception, match=r"hidden must have shape \(rows, 5\)"):
            fast(torch.randn(3, SIZE + 1), torch.ones(3))
        fast(torch.randn(3, SIZE), torch.ones(3))
        hidden = torch.randn(3, SIZE)
        hidden[1, 2] = float("nan")
        with pytest.raises(ValueError, match=r"NaN or infinite values in row 1 of 3"):
            fast(hidden, torch.ones(3))
        with pytest.raises(ValueError, match=r"step_size must be finite and 0 or more, found -1.0 in rows 0, 1, 2"):
            fast(torch.randn(3, SIZE), -torch.ones(3))


class Block(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, hidden):
        return rc.ascend(hidden, self.value, 0.5, STEPS)


class TestTracing:
    @pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
    def test_export_with_any_number_of_rows(self, value, strict):
        block = Block(value)
        exported = torch.export.export(block, (torch.randn(3, SIZE),), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=strict).module()
        for rows in (2, 3, 9):
            hidden = torch.randn(rows, SIZE)
            assert same(exported(hidden), block(hidden))

    def test_make_fx_keeps_the_operator_whole(self, value, backend):
        """No kernel and no check of values is traced through: the graph holds for other values of the same shape."""
        graph = make_fx(lambda hidden: rc.ascend(hidden, value, 0.5, STEPS, backend=backend))(torch.randn(3, SIZE))
        assert [node.target for node in graph.graph.nodes if "recontrol" in str(node.target)] == [torch.ops.recontrol.ascend.default]
        hidden = torch.randn(3, SIZE)
        assert same(graph(hidden), rc.ascend(hidden, value, 0.5, STEPS, backend=backend))


class TestAutograd:
    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
    def test_every_mode_gives_the_same(self, value, backend, mode):
        hidden = torch.randn(3, SIZE)
        wanted = rc.ascend(hidden, value, return_trace=True, backend=backend)
        with mode():
            assert same(rc.ascend(hidden, value, return_trace=True, backend=backend), wanted)
            # Made inside, under inference_mode without a version counter.
            assert same(rc.ascend(hidden.clone(), value, torch.full((3,), 0.5), return_trace=True, backend=backend), wanted)

    @pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
    def test_no_gradient_flows(self, backend, traced):
        value = rc.ValueFunction(SIZE, (7,), num_heads=2)
        hidden, watched = torch.randn(3, SIZE), {"step_size": torch.rand(3), "radius": torch.rand(3), "target": torch.rand(3), "head_weights": torch.rand(2)}

        def function(hidden, arguments):
            return rc.ascend(hidden, value, return_trace=True, backend=backend, **arguments)

        wanted = function(hidden, watched)
        value(torch.randn(2, SIZE)).sum().backward()
        gradients = [parameter.grad.clone() for parameter in value.parameters()]
        leaves = [hidden.requires_grad_(), *[tensor.requires_grad_() for tensor in watched.values()]]
        edited, trace = compiled(function)[0](hidden * 1, watched) if traced else function(hidden * 1, watched)
        assert same((edited.detach(), trace.detach()), wanted)
        assert not edited.requires_grad and not trace.requires_grad and edited.grad_fn is None
        # The result can begin a graph of its own.
        edited.clone().requires_grad_().sum().backward()
        assert all(leaf.grad is None for leaf in leaves)
        assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(value.parameters(), gradients, strict=True))


class TestMemory:
    @pytest.mark.parametrize("steps", [0, STEPS])
    @pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
    def test_inputs_are_left_alone_and_the_result_is_new(self, backend, make, steps):
        """Also where nothing moves: a caller may write into the result."""
        value = rc.ValueFunction(SIZE, depth_of(backend), num_heads=2)
        inputs = {"step_size": torch.rand(3), "steps": torch.full((3,), steps), **options(3, *OPTIONAL), "head_weights": torch.rand(2)}
        tensors = [make(), *inputs.values(), *value.parameters()]
        copies, versions = [tensor.detach().clone() for tensor in tensors], [tensor._version for tensor in tensors]
        results = [rc.ascend(tensors[0], value, return_trace=True, backend=backend, **inputs)]
        results += [torch.ops.recontrol.ascend(*op_arguments(tensors[0], value, backend, steps + 1, steps=steps))]
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        for edited, trace in results:
            assert not {edited.untyped_storage().data_ptr(), trace.untyped_storage().data_ptr()} & storages
            assert edited.untyped_storage().data_ptr() != trace.untyped_storage().data_ptr()
            edited.fill_(7)
            trace.fill_(7)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))
        assert [tensor._version for tensor in tensors] == versions

    def test_a_dead_batch_is_copied(self, value, backend):
        hidden = torch.randn(3, SIZE)
        edited = rc.ascend(hidden, value, mask=torch.zeros(3, dtype=torch.bool), backend=backend)
        assert torch.equal(edited, hidden) and edited.data_ptr() != hidden.data_ptr()


@pytest.mark.parametrize("name", RUNNING)
def test_many_threads_at_once(name):
    """Through the function and through the operator, on one shared value function and on one of their own, with trace and mask."""
    # The interpreter that runs Triton's kernels is slow, and does so in one thread at a time.
    workers = 3 if name == "triton" else 8
    shared = rc.ValueFunction(24, (40,))
    deepest = len(depth_of(name))
    values = [(shared, rc.ValueFunction(24, (33, 20)[: min(1 + worker % 2, deepest)])) for worker in range(workers)]
    batches = [torch.randn(1 + worker, 24) for worker in range(workers)]
    # Made here, because all threads draw from one generator.
    operands = [[op_arguments(batches[worker], value, name, 0, "target") for value in values[worker]] for worker in range(workers)]
    barrier = threading.Barrier(workers)

    def work(worker: int) -> list:
        hidden, found = batches[worker], []
        keywords = {"mask": torch.arange(len(hidden)) != 1, "return_trace": True, "backend": name}
        for value, arguments in zip(values[worker], operands[worker], strict=True):
            found.append(rc.ascend(hidden, value, 0.5, 5 + worker, **keywords))
            found.append(rc.ascend(hidden, value, 0.25, 5, radius=0.3, **keywords))
            found.append(torch.ops.recontrol.ascend(*arguments))
        return found

    def at_once(worker: int) -> list:
        barrier.wait(timeout=60)
        return [work(worker) for _ in range(2)]

    with ThreadPoolExecutor(workers) as pool:
        rounds = list(pool.map(at_once, range(workers), timeout=120))
    # Alone only afterwards, so that nothing was prepared when the threads met.
    for worker in range(workers):
        alone = work(worker)
        assert all(same(a, b) for found in rounds[worker] for a, b in zip(found, alone, strict=True))
