"""What all tests share: no network, one thread, a fixed seed, and memory that is poisoned before it is handed out."""

import gc
import os
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads of models this small wait for each other at every step, and two test processes side by side would take the cores from each
# other. Read when torch is imported, here and in child processes. A test of threads asks for them (`several_threads`).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU the Triton kernels are run by Triton's interpreter, which has to be asked for before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """torch.empty hands out NaN, so that reading what nobody wrote cannot go unseen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def _threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """Also where OMP_NUM_THREADS asks for more: models this small take longer on several threads, which wait for each other at every step."""
    with _threads(1):
        yield


@pytest.fixture
def several_threads():
    """A context manager: what runs inside `with several_threads(n)` may share its work among n threads, as it does outside of these tests."""
    return _threads


@pytest.fixture(scope="module")
def quick_collection():
    """The manager of continuous batches collects garbage twice a call, through all that the tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
