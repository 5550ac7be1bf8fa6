"""Scoring the responses of rollouts again, with another reward: the hidden states stay as they are, and nothing is generated."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from recontrol.data.checksums import CHECKSUMS_NAME
from recontrol.data.processes import Peers, writing_together
from recontrol.data.reward_files import write_rewards
from recontrol.data.rewards import Reward, as_reward, checked_rewards, reward_name
from recontrol.data.rewards.checks import head_names, names_of_heads
from recontrol.data.rollouts import Rollouts
from recontrol.data.settings import texts_checksum
from recontrol.data.shards import MANIFEST_NAME, read_lines, read_manifest, shard_path, with_lines
from recontrol.files import check_same_settings, read_json, remove_leftovers, write_aside, write_json

logger = logging.getLogger(__name__)

# Inside the folder, until all shards are scored: the new rewards of each shard, by the rewards they are.
SCORES_NAME = ".scores"


def relabel(
    rollouts: Rollouts | str | os.PathLike,
    reward: Any,
    out: str | os.PathLike | None = None,
    *,
    add: bool = False,
    progress: bool = True,
) -> Rollouts:
    """Score stored prompts and responses again. Hidden states and tokens are neither read nor changed.

    The new rewards are written to one file beside the shards, once all of them are there, and replace those in the lines. A run that was
    killed leaves the old rewards, or no rollouts in `out`, and the same call resumes with the shards that it had not scored.
    Launched in several processes (`accelerate launch`), each scores its share of the shards.

    Args:
        rollouts: what `collect` made, or its folder.
        reward: as for `collect`; a list of rewards, or a dictionary of them by name, becomes several heads.
        out: folder for a copy with the new rewards, which shares the files of the shards with the old one where the file system
            has hard links; None replaces the rewards in the folder itself.
        add: put the new rewards after the old ones, as further heads, instead of replacing them.
        progress: show a progress bar.

    Returns:
        The rollouts with the new rewards, opened. An object that was opened before keeps the old ones.

    Raises:
        TypeError: `reward` is not callable.
        ValueError: rollouts without texts, or that are not complete; a reward that returns NaN or the wrong count (the shard is
            named; the shards before it stay); with `add`, a reward that is there already; a folder with other rollouts.
        RuntimeError: another run is writing into the folder.
        OSError: the disk is full; the message names the file, and the shards before it stay.
    """
    source = rollouts.path if isinstance(rollouts, Rollouts) else Path(rollouts)
    target = source if out is None or Path(out).resolve() == source.resolve() else Path(out)
    # Checked before a folder is made for a lock.
    read_manifest(source)
    score = as_reward(reward)
    with writing_together(target, lambda first: _set_up(source, target, score, add)) as (peers, work):
        if work is not None:
            old, manifest = work
            # Scores of another reward, or in another place of the list of relabellings, are not mixed in.
            scores = target / SCORES_NAME / texts_checksum([manifest["reward"], manifest["relabelled"]])[:16]
            _score_shards(old, scores, score, add, peers, progress)
            if peers.first:
                _finish(old, target, scores, manifest, add)
        peers.wait()
    return Rollouts(target)


def _set_up(source: Path, target: Path, score: Reward, add: bool) -> tuple[Rollouts, dict[str, Any]] | None:
    """The rollouts to score and their new manifest; None if the copy was finished before."""
    old = Rollouts(source)
    manifest = _new_manifest(old, score, add)
    return None if target != source and _is_same_copy(target, manifest) else (old, manifest)


def _is_same_copy(target: Path, manifest: dict[str, Any]) -> bool:
    """Whether the copy was finished before, by this release or by an earlier one; ValueError if the folder holds other rollouts."""
    if not (target / MANIFEST_NAME).exists():
        return False
    ignored = {"version", "rewards", "checksums_sha256", "num_heads"}
    check_same_settings(read_manifest(target), manifest, f"{target} holds rollouts with", ignored=ignored)
    return all(shard_path(target, number).exists() for number in range(manifest["num_shards"]))


def _new_manifest(old: Rollouts, score: Reward, add: bool) -> dict[str, Any]:
    """The manifest of the rollouts with new rewards, but for their number and file."""
    if len(old) and not any(record.get("prompt") or record.get("response") for record in old.records()):
        raise ValueError(f"{old.path} has no texts to score: it was written without prompts and responses")
    before, new = names_of_heads(old.manifest.get("reward"), old.num_heads), head_names(score)
    twice = sorted(set(before) & set(new))
    if add and twice:
        raise ValueError(f"{old.path} has the reward {', '.join(twice)} already; replace the rewards, or give a dictionary with another name for it")
    step = {"reward": new, "before": before, "added": add, "checksums_before": old.manifest.get("checksums_sha256")}
    return {**old.manifest, "reward": [*before, *new] if add else reward_name(score), "relabelled": [*old.manifest.get("relabelled", []), step]}


def _scores_path(scores: Path, number: int) -> Path:
    return scores / f"shard-{number:05d}.json"


def _score_shards(old: Rollouts, scores: Path, score: Reward, add: bool, peers: Peers, progress: bool) -> None:
    """Score this process's share of the shards that have no scores yet; return when all processes have."""
    scores.mkdir(parents=True, exist_ok=True)
    total = len(old.shards)
    missing = [number for number in range(total) if not _scores_path(scores, number).exists()]
    # Nobody may write before all have counted.
    peers.wait()
    share = missing[peers.index :: peers.count]
    heads = next((len(rows[0]) for number in range(total) if number not in missing and (rows := read_json(_scores_path(scores, number)))), None)
    try:
        with tqdm(total=total, initial=total - len(share), unit="shard", disable=not progress or not peers.first) as bar:
            for number in share:
                try:
                    rows = _scored(old.shards[number], score, add)
                    if rows and heads not in (None, len(rows[0])):
                        raise ValueError(f"the reward returned {len(rows[0])} scores a response, and {heads} for the shards before")
                except ValueError as error:
                    raise ValueError(f"shard {number}: {error}; the shards scored before stay in {scores}") from error
                heads = len(rows[0]) if rows else heads
                write_json(_scores_path(scores, number), rows)
                bar.update()
    except KeyboardInterrupt:
        kept = sum(_scores_path(scores, number).exists() for number in range(total))
        logger.warning("interrupted: %d of %d shards are in %s; the same call goes on from there", kept, total, scores)
        raise
    peers.wait()


