"""Rollouts, opened: the hidden states that the uncontrolled model read to sample each token, and the reward of each response."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from recontrol.ambient import shielded
from recontrol.checks import first_few
from recontrol.data import shards
from recontrol.data.batches import RolloutBatch
from recontrol.data.dialogue import turns_entry
from recontrol.data.shards import MANIFEST_NAME, RolloutWriter
from recontrol.files import interrupts_wait, writing_lock


class Rollouts:
    """A rollout folder, opened: lengths, rewards and groups in memory, hidden states read from disk as they are asked for.

    Args:
        path: a folder written by `collect`, `collect_texts`, `collect_pairs`, `join_rollouts` or `Rollouts.write`; ValueError for others, or damaged ones.
        allow_partial: accept a folder whose collection was interrupted, and use what is there.

    Attributes:
        manifest: the settings the rollouts were made with.
        shards, checksums: the files of the states, in the order of the responses, and SHA-256 by file name.
        num_tokens, hidden_size, num_heads: how many states there are, the width of a state, and how many rewards a response has.
        lengths, groups: (responses,), int64, tokens of each response, and index of its prompt.
        rewards: (responses, num_heads), float32.
    """

    def __init__(self, path: str | os.PathLike, *, allow_partial: bool = False):
        self.path = Path(path)
        self.manifest = shards.read_manifest(self.path)
        self.hidden_size: int = self.manifest["hidden_size"]
        self.num_heads: int = self.manifest["num_heads"] or 1
        total = self.manifest["num_shards"]
        self.shards = shards.shard_paths(self.path, total)
        if len(self.shards) < total and not allow_partial:
            found = f"found {len(self.shards)} of {total} shards"
            raise ValueError(f"{self.path} is not complete: {found}; make the same call again to finish it, or open it with allow_partial=True")
        if not self.shards:
            raise ValueError(f"{self.path} has no shard yet")
        self.checksums = shards.shard_checksums(self.path, self.manifest)
        self._replaced = shards.read_rewards(self.path, self.manifest)
        heads = self.num_heads if self._replaced is None else None
        offsets = [shards.read_offsets(shard, self.manifest) for shard in self.shards]
        counts = torch.tensor([len(of_shard) - 1 for of_shard in offsets], device="cpu")
        checksums = [self.checksums.get(shard.with_suffix(".jsonl").name) for shard in self.shards]
        scores = [shards.read_scores(shard, count, heads, wanted) for shard, count, wanted in zip(self.shards, counts.tolist(), checksums, strict=True)]
        self.lengths = torch.cat([of_shard.diff() for of_shard in offsets])
        self._starts = torch.cat([of_shard[:-1] for of_shard in offsets])
        self._shard_of = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
        self.groups = torch.cat([groups for groups, _ in scores])
        self.rewards = torch.cat([rewards for _, rewards in scores]) if self._replaced is None else self._replaced
        self.num_tokens = int(self.lengths.sum())
        if len(self.rewards) != len(self.lengths):
            raise ValueError(f"{self.path} has new rewards of {len(self.rewards)} responses, its shards have {len(self.lengths)}")

    def __len__(self) -> int:
        """How many responses there are."""
        return len(self.lengths)

    def __repr__(self) -> str:
        """Name the folder and its size."""
        return f"Rollouts({str(self.path)!r}, responses={len(self)}, num_tokens={self.num_tokens}, hidden_size={self.hidden_size})"

    def batch(self, indices: Sequence[int] | Tensor) -> RolloutBatch:
        """Read some responses, in the order of `indices`, and nothing else, from disk; states in the dtype of the storage, those of 8 bits as float32."""
        indices = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        scales = self._rows(indices, "scales") if self.storage == "int8" else None
        return RolloutBatch(shards.decode(self._rows(indices, "states"), scales), self.lengths[indices], self.rewards[indices])

    def token_ids(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The tokens of some responses, packed: (tokens,), int64. Entry t was sampled from row t of `batch(indices)`."""
        return self._rows(torch.as_tensor(indices, dtype=torch.int64, device="cpu"), "token_ids")

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines beside the states, in order: index (of the prompt), prompt, response, reward, finish; `sample` too, or `pair` and `preference`."""
        for number in range(len(self.shards)):
            yield from self.shard_records(number)

    def shard_records(self, number: int) -> Iterator[dict[str, Any]]:
        """The lines of one shard, as `records` gives them."""
        lines = shards.read_lines(self.shards[number])
        rewards = [record["reward"] for record in lines] if self._replaced is None else self._replaced[self._shard_of == number].tolist()
        for record, reward in zip(lines, rewards, strict=True):
            yield {**record, "reward": reward}

    def verify(self) -> None:
        """Compare every file of the shards with its checksum; ValueError names those that changed, are missing or have none (format version 1)."""
        names = shards.with_lines(self.shards)
        wrong = []
        for name in names:
            found = shards.checksum(self.path / name) if (self.path / name).is_file() else None
            if found is None or found != self.checksums.get(name):
                wrong.append(f"{name} {'is missing' if found is None else 'has changed' if name in self.checksums else 'has no checksum'}")
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(names)} files of {self.path} are not those that were written: {first_few(wrong)}")

    @property
    def storage(self) -> str:
        """How states are kept on disk: the name of a dtype, or "int8"."""
        return self.manifest.get("storage") or self.manifest["dtype"]

    def describe(self) -> str:
        """One line: how much there is, and what a token takes on disk."""
        total = sum((self.path / name).stat().st_size for name in shards.with_lines(self.shards))
        states = self.hidden_size * getattr(torch, self.storage).itemsize + (torch.float32.itemsize if self.storage == "int8" else 0)
        content = f"{len(self)} responses, {self.num_tokens} tokens, states of {self.hidden_size} numbers as {self.storage}"
        return f"{content}; {total / 1e6:.1f} MB on disk, {total / max(self.num_tokens, 1):.0f} bytes a token, {states} of them states"

    @shielded()
    def _rows(self, indices: Tensor, name: str) -> Tensor:
        parts: list[Tensor] = [torch.empty(0, device="cpu")] * len(indices)
        numbers = self._shard_of[indices]
        for number in numbers.unique().tolist() or [0]:
            # Opened and closed here: a handle costs a tenth of a millisecond, and thousands of open ones would not do.
            with interrupts_wait(), safe_open(self.shards[number], "pt") as file:
                rows = file.get_slice(name)
                none = rows[:0]
                for place in (numbers == number).nonzero()[:, 0].tolist():
                    start = int(self._starts[indices[place]])
                    parts[place] = rows[start : start + int(self.lengths[indices[place]])]
        return torch.cat([none, *parts])

    @classmethod
    def write(
        cls,
        path: str | os.PathLike,
        states: Sequence[Tensor],
        rewards: Tensor | Sequence[float] | Sequence[Sequence[float]],
        prompts: Sequence[str] | None = None,
        responses: Sequence[str] | None = None,
        *,
        groups: Sequence[int] | Tensor | None = None,
        token_ids: Sequence[Tensor] | None = None,
        finish: Sequence[str] | None = None,
        base_model: dict[str, Any] | None = None,
        storage: str | None = None,
        shard_size: int = 256,
    ) -> "Rollouts":
        """Write rollouts that are in memory into a folder that holds none yet, for pipelines that have their own way of generating, and open them.

        Each response has `states`, (tokens, hidden_size), whose row t is the state whose logits sampled token t, and `rewards`, one number or
        (responses, num_heads), finite. By default `prompts` and `responses`, kept for reading, are empty, `groups` (index of the prompt) are all
        different, `token_ids` (tokens,) are -1, for unknown, and `finish` ("eos", "length" or "stop") is "eos". `base_model` is the
        `model_fingerprint` of the language model, `storage` as in `Collection`, `shard_size` the responses in a file. ValueError for what does not fit.
        """
        shards.check_storage(storage)
        count = len(states)
        if not count:
            raise ValueError("there are no responses to write")
        table = torch.as_tensor(rewards, dtype=torch.float32, device="cpu")
        table = table[:, None] if table.ndim == 1 else table
        if not table.isfinite().all():
            raise ValueError(f"the rewards of responses {(~table.isfinite().all(1)).nonzero()[:, 0].tolist()} are not finite")
        columns: dict[str, list[Any]] = {"index": list(map(int, range(count) if groups is None else groups))}
        columns |= {"prompt": list(prompts or [""] * count), "response": list(responses or [""] * count)}
        columns |= {"reward": table.tolist(), "finish": list(finish or ["eos"] * count)}
        ids = [torch.full((len(rows),), -1, device="cpu") for rows in states] if token_ids is None else list(token_ids)
        for name, column in {**columns, "token_ids": ids}.items():
            if len(column) != count:
                raise ValueError(f"found {len(column)} entries of {name}, wanted {count}, one a response")
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        records = [{**row, **turns_entry(row["prompt"])} for row in rows]
        starts = range(0, count, shard_size)
        manifest = {"base_model": base_model, "num_prompts": len(set(columns["index"])), "num_shards": len(starts)}
        with writing_lock(Path(path)):
            if (Path(path) / MANIFEST_NAME).exists():
                raise ValueError(f"{path} already holds rollouts; use another folder")
            writer = RolloutWriter(path, manifest, storage=storage)
            for number, start in enumerate(starts):
                part = slice(start, start + shard_size)
                writer.write(number, torch.cat(list(states[part])), torch.cat(ids[part]), list(map(len, states[part])), records[part])
            writer.finish()
        return cls(path)
