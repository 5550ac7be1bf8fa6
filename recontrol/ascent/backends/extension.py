"""The compiled extension, or why there is none."""

import importlib
from typing import Any

import torch  # noqa: F401  (the extension needs it loaded)

module: Any = None
load_error: str | None = None
try:
    # It lies beside this package and imports nothing from it.
    module = importlib.import_module("recontrol._C")
except ImportError as error:
    load_error = f"the C++ extension could not be loaded ({error}); install recontrol with a C++ compiler at hand"
