"""Checkpoints that several processes write: shards make the whole, whoever fails or dies leaves no half of one."""

import errno
import json
import os
import re
import shutil
import signal
import sys
import time

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing
from forked import Forked
from model_fixtures import assert_equal_gradients, metrics, model_folder, write_turns
from test_checkpoints import CALLS, files_of
from test_processes import assert_close, free_ports, options_of

from sftcli import console, manifest
from sftcli.errors import CheckpointError, Exit, SftError
from sftcli.model import resume, shards
from sftcli.model.checkpoint import add_masked_lm, open_folder
from sftcli.model.processes import World, joined, whole
from sftcli.model.resume import tensor_files
from sftcli.model.shards import TensorFiles, held
from sftcli.model.tensorfile import write_tensors
from sftcli.stages.train import train
from sftcli.stages.training_job import _model

LENGTHS = [12, 7, 20, 9, 15, 5, 11, 18, 6, 13]
LORA = ("adapter.kind=lora", "adapter.rank=4", "adapter.dora=true")  # three processes: two have two rows of A, one none


class Share:
    """Rows of a tensor that is spread over processes, as far as a save looks at it."""

    def __init__(self, rows, nbytes):
        self.rows, self.nbytes = rows, nbytes

    full_tensor = None

    def to_local(self):
        return self.rows


def shares(value, count):
    """As torch deals out rows: `chunk`, and nothing for who comes too late."""
    parts = list(value.chunk(count))
    return parts + [value[:0]] * (count - len(parts))


# ---- files


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_any_rows_of_shards_are_those_of_the_whole(tmp_path, count, dtype):
    whole = {f"{rows}": torch.randint(0, 200, (rows, 3)).to(dtype) for rows in (1, 2, 3, 4, 7, 12)}
    whole |= {"flat": torch.randint(0, 200, (7,)).to(dtype), "none": torch.zeros(0, 4, dtype=dtype)}
    for rank in range(count):
        own = {name: shares(value, count)[rank] for name, value in whole.items()}
        own |= {"scalar": torch.tensor(3).to(dtype)} if rank == 0 else {}
        write_tensors(tmp_path / f"{rank}", own)
    files = TensorFiles([tmp_path / f"{rank}" for rank in range(count)])
    assert set(files) == {*whole, "scalar"}
    assert files.shape("scalar") == () and files.read("scalar") == 3
    for name, value in whole.items():
        assert files.shape(name) == tuple(value.shape)
        for start in range(len(value) + 1):
            for stop in range(start, len(value) + 1):
                assert torch.equal(files.read(name, slice(start, stop)), value[start:stop]), (name, start, stop)


def test_only_the_bytes_that_are_asked_for_are_read(tmp_path, monkeypatch):
    value = torch.randn(100, 8)
    for rank, part in enumerate(shares(value, 3)):
        write_tensors(tmp_path / f"{rank}", {"a": part})
    files = TensorFiles([tmp_path / f"{rank}" for rank in range(3)])
    read, real = [], shards._read_into
    monkeypatch.setattr(shards, "_read_into", lambda target, *where: read.append(target.nbytes) or real(target, *where))
    assert torch.equal(files.read("a", slice(30, 50)), value[30:50])
    assert read == [4 * 32, 16 * 32]  # the last of the first 34, and then of the second


def test_files_that_do_not_fit_or_are_cut_off_are_named(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.ones(3, 4)})
    write_tensors(tmp_path / "b", {"x": torch.ones(3, 5)})
    with pytest.raises(CheckpointError, match="b is damaged: its x does not fit a"):
        TensorFiles([tmp_path / "a", tmp_path / "b"])
    files = TensorFiles([tmp_path / "a", tmp_path / "a"])
    os.truncate(tmp_path / "a", (tmp_path / "a").stat().st_size - 1)
    files.read("x", slice(0, 2))
    with pytest.raises(CheckpointError, match="a is damaged: it ends in tensor x"):
        files.read("x", slice(2, 3))


