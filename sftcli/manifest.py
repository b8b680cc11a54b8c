"""The checkpoints of a run as folders: complete, verified, rotated.

A folder is called step-N only when all of it is on disk. Its manifest says whose it is and what belongs in it.
"""

import re
import secrets
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from sftcli.artifacts import CHECKPOINTS, CHUNK
from sftcli.errors import CheckpointError, SftError
from sftcli.reading import read_json
from sftcli.writing import atomic_file, discard

MANIFEST, FORMAT = "manifest.json", "sft-checkpoint/1"
LATEST = "latest"  # a file with the newest one's name, for shell scripts: resuming looks at the folders


def folder_of(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:06}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """Folders that have a checkpoint's name, oldest first."""
    named = (path for path in (run / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted(filter(Path.is_dir, named), key=step_of)


def seal(folder: Path, step: int, run_id: str, sums: Mapping[str, tuple[int, int]]) -> None:
    """Write the manifest of a checkpoint that is about to get its name; `sums`: (bytes, crc32) of each of its files."""
    files = {name: {"bytes": size, "crc32": f"{crc:08x}"} for name, (size, crc) in sums.items()}
    text = msgspec.json.encode({"format": FORMAT, "run": run_id, "step": step, "files": files})
    (folder / MANIFEST).write_bytes(msgspec.json.format(text, indent=1))  # ends in }: no byte of it can be missing


def manifest_of(folder: Path) -> dict[str, Any]:
    """What a manifest says. Raises CheckpointError where it does not say all of it."""
    path = folder / MANIFEST
    found: dict[str, Any] = read_json(path)
    if found.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {found.get('format')!r} is not {FORMAT!r}")
    files = found.get("files")
    whole = isinstance(files, dict) and all(
        isinstance(entry, dict)
        and set(entry) == {"bytes", "crc32"}
        and type(entry["bytes"]) is int
        and isinstance(entry["crc32"], str)
        and Path(name).name == name
        and name != ".."
        and "\0" not in name
        for name, entry in files.items()
    )
    if not whole or not isinstance(found.get("run"), str) or found.get("step") != step_of(folder):
        raise CheckpointError(f"{path} is damaged")
    return found


def owner_of(folder: Path) -> str | None:
    """The id of the run that a checkpoint belongs to; None where its manifest does not say."""
    try:
        return str(manifest_of(folder)["run"])
    except CheckpointError:
        return None


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words that name the file; None: every byte is as it was written."""
    try:
        for name, entry in manifest_of(folder)["files"].items():
            path = folder / name
            size, crc = crc32_of(path)
            if size != entry["bytes"]:
                return f"{path} is damaged: {size:,} bytes, not {entry['bytes']:,}"
            if f"{crc:08x}" != entry["crc32"]:
                return f"{path} is damaged: crc32 {crc:08x}, not {entry['crc32']}"
    except CheckpointError as error:
        return str(error)
    return None


def crc32_of(path: Path) -> tuple[int, int]:
    """(bytes, crc32) of a file. Raises CheckpointError where it cannot be read."""
    size = crc = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return size, crc


def make_room(folder: Path) -> None:
    """A damaged checkpoint in the place of a new one, or another run's, loses its name and nothing else."""
    if folder.exists():
        folder.rename(folder.with_name(f"other-{folder.name}-{secrets.token_hex(4)}"))


def rotate(newest: Path, run_id: str, keep: int, best: int | None) -> None:
    """Point at a checkpoint that is on disk; only then let go of the run's older ones but `keep` and the best."""
    with atomic_file(newest.with_name(LATEST)) as file:
        file.write(f"{newest.name}\n".encode())
    run = newest.parent.parent
    up_to = [folder for folder in checkpoints(run) if step_of(folder) <= step_of(newest) and owner_of(folder) == run_id]
    for folder in up_to[:-keep]:
        if step_of(folder) != best:
            with suppress(SftError):  # the new checkpoint is safe all the same
                discard(folder)


def forget(run: Path, run_id: str) -> None:
    """Remove the checkpoints of one run."""
    discard(run / CHECKPOINTS / LATEST)
    for folder in checkpoints(run):
        if owner_of(folder) == run_id:
            discard(folder)
