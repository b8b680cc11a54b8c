"""sft checkpoints: what a run could be resumed from, every byte of it read. Never loads torch."""

import sys
from pathlib import Path

from sftcli import console, manifest
from sftcli.artifacts import RUN
from sftcli.errors import UsageError
from sftcli.reading import read_json
from sftcli.writing import json_line


def checkpoints(path: str) -> bool:
    """Print a JSON line a checkpoint, oldest first; returns whether all of them are whole."""
    run = Path(path)
    if not (run / RUN).is_file():
        raise UsageError(f"{path} is no run: it has no {RUN}")
    own, good = read_json(run / RUN).get("id"), True
    for folder in manifest.checkpoints(run):
        damage = manifest.damage_of(folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        found = {"step": manifest.step_of(folder), "bytes": size, "whole": damage is None}
        found["own"] = manifest.owner_of(folder) == own  # another run's is neither resumed from nor deleted
        sys.stdout.buffer.write(json_line(found | {"damage": damage, "path": str(folder)}))
        if damage:
            console.warn(f"checkpoints: {damage}")
            good = False
    return good
