"""A bank of value functions and an environment for vLLM. Where there is no vLLM, everything here is skipped."""

import importlib.util
from pathlib import Path

import pytest
import torch
from served import ENVIRONMENT, HIDDEN

import recontrol as rc


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs vLLM, which has an environment of its own: make test-vllm"))


@pytest.fixture(scope="session")
def bank(tmp_path_factory):
    """A folder of value functions whose weights are random and that do change what is said."""
    folder = tmp_path_factory.mktemp("bank")
    for seed, (name, hidden_dims, heads) in enumerate([("up", (64,), 1), ("other", (64,), 1), ("deep", (48, 32), 1), ("both", (32,), 2)]):
        torch.manual_seed(seed)
        rc.ValueFunction(HIDDEN, hidden_dims, heads).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def environment(bank):
    """What the processes of vLLM inherit."""
    with pytest.MonkeyPatch.context() as patch:
        for name, content in {**ENVIRONMENT, "RECONTROL_BANK": str(bank)}.items():
            patch.setenv(name, content)
        yield patch
