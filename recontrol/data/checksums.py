"""SHA-256 of the files of a rollout folder: beside each shard while it is being collected, in one list once it is complete.

Both are in the format of `sha256sum`, so that `sha256sum --check checksums.sha256` inside the folder reads them too.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from recontrol.files import write_aside

CHECKSUMS_NAME = "checksums.sha256"
LINE = re.compile(r"([0-9a-f]{64})  (shard-\d+\.(?:safetensors|jsonl))")


def checksum(content: bytes) -> str:
    """SHA-256 of some bytes, 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing(checksums: Mapping[str, str]) -> bytes:
    """The list of checksums by file name, in the order of the names."""
    return "".join(f"{checksums[name]}  {name}\n" for name in sorted(checksums)).encode()


def write_checksums(path: Path, checksums: Mapping[str, str]) -> None:
    """Write a list of checksums by file name, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_bytes(listing(checksums))


def read_checksums(path: Path) -> tuple[dict[str, str], str]:
    """Checksums by file name, and the checksum of the list itself; ValueError if it is missing or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    found = {}
    for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{path}, line {number}: wanted a checksum and the name of a shard, found {line[:100]!r}")
        found[match[2]] = match[1]
    return found, checksum(content)


def changed_files(folder: Path, checksums: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """What is wrong with some files of a folder, one text a file: missing, changed, or without a checksum."""
    wrong = []
    for name in names:
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif name not in checksums:
            wrong.append(f"{name} has no checksum")
        elif (found := file_checksum(path)) != checksums[name]:
            wrong.append(f"{name} has changed (found SHA-256 {found[:12]}..., wanted {checksums[name][:12]}...)")
    return wrong
