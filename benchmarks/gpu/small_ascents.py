"""Ascents of small and odd shapes with every option, for compute-sanitizer: python -m benchmarks.gpu.small_ascents [--backend cuda]."""

import argparse
import itertools
from collections.abc import Sequence

import torch

import recontrol
from recontrol import ValueFunction

# Hidden size and widths: odd ones, and one beyond a block of threads.
SHAPES = ((37, (53,)), (64, (96,)), (130, (257,)), (37, (53, 41)), (64, (96, 130)))
ROWS = (1, 3, 17)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STEP_SIZE, STEPS = 0.5, 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them all, and look whether the results are finite and rows without steps unchanged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cuda", help="of recontrol.ascend (default cuda)")
    parser.add_argument("--device", default="cuda", help="where (default cuda)")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    count = 0
    for (size, dims), rows, dtype in itertools.product(SHAPES, ROWS, DTYPES):
        if given.backend == "triton" and len(dims) > 1:
            continue
        value = ValueFunction(size, dims).to(given.device, dtype).requires_grad_(False)
        # Every second row of a larger tensor: rows may be strided.
        hidden = torch.randn(2 * rows, size).to(given.device, dtype)[::2]
        steps = torch.full((rows,), STEPS, device=given.device)
        steps[0] = 0
        mask = torch.arange(rows, device=given.device) % 2 == 0
        options = ({}, {"mask": mask}, {"radius": 0.3}, {"target": 1.0}, {"radius": 0.3, "target": 1.0, "return_trace": True})
        for option in options:
            result = recontrol.ascend(hidden, value, STEP_SIZE, steps, backend=given.backend, **option)
            edited = result[0] if isinstance(result, tuple) else result
            assert torch.isfinite(edited).all() and torch.equal(edited[0], hidden[0]), (size, dims, rows, dtype, option)
            count += 1
    print(f"{count} ascents by backend {given.backend!r}")
    return 0


if __name__ == "__main__":
    main()
