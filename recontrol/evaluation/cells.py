"""The cells of an evaluation, in memory and on disk: a run that was stopped continues, and methods can be added to one that is done."""

import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recontrol.evaluation.measure import Answer, Cell
from recontrol.files import check_same_settings, read_json, remove_leftovers, write_aside, write_json
from recontrol.methods.base import Method

FORMAT = "recontrol.evaluation"
FORMAT_VERSION = 1
LONGEST_NAME = 60


class Cells:
    """The cells by method, seed and batch; with a folder, one file for each, and one with the settings that all have in common."""

    def __init__(self, folder: str | os.PathLike | None, settings: dict[str, Any]):
        self._folder = None if folder is None else Path(folder)
        self._cells: dict[tuple[str, int, int], Cell] = {}
        # Weights are hashed once.
        self._names: dict[str, str] = {}
        if self._folder is None:
            return
        wanted = json.loads(json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **settings}))
        path = self._folder / "settings.json"
        if path.exists():
            check_same_settings(read_json(path), wanted, f"{folder} has an evaluation with")
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)
        if not path.exists():
            write_json(path, wanted)

    def __getitem__(self, key: tuple[Method, int, int]) -> Cell:
        method, seed, batch = key
        return self._cells[method.label, seed, batch]

    def get(self, method: Method, seed: int, batch: int) -> Cell | None:
        """The cell if it is there; a damaged file is refused."""
        key = (method.label, seed, batch)
        if key not in self._cells and self._folder is not None:
            path = self._path(method, seed, batch)
            if not path.exists():
                return None
            content = read_json(path)
            try:
                self._cells[key] = Cell(**{**content, "answers": [Answer(**answer) for answer in content["answers"]]})
            except (TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} is no cell of an evaluation ({error}); remove it to have it made again") from error
        return self._cells.get(key)

    def add(self, method: Method, cell: Cell) -> None:
        """Keep a cell, and write it whole or not at all."""
        self._cells[method.label, cell.seed, cell.batch] = cell
        if self._folder is not None:
            path = self._path(method, cell.seed, cell.batch)
            path.parent.mkdir(exist_ok=True)
            with write_aside(path) as aside:
                aside.write_text(json.dumps(asdict(cell), ensure_ascii=False) + "\n", encoding="utf-8")

    def _path(self, method: Method, seed: int, batch: int) -> Path:
        if method.label not in self._names:
            self._names[method.label] = folder_name(method)
        return Path(self._folder or "") / self._names[method.label] / f"seed-{seed}-batch-{batch:05}.json"


def folder_name(method: Method) -> str:
    """The label in characters that every file system takes, and a hash of label and identity."""
    readable = re.sub(r"[^a-z0-9.]+", "-", method.label.lower()).strip("-")[:LONGEST_NAME]
    return f"{readable}-{short_hash([method.label, method.identity])}"


def short_hash(content: Any) -> str:
    """The first eight digits of the SHA-256 of the content as JSON; what JSON cannot hold is hashed as its text."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:8]
