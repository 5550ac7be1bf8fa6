"""What the tests of `recontrol.generate` share: a tiny model, prompts with mixed controls, and what each prompt gets alone."""

import contextlib
import threading

import pytest
import torch
from controlled import llama
from test_generation import Letters

import recontrol as rc
from recontrol.generation import continuous

# Some of the letters end a response, so that responses have different lengths.
ENDING = [2, *range(40, 48)]
NEW = 14
TOKENIZER = Letters()
HAS_CONTINUOUS = continuous.release() >= continuous.KNOWN_FROM
BATCHINGS = ["continuous", "static"] if HAS_CONTINUOUS else ["static"]
continuous_only = pytest.mark.skipif(not HAS_CONTINUOUS, reason="this release of transformers has no continuous batching of the kind that is known here")
PROMPTS = [
    "To be, or not",
    "To be, or not to be, that is",
    "?",
    "To be, or not to be: that",
    "Whether it is nobler",
    "To be, or not",
    "to suffer the slings and arrows of fortune",
    "or",
]


def double_llama(**changes):
    """In float64, where the shape of a batch cannot tip a greedy choice."""
    return llama(initializer_range=0.5, vocab_size=98, eos_token_id=2, pad_token_id=0, max_position_embeddings=64, **changes).double()


def value(*hidden_dims, heads=1, seed=1):
    torch.manual_seed(seed)
    return rc.ValueFunction(32, hidden_dims, heads).double()


def mixed_controls():
    """For each prompt another, in all the ways in which they may differ."""
    wide, deep, heads = value(64), value(64, 32, seed=2), value(48, heads=2, seed=3)
    return [
        rc.Control(wide, 3.0, 9),
        None,
        rc.Control(deep, 2.0, 7),
        rc.Control(wide, 1.0, 20, radius=2.0),
        rc.Control(wide, 0.3, 9, target=1.5),
        rc.Control(0.7 * wide + 2 * value(16, seed=4), 2.0, 9),
        rc.Control(heads, 2.0, 5, head_weights=[1.0, -2.0]),
        rc.Control(wide, 5.0, 0),
    ]


def alone(model, prompt, control, **options):
    """What `model.generate` gives to one prompt, under `Controller` if it has a control."""
    ids = torch.tensor(TOKENIZER([prompt]).input_ids) if isinstance(prompt, str) else torch.tensor([prompt])
    attached = contextlib.nullcontext()
    if control is not None:
        keywords = {"radius": control.radius, "target": control.target, "head_weights": control.head_weights}
        attached = rc.Controller(control.value, control.step_size, control.steps, **keywords).attach(model)
    with attached:
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, "eos_token_id": ENDING, **options}
        return model.generate(ids, **options)[0, ids.shape[1] :].tolist()


def generate(model, prompts=PROMPTS, control=None, **options):
    return rc.generate(model, TOKENIZER, prompts, control, **{"max_new_tokens": NEW, "eos_token_id": ENDING, **options})


def decoding_threads():
    """Threads beside the main one; progress bars have one that stays."""
    return [thread for thread in threading.enumerate() if thread is not threading.main_thread() and type(thread).__name__ != "TMonitor"]