def _scored(shard: Path, score: Reward, add: bool) -> list[list[float]]:
    """The new rewards of the responses of a shard."""
    records = list(read_lines(shard))
    if not records:
        return []
    table = checked_rewards(score, [record["prompt"] for record in records], [record["response"] for record in records])
    names = head_names(score)
    if add and table.shape[1] != len(names):
        raise ValueError(f"the reward {names[0]} returned {table.shape[1]} scores a response; to be added it must return one, or name them in head_names")
    return table.tolist()


def _finish(old: Rollouts, target: Path, scores: Path, manifest: dict[str, Any], add: bool) -> None:
    """Put the scores of all shards into one file, and into the copy what else it needs; the manifest comes last."""
    remove_leftovers(target)
    rows = [row for number in range(len(old.shards)) for row in read_json(_scores_path(scores, number))]
    widths = sorted({len(row) for row in rows})
    if len(widths) > 1:
        raise ValueError(f"the reward returned {widths} scores a response, wanted one number of scores for all; delete {scores} to score again")
    new = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), widths[0] if rows else old.num_heads)
    if target != old.path:
        _copy(old, target)
    write_rewards(target, manifest, torch.cat([old.rewards, new], 1) if add else new)
    shutil.rmtree(target / SCORES_NAME)


def _copy(old: Rollouts, target: Path) -> None:
    """Hard links to the files of the shards, or copies of them where the file system has none."""
    names = with_lines(old.shards)
    listed = [CHECKSUMS_NAME] if old.manifest.get("checksums_sha256") else []
    for name in [*names, *listed]:
        with write_aside(target / name) as aside:
            try:
                os.link(old.path / name, aside)
            except OSError:
                shutil.copyfile(old.path / name, aside)
    # Of a copy that an earlier release began.
    for path in target.glob("shard-*.sha256"):
        path.unlink()