# ---- a save of two processes


def save_in_pair(run, rank, store, fault=None, timeout=20.0):
    """Process `rank` of two saves step 9; `fault`: (call, k, kill) of its k-th call. 77: there were fewer."""
    console.RANK = rank
    signal.alarm(60)  # processes that miss each other would wait for ever
    world = World(rank, 2, dist.FileStore(str(store), 2), timeout)
    counted = patched(*fault) if fault else None
    value = torch.arange(10.0).view(5, 2)
    spread = {"a": Share(shares(value, 2)[rank], value.nbytes)}
    tensors = {"trained.safetensors": spread, "optimizer.safetensors": spread | {"b": torch.ones(5)}}
    try:
        resume.save(run, "own", 9, tensors, {"settings": {}}, keep=2, world=world)
    except SftError as error:
        if not world.is_said(str(error)):
            console.fail(str(error), error.hint)
        return int(error.code)
    except dist.DistError:
        return 1
    return 77 if counted and counted[0] < fault[1] else 0


def patched(call, k, kill):
    """Let the k-th `call` that writes fail or kill; returns how many there were."""
    module, name = CALLS[call]
    real, count = getattr(module, name), [0]

    def fails(*args, **how):
        if call == "open" and (args[1] if len(args) > 1 else "r")[:1] == "r":
            return real(*args, **how)
        count[0] += 1
        if count[0] == k:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **how)

    setattr(module, name, fails)
    return count


def both(run, store, rank=None, fault=None):
    """(exit codes, what was said) of two processes that save, of which one has a fault."""
    timeout = 0.5 if fault and fault[2] else 20.0  # how long the one that lives waits for the other
    pair = [Forked(lambda r=r: save_in_pair(run, r, store, fault if r == rank else None, timeout)) for r in (0, 1)]
    if fault and fault[2] and rank == 0:
        first = pair[0].wait()
        pair[1].kill(signal.SIGKILL)  # as the launcher does: what the first one does is waited for as long as it takes
        return [first, pair[1].wait()]
    return [process.wait() for process in pair]


