"""The ascent against the float64 oracle: every backend, dtype and instruction set, on random and on nasty inputs."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ROUNDOFF, edit_error, integers, oracle, product_error, released_loop, rounding_error, whole_value_function

import recontrol as rc
from recontrol import _C

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _instruction_sets() -> list[str]:
    before, found = _C.cpu_capability(), []
    for name in ("avx512_bf16", "avx512", "avx2", "baseline"):
        try:
            _C.use_cpu_capability(name)
        except ValueError:
            continue
        found.append(name)
    _C.use_cpu_capability(before)
    return found


PRESENT = _instruction_sets()


@pytest.fixture(params=["torch", "cpu-baseline", "cpu-avx2", "cpu-avx512", "cpu-avx512_bf16"])
def backend(request):
    """Every fast backend, the C++ one on every instruction set that this processor has."""
    name, _, instruction_set = request.param.partition("-")
    if not instruction_set:
        yield name
        return
    if instruction_set not in PRESENT:
        pytest.skip(f"this processor has no {instruction_set}")
    before = _C.cpu_capability()
    _C.use_cpu_capability(instruction_set)
    yield name
    _C.use_cpu_capability(before)


SHAPES = [(1, 1), (7, 5), (16, 16), (17, 31), (40, 64), (37, 257), (130, 300)]
DEPTHS = [lambda d: (d,), lambda d: (d, d + 3)]


@cache
def looped(hidden_size, dims, rows, step_size, steps):
    """A net, states, their exact edit, and the errors of the released loop and of one rounding. No backend has a part in it, so all share it."""
    torch.manual_seed(hidden_size)
    value = rc.ValueFunction(hidden_size, dims)
    hidden = torch.randn(rows, hidden_size)
    exact, _ = oracle(hidden, value, step_size, steps)
    return value, hidden, exact, edit_error(released_loop(hidden, value, step_size, steps), exact, hidden), rounding_error(exact, hidden)


@pytest.mark.parametrize("depth", DEPTHS, ids=["two-layers", "three-layers"])
@pytest.mark.parametrize("step_size,steps", [(0.5, 30), (0.2, 200), (1.0, 50), (0.001, 100)])
def test_error_is_no_worse_than_the_released_loop(backend, depth, step_size, steps):
    """Over many rows and nets, the quantiles of the edit's error lie under those of the loop, or under one rounding of the result.

    Now and then a unit lands within rounding of zero and flips one step earlier or later than in exact arithmetic, in any order of
    evaluation. Those rows are counted apart: there must not be more of them than in the loop, by more than such counts scatter.
    """
    ours, theirs, floor = [], [], []
    for hidden_size, units in SHAPES[3:]:
        value, hidden, exact, loop, rounding = looped(hidden_size, depth(units), 256, step_size, steps)
        ours.append(edit_error(rc.ascend(hidden, value, step_size, steps, backend=backend), exact, hidden))
        theirs.append(loop)
        floor.append(rounding)
    ours, bound = torch.cat(ours), torch.maximum(torch.cat(theirs), torch.cat(floor))
    for quantile in (0.5, 0.9, 0.95):
        assert ours.quantile(quantile) <= bound.quantile(quantile), f"quantile {quantile}"
    early_or_late = 20 * bound.quantile(0.9)
    expected = int((bound > early_or_late).sum())
    assert int((ours > early_or_late).sum()) <= expected + 3 * (expected + 1) ** 0.5


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", DEPTHS, ids=["two-layers", "three-layers"])
def test_every_dtype_accumulates_in_float32(backend, depth, hidden_dtype, weight_dtype):
    """Against the oracle on the same rounded weights, only the last rounding to the dtype of the hidden state shows."""
    value = rc.ValueFunction(37, depth(129)).to(weight_dtype)
    hidden = torch.randn(11, 37).to(hidden_dtype)
    exact, _ = oracle(hidden, value, 0.5, 30)
    edited = rc.ascend(hidden, value, 0.5, 30, backend=backend)
    assert edited.dtype == hidden_dtype and edited.shape == hidden.shape
    # One rounding of the result, and what a float32 path of 30 steps may add: 30 roundings of pre-activations and sums.
    scale = exact.abs() + (exact - hidden.double()).abs().amax(dim=1, keepdim=True)
    allowed = ROUNDOFF[hidden_dtype] * exact.abs() + 30 * 4 * ROUNDOFF[torch.float32] * scale
    assert ((edited.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("hidden_size,units", SHAPES)
@pytest.mark.parametrize("depth", DEPTHS, ids=["two-layers", "three-layers"])
@pytest.mark.parametrize("step_size", [0.5, 1.0, 4.0])
def test_whole_numbers_agree_to_the_bit(backend, depth, hidden_size, units, step_size):
    """With small whole weights nothing is rounded: ties at zero, mass flips and dead units must come out exactly."""
    value = whole_value_function(hidden_size, depth(units))
    hidden = integers(9, hidden_size)
    for steps in (1, 2, 3):
        exact, trace = oracle(hidden, value, step_size, steps)
        edited, found = rc.ascend(hidden, value, step_size, steps, return_trace=True, backend=backend)
        if exact.abs().max() < 2**12 and trace.abs().max() < 2**20:
            assert torch.equal(edited.double(), exact)
            assert torch.equal(found.double(), trace)
        else:
            torch.testing.assert_close(edited.double(), exact, rtol=1e-6, atol=0)


def test_ties_at_zero_are_off(backend):
    """The derivative of ReLU at zero is zero, as autograd has it: a row of zeros without biases never moves."""
    value = whole_value_function(6, (12,))
    with torch.no_grad():
        value.layers[0].bias.zero_()
    hidden = torch.zeros(3, 6)
    assert torch.equal(rc.ascend(hidden, value, 1.0, 5, backend=backend), hidden)


@pytest.mark.parametrize("depth", DEPTHS, ids=["two-layers", "three-layers"])
def test_dead_units(backend, depth):
    """Units that are always off, units with no output, and a net that is dead altogether."""
    value = rc.ValueFunction(20, depth(33))
    with torch.no_grad():
        value.layers[0].bias[::3] = -100
        value.layers[-1].weight[:, ::2] = 0
    hidden = torch.randn(5, 20)
    exact, _ = oracle(hidden, value)
    assert (edit_error(rc.ascend(hidden, value, backend=backend), exact, hidden) <= 30 * rounding_error(exact, hidden)).all()
    with torch.no_grad():
        value.layers[0].bias.fill_(-1000)
        if len(value.layers) == 3:
            value.layers[1].bias.fill_(-1000)
    assert torch.equal(rc.ascend(hidden, value, backend=backend), hidden)


@pytest.mark.parametrize("step_size,steps", [(1e4, 20), (50.0, 7)])
def test_huge_steps(backend, step_size, steps):
    """Where most units flip at every step and the edit dwarfs the state. The loop sums one product a step, whose errors average out."""
    value = rc.ValueFunction(24, (65,))
    hidden = torch.randn(128, 24)
    exact, _ = oracle(hidden, value, step_size, steps)
    ours = edit_error(rc.ascend(hidden, value, step_size, steps, backend=backend), exact, hidden)
    theirs = edit_error(released_loop(hidden, value, step_size, steps), exact, hidden)
    # Beyond the 95th percentile there may be a row with a unit that flipped early or late, here as in the loop.
    for quantile in (0.5, 0.9, 0.95):
        assert ours.quantile(quantile) <= max(float(theirs.quantile(quantile)), product_error(value))


def test_steps_too_small_to_be_seen(backend):
    """An edit far below the rounding of the state: the result is the oracle's, rounded once."""
    value = rc.ValueFunction(24, (65,))
    hidden = torch.randn(6, 24)
    exact, _ = oracle(hidden, value, 1e-12, 30)
    assert torch.equal(rc.ascend(hidden, value, 1e-12, 30, backend=backend), exact.float())


