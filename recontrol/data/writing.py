"""Writing what a source makes into a rollout folder: one process or several, interrupted or not."""

import logging
import os
from collections import Counter
from pathlib import Path

from tqdm.auto import tqdm

from recontrol.data.batches import Source
from recontrol.data.processes import Peers
from recontrol.data.rollouts import Rollouts
from recontrol.data.shards import MANIFEST_NAME, RolloutWriter, read_manifest
from recontrol.decoding.fingerprint import difference
from recontrol.files import writing_lock

logger = logging.getLogger(__name__)


def write_rollouts(source: Source, out: str | os.PathLike, *, storage: str | None = None, unit: str = "prompt", progress: bool = True) -> Rollouts:
    """Make the batches of a source that a folder does not have yet, one shard each, and open the folder.

    In several processes the missing shards are dealt out in turn. All of them return once the folder is complete; if one dies,
    the others' shards stay, and the same call makes what is missing.

    Args:
        source: what makes the batches.
        out: the folder.
        storage: how states are kept, see `storage.encode`; None is the dtype they have.
        unit: what an entry of a batch is called by the progress bar.
        progress: show a progress bar.

    Returns:
        The rollouts, opened.

    Raises:
        ValueError: the folder holds rollouts with other settings or of another model, or a batch cannot be made; the
            shards before it stay.
        RuntimeError: another run is writing into the folder, or another process of this run has died.
        OSError: the disk is full; the message names the file, and the shards before it stay.
    """
    out = Path(out)
    if (out / MANIFEST_NAME).exists() and (recorded := read_manifest(out).get("base_model")) and (other := difference(recorded, source.model)):
        raise ValueError(f"{out} holds rollouts of another model: {other}; use another folder")
    peers = Peers.current()
    first = peers.index == 0
    if not first:
        # The first one makes the folder, sees to it that no other run is in it, and lets the others in.
        peers.wait()
    with writing_lock(out, first) as share:
        writer = RolloutWriter(out, source.settings, source.ignored, storage, first)
        if first and peers.count > 1:
            share()
            peers.wait()
        missing = [number for number in range(len(source.batches)) if not writer.has(number)]
        # Nobody may write before all have counted.
        peers.wait()
        _make(source, writer, missing[peers.index :: peers.count], peers, unit, progress)
        peers.wait()
        if first:
            writer.finish()
        peers.wait()
    return Rollouts(out)


def _make(source: Source, writer: RolloutWriter, numbers: list[int], peers: Peers, unit: str, progress: bool) -> None:
    total = sum(map(len, source.batches)) if peers.count == 1 else sum(len(source.batches[number]) for number in numbers)
    done = total - sum(len(source.batches[number]) for number in numbers)
    left_out: Counter[str] = Counter()
    try:
        with tqdm(total=total, initial=done, unit=unit, disable=not progress or peers.index > 0) as bar, source.opened() as make:
            for number in numbers:
                try:
                    made = make(number)
                    writer.write(number, made.states, made.token_ids, made.lengths, made.records)
                except ValueError as error:
                    raise ValueError(f"{error}; the shards written before stay in {writer.path}") from error
                left_out.update(made.left_out)
                bar.update(len(source.batches[number]))
    except KeyboardInterrupt:
        kept = sum(map(writer.has, range(len(source.batches))))
        logger.warning("interrupted: %d of %d shards are in %s; the same call goes on from there", kept, len(source.batches), writer.path)
        raise
    if left_out["empty"]:
        logger.warning("dropped %d responses that a stop string cut to nothing", left_out["empty"])
    if left_out["repeated"]:
        logger.info("left out %d responses that were sampled before for the same prompt", left_out["repeated"])
