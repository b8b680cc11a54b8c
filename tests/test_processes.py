"""Several processes: two with half of the rows each do what one does, and end together."""

import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.multiprocessing
from conftest import ROOT
from model_fixtures import (
    CPU,
    assert_equal_gradients,
    make_row,
    make_rows,
    metrics,
    model_folder,
    random_ids,
    read_jsonl,
    steps_written,
    write_jsonl,
    write_turns,
)

from sftcli import reading
from sftcli.errors import Exit, SftError
from sftcli.model import optim
from sftcli.model.adapters import adapt
from sftcli.model.batches import micro_batches
from sftcli.model.checkpoint import add_masked_lm, load_model, open_folder
from sftcli.model.processes import World, dealt, joined, whole
from sftcli.model.training import Plan, accumulate, train_steps
from sftcli.recipe import Train
from sftcli.recipefile import apply_settings, parse
from sftcli.stages import train as stage
from sftcli.stages.train import train

LENGTHS = [12, 7, 20, 9, 15, 5, 11, 18, 6, 13, 8, 10]
LORA = ("adapter.kind=lora", "adapter.rank=4")
MODELS = {  # name -> preset, how it is spread, settings
    "full, ddp": ("llama", "ddp", ()),
    "lora, ddp": ("gpt2", "ddp", LORA),
    "full, fsdp": ("gpt2", "fsdp", ("gradient_checkpointing=true",)),
    "muon, ddp": ("llama", "ddp", ("optimizer.kind=muon",)),
    "muon, fsdp": ("llama", "fsdp", ("optimizer.kind=muon",)),
    "lora, fsdp": ("llama", "fsdp", (*LORA, "adapter.dora=true", "loss.neftune=5")),
    "pairs, ddp": ("llama", "ddp", ()),
    "prefix, fsdp": ("llama", "fsdp", ("adapter.kind=prefix", "adapter.mlp=8")),
}
RUNS = {  # name -> settings, the step after which process 1 receives SIGTERM: they end with the next one
    "whole": (("dropout=0.2",), None),
    "stopped": (("dropout=0.2",), 2),
    "to one": ((), 2),
    "sharded": (("parallel=fsdp",), None),
    "sharded, stopped": (("parallel=fsdp",), 2),
    "sharded, to one": (("parallel=fsdp",), 2),
    "adapter": (("parallel=fsdp", *LORA, "sample_rows=0", "eval_every=1"), None),
    "sampled": (("parallel=fsdp", "eval_share=0", "sample_every=1"), None),
    "sampled, stopped": (("parallel=fsdp", "eval_share=0", "sample_every=1"), 2),  # in the samples of a step
    "diverged": (("eval_share=0",), None),
}
RESUMED = ("stopped", "sharded, stopped", "sampled, stopped", "from one")  # by two processes


def options_of(*settings):
    # a large eps, or rounding in gradients near 0 would decide the sign of their updates
    given = ["batch_rows=5", "epochs=2", "optimizer.lr=3e-3", "optimizer.eps=1e-3", "sample_rows=1", "sample_tokens=3"]
    given += ["eval_share=0.2", "eval_every=3", "checkpoint_every=2", "keep=9", "process_timeout=60", *settings]
    return parse(Train, apply_settings({}, given), section="train")


def some_rows(pairs):
    if pairs:
        return [pair_row(i, n) for i, n in enumerate(LENGTHS)]
    return [
        make_row(ids := random_ids(n, i), [-100, *ids[1:]], f"r{i}", source=f"s{i % 3}", turns=[[0, 1, "user", 0], [1, n, "assistant", 1 + i % 2]])
        for i, n in enumerate(LENGTHS)
    ]  # fmt: skip


def pair_row(i, length):
    """Masked LM over two halves: every third token is scored."""
    ids = random_ids(length, i)
    labels = [token if t % 3 == 0 else -100 for t, token in enumerate(ids)]
    return make_row(
        ids, labels, f"r{i}", align="same", order=[0] * length, token_type_ids=[0] * 2 + [1] * (length - 2), next_sentence_label=i % 2
    )  # fmt: skip


