"""Scoring the responses of rollouts again, with another reward: the hidden states stay as they are, and nothing is generated."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from recontrol.data.checksums import CHECKSUMS_NAME, checksum, write_checksums
from recontrol.data.processes import Peers
from recontrol.data.rewards import Reward, as_reward, checked_rewards, reward_name
from recontrol.data.rewards.checks import head_names, names_of_heads
from recontrol.data.rollouts import Rollouts
from recontrol.data.shards import MANIFEST_NAME, MEASURED, RELABELLED_NAME, RolloutWriter, read_lines, read_manifest, shard_checksums, shard_path
from recontrol.files import write_aside, write_json, writing_lock

logger = logging.getLogger(__name__)

# Inside the rollouts, for new lines until all of them are there.
STAGING_NAME = ".relabel"


def relabel(
    rollouts: Rollouts | str | os.PathLike,
    reward: Any,
    out: str | os.PathLike | None = None,
    *,
    add: bool = False,
    progress: bool = True,
) -> Rollouts:
    """Score stored prompts and responses again. Hidden states and tokens are neither read nor changed.

    The rewards are replaced once all of them are there: a run that was killed leaves the old ones, and the same call goes on with
    the shard it was at. A kill in the moment of the replacement leaves rollouts that will not open before the same call has
    finished it. Launched in several processes (`accelerate launch`), each scores its share of the shards.

    Args:
        rollouts: what `collect` made, or its folder.
        reward: as for `collect`; a list of rewards, or a dictionary of them by name, becomes several heads.
        out: folder for a copy with the new rewards, which shares the files of the states with the old one where the file system
            has hard links; None replaces the rewards in the folder itself.
        add: put the new rewards after the old ones, as further heads, instead of replacing them.
        progress: show a progress bar.

    Returns:
        The rollouts with the new rewards, opened. An object that was opened before keeps the old ones.

    Raises:
        TypeError: `reward` is nothing that can be called.
        ValueError: rollouts without texts, or that are not complete; a reward that returns NaN or the wrong count (the shard is
            named; the shards before it stay); with `add`, a reward that is there already; a folder with other rollouts.
        RuntimeError: another run is writing into the folder.
        OSError: the disk is full; the message names the file, and the shards before it stay.
    """
    source = rollouts.path if isinstance(rollouts, Rollouts) else Path(rollouts)
    in_place = out is None or Path(out).resolve() == source.resolve()
    # Refused before a folder is made for a lock.
    read_manifest(source)
    score = as_reward(reward)
    peers = Peers.current()
    first = peers.index == 0
    resuming = in_place and (source / RELABELLED_NAME).is_dir()
    # All have looked before the first one changes anything; it lets the others in when no other run can come between.
    peers.wait()
    if not first:
        peers.wait()
    with writing_lock(source if in_place or out is None else Path(out), first) as share:
        if first and resuming:
            _replace(source)
        if first and peers.count > 1:
            share()
            peers.wait()
        if resuming and read_manifest(source)["relabelled"][-1]["reward"] == head_names(score):
            logger.warning("finished the replacement of rewards that was interrupted in %s", source)
            return Rollouts(source)
        old = Rollouts(source)
        target = source / STAGING_NAME if in_place or out is None else Path(out)
        if not first:
            # Until the first one has set the folder up.
            peers.wait()
        writer = _writer(target, old, _settings(old, score, add), first, in_place)
        if first:
            peers.wait()
        missing = [number for number in range(old.manifest["num_shards"]) if not writer.has(number)]
        peers.wait()
        _score_shards(old, writer, missing[peers.index :: peers.count], score, add, progress and first)
        peers.wait()
        if first:
            writer.finish()
            # Everything is checked before anything is replaced.
            Rollouts(target)
            if in_place:
                target.rename(source / RELABELLED_NAME)
                _replace(source)
        peers.wait()
    return Rollouts(source if in_place or out is None else out)


def _settings(old: Rollouts, score: Reward, add: bool) -> dict[str, Any]:
    """The manifest of the rollouts with new rewards, but for what is measured."""
    if len(old) and not any(record.get("prompt") or record.get("response") for record in old.records()):
        raise ValueError(f"{old.path} has no texts to score: it was written without prompts and responses")
    kept = {name: entry for name, entry in old.manifest.items() if name not in ("format", "version", "storage", "checksums_sha256", *MEASURED)}
    before, new = names_of_heads(old.manifest.get("reward"), old.num_heads), head_names(score)
    twice = sorted(set(before) & set(new))
    if add and twice:
        raise ValueError(f"{old.path} has the reward {', '.join(twice)} already; replace the rewards, or give a dictionary with another name for it")
    step = {"reward": new, "before": before, "added": add, "checksums_before": old.manifest.get("checksums_sha256")}
    return {**kept, "reward": [*before, *new] if add else reward_name(score), "relabelled": [*kept.get("relabelled", []), step]}


def _writer(target: Path, old: Rollouts, settings: dict[str, Any], first: bool, in_place: bool) -> RolloutWriter:
    try:
        writer = RolloutWriter(target, settings, storage=old.manifest.get("storage"), first=first)
    except ValueError as error:
        hint = f"; or delete {target}, where an earlier relabelling was interrupted" if in_place else ""
        raise ValueError(f"{error}{hint}") from error
    if first and writer.manifest["hidden_size"] is None:
        writer.manifest.update(hidden_size=old.hidden_size, dtype=old.manifest["dtype"])
        write_json(target / MANIFEST_NAME, writer.manifest)
    return writer


def _score_shards(old: Rollouts, writer: RolloutWriter, numbers: list[int], score: Reward, add: bool, progress: bool) -> None:
    known = shard_checksums(old.path, old.manifest)
    total = old.manifest["num_shards"]
    try:
        with tqdm(total=total, initial=total - len(numbers), unit="shard", disable=not progress) as bar:
            for number in numbers:
                try:
                    records = _scored(shard_path(old.path, number), score, add)
                    _measure(writer, {len(record["reward"]) for record in records})
                except ValueError as error:
                    raise ValueError(f"shard {number}: {error}; the shards scored before stay in {writer.path}") from error
                _write(old, writer, number, records, known)
                bar.update()
    except KeyboardInterrupt:
        logger.warning("interrupted: %d of %d shards are in %s; the same call goes on from there", sum(map(writer.has, range(total))), total, writer.path)
        raise


def _scored(shard: Path, score: Reward, add: bool) -> list[dict[str, Any]]:
    """The lines of a shard with new rewards."""
    records = list(read_lines(shard.with_suffix(".jsonl")))
    if not records:
        return []
    table = checked_rewards(score, [record["prompt"] for record in records], [record["response"] for record in records])
    names = head_names(score)
    if add and table.shape[1] != len(names):
        raise ValueError(f"the reward {names[0]} returned {table.shape[1]} scores a response; to be added it must return one, or name them in head_names")
    before: list[list[float]] = [record["reward"] if add else [] for record in records]
    return [{**record, "reward": [*kept, *row]} for record, kept, row in zip(records, before, table.tolist(), strict=True)]


def _measure(writer: RolloutWriter, counts: set[int]) -> None:
    """Note how many rewards there are, or compare it with the shards before."""
    if not counts:
        return
    # Another process may have been faster.
    found = read_manifest(writer.path)["num_heads"]
    if found is None:
        writer.manifest["num_heads"] = counts.pop()
        write_json(writer.path / MANIFEST_NAME, writer.manifest)
    elif {found} != counts:
        raise ValueError(f"the reward returned {counts.pop()} scores a response, and {found} for the shards before")


def _write(old: Rollouts, writer: RolloutWriter, number: int, records: list[dict[str, Any]], known: dict[str, str]) -> None:
    """New lines, their checksums, and last the tensors, which say that the shard is there."""
    shard, target = shard_path(old.path, number), shard_path(writer.path, number)
    content = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records).encode()
    lines = target.with_suffix(".jsonl")
    with write_aside(lines) as aside:
        aside.write_bytes(content)
    write_checksums(target.with_suffix(".sha256"), {lines.name: checksum(content)} | ({shard.name: known[shard.name]} if shard.name in known else {}))
    try:
        os.link(shard, target)
    except OSError:
        # No hard links here. Inside the folder itself a symbolic one will do for as long as it is needed.
        if writer.path.parent == old.path and writer.path.name == STAGING_NAME:
            target.symlink_to(Path("..") / shard.name)
        else:
            with write_aside(target) as aside:
                shutil.copyfile(shard, aside)


def _replace(folder: Path) -> None:
    """Put the new lines, all of which are there, in place of the old ones; after a kill, what is left of them."""
    new = folder / RELABELLED_NAME
    # Those of single shards would be taken for those of the new lines.
    for path in folder.glob("shard-*.sha256"):
        path.unlink()
    for path in [*sorted(new.glob("shard-*.jsonl")), new / CHECKSUMS_NAME, new / MANIFEST_NAME]:
        if path.exists():
            os.replace(path, folder / path.name)
    shutil.rmtree(new)
