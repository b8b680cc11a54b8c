"""The system calls of a save, one by one: their order on the disk, and what is left where any of them fails or kills."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import run_in_process
from forked import Forked
from model_fixtures import model_folder, write_turns

from sftcli import manifest, writing
from sftcli.cli import app
from sftcli.errors import Exit

LENGTHS = [12, 7, 20, 9, 15, 5]
SETTINGS = ["batch_rows=3", "epochs=4", "optimizer.lr=3e-3", "sample_rows=0", "checkpoint_every=2", "keep=1"]  # 8 steps


def strace_works() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not strace_works(), reason="strace is missing or may not trace here"),
]


def command_of(base, rows, run):
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["-q", "train", rows, "-m", str(base), "-o", str(run), "--resume", *settings]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(command of a run folder, a run killed after step 6 of 8, its weights had it not been killed)"""
    folder = tmp_path_factory.mktemp("begun")
    base = model_folder(folder / "base", "llama", layers=1)
    rows = write_turns(base, folder / "rows.safetensors", LENGTHS)
    run = folder / "run"
    assert run_in_process(*command_of(base, rows, run), "--set", "keep=9").code == 0
    weights = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    for step in (2, 4, 8):
        shutil.rmtree(manifest.folder_of(run, step))
    return lambda folder: command_of(base, rows, folder), run, weights


def with_tracer(command, ready):
    """Run a command that says where it first saves, and goes on when it is traced."""
    from sftcli.stages import train as stage

    real = stage.save_checkpoint

    def waiting(job, step):
        ready.touch()
        while "TracerPid:\t0" in Path("/proc/self/status").read_text():
            time.sleep(0.002)
        real(job, step)

    stage.save_checkpoint = waiting
    app(command)


def traced(command, log, *flags):
    """(exit code, stderr, the lines of the trace) of a command from its first save on."""
    ready = log.with_name("ready")
    ready.unlink(missing_ok=True)
    process = Forked(lambda: with_tracer(command, ready))
    while not ready.exists():
        time.sleep(0.002)
    calls = "trace=openat,write,fsync,rename,mkdir"
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-qq", "-o", log, "-e", calls, *flags, "-p", str(process.pid)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    code, said = process.wait()
    tracer.wait(30)
    return code, said, log.read_text().splitlines()


def test_every_file_is_on_disk_before_the_folder_has_its_name_and_the_name_before_anything_goes(begun, tmp_path):
    command, start, _ = begun
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(start, run)
    code, said, lines = traced(command(run), log)
    assert code == 0, said
    for name, parent, next_step in (("step-000008", run / "checkpoints", "latest"), ("model", run, None)):
        temporary = rf"{re.escape(str(parent))}/\.tmp-{name}-\w+"
        published = [i for i, line in enumerate(lines) if re.search(rf'rename\("{temporary}", "[^"]*/{name}"\)', line)]
        assert len(published) == 1
        before, after = lines[: published[0]], lines[published[0] + 1 :]
        for file in (parent / name).iterdir():
            inside = [i for i, line in enumerate(before) if re.search(rf"<{temporary}/{re.escape(file.name)}>", line)]
            synced = [i for i in inside if "fsync(" in before[i]]
            writes = [i for i in inside if "write(" in before[i]]
            assert synced and (not writes or max(writes) < max(synced)), file.name
        assert any(re.search(rf"fsync\(\d+<{temporary}>\)", line) for line in before)
        assert re.search(rf"fsync\(\d+<{re.escape(str(parent))}>\)", next(line for line in after if "fsync" in line))
        if next_step:  # only then the pointer, only then the pruning
            at = [next(i for i, line in enumerate(after) if re.search(rf'rename\("[^"]*/{pattern}', line)) for pattern in
                  (r"\.tmp-latest", r"step-000006")]  # fmt: skip
            assert at == sorted(at)


@pytest.mark.parametrize(
    ("call", "fault"),
    [(call, "signal=KILL") for call in ("openat", "write", "fsync", "rename", "mkdir")]
    + [("write", "error=ENOSPC"), ("fsync", "error=EIO"), ("rename", "error=ENOSPC"), ("mkdir", "error=ENOSPC")],
)
def test_wherever_a_save_fails_or_dies_the_run_goes_on_from_a_whole_checkpoint(begun, tmp_path, call, fault):
    command, start, weights = begun
    outcomes = []
    for k in [*range(1, 16), *range(16, 400, 4)]:
        run = tmp_path / f"run-{k}"
        shutil.copytree(start, run)
        code, said, lines = traced(command(run), tmp_path / "log", "-e", f"inject={call}:{fault}:when={k}")
        if not any("INJECTED" in line or "killed by SIGKILL" in line for line in lines):
            break
        newest = manifest.checkpoints(run)[-1]
        assert manifest.damage_of(newest) is None and manifest.step_of(newest) in (6, 8), (k, lines[-3:])
        assert "Traceback" not in said, (k, said)
        if fault == "signal=KILL":
            assert code == -signal.SIGKILL
        elif code:
            assert code == Exit.WRITE and len(said.splitlines()) == 1, (k, said)
        else:  # only what is deleted may fail and the command still end well
            assert call == "rename" and (run / "model" / "model.safetensors").read_bytes() == weights
        outcomes.append((code, manifest.step_of(newest)))
        if k % 5 == 1:
            code, said = Forked(lambda: app(command(run))).wait()  # noqa: B023
            assert code == 0, said
            assert (run / "model" / "model.safetensors").read_bytes() == weights
            writing.remove_leftovers(run)
            assert not list(run.rglob(".tmp-*")) and not list(run.rglob(".old-*"))
        shutil.rmtree(run)
    print(f"{call} {fault}: {len(outcomes)} tried, 0 lost; {sum(step == 8 for _, step in outcomes)} had published")
    assert len(outcomes) >= (2 if call == "mkdir" else 5)
