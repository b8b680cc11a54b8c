"""Every family against logits that transformers gave once (tests/make_frozen.py): no oracle needs to be installed."""

import json
from functools import cache

import pytest
import safetensors.torch
import torch
from family_cases import FAMILIES, older, write_config
from make_frozen import CONFIGS, TENSORS
from model_fixtures import model_of, row_logits

from sftcli.model.families import FAMILIES as SUPPORTED


@cache
def frozen():
    return json.loads(CONFIGS.read_text()), safetensors.torch.load_file(TENSORS)


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tmp_path):
    """The folder of a frozen checkpoint, the ids and the logits expected of it."""
    told, tensors = frozen()
    prefix = f"{request.param}/"
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    expected = own.pop("")
    safetensors.torch.save_file(own, tmp_path / "model.safetensors")
    write_config(tmp_path, told["configs"][request.param])
    return tmp_path, told["ids"], expected


def test_every_family_is_frozen():
    assert set(SUPPORTED) - {"bert"} == set(FAMILIES) == set(frozen()[0]["configs"])  # bert: test_bert.py


def test_logits_equal_frozen_ones(checkpoint):
    folder, ids, expected = checkpoint
    torch.testing.assert_close(row_logits(model_of(folder), ids), expected, atol=1e-5, rtol=0)
    assert float(expected.std()) > 0.3


def test_logits_of_the_older_configuration_equal_frozen_ones(checkpoint):
    folder, ids, expected = checkpoint
    write_config(folder, older(json.loads((folder / "config.json").read_text())))
    torch.testing.assert_close(row_logits(model_of(folder), ids), expected, atol=1e-5, rtol=0)
