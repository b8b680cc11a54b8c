"""A checkpoint that has its name is whole; a damaged one is named and passed over; only a run's own are deleted."""

import builtins
import errno
import json
import os
import re
import resource
import shutil
import signal
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from forked import Forked
from model_fixtures import make_rows, metrics, model_folder, tokenizer_hash, write_jsonl, write_turns

from sftcli import console, manifest, reading, writing
from sftcli.cli import app
from sftcli.errors import CheckpointError, Exit, SftError, UsageError
from sftcli.model import resume, shards
from sftcli.model.tensorfile import write_tensors
from sftcli.recipe import Train
from sftcli.recipefile import apply_settings, parse
from sftcli.stages import train as stage
from sftcli.stages.train import train

LENGTHS = [12, 7, 20, 9, 15, 5, 11, 18, 6, 13]
SETTINGS = ("batch_rows=5", "epochs=4", "optimizer.lr=3e-3", "sample_rows=0", "checkpoint_every=2", "keep=3")  # 8 steps


def options_of(*settings):
    return parse(Train, apply_settings({}, [*SETTINGS, *settings]), section="train")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(model folder, rows, a finished run, its outcome)"""
    folder = tmp_path_factory.mktemp("done")
    base = model_folder(folder / "base", "llama", layers=1)
    rows = write_turns(base, folder / "rows.safetensors", LENGTHS)
    outcome = train(options_of(), rows, str(base), str(folder / "run"))
    return base, rows, folder / "run", outcome


@pytest.fixture
def run(done, tmp_path):
    """A copy of the finished run without its model: killed after the last checkpoint."""
    shutil.copytree(done[2], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    return tmp_path / "run"


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def go_on(done, run, *settings):
    return train(options_of(*settings), done[1], str(done[0]), str(run), resumed=True)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is written


def test_a_file_of_tensors_is_the_librarys_to_the_byte_and_its_sum_is_known(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "rng": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        'ü"': torch.randn(4, 4).T,
        "steps": torch.ones(3, dtype=torch.int64),
        "large": torch.randn(1000, 700),
    }
    said = write_tensors(tmp_path / "ours", tensors)
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    ours = (tmp_path / "ours").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert said == (len(ours), zlib.crc32(ours))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_never_written(tmp_path, value):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.zeros(9, 9, dtype=dtype)
        tensor[3, 4] = value
        with pytest.raises(SftError, match=r"tensor poisoned .* not finite") as caught:
            write_tensors(tmp_path / "x", {"fine": torch.ones(2), "poisoned": tensor})
        assert caught.value.code == Exit.DIVERGED


def test_a_poisoned_weight_reaches_neither_checkpoint_nor_model(done, run, monkeypatch):
    from sftcli.stages import train as stage

    (run / "checkpoints" / "step-000008").rename(run / ".tmp-gone")
    before = files_of(run / "checkpoints" / "step-000006")
    real = stage.save_checkpoint

    def poisoned(job, step):
        with torch.no_grad():
            job.model.norm.weight[3] = float("nan")
        real(job, step)

    monkeypatch.setattr(stage, "save_checkpoint", poisoned)
    with pytest.raises(SftError, match=r"tensor norm\.weight has a number that is not finite") as caught:
        go_on(done, run)
    assert caught.value.code == Exit.DIVERGED
    assert not (run / "model").exists()
    assert names(run) == ["latest", "step-000004", "step-000006"]
    assert files_of(run / "checkpoints" / "step-000006") == before


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_are_those_of_the_umask(done, tmp_path, umask):
    before = os.umask(umask)
    try:
        train(options_of("max_steps=2"), done[1], str(done[0]), str(tmp_path / "run"))
        train(options_of("max_steps=2", "adapter=lora"), done[1], str(done[0]), str(tmp_path / "lora"))
    finally:
        os.umask(before)
    for name in ("run", "lora"):
        paths = [tmp_path / name, *(tmp_path / name).rglob("*")]
        assert len(paths) > 15
        assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {0o777 & ~umask}
        assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {0o666 & ~umask}


def test_the_manifest_names_every_file_with_its_size_and_crc(run):
    folder = run / "checkpoints" / "step-000008"
    said = json.loads((folder / "manifest.json").read_text())
    assert said["step"] == 8 and said["format"] == "sft-checkpoint/1"
    assert said["run"] == json.loads((run / "run.json").read_text())["id"]
    assert set(said["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, entry in said["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}


# ---- rotation


def test_the_newest_are_kept_and_latest_names_the_last(run):
    assert names(run) == ["latest", "step-000004", "step-000006", "step-000008"]
    assert (run / "checkpoints" / "latest").read_text() == "step-000008\n"


def test_checkpoints_of_another_run_are_never_deleted_or_resumed_from(done, tmp_path):
    run = tmp_path / "run"
    foreign = {}
    for step in (2, 3, 900):  # in the place of one of ours, among ours, above ours
        folder = run / "checkpoints" / f"step-{step:06}"
        shutil.copytree(done[2] / "checkpoints" / "step-000008", folder)
        said = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(said | {"run": "another", "step": step}))
        foreign[step] = files_of(folder)
    (run / "run.json").write_text('{"id": "mine"}')
    (run / "model").mkdir()
    outcome = train(options_of("keep=1"), done[1], str(done[0]), str(run))
    assert outcome.sha256 == done[3].sha256
    places = {path.name.partition("step-")[2][:6]: path for path in (run / "checkpoints").glob("*step-*")}
    assert set(places) == {"000002", "000003", "000008", "000900"}
    assert places["000002"].name.startswith("other-step-000002-")
    for step, files in foreign.items():
        assert files_of(places[f"{step:06}"]) == files
    assert go_on(done, run, "keep=1").sha256 == done[3].sha256


def test_a_new_run_in_the_folder_of_a_finished_one_removes_its_checkpoints(done, run):
    shutil.copytree(done[2] / "model", run / "model")
    train(options_of("max_steps=2"), done[1], str(done[0]), str(run))
    assert names(run) == ["latest", "step-000002"]


@pytest.mark.parametrize("keep", [1, 2])
def test_at_no_moment_are_there_fewer_whole_checkpoints_than_kept(done, tmp_path, monkeypatch, keep):
    run, counts = tmp_path / "run", []
    real = os.rename

    def watched(old, new):
        counts.append(sum(manifest.damage_of(folder) is None for folder in manifest.checkpoints(run)))
        real(old, new)

    monkeypatch.setattr(os, "rename", watched)
    train(options_of(f"keep={keep}", "checkpoint_every=1"), done[1], str(done[0]), str(run))
    reached = next(i for i, count in enumerate(counts) if count >= keep)
    assert len(counts) > 14 and min(counts[reached:]) == keep and max(counts) == keep + 1


# ---- damage


def cut(data, at):
    return data[:at]


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize(("how", "at"), [(cut, 0), (cut, 0.5), (cut, -1), (flipped, 0.6), (flipped, -5), (None, 0)])
def test_damage_of_any_file_is_named_and_the_checkpoint_before_is_used(done, run, capsys, name, how, at):
    path = run / "checkpoints" / "step-000008" / name
    data = path.read_bytes()
    if how is None:
        path.unlink()
    else:
        path.write_bytes(how(data, int(at * len(data)) if isinstance(at, float) else at))
    outcome = go_on(done, run)
    told = capsys.readouterr().err
    assert re.search(rf"warning: train: .*{re.escape(str(path))}.*; going back to step-000006", told)
    assert "resuming after step 6" in told
    assert outcome.sha256 == done[3].sha256
    assert metrics(run) == metrics(done[2])
    fresh = run / "checkpoints" / "step-000008"
    assert manifest.damage_of(fresh) is None
    assert (fresh / "optimizer.safetensors").read_bytes() == (
        done[2] / "checkpoints" / "step-000008" / "optimizer.safetensors"
    ).read_bytes()


def test_every_flipped_bit_of_a_manifest_is_noticed(run):
    folder = run / "checkpoints" / "step-000008"
    path, own = folder / "manifest.json", manifest.owner_of(folder)
    data, unnoticed = path.read_bytes(), []
    for bit in range(0, 8 * len(data), 7):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        if manifest.damage_of(folder) is None and manifest.owner_of(folder) == own:
            unnoticed.append(bit)
    assert unnoticed == []


def test_no_whole_checkpoint_is_exit_5_and_nothing_is_touched(done, run):
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / "state.json").write_bytes(b"{}")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"state\.json is damaged: 2 bytes, not .*; no checkpoint is whole"):
        go_on(done, run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_that_is_cut_off_while_it_is_loaded_is_exit_5(done, run, monkeypatch):
    real = shards.read_entries

    def late(path, dtypes):
        entries = real(path, dtypes)
        os.truncate(path, 20_000)  # a map would end in SIGBUS
        return entries

    monkeypatch.setattr(shards, "read_entries", late)
    with pytest.raises(CheckpointError, match=r"trained\.safetensors is damaged"):
        go_on(done, run)


def test_the_command_lists_and_verifies(sft, sft_process, run):
    whole = sft("checkpoints", run)
    assert whole.code == 0, whole.err
    assert [(line["step"], line["whole"], line["own"]) for line in whole.rows] == [
        (4, True, True),
        (6, True, True),
        (8, True, True),
    ]
    assert all(line["bytes"] == sum(len(data) for data in files_of(Path(line["path"])).values()) for line in whole.rows)
    path = run / "checkpoints" / "step-000006" / "trained.safetensors"
    path.write_bytes(flipped(path.read_bytes(), -9))
    found = sft("checkpoints", run)
    assert found.code == Exit.CHECKPOINT and "trained.safetensors is damaged: crc32" in found.err
    assert [line["whole"] for line in found.rows] == [True, False, True]
    assert sft("checkpoints", run.parent).code == Exit.USAGE


# ---- what has changed


def test_every_option_that_changed_is_named_with_both_values(done, run):
    with pytest.raises(UsageError) as caught:
        go_on(done, run, "optimizer.lr=1e-4", "epochs=5")
    told = str(caught.value)
    assert re.search(r"optimizer\.lr was 0\.003, is 0\.0001.*epochs was 4(\.0)?, is 5(\.0)?$", told)
    assert caught.value.code == Exit.USAGE
    assert list(resume.differences({"mix": {"web": 0.5}, "a": None}, {"mix": {}, "a": {"b": 1}})) == [
        ("mix.web", "was 0.5, is null"),
        ("a", 'was null, is {"b": 1}'),
    ]


def test_options_that_no_step_depends_on_may_change(done, run):
    assert go_on(done, run, "keep=1", "checkpoint_every=1").sha256 == done[3].sha256


def test_other_threads_or_torch_are_one_warning_each(done, run, capsys):
    folder = run / "checkpoints" / "step-000008"
    state = json.loads((folder / "state.json").read_text())
    state["settings"] |= {"threads": 9, "torch": "1.2.3"}
    del state["settings"]["dtype"]  # as if it had not been recorded then
    del state["settings"]["options"]["neftune" if "neftune" in state["settings"]["options"] else "dropout"]
    (folder / "state.json").write_text(json.dumps(state))
    manifest.seal(
        folder,
        8,
        str(manifest.owner_of(folder)),
        {n: (len(d), zlib.crc32(d)) for n, d in files_of(folder).items() if n != "manifest.json"},
    )
    go_on(done, run)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert "threads was 9, is 1: the run goes on, but not bit for bit" in warnings[0]
    assert 'torch was "1.2.3"' in warnings[1]


def test_rows_from_a_pipe_that_differ_are_refused_and_those_of_the_run_are_kept(done, tmp_path):
    base, run = str(done[0]), tmp_path / "run"
    rows = make_rows([9, 7, 12, 8], prompt=2, tokenizer=tokenizer_hash(done[0]))
    same, other = (write_jsonl(tmp_path / f"{i}.jsonl", some) for i, some in enumerate((rows, rows[::-1])))
    first = train(options_of("batch_rows=2"), same, base, str(run))
    kept = (run / "rows.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"the rows changed \(was"):
        train(options_of("batch_rows=2"), other, base, str(run), resumed=True)
    assert (run / "rows.safetensors").read_bytes() == kept
    assert not list(run.glob(".tmp-*"))
    again = train(options_of("batch_rows=2"), same, base, str(run), resumed=True)
    assert again.sha256 == first.sha256 and (run / "rows.safetensors").read_bytes() == kept


def test_other_rows_are_trained_from_the_checkpoint_on_where_that_is_allowed(done, tmp_path, capsys):
    """The steps after it have the rows that they have in a run with the other rows alone."""
    run, base, first, second = tmp_path / "run", str(done[0]), tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    rows = make_rows([9, 7, 12, 8], prompt=2, tokenizer=tokenizer_hash(done[0]))
    (
        write_jsonl(first, rows),
        write_jsonl(second, [*rows, *make_rows([5, 6, 11], prompt=2, tokenizer=tokenizer_hash(done[0]))]),
    )
    options = options_of("batch_rows=2", "checkpoint_every=1", "max_steps=6")
    train(options, str(second), base, str(tmp_path / "other"))
    train(options, str(first), base, str(run))
    shutil.rmtree(run / "model")
    for step in (5, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06}")
    with pytest.raises(UsageError) as caught:
        train(options, str(second), base, str(run), resumed=True)
    assert "--set allow_data_change=true" in caught.value.hint
    allowed = options.model_copy(update={"allow_data_change": True})
    train(allowed, str(second), base, str(run), resumed=True)
    assert re.search(r"warning: train: the rows changed \(was .*\): the run goes on with them", capsys.readouterr().err)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert [line["rows"] for line in metrics(run)][4:] == [line["rows"] for line in metrics(tmp_path / "other")][4:]
    said, of_others = (reading.read_json(folder / "run.json") for folder in (run, tmp_path / "other"))
    assert said["rows"] == of_others["rows"]


def test_rows_for_fewer_steps_than_are_done_are_refused(done, tmp_path):
    run, base, lines = tmp_path / "run", str(done[0]), tmp_path / "rows.jsonl"
    rows = make_rows([9, 7, 12, 8, 6, 5], prompt=2, tokenizer=tokenizer_hash(done[0]))
    options = options_of("batch_rows=1", "epochs=1", "checkpoint_every=1", "allow_data_change=true")
    train(options, write_jsonl(lines, rows), base, str(run))
    with pytest.raises(UsageError, match=r"6 steps are done, these rows make 2"):
        train(options, write_jsonl(lines, rows[:2]), base, str(run), resumed=True)


@pytest.mark.parametrize(
    "entry", [{"bytes": "12", "crc32": "0"}, {"bytes": 12, "crc32": 0}, {"bytes": 12.5, "crc32": "0"}]
)
@pytest.mark.parametrize("name", ["state.json", "..", "a\0b"])
def test_a_manifest_that_says_nonsense_is_damaged(run, entry, name):
    folder = manifest.checkpoints(run)[-1]
    said = json.loads((folder / "manifest.json").read_text())
    said["files"] = {name: entry}
    (folder / "manifest.json").write_text(json.dumps(said))
    assert str(manifest.damage_of(folder)).endswith("manifest.json is damaged")


def test_the_rows_of_every_step_are_named_in_the_metrics(done, run):
    named = [line["rows"] for line in metrics(run)]
    assert all(re.fullmatch("[0-9a-f]{12}", name) for name in named) and len(set(named)) == len(named)


def test_a_folder_with_nothing_but_leftovers_is_a_new_folder(done, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".tmp-run.json-0a1b").write_text("{")
    assert train(options_of(), done[1], str(done[0]), str(tmp_path / "run")).sha256 == done[3].sha256
    assert not list((tmp_path / "run").glob(".tmp-*"))


# ---- no room


@pytest.mark.parametrize(
    ("settings", "resumed", "copies"),
    [
        (("max_steps=2", "keep=9"), False, 1),  # a checkpoint every two steps
        (("max_steps=5", "keep=9"), False, 3),
        (("max_steps=8", "keep=1"), False, 2),
        (("max_steps=8", "keep=2"), False, 3),
        (("max_steps=8", "keep=1", "patience=2", "eval_share=0.2"), False, 3),
        (("keep=1", "checkpoint_every=null", "epochs=4"), False, 2),  # one an epoch
        (("keep=9", "checkpoint_every=null", "epochs=1.5"), False, 2),
        (("keep=3",), True, 2),  # after steps 6 and 8; that of step 4 is there
        (("keep=1",), True, 1),
    ],
)
def test_too_little_room_for_what_will_be_kept_is_exit_6_before_the_first_step(
    done, run, tmp_path, monkeypatch, settings, resumed, copies
):
    class Begun(Exception):
        pass

    def announce(*args):
        raise Begun

    folder = run if resumed else tmp_path / "new"
    for step in (6, 8):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06}")
    monkeypatch.setattr(stage, "_announce", announce)
    size = sum(entry["bytes"] for entry in manifest.manifest_of(done[2] / "checkpoints" / "step-000008")["files"].values())  # fmt: skip
    usage = shutil.disk_usage(tmp_path)
    for free, raised in ((copies - 0.2, SftError), (copies + 0.2, Begun)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=int(free * size)))
        with pytest.raises(raised) as caught:
            train(options_of(*settings), done[1], str(done[0]), str(folder), resumed)
        if raised is SftError:
            assert re.search(
                rf": {copies} more checkpoints \(keep=.*need [\d,]+ bytes, [\d,]+ are free", str(caught.value)
            )
            assert caught.value.code == Exit.WRITE and not (tmp_path / "new" / "metrics.jsonl").exists()


def command_of(done, run):
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["train", done[1], "-m", str(done[0]), "-o", str(run), "--resume", *settings]


def limited(size, command):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # the write that crosses it fails, as on a full disk
    app(command)


@pytest.mark.parametrize("size", [None, 20_000, 120_000])
def test_a_full_disk_is_one_line_and_exit_6_and_the_run_goes_on_later(done, run, size):
    shutil.rmtree(run / "checkpoints" / "step-000008")
    shutil.rmtree(run / "checkpoints" / "step-000006")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    before = files_of(run / "checkpoints" / "step-000004")
    limit = size or len(b"".join(lines[:4])) + 100  # the fifth line does not fit
    code, said = Forked(lambda: limited(limit, command_of(done, run))).wait()
    errors = [line for line in said.splitlines() if not line.startswith("train:")]
    assert code == Exit.WRITE and len(errors) == 1, said
    file = {20_000: "trained.safetensors", 120_000: "optimizer.safetensors"}.get(size)
    place = run / "checkpoints" / "step-000006" / file if file else run / "metrics.jsonl"
    assert errors[0].startswith(f"error: cannot write {place}: File too large")
    assert bool(re.search(r"a checkpoint takes [\d,]+ bytes, [\d,]+ are free", errors[0])) == bool(size)
    assert names(run) == ["latest", "step-000004"]
    assert files_of(run / "checkpoints" / "step-000004") == before
    assert go_on(done, run).sha256 == done[3].sha256
    assert metrics(run) == metrics(done[2])


# ---- the k-th call of a save fails, or the process dies in it

CALLS = {"open": (builtins, "open"), "fsync": (os, "fsync"), "replace": (os, "replace"), "rename": (os, "rename"), "mkdir": (os, "mkdir")}  # fmt: skip


def save_with_fault(run, call, k, kill):
    """Save step 9 of a run; its k-th `call` raises or kills. Exits with 77 if there were fewer."""
    module, name = CALLS[call]
    real, count = getattr(module, name), 0

    def fails(*args, **how):
        nonlocal count
        if call == "open" and (args[1] if len(args) > 1 else "r")[:1] == "r":
            return real(*args, **how)
        count += 1
        if count == k:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **how)

    own = manifest.owner_of(run / "checkpoints" / "step-000008")
    tensors = {"trained.safetensors": {"a": torch.ones(3)}, "optimizer.safetensors": {"b": torch.ones(5)}}
    setattr(module, name, fails)
    try:
        resume.save(run, own, 9, tensors, {"settings": {}}, keep=2)
    except SftError as error:
        console.fail(str(error), error.hint)
        return int(error.code)
    finally:
        setattr(module, name, real)
    return 0 if count >= k else 77


@pytest.mark.parametrize("kill", [False, True], ids=["fails", "killed"])
def test_whatever_call_of_a_save_fails_a_whole_checkpoint_is_left(run, tmp_path, kill):
    before = files_of(run / "checkpoints" / "step-000008")
    tried = 0
    for call in CALLS:
        for k in range(1, 100):
            attempt = tmp_path / f"{call}-{k}"
            shutil.copytree(run, attempt)
            code, said = Forked(lambda: save_with_fault(attempt, call, k, kill)).wait()  # noqa: B023
            if code == 77:
                assert k > 1
                break
            tried += 1
            newest = manifest.checkpoints(attempt)[-1]
            assert manifest.damage_of(newest) is None and manifest.step_of(newest) >= 8, (call, k)
            assert code == (-signal.SIGKILL if kill else code)
            if not kill and code == 0:  # the pruning of older ones may fail quietly
                assert newest.name == "step-000009" and call == "rename"
            elif not kill:
                assert code == Exit.WRITE and len(said.splitlines()) == 1 and said.startswith("error: cannot write")
                assert not list(attempt.rglob(".tmp-*"))
            if newest.name == "step-000008":
                assert files_of(newest) == before
            writing.remove_leftovers(attempt / "checkpoints")
            assert all(name.startswith(("step-", "latest")) for name in names(attempt))
            shutil.rmtree(attempt)
    print(f"{tried} calls {'killed' if kill else 'failed'}, 0 checkpoints lost")
    assert tried > 20