def test_many_steps_in_one_go(backend):
    """A step size so small that hundreds of steps pass between two flips: skipping them changes nothing."""
    value, hidden, exact, loop, _ = looped(24, (65,), 6, 0.01, 2000)
    assert edit_error(rc.ascend(hidden, value, 0.01, 2000, backend=backend), exact, hidden).max() <= loop.max()


@pytest.mark.parametrize("depth", DEPTHS, ids=["two-layers", "three-layers"])
def test_per_row_steps_step_sizes_and_mask(backend, depth):
    value = rc.ValueFunction(19, depth(40))
    hidden = torch.randn(12, 19)
    step_size = torch.rand(12)
    steps = torch.tensor([0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 0, 7])
    mask = torch.ones(12, dtype=torch.bool)
    mask[[3, 8]] = False
    edited, trace = rc.ascend(hidden, value, step_size, steps, mask=mask, return_trace=True, backend=backend)
    exact, exact_trace = oracle(hidden, value, step_size.double(), steps, mask=mask)
    still = (steps == 0) | ~mask
    assert torch.equal(edited[still], hidden[still])
    assert (edit_error(edited[~still], exact[~still], hidden[~still]) <= 60 * rounding_error(exact[~still], hidden[~still])).all()
    torch.testing.assert_close(trace.double(), exact_trace, rtol=1e-5, atol=1e-6)
    # The default is not the same: without the arguments every row moves.
    assert not torch.equal(rc.ascend(hidden, value, backend=backend)[still], hidden[still])


