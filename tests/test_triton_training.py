"""The fused training kernels in Triton's interpreter, and what they compute in plain PyTorch, against autograd in float64."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from oracle import ROUNDOFF, integers, whole_value_function
from test_train import SETTINGS, made, same

from recontrol.training import fused
from recontrol.training.fused import fused_values, why_not
from recontrol.training.objectives.tokens import td_loss
from recontrol.training.train import train
from recontrol.value import ValueFunction

# On a GPU, memory is poisoned only in PyTorch's deterministic mode, which wants this of the products it is compared with.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytest.importorskip("triton")
from recontrol.kernels import value_training as kernels

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if torch.cuda.is_available() and not kernels.INTERPRETED else "cpu"
if DEVICE == "cpu" and not kernels.INTERPRETED:
    pytest.skip("there is no CUDA device, and TRITON_INTERPRET=1 was not set before triton was imported", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tokens, hidden_size, units, heads: 1, primes, one past a block boundary in each of them, and several blocks.
SIZES = [(1, 1, 1, 1), (7, 37, 5, 2), (65, 33, 65, 1), (37, 257, 131, 3), (129, 129, 32, 1), (257, 7, 31, 2)]


def reference_forward(hidden, w1, b1, w2, b2):
    """V = w2 relu(W1 h + b1) + b2, and which units are active, in plain PyTorch.

    Args:
        hidden: (tokens, hidden_size), dtype of the weights.
        w1: (units, hidden_size).
        b1: (units,).
        w2: (heads, units).
        b2: (heads,).

    Returns:
        V, (tokens, heads), and the mask m = 1[W1 h + b1 > 0], (tokens, units), bool. NaN counts as active, as in autograd's ReLU.
    """
    z = torch.addmm(b1, hidden, w1.T)
    return torch.addmm(b2, torch.relu(z), w2.T), ~(z <= 0)


def reference_backward(gradient, mask, hidden, w1, b1, w2):
    """The gradients of the weights, from the mask instead of the activations.

        P_k = (m * dv_k)^T H,    n_k = sum over tokens of m * dv_k,    for each head k
        dW1 = sum_k diag(w2_k) P_k,    db1 = sum_k w2_k * n_k,    dw2_kj = W1_j . P_kj + b1_j n_kj,    db2 = sum over tokens of dv

    since dV_k / dz = w2_k * m and an active unit is m * (W1 h + b1).

    Args:
        gradient: (tokens, heads), dv, the gradient with respect to V.
        mask: (tokens, units), bool, as `reference_forward` returned it.
        hidden: (tokens, hidden_size), dtype of the weights.
        w1: (units, hidden_size).
        b1: (units,).
        w2: (heads, units).

    Returns:
        The gradients of w1, b1, w2 and b2, each of its weight's shape.
    """
    masked = torch.where(mask[:, :, None], gradient[:, None, :], 0)  # (tokens, units, heads)
    products = torch.einsum("tjk,th->kjh", masked, hidden)  # (heads, units, hidden_size)
    active = masked.sum(0).T  # (heads, units)
    w1_gradient = torch.einsum("kj,kjh->jh", w2, products)
    w2_gradient = torch.einsum("jh,kjh->kj", w1, products) + b1 * active
    return w1_gradient, (w2 * active).sum(0), w2_gradient, gradient.sum(0)


def reference_values(value, hidden):
    """As `fused_values`, in plain PyTorch: what the kernels compute, in the dtype of the weights, on any device."""
    (w1, w2), (b1, b2) = value.parameters_by_kind
    return fused._Values.apply(hidden.to(value.dtype), w1, b1, w2, b2, reference_forward, reference_backward)


def setup(tokens, size, units, heads, dtype=torch.float32):
    torch.manual_seed(tokens + units)
    value = ValueFunction(size, (units,), heads).to(DEVICE)
    return value, torch.randn(tokens, size).to(DEVICE, dtype), torch.randn(tokens, heads).to(DEVICE)


def differentiated(evaluate, value, hidden, gradient):
    """V and the gradients of W1, b1, W2 and b2."""
    values = evaluate(value, hidden)
    return [values.detach(), *torch.autograd.grad(values, list(value.parameters()), gradient.to(values.dtype))]


def exact_of(value, hidden, gradient):
    """By autograd in float64, from the same weights."""
    return differentiated(lambda v, h: v(h), copy.deepcopy(value).double(), hidden.double(), gradient)


def bounds(value, hidden, gradient):
    """What float32 may be off by in V and each gradient: for every sum, sqrt(terms) roundings of the sum of its absolute terms.

    One more for the products, all of which are rounded. A sum of sums has the roundings of both.
    """
    (w1, w2), (b1, b2) = [[part.detach().double().abs() for part in parts] for parts in value.parameters_by_kind]
    active = (copy.deepcopy(value).double().layers[0](hidden.double()) > 0).double()
    states, dv = hidden.double().abs(), gradient.double().abs()
    tokens, size, units = len(states), w1.shape[1], len(w1)
    z = (states @ w1.T + b1) * active
    masked = torch.einsum("tj,tk->tkj", active, dv)
    products, sums = torch.einsum("tkj,th->kjh", masked, states), masked.sum(0)
    u = ROUNDOFF[torch.float32]

    def roundings(*lengths):
        return u * sum(length + 1 for length in lengths) ** 0.5

    return [
        roundings(size + 1, units + 1) * (z @ w2.T + b2),
        roundings(tokens, len(w2)) * torch.einsum("kj,kjh->jh", w2, products),
        roundings(tokens, len(w2)) * (w2 * sums).sum(0),
        roundings(tokens, size + 1) * (torch.einsum("jh,kjh->kj", w1, products) + b1 * sums),
        roundings(tokens) * dv.sum(0),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_are_those_of_autograd_in_float64(sizes, dtype, poisoned_memory):
    """Half-precision states too cost no accuracy: the bound is that of float32."""
    value, hidden, gradient = setup(*sizes, dtype)
    found, exact = differentiated(fused_values, value, hidden, gradient), exact_of(value, hidden, gradient)
    for name, ours, wanted, bound in zip(("V", "W1", "b1", "W2", "b2"), found, exact, bounds(value, hidden, gradient), strict=True):
        assert ours.dtype == torch.float32 and ours.shape == wanted.shape
        assert ((ours.double() - wanted).abs() <= bound).all(), f"{name}: {((ours.double() - wanted).abs() / bound).max():.3g} times the bound"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_no_larger_than_those_of_autograd_in_float32(dtype):
    """Over many numbers together. Those of the biases are few numbers, and the same sums in both; the test above bounds them."""
    value, hidden, gradient = setup(129, 257, 131, 2, dtype)
    exact = exact_of(value, hidden, gradient)
    ours, theirs = (differentiated(how, value, hidden, gradient) for how in (fused_values, lambda v, h: v(h.float())))
    for name, index in (("V", 0), ("W1", 1), ("W2", 3)):
        assert (ours[index].double() - exact[index]).norm() <= (theirs[index].double() - exact[index]).norm(), name


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_reference_is_autograd_to_the_accuracy_of_float64(sizes):
    value, hidden, gradient = setup(*sizes)
    value, hidden = value.double(), hidden.double()
    found, exact = differentiated(reference_values, value, hidden, gradient), exact_of(value, hidden, gradient)
    for ours, wanted, bound in zip(found, exact, bounds(value, hidden, gradient), strict=True):
        assert ours.dtype == torch.float64
        # Both sides round.
        assert ((ours - wanted).abs() <= 2 * bound * (ROUNDOFF[torch.float64] / ROUNDOFF[torch.float32])).all()


def test_the_reference_passes_gradcheck():
    value, hidden, _ = setup(5, 3, 7, 2)
    value = value.double()
    parts = [part for pair in zip(*value.parameters_by_kind, strict=True) for part in pair]

    def evaluate(w1, b1, w2, b2):
        return fused._Values.apply(hidden.double(), w1, b1, w2, b2, reference_forward, reference_backward)

    assert torch.autograd.gradcheck(evaluate, parts)


def unpacked(mask, units):
    """The bits of the words, unit 0 first: (tokens, units), and that those past the last unit are 0."""
    bits = (mask.cpu()[:, :, None] >> torch.arange(32)) & 1
    bits = bits.flatten(1).bool()
    assert not bits[:, units:].any()
    return bits[:, :units]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("units", [1, 31, 32, 33, 65, 131])
def test_bits_are_exactly_the_active_units_and_whole_numbers_come_out_whole(units, dtype, poisoned_memory):
    """Pre-activations of these nets are zero again and again; a unit at zero is not active, and everything here is exact."""
    torch.manual_seed(units)
    value = whole_value_function(7, (units,)).to(DEVICE)
    hidden, gradient = integers(67, 7).to(DEVICE, dtype), integers(67, 1).to(DEVICE)
    weights, biases = value.parameters_by_kind
    values, mask = kernels.forward(hidden, weights[0], biases[0], weights[1], biases[1])
    z = value.layers[0](hidden.float())
    assert (z == 0).any() and (z < 0).any() and mask.dtype == torch.int32 and mask.shape == (67, -(-units // 32))
    assert torch.equal(unpacked(mask, units), (z > 0).cpu())
    assert torch.equal(values, value(hidden.float()))
    for ours, wanted in zip(differentiated(fused_values, value, hidden, gradient), exact_of(value, hidden, gradient), strict=True):
        assert torch.equal(ours.double(), wanted)


@pytest.mark.parametrize("evaluate", [fused_values, reference_values])
def test_a_unit_at_zero_and_a_dead_unit_have_no_gradient(evaluate):
    value = ValueFunction(3, (4,)).to(DEVICE)
    with torch.no_grad():
        value.layers[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 0], [-1, 0, 0], [0, 1, 0]]))
        value.layers[0].bias.copy_(torch.tensor([0.0, 0, 0, -5]))
        value.layers[1].weight.fill_(1.0)
    hidden = torch.tensor([[0.0, 1, 1], [2, 4, 0]], device=DEVICE)
    values, w1, b1, w2, b2 = differentiated(evaluate, value, hidden, torch.ones(2, 1, device=DEVICE))
    assert torch.equal(values - value.layers[1].bias, torch.tensor([[0.0], [2]], device=DEVICE))
    assert w1.tolist() == [[2, 4, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]] and b1.tolist() == [1, 0, 0, 0]
    assert w2.tolist() == [[2, 0, 0, 0]] and b2.tolist() == [2]


@pytest.mark.parametrize("evaluate", [fused_values, reference_values])
def test_no_tokens(evaluate):
    value, hidden, gradient = setup(0, 5, 33, 2)
    values, *gradients = differentiated(evaluate, value, hidden, gradient)
    assert values.shape == (0, 2)
    assert all(torch.equal(found, torch.zeros_like(weight)) for found, weight in zip(gradients, value.parameters(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype):
    """Rows of a larger buffer, every second column of one, a transposed matrix, and a gradient that is one number seen everywhere."""
    value, hidden, _ = setup(37, 20, 33, 2, dtype)
    one = torch.ones(1, 1, device=DEVICE).expand(37, 2)
    wanted = differentiated(fused_values, value, hidden, torch.ones(37, 2, device=DEVICE))
    rows = torch.full((80, 50), float("nan"), dtype=dtype, device=DEVICE)
    rows[3:77:2, 5:45:2] = hidden
    for view in (rows[3:77:2, 5:45:2], hidden.T.contiguous().T, torch.cat([hidden, rows[:37]], 1)[:, :20]):
        assert not view.is_contiguous() and torch.equal(view, hidden)
        for ours, same_as in zip(differentiated(fused_values, value, view, one), wanted, strict=True):
            assert torch.equal(ours, same_as)


def test_results_repeat_to_the_bit_and_a_row_does_not_depend_on_its_neighbours(poisoned_memory):
    value, hidden, gradient = setup(131, 67, 200, 2)
    first, second = (differentiated(fused_values, value, hidden, gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # In the same place of a block; how a product is summed inside one is up to the hardware.
    assert torch.equal(fused_values(value, hidden[:64]), first[0][:64])
    mixed = hidden.clone()
    mixed[1::2] = 1e3
    assert torch.equal(fused_values(value, mixed)[::2], first[0][::2])


def test_nan_is_passed_on_as_autograd_does():
    """Else training that diverges would not be seen: relu by `z > 0` alone makes it 0."""
    value, hidden, gradient = setup(5, 3, 7, 1)
    hidden[2, 1] = float("nan")
    found, wanted = (differentiated(how, value, hidden, gradient) for how in (fused_values, lambda v, h: v(h)))
    assert wanted[0].isnan().sum() == 1
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("evaluate", [fused_values, reference_values])
def test_no_gradient_flows_to_hidden_states_and_none_of_second_order(evaluate):
    value, hidden, _ = setup(5, 3, 7, 1)
    hidden.requires_grad_()
    evaluate(value, hidden).square().sum().backward()
    assert hidden.grad is None and all(parameter.grad.any() for parameter in value.parameters())
    first = torch.autograd.grad(evaluate(value, hidden).square().sum(), value.layers[0].weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    with torch.no_grad():
        assert not evaluate(value, hidden).requires_grad


@pytest.mark.parametrize("td_lambda", [0.0, 0.5])
def test_the_gradients_of_parts_of_a_batch_add_up(td_lambda):
    value, hidden, _ = setup(20, 9, 35, 2)
    lengths, rewards = torch.tensor([5, 1, 8, 6], device=DEVICE), torch.randn(4, 2).to(DEVICE)
    exact = copy.deepcopy(value).double()
    values = exact(hidden.double())
    values.retain_grad()
    td_loss(values, rewards, lengths, td_lambda).backward()
    for responses in (slice(0, 2), slice(2, 4)):
        tokens = slice(0, 6) if responses.start == 0 else slice(6, 20)
        found = fused_values(value, hidden[tokens])
        (td_loss(found, rewards[responses], lengths[responses], td_lambda) * (len(found) / 20)).backward()
    # dV itself is made from V, whose error is at most that of V, doubled by the difference of two and scaled by 2 / (tokens * heads).
    change = 4 * bounds(value, hidden, values.grad)[0].detach() / values.numel()
    moved = bounds(value, hidden, change)[1:]
    for parameter, wanted, bound, more in zip(value.parameters(), exact.parameters(), bounds(value, hidden, values.grad)[1:], moved, strict=True):
        assert wanted.grad.any()
        # `more` is what such a dV could do at the most, u times too small.
        assert ((parameter.grad.double() - wanted.grad).abs() <= bound + more / ROUNDOFF[torch.float32]).all()


def test_training_with_the_kernels_is_training(tmp_path):
    data = made(tmp_path / "r", heads=2)
    settings = {**SETTINGS, "epochs": 2, "batch_size": 18, "hidden_dims": (33,), "device": DEVICE}
    value, history = train(data, out=tmp_path / "v", kernel="triton", **settings)
    other, other_history = train(data, **settings)
    assert not same(value, other) and value.provenance["training"]["kernel"] == "triton"
    # 4 steps of Adam from the same weights: a rounding of 6e-8 a number, enlarged where a gradient is small against its neighbours.
    for entry, wanted in zip(history, other_history, strict=True):
        assert entry == pytest.approx(wanted, rel=1e-4)
    again, history_again = train(data, kernel="triton", **settings)
    assert same(value, again) and history == history_again
    with pytest.raises(ValueError, match="another kernel: found 'triton', wanted 'torch'"):
        train(data, out=tmp_path / "v", **settings)


def test_states_of_half_precision_are_trained_on(tmp_path):
    data = made(tmp_path / "r", dtype=torch.bfloat16)
    settings = {**SETTINGS, "epochs": 1, "batch_size": 40, "device": DEVICE}
    assert train(data, kernel="triton", **settings)[1][0] == pytest.approx(train(data, **settings)[1][0], rel=1e-4)


@pytest.mark.parametrize(
    ("hidden_dims", "weights", "states", "message"),
    [
        ((8, 8), torch.float32, torch.float32, "it has kernels for two linear layers, this value function has 3"),
        ((), torch.float32, torch.float32, "it has kernels for two linear layers, this value function has 1"),
        ((8,), torch.float64, torch.float32, "it needs float32 weights, these are float64"),
        ((8,), torch.bfloat16, torch.bfloat16, "it needs float32 weights, these are bfloat16"),
        ((8,), torch.float32, torch.float64, "it reads float32, bfloat16 and float16 hidden states, these are float64"),
        ((8,), torch.float32, torch.int64, "it reads float32, bfloat16 and float16 hidden states, these are int64"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(tmp_path, hidden_dims, weights, states, message):
    value, hidden = ValueFunction(6, hidden_dims).to(DEVICE, weights), torch.zeros(2, 6, device=DEVICE).to(states)
    assert why_not(value, hidden) == message
    with pytest.raises(RuntimeError, match=f"kernel 'triton' cannot run here: {message}; choose one of 'auto', 'torch', 'closed-form', 'triton'"):
        fused_values(value, hidden)
    if states.is_floating_point and weights != torch.bfloat16:
        options = {**SETTINGS, "hidden_dims": hidden_dims, "dtype": weights, "device": DEVICE, "out": tmp_path / "v"}
        with pytest.raises(RuntimeError, match=message):
            train(made(tmp_path / "r", dtype=states), kernel="triton", **options)
        assert not (tmp_path / "v").exists()
        train(tmp_path / "r", **options)


def test_states_of_another_shape_or_elsewhere_are_refused():
    value = ValueFunction(6, (8,)).to(DEVICE)
    assert why_not(value, torch.zeros(2, 6, device=DEVICE)) is None
    assert why_not(value, torch.zeros(2, 5, device=DEVICE)) == "it needs hidden states of shape (tokens, 6), found (2, 5)"
    assert why_not(value, torch.zeros(6, device=DEVICE)) == "it needs hidden states of shape (tokens, 6), found (6,)"
    assert why_not(value, torch.zeros(2, 6, device="meta")).startswith("the hidden states are on meta, the weights on ")


def test_without_triton_or_a_device_the_reason_is_given(monkeypatch):
    value, hidden = ValueFunction(6, (8,)), torch.zeros(2, 6)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "INTERPRETED", False)
        assert why_not(value, hidden).startswith("it needs a CUDA device, the tensors are on cpu (TRITON_INTERPRET=1, set before triton is imported")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))
    with pytest.raises(RuntimeError, match=r"kernel 'triton' cannot run here: triton is not installed \(pip install \"recontrol\[triton\]\"\)"):
        fused_values(value, hidden)


def test_triton_is_imported_by_no_one_who_does_not_ask_for_it():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, recontrol as rc, recontrol.training.train, recontrol.cli\n"
        "from recontrol.training.fused import fused_values\n"
        "assert fused_values(rc.ValueFunction(3, (4,)), torch.ones(2, 3), 'closed-form').shape == (2, 1)\n"
        "assert 'recontrol.kernels.value_training' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Compiled without a GPU, which finds what the interpreter accepts and the compiler does not.
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from recontrol.kernels import value_training as kernels

found = {}
for capability, dtype, one_head in json.loads(sys.argv[1]):
    cores = dtype == "bf16"
    forward, backward = (dict(zip(("BLOCK_TOKENS", "BLOCK_UNITS", "BLOCK_SIZE"), table[cores])) for table in (kernels.FORWARD_BLOCKS, kernels.BACKWARD_BLOCKS))
    constants = {"forward_kernel": forward, "backward_kernel": backward}
    if not cores:
        constants |= {
            "values_kernel": {"ENTRIES": kernels.ENTRIES},
            "active_gradient_kernel": dict(zip(("BLOCK_UNITS", "BLOCK_TOKENS"), kernels.SUM_BLOCKS)),
        }
    for name, blocks in constants.items():
        kernel = getattr(kernels, name)
        assert isinstance(kernel, triton.JITFunction)
        # As a launch does it: an argument that is 1 is a constant.
        fixed = dict(blocks) | {key: 1 for key in ("heads", "column_stride") if one_head and key in kernel.arg_names}
        pointers = {"hidden": "*" + dtype, "mask": "*i32", **dict.fromkeys("w1 b1 w2 b2 partial values gradient w1_gradient sums".split(), "*fp32")}
        signature = {key: "constexpr" if key in fixed else pointers.get(key, "i32") for key in kernel.arg_names}
        # And what is a multiple of 16 is known to be, as usual sizes are, which is what makes loads asynchronous.
        aligned = [i for i, key in enumerate(kernel.arg_names) if signature[key] != "constexpr" and key not in ("heads", "blocks")] if one_head else []
        source = ASTSource(kernel, signature, fixed, {(i,): [["tt.divisibility", 16]] for i in aligned})
        options = {"num_warps": kernels.WARPS} if name in ("forward_kernel", "backward_kernel") else {}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        found[f"{capability} {dtype} {one_head} {name}"] = [compiled.metadata.shared, len(compiled.asm["cubin"]), compiled.asm["ptx"].count("mma")]
print("found", json.dumps(found))
"""
# Bytes of shared memory that a program may have: CUDA programming guide, technical specifications per compute capability.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_kernels_compile_ahead_of_time(capability, tmp_path):
    # Both ways for bfloat16, whose sizes are the larger ones; float16 differs from float32 by one conversion.
    wanted = [(capability, "fp32", True), (capability, "bf16", True), (capability, "bf16", False), (capability, "fp16", False)]
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    # From a file: triton reads the source of what it compiles.
    (tmp_path / "compile.py").write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, tmp_path / "compile.py", json.dumps(wanted)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    compiled = {name: SimpleNamespace(shared=a, cubin=b, mma=c) for name, (a, b, c) in json.loads(done.stdout.split("found ")[-1]).items()}
    assert len(compiled) == 12
    for name, result in compiled.items():
        assert result.cubin > 0 and result.shared <= SHARED_MEMORY[capability], name
        # float32 is not rounded to the inputs of tensor cores on the way; bfloat16 is multiplied by them.
        assert (result.mma > 0) == ("bf16" in name), name
