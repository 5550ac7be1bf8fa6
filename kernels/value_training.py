"""The value function of two linear layers for training, forward and backward, in Triton.

    V = w2 relu(W1 h + b1) + b2                m = 1[W1 h + b1 > 0], one bit a unit and token
    P_k = (m * dv_k)^T H                       n_k = sum over tokens of m * dv_k, for each head k
    dW1 = sum_k diag(w2_k) P_k                 db1 = sum_k w2_k * n_k
    dw2_kj = W1_j . P_kj + b1_j n_kj           db2 = sum over tokens of dv

One matrix product forward and one a head backward. No activation is stored, and there is no gradient for the hidden states. Nothing
is summed by atomics: what several programs add up goes to scratch memory, and is summed in a fixed order.

Plain PyTorch with the same signatures, for one head, is in `recontrol.training.fused`; it shows in few lines what is computed here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens, units and hidden columns of one program, by whether tensor cores multiply. Not tuned on a GPU; the limit is shared memory.
FORWARD_BLOCKS = {False: (64, 64, 32), True: (128, 64, 64)}
BACKWARD_BLOCKS = {False: (32, 64, 64), True: (64, 64, 128)}
WARPS = 8
# Units and tokens of one program where bits are only counted, entries where partial sums are added up.
SUM_BLOCKS = (32, 128)
ENTRIES = 256
# What triton's own functions became when it was imported.
_INTERPRETED = tl.constexpr(not isinstance(tl.sum, triton.JITFunction))


@triton.jit
def _product(wide, narrow, total):
    """Add wide . narrow, for wide of float32, to the total, to the accuracy of float32."""
    if narrow.dtype == tl.bfloat16:
        # A float32 is the sum of three bfloat16, and products of bfloat16 are exact in float32: tensor cores lose nothing here.
        high = wide.to(tl.bfloat16)
        rest = wide - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        if _INTERPRETED:
            # The interpreter multiplies the bits of a bfloat16 as if they were a whole number. This is the same number.
            high, middle, low, narrow = high.to(tl.float32), middle.to(tl.float32), low.to(tl.float32), narrow.to(tl.float32)
        total = tl.dot(low, narrow, total)
        total = tl.dot(middle, narrow, total)
        total = tl.dot(high, narrow, total)
    else:
        # The smallest float16 is far above the smallest float32, so float16 cannot be split alike.
        total = tl.dot(wide, narrow.to(tl.float32), total, input_precision="ieee")
    return total


@triton.jit
def forward_kernel(
    hidden,
    w1,
    b1,
    w2,
    partial,
    mask,
    tokens,
    units,
    size,
    heads,
    words,
    row_stride,
    column_stride,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The mask, and for each block of units its part of V: one program a block of tokens and a block of units."""
    # Offsets into hidden states and scratch may not fit 32 bits.
    token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    block = tl.program_id(1)
    unit = block * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    z = tl.zeros((BLOCK_UNITS, BLOCK_TOKENS), tl.float32)
    for start in range(0, size, BLOCK_SIZE):
        column = start + tl.arange(0, BLOCK_SIZE)
        inside = (unit < units)[:, None] & (column < size)[None, :]
        weight = tl.load(w1 + unit[:, None].to(tl.int64) * size + column[None, :], mask=inside, other=0.0)
        inside = (column < size)[:, None] & (token < tokens)[None, :]
        state = tl.load(hidden + token[None, :] * row_stride + column[:, None].to(tl.int64) * column_stride, mask=inside, other=0.0)
        z = _product(weight, state, z)
    z += tl.load(b1 + unit, mask=unit < units, other=0.0)[:, None]
    # As torch.relu does, NaN is passed on, so that training that diverges is seen.
    active = (unit < units)[:, None] & ((z > 0) | (z != z))

    # One bit each, so that the sum is their union.
    bits = tl.reshape(active.to(tl.int32), (BLOCK_UNITS // 32, 32, BLOCK_TOKENS)) << tl.arange(0, 32)[None, :, None]
    word = block * (BLOCK_UNITS // 32) + tl.arange(0, BLOCK_UNITS // 32)
    inside = (word < words)[:, None] & (token < tokens)[None, :]
    tl.store(mask + token[None, :] * words + word[:, None], tl.sum(bits, axis=1), mask=inside)

    activation = tl.where(active, z, 0.0)
    for head in range(heads):
        weight = tl.load(w2 + head * units + unit, mask=unit < units, other=0.0)
        part = tl.sum(activation * weight[:, None], axis=0)
        tl.store(partial + (block.to(tl.int64) * tokens + token) * heads + head, part, mask=token < tokens)


@triton.jit
def values_kernel(partial, b2, values, count, heads, blocks, ENTRIES: tl.constexpr):
    """V from its parts, first block of units first, whatever the number of tokens."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    place = partial + entry
    total = tl.zeros((ENTRIES,), tl.float32)
    for _ in range(blocks):
        total += tl.load(place, mask=entry < count, other=0.0)
        place += count
    tl.store(values + entry, total + tl.load(b2 + entry % heads, mask=entry < count, other=0.0), mask=entry < count)


@triton.jit
def _masked(gradient, mask, token, unit, head, tokens, units, heads, words):
    """The gradient of a head where a unit is active, 0 elsewhere: (units, tokens)."""
    dv = tl.load(gradient + token * heads + head, mask=token < tokens, other=0.0)
    inside = (unit < units)[:, None] & (token < tokens)[None, :]
    word = tl.load(mask + token[None, :] * words + (unit // 32)[:, None], mask=inside, other=0)
    return tl.where(((word >> (unit % 32)[:, None]) & 1) == 1, dv[None, :], 0.0)


@triton.jit
def backward_kernel(
    gradient,
    mask,
    hidden,
    w1,
    w2,
    w1_gradient,
    partial,
    tokens,
    units,
    size,
    heads,
    words,
    row_stride,
    column_stride,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The gradient of W1, and for each block of columns its part of W1_j . P_kj: one program a block of units and a block of columns."""
    unit = tl.program_id(0) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    block = tl.program_id(1)
    column = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    total = tl.zeros((BLOCK_UNITS, BLOCK_SIZE), tl.float32)
    inside = (unit < units)[:, None] & (column < size)[None, :]
    place = unit[:, None].to(tl.int64) * size + column[None, :]
    for head in range(heads):
        product = tl.zeros((BLOCK_UNITS, BLOCK_SIZE), tl.float32)
        for start in range(0, tokens, BLOCK_TOKENS):
            token = (start + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
            left = _masked(gradient, mask, token, unit, head, tokens, units, heads, words)
            there = (token < tokens)[:, None] & (column < size)[None, :]
            state = tl.load(hidden + token[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride, mask=there, other=0.0)
            product = _product(left, state, product)
        weight = tl.load(w2 + head * units + unit, mask=unit < units, other=0.0)
        total += weight[:, None] * product
        part = tl.sum(tl.load(w1 + place, mask=inside, other=0.0) * product, axis=1)
        tl.store(partial + (head * tl.num_programs(1) + block).to(tl.int64) * units + unit, part, mask=unit < units)
    tl.store(w1_gradient + place, total, mask=inside)


@triton.jit
def active_gradient_kernel(gradient, mask, sums, tokens, units, heads, words, BLOCK_UNITS: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """n_kj, the gradient of a head summed over the tokens whose unit j is active: one program a block of units and a head."""
    unit = tl.program_id(0) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    head = tl.program_id(1)
    total = tl.zeros((BLOCK_UNITS,), tl.float32)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = (start + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
        total += tl.sum(_masked(gradient, mask, token, unit, head, tokens, units, heads, words), axis=1)
    tl.store(sums + head * units + unit, total, mask=unit < units)


# TRITON_INTERPRET set between the imports of triton and of this module would mix what is compiled with what is interpreted.
INTERPRETED = _INTERPRETED.value and not isinstance(forward_kernel, triton.JITFunction)


def forward(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """V and the mask of the active units.

    Args:
        hidden: (tokens, hidden_size), float32, bfloat16 or float16, any strides.
        w1: (units, hidden_size), float32, as are the other weights.
        b1: (units,).
        w2: (heads, units).
        b2: (heads,).

    Returns:
        V, (tokens, heads), float32, and the mask, (tokens, ceil(units / 32)), int32: bit j % 32 of word j // 32 is unit j.
    """
    w1, b1, w2, b2 = (weight.contiguous() for weight in (w1, b1, w2, b2))
    (tokens, size), (heads, units) = hidden.shape, w2.shape
    words = triton.cdiv(units, 32)
    cores = hidden.dtype == torch.bfloat16
    block_tokens, block_units, block_size = FORWARD_BLOCKS[cores]
    blocks = triton.cdiv(units, block_units)
    values = torch.empty(tokens, heads, dtype=torch.float32, device=hidden.device)
    mask = torch.empty(tokens, words, dtype=torch.int32, device=hidden.device)
    if tokens == 0:
        return values, mask
    partial = torch.empty(blocks, tokens, heads, dtype=torch.float32, device=hidden.device)
    grid = (triton.cdiv(tokens, block_tokens), blocks)
    sizes = (tokens, units, size, heads, words, *hidden.stride())
    forward_kernel[grid](hidden, w1, b1, w2, partial, mask, *sizes, block_tokens, block_units, block_size, num_warps=WARPS)
    values_kernel[(triton.cdiv(tokens * heads, ENTRIES),)](partial, b2, values, tokens * heads, heads, blocks, ENTRIES)
    return values, mask


def backward(gradient: Tensor, mask: Tensor, hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the weights.

    Args:
        gradient: (tokens, heads), float32, dv, the gradient with respect to V.
        mask: (tokens, ceil(units / 32)), int32, as `forward` returned it.
        hidden: (tokens, hidden_size), float32, bfloat16 or float16, any strides.
        w1: (units, hidden_size), float32, as are the other weights.
        b1: (units,).
        w2: (heads, units).

    Returns:
        The gradients of w1, b1, w2 and b2, float32, each of its weight's shape.
    """
    gradient, w1, w2 = gradient.contiguous(), w1.contiguous(), w2.contiguous()
    (tokens, size), (heads, units), words = hidden.shape, w2.shape, mask.shape[1]
    cores = hidden.dtype == torch.bfloat16
    block_tokens, block_units, block_size = BACKWARD_BLOCKS[cores]
    w1_gradient, active = torch.empty_like(w1), torch.empty_like(w2)
    partial = torch.empty(heads, triton.cdiv(size, block_size), units, dtype=torch.float32, device=hidden.device)
    grid = (triton.cdiv(units, block_units), partial.shape[1])
    sizes = (tokens, units, size, heads, words, *hidden.stride())
    backward_kernel[grid](gradient, mask, hidden, w1, w2, w1_gradient, partial, *sizes, block_tokens, block_units, block_size, num_warps=WARPS)
    active_gradient_kernel[(triton.cdiv(units, SUM_BLOCKS[0]), heads)](gradient, mask, active, tokens, units, heads, words, *SUM_BLOCKS)
    return w1_gradient, (w2 * active).sum(0), partial.sum(1) + b1 * active, gradient.sum(0)
