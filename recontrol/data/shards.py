"""The files of a rollout folder: a manifest, and for each batch of prompts one shard of tensors with its lines beside it."""

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from recontrol.files import read_json, remove_leftovers, write_aside, write_json

FORMAT = "recontrol.rollouts"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
# Known only once the first batch has been generated and scored, hence filled in by the writer.
MEASURED = ("hidden_size", "dtype", "num_heads")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def shard_path(folder: Path, number: int) -> Path:
    """The tensors of shard `number`; its lines are beside it, with the suffix `.jsonl`."""
    return folder / f"shard-{number:05d}.safetensors"


class RolloutWriter:
    """Writes a rollout folder one shard at a time, so that a kill loses at most the shard being written.

    The lines of a shard are renamed into place first and its tensors last: a shard exists if and only if its
    `.safetensors` does.

    Args:
        path: the folder, made if absent; temporary files of dead processes in it are removed.
        manifest: the settings, compared with those of an existing folder; `hidden_size`, `dtype` and `num_heads` are
            taken from the first shard.
        ignored: names in `manifest` that may differ from those of an existing folder.

    Raises:
        OSError: the folder cannot be made.
        ValueError: the folder holds rollouts with other settings; the setting is named, with what was found and wanted.
    """

    def __init__(self, path: str | os.PathLike, manifest: dict[str, Any], ignored: Sequence[str] = ()):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; rollouts are written into a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        # As it will read back: tuples become lists.
        self.manifest: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **manifest}))
        if (self.path / MANIFEST_NAME).exists():
            found = read_manifest(self.path)
            for name in sorted((self.manifest.keys() | found.keys()) - {*ignored, *MEASURED}):
                if found.get(name) != self.manifest.get(name):
                    raise ValueError(
                        f"{self.path} holds rollouts with another {name}: found {found.get(name)!r}, wanted {self.manifest.get(name)!r}; "
                        "use the same settings to go on with it, or another folder"
                    )
            self.manifest = found
        elif any(self.path.glob("shard-*.safetensors")):
            raise ValueError(f"{self.path} holds shards but no {MANIFEST_NAME}; use another folder")

    def has(self, number: int) -> bool:
        """Whether shard `number` has been written."""
        return shard_path(self.path, number).exists()

    def write(self, number: int, states: Tensor, token_ids: Tensor, lengths: Sequence[int], records: Sequence[dict[str, Any]]) -> None:
        """Write one shard, whole or not at all. Responses are packed one after the other, without padding.

        Args:
            number: which shard.
            states: (tokens, hidden_size), floating point; row t is the state whose logits sampled token t.
            token_ids: (tokens,), int64; entry t is the token sampled from row t.
            lengths: tokens of each response, at least 1 each, adding up to `tokens`.
            records: one dict a response: index (of the prompt), prompt, response, reward (list of floats), finish.

        Raises:
            OSError: the disk is full or the folder cannot be written; the message names the file.
            ValueError: lengths that do not add up, or a width, dtype or number of rewards other than the shards before.
        """
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        if len(lengths) != len(records) or min(lengths, default=1) < 1 or not len(states) == len(token_ids) == offsets[-1]:
            raise ValueError(
                f"{len(records)} records, {len(states)} states and {len(token_ids)} token ids do not go with {len(lengths)} lengths adding up to {offsets[-1]}"
            )
        self._measure(states, records)
        lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        tensors = {"states": states.detach().cpu().contiguous(), "token_ids": token_ids.cpu().long(), "offsets": offsets}
        path = shard_path(self.path, number)
        with write_aside(path.with_suffix(".jsonl")) as aside:
            aside.write_text(lines, encoding="utf-8")
        # Not save_file: it reports a full disk as its own kind of error, and this must be an OSError that names the file.
        with write_aside(path) as aside:
            aside.write_bytes(save(tensors, metadata={"format": FORMAT}))

    def _measure(self, states: Tensor, records: Sequence[dict[str, Any]]) -> None:
        """Put what the data show into the manifest, or compare it with what is there."""
        measured = dict(zip(MEASURED, (states.shape[-1], str(states.dtype).removeprefix("torch."), None), strict=True))
        counts = {len(record["reward"]) for record in records}
        if len(counts) > 1:
            raise ValueError(f"every response must have the same number of rewards, found {sorted(counts)}")
        measured["num_heads"] = counts.pop() if counts else self.manifest.get("num_heads")
        before = {name: self.manifest.get(name) for name in MEASURED}
        for name, value in measured.items():
            if before[name] not in (None, value):
                raise ValueError(f"{self.path} holds rollouts with another {name}: found {before[name]!r}, wanted {value!r}")
        if before != measured:
            self.manifest.update(measured)
            write_json(self.path / MANIFEST_NAME, self.manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a rollout folder's manifest.

    Raises:
        ValueError: there is none, or it is damaged, foreign, or of a later format version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is no rollout folder: {MANIFEST_NAME} is missing")
    manifest = read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if found != FORMAT:
        raise ValueError(f"{path} is not the manifest of rollouts: found format {found!r}, wanted {FORMAT!r}")
    if manifest.get("version", 0) > FORMAT_VERSION:
        raise ValueError(f"{path} has format version {manifest['version']}, this release reads up to {FORMAT_VERSION}; upgrade recontrol")
    missing = [name for name in (*MEASURED, "num_shards") if name not in manifest]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return manifest


def read_offsets(shard: Path, manifest: dict[str, Any]) -> Tensor:
    """Check a shard's length, names, shapes and dtypes from its header, and return where each response starts, and the end.

    Raises:
        ValueError: the shard is cut in the middle, or is no shard of the rollouts that `manifest` describes.
    """
    size = shard.stat().st_size
    try:
        with shard.open("rb") as file:
            header_size = struct.unpack("<Q", file.read(8))[0]
            # A foreign file's first eight bytes may ask for any amount.
            header = json.loads(file.read(header_size)) if header_size <= size - 8 else {}
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        wanted_size = 8 + header_size + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        layout = {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}
    except (struct.error, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{shard} is not a shard of rollouts: its header cannot be read ({error})") from error
    if size != wanted_size:
        raise ValueError(f"{shard} is damaged: found {size} bytes, wanted {wanted_size}; delete it and collect again to make it anew")
    tokens = layout["states"][1][0] if layout.get("states", ("", []))[1] else None
    responses = layout["offsets"][1][0] if layout.get("offsets", ("", []))[1] else None
    dtype = next((name for name, kind in DTYPES.items() if str(kind) == f"torch.{manifest['dtype']}"), None)
    wanted = {"states": (dtype, [tokens, manifest["hidden_size"]]), "token_ids": ("I64", [tokens]), "offsets": ("I64", [responses])}
    if layout != wanted:
        raise ValueError(f"{shard} is not a shard of these rollouts: found {layout}, wanted {wanted}")
    with safe_open(shard, "pt") as file:
        # Cloned, or the whole file would stay mapped.
        offsets = file.get_tensor("offsets").clone()
    # A batch whose responses were all empty has one offset and no token.
    if not responses or offsets[0] != 0 or offsets[-1] != tokens or (offsets.diff() < 1).any():
        raise ValueError(f"{shard} is damaged: its offsets must rise from 0 to {tokens}, found {offsets.tolist()}")
    return offsets


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines beside a shard.

    Raises:
        ValueError: the file is missing, or a line is not JSON (for example cut in the middle).
    """
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing beside its shard") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_scores(shard: Path, responses: int, num_heads: int) -> list[tuple[int, list[float]]]:
    """The prompt's index and the rewards of each line beside a shard.

    Raises:
        ValueError: the lines are damaged, or their number is not `responses`.
    """
    path = shard.with_suffix(".jsonl")
    try:
        scores = [(int(record["index"]), [float(score) for score in record["reward"]]) for record in read_lines(path)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the lines of a shard: every line needs an index and a list of rewards ({error!r})") from error
    if len(scores) != responses:
        raise ValueError(f"{path} and its shard disagree: found {len(scores)} lines, wanted {responses}, one a response")
    for line, (_, reward) in enumerate(scores, start=1):
        if len(reward) != num_heads or not all(map(math.isfinite, reward)):
            raise ValueError(f"{path}, line {line}: wanted {num_heads} finite rewards, found {reward}")
    return scores