def test_rows_that_do_not_move_keep_their_bits(backend):
    """Zero steps and masked rows are copied: negative zeros, subnormals, and NaN in a dead row survive."""
    value = rc.ValueFunction(5, (8,))
    hidden = torch.tensor([[-0.0, 1e-42, 3.0, -1.0, 2.0], [float("nan"), float("inf"), 1.0, 2.0, 3.0]])
    edited = rc.ascend(hidden, value, 0.5, torch.tensor([0, 30]), mask=torch.tensor([True, False]), backend=backend)
    assert torch.equal(edited.view(torch.int32), hidden.view(torch.int32))


@pytest.mark.parametrize("depth", DEPTHS, ids=["two-layers", "three-layers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"radius": 0.2}, {"target": 0.3, "step_size": 0.1}], ids=["plain", "radius", "target"])
def test_a_row_does_not_depend_on_its_neighbours(depth, dtype, options, one_thread, several_threads):
    """To the bit: alone, in a batch, in another place, on any number of threads."""
    value = rc.ValueFunction(70, depth(600)).to(dtype)
    hidden = torch.randn(21, 70).to(dtype)
    together = rc.ascend(hidden, value, backend="cpu", **options)
    for rows in (1, 2, 3, 8, 9):
        assert torch.equal(rc.ascend(hidden[:rows], value, backend="cpu", **options), together[:rows])
    order = torch.randperm(21)
    assert torch.equal(rc.ascend(hidden[order], value, backend="cpu", **options), together[order])
    alone, trace = rc.ascend(hidden, value, return_trace=True, backend="cpu", **options)
    # More than a small machine has cores: waiting threads then give way instead of spinning.
    for number in (3, 5):
        with several_threads(number):
            assert torch.equal(rc.ascend(hidden, value, backend="cpu", **options), together)
            for found, wanted in zip(rc.ascend(hidden, value, return_trace=True, backend="cpu", **options), (alone, trace), strict=True):
                assert torch.equal(found, wanted)


def test_strided_rows(backend):
    """Rows of a larger buffer, every other row, every other column, a transposed view."""
    value = rc.ValueFunction(18, (40,))
    buffer = torch.randn(10, 64)
    for view in (buffer[:, 3:21], buffer[::3, 7:25], buffer[:, 0:36:2], torch.randn(18, 6).T, buffer[1:2, :18].expand(4, 18)):
        assert torch.equal(rc.ascend(view, value, backend=backend), rc.ascend(view.contiguous(), value, backend=backend))


def test_no_rows(backend):
    value = rc.ValueFunction(18, (40,))
    edited, trace = rc.ascend(torch.empty(0, 18), value, return_trace=True, backend=backend)
    assert edited.shape == (0, 18) and trace.shape[0] == 0


@pytest.mark.parametrize("dims", [(30,), (30, 20), (12, 10, 9), ()], ids=str)
def test_radius_cuts_the_path(backend, dims):
    """|u| never exceeds the radius, reaches it where the free path would leave, and the path up to there is the free one."""
    if backend == "cpu" and len(dims) not in (1, 2):
        pytest.skip("the C++ backend has kernels for two and three linear layers")
    value = rc.ValueFunction(16, dims)
    hidden = torch.randn(8, 16)
    free = (rc.ascend(hidden, value, backend=backend) - hidden).norm(dim=1)
    radius = free * torch.linspace(0.2, 1.6, 8)
    edited = rc.ascend(hidden, value, radius=radius, backend=backend)
    lengths = (edited.double() - hidden.double()).norm(dim=1)
    torch.testing.assert_close(lengths, torch.minimum(free, radius).double(), rtol=1e-5, atol=1e-6)
    exact, _ = oracle(hidden, value, radius=radius)
    assert (edit_error(edited, exact, hidden) <= 60 * rounding_error(exact, hidden)).all()
    assert torch.equal(rc.ascend(hidden, value, radius=0.0, backend=backend), hidden)


@pytest.mark.parametrize("dims", [(30,), (30, 20)], ids=str)
def test_target_is_approached_from_both_sides(backend, dims):
    """Upwards and downwards, to the result of the oracle; without the argument the same rows climb."""
    value = rc.ValueFunction(16, dims)
    hidden = torch.randn(8, 16)
    with torch.no_grad():
        # As initialised, a deeper net is so flat that its gradient leads nowhere within these steps.
        for layer in value.layers:
            layer.weight.mul_(1.5)
        here = value(hidden)[:, 0]
    target = here + torch.tensor([0.2, -0.2] * 4)
    edited, trace = rc.ascend(hidden, value, 0.2, 200, target=target, return_trace=True, backend=backend)
    with torch.no_grad():
        there = value(edited)[:, 0]
    assert ((there - target).abs() < 0.5 * (here - target).abs()).all()
    torch.testing.assert_close(trace[:, 0], here, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trace[:, -1], there, rtol=1e-4, atol=1e-5)
    exact, _ = oracle(hidden, value, 0.2, 200, target=target)
    assert edit_error(edited, exact, hidden).max() < 1e-4
    assert (rc.ascend(hidden, value, 0.2, 200, return_trace=True, backend=backend)[1][:, -1] > here).all()


@pytest.mark.parametrize("dims", [(30,), (30, 20), (12, 10, 9)], ids=str)
def test_heads_are_weighted(dims):
    """Several heads with weights are one value function with one head."""
    value = rc.ValueFunction(16, dims, num_heads=3)
    weights = torch.tensor([0.7, -0.2, 0.3])
    folded = rc.ValueFunction(16, dims)
    last = value.layers[-1]
    out = {f"layers.{len(dims)}.weight": (weights @ last.weight)[None], f"layers.{len(dims)}.bias": (weights @ last.bias)[None]}
    folded.load_state_dict({**value.state_dict(), **out})
    hidden = torch.randn(4, 16)
    torch.testing.assert_close(rc.ascend(hidden, value, head_weights=weights), rc.ascend(hidden, folded))
    with pytest.raises(ValueError, match="3 heads: give head_weights"):
        rc.ascend(hidden, value)


def test_any_depth_on_the_torch_path():
    for dims in ((), (8,), (8, 9), (8, 9, 10), (5, 6, 7, 8)):
        value = rc.ValueFunction(11, dims)
        hidden = torch.randn(4, 11)
        exact, trace = oracle(hidden, value)
        edited, found = rc.ascend(hidden, value, return_trace=True)
        assert (edit_error(edited, exact, hidden) <= 60 * rounding_error(exact, hidden)).all()
        torch.testing.assert_close(found.double(), trace, rtol=1e-5, atol=1e-6)


def test_float64_runs_on_the_torch_path():
    value = rc.ValueFunction(11, (20,)).double()
    hidden = torch.randn(4, 11, dtype=torch.float64)
    exact = rc.oracle.ascend(hidden, value)
    torch.testing.assert_close(rc.ascend(hidden, value), exact, rtol=1e-12, atol=1e-13)
    with pytest.raises(RuntimeError, match="computes in float32"):
        rc.ascend(hidden, value, backend="cpu")


@settings(max_examples=60, deadline=None)
@given(
    hidden_size=st.integers(1, 70),
    units=st.lists(st.integers(1, 90), min_size=1, max_size=2),
    rows=st.integers(0, 19),
    steps=st.integers(0, 40),
    step_size=st.floats(0, 2, width=32),
    seed=st.integers(0, 2**16),
)
def test_fuzz_against_the_oracle(hidden_size, units, rows, steps, step_size, seed):
    torch.manual_seed(seed)
    value = rc.ValueFunction(hidden_size, units)
    hidden = torch.randn(rows, hidden_size)
    exact, trace = oracle(hidden, value, step_size, steps)
    for backend in ("cpu", "torch"):
        edited, found = rc.ascend(hidden, value, step_size, steps, return_trace=True, backend=backend)
        assert found.shape == trace.shape
        # A unit within rounding of zero may flip a step earlier or later; one step of the whole gradient bounds that.
        torch.testing.assert_close(edited.double(), exact, rtol=1e-4, atol=1e-5 + 1e-3 * step_size)
        assert torch.equal(edited, rc.ascend(hidden, value, step_size, steps, backend=backend)) or backend == "cpu"


def test_production_size():
    """H = D = 4096, the paper's first setting with two layers, batch 3."""
    value = rc.ValueFunction(4096, (4096,))
    hidden = torch.randn(3, 4096)
    exact, _ = oracle(hidden, value, 0.5, 30)
    edited = rc.ascend(hidden, value, 0.5, 30, backend="cpu")
    bound = torch.maximum(edit_error(released_loop(hidden, value, 0.5, 30), exact, hidden), rounding_error(exact, hidden))
    assert edit_error(edited, exact, hidden).max() <= bound.max()
