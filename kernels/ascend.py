"""Gradient ascent on a value function with two linear layers, in Triton: for any GPU that Triton serves.

V(h) = out . relu(W1 h + b1) + offset. With z = W1 h + b1, c = out * [z > 0], G = W1 W1^T and d = G c, one step of length s is
z += s d, and d changes only where a unit's sign does: by +-out_j G[j, :] for each unit j that flipped. The hidden state is
needed only at the end: h_n = h_0 + W1^T S, S = sum of s c.

Four launches, whose shapes depend on the number of rows and the sizes alone, and which wait for nothing on the host:
z = W1 h + b1; d = G c; all steps, one program a row; h + W1^T S. What differs from row to row is read from device memory.

A row's bits depend neither on its neighbours nor on the batch size. Tiles have one shape for every batch, and the arguments
that differ between batches (rows, addresses, strides of the states) are kept from specialising the code, which could add in another order.
"""

import contextlib
import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

# (rows, units, width) of one tile. Each lane adds up every 32nd or 64th product, and then the lanes are added up: short sums round less.
_ROWS = 4
_PRODUCT_TILE = {"BLOCK_ROWS": _ROWS, "BLOCK_UNITS": 16, "BLOCK_WIDTH": 64}
_EDIT_TILE = {"BLOCK_ROWS": _ROWS, "BLOCK_UNITS": 32, "BLOCK_WIDTH": 32}
# Products are fused with sums; said, because Triton's default is about to change.
_FUSED = {"enable_fp_fusion": True}
# The interpreter keeps its place in the grid in a global.
_one_at_a_time = threading.Lock()


