"""Language models and value functions by name, as the command line and studies give them."""

from collections.abc import Mapping
from typing import Any

from recontrol.checks import loading
from recontrol.decoding.editing import states_device
from recontrol.decoding.hooks import Attachment
from recontrol.value import ValueFunction

# Arguments of `from_pretrained` that say what is loaded and from where: model, config and tokenizer are of one place.
PLACE = ("revision", "token", "subfolder", "cache_dir", "local_files_only", "force_download", "proxies", "trust_remote_code", "code_revision", "gguf_file")


def loader_arguments(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's `from_pretrained` that its tokenizer needs too."""
    return {name: keywords[name] for name in PLACE if name in keywords}


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
