"""The files of a rollout folder: a manifest, for each batch one shard of tensors with its lines, checksums as `sha256sum` writes them, and new rewards."""

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from recontrol.checks import dtype_name
from recontrol.data.identity import unknown
from recontrol.files import check_same_settings, interrupts_wait, read_json, remove_leftovers, write_aside, write_json

FORMAT, REWARDS_FORMAT = "recontrol.rollouts", "recontrol.rewards"
# Version 1 had no checksums, and states in their own dtype only.
FORMAT_VERSION = 2
# Rollouts that were relabelled: the manifest names a file of rewards, which take the place of those in the lines.
RELABELLED_VERSION = 3
MANIFEST_NAME, CHECKSUMS_NAME = "manifest.json", "checksums.sha256"
LINE = re.compile(r"([0-9a-f]{64})  (shard-\d+\.(?:safetensors|jsonl))")
# Known only once the first batch has been generated and scored, hence filled in by the writer.
MEASURED = ("hidden_size", "dtype", "num_heads")
# What a header of safetensors calls the dtype of stored states.
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int8": "I8"}


def check_storage(storage: str | None) -> None:
    """Refuse an unknown storage with a ValueError; None is the dtype of the states themselves."""
    if storage is not None and storage not in STORED:
        raise ValueError(f"unknown storage {storage!r}; choose one of {', '.join(map(repr, STORED))}, or None for the model's own dtype")


def encode(states: Tensor, storage: str) -> dict[str, Tensor]:
    """What to write for (tokens, hidden_size) states; "int8" keeps q_ti = round(h_ti / s_t) and `scales` s_t = max_i |h_ti| / 127, (tokens,), float32."""
    finite = states.isfinite().all()
    if storage != "int8":
        encoded = states.to(getattr(torch, storage))
        if finite and not encoded.isfinite().all():
            raise ValueError(f"hidden states up to {float(states.abs().max()):.4g} do not fit into {storage}; use another storage")
        return {"states": encoded}
    if not finite:
        raise ValueError("hidden states must be finite to be stored in 8 bits, found NaN or infinite ones")
    exact = states.float()
    scales = exact.abs().amax(1) / 127
    # A state of zeros has no scale.
    steps = exact / torch.where(scales > 0, scales, 1)[:, None]
    return {"states": steps.round().clamp(-127, 127).to(torch.int8), "scales": scales}


def decode(states: Tensor, scales: Tensor | None) -> Tensor:
    """What `encode` made as states again: those of "int8" as float32, others as they were written."""
    return states if scales is None else states.float() * scales[:, None]


def checksum(content: bytes | Path) -> str:
    """SHA-256 of some bytes, or of a file, which is read in pieces."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_bytes(content)


def read_checksums(path: Path) -> tuple[dict[str, str], str]:
    """Checksums by file name, and the checksum of the list itself; ValueError if it is missing or damaged."""
    content = _bytes(path)
    lines = content.decode(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not LINE.fullmatch(line):
            raise ValueError(f"{path}, line {number}: wanted a checksum and the name of a shard, found {line[:100]!r}")
    return {line[66:]: line[:64] for line in lines}, checksum(content)


def shard_checksums(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """The checksums known of a folder's shards, by file name; ValueError if a list is damaged, or not the one that the manifest goes with."""
    known: dict[str, str] = {}
    if manifest.get("checksums_sha256"):
        known, found = read_checksums(folder / CHECKSUMS_NAME)
        check_unchanged(f"{folder / MANIFEST_NAME} does not match {CHECKSUMS_NAME}", found, manifest["checksums_sha256"])
    for path in sorted(folder.glob("shard-*.sha256")):
        known |= read_checksums(path)[0]
    return known


