"""Model folders from anywhere: each trap is exit 5 in one line, soon, and `sft check FOLDER` names the file."""

import json
import shutil
import struct
import time

import pytest
import safetensors.torch
import torch
from conftest import write_lines
from model_fixtures import model_folder

from sftcli.artifacts import text_folder
from sftcli.errors import CheckpointError
from sftcli.model.checkpoint import open_folder
from sftcli.model.tensorfile import INDEX, WEIGHTS
from sftcli.stages.common import codec_for, template_for
from sftcli.tensorheader import read_header
from sftcli.writing import atomic_file


@pytest.fixture
def folder(tmp_path):
    return model_folder(tmp_path / "m", "llama")


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "p.jsonl", {"prompt": "Name a river."})


def verdicts(result):
    """{file: mark} of what `sft check FOLDER` prints."""
    return {line.split()[1]: line.split()[0] for line in result.out.decode().splitlines()}


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length].decode(), data[8 + length :]


def with_header(path, header, rest=None):
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + (header_of(path)[1] if rest is None else rest))


def refused(sft, folder, prompts, *told):
    """`generate` refuses the folder with exit 5 and one line, and little memory."""
    result = sft("generate", prompts, "-m", folder)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 5 and len(errors) == 1 and "Traceback" not in result.err, result.err
    assert all(word in errors[0] for word in told), errors[0]


def twice(header):
    name, said = next((n, s) for n, s in json.loads(header).items() if n != "__metadata__")
    return f"{header.rstrip().removesuffix('}')},{json.dumps(name)}:{json.dumps(said)}}}"


def altered(**values):
    """A change of the first tensor's entry."""

    def made(header):
        entries = json.loads(header)
        first = next(name for name in entries if name != "__metadata__")
        entries[first] |= values
        return json.dumps(entries)

    return made


HEADERS = {
    "a key twice": twice,
    "a type that there is not": altered(dtype="F77"),
    "a negative shape": altered(shape=[-1, 4]),
    "a shape beyond any number": altered(shape=[1 << 62, 1 << 62]),
    "an overlap": altered(data_offsets=[0, 16]),
    "offsets that go back": altered(data_offsets=[64, 0]),
    "offsets behind the end": altered(data_offsets=[1 << 40, 1 << 41]),
    "a list for a tensor": lambda header: json.dumps(json.loads(header) | {"x": [1]}),
    "no JSON": lambda header: header[:-9],
    "nested deeply": lambda header: '{"a":' * 20_000,
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_only_the_file_that_is_damaged_is_told_so(sft, folder, name):
    (folder / name).write_text("[1]" if name == "tokenizer.json" else "{")
    found = verdicts(sft("check", folder))
    assert [file for file, mark in found.items() if mark == "UNSAFE"] == [name]


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(sft, folder, prompts, name):
    assert verdicts(sft("check", folder))[WEIGHTS] == "ok"
    with_header(folder / WEIGHTS, HEADERS[name](header_of(folder / WEIGHTS)[0]))
    refused(sft, folder, prompts, WEIGHTS)
    checked = sft("check", folder)
    assert checked.code == 5 and verdicts(checked)[WEIGHTS] == "UNSAFE"


@pytest.mark.parametrize("length", [0, 7, 1 << 27, 1 << 40, (1 << 64) - 1])
def test_a_header_that_is_too_long_or_missing_is_refused(sft, folder, prompts, length):
    rest = header_of(folder / WEIGHTS)[1]
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + rest)
    refused(sft, folder, prompts, WEIGHTS)
    assert verdicts(sft("check", folder))[WEIGHTS] == "UNSAFE"


@pytest.mark.parametrize("dtype", safetensors.torch._SIZE, ids=str)
def test_a_header_of_any_type_that_the_library_writes_is_read(tmp_path, dtype):
    path = tmp_path / "t.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(16, dtype=torch.uint8).view(dtype)}, path, {"made": "here"})
    with open(path, "rb") as file:
        tensors, metadata, begin = read_header(file, path)
    assert list(tensors) == ["a"] and metadata == {"made": "here"} and begin == path.stat().st_size - 16


def test_a_hole_and_bytes_behind_the_end_are_refused(sft, folder, prompts):
    header, rest = header_of(folder / WEIGHTS)
    with_header(folder / WEIGHTS, header, rest + b"\0" * 64)
    refused(sft, folder, prompts, WEIGHTS)
    assert verdicts(sft("check", folder))[WEIGHTS] == "UNSAFE"


