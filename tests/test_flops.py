"""FLOP of a step: as torch counts them while it runs, less what attention masks."""

from types import SimpleNamespace

import pytest
import torch
from model_fixtures import CPU, make_model, make_rows
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from sftcli.model.adapters import adapt
from sftcli.model.checkpoint import open_folder
from sftcli.model.flops import PEAKS, Work, peak_of, seen_by_all, work_of
from sftcli.model.training import Engine, accumulate
from sftcli.recipe import Lora
from sftcli.stages import finishing as stage

LENGTHS = (6, 9, 6, 14)
IN_PLACE = {torch.ops.aten.addmm_: lambda own, a, b, **_: mm_flop(a, b)}  # which torch's counter leaves out


def counted(model, rows):
    """FLOP of a step's products with weights (torch's counter does not know of attention on CPUs)."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        accumulate(model, rows, 10**6, CPU)
    return counter.get_total_flops()


@pytest.mark.parametrize("preset", ["llama", "gpt2"])
def test_products_of_a_full_step_are_those_that_torch_counts(preset, tmp_path):
    model, rows = make_model(tmp_path / "m", preset), make_rows(LENGTHS, prompt=0, align="same")
    work, products = work_of(model), counted(model, rows)
    assert (work.token + work.label) * sum(LENGTHS) == products
    # of every pair, head and layer: scores and a sum of values forward, the gradients of four factors backward
    pair = 3 * 4 * (2 + 4) * 2 * 8
    assert work.of(LENGTHS, sum(LENGTHS)) == products + pair * sum(n * (n + 1) // 2 for n in LENGTHS)


def test_products_of_an_adapters_step_are_those_that_torch_counts_but_for_the_first_layers_input(tmp_path):
    model, rows = make_model(tmp_path / "m", "llama"), make_rows(LENGTHS, prompt=0, align="same")
    adapt(model, open_folder(tmp_path / "m").family, Lora(rank=2), 0)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p)
    first = model.blocks[0].attention
    left = sum(2 * m.weight.numel() + 2 * m.lora_A.numel() for m in (first.q, first.k, first.v))
    work = work_of(model)
    products = counted(model, rows)
    assert (work.token + work.label) * sum(LENGTHS) == products + left * sum(LENGTHS)


def test_layers_below_the_first_adapter_only_go_forward(tmp_path):
    model = make_model(tmp_path / "m", "llama")
    frozen = work_of(model.requires_grad_(False))
    weights = sum(p.numel() for name, p in model.blocks.named_parameters() if p.ndim == 2)
    assert frozen.token == 2 * weights
    adapt(model, open_folder(tmp_path / "m").family, Lora(layers=[2]), 0)
    last = sum(p.numel() for name, p in model.blocks[2].named_parameters() if p.ndim == 2 and "lora" not in name)
    added = sum(p.numel() for name, p in model.blocks[2].named_parameters() if "lora" in name)
    work = work_of(model)
    assert work.token == 2 * weights + 2 * last + 6 * added
    assert [flop for flop, _ in work.sight] == [
        flop * scale for (flop, _), scale in zip(frozen.sight, (1, 1, 3), strict=True)
    ]


@pytest.mark.parametrize("length", [1, 2, 5, 8])
@pytest.mark.parametrize("window", [None, 1, 3, 8])
def test_pairs_are_counted_as_one_would(length, window):
    reach = window or length
    assert seen_by_all(length, window) == sum(1 for i in range(length) for j in range(i + 1) if i - j < reach)


def test_windows_count_what_they_let_see():
    assert Work(0, 0, ((10, None), (1, 2))).of([3, 1], 0) == 10 * (6 + 1) + (5 + 1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA RTX A1000", None),
        ("Tesla T4", None),
    ],
)
def test_peak_is_that_of_the_devices_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(torch.device("cuda")) == peak
    assert peak_of(torch.device("cpu")) is None


@pytest.mark.parametrize(("dtype", "told"), [(torch.bfloat16, " (25% of the GPU's FLOP/s)"), (torch.float32, "")])
def test_a_run_tells_its_share_of_all_its_gpus(dtype, told, monkeypatch):
    monkeypatch.setattr(stage, "peak_of", lambda device: 1e12)
    engine = Engine(torch.device("cpu"), dtype, SimpleNamespace(size=2))
    job = SimpleNamespace(engine=engine, outcome=SimpleNamespace(flop=2e12, seconds=4.0))
    assert stage._of_peak(job) == told


def test_no_name_hides_a_longer_one():
    names = list(PEAKS)
    for i, name in enumerate(names):
        assert not any(name in later for later in names[i + 1 :] if later.startswith(f"{name} "))
