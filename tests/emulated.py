"""The CUDA kernels on the host: compiled by g++ with tests/emulator in the place of CUDA, and called through ctypes."""

import ctypes
import functools
import getpass
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from recontrol.files import write_aside

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = Path(__file__).resolve().parent / "emulator"
COMPILER = shutil.which("g++")
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-mfma", "-mf16c", "-DRECONTROL_EMULATE"]
INCLUDES = [EMULATOR, ROOT / "csrc" / "include", ROOT / "csrc" / "cuda"]
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("rows", ctypes.c_int64), ("cols", ctypes.c_int64), ("stride", ctypes.c_int64), ("dtype", ctypes.c_int32)]


class ValueNetwork(ctypes.Structure):
    _fields_ = [
        ("first", Matrix),
        ("first_bias", ctypes.c_void_p),
        ("gram", Matrix),
        ("second", Matrix),
        ("second_transposed", Matrix),
        ("second_bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("offset", ctypes.c_float),
    ]


class AscentBatch(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("hidden_stride", ctypes.c_int64),
        ("edited", ctypes.c_void_p),
        ("edited_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("step_size", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("radius", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("trace", ctypes.c_void_p),
        ("trace_columns", ctypes.c_int64),
    ]


def why_not_here() -> str | None:
    """Why the kernels cannot be emulated on this machine, or None."""
    if COMPILER is None:
        return "g++ is not installed"
    if not sysconfig.get_platform().startswith("linux-x86_64"):
        return f"the emulator's fibres were written for Linux on x86-64, this is {sysconfig.get_platform()}"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """Load what `_compiled` has made."""
    loaded = ctypes.CDLL(str(_compiled()))
    loaded.workspace_bytes.restype = ctypes.c_size_t
    loaded.workspace_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.why_not.argtypes = [ctypes.c_void_p]
    loaded.ascend.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    loaded.ascend.restype = loaded.why_not.restype = ctypes.c_char_p
    return loaded


def _compiled() -> Path:
    """The shared library, compiled once for each state of its sources: the processes that run tests at the same time share it."""
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), EMULATOR / "emulator.cpp"]
    headers = [path for folder in INCLUDES for path in sorted(folder.rglob("*.h"))]
    state = sha256(repr((COMPILER, FLAGS, getpass.getuser())).encode())
    for path in [*sources, *headers]:
        state.update(path.read_bytes())
    into = Path(tempfile.gettempdir()) / f"recontrol-emulated-{state.hexdigest()[:16]}.so"
    includes = [f"-I{folder}" for folder in INCLUDES]
    with FileLock(f"{into}.lock"):
        if into.exists():
            return into
        with tempfile.TemporaryDirectory() as folder:

            def compiled(source: Path) -> str:
                into = f"{folder}/{source.stem}.o"
                subprocess.run([COMPILER, *FLAGS, *includes, "-x", "c++", "-c", source, "-o", into], check=True)
                return into

            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(compiled, sources))
            subprocess.run([COMPILER, "-shared", "-o", f"{folder}/emulated.so", *objects], check=True)
            with write_aside(into) as aside:
                shutil.copy(f"{folder}/emulated.so", aside)
    return into


def configure(major: int = 9, processors: int = 3, order: str = "forward") -> None:
    """Choose the compute capability, how many blocks run together, and in which order threads take turns."""
    library().configure(major, processors, ORDERS[order])


def ascend(
    hidden: Tensor,
    first: Tensor,
    first_bias: Tensor,
    gram: Tensor,
    second: Tensor | None,
    second_transposed: Tensor | None,
    second_bias: Tensor | None,
    out: Tensor,
    offset: Tensor,
    step_size: Tensor,
    steps: Tensor,
    mask: Tensor | None,
    radius: Tensor | None,
    target: Tensor | None,
    edited: Tensor,
    trace: Tensor | None,
) -> None:
    """What `torch.ops.recontrol_cuda.ascend` does on a GPU."""
    network = ValueNetwork(_matrix(first), _at(first_bias), _matrix(gram), _matrix(second), _matrix(second_transposed), _at(second_bias), _at(out))
    columns = 0 if trace is None else trace.shape[1]
    batch = AscentBatch(
        hidden.shape[0],
        _at(hidden),
        hidden.stride(0),
        _at(edited),
        edited.stride(0),
        _DTYPES[hidden.dtype],
        _at(step_size),
        _at(steps),
        _at(mask),
        _at(radius),
        _at(target),
        _at(trace) if columns else None,
        columns,
    )
    reason = library().why_not(ctypes.byref(network))
    if reason is not None:
        raise RuntimeError(reason.decode())
    size = library().workspace_bytes(ctypes.byref(network), hidden.shape[0])
    # Poisoned, and with a margin whose bytes must stay.
    workspace = torch.full((size + 512,), 0xFF, dtype=torch.uint8)
    start = -workspace.data_ptr() % 256
    error = library().ascend(ctypes.byref(network), offset.data_ptr(), ctypes.byref(batch), workspace.data_ptr() + start)
    if error is not None:
        raise RuntimeError(error.decode())
    assert (workspace[start + size :] == 0xFF).all(), "something was written beyond the workspace"


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None) -> Matrix:
    return Matrix() if tensor is None else Matrix(tensor.data_ptr(), *tensor.shape, tensor.stride(0), _DTYPES[tensor.dtype])
