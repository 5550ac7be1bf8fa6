"""The files of a rollout folder: a manifest, for each batch of prompts one shard of tensors with its lines beside it, and checksums."""

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

from recontrol.checks import dtype_name
from recontrol.data.checksums import CHECKSUMS_NAME, checksum, file_checksum, listing, read_checksums, write_checksums
from recontrol.data.storage import HEADER_NAMES, encode
from recontrol.files import check_same_settings, interrupts_wait, read_json, remove_leftovers, write_aside, write_json

FORMAT = "recontrol.rollouts"
# Version 1 had no checksums, and states in their own dtype only.
FORMAT_VERSION = 2
# Rollouts that were relabelled: the manifest names a file of rewards, which take the place of those in the lines.
RELABELLED_VERSION = 3
MANIFEST_NAME = "manifest.json"
# Known only once the first batch has been generated and scored, hence filled in by the writer.
MEASURED = ("hidden_size", "dtype", "num_heads")


def shard_path(folder: Path, number: int) -> Path:
    """The tensors of shard `number`; its lines are beside it, with the suffix `.jsonl`."""
    return folder / f"shard-{number:05d}.safetensors"


def shard_paths(folder: Path, count: int) -> list[Path]:
    """The shards that are there, of `count` in all, in order; ValueError if there are others, with numbers from `count`."""
    wanted = [shard_path(folder, number) for number in range(count)]
    others = sorted(set(folder.glob("shard-*.safetensors")) - set(wanted))
    if others:
        raise ValueError(f"{folder / MANIFEST_NAME} does not match its shards: found {others[0].name}, wanted {count} shards, numbered from 0")
    return [path for path in wanted if path.exists()]


def with_lines(shards: Sequence[Path]) -> list[str]:
    """The file names of shards and of their lines."""
    return [path.name for shard in shards for path in (shard, shard.with_suffix(".jsonl"))]


