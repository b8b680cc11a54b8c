"""Model folders and adapters that do not fit together: one line, exit 5, before memory is taken."""

import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from model_fixtures import make_rows, model_folder, write_jsonl

from sftcli.errors import CheckpointError, Exit, SftError
from sftcli.model.checkpoint import load_model, open_folder, save_model
from sftcli.model.tensorfile import INDEX, WEIGHTS
from sftcli.writing import json_line


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def folder(tmp_path):
    return model_folder(tmp_path / "m", "llama")


@pytest.fixture
def prompts(tmp_path):
    return write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Name a river."}])


def refuses(sft, code, words, *command):
    done = sft(*map(str, command))
    assert done.code == code, done.err
    lines = [line for line in done.err.splitlines() if line]
    assert len(lines) <= 2 and "Traceback" not in done.err
    for word in words:
        assert word in done.err
    return done


def test_weights_of_another_name_are_not_taken_for_none(sft, folder, prompts):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    words = ["model-00001-of-00001.safetensors", INDEX]
    refuses(sft, Exit.CHECKPOINT, words, "generate", prompts, "-m", folder)
    rows = write_jsonl(folder.parent / "rows.jsonl", [json.loads(json_line(row)) for row in make_rows([5])])
    refuses(sft, Exit.CHECKPOINT, words, "train", rows, "-m", folder, "-o", folder.parent / "run")


def test_one_file_goes_before_shards_beside_it_as_in_transformers(folder, tmp_path):
    model = load_model(open_folder(folder))
    with torch.no_grad():
        model.norm.weight.mul_(2)
    save_model(model, open_folder(folder), tmp_path / "cut", shard_size="20KB")
    shutil.copy(folder / WEIGHTS, tmp_path / "cut" / WEIGHTS)
    found = load_model(open_folder(tmp_path / "cut")).norm.weight
    assert torch.equal(found, load_model(open_folder(folder)).norm.weight) and not torch.equal(found, model.norm.weight)


def test_numbers_beyond_float16_are_refused_rather_than_made_infinite(folder, tmp_path):
    model = load_model(open_folder(folder))
    with torch.no_grad():
        model.norm.weight[0] = 1e6
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has numbers too large for float16"):
        save_model(model, open_folder(folder), tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()


def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused_everywhere(sft, folder, prompts, tmp_path):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:100].clone()
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    change(folder / "config.json", vocab_size=100)
    rows = write_jsonl(tmp_path / "rows.jsonl", [json.loads(json_line(row)) for row in make_rows([5])])
    words = ["tokens, its embedding", "100 rows"]
    for command in (["tokenize", prompts], ["generate", prompts], ["check", prompts], ["train", rows, "-o", tmp_path]):
        refuses(sft, Exit.CHECKPOINT, words, *command, "-m", folder)


@pytest.mark.parametrize(
    "values",
    [
        {"rms_norm_eps": -1.0},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": 1e308},
        {"rope_scaling": {"type": "linear", "factor": 0}},
        {"rope_scaling": {"type": "dynamic", "factor": -2}},
        {"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": -3}},
        {"rope_scaling": {"type": "yarn", "factor": 4, "mscale": "x", "mscale_all_dim": 1}},
        {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        {"rope_scaling": {"type": "longrope", "short_factor": [0, 1, 1, 1], "long_factor": [1, 1, 1, 1]}},
        {"partial_rotary_factor": 1e308},
        {"num_hidden_layers": 10_000},
        {"num_hidden_layers": 1 << 60},
        {"max_position_embeddings": -5},
    ],
    ids=str,
)
def test_switches_that_make_no_sense_are_refused_by_name(folder, values):
    change(folder / "config.json", rope_parameters=None, **values)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_huge_count_of_attention_types_is_refused_at_once(folder):
    change(
        folder / "config.json",
        model_type="gpt_neo",
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 1 << 40]],
    )
    with pytest.raises(CheckpointError, match="attention_types"):
        open_folder(folder)


def test_an_empty_added_token_is_refused(sft, folder, prompts):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 299, "content": ""})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SftError):
        from sftcli.text.folder import load_codec

        load_codec(folder)


def test_a_broken_template_of_the_model_itself_is_exit_5(sft, folder, prompts):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}")
    refuses(sft, Exit.CHECKPOINT, ["template"], "tokenize", prompts, "-m", folder)


def test_out_of_memory_of_torch_is_exit_7(sft, folder, prompts, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr("sftcli.stages.generate.load_trained", full)
    refuses(sft, Exit.MEMORY, ["out of memory"], "generate", prompts, "-m", folder)


def test_merging_and_extending_never_replace_a_folder_that_holds_something(sft, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    refuses(sft, Exit.USAGE, ["holds something else"], "init", "--base", folder, "--template", "chatml", "-o", other)
    assert (other / "config.json").read_text() == "{}"


def test_output_through_a_link_writes_the_file_behind_it(sft, folder, prompts, tmp_path):
    (tmp_path / "real.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert sft("tokenize", prompts, "-m", str(folder), "-o", str(tmp_path / "link.jsonl")).code == 0
    assert (tmp_path / "link.jsonl").is_symlink() and (tmp_path / "real.jsonl").read_text() != "old"
    assert sft("tokenize", prompts, "-m", str(folder), "-o", "/dev/null").code == 0
    assert not os.path.isfile("/dev/null")
