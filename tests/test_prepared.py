"""What is precomputed from the weights: made once, and never used after the weights have changed."""

import contextlib
import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import recontrol as rc
from recontrol.value.prepared import Prepared, PreparedCache, cache_of

SIZE = 12


def make(dims: tuple[int, ...] = (SIZE,)) -> rc.ValueFunction:
    return rc.ValueFunction(SIZE, dims)


def fresh(value: rc.ValueFunction) -> rc.ValueFunction:
    """A value function with the same weights, made anew, so that nothing about it can be stale."""
    twin = rc.ValueFunction(value.hidden_size, value.hidden_dims).to(value.dtype)
    for ours, theirs in zip(value.layers, twin.layers, strict=True):
        theirs.weight = nn.Parameter(ours.weight.detach().clone().contiguous())
        theirs.bias = nn.Parameter(ours.bias.detach().clone().contiguous())
    return twin


def step_of(make_optimizer):
    """A change of weights by one step of an optimizer."""

    def change(value: rc.ValueFunction) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            optimizer = make_optimizer(value.parameters())
            value(torch.randn(4, SIZE)).sum().backward()
            optimizer.step()

    return change


def load(value: rc.ValueFunction, assign: bool = False) -> None:
    value.load_state_dict(make(value.hidden_dims).state_dict(), assign=assign)


def replace(value: rc.ValueFunction) -> None:
    value.layers[0].weight = nn.Parameter(torch.randn(SIZE, SIZE))


def transpose(value: rc.ValueFunction) -> None:
    """The same memory, read the other way round."""
    value.layers[0].weight = nn.Parameter(value.layers[0].weight.detach().T)


def move_memory(value: rc.ValueFunction) -> None:
    value.layers[0].weight.data = torch.randn(SIZE, SIZE)


def write_through_a_view(value: rc.ValueFunction) -> None:
    value.layers[0].weight.detach().view(-1)[::3] = 0.7


def scale_in_place(value: rc.ValueFunction) -> None:
    with torch.no_grad():
        value.layers[0].weight.mul_(-1.5)


def scale_all_in_place(value: rc.ValueFunction) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(value.parameters()), -1.5)


def initialise(value: rc.ValueFunction) -> None:
    nn.init.normal_(value.layers[0].weight)


def change_the_last_bias(value: rc.ValueFunction) -> None:
    with torch.no_grad():
        value.layers[-1].bias.add_(3)


CHANGES = {
    "sgd": step_of(lambda parameters: torch.optim.SGD(parameters, 0.3)),
    "adam": step_of(lambda parameters: torch.optim.Adam(parameters, 0.1)),
    "adam-foreach": step_of(lambda parameters: torch.optim.Adam(parameters, 0.1, foreach=True)),
    "adam-fused": step_of(lambda parameters: torch.optim.Adam(parameters, 0.1, fused=True)),
    "sgd-fused": step_of(lambda parameters: torch.optim.SGD(parameters, 0.3, fused=True)),
    "load_state_dict": load,
    "load_state_dict-assign": lambda value: load(value, assign=True),
    "bfloat16": lambda value: value.to(torch.bfloat16),
    "half-and-back": lambda value: value.half().float(),
    "replace": replace,
    "transpose": transpose,
    "move-memory": move_memory,
    "view": write_through_a_view,
    "in-place": scale_in_place,
    "foreach": scale_all_in_place,
    "init": initialise,
    "last-bias": change_the_last_bias,
}


