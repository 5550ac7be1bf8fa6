"""Backend "cuda" against the float64 oracle: on a GPU where there is one, else the same sources on the host (tests/emulator).

The criteria are those of test_ascend.py. The emulator runs every thread of a launch in turn, hence the small numbers.
"""

import ctypes
import types

import emulated
import pytest
import torch
from oracle import ROUNDOFF, edit_error, integers, oracle, product_error, released_loop, rounding_error, whole_value_function

import recontrol as rc
from recontrol.ascent.arguments import normalise
from recontrol.ascent.backends import BACKENDS, compiled, extension

ON_GPU = BACKENDS["cuda"].status()["available"]
if not ON_GPU and (reason := emulated.why_not_here()):
    pytest.skip(reason, allow_module_level=True)
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else [pytest.mark.usefixtures("one_thread", "poisoned_memory")]
emulator_only = pytest.mark.skipif(ON_GPU, reason="it asks the emulator for another device, or another order of threads")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# How the steps are taken differs with the number of layers.
WAYS = {"two layers": 2, "three layers": 3}
# The plain path takes steps together, the measured one takes them one by one.
OPTIONS = [{}, {"radius": 0.2}, {"target": 0.3}]


@pytest.fixture(autouse=True)
def emulate(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(compiled, "_launch", emulated.ascend)
        emulated.configure()


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


def climb(way, hidden, value, step_size=0.5, steps=30, *, return_trace=False, **options):
    """`rc.ascend` behind the choice of a backend, which would refuse tensors on the host."""
    arguments = normalise(hidden, value, step_size, steps, options.get("mask"), options.get("radius"), options.get("target"), options.get("head_weights"))
    columns = 1 + arguments.most_steps() if return_trace else 0
    edited, trace = BACKENDS["cuda"].run(arguments, value.prepared(), columns)
    return (edited, trace) if return_trace else edited


def states(*shape):
    return torch.randn(*shape).to(DEVICE)


def dims_of(way, units, second=29):
    return (units,) if WAYS[way] == 2 else (units, second)


def network(way, hidden_size, units, **options):
    return rc.ValueFunction(hidden_size, dims_of(way, units), **options).to(DEVICE)


@pytest.mark.parametrize("step_size,steps", [(0.5, 20), (2.0, 10), (0.001, 40)])
@pytest.mark.parametrize("traced", [False, True], ids=["plain", "measured"])
def test_error_is_no_worse_than_the_released_loop(way, step_size, steps, traced):
    """Quantiles of the edit's error over rows and nets lie under those of the loop, or under one rounding of the result."""
    ours, theirs, floor = [], [], []
    for hidden_size, units in ((17, 31), (37, 65)):
        value, hidden = network(way, hidden_size, units), states(12, hidden_size)
        exact, _ = oracle(hidden, value, step_size, steps)
        edited = climb(way, hidden, value, step_size, steps, return_trace=True)[0] if traced else climb(way, hidden, value, step_size, steps)
        ours.append(edit_error(edited, exact, hidden))
        theirs.append(edit_error(released_loop(hidden, value, step_size, steps), exact, hidden))
        floor.append(rounding_error(exact, hidden))
    ours, bound = torch.cat(ours), torch.maximum(torch.cat(theirs), torch.cat(floor))
    for quantile in (0.5, 0.9):
        assert ours.quantile(quantile) <= bound.quantile(quantile), f"quantile {quantile}"


@pytest.mark.parametrize("hidden_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_every_dtype_accumulates_in_float32(way, hidden_dtype, weight_dtype):
    """Against the oracle on the same rounded weights, only the last rounding to the dtype of the hidden state shows."""
    value, hidden = network(way, 37, 70).to(weight_dtype), states(3, 37).to(hidden_dtype)
    exact, _ = oracle(hidden, value, 0.5, 6)
    edited = climb(way, hidden, value, 0.5, 6)
    assert edited.dtype == hidden_dtype and edited.shape == hidden.shape
    # One rounding of the result, and what a float32 path of six steps may add: six roundings of pre-activations and sums.
    scale = exact.abs() + (exact - hidden.double()).abs().amax(dim=1, keepdim=True)
    allowed = ROUNDOFF[hidden_dtype] * exact.abs() + 6 * 4 * ROUNDOFF[torch.float32] * scale
    assert ((edited.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_rounded_to_the_nearest_and_ties_to_even(dtype):
    """One unit with weight one that moves every state by exactly one: sums that lie between two numbers of the dtype, and on the middle."""
    value = rc.ValueFunction(1, (1,)).to(DEVICE)
    with torch.no_grad():
        for parameter in value.parameters():
            parameter.fill_(1)
    hidden = torch.cat([torch.linspace(0, 6, 97), 2.0 ** torch.arange(-12, 12)])[:, None].to(DEVICE, dtype)
    assert torch.equal(climb("two layers", hidden, value, 1.0, 1), (hidden.float() + 1).to(dtype))


@pytest.mark.parametrize("hidden_size,units", [(1, 1), (7, 5), (33, 31), (70, 65)])
@pytest.mark.parametrize("step_size", [0.5, 4.0])
def test_whole_numbers_agree_to_the_bit(way, hidden_size, units, step_size):
    """With small whole weights nothing is rounded: ties at zero, mass flips and dead units must come out exactly."""
    value, hidden = whole_value_function(hidden_size, dims_of(way, units, 11)).to(DEVICE), integers(3, hidden_size).to(DEVICE)
    checked = 0
    for steps in (1, 3):
        exact, trace = oracle(hidden, value, step_size, steps)
        edited, found = climb(way, hidden, value, step_size, steps, return_trace=True)
        if exact.abs().max() < 2**12 and trace.abs().max() < 2**20:
            checked += 1
            assert torch.equal(edited.double(), exact)
            assert torch.equal(found.double(), trace)
            assert torch.equal(climb(way, hidden, value, step_size, steps), edited)
        else:
            torch.testing.assert_close(edited.double(), exact, rtol=1e-6, atol=0)
    assert checked


def test_ties_at_zero_are_off(way):
    value = whole_value_function(6, dims_of(way, 12)).to(DEVICE)
    with torch.no_grad():
        value.layers[0].bias.zero_()
    hidden = torch.zeros(3, 6, device=DEVICE)
    assert torch.equal(climb(way, hidden, value, 1.0, 5), hidden)


def test_dead_units(way):
    """Units that are always off, units with no output, and a net that is dead altogether."""
    value, hidden = network(way, 20, 33), states(3, 20)
    with torch.no_grad():
        value.layers[0].bias[::3] = -100
        value.layers[-1].weight[:, ::2] = 0
    exact, _ = oracle(hidden, value, 0.5, 10)
    assert (edit_error(climb(way, hidden, value, 0.5, 10), exact, hidden) <= 30 * rounding_error(exact, hidden)).all()
    with torch.no_grad():
        value.layers[0].bias.fill_(-1000)
    assert torch.equal(climb(way, hidden, value), hidden)


def test_huge_steps(way):
    """Where most units flip at every step, so that the velocity is added up anew."""
    value, hidden = network(way, 24, 65), states(16, 24)
    exact, _ = oracle(hidden, value, 1e4, 8)
    ours = edit_error(climb(way, hidden, value, 1e4, 8), exact, hidden)
    theirs = edit_error(released_loop(hidden, value, 1e4, 8), exact, hidden)
    for quantile in (0.5, 0.9):
        assert ours.quantile(quantile) <= max(float(theirs.quantile(quantile)), product_error(value))


def test_steps_without_a_flip_are_taken_together():
    """A million steps that a loop could not take in this time; the exact result of such small ones is known from their number."""
    value, hidden = network("two layers", 9, 20), states(2, 9)
    steps, length = 2**20, 2.0**-20
    one = climb("two layers", hidden, value, length, 1) - hidden
    assert one.abs().max() < 1e-5
    together = climb("two layers", hidden, value, length, steps)
    exact, _ = oracle(hidden, value, 1 / 512, 512)
    # Steps 2000 times longer end elsewhere only behind a flip, by at most the length of one of them.
    assert (edit_error(together, exact, hidden) < 1 / 256).all()


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "radius", "target"])
def test_every_option_of_every_row_is_that_of_the_oracle(way, options):
    """Step sizes, numbers of steps, masks, radii and targets that differ from row to row, beyond one tile of rows."""
    rows = 11
    value, hidden = network(way, 21, 40), states(rows, 21)
    spread = {name: torch.linspace(0.5, 2, rows, device=DEVICE) * option for name, option in options.items()}
    step_size, steps = torch.linspace(0.1, 1.5, rows, device=DEVICE), torch.arange(rows, device=DEVICE) % 7
    mask = torch.arange(rows, device=DEVICE) % 5 != 1
    exact, trace = oracle(hidden, value, step_size, steps, mask=mask, **spread)
    edited, found = climb(way, hidden, value, step_size, steps, mask=mask, return_trace=True, **spread)
    still = ~mask | (steps == 0)
    assert torch.equal(edited[still], hidden[still])
    error = edit_error(edited, exact, hidden)[~still]
    assert (error <= 20 * rounding_error(exact, hidden)[~still]).all()
    # V of some dozen terms of size one, after six steps.
    torch.testing.assert_close(found.double(), trace, rtol=0, atol=40 * ROUNDOFF[torch.float32])
    # Without a trace the same states, up to the order of sums.
    untraced = climb(way, hidden, value, step_size, steps, mask=mask, **spread)
    assert (edit_error(untraced, exact, hidden)[~still] <= 20 * rounding_error(exact, hidden)[~still]).all()


def test_heads_are_folded(way):
    value, hidden = network(way, 12, 30, num_heads=3), states(4, 12)
    weights = torch.tensor([0.7, -0.3, 1.1], device=DEVICE)
    exact, trace = oracle(hidden, value, 0.5, 6, head_weights=weights)
    edited, found = climb(way, hidden, value, 0.5, 6, head_weights=weights, return_trace=True)
    assert (edit_error(edited, exact, hidden) <= 20 * rounding_error(exact, hidden)).all()
    torch.testing.assert_close(found.double(), trace, rtol=0, atol=40 * ROUNDOFF[torch.float32])


@pytest.mark.parametrize("weight_dtype,hidden_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_a_row_does_not_depend_on_its_neighbours_or_their_number(way, weight_dtype, hidden_dtype):
    """One row, one tile, several tiles of one block, several blocks: the same bits, whatever the others hold."""
    few = way == "three layers"
    value, hidden = network(way, 35, 45).to(weight_dtype), states(20 if few else 150, 35).to(hidden_dtype)
    together = climb(way, hidden, value, 0.7, 4)
    for count in (1, 8, 9) if few else (1, 8, 9, 64, 65):
        assert torch.equal(climb(way, hidden[:count], value, 0.7, 4), together[:count]), count
    assert torch.equal(climb(way, hidden[7:8], value, 0.7, 4), together[7:8])
    other = hidden.clone()
    other[1::2] = float("nan")
    mask = torch.arange(len(hidden), device=DEVICE) % 2 == 0
    masked = climb(way, other, value, 0.7, 4, mask=mask)
    assert torch.equal(masked[::2], together[::2])
    assert masked[1::2].isnan().all()


def test_strided_rows_and_odd_widths(way):
    """Rows of a larger buffer whose addresses allow no whole loads, and columns that lie apart."""
    for dtype, width in ((torch.bfloat16, 21), (torch.float32, 24)):
        value = network(way, width, 34).to(dtype)
        buffer = states(6, 3 * width + 5).to(dtype)
        for hidden in (buffer[::2, 3 : 3 + width], buffer[:3, : 2 * width : 2]):
            assert torch.equal(climb(way, hidden, value, 0.5, 5), climb(way, hidden.contiguous(), value, 0.5, 5))


def test_no_rows_and_no_steps(way):
    value = network(way, 10, 12)
    assert climb(way, states(0, 10), value).shape == (0, 10)
    hidden = states(3, 10)
    for options in ({"steps": 0}, {"step_size": 0.0, "steps": 5}, {"mask": torch.zeros(3, dtype=torch.bool, device=DEVICE)}):
        assert torch.equal(climb(way, hidden, value, **options), hidden)
        edited, trace = climb(way, hidden, value, **options, return_trace=True)
        assert torch.equal(edited, hidden)
        torch.testing.assert_close(trace, value(hidden).expand_as(trace), rtol=1e-5, atol=1e-6)


def test_values_are_checked(way):
    value, hidden = network(way, 10, 12), states(3, 10)
    hidden[1, 2] = float("inf")
    with pytest.raises(ValueError, match="row 1"):
        climb(way, hidden, value)
    with pytest.raises(ValueError, match="step_size must be finite"):
        climb(way, states(3, 10), value, -1.0)


# More units than one block keeps: two and four blocks of a cluster, and several units for each thread where there are no clusters.
@pytest.mark.parametrize("major,units", [(9, 300), (9, 700), (8, 700)], ids=["two blocks", "four blocks", "two units a thread"])
@emulator_only
def test_units_are_shared_out(major, units):
    emulated.configure(major=major)
    value, hidden = network("two layers", 16, units), states(2, 16)
    for options in ({}, {"radius": 0.4}):
        exact, trace = oracle(hidden, value, 0.5, 8, **options)
        edited, found = climb("two layers", hidden, value, 0.5, 8, return_trace=True, **options)
        assert (edit_error(edited, exact, hidden) <= 20 * rounding_error(exact, hidden)).all()
        torch.testing.assert_close(found.double(), trace, rtol=0, atol=100 * ROUNDOFF[torch.float32])
        assert (edit_error(climb("two layers", hidden, value, 0.5, 8, **options), exact, hidden) <= 20 * rounding_error(exact, hidden)).all()


@emulator_only
def test_eight_blocks_with_two_units_a_thread():
    """The shape of 4096 units, with as few as take it."""
    value, hidden = network("two layers", 8, 2050), states(1, 8)
    exact, _ = oracle(hidden, value, 0.5, 3)
    assert (edit_error(climb("two layers", hidden, value, 0.5, 3), exact, hidden) <= 20 * rounding_error(exact, hidden)).all()


@emulator_only
def test_the_order_in_which_threads_run_does_not_matter(way):
    """A barrier that is missing lets a thread read what another has not written yet, or has overwritten already, in one order or another."""
    value, hidden = network(way, 18, 300 if way == "two layers" else 40), states(3, 18)
    found = []
    for order in emulated.ORDERS:
        for processors in (1, 3) if order == "forward" else (3,):
            emulated.configure(processors=processors, order=order)
            found.append((climb(way, hidden, value, 2.0, 6), *climb(way, hidden, value, 2.0, 6, radius=0.9, return_trace=True)))
    assert all(torch.equal(one, first) for result in found for one, first in zip(result, found[0], strict=True))


@emulator_only
def test_more_units_than_a_chip_holds_are_refused():
    def reason(major, units):
        emulated.configure(major=major)
        network = emulated.ValueNetwork()
        network.first.rows = units
        return emulated.library().why_not(ctypes.byref(network))

    assert reason(9, 16384) is None and reason(8, 8192) is None
    assert reason(9, 16385) == b"it keeps at most 16384 units of a row on the chip"
    assert reason(8, 8193) == b"it keeps at most 8192 units of a row on a chip without clusters"
    assert reason(7, 10) == b"it needs tensor cores for bfloat16, compute capability 8.0 or newer"


def test_without_cuda_in_the_extension_it_says_so(monkeypatch):
    monkeypatch.setattr(extension, "module", types.SimpleNamespace(cuda=None))
    wanted = "the extension was built without CUDA; install recontrol where nvcc and a CUDA build of torch are at hand"
    value, hidden = rc.ValueFunction(4, (5,)), torch.zeros(1, 4)
    assert BACKENDS["cuda"].status() == {"available": False, "reason": wanted}
    assert BACKENDS["cuda"].why_not(normalise(hidden, value, 0.5, 1, None, None, None, None), value.prepared()) == wanted


def test_what_it_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(compiled, "_no_cuda", lambda: None)
    monkeypatch.setattr(compiled, "_device_why_not", lambda *_: None)

    def reason(*dims, dtype=torch.float32, device="cuda"):
        value = rc.ValueFunction(4, dims).to(dtype)
        hidden = types.SimpleNamespace(device=torch.device(device, 0) if device == "cuda" else torch.device(device), dtype=dtype)
        return BACKENDS["cuda"].why_not(types.SimpleNamespace(hidden=hidden), value.prepared())

    assert reason(5) is None and reason(5, 6) is None
    assert reason(5, device="cpu") == "it runs on GPUs of NVIDIA, the tensors are on cpu"
    assert reason(5, dtype=torch.float64) == "it computes in float32, the tensors are float64"
    assert reason(5, 6, 7) == "it has kernels for two and three linear layers, this value function has 4"