class RolloutWriter:
    """Writes a rollout folder one shard at a time, so that a kill loses at most the shard being written.

    The lines of a shard are renamed into place first, then its checksums, and its tensors last: a shard exists if and only if
    its `.safetensors` does. Hold `writing_lock` meanwhile. `manifest` is compared with that of an existing folder with shards, but for the names
    in `ignored`; what is in MEASURED is taken from the first shard. The first process sets the folder up, others join it.
    """

    def __init__(self, path: str | os.PathLike, manifest: dict[str, Any], ignored: Sequence[str] = (), storage: str | None = None, first: bool = True):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; rollouts are written into a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        # As JSON reads it back: tuples become lists.
        self.manifest: dict[str, Any] = json.loads(
            json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **dict.fromkeys(MEASURED), **manifest, "storage": storage})
        )
        if first:
            remove_leftovers(self.path)
        has_shards = any(self.path.glob("shard-*.safetensors"))
        if (self.path / MANIFEST_NAME).exists() and (has_shards or not first):
            found = read_manifest(self.path)
            check_same_settings(found, self.manifest, f"{self.path} holds rollouts with", ignored={*ignored, *MEASURED, "checksums_sha256"})
            self.manifest = found
        elif has_shards or not first:
            raise ValueError(f"{self.path} holds shards but no {MANIFEST_NAME}; use another folder")
        else:
            # Also replaces the manifest of a run that failed before its first shard: nothing goes with it.
            write_json(self.path / MANIFEST_NAME, self.manifest)

    def has(self, number: int) -> bool:
        """Whether shard `number` has been written."""
        return shard_path(self.path, number).exists()

    def write(self, number: int, states: Tensor, token_ids: Tensor, lengths: Sequence[int], records: Sequence[dict[str, Any]]) -> None:
        """Write one shard, whole or not at all: packed (tokens, hidden_size) states, the token sampled from each, the tokens of each response, and
        one record a response: index (of the prompt), prompt, response, reward (list of floats), finish.
        """
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        if len(lengths) != len(records) or min(lengths, default=1) < 1 or not len(states) == len(token_ids) == offsets[-1]:
            raise ValueError(
                f"{len(records)} records, {len(states)} states and {len(token_ids)} token ids do not go with {len(lengths)} lengths adding up to {offsets[-1]}"
            )
        encoded = encode(states.detach().cpu(), self.manifest.get("storage") or dtype_name(states.dtype))
        self._measure(encoded, records)
        tensors = {**encoded, "token_ids": token_ids.cpu().long(), "offsets": offsets}
        # Not save_file: it reports a full disk as its own kind of error, and this must be an OSError that names the file.
        self.put(number, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": FORMAT}), records)

    def put(self, number: int, content: bytes, records: Sequence[dict[str, Any]]) -> None:
        """Write one shard whose tensors are bytes already, those of a shard of other rollouts of the same kind."""
        lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records).encode()
        path = shard_path(self.path, number)
        with write_aside(path.with_suffix(".jsonl")) as aside:
            aside.write_bytes(lines)
        write_checksums(path.with_suffix(".sha256"), {path.name: checksum(content), path.with_suffix(".jsonl").name: checksum(lines)})
        with write_aside(path) as aside:
            aside.write_bytes(content)

    def finish(self) -> None:
        """Once all shards are there, by one process: join their checksums into one list, and note its checksum in the manifest."""
        shards = [shard_path(self.path, number) for number in range(self.manifest["num_shards"])]
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise ValueError(f"{self.path} is not complete: {len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}")
        # Another process may have measured what this one has not, and the other way round.
        found = read_manifest(self.path)
        self.manifest = {**found, **{name: self.manifest[name] for name in MEASURED if found[name] is None}}
        known = shard_checksums(self.path, self.manifest)
        checksums = {name: known.get(name) or file_checksum(self.path / name) for name in with_lines(shards)}
        listed = checksum(listing(checksums))
        if self.manifest.get("checksums_sha256") not in (None, listed):
            # A kill between the two files must not leave a manifest that refuses the list.
            write_json(self.path / MANIFEST_NAME, {**self.manifest, "checksums_sha256": None})
        if self.manifest.get("checksums_sha256") != listed or not (self.path / CHECKSUMS_NAME).exists():
            write_checksums(self.path / CHECKSUMS_NAME, checksums)
            self.manifest["checksums_sha256"] = listed
            write_json(self.path / MANIFEST_NAME, self.manifest)
        for shard in shards:
            shard.with_suffix(".sha256").unlink(missing_ok=True)

    def _measure(self, encoded: dict[str, Tensor], records: Sequence[dict[str, Any]]) -> None:
        """Put what the data show into the manifest, or compare it with what is there."""
        counts = {len(record["reward"]) for record in records}
        if len(counts) > 1:
            raise ValueError(f"every response must have the same number of rewards, found {sorted(counts)}")
        if any(self.manifest[name] is None for name in MEASURED):
            # Another process may have been faster.
            self.manifest.update({name: entry for name, entry in read_manifest(self.path).items() if name in MEASURED})
        states = encoded["states"]
        measured = {
            "hidden_size": states.shape[-1],
            # What states are read back as.
            "dtype": "float32" if "scales" in encoded else dtype_name(states.dtype),
            "num_heads": counts.pop() if counts else self.manifest["num_heads"],
        }
        before = {name: self.manifest[name] for name in MEASURED}
        for name, value in measured.items():
            if before[name] not in (None, value):
                raise ValueError(f"{self.path} holds rollouts with another {name}: found {before[name]!r}, wanted {value!r}")
        if before != measured:
            self.manifest.update(measured)
            write_json(self.path / MANIFEST_NAME, self.manifest)


