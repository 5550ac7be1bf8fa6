"""Several rollout folders made one, for example those of machines that share no disk."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recontrol.data.rollouts import Rollouts
from recontrol.data.shards import MEASURED, RolloutWriter, check_unchanged, checksum
from recontrol.decoding.fingerprint import fingerprint_hash
from recontrol.files import writing_lock

# What all folders must have in common, besides the language model.
SAME = (*MEASURED, "storage", "tokenizer_sha256", "reward")


def join_rollouts(folders: Sequence[str | os.PathLike], out: str | os.PathLike) -> Rollouts:
    """Copy the shards of several folders into one, compare them with their checksums on the way, and open it; the same call resumes an interrupted copy.

    Args:
        folders: complete rollout folders, at least one; responses to equal prompts become one group, whichever folder they are from.
        out: the folder to write.

    Raises ValueError: no folder, one that is not complete or damaged, or folders that disagree in model, tokenizer, states, storage or rewards.
    """
    if not folders:
        raise ValueError("there are no folders to join")
    opened = [Rollouts(folder) for folder in folders]
    first = opened[0].manifest
    for other in opened[1:]:
        where = f"{opened[0].path} and {other.path}"
        for name in SAME:
            if first.get(name) != other.manifest.get(name):
                raise ValueError(f"{where} disagree in {name}: found {first.get(name)!r} and {other.manifest.get(name)!r}")
        models = [manifest.get("base_model") or {} for manifest in (first, other.manifest)]
        if fingerprint_hash(models[0]) != fingerprint_hash(models[1]):
            raise ValueError(f"{where} hold states of different language models: {models[0].get('name')!r} and {models[1].get('name')!r}")
    shards = [(place, number) for place, rollouts in enumerate(opened) for number in range(len(rollouts.shards))]
    manifest: dict[str, Any] = {"base_model": first.get("base_model")}
    manifest |= {name: first[name] for name in ("model_dtype", "tokenizer", "tokenizer_sha256", "reward", *MEASURED) if name in first}
    manifest["joined"] = [{name: entry for name, entry in rollouts.manifest.items() if name != "base_model"} for rollouts in opened]
    manifest |= {"num_prompts": sum(rollouts.manifest.get("num_prompts") or 0 for rollouts in opened), "num_shards": len(shards)}
    # Numbers of the groups by the text of the prompt; where texts were not kept, by folder and number there.
    groups: dict[Any, int] = {}
    with writing_lock(Path(out)):
        writer = RolloutWriter(out, manifest, storage=first.get("storage"))
        for number, (place, shard_number) in enumerate(shards):
            records = [
                {**record, "index": groups.setdefault(record.get("prompt") or (place, record["index"]), len(groups))}
                for record in opened[place].shard_records(shard_number)
            ]
            if not writer.has(number):
                shard = opened[place].shards[shard_number]
                content = shard.read_bytes()
                check_unchanged(f"{shard} is not what was written", checksum(content), opened[place].checksums.get(shard.name))
                writer.put(number, content, records)
        writer.finish()
    return Rollouts(out)