@pytest.fixture
def run(tmp_path):
    """A run of two processes with a checkpoint of step 8."""
    value = torch.arange(10.0).view(5, 2)
    resume.save(tmp_path / "run", "own", 8, {"trained.safetensors": {"a": value}}, {"settings": {}}, keep=2)
    return tmp_path / "run"


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_each_process_writes_its_shards_and_the_first_seals_them_all(run, tmp_path):
    assert [code for code, _ in both(run, tmp_path / "store")] == [0, 0]
    folder = run / "checkpoints" / "step-000009"
    assert set(manifest.manifest_of(folder)["files"]) == set(files_of(folder)) - {"manifest.json"} == {
        "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors", "state.json",
        "trained-00001-of-00002.safetensors", "trained-00002-of-00002.safetensors",
    }  # fmt: skip
    assert manifest.damage_of(folder) is None
    found = tensor_files(folder, "optimizer.safetensors")
    assert torch.equal(found.read("a"), torch.arange(10.0).view(5, 2)) and torch.equal(found.read("b"), torch.ones(5))


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_cannot_write_fails_the_save_of_both_in_one_line(run, tmp_path, rank):
    before = files_of(run / "checkpoints" / "step-000008")
    ended = both(run, tmp_path / "store", rank, ("open", 1, False))
    assert [code for code, _ in ended] == [Exit.WRITE, Exit.WRITE]
    said = "".join(said for _, said in ended)
    path = run / "checkpoints" / "step-000009" / f"trained-0000{rank + 1}-of-00002.safetensors"
    assert said.startswith(f"error: cannot write {path}: No space left on device; a checkpoint takes 100 bytes, ")
    assert len(said.splitlines()) == 1
    assert names(run) == ["latest", "step-000008"] and files_of(run / "checkpoints" / "step-000008") == before


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True], ids=["fails", "killed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_whatever_call_fails_in_either_process_no_checkpoint_is_half_there(run, tmp_path, rank, kill):
    tried = 0
    for call in CALLS:
        for k in range(1, 100):
            attempt = tmp_path / f"{call}-{k}"
            shutil.copytree(run, attempt)
            ended = both(attempt, tmp_path / f"store-{call}-{k}", rank, (call, k, kill))
            if ended[rank][0] == 77:
                break
            tried += 1
            newest = manifest.checkpoints(attempt)[-1]
            assert manifest.damage_of(newest) is None and manifest.step_of(newest) >= 8, (call, k)
            if kill:
                assert ended[rank][0] == -signal.SIGKILL
            elif newest.name == "step-000008":
                assert [code for code, _ in ended] == [Exit.WRITE, Exit.WRITE]
                said = "".join(said for _, said in ended)
                assert said.startswith("error: cannot write") and len(said.splitlines()) == 1
                assert not list(attempt.rglob(".tmp-*"))
            shutil.rmtree(attempt)
    print(f"rank {rank}: {tried} calls {'killed' if kill else 'failed'}")
    assert tried > (20 if rank == 0 else 3)


# ---- runs of one, two and three processes


def cut_to(run, step, target):
    """A copy of a run as if it had been killed after `step`."""
    shutil.copytree(run, target)
    for name in ("model", "adapter"):
        shutil.rmtree(target / name, ignore_errors=True)
    for folder in manifest.checkpoints(target):
        if manifest.step_of(folder) > step:
            shutil.rmtree(folder)
    return target


SPREAD = ("parallel=fsdp", "checkpoint_every=1", "epochs=3", "keep=99")
ALONE = ("checkpoint_every=1", "epochs=3", "keep=99")
OF_THREE = {  # name -> settings, the run that is resumed, after which step
    "full": (SPREAD, None),
    "lora": ((*SPREAD, *LORA), None),
    "full, again": (SPREAD, ("full", 3)),
    "lora, again": ((*SPREAD, *LORA), ("lora", 3)),
    "from one": (SPREAD, ("one", 3)),
}
OF_TWO = {
    "to two": (SPREAD, ("full", 2)),
    "to ddp": (ALONE, ("full", 3)),
    "ddp to fsdp": (SPREAD, ("to ddp", 4)),
    "lora, to two": ((*SPREAD, *LORA), ("lora", 3)),
}


FILLED = {  # name -> preset, settings
    "transposed, fused, tied": ("gpt2", ()),
    "lora": ("gpt2", (*LORA[:2], "adapter.modules_to_save=[wte]")),
    "dora": ("llama", (*LORA, "base_dtype=bfloat16")),
    "prefix": ("llama", ("adapter.kind=prefix", "adapter.mlp=8", "adapter.length=4")),
    "pairs": ("llama", ()),
}


def filled(folder, name, world):
    """A model as a run begins with it: (what each process holds of it in bytes, whole tensors)."""
    preset, settings = FILLED[name]
    opened, options = (
        open_folder(folder / preset),
        options_of(*settings, *(("parallel=fsdp",) if world.size > 1 else ())),
    )
    if name == "pairs":
        add_masked_lm(opened, True)
    model, fill = _model(options, opened, name == "pairs", world.spreads(options.parallel))
    before = {p.device.type for p in model.parameters() if not p.requires_grad or not options.adapter}
    world.place(model, torch.device("cpu"), options.parallel, fill)
    assert world.size == 1 or before == {"meta"}
    assert not opened.config.tied or model.head.weight is model.embedding.weight
    size = sum(held(p).nbytes for p in model.parameters())
    return size, {f"{n} {p.requires_grad}": whole(p.detach()).clone() for n, p in model.named_parameters()}


def in_a_group(rank, folder, size, runs, ports):
    """What each of several processes does: models as they begin, then one run after the other."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    sys.stderr = open(folder / f"stderr-{size}-{rank}", "w", buffering=1)  # noqa: SIM115
    os.environ["MASTER_PORT"] = str(ports.pop())
    with joined(60) as world:
        for name in FILLED if size == 3 else ():
            held_here, tensors = filled(folder, name, world)
            (folder / f"{name}-{rank}.bytes").write_text(str(held_here))
            if world.first:
                safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    for name, (settings, before) in runs.items():
        os.environ["MASTER_PORT"] = str(ports.pop())
        run = folder / name
        if before and rank == 0:
            cut_to(folder / before[0], before[1], folder / f"{name}-copied").rename(run)
        while before and not run.is_dir():
            time.sleep(0.01)
        train(options_of(*settings), str(folder / "rows.safetensors"), str(folder / "llama"), str(run), bool(before))
    if size == 2:
        os.environ["MASTER_PORT"] = str(ports.pop())
        (folder / f"full disk-{rank}").write_text(str(on_a_full_disk(rank, folder)))


def on_a_full_disk(rank, folder):
    """How a run ends of which process 1 cannot write its shards of the second checkpoint."""
    real = resume.write_tensors

    def full(path, tensors):
        if rank == 1 and "000002" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, tensors)

    resume.write_tensors = full
    try:
        return train(
            options_of(*SPREAD), str(folder / "rows.safetensors"), str(folder / "llama"), str(folder / "full disk")
        )
    except SftError as error:
        console.fail(str(error), error.hint)
        return int(error.code)
    except SystemExit as ended:
        return ended.code
    finally:
        resume.write_tensors = real


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    model_folder(folder / "llama", "llama", layers=1)
    model_folder(folder / "gpt2", "gpt2", layers=2)
    rows = write_turns(folder / "llama", folder / "rows.safetensors", LENGTHS)
    for name, settings in (("one", ALONE), ("one, lora", (*ALONE, *LORA))):
        train(options_of(*settings), rows, str(folder / "llama"), str(folder / name))
    for size, runs in ((3, OF_THREE), (2, OF_TWO)):
        given = (folder, size, runs, free_ports(2 + len(runs)))
        torch.multiprocessing.start_processes(in_a_group, given, nprocs=size, start_method="spawn")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FILLED)
def test_model_that_is_read_in_shares_is_the_one_that_is_read_whole(group, name):
    size, expected = filled(group, name, World())
    found = safetensors.torch.load_file(group / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) and found[n].dtype == expected[n].dtype for n in expected)
    shares = [int((group / f"{name}-{rank}.bytes").read_text()) for rank in range(3)]
    assert sum(shares) == size and max(shares) < 0.4 * size


def weights_of(run):
    (path,) = (path for path in run.rglob("*.safetensors") if path.parent.name in ("model", "adapter"))
    return TensorFiles([path])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OF_THREE, *OF_TWO])
def test_run_of_any_number_of_processes_is_that_of_one(group, name):
    expected = group / ("one, lora" if "lora" in name else "one")
    found, wanted = weights_of(group / name), weights_of(expected)
    assert_equal_gradients({n: found.read(n) for n in found}, {n: wanted.read(n) for n in wanted}, 1e-5)
    assert_close(metrics(group / name), metrics(expected), 1e-5)


@pytest.mark.slow
def test_run_ends_as_one_where_a_process_cannot_write_its_shards(group):
    assert [(group / f"full disk-{rank}").read_text() for rank in (0, 1)] == ["6", "6"]
    said = "".join((group / f"stderr-2-{rank}").read_text() for rank in (0, 1))
    assert (
        len(re.findall("error: cannot write .*step-000002/trained-00002-of-00002.safetensors: No space left", said))
        == 1
    )
    assert said.count("error:") == 1
    assert sorted(path.name for path in (group / "full disk" / "checkpoints").iterdir()) == ["latest", "step-000001"]


@pytest.mark.slow
def test_run_that_is_spread_from_here_on_says_that_bits_may_change(group):
    said = (group / "stderr-2-0").read_text()
    assert said.count('warning: train: parallel was "ddp", is "fsdp": the run goes on, but not bit for bit') == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_three_processes_resume_to_the_bytes_of_the_unbroken_run(group, name):
    assert metrics(group / f"{name}, again") == metrics(group / name)
    for ours, theirs in zip(sorted((group / f"{name}, again").rglob("*.safetensors")), sorted((group / name).rglob("*.safetensors")), strict=True):  # fmt: skip
        assert ours.read_bytes() == theirs.read_bytes(), ours


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("full", 3), ("to two", 4), ("lora", 3)])
def test_one_process_goes_on_from_the_shards_of_several(group, tmp_path, name, step):
    run = cut_to(group / name, step, tmp_path / "run")
    lora = LORA if name == "lora" else ()
    train(options_of(*ALONE, *lora), str(group / "rows.safetensors"), str(group / "llama"), str(run), resumed=True)
    expected = group / ("one, lora" if lora else "one")
    assert_close(metrics(run), metrics(expected), 1e-5)
    assert {path.name for path in (run / "checkpoints" / f"step-{step + 1:06}").iterdir()} == {
        "trained.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
    }  # fmt: skip


@pytest.mark.slow
def test_shards_of_every_process_hold_a_share_and_make_the_optimizers_tensors(group):
    folder = group / "full" / "checkpoints" / "step-000003"
    files = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert set(files) == {
        f"{stem}-0000{i}-of-00003.safetensors" for stem in ("trained", "optimizer") for i in (1, 2, 3)
    }
    alone = group / "one" / "checkpoints" / "step-000003"
    for name in ("trained", "optimizer"):
        whole = tensor_files(alone, f"{name}.safetensors")
        size = (alone / f"{name}.safetensors").stat().st_size
        assert all(0.2 * size < files[f"{name}-0000{i}-of-00003.safetensors"] < 0.45 * size for i in (1, 2, 3))
        found = tensor_files(folder, f"{name}.safetensors")
        assert {n: found.shape(n) for n in found} == {n: whole.shape(n) for n in whole}
        assert_equal_gradients(*({n: t.read(n) for n in t if n != "rng"} for t in (found, whole)), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
def test_damaged_shard_is_named_and_the_checkpoint_before_is_used(group, tmp_path, sft, capsys, number):
    run = cut_to(group / "full", 3, tmp_path / "run")
    path = run / "checkpoints" / "step-000003" / f"optimizer-0000{number}-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    listed = sft("checkpoints", run)
    assert listed.code == Exit.CHECKPOINT and [line["whole"] for line in listed.rows] == [True, True, False]
    assert str(path) in listed.rows[-1]["damage"]
    capsys.readouterr()
    train(options_of(*ALONE), str(group / "rows.safetensors"), str(group / "llama"), str(run), resumed=True)
    said = capsys.readouterr().err
    assert re.search(rf"warning: train: {re.escape(str(path))} is damaged: crc32.*; going back to step-000002", said)
    assert_close(metrics(run), metrics(group / "one"), 1e-5)


@pytest.mark.slow
def test_missing_shard_is_damage(group, tmp_path):
    run = cut_to(group / "full", 3, tmp_path / "run")
    folder = run / "checkpoints" / "step-000003"
    (folder / "trained-00002-of-00003.safetensors").unlink()
    assert re.search(r"cannot read .*trained-00002-of-00003", manifest.damage_of(folder))
    said = json.loads((folder / "manifest.json").read_text())
    del said["files"]["trained-00002-of-00003.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(said))  # not even then is a part taken for the whole
    with pytest.raises(CheckpointError, match=r"trained\.safetensors is damaged: .*tensor .* has shape"):
        train(options_of(*ALONE), str(group / "rows.safetensors"), str(group / "llama"), str(run), resumed=True)