@triton.jit(do_not_specialize=["rows", "x_row", "x_column"], do_not_specialize_on_alignment=["x_pointer"])
def _products(
    x_pointer,
    x_row,
    x_column,
    weight_pointer,
    bias_pointer,
    out_pointer,
    result_pointer,
    rows,
    units,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """result[r, u] = bias[u] + sum_k weight[u, k] x[r, k]; with `out`, x is z and out[k] [x[r, k] > 0] stands in its place."""
    blocks = (units + BLOCK_UNITS - 1) // BLOCK_UNITS
    # Neighbouring programs share rows, not weights: with few rows each weight is read once.
    unit = (tl.program_id(0) % blocks * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)).to(tl.int64)
    row = (tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    there, wanted = row < rows, unit < units
    running = tl.full((BLOCK_ROWS, BLOCK_UNITS, BLOCK_WIDTH), 0.0, tl.float32)
    for first in range(0, width, BLOCK_WIDTH):
        k = first + tl.arange(0, BLOCK_WIDTH)
        inside = k < width
        x = tl.load(x_pointer + row[:, None] * x_row + k[None, :] * x_column, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if out_pointer is not None:
            x = tl.where(x > 0, tl.load(out_pointer + k, mask=inside, other=0.0)[None, :], 0.0)
        weight = tl.load(weight_pointer + unit[:, None] * width + k[None, :], mask=wanted[:, None] & inside[None, :], other=0.0).to(tl.float32)
        running += x[:, None, :] * weight[None, :, :]
    result = tl.sum(running, axis=2)
    if bias_pointer is not None:
        result += tl.load(bias_pointer + unit, mask=wanted, other=0.0)[None, :]
    tl.store(result_pointer + row[:, None] * units + unit[None, :], result, mask=there[:, None] & wanted[None, :])


@triton.jit
def _fraction_to_radius(move_square, edit_dot_move, room):
    """`recontrol.ascent.oracle.fraction_to_radius`, with division and root rounded as everywhere else."""
    root = tl.sqrt_rn(tl.maximum(edit_dot_move * edit_dot_move + move_square * room, 0.0))
    above = tl.where(edit_dot_move > 0, room, root - edit_dot_move)
    below = tl.where(edit_dot_move > 0, edit_dot_move + root, move_square)
    fraction = tl.where(below > 0, tl.div_rn(above, tl.where(below > 0, below, 1.0)), 0.0)
    return tl.minimum(tl.maximum(fraction, 0.0), 1.0)


@triton.jit
def _value(z, out, offset):
    """V at pre-activations z."""
    return tl.sum(tl.where(z <= 0, 0.0, z) * out) + offset


@triton.jit
def _measured_step(z, velocity, slope, total, value, step_size, left, edit_square, row, radius_pointer, target_pointer):
    """The length of a step that depends on V or |u|; how many steps are left with this one, and u.u after it."""
    scale = step_size
    if target_pointer is not None:
        scale = 2 * step_size * (tl.load(target_pointer + row) - value)
    if radius_pointer is not None:
        radius = tl.load(radius_pointer + row)
        square = scale * scale * tl.sum(slope * velocity)
        dot = scale * tl.sum(total * velocity)
        room = tl.maximum(radius * radius - edit_square, 0.0)
        if 2 * dot + square > room:
            scale = scale * _fraction_to_radius(square, dot, room)
            left = tl.full((), 1, tl.int64)
        edit_square += 2 * dot + square
    return scale, left, edit_square


@triton.jit
def _steps_without_a_flip(z, velocity, step_size, left):
    """How many steps can be taken at once before the sign of any unit changes, at least one."""
    # Towards zero: on and falling, or off and rising.
    nearing = tl.where(z > 0, velocity < 0, velocity > 0)
    length = tl.min(tl.where(nearing, -z / tl.where(nearing, velocity, 1.0), float("inf")))
    # Stay clear of rounding; a sign that changed all the same is seen later. The bound keeps the number an integer.
    quiet = tl.minimum(tl.floor(length / step_size * (1 - 1e-5)), 1073741824.0).to(tl.int64)
    return tl.minimum(tl.maximum(quiet, 1), left)


@triton.jit
def _advance(z, velocity, slope, total, lost, scale):
    """One step: z, S, what the last rounding of S lost (Kahan 1965: plain sums of nearly equal terms round the same way each time), and flips."""
    after = z + scale * velocity
    flips = tl.sum(((after > 0) != (z > 0)).to(tl.int32))
    term = scale * slope - lost
    grown = total + term
    return after, grown, (grown - total) - term, flips


@triton.jit
def _listed_changes(listed, changes, unit, change, READ_BACK: tl.constexpr):
    """Write down the units whose slope changes, and by what; returns their number."""
    picked = change != 0
    place = tl.cumsum(picked.to(tl.int32), 0) - 1
    # The list is written and read by different threads of this program: nobody may still be reading the last one.
    tl.debug_barrier()
    tl.store(changes + place, change, mask=picked)
    tl.store(listed + place, unit, mask=picked)
    if READ_BACK:
        # Not every barrier waits for stores to arrive, but a thread that has read its own entry back has waited.
        arrived = tl.load(listed + place, mask=picked, other=-1, volatile=True) == unit
        picked = picked & arrived & (tl.load(changes + place, mask=picked, other=0.0, volatile=True) == change)
    count = tl.sum(picked.to(tl.int32))
    tl.debug_barrier()
    return count


@triton.jit
def _turned(velocity, listed, changes, count, gram_pointer, unit, units, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """The velocity d + sum of change_j G[j, :] over the listed units. Only what changed is read of G."""
    # Several rows at once are on their way from memory, and their sum is short.
    for begin in range(0, count, AT_ONCE):
        moved = tl.full((BLOCK,), 0.0, tl.float32)
        for i in tl.static_range(AT_ONCE):
            present = begin + i < count
            j = tl.load(listed + begin + i, mask=present, other=0).to(tl.int64)
            by = tl.load(changes + begin + i, mask=present, other=0.0)
            moved += by * tl.load(gram_pointer + j * units + unit, mask=unit < tl.where(present, units, 0), other=0.0)
        velocity += moved
    return velocity


@triton.jit(
    do_not_specialize=["trace_columns"],
    do_not_specialize_on_alignment=["step_size_pointer", "steps_pointer", "mask_pointer", "radius_pointer", "target_pointer"],
)
def _climb(
    z_pointer,
    velocity_pointer,
    out_pointer,
    offset_pointer,
    gram_pointer,
    step_size_pointer,
    steps_pointer,
    mask_pointer,
    radius_pointer,
    target_pointer,
    listed_pointer,
    change_pointer,
    total_pointer,
    trace_pointer,
    trace_columns,
    units,
    MEASURED: tl.constexpr,
    TRACED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TRACE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    READ_BACK: tl.constexpr,
):
    """All steps of one row, with its units in registers: S, and V along the path. MEASURED: a step needs V or |u|."""
    row, unit = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = unit < units
    # Padding units rest at z = d = 0 and never flip.
    z = tl.load(z_pointer + row * units + unit, mask=inside, other=0.0)
    velocity = tl.load(velocity_pointer + row * units + unit, mask=inside, other=0.0)
    out = tl.load(out_pointer + unit, mask=inside, other=0.0)
    offset, step_size, left = tl.load(offset_pointer), tl.load(step_size_pointer + row), tl.load(steps_pointer + row)
    listed, changes, trace = listed_pointer + row * units, change_pointer + row * units, trace_pointer + row * trace_columns
    if mask_pointer is not None:
        left = tl.where(tl.load(mask_pointer + row) != 0, left, 0)
    if not MEASURED:
        # Steps of no length, however many.
        left = tl.where(step_size > 0, left, 0)
    slope, total, lost = tl.where(z > 0, out, 0.0), tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    taken, flips, edit_square = tl.full((), 0, tl.int64), tl.full((), 1, tl.int32), tl.full((), 0.0, tl.float32)
    while left > 0:
        ahead, scale = tl.full((), 1, tl.int64), step_size
        if MEASURED:
            value = _value(z, out, offset)
            if TRACED:
                tl.store(trace + taken, value, mask=taken < trace_columns)
            scale, left, edit_square = _measured_step(z, velocity, slope, total, value, scale, left, edit_square, row, radius_pointer, target_pointer)
        elif flips == 0:
            ahead = _steps_without_a_flip(z, velocity, step_size, left)
            scale = step_size * ahead.to(tl.float32)
        z, total, lost, flips = _advance(z, velocity, slope, total, lost, scale)
        left, taken = left - ahead, taken + ahead
        if (flips > 0) & (left > 0):
            before, slope = slope, tl.where(z > 0, out, 0.0)
            # Where most units flip, adding up the active ones afresh is the shorter sum, and it starts without old rounding.
            afresh = 2 * flips > units
            count = _listed_changes(listed, changes, unit, tl.where(afresh, slope, slope - before), READ_BACK)
            velocity = _turned(tl.where(afresh, 0.0, velocity), listed, changes, count, gram_pointer, unit, units, BLOCK, AT_ONCE)
    tl.store(total_pointer + row * units + unit, total, mask=inside)
    if TRACED:
        # A row that ended early keeps its last value; NaN in a dead row propagates, as in any other evaluation of V.
        value = _value(z, out, offset)
        for begin in range(0, trace_columns, BLOCK_TRACE):
            column = begin + tl.arange(0, BLOCK_TRACE)
            tl.store(trace + column, tl.full((BLOCK_TRACE,), 0.0, tl.float32) + value, mask=(column >= taken) & (column < trace_columns))


@triton.jit(
    do_not_specialize=["rows", "hidden_row", "hidden_column"],
    do_not_specialize_on_alignment=["hidden_pointer", "steps_pointer", "mask_pointer"],
)
def _leave(
    hidden_pointer,
    hidden_row,
    hidden_column,
    weight_pointer,
    total_pointer,
    steps_pointer,
    mask_pointer,
    edited_pointer,
    rows,
    units,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """edited[r, k] = hidden[r, k] + sum_u weight[u, k] total[r, u], rounded once; rows without steps are copied."""
    blocks = (width + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    k = (tl.program_id(0) % blocks * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)).to(tl.int64)
    row = (tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    there, inside = row < rows, k < width
    running = tl.full((BLOCK_ROWS, BLOCK_UNITS, BLOCK_WIDTH), 0.0, tl.float32)
    for first in range(0, units, BLOCK_UNITS):
        unit = (first + tl.arange(0, BLOCK_UNITS)).to(tl.int64)
        wanted = unit < units
        total = tl.load(total_pointer + row[:, None] * units + unit[None, :], mask=there[:, None] & wanted[None, :], other=0.0)
        weight = tl.load(weight_pointer + unit[:, None] * width + k[None, :], mask=wanted[:, None] & inside[None, :], other=0.0).to(tl.float32)
        running += total[:, :, None] * weight[None, :, :]
    both = there[:, None] & inside[None, :]
    hidden = tl.load(hidden_pointer + row[:, None] * hidden_row + k[None, :] * hidden_column, mask=both, other=0.0)
    live = tl.load(steps_pointer + row, mask=there, other=0) > 0
    if mask_pointer is not None:
        live = live & (tl.load(mask_pointer + row, mask=there, other=0) != 0)
    edited = hidden.to(tl.float32) + tl.sum(running, axis=1)
    if hidden.dtype == tl.bfloat16:
        # To the nearest, ties to even, by the bits, because the interpreter cuts them off. A NaN stays one: it could be carried over.
        bits = edited.to(tl.int32, bitcast=True)
        bits = tl.where(edited != edited, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        edited = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        edited = edited.to(hidden.dtype)
    # The state itself, not its sum with zero: the bits of a NaN and the sign of a zero stay.
    tl.store(edited_pointer + row[:, None] * width + k[None, :], tl.where(live[:, None], edited, hidden), mask=both)


def interpreted() -> bool:
    """Whether these kernels are run by Triton's interpreter: TRITON_INTERPRET was set when triton was imported, and still was here."""
    return not isinstance(_climb, triton.JITFunction) and not isinstance(tl.sum, triton.JITFunction)


def warps(block: int) -> int:
    """Eight units a thread while there are threads enough: at most 16 warps, because AMD's are twice as wide."""
    return max(1, min(16, block // 256))


def ascend(
    hidden: Tensor,
    first: Tensor,
    first_bias: Tensor,
    gram: Tensor,
    out: Tensor,
    offset: Tensor,
    step_size: Tensor,
    steps: Tensor,
    mask: Tensor | None,
    radius: Tensor | None,
    target: Tensor | None,
    trace_columns: int,
) -> tuple[Tensor, Tensor]:
    """Take the steps u <- u + alpha * grad V(h + u), V(h) = out . relu(W1 h + b1) + offset, without waiting for the device.

    Args:
        hidden: (rows, width), float32, bfloat16 or float16, any strides; finite where a row is live.
        first: (units, width), W1, float32, bfloat16 or float16, contiguous.
        first_bias: (units,), b1, float32.
        gram: (units, units), G = W1 W1^T, float32, contiguous.
        out: (units,), float32, contiguous; the heads are already folded.
        offset: one number, float32.
        step_size: (rows,), float32.
        steps: (rows,), int64.
        mask: (rows,), bool, or None.
        radius: (rows,), float32, or None.
        target: (rows,), float32, or None.
        trace_columns: how many values of V to return for each row, 0 for none.

    Returns:
        (rows, width), dtype of `hidden`, contiguous, and the trace: (rows, trace_columns), float32.
    """
    (rows, width), units = hidden.shape, first.shape[0]
    edited = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    z, velocity, total, change = (torch.empty(rows, units, device=hidden.device) for _ in range(4))
    listed = torch.empty(rows, units, dtype=torch.int32, device=hidden.device)
    trace = torch.empty(rows, trace_columns, device=hidden.device)
    if rows == 0:
        return edited, trace
    row_tiles = triton.cdiv(rows, _ROWS)
    enter = (triton.cdiv(units, _PRODUCT_TILE["BLOCK_UNITS"]) * row_tiles,)
    leave = (triton.cdiv(width, _EDIT_TILE["BLOCK_WIDTH"]) * row_tiles,)
    block = triton.next_power_of_2(units)
    options = {
        "MEASURED": trace_columns > 0 or radius is not None or target is not None,
        "TRACED": trace_columns > 0,
        "BLOCK": block,
        "BLOCK_TRACE": 64,
        "AT_ONCE": 4,
        # The barrier of CUDA waits for stores; that of ROCm need not.
        "READ_BACK": torch.version.cuda is None,
    }
    # Triton launches on the current device, and the interpreter in one thread at a time.
    current = torch.get_device_module(hidden.device).device(hidden.device) if hidden.device.type != "cpu" else contextlib.nullcontext()
    with current, _one_at_a_time if interpreted() else contextlib.nullcontext():
        _products[enter](hidden, *hidden.stride(), first, first_bias, None, z, rows, units, width, **_PRODUCT_TILE, **_FUSED)
        _products[enter](z, *z.stride(), gram, None, out, velocity, rows, units, units, **_PRODUCT_TILE, **_FUSED)
        _climb[(rows,)](
            z,
            velocity,
            out,
            offset,
            gram,
            step_size,
            steps,
            mask,
            radius,
            target,
            listed,
            change,
            total,
            trace,
            trace_columns,
            units,
            **options,
            num_warps=warps(block),
            **_FUSED,
        )
        _leave[leave](hidden, *hidden.stride(), first, total, steps, mask, edited, rows, units, width, **_EDIT_TILE, **_FUSED)
    return edited, trace
