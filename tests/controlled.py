"""What the tests of the controller share: tiny models, and looking at hooks and at the states that a head reads."""

import contextlib
import inspect

import torch
from test_controller_models import GATED, PROMPT, logits_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import recontrol as rc
from recontrol.decoding.controller import CACHE_NAMES

# What the key/value cache is called depends on the release of transformers.
CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(LlamaForCausalLM.forward).parameters)
HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def llama(seed=0, kind=LlamaForCausalLM, **changes):
    torch.manual_seed(seed)
    return kind(LlamaConfig(**{**GATED, **changes})).eval()


def value_function(hidden_size, *hidden_dims, heads=1, **options):
    torch.manual_seed(1)
    return rc.ValueFunction(hidden_size, hidden_dims or (64,), heads, **options)


def hooks_on(model):
    """Every hook on every module, by whatever registry."""
    return [(name, registry, list(getattr(module, registry))) for name, module in model.named_modules() for registry in HOOKS if getattr(module, registry)]


@contextlib.contextmanager
def unchanged(model):
    """What happens inside must leave no hook, and a model that computes what it did before, to the bit."""
    assert hooks_on(model) == []
    before = logits_of(model, input_ids=PROMPT)
    yield model
    assert hooks_on(model) == [] and "forward" not in vars(model)
    assert torch.equal(logits_of(model, input_ids=PROMPT), before)


@contextlib.contextmanager
def states_read(model):
    """The states at the last position of each call of the output embedding, seen after all hooks that are there."""
    seen = []
    spy = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0][:, -1].clone()))
    try:
        yield seen
    finally:
        spy.remove()


def read_states(model, **inputs):
    """The states of all positions in one forward call, (rows, hidden_size), seen after all hooks that are there."""
    seen = []
    spy = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    try:
        logits_of(model, **inputs)
    finally:
        spy.remove()
    return seen[0]


class Failing:
    """A hook of somebody else, on a layer or on the head, that raises at its n-th call."""

    def __init__(self, module, error, call):
        self.error, self.left = error, call
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.left -= 1
        if self.left == 0:
            self.handle.remove()
            raise self.error


class Operations(TorchDispatchMode):
    """The names of the operations that were run.

    Reading a number (`.item()`, `if tensor`) waits for the device, and a tensor made of Python numbers is copied there: what does
    one of `UNCAPTURABLE` cannot be recorded in a CUDA graph.
    """

    UNCAPTURABLE = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::lift_fresh")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))