NAMES = ["../m/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a\0b", 5, None, ["a"], "none.safetensors", "..\\up"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_an_index_names_files_of_its_own_folder_only(sft, folder, prompts, name):
    (folder / "sub").mkdir()
    (folder / WEIGHTS).rename(folder / "sub" / WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(sft, folder, prompts)
    if name not in ("none.safetensors", "..\\up", "", "..", "."):
        assert verdicts(sft("check", folder))[INDEX] == "UNSAFE"


def test_a_shard_may_be_a_link_as_in_the_cache_of_the_hub(sft, folder, prompts):
    (folder / WEIGHTS).rename(folder.parent / "blob")
    (folder / WEIGHTS).symlink_to(folder.parent / "blob")
    assert sft("generate", prompts, "-m", folder, "--max-new-tokens", 1).code == 0
    assert verdicts(sft("check", folder))[WEIGHTS] == "ok"


SIZES = [
    {"num_hidden_layers": 10**6},
    {"hidden_size": 1 << 40},
    {"vocab_size": 1 << 50},
    {"intermediate_size": 1 << 45},
]
SIZES += [{"hidden_size": 1 << 18, "intermediate_size": 1 << 20, "num_hidden_layers": 1000, "head_dim": 64}]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("weights", [True, False])
def test_a_config_that_asks_for_too_much_is_refused_at_once(folder, sizes, weights):
    change(folder / "config.json", **sizes)
    if not weights:
        (folder / WEIGHTS).unlink()
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_folder(folder)  # before any tensor is made
    assert time.process_time() - start < 1


# ---- what could run


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_never_read(sft, folder, prompts, name):
    bomb = b"cos\nsystem\n(S'touch " + str(folder / "owned").encode() + b"'\ntR."
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(bomb)
    refused(sft, folder, prompts, name, "a pickle, which can run code")
    checked = sft("check", folder)
    assert checked.code == 5 and verdicts(checked)[name] == "UNSAFE" and not (folder / "owned").exists()


def test_code_beside_a_model_is_named_and_never_run(sft, folder, prompts):
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(folder / 'owned')!r}, 'w')")
    result = sft("generate", prompts, "-m", folder, "--max-new-tokens", 1)
    assert result.code == 0
    assert result.err.count(f"warning: {folder} brings code of its own (auto_map), which is not run") == 1
    found = verdicts(sft("check", folder))
    assert (found["config.json"], found["evil.py"]) == ("note", "note") and not (folder / "owned").exists()


def test_check_of_a_folder_names_templates_and_links_to_nothing(sft, folder):
    template = template_for(codec_for(str(folder), None), str(folder), None, None, {})
    assert f"template {template.hash}; it runs in a sandbox" in sft("check", folder).out.decode()
    (folder / "chat_template.jinja").write_text("{% for %}")
    (folder / "lost.json").symlink_to(folder / "nowhere")
    (folder / "bad.json").write_text("[1")
    checked = sft("check", folder)
    found = verdicts(checked)
    assert checked.code == 5 and "Traceback" not in checked.err
    assert {found[name] for name in ("chat_template.jinja", "lost.json", "bad.json")} == {"UNSAFE"}


def test_a_template_that_reads_files_cannot(sft, folder, prompts):
    (folder / "chat_template.jinja").write_text("{% include '/etc/passwd' %}")
    result = sft("tokenize", prompts, "-m", text_folder(str(folder)))
    assert result.code == 3 and "template of" in result.err and "root:" not in result.err


# ---- where we write


def test_a_temporary_file_is_never_written_through_a_link(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)
    (tmp_path / ".tmp-out.jsonl-00000000").symlink_to(victim)
    with pytest.raises(Exception, match="cannot write"), atomic_file(tmp_path / "out.jsonl") as file:
        file.write(b"x")
    assert victim.read_text() == "kept"


def test_tokens_of_the_hub_are_never_written(sft, folder, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretindeed")
    rows = sft("mask", "-o", tmp_path / "r.jsonl", stdin=sft("tokenize", write_lines(tmp_path / "c.jsonl", {"prompt": "a", "completion": "b"}), "-m", folder).out)  # fmt: skip
    assert rows.code == 0
    result = sft("train", tmp_path / "r.jsonl", "-m", folder, "-o", tmp_path / "run", "--max-steps", 1)
    assert result.code == 0 and "verysecret" not in result.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(b"verysecret" in path.read_bytes() for path in files)


# ---- the guards of conftest.py are there


def test_the_suite_would_see_a_pickle_or_a_connection(monkeypatch):
    import pickle
    import socket

    namespace = {"__name__": "sftcli.evil", "pickle": pickle}
    exec("def load(data): return pickle.loads(data)", namespace)
    with pytest.raises(AssertionError, match="pickle.loads was called"):
        namespace["load"](pickle.dumps(1))
    assert pickle.loads(pickle.dumps(1)) == 1  # a test itself may
    with pytest.raises(AssertionError, match="a connection to"), socket.socket() as one:
        one.connect(("192.0.2.1", 80))


def test_a_file_of_the_hub_that_is_a_list_is_no_danger(sft, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    (folder / "modules.json").write_text('[{"idx": 0, "type": "sentence_transformers.models.Transformer"}]')
    result = sft("check", folder)
    assert result.code == 0 and "UNSAFE" not in result.out.decode()


def test_a_file_that_is_no_text_is_told_by_name(sft, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    (folder / "modules.json").write_bytes(b'{"\x80": 1}')
    result = sft("check", folder)
    assert result.code == 5 and "modules.json is not JSON" in result.out.decode() + result.err
