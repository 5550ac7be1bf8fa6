"""The cells of an evaluation, in memory and on disk: a run that was stopped continues, and methods can be added to one that is done."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recontrol.evaluation.measure import Answer, Cell
from recontrol.files import check_same_settings, read_json, remove_leftovers, write_aside, write_json
from recontrol.methods.base import Method

FORMAT = "recontrol.evaluation"
FORMAT_VERSION = 1
LONGEST_NAME = 60


class Cells(dict[tuple[str, int, int], Cell]):
    """The cells by label, seed and batch; with a folder, one file for each, and one with the settings that all have in common."""

    def __init__(self, folder: str | os.PathLike | None, settings: dict[str, Any], methods: Sequence[Method]):
        super().__init__()
        self._folders = {} if folder is None else {method.label: Path(folder) / folder_name(method) for method in methods}
        if folder is None:
            return
        wanted = json.loads(json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **settings}))
        path = Path(folder) / "settings.json"
        if path.exists():
            check_same_settings(read_json(path), wanted, f"{folder} has an evaluation with")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        if not path.exists():
            write_json(path, wanted)

    def known(self, label: str, seed: int, batch: int) -> bool:
        """Whether a cell is there, or can be read; a damaged file is refused."""
        path = self._path(label, seed, batch)
        if (label, seed, batch) not in self and path is not None and path.exists():
            content = read_json(path)
            try:
                self[label, seed, batch] = Cell(**{**content, "answers": [Answer(**answer) for answer in content["answers"]]})
            except (TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} is no cell of an evaluation ({error}); remove it to have it made again") from error
        return (label, seed, batch) in self

    def add(self, cell: Cell) -> None:
        """Keep a cell, and write it whole or not at all."""
        self[cell.label, cell.seed, cell.batch] = cell
        path = self._path(cell.label, cell.seed, cell.batch)
        if path is not None:
            path.parent.mkdir(exist_ok=True)
            with write_aside(path) as aside:
                aside.write_text(json.dumps(asdict(cell), ensure_ascii=False) + "\n", encoding="utf-8")

    def _path(self, label: str, seed: int, batch: int) -> Path | None:
        return self._folders[label] / f"seed-{seed}-batch-{batch:05}.json" if self._folders else None


def folder_name(method: Method) -> str:
    """The label in characters that every file system takes, and a hash of label and identity."""
    readable = re.sub(r"[^a-z0-9.]+", "-", method.label.lower()).strip("-")[:LONGEST_NAME]
    return f"{readable}-{short_hash([method.label, method.identity])}"


def short_hash(content: Any) -> str:
    """The first eight digits of the SHA-256 of the content as JSON; what JSON cannot hold is hashed as its text."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:8]
