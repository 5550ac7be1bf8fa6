"""Language models and value functions by name, as the command line and studies give them."""

from typing import Any

from recontrol.checks import loading
from recontrol.decoding.editing import states_device
from recontrol.decoding.hooks import Attachment
from recontrol.value import ValueFunction


def load_language_model(name: str, *, dtype: str = "auto", device: str = "cpu", revision: str | None = None) -> tuple[Any, Any]:
    """(language model in evaluation mode, its tokenizer) of a name on the hub or a folder; device "auto" spreads the model over all GPUs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Only device_map needs no copy of the whole model in main memory.
    keywords = {} if device == "cpu" else {"device_map": device}
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, revision=revision, **keywords).eval(), tokenizer


def load_value_function(name: str, model: Any) -> ValueFunction:
    """The value function of a folder, a name on the hub or a .pth file of the released code, on the device of a model's last states."""
    loaded = ValueFunction.from_released(name) if name.endswith(".pth") else ValueFunction.from_pretrained(name)
    return loaded.to(states_device(Attachment(model)))
