"""Backend "triton" against the float64 oracle: on a GPU where there is one, else in Triton's interpreter; and compiled for GPUs that are not here.

The criteria are those of test_ascend.py. The interpreter takes some hundredth of a second for a step of one row, hence the small numbers.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from oracle import ROUNDOFF, edit_error, integers, oracle, product_error, released_loop, rounding_error, whole_value_function

import recontrol as rc
from recontrol.ascent import backends
from recontrol.ascent.arguments import normalise
from recontrol.ascent.backends import BACKENDS
from recontrol.ascent.backends import triton as backend

pytest.importorskip("triton")
STATUS = BACKENDS["triton"].status()
if not STATUS["available"]:
    pytest.skip(STATUS["reason"], allow_module_level=True)
DEVICE = "cpu" if STATUS["interpreted"] else "cuda"
# Deterministic matrix products of CUDA want a setting from before the start.
pytestmark = pytest.mark.usefixtures("one_thread", *(["poisoned_memory"] if DEVICE == "cpu" else []))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The plain path takes steps together, the measured one takes them one by one.
OPTIONS = [{}, {"radius": 0.2}, {"target": 0.3}]


def climb(hidden, value, step_size=0.5, steps=30, **options):
    return rc.ascend(hidden, value, step_size, steps, backend="triton", **options)


def states(*shape):
    return torch.randn(*shape).to(DEVICE)


def network(hidden_size, units, **options):
    return rc.ValueFunction(hidden_size, (units,), **options).to(DEVICE)


@pytest.mark.parametrize("step_size,steps", [(0.5, 20), (2.0, 10), (0.001, 100)])
@pytest.mark.parametrize("traced", [False, True], ids=["plain", "measured"])
def test_error_is_no_worse_than_the_released_loop(step_size, steps, traced):
    """Quantiles of the edit's error over rows and nets lie under those of the loop, or under one rounding of the result."""
    if traced and steps > 20:
        steps = 10
    ours, theirs, floor = [], [], []
    for hidden_size, units in ((17, 31), (40, 64), (37, 257)):
        value, hidden = network(hidden_size, units), states(10, hidden_size)
        exact, _ = oracle(hidden, value, step_size, steps)
        edited = climb(hidden, value, step_size, steps, return_trace=True)[0] if traced else climb(hidden, value, step_size, steps)
        ours.append(edit_error(edited, exact, hidden))
        theirs.append(edit_error(released_loop(hidden, value, step_size, steps), exact, hidden))
        floor.append(rounding_error(exact, hidden))
    ours, bound = torch.cat(ours), torch.maximum(torch.cat(theirs), torch.cat(floor))
    for quantile in (0.5, 0.9):
        assert ours.quantile(quantile) <= bound.quantile(quantile), f"quantile {quantile}"


