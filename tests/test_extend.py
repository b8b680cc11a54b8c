"""sft init --base: new control tokens for a model, its old logits bit for bit."""

import json

import pytest
import torch
from conftest import chat
from model_fixtures import model_folder, model_of, random_ids, row_logits

from sftcli.model.checkpoint import open_folder
from sftcli.text.folder import load_codec, stop_ids

IDS = random_ids(17, 3)


@pytest.fixture
def old(tmp_path):
    """A base whose tokenizer knows nothing of chatml."""
    return lambda **sizes: model_folder(tmp_path / "old", "llama", template="plain", layers=2, **sizes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 5])
def test_old_tokens_keep_their_logits_and_new_ones_get_the_mean(sft, old, tmp_path, tied, spare):
    base = old(tied=tied)
    size = load_codec(base).size
    if spare:
        _pad(base, spare)
    result = sft("init", "--base", base, "--template", "chatml", "-o", tmp_path / "new")
    assert result.code == 0, result.err
    before, after = model_of(base), model_of(tmp_path / "new")
    assert torch.equal(row_logits(after, IDS)[:, :size], row_logits(before, IDS)[:, :size])
    new = load_codec(tmp_path / "new").added
    assert [new["<|im_start|>"], new["<|im_end|>"]] == [size, size + 1]
    for weight, known in ((after.embedding.weight, before.embedding.weight), (after.head.weight, before.head.weight)):
        expected = known[:size].mean(0).expand(2, -1)
        torch.testing.assert_close(weight[size : size + 2], expected, atol=1e-7, rtol=0)
    assert open_folder(tmp_path / "new").config.vocab_size == max(size + 2, size + spare)
    assert stop_ids(tmp_path / "new")[0] == size + 1


def _pad(folder, count):
    """Rows of the embedding that no token has."""
    from sftcli.model.checkpoint import save_model
    from sftcli.stages.extend import _fill_rows

    model, opened = model_of(folder), open_folder(folder)
    size = model.config.vocab_size
    _fill_rows(model, [size + count - 1], size)
    opened.json["vocab_size"] = size + count
    save_model(model, opened, folder)


def test_new_tokens_are_encoded_and_trained(sft, old, tmp_path, lines):
    new = tmp_path / "new"
    assert sft("init", "--base", old(), "--template", "chatml", "-o", new).code == 0
    data = lines(chat("How many?", "12 rivers."), chat("A river?", "The Danube."))
    refused = sft("tokenize", data, "-m", tmp_path / "old", "--template", "chatml")
    assert refused.code == 2 and "sft init --base" in refused.err
    tokens = sft("tokenize", data, "-m", new)
    assert tokens.code == 0, tokens.err
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(sft("mask", "-", stdin=tokens.out).out)
    settings = ("--adapter", "lora", "--max-steps", 1, "--set", "sample_rows=0")
    frozen = sft("train", rows, "-m", new, "-o", tmp_path / "a", *settings)
    assert frozen.code == 0 and "has not learned <|im_start|>" in frozen.err
    whole = ("--set", "adapter.modules_to_save=[embed_tokens,lm_head]")
    trained = sft("train", rows, "-m", new, "-o", tmp_path / "b", *settings, *whole)
    assert trained.code == 0 and "has not learned" not in trained.err


def test_a_base_that_knows_its_tokens_is_not_warned_of(sft, tmp_path, lines):
    base = model_folder(tmp_path / "base", "llama", layers=1)
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(sft("mask", "-", stdin=sft("tokenize", lines(chat("a", "b")), "-m", base).out).out)
    result = sft("train", rows, "-m", base, "-o", tmp_path / "a", "--adapter", "lora", "--max-steps", 1)
    assert result.code == 0 and "has not learned" not in result.err


def test_transformers_loads_the_wider_model(sft, old, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    assert sft("init", "--base", old(tied=False), "--template", "chatml", "-o", tmp_path / "new").code == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32).eval()
    codec = load_codec(tmp_path / "new")
    ids = [*IDS, codec.added["<|im_end|>"]]
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(row_logits(model_of(tmp_path / "new"), ids), logits, atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.eos_token_id == codec.added["<|im_end|>"]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert asked.startswith("<|im_start|>")


def test_output_that_is_the_base_is_refused(sft, old):
    base = old()
    assert sft("init", "--base", base, "--template", "chatml", "-o", base).code == 2
    assert json.loads((base / "config.json").read_text())["vocab_size"] == load_codec(base).size
