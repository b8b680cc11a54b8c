"""What older code has computed and saved: the same losses again, and its checkpoints go on (tests/make_golden.py)."""

import json
import shutil

import pytest
import torch
from make_golden import CHECKPOINT, HELD, LOSSES, golden_run, tag


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def expected_losses():
    """(losses, how near they must be): this platform's own to the bit, else another's."""
    known = {name: [float.fromhex(text) for text in texts] for name, texts in json.loads(LOSSES.read_text()).items()}
    return (known[tag()], 0) if tag() in known else (next(iter(known.values())), 1e-6)


def test_a_hundred_losses_are_those_of_the_golden_file(one_thread, tmp_path):
    expected, tolerance = expected_losses()
    found = golden_run(tmp_path / "run", 100)
    assert len(found) == len(expected) == 100
    assert found == pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.parametrize("checkpoint", sorted(CHECKPOINT.parent.glob("checkpoint-*")), ids=lambda path: path.name)
def test_an_older_checkpoint_goes_on(one_thread, tmp_path, capsys, checkpoint):
    assert sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) < 100_000
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run)
    found = golden_run(run, 12, resumed=True)
    assert f"resuming after step {HELD}" in capsys.readouterr().err
    whole = golden_run(tmp_path / "whole", 12)
    assert found == pytest.approx(whole, rel=1e-6, abs=0)  # the code that began it rounded otherwise