def shard_checksums(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """The checksums known of a folder's shards, by file name: those in its list and those beside single shards.

    ValueError if a list is damaged, or is not the one that the manifest was written with.
    """
    known: dict[str, str] = {}
    if manifest.get("checksums_sha256"):
        known, found = read_checksums(folder / CHECKSUMS_NAME)
        if found != manifest["checksums_sha256"]:
            raise ValueError(
                f"{folder / MANIFEST_NAME} does not match {CHECKSUMS_NAME}: found SHA-256 {found[:12]}..., wanted {manifest['checksums_sha256'][:12]}...; "
                "one of them is of other rollouts"
            )
    for path in sorted(folder.glob("shard-*.sha256")):
        known |= read_checksums(path)[0]
    return known


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a rollout folder's manifest; ValueError if there is none, or it is damaged, foreign, or of a later format version."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is no rollout folder: {MANIFEST_NAME} is missing")
    manifest = read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if found != FORMAT:
        raise ValueError(f"{path} is not the manifest of rollouts: found format {found!r}, wanted {FORMAT!r}")
    if manifest.get("version", 0) > RELABELLED_VERSION:
        raise ValueError(f"{path} has format version {manifest['version']}, this release reads up to {RELABELLED_VERSION}; upgrade recontrol")
    missing = [name for name in (*MEASURED, "num_shards") if name not in manifest]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return manifest


def read_offsets(shard: Path, manifest: dict[str, Any]) -> Tensor:
    """Where each response of a shard starts, and the end; ValueError if its header is not that of a shard of these rollouts."""
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
        raise ValueError(f"{shard} is damaged: found {size} bytes, wanted {wanted_size}; delete it and collect again to replace it")
    tokens = layout["states"][1][0] if layout.get("states", ("", []))[1] else None
    responses = layout["offsets"][1][0] if layout.get("offsets", ("", []))[1] else None
    storage = manifest.get("storage") or manifest["dtype"]
    wanted = {"states": (HEADER_NAMES.get(storage), [tokens, manifest["hidden_size"]]), "token_ids": ("I64", [tokens]), "offsets": ("I64", [responses])}
    if storage == "int8":
        wanted["scales"] = ("F32", [tokens])
    if layout != wanted:
        raise ValueError(f"{shard} is not a shard of these rollouts: found {layout}, wanted {wanted}")
    with interrupts_wait(), safe_open(shard, "pt") as file:
        # Cloned, or the whole file would stay mapped.
        offsets = file.get_tensor("offsets").clone()
    # A batch whose responses were all empty has one offset and no token.
    if not responses or offsets[0] != 0 or offsets[-1] != tokens or (offsets.diff() < 1).any():
        raise ValueError(f"{shard} is damaged: its offsets must rise from 0 to {tokens}, found {offsets.tolist()}")
    return offsets


def read_lines(shard: Path) -> Iterator[dict[str, Any]]:
    """The lines beside a shard; ValueError if the file is missing, or a line is not JSON (for example cut in the middle)."""
    path = shard.with_suffix(".jsonl")
    yield from _parsed(path, _content(path))


def read_scores(shard: Path, responses: int, num_heads: int | None, wanted: str | None = None) -> tuple[Tensor, Tensor]:
    """From the lines beside a shard the prompt's index, (responses,), int64, and the rewards, (responses, num_heads), float32.

    `num_heads` is None where the rewards of the lines were replaced, and `wanted` the checksum of the lines, where it is known.
    ValueError if the lines are missing, damaged or changed, or are not as many.
    """
    path = shard.with_suffix(".jsonl")
    content = _content(path)
    try:
        scores = [(int(record["index"]), [float(score) for score in record["reward"]]) for record in _parsed(path, content)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the lines of a shard: every line needs an index and a list of rewards ({error!r})") from error
    if len(scores) != responses:
        raise ValueError(f"{path} and its shard disagree: found {len(scores)} lines, wanted {responses}, one a response")
    for line, (_, reward) in enumerate(scores, start=1):
        if num_heads is not None and (len(reward) != num_heads or not all(map(math.isfinite, reward))):
            raise ValueError(f"{path}, line {line}: wanted {num_heads} finite rewards, found {reward}")
    # Last, since the errors above say more.
    if wanted is not None and (found := checksum(content)) != wanted:
        raise ValueError(f"{path} has changed since it was written: found SHA-256 {found[:12]}..., wanted {wanted[:12]}...")
    indices = torch.tensor([index for index, _ in scores], dtype=torch.int64)
    heads = num_heads or 0
    return indices, torch.tensor([reward[:heads] for _, reward in scores], dtype=torch.float32).reshape(len(scores), heads)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing beside its shard") from None


def _parsed(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    try:
        # Not splitlines, which also cuts at separators that JSON leaves inside a text.
        for line in content.decode("utf-8").split("\n"):
            if line:
                yield json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
