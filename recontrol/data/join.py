"""Several rollout folders made one, for example those of machines that share no disk."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recontrol.data.checksums import checksum
from recontrol.data.rollouts import Rollouts
from recontrol.data.shards import MEASURED, RolloutWriter
from recontrol.decoding.fingerprint import fingerprint_hash
from recontrol.files import writing_lock

# What all folders must have in common.
SAME = (*MEASURED, "storage", "tokenizer_sha256", "reward")


def join_rollouts(folders: Sequence[str | os.PathLike], out: str | os.PathLike) -> Rollouts:
    """Copy the shards of several folders into one. Responses to equal prompts become one group, whichever folder they are from.

    The same call goes on with a copy that was interrupted. Every file is compared with its checksum on the way.

    Args:
        folders: complete rollout folders, at least one.
        out: the folder to write.

    Returns:
        The joined rollouts, opened.

    Raises:
        ValueError: no folder, one that is not complete or damaged, or folders that disagree: in the language model, its tokenizer, the width
            or dtype of the states, how they are stored, or the rewards. What disagrees is named, with what each folder has.
        RuntimeError: another run is writing into `out`.
        OSError: the disk is full; the message names the file.
    """
    if not folders:
        raise ValueError("there are no folders to join")
    opened = [Rollouts(folder) for folder in folders]
    for other in opened[1:]:
        _compare(opened[0], other)
    first = opened[0].manifest
    shards = [(place, number) for place, rollouts in enumerate(opened) for number in range(len(rollouts.shards))]
    manifest: dict[str, Any] = {
        "base_model": first.get("base_model"),
        **{name: first[name] for name in ("model_dtype", "tokenizer", "tokenizer_sha256", "reward") if name in first},
        **{name: first[name] for name in MEASURED},
        "joined": [{name: entry for name, entry in rollouts.manifest.items() if name != "base_model"} for rollouts in opened],
        "num_prompts": sum(rollouts.manifest.get("num_prompts") or 0 for rollouts in opened),
        "num_shards": len(shards),
    }
    # Numbers of the groups by the text of the prompt; where texts were not kept, by folder and number there.
    groups: dict[Any, int] = {}
    with writing_lock(Path(out)):
        writer = RolloutWriter(out, manifest, storage=first.get("storage"))
        for number, (place, shard_number) in enumerate(shards):
            records = [
                {**record, "index": groups.setdefault(record.get("prompt") or (place, record["index"]), len(groups))}
                for record in opened[place].shard_records(shard_number)
            ]
            if writer.has(number):
                continue
            shard = opened[place].shards[shard_number]
            content = shard.read_bytes()
            wanted = opened[place].checksums.get(shard.name)
            if wanted is not None and checksum(content) != wanted:
                raise ValueError(f"{shard} is not what was written: its checksum differs from the one recorded")
            writer.put(number, content, records)
        writer.finish()
    return Rollouts(out)


def _compare(first: Rollouts, other: Rollouts) -> None:
    """Refuse folders that do not go together."""
    for name in SAME:
        entries = [rollouts.manifest.get(name) for rollouts in (first, other)]
        if entries[0] != entries[1]:
            raise ValueError(f"{first.path} and {other.path} disagree in {name}: found {entries[0]!r} and {entries[1]!r}")
    models = [rollouts.manifest.get("base_model") or {} for rollouts in (first, other)]
    if fingerprint_hash(models[0]) != fingerprint_hash(models[1]):
        raise ValueError(f"{first.path} and {other.path} hold states of different language models: {models[0].get('name')!r} and {models[1].get('name')!r}")
