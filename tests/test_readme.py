"""Every command in the README is run, in the README's order, in one shell."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the repository's data and recipes, and this interpreter's `sft` first on PATH."""
    for name in ("data", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    binaries = tmp_path / "bin"
    binaries.mkdir()
    sft = binaries / "sft"
    sft.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sftcli "$@"\n')
    sft.chmod(0o755)
    if shutil.which("jq") is None:  # `jq -c '{prompt}'` is the only use of it
        jq = binaries / "jq"
        jq.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -c \'import json, sys\n'
            'for line in open(sys.argv[1]): print(json.dumps({"prompt": json.loads(line)["prompt"]}))\' "${3:-/dev/stdin}"\n'
        )
        jq.chmod(0o755)
    return tmp_path


def in_shell(script: str, folder: Path, timeout: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize("new", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forks", "processes"])
@pytest.mark.timeout(300)
def test_every_command_of_the_readme_works_in_its_order(workplace: Path, warm_sft: Path, new: bool) -> None:
    if not new:
        shutil.copy(warm_sft / "sft", workplace / "bin" / "sft")
    found = blocks("bash")
    assert sum(block.count("sft ") for block in found) >= 20
    done = in_shell("\n".join(found), workplace, 280)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "[0,0,0,1,1,1,0,0]" in done.stdout  # NX-4, from the pipe into `sft mask --format neox`
    assert (workplace / "run" / "model" / "model.safetensors").is_file()


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    command = next(block for block in blocks("sh") if "pytest" in block).strip()
    assert command in (ROOT / ".ci" / "run").read_text()


FIGURES = {"quickstart": 0.95, "full": 0.92, "lora": 0.92, "prefix": 0.92, "glm": 0.75}  # exact match, held out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_recipes_reach_the_figures_that_they_state(workplace: Path) -> None:
    """In the order in which they build on each other; the model before answers none of full's, lora's, prefix's."""
    for name, figure in FIGURES.items():
        done = in_shell(f"unset OMP_NUM_THREADS; sft run recipes/{name}.yaml", workplace, 600)
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout)
        assert results["completions"] >= 200 and results["exact_match"] >= figure, (name, results)