@pytest.mark.parametrize("hidden_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_every_dtype_accumulates_in_float32(hidden_dtype, weight_dtype):
    """Against the oracle on the same rounded weights, only the last rounding to the dtype of the hidden state shows."""
    value, hidden = network(37, 129).to(weight_dtype), states(3, 37).to(hidden_dtype)
    exact, _ = oracle(hidden, value, 0.5, 6)
    edited = climb(hidden, value, 0.5, 6)
    assert edited.dtype == hidden_dtype and edited.shape == hidden.shape
    # One rounding of the result, and what a float32 path of six steps may add: six roundings of pre-activations and sums.
    scale = exact.abs() + (exact - hidden.double()).abs().amax(dim=1, keepdim=True)
    allowed = ROUNDOFF[hidden_dtype] * exact.abs() + 6 * 4 * ROUNDOFF[torch.float32] * scale
    assert ((edited.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_rounded_to_the_nearest_and_ties_to_even(dtype):
    """One unit with weight one that moves every state by exactly one: sums that lie between two numbers of the dtype, and on the middle."""
    value = network(1, 1).float()
    with torch.no_grad():
        for parameter in value.parameters():
            parameter.fill_(1)
    hidden = torch.cat([torch.linspace(0, 6, 97), 2.0 ** torch.arange(-12, 12)])[:, None].to(DEVICE, dtype)
    assert torch.equal(climb(hidden, value, 1.0, 1), (hidden.float() + 1).to(dtype))


@pytest.mark.parametrize("hidden_size,units", [(1, 1), (7, 5), (17, 31), (37, 257), (130, 300)])
@pytest.mark.parametrize("step_size", [0.5, 4.0])
def test_whole_numbers_agree_to_the_bit(hidden_size, units, step_size):
    """With small whole weights nothing is rounded: ties at zero, mass flips and dead units must come out exactly."""
    value, hidden = whole_value_function(hidden_size, (units,)).to(DEVICE), integers(3, hidden_size).to(DEVICE)
    checked = 0
    for steps in (1, 3):
        exact, trace = oracle(hidden, value, step_size, steps)
        edited, found = climb(hidden, value, step_size, steps, return_trace=True)
        if exact.abs().max() < 2**12 and trace.abs().max() < 2**20:
            checked += 1
            assert torch.equal(edited.double(), exact)
            assert torch.equal(found.double(), trace)
            assert torch.equal(climb(hidden, value, step_size, steps), edited)
        else:
            torch.testing.assert_close(edited.double(), exact, rtol=1e-6, atol=0)
    assert checked


def test_ties_at_zero_are_off():
    value = whole_value_function(6, (12,)).to(DEVICE)
    with torch.no_grad():
        value.layers[0].bias.zero_()
    hidden = torch.zeros(3, 6, device=DEVICE)
    assert torch.equal(climb(hidden, value, 1.0, 5), hidden)


def test_dead_units():
    """Units that are always off, units with no output, and a net that is dead altogether."""
    value, hidden = network(20, 33), states(3, 20)
    with torch.no_grad():
        value.layers[0].bias[::3] = -100
        value.layers[-1].weight[:, ::2] = 0
    exact, _ = oracle(hidden, value, 0.5, 10)
    assert (edit_error(climb(hidden, value, 0.5, 10), exact, hidden) <= 30 * rounding_error(exact, hidden)).all()
    with torch.no_grad():
        value.layers[0].bias.fill_(-1000)
    assert torch.equal(climb(hidden, value), hidden)


def test_huge_steps():
    """Where most units flip at every step, so that the velocity is added up anew."""
    value, hidden = network(24, 65), states(16, 24)
    exact, _ = oracle(hidden, value, 1e4, 8)
    ours = edit_error(climb(hidden, value, 1e4, 8), exact, hidden)
    theirs = edit_error(released_loop(hidden, value, 1e4, 8), exact, hidden)
    for quantile in (0.5, 0.9):
        assert ours.quantile(quantile) <= max(float(theirs.quantile(quantile)), product_error(value))


def test_steps_without_a_flip_are_taken_together():
    """Far below the rounding of the state the result is the oracle's, rounded once; hundreds of steps between two flips change nothing."""
    value, hidden = network(24, 65), states(2, 24)
    exact, _ = oracle(hidden, value, 1e-12, 30)
    assert torch.equal(climb(hidden, value, 1e-12, 30), exact.float())
    exact, _ = oracle(hidden, value, 0.01, 150)
    bound = edit_error(released_loop(hidden, value, 0.01, 150), exact, hidden)
    assert edit_error(climb(hidden, value, 0.01, 150), exact, hidden).max() <= bound.max()
    # More steps than could be taken one by one, or counted in 32 bits.
    with torch.no_grad():
        value.layers[0].bias.fill_(100)
    once = climb(hidden, value, 2.0**-41, 2**36) - hidden
    torch.testing.assert_close(once, climb(hidden, value, 2.0**-5, 1) - hidden, rtol=0, atol=2 * ROUNDOFF[torch.float32] * float(hidden.abs().max()))
    assert once.abs().max() > 0.001
    assert torch.equal(climb(hidden, value, 0.0, 2**62), hidden)


@pytest.mark.parametrize("bias", [5.0, 5.5])
def test_a_flip_after_steps_taken_together_is_neither_early_nor_late(bias):
    """Two units on a line, all numbers exact: the second goes off where the state passes the bias, or just reaches it."""
    value, hidden = network(1, 2), torch.tensor([[0.0], [0.5], [-3.0]], device=DEVICE)
    with torch.no_grad():
        value.layers[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        value.layers[0].bias.copy_(torch.tensor([10.0, bias]))
        value.layers[1].weight.copy_(torch.tensor([[2.0, 1.0]]))
    for steps in (4, 5, 6, 7, 12):
        exact, _ = oracle(hidden, value, 1.0, steps)
        assert torch.equal(climb(hidden, value, 1.0, steps).double(), exact)


def test_steps_that_are_measured_one_by_one_add_up_without_drift():
    """A hundred equal steps from the origin, where nothing hides their sum: a plain sum would round the same way again and again."""
    value, hidden = network(8, 16), torch.zeros(1, 8, device=DEVICE)
    with torch.no_grad():
        value.layers[0].bias.fill_(100)
    exact, _ = oracle(hidden, value, 0.1, 100)
    # One rounding each of the step size, of the sum and of the compensated sum's own, and those of the product.
    allowed = 3 * ROUNDOFF[torch.float32] + product_error(value)
    assert edit_error(climb(hidden, value, 0.1, 100, return_trace=True)[0], exact, hidden) <= allowed


def test_per_row_steps_step_sizes_and_mask():
    value, hidden = network(19, 40), states(9, 19)
    step_size, steps = torch.rand(9).to(DEVICE), torch.tensor([0, 1, 2, 3, 5, 8, 13, 21, 0], device=DEVICE)
    mask = torch.ones(9, dtype=torch.bool, device=DEVICE)
    mask[[3, 6]] = False
    edited, trace = climb(hidden, value, step_size, steps, mask=mask, return_trace=True)
    exact, exact_trace = oracle(hidden, value, step_size, steps, mask=mask)
    still = (steps == 0) | ~mask
    assert torch.equal(edited[still], hidden[still])
    assert (edit_error(edited[~still], exact[~still], hidden[~still]) <= 60 * rounding_error(exact[~still], hidden[~still])).all()
    torch.testing.assert_close(trace.double(), exact_trace, rtol=1e-5, atol=1e-6)
    plain = climb(hidden, value, step_size, steps, mask=mask)
    assert torch.equal(plain[still], hidden[still])
    assert (edit_error(plain[~still], exact[~still], hidden[~still]) <= 60 * rounding_error(exact[~still], hidden[~still])).all()
    assert not torch.equal(climb(hidden, value, step_size, 2)[still], hidden[still])


@pytest.mark.parametrize("dtype,whole", [(torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)])
def test_rows_that_do_not_move_keep_their_bits(dtype, whole):
    """Zero steps and masked rows are copied: negative zeros, subnormals, infinities and the payload of NaN survive."""
    value = network(5, 8)
    hidden = torch.tensor([[-0.0, 1.0, 3.0, -1.0, 2.0], [float("nan"), float("inf"), 1.0, 2.0, 3.0], [1, 2, 3, 4, 5]], device=DEVICE).to(dtype)
    bits = hidden.view(whole)
    bits[0, 1] = 3  # subnormal
    bits[1, 2] = bits[1, 0] + 5  # another NaN
    steps, mask = torch.tensor([0, 4, 4], device=DEVICE), torch.tensor([True, False, True], device=DEVICE)
    edited, trace = climb(hidden, value, 0.5, steps, mask=mask, return_trace=True)
    assert torch.equal(edited.view(whole)[:2], bits[:2]) and not torch.equal(edited[2], hidden[2])
    assert trace[1].isnan().all() and trace[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(dtype, options):
    """To the bit: alone, in a batch, in another place, at another address."""
    value, hidden = network(70, 130).to(dtype), states(5, 70).to(dtype)
    together = climb(hidden, value, 0.5, 4, **options)
    assert torch.equal(climb(hidden[:1], value, 0.5, 4, **options), together[:1])
    assert torch.equal(climb(hidden[3:], value, 0.5, 4, **options), together[3:])
    order = torch.tensor([4, 0, 2])
    assert torch.equal(climb(hidden[order], value, 0.5, 4, **options), together[order])


def test_strided_rows():
    """Rows of a larger buffer, every other row, every other column, a transposed view, one row several times."""
    value, buffer = network(18, 40), states(6, 64)
    for view in (buffer[:2, 3:21], buffer[::3, 7:25], buffer[:2, 0:36:2], states(18, 2).T, buffer[1:2, :18].expand(3, 18)):
        assert torch.equal(climb(view, value, 0.5, 4), climb(view.contiguous(), value, 0.5, 4))


def test_no_rows():
    edited, trace = climb(torch.empty(0, 18, device=DEVICE), network(18, 40), return_trace=True)
    assert edited.shape == (0, 18) and trace.shape[0] == 0


def test_radius_cuts_the_path():
    """|u| never exceeds the radius, reaches it where the free path would leave, and the path up to there is the free one."""
    value, hidden = network(16, 30), states(6, 16)
    free = (climb(hidden, value, 0.5, 12) - hidden).norm(dim=1)
    radius = free * torch.linspace(0.2, 1.6, 6).to(DEVICE)
    edited, trace = climb(hidden, value, 0.5, 12, radius=radius, return_trace=True)
    torch.testing.assert_close((edited.double() - hidden.double()).norm(dim=1), torch.minimum(free, radius).double(), rtol=1e-5, atol=1e-6)
    exact, exact_trace = oracle(hidden, value, 0.5, 12, radius=radius)
    assert (edit_error(edited, exact, hidden) <= 60 * rounding_error(exact, hidden)).all()
    torch.testing.assert_close(trace.double(), exact_trace, rtol=1e-5, atol=1e-6)
    assert torch.equal(climb(hidden, value, 0.5, 12, radius=radius), edited)
    assert torch.equal(climb(hidden, value, 0.5, 12, radius=0.0), hidden)


def test_target_is_approached_from_both_sides():
    """Upwards and downwards, to the result of the oracle; without the argument the same rows climb."""
    value, hidden = network(16, 30), states(4, 16)
    with torch.no_grad():
        for layer in value.layers:
            layer.weight.mul_(1.5)
        here = value(hidden)[:, 0]
    target = here + torch.tensor([0.2, -0.2] * 2).to(DEVICE)
    edited, trace = climb(hidden, value, 0.2, 40, target=target, return_trace=True)
    exact, exact_trace = oracle(hidden, value, 0.2, 40, target=target)
    assert edit_error(edited, exact, hidden).max() < 1e-4
    torch.testing.assert_close(trace.double(), exact_trace, rtol=1e-5, atol=1e-5)
    assert ((trace[:, -1] - target).abs() < 0.5 * (here - target).abs()).all()
    assert torch.equal(climb(hidden, value, 0.2, 40, target=target), edited)
    assert (climb(hidden, value, 0.2, 4, return_trace=True)[1][:, -1] > here).all()


def test_heads_are_weighted():
    """Several heads with weights are one value function with one head, whose offset only the trace and the target see."""
    value, hidden = network(16, 30, num_heads=3), states(2, 16)
    weights = torch.tensor([0.7, -0.2, 0.3], device=DEVICE)
    edited, trace = climb(hidden, value, 0.5, 8, head_weights=weights, return_trace=True)
    exact, exact_trace = oracle(hidden, value, 0.5, 8, head_weights=weights)
    assert (edit_error(edited, exact, hidden) <= 60 * rounding_error(exact, hidden)).all()
    torch.testing.assert_close(trace.double(), exact_trace, rtol=1e-5, atol=1e-6)
    assert not torch.equal(climb(hidden, value, 0.5, 8, head_weights=weights.flip(0)), edited)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU its own kind of barrier is what counts")
@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_the_list_of_flips_with_and_without_reading_it_back(monkeypatch, cuda):
    value, hidden = network(24, 65), states(2, 24)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for step_size in (0.5, 1e3):
        exact, _ = oracle(hidden, value, step_size, 5)
        assert (edit_error(climb(hidden, value, step_size, 5), exact, hidden) <= 30 * rounding_error(exact, hidden) + product_error(value)).all()


class TestWhatItCannotDo:
    def refused(self, reason, hidden, value):
        """By name it raises, and "auto" goes elsewhere without a word about it."""
        with pytest.raises(RuntimeError, match=re.escape(f"backend 'triton' cannot run here: {reason}")):
            climb(hidden, value)
        arguments = normalise(hidden, value, 0.5, 3, None, None, None, None)
        assert backends.choose("auto", arguments, value.prepared()) is not BACKENDS["triton"]

    @pytest.mark.parametrize("dims", [(), (8, 7), (8, 7, 6)], ids=len)
    def test_other_depths(self, dims):
        self.refused(f"it has kernels for two linear layers, this value function has {len(dims) + 1}", states(2, 6), rc.ValueFunction(6, dims).to(DEVICE))

    def test_float64(self):
        self.refused("it computes in float32, the tensors are float64", states(2, 6).double(), network(6, 8).double())

    def test_tensors_that_are_not_on_a_gpu_without_the_interpreter(self, monkeypatch):
        monkeypatch.setattr(backend._kernels(), "interpreted", lambda: False)
        reason = "it runs on GPUs, the tensors are on cpu; Triton's interpreter runs there, slowly, where TRITON_INTERPRET=1 was set before"
        self.refused(reason, torch.randn(2, 6), rc.ValueFunction(6, (8,)))
        assert BACKENDS["triton"].status()["available"] is torch.cuda.is_available()

    def test_without_triton(self):
        """Importing the package imports no triton, and without it the rest works and the reason names the remedy."""
        code = """
import sys, torch, recontrol as rc
assert "triton" not in sys.modules
hidden, value = torch.randn(2, 6), rc.ValueFunction(6, (8,))
rc.ascend(hidden, value)
assert "triton" not in sys.modules
for name in [name for name in sys.modules if name.startswith("triton")] + ["triton"]:
    sys.modules[name] = None
rc.ascend(hidden, value)
try:
    rc.ascend(hidden, value, backend="triton")
except RuntimeError as error:
    assert rc.backend_info()["backends"]["triton"] == {"available": False, "reason": str(error).split(": ", 1)[1].split("; choose")[0]}
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "cannot run here: triton could not be imported" in done.stdout and "pip install 'recontrol[triton]'" in done.stdout


# What the interpreter accepts and the compiler does not shows only here. One kernel a line, for the types that it meets.
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import recontrol.kernels.ascend as kernels

assert not kernels.interpreted()
POINTERS = {"steps": "*i64", "mask": "*i1", "listed": "*i32"}
NUMBERS = {"rows": "i32", "units": "i32", "width": "i32", "trace_columns": "i32"}
STRIDES = {name: "i64" for name in ("x_row", "x_column", "hidden_row", "hidden_column")}

def compiled(kernel, target, constants, num_warps=4, **given):
    kinds = {name: POINTERS.get(name.removesuffix("_pointer"), "*fp32") for name in kernel.arg_names} | NUMBERS | STRIDES | given
    signature = {name: "constexpr" if name in constants else kinds[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=target, options={"num_warps": num_warps, **kernels._FUSED})
    assert len(made.asm["cubin" if target.backend == "cuda" else "hsaco"]) > 1000
    print(target.arch, kernel.__name__)
    return made

for given in sys.argv[1:]:
    backend, arch, warp_size = given.split()
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    for hidden, weight in (("*fp32", "*fp16"), ("*bf16", "*bf16"), ("*fp16", "*fp32")):
        compiled(kernels._products, target, {"out_pointer": None, **kernels._PRODUCT_TILE}, x_pointer=hidden, weight_pointer=weight)
        compiled(kernels._leave, target, kernels._EDIT_TILE, hidden_pointer=hidden, edited_pointer=hidden, weight_pointer=weight)
    compiled(kernels._products, target, {"bias_pointer": None, **kernels._PRODUCT_TILE})
    fixed = {"BLOCK_TRACE": 64, "AT_ONCE": 4, "READ_BACK": backend != "cuda"}
    for block in (16, 4096):
        plain = {"mask_pointer": None, "radius_pointer": None, "target_pointer": None, "MEASURED": False, "TRACED": False}
        for options in (plain, {"MEASURED": True, "TRACED": True}):
            made = compiled(kernels._climb, target, {**options, **fixed, "BLOCK": block}, kernels.warps(block))
"""

# A driver that is not there, so that the launcher chooses and compiles as on a GPU, but starts nothing.
LAUNCH = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
import recontrol.kernels.ascend as kernels

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cpu")

class Compiled:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid): return lambda *given, **options: codes.add(self.kernel.warmup(*given, grid=grid, **options).hash)

driver.set_active(Driver())
codes = set()
for name in ("_products", "_climb", "_leave"):
    setattr(kernels, name, Compiled(getattr(kernels, name)))
kernels.interpreted = lambda: False
weights = torch.zeros(130, 70), torch.zeros(130), torch.zeros(130, 130), torch.zeros(130), torch.zeros(())
found = []
for mask, columns in ((False, 0), (True, 1)):
    for rows, start in ((1, 0), (16, 0), (5, 1), (33, 3)):
        hidden, numbers = torch.zeros(rows * 77 + start)[start:].view(rows, 77)[:, :70], torch.zeros(rows + start)[start:]
        live = torch.zeros(rows + start, dtype=torch.bool)[start:] if mask else None
        kernels.ascend(hidden, *weights, numbers, torch.zeros(rows, dtype=torch.int64), live, numbers if mask else None, None, columns * rows)
        found.append(len(codes))
print(found)
"""


def test_the_kernels_compile(tmp_path):
    """In one process: to start it and to import everything takes as long as to compile for one of them."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE, "cuda 80 32", "cuda 90 32", "hip gfx942 64"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for arch in ("80", "90", "gfx942"):
        assert done.stdout.split("\n").count(f"{arch} _climb") == 4


def test_the_code_is_the_same_for_every_batch(tmp_path):
    """The launcher makes variants for sizes of one, for multiples of 16 and for aligned addresses, which could add in another order."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LAUNCH], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    # Two kinds of products, the steps, the end; with a mask, radius and trace the last two are others.
    assert done.stdout.strip() == str([4] * 4 + [6] * 4)
