"""Signals in every phase of a run, each in a process of its own: a fork of this one, which has loaded torch already."""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
from conftest import SAMPLES
from model_fixtures import metrics, model_folder, write_turns
from test_training import LENGTHS

from sftcli import artifacts, manifest
from sftcli.cli import app
from sftcli.model import checkpoint, decoding, resume
from sftcli.model.gpt import GPT
from sftcli.stages import train as stage
from sftcli.stages import training_job

WITHIN = 25  # seconds from a signal to the end of the process
SETTINGS = ("batch_rows=6", "epochs=3", "optimizer.lr=3e-3", "dropout=0.1", "eval_share=0.2", "eval_every=2")
SETTINGS += ("sample_rows=2", "sample_tokens=6", "micro_batch_tokens=8", "patience=9")


@pytest.fixture
def base(tmp_path):
    return model_folder(tmp_path / "base", "llama", layers=2)


@pytest.fixture
def rows(tmp_path, base):
    return write_turns(base, tmp_path / "rows.safetensors", LENGTHS)


class Process:
    """`sft ARGS` in a fork; `prepare` runs in it first. Its stderr goes to a file."""

    def __init__(self, folder, *args, prepare=lambda: None, stdin=None):
        self.log = folder / f"stderr-{time.monotonic_ns()}"
        sys.stdout.flush()
        self.id = os.fork()
        if self.id:
            return
        code = 99
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, 0)
            stream = open(self.log, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
            os.dup2(stream.fileno(), 2)
            sys.stdin, sys.stderr = open(0 if stdin is None else stdin), stream  # noqa: SIM115
            prepare()
            app(args=[str(arg) for arg in args], prog_name="sft")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 98
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(self):
        """(exit code, negative for a signal that killed it; what it said)."""
        deadline = time.monotonic() + WITHIN
        while time.monotonic() < deadline:
            done, status = os.waitpid(self.id, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), self.log.read_text()
            time.sleep(0.01)
        os.kill(self.id, signal.SIGKILL)
        os.waitpid(self.id, 0)
        raise AssertionError(f"no end after {WITHIN} s: {self.log.read_text()}")


def command(rows, base, run, *more):
    return ["train", rows, "-m", base, "-o", run, *more, *(part for s in SETTINGS for part in ("--set", s))]


def signalled(owner, name, call, *numbers, after=False, counts=lambda *args: True):
    """A `prepare`: the process signals itself in its `call`-th call of owner.name that counts, and tells later ones."""

    def prepare():
        real, calls, sent = getattr(owner, name), [], []

        def wrapped(*args, **kwargs):
            if sent:
                print("called after the signal", file=sys.stderr)
            found = real(*args, **kwargs) if after else None
            calls.extend([None] if counts(*args) else [])
            if len(calls) == call and not sent:
                sent.append(None)
                for number in numbers:
                    os.kill(os.getpid(), number)
            return found if after else real(*args, **kwargs)

        setattr(owner, name, wrapped)

    return prepare


def in_forward(training, call, *numbers):
    """In the `call`-th forward of a step, or of an evaluation."""
    return signalled(GPT, "forward", call, *numbers, counts=lambda model, *rest: model.training == training)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run in a process of its own, and what it was made from."""
    folder = tmp_path_factory.mktemp("whole")
    base = model_folder(folder / "base", "llama", layers=2)
    rows = write_turns(base, folder / "rows.safetensors", LENGTHS)
    code, told = Process(folder, *command(rows, base, folder / "run")).wait()
    assert code == 0, told
    return base, rows, folder / "run"


INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
PHASES = {  # name: (prepare, exit code, the last whole step); a step has 6 forwards or 4, an evaluation 2
    "in the first step": (in_forward(True, 3, TERM), 143, 0),
    "in a step": (in_forward(True, 8, TERM), 143, 1),
    "in the last forward of a step": (in_forward(True, 16, INT), 130, 3),
    "at the end of a step": (signalled(stage, "_metrics", 3, USR1), 143, 3),
    "in evaluation": (in_forward(False, 1, INT), 130, 2),
    "in a later evaluation": (in_forward(False, 3, USR1), 143, 4),
    "in the last evaluation": (in_forward(False, 5, TERM), 143, 6),
    "in sampling": (signalled(decoding, "_advance", 5, TERM), 143, 2),
    "in a save": (signalled(resume, "write_tensors", 1, TERM), 143, 2),
    "while the model is written": (signalled(checkpoint, "write_shards", 1, TERM, after=True), 143, 6),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_ends_a_run_in_time_and_it_goes_on_to_the_same_weights(whole, tmp_path, phase):
    base, rows, expected = whole
    prepare, wanted, steps = PHASES[phase]
    run = tmp_path / "run"
    code, told = Process(tmp_path, *command(rows, base, run), prepare=prepare).wait()
    assert code == wanted, told
    assert "Traceback" not in told and ("after the signal" not in told or phase == "in a save")
    assert not (run / "model").exists() and not list(run.glob(".tmp-*"))
    saved = [json.loads((folder / "state.json").read_text())["step"] for folder in manifest.checkpoints(run)]
    if steps is not None:
        assert saved[-1:] == ([steps] if steps else [])
    code, told = Process(tmp_path, *command(rows, base, run, "--resume")).wait()
    assert code == 0, told
    weights = Path("model", "model.safetensors")
    assert artifacts.file_fingerprint(run / weights) == artifacts.file_fingerprint(expected / weights)
    assert metrics(run) == metrics(expected)
    assert (run / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(INT, 130), (TERM, 143), (USR1, 143)])
@pytest.mark.parametrize("name", ["load_model", "file_fingerprint"])
def test_a_signal_while_a_run_is_loaded_ends_it_at_once(whole, tmp_path, name, number, code):
    base, rows, _ = whole
    prepare = signalled(training_job, name, 1, number)
    found, told = Process(tmp_path, *command(rows, base, tmp_path / "run"), prepare=prepare).wait()
    assert found == code, told
    assert "Traceback" not in told and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("number", "code"), [(INT, 130), (TERM, 143)])
def test_a_signal_while_rows_arrive_ends_a_run_at_once(whole, tmp_path, number, code):
    base, _, _ = whole
    ours, theirs = os.pipe()
    process = Process(tmp_path, *command("-", base, tmp_path / "run"), stdin=ours)
    os.write(theirs, b'{"id": "a"')  # and nothing more
    deadline = time.monotonic() + WITHIN
    while not (tmp_path / "run").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1.5)  # until it waits for the rest of the line
    os.kill(process.id, number)
    found, told = process.wait()
    os.close(ours), os.close(theirs)
    assert found == code, told
    assert "Traceback" not in told and not (tmp_path / "run").exists()


def test_a_second_interrupt_ends_a_run_at_once_and_a_second_termination_does_not(whole, tmp_path):
    base, rows, _ = whole
    for numbers, code, steps in (((INT, INT), 130, []), ((TERM, TERM, USR1), 143, [1]), ((TERM, INT), 130, [])):
        run = tmp_path / f"run-{len(numbers)}-{code}-{numbers[0]}"
        prepare = in_forward(True, 8, *numbers)
        found, told = Process(tmp_path, *command(rows, base, run), prepare=prepare).wait()
        assert found == code, told
        assert [int(folder.name[5:]) for folder in manifest.checkpoints(run)] == steps


@pytest.mark.parametrize(
    ("within", "told"),
    [
        ({}, None),
        ({"alone": 0}, "needs more than 0 s to end"),
        ({"WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "0"}, "that comes after 0 s; --set process_timeout"),
    ],
)
def test_a_step_and_a_checkpoint_that_take_too_long_to_follow_a_signal_are_told_once(
    whole, tmp_path, sft, monkeypatch, within, told
):
    base, rows, _ = whole
    within = dict(within)
    monkeypatch.setattr(stage, "ENDS_WITHIN", within.pop("alone", stage.ENDS_WITHIN))
    for name, value in within.items():
        monkeypatch.setenv(name, value)
    done = sft(*command(rows, base, tmp_path / "run"), "--set", "checkpoint_every=1")
    assert done.code == 0, done.err
    warned = [line for line in done.err.splitlines() if "a step takes" in line]
    assert len(warned) == (told is not None) and all(told in line for line in warned)


def test_a_signal_that_is_ignored_from_outside_stays_ignored(whole, tmp_path):
    base, rows, expected = whole

    def prepare():
        for number in (INT, TERM, USR1):
            signal.signal(number, signal.SIG_IGN)
        in_forward(True, 8, INT, TERM, USR1)()

    code, told = Process(tmp_path, *command(rows, base, tmp_path / "run"), prepare=prepare).wait()
    assert code == 0, told
    assert metrics(tmp_path / "run") == metrics(expected)


# ---- sft run

RECIPE = """
init: {data: DATA, layers: 1, heads: 2, width: 16, vocab_size: 400}
tokenize: {data: DATA}
train: {epochs: 1, batch_rows: 8, sample_rows: 0}
generate: {prompts: DATA, max_new_tokens: 2}
"""


@pytest.mark.parametrize(("number", "code"), [(INT, 130), (TERM, 143)])
def test_sft_run_ends_in_any_stage_and_goes_on(tmp_path, number, code):
    from sftcli.stages import init, mask, tokenize

    data, recipe = tmp_path / "data.jsonl", tmp_path / "recipe.yaml"
    data.write_bytes(b"".join((SAMPLES / "chats.jsonl").read_bytes().splitlines(keepends=True)[:40]))
    recipe.write_text(RECIPE.replace("DATA", str(data)))
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert Process(tmp_path, "run", recipe, "-o", whole).wait()[0] == 0
    stages = [
        signalled(init, "train_bpe", 1, number),
        signalled(tokenize, "encode_lines", 1, number),
        signalled(mask, "_document", 9, number),
        signalled(training_job, "load_model", 1, number),
        in_forward(True, 2, number),
        signalled(checkpoint, "write_shards", 1, number),
        signalled(decoding, "_advance", 3, number),
    ]
    for prepare in stages:
        found, told = Process(tmp_path, "run", recipe, "-o", run, prepare=prepare).wait()
        assert found == code, told
        assert "Traceback" not in told
    assert Process(tmp_path, "run", recipe, "-o", run).wait()[0] == 0
    for name in ("model/model.safetensors", "completions.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_a_filter_that_is_terminated_tells_the_next_stage(tmp_path):
    """What follows in the pipe must not take half of the rows for all."""
    out = tmp_path / "out.jsonl"
    ours, theirs = os.pipe()

    def prepare():
        sys.stdout = open(out, "w")  # noqa: SIM115

    process = Process(tmp_path, "mask", "-", prepare=prepare, stdin=ours)
    os.write(theirs, b'{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}\n')
    time.sleep(0.5)
    os.kill(process.id, TERM)
    code, told = process.wait()
    os.close(ours), os.close(theirs)
    assert code == 143, told
    assert "SIGTERM" in json.loads(out.read_text().splitlines()[-1])["sft_error"]["message"]
