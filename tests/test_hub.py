"""`-m org/name`: resolved through the hub's cache; what cannot be reached is one clear line."""

import os
import shutil
import subprocess
import sys

import pytest
from model_fixtures import model_folder

from sftcli.errors import CheckpointError, Exit
from sftcli.hub import local

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache that holds org/tiny at revisions main and v2, and no network."""
    repo = tmp_path / "hub" / "models--org--tiny"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    model_folder(snapshot, "llama")
    (repo / "refs").mkdir()
    for revision in ("main", "v2"):
        (repo / "refs" / revision).write_text(COMMIT)
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return snapshot


def asked(code, *args):
    """Output of a fresh Python: the library reads its environment when it is imported."""
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60)


PRINT = "import sys; from sftcli.hub import local; print(local(sys.argv[1]))"
OPEN = "import sys; from sftcli.artifacts import model_folder; print(model_folder(sys.argv[1]))"


@pytest.mark.parametrize("name", ["org/tiny", "org/tiny@main", "org/tiny@v2", f"org/tiny@{COMMIT}"])
def test_a_name_of_the_hub_is_its_snapshot_in_the_cache(cache, name):
    done = asked(OPEN, name)
    assert done.stdout.strip() == str(cache), done.stderr


def test_a_folder_of_that_name_goes_before_the_hub(cache, tmp_path, monkeypatch):
    shutil.copytree(cache, tmp_path / "org" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert local("org/tiny") == "org/tiny"


def test_a_model_that_is_not_cached_is_one_clear_line_when_offline(cache):
    done = asked(
        "import sys\nfrom sftcli.hub import local\nfrom sftcli.errors import CheckpointError\n"
        "try: local(sys.argv[1])\nexcept CheckpointError as error: print(error.code, error, '|', error.hint)",
        "org/other@v1",
    )
    code, _, said = done.stdout.strip().partition(" ")
    assert int(code) == Exit.CHECKPOINT
    assert "org/other@v1" in said and "offline" in said and "hf download org/other" in said
    assert "\n" not in said and done.stderr == ""


@pytest.mark.parametrize("path", ["./org/x", "/org/x", "a/b/c", "org", "~/x", "../x", "org/x@", "org/x y", ""])
def test_paths_are_never_taken_for_names_of_the_hub(path):
    assert local(path) == path


def test_the_library_is_not_loaded_for_a_folder(tmp_path):
    done = asked(
        "import sys, sftcli.artifacts as a\na.local(sys.argv[1])\nprint('huggingface_hub' in sys.modules)", "."
    )
    assert done.stdout.strip() == "False"


def test_an_unknown_revision_is_refused(cache):
    done = asked(PRINT, "org/tiny@v9")
    assert CheckpointError.__name__ in done.stderr and "org/tiny@v9" in done.stderr
