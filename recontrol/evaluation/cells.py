"""Cells of an evaluation on disk, so that a run that was stopped goes on, and methods can be added to one that is done."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from recontrol.evaluation.measure import Cell
from recontrol.files import check_same_settings, read_json, remove_leftovers, write_aside, write_json
from recontrol.methods.base import Method

FORMAT = "recontrol.evaluation"
FORMAT_VERSION = 1
LONGEST_NAME = 60


class Cells:
    """A folder with one file for each cell, and one on what all of them have in common.

    Args:
        folder: made if absent.
        settings: model, prompts, rewards and sampling, ready for JSON; cells of other settings do not belong together.

    Raises:
        ValueError: the folder has cells of other settings; the first setting that differs is named.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self._names: dict[int, str] = {}
        wanted = json.loads(json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **settings}))
        path = folder / "settings.json"
        if path.exists():
            check_same_settings(read_json(path), wanted, f"{folder} has an evaluation with")
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        if not path.exists():
            write_json(path, wanted)

    def load(self, method: Method, seed: int, batch: int) -> Cell | None:
        """The cell if it is there.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(method, seed, batch)
        if not path.exists():
            return None
        try:
            return Cell.from_dict(read_json(path))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no cell of an evaluation ({error}); remove it to have it made anew") from error

    def save(self, method: Method, cell: Cell) -> None:
        """Write a cell, whole or not at all."""
        path = self._path(method, cell.seed, cell.batch)
        path.parent.mkdir(exist_ok=True)
        with write_aside(path) as aside:
            aside.write_text(json.dumps(cell.to_dict(), ensure_ascii=False) + "\n", encoding="utf-8")

    def _path(self, method: Method, seed: int, batch: int) -> Path:
        # Weights are hashed once.
        if id(method) not in self._names:
            self._names[id(method)] = folder_name(method)
        return self.folder / self._names[id(method)] / f"seed-{seed}-batch-{batch:05}.json"


def folder_name(method: Method) -> str:
    """A name for files of a method: its label as far as a file system bears it, and a hash of what it is made of."""
    readable = re.sub(r"[^a-z0-9.]+", "-", method.label.lower()).strip("-")[:LONGEST_NAME]
    return f"{readable}-{short_hash([method.label, method.identity])}"


def short_hash(content: Any) -> str:
    """Eight digits that tell contents apart; what JSON does not know counts as its text."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:8]
