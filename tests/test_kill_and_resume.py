"""A run that is killed anywhere, however often, ends as if nothing had happened: every file equal to the byte."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import SAMPLES, run_in_process
from forked import Forked
from model_fixtures import metrics, model_folder, steps_written, write_turns

from sftcli import manifest
from sftcli.cli import app

KILLED_RUNS = int(os.environ.get("KILLED_RUNS", "16"))  # of all cases together
LENGTHS = [12, 7, 20, 9, 15, 5, 11, 18, 6, 13, 8, 10, 16, 4, 14]
CASES = {
    "full": [
        "dropout=0.2",
        "eval_share=0.2",
        "eval_every=4",
        "sample_rows=1",
        "sample_tokens=2",
        "checkpoint_every=2",
        "keep=1",
    ],
    "lora": ["adapter=lora", "adapter.dropout=0.1", "sample_rows=0", "optimizer.lr=1e-2", "checkpoint_every=1"],
    "epochs": ["dropout=0.1", "batch_rows=null", "batch_tokens=40", "optimizer.kind=muon", "sample_rows=0"],
    "patience": ["eval_share=0.3", "eval_every=1", "patience=4", "optimizer.lr=5e-2", "sample_rows=0", "keep=1"],
}


@pytest.fixture
def command(tmp_path):
    """The command of a run in `folder` by one of the cases: four epochs, several micro-batches a step."""
    base = model_folder(tmp_path / "base", "llama", layers=2)
    rows = write_turns(base, tmp_path / "rows.safetensors", LENGTHS)

    def of(case, folder, *flags):
        settings = ["batch_rows=4", "micro_batch_tokens=20", "epochs=4", "optimizer.lr=3e-3", *CASES[case]]
        given = [part for setting in settings for part in ("--set", setting)]
        return ["-q", "train", rows, "-m", str(base), "-o", str(folder), *given, *flags]

    return of


def result(run):
    """All that a run says, but for clocks, its own id and what was moved aside."""
    folders = {folder.name: folder for folder in manifest.checkpoints(run)}
    assert all(manifest.damage_of(folder) is None for folder in folders.values())
    assert not list(run.rglob(".tmp-*")) and not list(run.rglob(".old-*"))
    places = [*folders.values(), *(run / name for name in ("model", "adapter") if (run / name).is_dir())]
    files = [path for place in places for path in sorted(place.iterdir()) if path.name != "manifest.json"]
    files += [run / "samples.jsonl"] if (run / "samples.jsonl").is_file() else []
    return {str(path.relative_to(run)): path.read_bytes() for path in files} | {"metrics": metrics(run)}


def finished(command, run):
    """The result of a run that nothing disturbs. In this process: its copies then have every module already."""
    assert run_in_process(*command).code == 0
    return result(run)


def killed_until_it_ends(command, run, chance, longest, kills):
    """Start the command again and again, killing it `kills` times at random moments; returns how often it died."""
    died, newest = 0, -1
    while True:
        process = Forked(lambda: app(command))
        if died < kills:
            time.sleep(chance.uniform(0, longest))
            process.kill(signal.SIGKILL)
        code, said = process.wait()
        whole = [manifest.step_of(f) for f in manifest.checkpoints(run) if manifest.damage_of(f) is None]
        assert len(whole) == len(manifest.checkpoints(run)) and max(whole, default=-1) >= newest
        newest = max(whole, default=-1)
        if code != -signal.SIGKILL:
            assert code == 0, said
            return died
        died += 1


def ends_equal(command, case, folder, runs):
    """Kill so many runs of a case, each one to five times, wherever chance has it; each must end as the whole one."""
    whole, chance, kills, equal = folder / "whole", random.Random(case), 0, 0
    expected = finished(command(case, whole), whole)
    start = time.monotonic()
    assert Forked(lambda: app(command(case, folder / "again"))).wait()[0] == 0
    longest = time.monotonic() - start
    assert result(folder / "again") == expected
    assert [line["step"] for line in expected["metrics"]] == list(range(1, len(expected["metrics"]) + 1))
    while equal < runs:
        run = folder / "killed"
        died = killed_until_it_ends(command(case, run, "--resume"), run, chance, longest, chance.randint(1, 5))
        found = result(run)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
        shutil.rmtree(run)
        kills, equal = kills + died, equal + (died > 0)  # a run that was faster than its killer does not count
    print(f"{case}: {kills} kills in {runs} runs of {len(expected['metrics'])} steps, {equal} of {runs} ended equal")


def test_run_that_is_killed_at_random_ends_equal_to_the_byte(command, tmp_path):
    ends_equal(command, "full", tmp_path, 1)


@pytest.mark.slow
@pytest.mark.timeout(max(300, 30 * KILLED_RUNS))
@pytest.mark.parametrize("case", CASES)
def test_runs_that_are_killed_at_random_end_equal_to_the_byte(command, tmp_path, case):
    """KILLED_RUNS=50 pytest -n 0 -s -m slow -k killed_at_random tests/test_kill_and_resume.py"""
    ends_equal(command, case, tmp_path, -(-KILLED_RUNS // len(CASES)))


def dies_after(step, forwards, command, run):
    """Run the command until `step` steps are logged and `forwards` more forwards begun; the last one finds it killed."""
    from sftcli.model import training

    real, calls = training.make_batch, 0

    def batch(*given):
        nonlocal calls
        calls += (run / "metrics.jsonl").read_bytes().count(b"\n") == step
        if calls == forwards:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    training.make_batch = batch
    app(command)


def test_killed_twice_in_an_epoch_between_two_forwards_and_where_an_epoch_ends(command, tmp_path):
    """An epoch is three steps, each of two forwards and more; every second step has a checkpoint."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    expected = finished(command("full", whole), whole)
    for step, forwards in ((4, 1), (5, 2), (6, 1), (11, 2)):
        process = Forked(lambda: dies_after(step, forwards, command("full", run, "--resume"), run))  # noqa: B023
        code, said = process.wait()
        assert code == -signal.SIGKILL, said
        assert len(metrics(run)) == step
    assert run_in_process(*command("full", run, "--resume")).code == 0
    assert result(run) == expected


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sft_run_that_is_killed_goes_on_when_it_is_called_again(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"".join((SAMPLES / "train.jsonl").read_bytes().splitlines(keepends=True)[:60]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"init: {{data: {data}, layers: 1, width: 16, heads: 2, context: 256, vocab_size: 400}}\n"
        f"tokenize: {{data: {data}}}\n"
        "train: {max_steps: 24, batch_rows: 4, dropout: 0.1, checkpoint_every: 2, sample_rows: 0, keep: 1}\n"
        f"generate: {{prompts: {data}, max_new_tokens: 2}}\n"
    )
    whole, run, chance = tmp_path / "whole", tmp_path / "run", random.Random(0)
    expected = finished(["-q", "run", str(recipe), "-o", str(whole)], whole)
    start = time.monotonic()
    assert Forked(lambda: app(["-q", "run", str(recipe), "-o", str(tmp_path / "again")])).wait()[0] == 0
    longest, died = time.monotonic() - start, 0
    while died < 12:
        died += killed_until_it_ends(["-q", "run", str(recipe), "-o", str(run)], run, chance, longest, 6)
        assert result(run) == expected
        assert (run / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
        shutil.rmtree(run)


@pytest.mark.slow
def test_real_processes_that_are_killed_resume_to_the_same_bytes(command, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    start = [sys.executable, "-m", "sftcli"]
    expected = finished(command("full", whole), whole)
    for lines, number in ((2, signal.SIGKILL), (5, signal.SIGTERM), (8, signal.SIGKILL)):
        process = subprocess.Popen(start + command("full", run, "--resume"))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if steps_written(run) >= lines:
                process.send_signal(number)
                break
            time.sleep(0.001)
        assert process.wait(60) in (-number, 128 + number)
    assert subprocess.run(start + command("full", run, "--resume"), check=False).returncode == 0
    assert result(run) == expected