def one_model(folder, name, world):
    """What a step of it takes and leaves: gradients of eight rows and of one, weights and reports of three steps."""
    preset, parallel, settings = MODELS[name]
    pairs = name.startswith("pairs")
    options, rows = options_of("batch_rows=4", "epochs=1", *settings), some_rows(pairs)
    opened = open_folder(folder / preset)
    if pairs:
        add_masked_lm(opened, True)
    model = load_model(opened)
    if options.adapter:
        adapt(model, opened.family, options.adapter, 0)
    model.gradient_checkpointing = options.gradient_checkpointing
    engine = type(CPU)(CPU.device, CPU.dtype, world)
    world.place(model, engine.device, parallel)
    model.train()
    if parallel == "ddp":  # as the search for a forward that fits does, in each process by itself
        accumulate(model, rows[:2], 30, CPU, options.loss)
        model.zero_grad(set_to_none=True)
    tensors = {}
    for count in (8, 1):
        accumulate(model, rows[:count], 30, engine, options.loss, (0, 1))
        tensors |= {f"{count}/{n}": whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    plan, lr = Plan(LENGTHS, options), 3e-3
    optimizers = optim.build(model, options.optimizer, lr)
    steps = train_steps(model, optimizers, rows.__getitem__, plan, options, engine, lr)
    reports = [{k: v for k, v in vars(report).items() if k != "seconds"} for report, _ in steps]
    weights = {f"weights/{n}": whole(p.detach()).clone() for n, p in model.named_parameters() if p.requires_grad}
    return tensors | weights, reports


def in_a_pair(rank, folder, ports):
    """What each of two processes does, all in one start of them."""
    gc.freeze()  # a run collects when it leaves its group: not all that pytest has loaded
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    sys.stderr = open(folder / f"stderr-{rank}", "w", buffering=1)  # noqa: SIM115
    os.environ["MASTER_PORT"] = str(ports.pop())
    with joined(60) as world:
        for name in MODELS:
            tensors, reports = one_model(folder, name, World(rank, 2, world.store))
            if world.first:
                safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
                (folder / f"{name}.json").write_text(json.dumps(reports))
    ended = {}
    for name, (settings, stop) in RUNS.items():
        ended[name] = one_run(folder, name, settings, rank, ports.pop(), stop)
    for name in RESUMED:
        settings = RUNS.get(name, ((), None))[0]
        ended[f"{name}, resumed"] = one_run(folder, name, settings, rank, ports.pop(), None, True)
    (folder / f"ended-{rank}.json").write_text(json.dumps(ended))


def one_run(folder, name, settings, rank, port, stop, resumed=False):
    """`sft train` in this process of the pair; how it ends. Only process 1 gets the signal."""
    os.environ["MASTER_PORT"] = str(port)
    real = stage._metrics

    def then_signal(report, evaluation):
        if report.step == stop and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(report, evaluation)

    stage._metrics = then_signal
    try:
        rows = folder / ("poison.jsonl" if name == "diverged" else "rows.safetensors")
        return train(options_of(*settings), str(rows), str(folder / "llama"), str(folder / name), resumed).sha256
    except SftError as error:
        return int(error.code)
    except SystemExit as ended:
        return ended.code
    finally:
        stage._metrics = real


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with what two processes left: models, runs, how each of them ended."""
    folder = tmp_path_factory.mktemp("pair")
    for preset in ("llama", "gpt2"):
        model_folder(folder / preset, preset, layers=2)
    write_turns(folder / "llama", folder / "rows.safetensors", LENGTHS)
    poison = make_row(random_ids(7, 9), id="poison", loss_weight=[1e39] * 7)  # infinite in float32
    write_jsonl(folder / "poison.jsonl", [*make_rows(LENGTHS), poison])
    stopped_alone(folder, options_of())
    torch.multiprocessing.start_processes(
        in_a_pair, (folder, free_ports(1 + len(RUNS) + len(RESUMED))), nprocs=2, start_method="fork"
    )
    return folder


def stopped_alone(folder, options):
    """A run of one process that ends after step 3 and that two resume."""
    real = stage._metrics
    stage._metrics = lambda report, evaluation: (report.step == 3 and os.kill(os.getpid(), signal.SIGTERM)) or real(report, evaluation)  # fmt: skip
    try:
        train(options, str(folder / "rows.safetensors"), str(folder / "llama"), str(folder / "from one"))
    except SftError as error:
        assert error.code == 143
    finally:
        stage._metrics = real


def ended(folder, rank):
    return json.loads((folder / f"ended-{rank}.json").read_text())


def assert_close(found, expected, tolerance):
    """Numbers in lists and dicts, equal up to a relative tolerance; anything else equal."""
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key in expected:
            assert_close(found[key], expected[key], tolerance)
    elif isinstance(expected, list):
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, tolerance)
    else:
        assert found == (pytest.approx(expected, rel=tolerance) if isinstance(expected, float) else expected)


# ---- one step


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_with_half_of_the_rows_train_what_one_does(pair, name):
    expected, reports = one_model(pair, name, World())
    found = safetensors.torch.load_file(pair / f"{name}.safetensors")
    for part in ("8", "1", "weights"):  # 1: there is no row for the second process

        def of_part(tensors, part=part):
            return {key: value for key, value in tensors.items() if key.startswith(f"{part}/")}

        assert of_part(expected)
        assert_equal_gradients(of_part(found), of_part(expected), 1e-6)
    assert_close(json.loads((pair / f"{name}.json").read_text()), json.loads(json.dumps(reports)), 1e-5)


def test_loss_that_is_not_finite_in_one_process_stops_both_before_the_weights_change(pair):
    assert ended(pair, 0)["diverged"] == ended(pair, 1)["diverged"] == Exit.DIVERGED
    lines = read_jsonl(pair / "diverged" / "metrics.jsonl")
    assert [line.get("finite", True) for line in lines] == [True] * (len(lines) - 1) + [False]
    kept = read_jsonl(pair / "diverged" / f"diverged-step-{len(lines)}.jsonl")
    assert "poison" in {row["id"] for row in kept} and len(kept) == 5


def test_rows_are_dealt_by_their_tokens_each_to_one_process():
    rows = make_rows([40, 3, 3, 3, 30, 8, 2, 1], seed=3)
    shares = dealt(rows, 3)
    assert Counter(row.id for share in shares for row in share) == Counter(row.id for row in rows)
    assert sorted(sum(len(row.input_ids) for row in share) for share in shares) == [20, 30, 40]
    assert dealt(rows, 3) == shares


@pytest.mark.parametrize(("count", "limit"), [(12, 25), (3, 1000), (1, 5), (7, 1)])
def test_every_process_has_as_many_forwards(count, limit):
    rows = make_rows(LENGTHS[:count])
    shares = [World(rank, 4).micro_batches(rows, limit) for rank in range(4)]
    assert len({len(share) for share in shares}) == 1
    there = [row.id for share in shares for part in share for row in part]
    assert sorted(there) == sorted(row.id for row in rows)


def test_one_process_has_the_micro_batches_that_it_had():
    rows = make_rows([9, 5, 9, 2, 5, 9])
    assert World().micro_batches(rows, 14) == list(micro_batches(rows, 14))


def test_dropout_is_seeded_by_process_and_step_and_alone_as_ever():
    seeds = [World(rank, 8).seed((7 << 32) + step) for rank in range(8) for step in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert World().seed(5) == World(0, 8).seed(5) == 5


# ---- a run


def names_in(run):
    """Names of all files, those of shards as if they were whole."""
    return {re.sub(r"-0000\d-of-00002", "", str(path.relative_to(run))) for path in run.rglob("*")}


def test_what_a_run_of_two_leaves_is_what_one_leaves(pair, tmp_path):
    for name in ("sharded", "adapter"):
        settings = [s for s in RUNS[name][0] if s != "parallel=fsdp"]
        run = tmp_path / name
        train(options_of(*settings), str(pair / "rows.safetensors"), str(pair / "llama"), str(run))
        assert names_in(run) == names_in(pair / name)
        assert_close(metrics(pair / name), metrics(run), 1e-4)
        if name == "sharded":
            assert (pair / name / "samples.jsonl").read_bytes() == (run / "samples.jsonl").read_bytes()
        (weights,) = [p.relative_to(run) for p in run.rglob("*.safetensors") if "checkpoints" not in p.parts]
        found, expected = (safetensors.torch.load_file(folder / weights) for folder in (pair / name, run))
        assert_equal_gradients(found, expected, 1e-5)


def test_both_processes_end_alike_and_by_one_signal(pair):
    first, second = ended(pair, 0), ended(pair, 1)
    assert first == second
    for name, (_, stop) in RUNS.items():
        if stop:
            assert first[name] == 143, name
            assert reading.read_json(pair / name / "checkpoints" / "step-000003" / "state.json")["step"] == 3
        elif name != "diverged":
            assert re.fullmatch("[0-9a-f]{12}", str(first[name])), name


def test_only_the_first_process_talks(pair):
    said = (pair / "stderr-0").read_text()
    assert said.count("train: resuming after step 3\n") == len(RESUMED)
    assert "2 processes (ddp)" in said and "2 processes (fsdp)" in said
    assert "train" not in (pair / "stderr-1").read_text()


@pytest.mark.parametrize(
    ("stopped", "whole"), [("stopped", "whole"), ("sharded, stopped", "sharded"), ("sampled, stopped", "sampled")]
)
def test_stopped_pair_resumes_to_the_weights_of_the_unbroken_one(pair, stopped, whole):
    assert ended(pair, 0)[f"{stopped}, resumed"] == ended(pair, 0)[whole]
    assert metrics(pair / stopped) == metrics(pair / whole)
    assert (pair / stopped / "samples.jsonl").read_bytes() == (pair / whole / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["to one", "sharded, to one", "from one"])
def test_run_goes_on_with_another_number_of_processes_and_says_that_bits_may_change(pair, tmp_path, capsys, name):
    options = options_of(*RUNS.get(name, ((), None))[0])
    base, rows = str(pair / "llama"), str(pair / "rows.safetensors")
    train(options, rows, base, str(tmp_path / "whole"))
    if name == "from one":
        said = (pair / "stderr-0").read_text()
        resumed = pair / name
    else:
        resumed = tmp_path / "resumed"
        shutil.copytree(pair / name, resumed)
        capsys.readouterr()
        train(options, rows, base, str(resumed), resumed=True)
        said = capsys.readouterr().err
    assert re.search(r"warning: train: .*processes was \d, is \d.*not bit for bit", said)
    assert_close(metrics(resumed), metrics(tmp_path / "whole"), 1e-5)


# ---- the command


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A base and rows in the working folder, and what `sft train` is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    model_folder(tmp_path / "base", "llama", layers=2)
    write_turns(tmp_path / "base", tmp_path / "rows.safetensors", LENGTHS)
    settings = ("batch_rows=3", "sample_rows=0", "checkpoint_every=1", "process_timeout=20", "epochs=40")
    return ["train", "rows.safetensors", "-m", "base", "-o", "run", *(w for s in settings for w in ("--set", s))]


def begun(command, **env):
    """A process of `sft COMMAND`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.Popen([sys.executable, "-m", "sftcli", *command], env=environment, stderr=subprocess.PIPE, text=True)  # fmt: skip


def wait_for_steps(process, count, run="run"):
    deadline = time.monotonic() + 90
    while steps_written(run) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)