def check_unchanged(what: str, found: str, wanted: str | None) -> None:
    """Refuse a checksum that is not the one recorded, where there is one, with a ValueError that begins with `what`."""
    if wanted is not None and found != wanted:
        raise ValueError(f"{what}: found SHA-256 {found[:12]}..., wanted {wanted[:12]}...")


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
    """Writes a rollout folder one shard at a time: its tensors last, so that it exists if and only if they do. Hold `writing_lock` meanwhile."""

    def __init__(self, path: str | os.PathLike, manifest: dict[str, Any], ignored: Collection[str] = (), storage: str | None = None, first: bool = True):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        # As JSON reads it back: tuples become lists.
        settings = {"format": FORMAT, "version": FORMAT_VERSION, **dict.fromkeys(MEASURED), **manifest, "storage": storage}
        self.manifest: dict[str, Any] = json.loads(json.dumps(settings))
        if first:
            remove_leftovers(self.path)
        has_shards = any(self.path.glob("shard-*.safetensors"))
        if (self.path / MANIFEST_NAME).exists() and (has_shards or not first):
            found = read_manifest(self.path)
            ignored = {*ignored, *MEASURED, "checksums_sha256", *unknown(found, "reward_sha256")}
            check_same_settings(found, self.manifest, f"{self.path} holds rollouts with", ignored=ignored)
            self.manifest = found
        elif has_shards or not first:
            raise ValueError(f"{self.path} holds shards but no {MANIFEST_NAME}; use another folder")
        else:
            # Also replaces the manifest of a run that failed before its first shard: nothing goes with it.
            self._update({})

    def has(self, number: int) -> bool:
        """Whether shard `number` has been written."""
        return shard_path(self.path, number).exists()

    def write(self, number: int, states: Tensor, token_ids: Tensor, lengths: Sequence[int], records: Sequence[dict[str, Any]]) -> None:
        """Write one shard, whole or not at all; the arguments are as in `ScoredResponses`."""
        offsets = torch.tensor([0, *lengths], device="cpu").cumsum(0)
        if len(lengths) != len(records) or min(lengths, default=1) < 1 or not len(states) == len(token_ids) == offsets[-1]:
            raise ValueError(f"{len(records)} records, {len(states)} states and {len(token_ids)} token ids do not go with the lengths {lengths}")
        encoded = encode(states.detach().cpu(), self.manifest.get("storage") or dtype_name(states.dtype))
        self._measure(encoded, records)
        tensors = {**encoded, "token_ids": token_ids.cpu().long(), "offsets": offsets}
        # Not save_file: it reports a full disk as its own kind of error, and this must be an OSError that names the file.
        self.put(number, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": FORMAT}), records)

    def put(self, number: int, content: bytes, records: Sequence[dict[str, Any]]) -> None:
        """Write one shard whose tensors are bytes already, those of a shard of other rollouts of the same kind."""
        lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records).encode()
        path = shard_path(self.path, number)
        write_bytes(path.with_suffix(".jsonl"), lines)
        write_bytes(path.with_suffix(".sha256"), _listing({path.name: checksum(content), path.with_suffix(".jsonl").name: checksum(lines)}))
        write_bytes(path, content)

    def finish(self) -> None:
        """Once all shards are there, by one process: join their checksums into one list, and note its checksum in the manifest."""
        total = self.manifest["num_shards"]
        shards = [shard_path(self.path, number) for number in range(total)]
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise ValueError(f"{self.path} is not complete: {len(missing)} of {total} shards are missing, the first is {missing[0]}")
        # Another process may have measured what this one has not, and the other way round.
        found = read_manifest(self.path)
        self.manifest = {**found, **{name: self.manifest[name] for name in MEASURED if found[name] is None}}
        known = shard_checksums(self.path, self.manifest)
        listing = _listing({name: known.get(name) or checksum(self.path / name) for name in with_lines(shards)})
        listed = checksum(listing)
        if self.manifest.get("checksums_sha256") != listed or not (self.path / CHECKSUMS_NAME).exists():
            # A kill between the two files must not leave a manifest that refuses the list.
            self._update({"checksums_sha256": None})
            write_bytes(self.path / CHECKSUMS_NAME, listing)
            self._update({"checksums_sha256": listed})
        for shard in shards:
            shard.with_suffix(".sha256").unlink(missing_ok=True)

    def _update(self, entries: dict[str, Any]) -> None:
        self.manifest.update(entries)
        write_json(self.path / MANIFEST_NAME, self.manifest)

    def _measure(self, encoded: dict[str, Tensor], records: Sequence[dict[str, Any]]) -> None:
        """Put what the data show into the manifest, or compare it with what is there."""
        if any(self.manifest[name] is None for name in MEASURED):
            self.manifest.update({name: entry for name, entry in read_manifest(self.path).items() if name in MEASURED})
        states = encoded["states"]
        dtype = "float32" if "scales" in encoded else dtype_name(states.dtype)
        measured = {"hidden_size": states.shape[-1], "dtype": dtype, "num_heads": len(records[0]["reward"]) if records else self.manifest["num_heads"]}
        for name, value in measured.items():
            if self.manifest[name] not in (None, value):
                raise ValueError(f"{self.path} holds rollouts with another {name}: found {self.manifest[name]!r}, wanted {value!r}")
        if any(self.manifest[name] != value for name, value in measured.items()):
            self._update(measured)


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
    try:
        with interrupts_wait(), safe_open(shard, "pt") as file:
            layout = {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            # Cloned, or the whole file would stay mapped.
            offsets = file.get_tensor("offsets").clone() if "offsets" in layout else torch.zeros(1, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{shard} is damaged or not a shard of rollouts ({error}); delete it and collect again to replace it") from error
    tokens = layout["states"][1][0] if layout.get("states", ("", []))[1] else None
    storage = manifest.get("storage") or manifest["dtype"]
    wanted = {"states": (STORED.get(storage), [tokens, manifest["hidden_size"]]), "token_ids": ("I64", [tokens]), "offsets": ("I64", [offsets.numel()])}
    if storage == "int8":
        wanted["scales"] = ("F32", [tokens])
    # A batch whose responses were all empty has one offset and no token.
    if layout != wanted or not len(offsets) or offsets[0] != 0 or offsets[-1] != tokens or (offsets.diff() < 1).any():
        raise ValueError(f"{shard} is not a shard of these rollouts: found {layout}, wanted {wanted}, and offsets that rise from 0 to the number of tokens")
    return offsets


def read_lines(shard: Path) -> list[dict[str, Any]]:
    """The lines beside a shard; ValueError if the file is missing, or a line is not JSON (for example cut in the middle)."""
    path = shard.with_suffix(".jsonl")
    try:
        # Not splitlines, which also cuts at separators that JSON leaves inside a text.
        return [json.loads(line) for line in _bytes(path).decode("utf-8").split("\n") if line]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_scores(shard: Path, responses: int, num_heads: int | None, wanted: str | None = None) -> tuple[Tensor, Tensor]:
    """Indices of prompts, (responses,), int64, and rewards, (responses, num_heads), float32, of a shard; `num_heads` None if they were replaced."""
    path, records = shard.with_suffix(".jsonl"), read_lines(shard)
    if len(records) != responses:
        raise ValueError(f"{path} and its shard disagree: found {len(records)} lines, wanted {responses}, one a response")
    for line, record in enumerate(records, start=1):
        rewards = record.get("reward") if num_heads is not None else [0.0]
        rewards = rewards if isinstance(rewards, list) else [rewards]
        finite = all(isinstance(reward, int | float) and math.isfinite(reward) for reward in rewards)
        if not finite or len(rewards) != (num_heads or 1) or not isinstance(record.get("index"), int):
            raise ValueError(f"{path}, line {line}: wanted {num_heads} finite rewards and the index of the prompt, found {rewards} and {record.get('index')}")
    check_unchanged(f"{path} has changed since it was written", checksum(path), wanted)
    indices = torch.tensor([record["index"] for record in records], dtype=torch.int64, device="cpu")
    heads = num_heads or 0
    return indices, torch.tensor([record["reward"][:heads] for record in records], dtype=torch.float32, device="cpu").reshape(len(records), heads)


def write_rewards(folder: Path, manifest: dict[str, Any], rewards: Tensor) -> None:
    """Write (responses, num_heads) rewards, and then the manifest that names them: readers see the old rewards or the new ones, never a mixture."""
    name = f"rewards-{len(manifest['relabelled'])}.safetensors"
    content = save({"rewards": rewards.contiguous()}, metadata={"format": REWARDS_FORMAT})
    write_bytes(folder / name, content)
    entry = {"file": name, "sha256": checksum(content)}
    write_json(folder / MANIFEST_NAME, {**manifest, "version": RELABELLED_VERSION, "num_heads": rewards.shape[1], "rewards": entry})
    for path in folder.glob("rewards-*.safetensors"):
        if path.name != name:
            path.unlink()


def read_rewards(folder: Path, manifest: dict[str, Any]) -> Tensor | None:
    """The rewards that take the place of those in the lines, (responses, num_heads), float32; None if the lines have them."""
    entry = manifest.get("rewards")
    if entry is None:
        return None
    path = folder / entry["file"]
    if not path.is_file():
        raise ValueError(f"{path} is missing: the manifest names it as the rewards")
    content = path.read_bytes()
    check_unchanged(f"{path} has changed since it was written", checksum(content), entry["sha256"])
    rewards = load(content)["rewards"]
    if rewards.ndim != 2 or rewards.shape[1] != manifest["num_heads"] or not rewards.isfinite().all():
        raise ValueError(f"{path}: wanted {manifest['num_heads']} finite rewards a response, found a table of shape {tuple(rewards.shape)}")
    return rewards


def _listing(checksums: Mapping[str, str]) -> bytes:
    return "".join(f"{checksums[name]}  {name}\n" for name in sorted(checksums)).encode()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
