"""Modules of earlier releases under their old names: importing one warns once and gives the module that took its place."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "recontrol.arguments": "recontrol.ascent.arguments",
    "recontrol.backends": "recontrol.ascent.backends",
    "recontrol.data.packing": "recontrol.decoding.packing",
    "recontrol.data.pairs": "recontrol.data.prompts",
    "recontrol.data.rewards.regression": "recontrol.data.rewards.model",
    "recontrol.data.texts": "recontrol.data.collect",
    "recontrol.decoding.generation": "recontrol.decoding.batches",
    "recontrol.hub": "recontrol.value.card",
    "recontrol.loading": "recontrol.decoding.loading",
    "recontrol.peak_memory": "recontrol.methods.peak_memory",
    "recontrol.prepared": "recontrol.value.prepared",
    "recontrol.reference": "recontrol.ascent.oracle",
    "recontrol.reports.columns": "recontrol.reports.table",
    "recontrol.reports.findings": "recontrol.reports.comparison",
    "recontrol.reports.page": "recontrol.reports.report_files",
    "recontrol.reports.report": "recontrol.reports.table",
    "recontrol.training.checkpoint": "recontrol.training.loop",
    "recontrol.training.initial": "recontrol.training.train",
    "recontrol.training.mixed_precision": "recontrol.training.fused",
    "recontrol.training.objectives.base": "recontrol.training.objectives.tokens",
    "recontrol.value_card": "recontrol.value.card",
    "recontrol.value_files": "recontrol.value.files",
    "recontrol.weighted_sum": "recontrol.value.function",
}


class _OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"the module {spec.name} is now {new}; the old name will go", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        # The import system is about to write the old name's spec into it.
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def install() -> None:
    """Make the old names importable."""
    sys.meta_path.append(_OldNames())
