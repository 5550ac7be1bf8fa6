"""The rewards of relabelled rollouts: one safetensors file beside the shards, named by the manifest.

The file is written first and the manifest last, in one rename: readers see the old rewards or the new ones, never a mixture.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from recontrol.data.checksums import checksum
from recontrol.data.shards import MANIFEST_NAME, RELABELLED_VERSION
from recontrol.files import write_aside, write_json

FORMAT = "recontrol.rewards"


def write_rewards(folder: Path, manifest: dict[str, Any], rewards: Tensor) -> None:
    """Write (responses, num_heads) rewards, and then the manifest that names them; earlier files of rewards are removed."""
    name = f"rewards-{len(manifest['relabelled'])}.safetensors"
    content = save({"rewards": rewards.contiguous()}, metadata={"format": FORMAT})
    with write_aside(folder / name) as aside:
        aside.write_bytes(content)
    entry = {"file": name, "sha256": checksum(content)}
    write_json(folder / MANIFEST_NAME, {**manifest, "version": RELABELLED_VERSION, "num_heads": rewards.shape[1], "rewards": entry})
    for path in folder.glob("rewards-*.safetensors"):
        if path.name != name:
            path.unlink()


def read_rewards(folder: Path, manifest: dict[str, Any]) -> Tensor | None:
    """The rewards that take the place of those in the lines, (responses, num_heads), float32; None if the lines have them.

    ValueError if the file is missing, has changed, or does not go with the manifest.
    """
    entry = manifest.get("rewards")
    if entry is None:
        return None
    path = folder / entry["file"]
    if not path.is_file():
        raise ValueError(f"{path} is missing: the manifest names it as the rewards")
    content = path.read_bytes()
    if (found := checksum(content)) != entry["sha256"]:
        raise ValueError(f"{path} has changed since it was written: found SHA-256 {found[:12]}..., wanted {entry['sha256'][:12]}...")
    rewards = load(content)["rewards"]
    if rewards.ndim != 2 or rewards.shape[1] != manifest["num_heads"] or not rewards.isfinite().all():
        raise ValueError(f"{path}: wanted {manifest['num_heads']} finite rewards a response, found a table of shape {tuple(rewards.shape)}")
    return rewards