def test_gram_is_made_once():
    value = make()
    prepared = value.prepared()
    gram = prepared.gram
    first = value.layers[0].weight.detach().double()
    assert torch.equal(gram, (first @ first.T).float())
    rc.ascend(torch.randn(3, SIZE), value)
    assert value.prepared() is prepared and value.prepared().gram is gram


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_an_ascent_uses_what_was_prepared(backend, monkeypatch):
    """Not only is the same object kept: no ascent after the first computes it again."""
    made = []
    property_of = Prepared.__dict__["gram"]
    original = property_of.func
    monkeypatch.setattr(property_of, "func", lambda prepared: made.append(1) or original(prepared))
    value, hidden = make(), torch.randn(3, SIZE)
    for _ in range(4):
        rc.ascend(hidden, value, backend=backend)
    with torch.inference_mode():
        rc.ascend(hidden, value, backend=backend)
    assert len(made) == 1
    scale_in_place(value)
    rc.ascend(hidden, value, backend=backend)
    assert len(made) == 2


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode, torch.no_grad], ids=["grad", "inference_mode", "no_grad"])
@pytest.mark.parametrize("dims", [(SIZE,), (SIZE, 9)], ids=["two-layers", "three-layers"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_never_stale(change, dims, mode):
    """After any change of weights an ascent gives, to the bit, what a new value function with these weights gives."""
    hidden = torch.randn(3, SIZE)
    value = make(dims)
    # A parameter is not changed in place through its view where autograd is watching.
    inner = torch.no_grad if mode is contextlib.nullcontext else contextlib.nullcontext
    with mode():
        before = {backend: rc.ascend(hidden, value, return_trace=True, backend=backend) for backend in ("cpu", "torch")}
        with inner():
            change(value)
        for backend in ("cpu", "torch"):
            edited, trace = rc.ascend(hidden, value, return_trace=True, backend=backend)
            wanted, wanted_trace = rc.ascend(hidden, fresh(value), return_trace=True, backend=backend)
            assert torch.equal(edited, wanted) and torch.equal(trace, wanted_trace)
            # The change can be seen at all.
            assert not torch.equal(trace, before[backend][1])


def test_changes_between_two_looks_are_seen_however_many_there_are():
    value, hidden = make(), torch.randn(3, SIZE)
    for name, change in CHANGES.items():
        if name == "bfloat16":
            continue
        with torch.no_grad():
            change(value)
        assert torch.equal(rc.ascend(hidden, value), rc.ascend(hidden, fresh(value))), name


def test_new_weights_at_the_address_of_strided_old_ones():
    """A transposed weight is copied for the kernels; the original must still be held, or its memory is handed out again."""
    for _ in range(50):
        value, hidden = rc.ValueFunction(64, (64,)), torch.randn(2, 64)
        value.layers[0].weight = nn.Parameter(torch.randn(64, 64).T)
        rc.ascend(hidden, value)
        value.layers[0].weight = None
        value.layers[0].weight = nn.Parameter(torch.randn(64, 64).T)
        assert torch.equal(rc.ascend(hidden, value), rc.ascend(hidden, fresh(value)))


def test_an_optimizer_of_other_weights_changes_nothing():
    value, other = make(), make()
    prepared, untouched = value.prepared(), other.prepared()
    CHANGES["adam-fused"](other)
    CHANGES["adam-fused"](make())
    assert value.prepared() is prepared and other.prepared() is not untouched


def test_changes_through_data_need_clear():
    """No version counter tells of these; `clear` is for them."""
    value, hidden = make(), torch.randn(3, SIZE)
    rc.ascend(hidden, value)
    value.layers[0].weight.data.mul_(-1)
    value._cache.clear()
    assert torch.equal(rc.ascend(hidden, value), rc.ascend(hidden, fresh(value)))


def test_weights_made_under_inference_mode_are_never_cached():
    """They carry no version counter, so their changes could not be seen."""
    value, hidden = make(), torch.randn(3, SIZE)
    with torch.inference_mode():
        value.layers[0].weight = nn.Parameter(torch.randn(SIZE, SIZE))
        assert value.prepared() is not value.prepared()
        rc.ascend(hidden, value)
        value.layers[0].weight.mul_(-1)
        assert torch.equal(rc.ascend(hidden, value), rc.ascend(hidden, fresh(value)))


@pytest.mark.parametrize(
    "convert", [lambda value: value.half(), lambda value: value.to("cpu", torch.bfloat16), lambda value: value.double()], ids=["half", "to", "double"]
)
def test_converted_under_inference_mode_they_still_are(convert):
    with torch.inference_mode():
        value = convert(make())
        assert value.prepared().gram is value.prepared().gram


def test_value_functions_never_share():
    one = make()
    two = copy.deepcopy(one)
    assert one._cache is not two._cache and one.prepared() is not two.prepared() and one.prepared().gram is not two.prepared().gram
    # Not even where they share their weights.
    three = make()
    three.layers = one.layers
    assert three.prepared() is not one.prepared()
    assert len({value._cache.key for value in (one, two, three, make())}) == 4


def test_keys_lead_to_caches_while_these_live():
    value = make()
    key, prepared = value._cache.key, value.prepared()
    assert cache_of(key) is value._cache and cache_of(key).get(*value.parameters_by_kind) is prepared
    del value
    gc.collect()
    # A compiled function may outlive the value function it was traced with.
    assert isinstance(cache_of(key), PreparedCache) and cache_of(key).key != key


def test_the_memory_of_replaced_weights_is_freed():
    value = make()
    old = weakref.ref(value.prepared())
    storage = weakref.ref(value.prepared().gram)
    replace(value)
    value.prepared()
    gc.collect()
    assert old() is None and storage() is None


def test_the_memory_of_a_deleted_value_function_is_freed():
    value = make()
    gone = [weakref.ref(kept) for kept in (value, value._cache, value.prepared(), value.prepared().gram)]
    rc.ascend(torch.randn(2, SIZE), value)
    del value
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


@pytest.mark.parametrize(
    "weight_dtype,compute_dtype",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_dtypes(weight_dtype, compute_dtype):
    """G is summed in float64 and rounded once, so that no setting of the process for float32 products changes it."""
    value = make((SIZE, 5)).to(weight_dtype)
    prepared = value.prepared()
    first = value.layers[0].weight.detach().double()
    assert prepared.compute_dtype == prepared.gram.dtype == compute_dtype
    assert torch.equal(prepared.gram, (first @ first.T).to(compute_dtype))
    assert {weight.dtype for weight in prepared.weights} == {weight_dtype} and {weight.dtype for weight in prepared.wide_weights} == {compute_dtype}
    assert {bias.dtype for bias in prepared.wide_biases} == {compute_dtype}
    assert torch.equal(prepared.second_transposed, value.layers[1].weight.detach().T) and prepared.second_transposed.is_contiguous()
    assert not prepared.gram.requires_grad


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")])]
)
def test_the_precision_of_float32_products_changes_nothing(device):
    """TF32 on a GPU, bfloat16 on some processors: what is kept is the same for whoever asks first."""
    value = rc.ValueFunction(256, (128,)).to(device)
    wanted, before = fresh(value.cpu()).to(device).prepared().gram, torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(value.to(device).prepared().gram, wanted)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", ["cpu", "torch", "oracle"])
@pytest.mark.parametrize("dims", [(SIZE,), (SIZE, 9)], ids=["two-layers", "three-layers"])
def test_autocast_changes_nothing(backend, dims):
    """Neither what is prepared nor the ascent itself, whose products would be rounded to bfloat16."""
    value, hidden = make(dims), torch.randn(3, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (hidden @ hidden.T).dtype == torch.bfloat16
        gram, (edited, trace) = value.prepared().gram, rc.ascend(hidden, value, return_trace=True, backend=backend)
    again = fresh(value)
    wanted, wanted_trace = rc.ascend(hidden, again, return_trace=True, backend=backend)
    assert torch.equal(gram, again.prepared().gram) and torch.equal(edited, wanted) and torch.equal(trace, wanted_trace)


@pytest.mark.parametrize("backend", ["cpu", "torch", "auto"])
def test_several_threads_at_once(backend):
    """The first ascent of each value function races with others; all see the same result."""
    hidden = torch.randn(5, 40)
    values = [rc.ValueFunction(40, (70, 30)[: 1 + index % 2]) for index in range(4)]
    wanted = [rc.ascend(hidden, fresh(value), 0.5, 20, backend=backend) for value in values]
    workers = 8
    barrier = threading.Barrier(workers)

    def work(worker: int) -> list[bool]:
        barrier.wait(timeout=30)
        order = [(worker + turn) % len(values) for turn in range(12)]
        with torch.inference_mode(worker % 2 == 0):
            return [torch.equal(rc.ascend(hidden, values[index], 0.5, 20, backend=backend), wanted[index]) for index in order]

    with ThreadPoolExecutor(workers) as pool:
        results = [future.result(timeout=60) for future in [pool.submit(work, worker) for worker in range(workers)]]
    assert all(all(result) for result in results)


def test_threads_that_find_the_weights_changed():
    """Weights change between rounds; in each round no thread uses what was prepared for the last one."""
    value, hidden = make(), torch.randn(3, SIZE)
    with ThreadPoolExecutor(6) as pool:
        for _ in range(10):
            scale_in_place(value)
            replace(value)
            wanted = rc.ascend(hidden, fresh(value))
            assert all(torch.equal(edited, wanted) for edited in pool.map(lambda _: rc.ascend(hidden, value), range(6)))
