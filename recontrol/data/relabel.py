"""Scoring the responses of rollouts again, with another reward: the hidden states stay as they are, and nothing is generated."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from recontrol.data.dialogue import prompt_of
from recontrol.data.identity import fingerprint, unknown
from recontrol.data.processes import writing_together
from recontrol.data.rewards import Reward, as_reward, checked_rewards, reward_name
from recontrol.data.rewards.checks import head_names, names_of_heads
from recontrol.data.rollouts import Rollouts
from recontrol.data.settings import texts_checksum
from recontrol.data.shards import CHECKSUMS_NAME, MANIFEST_NAME, read_lines, read_manifest, shard_path, with_lines, write_rewards
from recontrol.files import check_same_settings, read_json, remove_leftovers, write_aside, write_json

# Inside the folder, until all shards are scored: the new rewards of each shard, by the rewards they are.
SCORES_NAME = ".scores"


def relabel(rollouts: Rollouts | str | os.PathLike, reward: Any, out: str | os.PathLike | None = None, *, add: bool = False, progress: bool = True) -> Rollouts:
    """Score stored prompts and responses again, and open the rollouts with the new rewards. Hidden states and tokens are neither read nor changed.

    The new rewards replace the old ones once all are there; the same call resumes a run that was killed. Several processes share the shards.

    Args:
        rollouts: what `collect` made, or its folder.
        reward: as for `collect`; a list of rewards, or a dictionary of them by name, becomes several heads.
        out: folder for a copy with the new rewards, which shares the files of the shards by hard links if it can; None changes the folder itself.
        add: put the new rewards after the old ones, as further heads, instead of replacing them.
        progress: show a progress bar.

    Raises TypeError, ValueError, RuntimeError, OSError: as `collect` (the shard is named); a reward to add that is there, or rollouts without texts.
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
            about = [manifest["reward"], manifest["relabelled"]]
            before, scores = (target / SCORES_NAME / texts_checksum(each)[:16] for each in (about, [*about, manifest["reward_sha256"]]))
            # Those of a release that knew rewards by their names alone go on.
            scores = before if before.exists() else scores
            scores.mkdir(parents=True, exist_ok=True)
            files = [scores / f"shard-{number:05d}.json" for number in range(len(old.shards))]

            def make(number: int) -> None:
                write_json(files[number], _scored(old, number, score, add, files))

            peers.make_shards(lambda number: files[number].exists(), make, [1] * len(files), scores, "shard", progress)
            if peers.index == 0:
                _finish(old, target, files, manifest, add)
    return Rollouts(target)


def _set_up(source: Path, target: Path, score: Reward, add: bool) -> tuple[Rollouts, dict[str, Any]] | None:
    """The rollouts to score and their new manifest, but for the file of rewards; None if the copy was finished before, perhaps by an earlier release."""
    old = Rollouts(source)
    if len(old) and not any(record.get("prompt") or record.get("response") for record in old.records()):
        raise ValueError(f"{old.path} has no texts to score: it was written without prompts and responses")
    before, new = names_of_heads(old.manifest.get("reward"), old.num_heads), head_names(score)
    twice = sorted(set(before) & set(new))
    if add and twice:
        raise ValueError(f"{old.path} has the reward {', '.join(twice)} already; replace the rewards, or give a dictionary with another name for it")
    step = {"reward": new, "before": before, "added": add, "checksums_before": old.manifest.get("checksums_sha256")}
    reward = [*before, *new] if add else reward_name(score)
    content: Any = [old.manifest.get("reward_sha256"), fingerprint(score)] if add else fingerprint(score)
    manifest = {**old.manifest, "reward": reward, "reward_sha256": content, "relabelled": [*old.manifest.get("relabelled", []), step]}
    if target != source and (target / MANIFEST_NAME).exists():
        made = {"version", "rewards", "checksums_sha256", "num_heads"}
        found = read_manifest(target)
        check_same_settings(found, manifest, f"{target} holds rollouts with", ignored=made | unknown(found, "reward_sha256"))
        if all(shard_path(target, number).exists() for number in range(len(old.shards))):
            return None
    return old, manifest


def _scored(old: Rollouts, number: int, score: Reward, add: bool, files: list[Path]) -> list[list[float]]:
    """The new rewards of the responses of a shard, as many each as in the shards that `files` has."""
    records = read_lines(old.shards[number])
    if not records:
        return []
    names = head_names(score)
    try:
        rows = checked_rewards(score, list(map(prompt_of, records)), [record["response"] for record in records]).tolist()
        if add and len(rows[0]) != len(names):
            raise ValueError(f"the reward {names[0]} returned {len(rows[0])} scores a response; to be added it must return one, or name them in head_names")
        before = next((len(found[0]) for file in files if file.exists() and (found := read_json(file))), len(rows[0]))
        if before != len(rows[0]):
            raise ValueError(f"the reward returned {len(rows[0])} scores a response, and {before} for the shards before")
    except ValueError as error:
        raise ValueError(f"shard {number}: {error}") from error
    return rows


def _finish(old: Rollouts, target: Path, files: list[Path], manifest: dict[str, Any], add: bool) -> None:
    """Put the scores of all shards into one file, and into the copy the files of the shards, by hard links if possible; the manifest comes last."""
    remove_leftovers(target)
    rows = [row for file in files for row in read_json(file)]
    new = torch.tensor(rows, dtype=torch.float32, device="cpu").reshape(len(rows), len(rows[0]) if rows else old.num_heads)
    if target != old.path:
        for name in [*with_lines(old.shards), *([CHECKSUMS_NAME] if old.manifest.get("checksums_sha256") else [])]:
            with write_aside(target / name) as aside:
                try:
                    os.link(os.path.realpath(old.path / name), aside)
                except OSError:
                    shutil.copyfile(old.path / name, aside)
        # Of a copy that an earlier release began.
        for path in target.glob("shard-*.sha256"):
            path.unlink()
    write_rewards(target, manifest, torch.cat([old.rewards, new], 1) if add else new)
    shutil.rmtree(target / SCORES_NAME)