def children(process):
    """Pids of the processes that the launcher started, by rank."""
    pids = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent_of(pid) == process.pid]
    return {int(re.search(rb"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())[1]): pid for pid in pids}


def parent_of(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_killed_process_is_named_the_others_end_and_the_run_resumes_bit_for_bit(small, parallel):
    small = [*small, "--set", f"parallel={parallel}"]
    whole = begun([*small[:5], "whole", *small[6:], "--nproc", "2"])
    assert whole.wait(90) == 0, whole.stderr.read()
    process = begun([*small, "--nproc", "2"])
    wait_for_steps(process, 5)
    os.kill(children(process)[1], signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == Exit.FAILURE
    assert "rank 1 was killed (SIGKILL)" in said and "Traceback" not in said
    process = begun([*small, "--nproc", "2", "--resume"])
    said = process.communicate(timeout=90)[1]
    assert process.returncode == 0, said
    assert said.count("wrote run/model") == 1 and "[rank" not in said
    assert metrics("run") == metrics("whole")
    assert Path("run/model/model.safetensors").read_bytes() == Path("whole/model/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_without_a_launcher_the_living_process_names_the_dead_one(small, dead):
    (port,) = free_ports(1)
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [begun([*small, "--set", "epochs=4000"], RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in (0, 1)]
    wait_for_steps(both[0], 3)
    both[dead].kill()
    said = both[1 - dead].communicate(timeout=60)[1]
    assert both[1 - dead].returncode == Exit.FAILURE
    told = said.splitlines()[-1]
    assert f"error: rank {dead} is gone" in told and told.startswith("[rank 1]") == (dead == 0)
    assert "Traceback" not in said
    both[dead].communicate()


@pytest.mark.slow
def test_terminated_launcher_leaves_a_checkpoint_of_the_last_step_and_exits_143(small):
    process = begun([*small, "--nproc", "2", "--set", "epochs=4000"])
    wait_for_steps(process, 3)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    steps = len(metrics("run"))
    assert said.count(f"stopped after step {steps} of") == 1 and "Traceback" not in said
    assert Path("run/checkpoints", f"step-{steps:06}").is_dir()
    typed = reading.read_json(Path("run/run.json"))["command"]
    assert typed[1:] == [*small, "--nproc", "2", "--set", "epochs=4000"]
    assert not [path for path in Path("tmp").iterdir() if not path.name.startswith("torch")]


@pytest.mark.slow
def test_second_interrupt_ends_all_processes_at_once_and_the_run_resumes(small):
    process = begun([*small, "--nproc", "2", "--set", "epochs=4000", "--set", "process_timeout=600"])
    wait_for_steps(process, 3)
    workers = children(process)
    os.kill(workers[1], signal.SIGSTOP)  # so that the first one waits for it
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    assert process.stderr.read().count("error") == 0
    assert not any(lives(pid) for pid in workers.values()) and not list(Path("tmp").glob("sft-*"))
    process = begun([*small, "--nproc", "2", "--resume", "--set", "epochs=4000"])
    wait_for_steps(process, 8)
    process.send_signal(signal.SIGINT)
    assert process.wait(25) == 130


@pytest.mark.slow
def test_rows_come_through_a_pipe_and_their_error_is_said_once(small):
    lines = write_jsonl(Path("rows.jsonl"), make_rows(LENGTHS))
    command = ["train", "-", *small[2:], "--nproc", "2", "--set", "epochs=1"]
    with open(lines) as file:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-m", "sftcli", *command], stdin=file, capture_output=True, env=environment, timeout=90)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"received 12 rows") == 1
    command.append("--overwrite")  # the run is finished
    done = subprocess.run([sys.executable, "-m", "sftcli", *command], input=b'{"id": 1', capture_output=True, env=environment, timeout=90)  # fmt: skip
    assert done.returncode == Exit.DATA
    assert done.stderr.count(b"error:") == 1 and b"<stdin>:1" in done.stderr


@pytest.mark.slow
def test_recipe_trains_in_two_processes(small, sft):
    data = ROOT / "data" / "samples" / "qa.jsonl"
    Path("recipe.yaml").write_text(
        f"init: {{data: {data}, columns: 'prompt=question,completion=answer', layers: 1, heads: 2, width: 16}}\n"
        f"tokenize: {{data: {data}, columns: 'prompt=question,completion=answer'}}\n"
        "train: {nproc: 2, max_steps: 2, sample_rows: 0}\n"
    )
    process = begun(["run", "recipe.yaml", "-o", "whole"])
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "2 processes (ddp)" in said and len(metrics("whole")) == 2
    again = sft("run", "recipe.yaml", "-o", "whole")
    assert again.code == 0 and "train: nothing has changed" in again.err
