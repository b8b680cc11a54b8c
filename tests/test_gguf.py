"""GGUF out and in again: equal tensors, switches, tokenizers and templates; transformers as a second reader."""

import json
import os
import random
import re
import shutil
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import chat, write_lines
from family_cases import build, change_config, ids_of, read_config, their_logits
from model_fixtures import model_of, row_logits
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from sftcli.model.checkpoint import open_folder
from sftcli.model.tensorfile import WEIGHTS
from sftcli.text.gguf_pretokenizers import WAYS
from sftcli.text.gguf_vocabulary import BYTE, CONTROL, KEY, NORMAL, UNKNOWN, read_tokenizer, write_tokenizer
from sftcli.text.modelfile import modelfile
from sftcli.text.template import Template, load_template

VOCABULARY = 310  # rows of the embedding; the tokenizer has 300, so that some tokens are placeholders
SIZES = {  # what transformers' reader assumes, because it does not read it
    "gpt2": {"n_positions": 1024},
    "gemma2 caps": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "qwen3": {"head_dim": 128},
}
OURS = {"gemma2": {"query_pre_attn_scalar": 12}, "gemma3_text linear": {"query_pre_attn_scalar": 12}}
CASES = [
    *(
        "llama",
        "llama tied",
        "llama biases",
        "llama all heads",
        "llama linear",
        "llama llama3",
        "llama yarn",
        "mistral",
    ),
    *(
        "mistral no window",
        "gpt2 narrow",
        "gpt2 untied",
        "gpt_neox",
        "gpt_neox sequential",
        "gpt_neox unbiased",
        "qwen2",
    ),
    *(
        "qwen2 yarn",
        "qwen3",
        "minimind",
        "gemma",
        "gemma2",
        "gemma3_text linear",
        "phi3 window",
        "phi3 longrope",
        "phi",
    ),
    *("starcoder2 unbiased", "starcoder2 window", "stablelm", "stablelm parallel", "olmo clip", "olmo2", "smollm3"),
    *("granite biases", "glm", "glm4 unbiased"),
]
SECOND_READER = [
    "llama",
    "qwen2",
    "qwen3",
    "gpt2",
    "gemma2 caps",
    "gemma3_text",
    "phi3",
    "starcoder2",
    "stablelm qkv bias",
]
REFUSED = {
    "llama dynamic": "RoPE scaling Dynamic",
    "llama yarn factor": "RoPE scaling Yarn",
    "qwen2 window": "use_sliding_window = True",
    "qwen3 bias": "attention_bias = True",
    "gemma2 uncapped": "query_pre_attn_scalar = 20",
    "gemma3_text layers": "a sliding window on these layers",
    "smollm3 window": "use_sliding_window = True",
    "gptj": "model_type 'gptj' has no export",
}
TEXTS = [
    "hello there", "", " ", "  two  spaces ", "a 12 345 6789 b", "tabs\tand\n\nlines\r\n x ", "don't I'LL they're 'S", "é中文😀👨‍👩‍👧",
    "<|im_start|>user\nhi<|im_end|>\n", "x<|im_end|>y", "<unk><s></s>", "١٢٣ ½ ²", "\u00a0x\u3000y", "ABCdef GHIjkl iPhone", "!?/... (a)[b]",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def gguf():
    return pytest.importorskip("gguf", reason="an extra: pip install '.[gguf]'")


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is the oracle here: pip install '.[test]'")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A folder with a byte-level tokenizer of 300 tokens and the chatml template, made by `sft init`."""
    from conftest import run_in_process

    path = tmp_path_factory.mktemp("vocabulary")
    data = write_lines(path / "data.jsonl", chat("hello there, how are you?", "Fine, 12 or 34."))
    assert run_in_process("init", data, "-o", path / "base", "--template", "chatml", "--vocab-size", 300).code == 0
    return path / "base"


@pytest.fixture(scope="module")
def built(transformers, vocabulary, tmp_path_factory):
    """A case's folder with weights that are values of `dtype`; each made once."""

    @cache
    def make(name, dtype=torch.float16, second=False):
        path = tmp_path_factory.mktemp("case") / name.replace(" ", "-")
        build(name, path, vocab_size=VOCABULARY, **(SIZES if second else OURS).get(name, {}))
        save_file({k: v.to(dtype) for k, v in load_file(path / WEIGHTS).items()}, path / WEIGHTS, {"format": "pt"})
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            shutil.copy(vocabulary / file, path / file)
        return path

    return make


def there_and_back(sft, folder, kind, tmp_path):
    """The folder that comes of an export and an import."""
    exported = sft("export", folder, "--gguf", kind, "-o", tmp_path / "model.gguf")
    assert exported.code == 0, exported.err
    imported = sft("import", tmp_path / "model.gguf", "-o", tmp_path / "back")
    assert imported.code == 0, imported.err
    return tmp_path / "back"


# ---- weights and switches


def assert_equal_folders(back, folder, dtype):
    found, expected = load_file(back / WEIGHTS), load_file(folder / WEIGHTS)
    assert set(found) == {name for name in expected if not name.endswith((".attn.bias", ".masked_bias"))}
    for name, tensor in found.items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name
    ours, theirs = open_folder(back), open_folder(folder)
    for switch in ours.config.__dataclass_fields__:
        if switch != "ropes":
            assert getattr(ours.config, switch) == getattr(theirs.config, switch), switch
    torch.testing.assert_close(
        row_logits(model_of(back), ids_of()), row_logits(model_of(folder), ids_of()), atol=1e-6, rtol=0
    )  # RoPE's scaling went through float32


@pytest.mark.parametrize("name", CASES)
def test_export_then_import_gives_equal_tensors_and_switches(sft, built, tmp_path, name):
    folder = built(name)
    assert_equal_folders(there_and_back(sft, folder, "f16", tmp_path), folder, torch.float16)


@pytest.mark.parametrize("name", ["llama", "gpt2 narrow", "gpt_neox", "gemma"])
def test_bfloat16_goes_through_bitwise(sft, built, tmp_path, name):
    folder = built(name, torch.bfloat16)
    assert_equal_folders(there_and_back(sft, folder, "bf16", tmp_path), folder, torch.bfloat16)


def test_vectors_that_do_not_fit_in_16_bits_stay_in_float32(sft, built, tmp_path):
    folder = shutil.copytree(built("llama"), tmp_path / "folder")
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 1e-7
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    found = load_file(there_and_back(sft, folder, "f16", tmp_path) / WEIGHTS)
    assert torch.equal(found["model.norm.weight"], weights["model.norm.weight"])


def test_q8_0_stays_within_its_step_and_is_stable(sft, built, tmp_path):
    folder = built("llama")
    once = load_file(there_and_back(sft, folder, "q8_0", tmp_path) / WEIGHTS)
    (tmp_path / "again").mkdir()
    twice = load_file(there_and_back(sft, tmp_path / "back", "q8_0", tmp_path / "again") / WEIGHTS)
    blocks = 0
    for name, tensor in load_file(folder / WEIGHTS).items():
        assert torch.equal(once[name], twice[name]), name
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            rows = tensor.float().unflatten(-1, (-1, 32))
            step = rows.abs().amax(-1, keepdim=True) / 127
            error = (once[name].unflatten(-1, (-1, 32)) - rows).abs()
            assert bool((error <= 0.52 * step + 127 * step * 2**-11).all()), (
                name
            )  # rounding, and the scale's in float16
            blocks += int((error > 0).sum())
        else:
            assert torch.equal(once[name], tensor.float()), name
    assert blocks > 1000  # it did quantise


@pytest.mark.parametrize("name", SECOND_READER)
def test_transformers_reads_an_export_as_we_do(sft, built, transformers, tmp_path, name):
    folder = built(name, second=True)
    assert sft("export", folder, "--gguf", "f16", "-o", folder / "model.gguf").code == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    expected = their_logits(model.eval(), ids_of())
    torch.testing.assert_close(row_logits(model_of(folder), ids_of()), expected, atol=1e-5, rtol=0)


LEFT_OUT = [
    ("gpt_neox", "use_parallel_residual", "gptneox.use_parallel_residual", True),
    ("granite", "logits_scaling", "granite.logit_scale", 1.0),
    ("granite", "attention_multiplier", "granite.attention.scale", 1.0),
    ("granite", "embedding_multiplier", "granite.embedding_scale", 1.0),
    ("granite", "residual_multiplier", "granite.residual_scale", 1.0),
    ("olmo", "no key at all", "olmo.attention.layer_norm_epsilon", 1e-5),
]


@pytest.mark.parametrize(("name", "key", "field", "value"), LEFT_OUT)
def test_fields_that_llama_cpp_asks_for_are_there_whatever_config_json_leaves_out(
    sft, gguf, built, tmp_path, name, key, field, value
):
    folder = shutil.copytree(built(name), tmp_path / "folder")
    config = read_config(folder)
    config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert sft("export", folder, "--gguf", "f16", "-o", tmp_path / "m.gguf").code == 0
    assert gguf.GGUFReader(tmp_path / "m.gguf").get_field(field).contents() == pytest.approx(value)
    assert sft("import", tmp_path / "m.gguf", "-o", tmp_path / "back").code == 0
    assert torch.equal(row_logits(model_of(tmp_path / "back"), ids_of()), row_logits(model_of(folder), ids_of()))


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_do_is_refused(sft, built, tmp_path, name):
    result = sft("export", built(name), "--gguf", "f16", "-o", tmp_path / "model.gguf")
    assert result.code == 5 and REFUSED[name] in result.err.splitlines()[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ2_0", "MXFP4", "BF16"])
def test_packed_tensors_are_unpacked_as_the_library_does(sft, gguf, exported, tmp_path, kind):
    """A file written by the library alone: q and k in llama.cpp's order, one matrix packed."""
    packed = gguf.GGMLQuantizationType[kind]
    name, rows = "blk.0.ffn_down.weight", torch.randn(32, 256, generator=torch.Generator().manual_seed(1)).numpy()
    data = gguf.quants.quantize(rows, packed)
    edit(gguf, exported, tmp_path / "b.gguf", tensors={name: (data, packed)}, ff=256)
    assert sft("import", tmp_path / "b.gguf", "-o", tmp_path / "back").code == 0
    found = load_file(tmp_path / "back" / WEIGHTS)["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(found.float(), torch.from_numpy(gguf.quants.dequantize(data, packed)))


# ---- files by hand


def edit(gguf, source, target, fields=(), drop=(), tensors=(), ff=None):
    """Write a copy of a file with other fields and tensors, with the library alone."""
    reader = gguf.GGUFReader(source)
    values = {name: (f.contents(), f.types) for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(target, values["general.architecture"][0])
    changed = dict(fields)
    for name, (value, types) in values.items():
        if name in drop or (name == "general.architecture" and name not in changed):
            continue
        value = changed.get(name, ff if ff and name.endswith("feed_forward_length") else value)
        if name == "general.architecture":
            writer.kv_data[0][name].value = value
        else:
            writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    replaced = dict(tensors)
    for tensor in reader.tensors:
        data, kind = replaced.get(tensor.name, (tensor.data, tensor.tensor_type))
        if ff and "ffn_" in tensor.name and tensor.name not in replaced and "norm" not in tensor.name:
            shape = (32, ff) if "down" in tensor.name else (ff, 32)
            data, kind = torch.zeros(shape).half().numpy(), gguf.GGMLQuantizationType.F16
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def exported(built, tmp_path_factory):
    from conftest import run_in_process

    path = tmp_path_factory.mktemp("exported") / "model.gguf"
    assert run_in_process("export", built("llama"), "--gguf", "f16", "-o", path).code == 0
    return path


def assert_refused(sft, path, told, code=5):
    output = path.parent / "out"
    result = sft("import", path, "-o", output)
    assert result.code == code and told in result.err, result.err
    assert [line for line in result.err.splitlines() if not line.startswith("hint:")] == result.err.splitlines()[:1]
    assert not output.exists() and not list(path.parent.glob(".tmp*"))


def test_a_file_that_is_no_gguf_is_refused(sft, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"")
    assert_refused(sft, tmp_path / "a.gguf", "is not a GGUF file")
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04" * 100)
    assert_refused(sft, tmp_path / "a.gguf", "is not a GGUF file")
    assert_refused(sft, tmp_path / "none.gguf", "no file")


@pytest.mark.parametrize("part", [5, 20, 30, 200, 5000, 0.5, 0.9, -1])
def test_a_truncated_file_is_refused(sft, exported, tmp_path, part):
    content = exported.read_bytes()
    end = int(part * len(content)) if isinstance(part, float) else part
    (tmp_path / "a.gguf").write_bytes(content[:end])
    assert_refused(sft, tmp_path / "a.gguf", "is damaged")


@pytest.mark.timeout(30)
def test_a_length_beyond_the_file_is_refused_and_not_counted_to(sft, exported, tmp_path):
    content = exported.read_bytes()
    at = content.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    (tmp_path / "a.gguf").write_bytes(content[:at] + (1 << 40).to_bytes(8, "little") + content[at + 8 :])
    assert_refused(sft, tmp_path / "a.gguf", "it ends at byte")


@pytest.mark.parametrize("files", [25, pytest.param(250, marks=pytest.mark.slow)])
def test_damaged_bytes_never_end_in_a_traceback(sft, exported, tmp_path, files):
    content = bytearray(exported.read_bytes())
    chance = random.Random(1)
    head = content.index(b"blk.3") + 200  # fields and names of tensors
    for number in range(files):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 4])):
            damaged[chance.randrange(4, head)] = chance.choice([0, 1, 127, 128, 255])
        (tmp_path / "a.gguf").write_bytes(damaged)
        result = sft("import", tmp_path / "a.gguf", "-o", tmp_path / f"out{number}")
        assert result.code in (0, 5), result.err


EDITS = {
    "architecture 'mamba' is not supported": {"fields": {"general.architecture": "mamba"}},
    "has no llama.block_count": {"drop": ["llama.block_count"]},
    "has no tokenizer.ggml.tokens": {"drop": ["tokenizer.ggml.tokens"]},
    "has no tokenizer.ggml.merges": {"drop": ["tokenizer.ggml.merges"]},
    "tokenizer.ggml.model 'rwkv' is not supported": {"fields": {"tokenizer.ggml.model": "rwkv"}},
    "tokenizer.ggml.pre 'odd' is not known": {"fields": {"tokenizer.ggml.pre": "odd"}},
    "has shape [310, 32], the fields say [310, 64]": {"fields": {"llama.embedding_length": 64}},
    "the fields say": {"fields": {"llama.attention.head_count_kv": 4}},
    "has no tensor blk.4": {"fields": {"llama.block_count": 5}},
    "has no place in the model": {"fields": {"llama.block_count": 3}},
    "sizes": {"fields": {"llama.attention.head_count": 0}},
}


@pytest.mark.parametrize("told", EDITS)
def test_fields_that_are_unknown_or_missing_are_named(sft, gguf, exported, tmp_path, told):
    edit(gguf, exported, tmp_path / "a.gguf", **EDITS[told])
    assert_refused(sft, tmp_path / "a.gguf", "" if told == "sizes" else told)


def test_a_tensor_of_a_type_that_cannot_be_unpacked_is_named(sft, gguf, exported, tmp_path):
    whole = torch.zeros(310, 32, dtype=torch.int32).numpy(), gguf.GGMLQuantizationType.I32
    edit(gguf, exported, tmp_path / "a.gguf", tensors={"token_embd.weight": whole})
    assert_refused(sft, tmp_path / "a.gguf", "tensor token_embd.weight of type I32 cannot be read")
    content = exported.read_bytes()
    at = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16  # number of dimensions, dimensions
    (tmp_path / "a.gguf").write_bytes(content[:at] + (250).to_bytes(4, "little") + content[at + 4 :])
    assert_refused(sft, tmp_path / "a.gguf", "250 is not a valid GGMLQuantizationType")


def test_an_export_that_ends_early_is_not_published(sft, built, tmp_path, monkeypatch):
    """numpy's tofile lets errors of its last write go: the file is then shorter than it was written."""
    output = tmp_path / "m.gguf"
    output.write_bytes(b"the one before")
    fstat = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: SimpleNamespace(st_size=fstat(fd).st_size - 1))
    result = sft("export", built("llama"), "--gguf", "f16", "-o", output)
    assert result.code == 6 and "it ends early" in result.err
    assert output.read_bytes() == b"the one before" and not list(tmp_path.glob(".tmp-*"))


def test_an_output_that_holds_something_is_left_alone(sft, exported, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = sft("import", exported, "-o", tmp_path)
    assert result.code == 2 and "is not empty" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_without_the_library_the_extra_is_named(sft, exported, built, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    for command in (["import", exported, "-o", tmp_path / "x"], ["export", built("llama"), "--gguf", "f16"]):
        result = sft(*command)
        assert result.code == 2 and "sftcli[gguf]" in result.err


def test_values_beyond_float16_are_refused(sft, built, tmp_path):
    folder = shutil.copytree(built("llama", torch.bfloat16), tmp_path / "folder")
    weights = load_file(folder / WEIGHTS)
    weights["model.embed_tokens.weight"][0, 0] = 1e6
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    result = sft("export", folder, "--gguf", "f16", "-o", tmp_path / "m.gguf")
    assert result.code == 5 and "beyond float16" in result.err and not (tmp_path / "m.gguf").exists()


# ---- tokenizers and templates


def test_tokenizer_template_and_stops_come_back(sft, built, tmp_path):
    folder = shutil.copytree(built("llama"), tmp_path / "folder")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    back = there_and_back(sft, folder, "f16", tmp_path)
    ours, theirs = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (back, folder))
    assert ours.get_vocab() == theirs.get_vocab() and len(ours.get_vocab()) < VOCABULARY
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids
        for skip in (False, True):
            ids = ours.encode(text).ids
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (back / "chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    for name in ("eos_token", "pad_token"):
        configs = [json.loads((path / "tokenizer_config.json").read_text()) for path in (back, folder)]
        assert configs[0][name] == configs[1][name]


def byte_fields(vocabulary, pre):
    """A file's fields: the tokenizer of `vocabulary` under another way of cutting words."""
    made = json.loads((vocabulary / "tokenizer.json").read_text())
    fields = write_tokenizer(made, {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}, [2], 300, "llama")
    return fields | {"tokenizer.ggml.pre": pre}


@pytest.mark.parametrize("pre", [names[0] for names in WAYS])
def test_every_way_of_cutting_words_has_one_name(vocabulary, pre):
    fields = byte_fields(vocabulary, pre) | {"tokenizer.ggml.add_bos_token": True}
    tokenizer, config = read_tokenizer(fields)
    Tokenizer.from_str(json.dumps(tokenizer))
    assert write_tokenizer(tokenizer, config, [2], 300, "llama") == fields


KNOWN_TO_TRANSFORMERS = ["gpt-2", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o", "qwen35"]


@pytest.mark.parametrize("pre", KNOWN_TO_TRANSFORMERS)
def test_words_are_cut_as_transformers_cuts_them(vocabulary, transformers, pre):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    fields = byte_fields(vocabulary, pre)
    tokenizer, _ = read_tokenizer(fields)
    told = {key: fields[KEY + key] for key in ("tokens", "merges", "token_type")}
    theirs, _ = convert_gguf_tokenizer("llama", told | {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre})
    ours = Tokenizer.from_str(json.dumps(tokenizer))
    for text in TEXTS:
        words = [word for word, _ in ours.pre_tokenizer.pre_tokenize_str(text)]
        assert words == [word for word, _ in theirs.pre_tokenizer.pre_tokenize_str(text)]
        assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False).ids


def test_smollm_and_default_cut_words_as_llama_cpp_describes(vocabulary):
    """Each pattern in turn cuts what the ones before it left; here with the `regex` module."""
    regex = pytest.importorskip("regex")
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
    told = {"smollm": [r"\p{N}", words], "default": [r"[\p{P}\$\+<=>\^~\|]+", words, r"\p{N}+", "[0-9][0-9][0-9]"]}
    for pre, patterns in told.items():
        ours = Tokenizer.from_str(json.dumps(read_tokenizer(byte_fields(vocabulary, pre))[0]))
        for text in TEXTS:
            pieces = [text]
            for pattern in patterns:
                pieces = [part for piece in pieces for part in cut(regex, pattern, piece)]
            spans = [span for _, span in ours.pre_tokenizer.pre_tokenize_str(text)]
            assert [text[a:b] for a, b in spans] == pieces, (pre, text)


def cut(regex, pattern, text):
    """Matches, and what lies between them."""
    at = 0
    for found in regex.finditer(pattern, text):
        yield from (part for part in (text[at : found.start()], found[0]) if part)
        at = found.end()
    if text[at:]:
        yield text[at:]


SPACED = ["▁", "h", "e", "l", "o", "t", "r", "a", "b", "▁h", "▁t", "he", "ll", "el", "lo", "hell", "hello", "▁hello", "▁▁", "re", "ere", "▁the", "th", "there", "▁there"]  # fmt: skip


def spaced_fields(prefix=True, seed=1):
    """A SentencePiece vocabulary with scores in an order of chance."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPACED]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(SPACED)]
    ranks = random.Random(seed).sample(range(len(SPACED)), len(SPACED))
    scores = [0.0] * 259 + [-float(rank) for rank in ranks]
    specials = {"bos": 1, "eos": 2, "unknown": 0}
    return {
        **{f"tokenizer.ggml.{name}_token_id": token for name, token in specials.items()},
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def merged_by_hand(fields, text):
    """Ids of a text without control tokens: the neighbours whose joint token scores highest become one, first ones first."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    if not text:
        return []
    pieces = list(("▁" if fields["tokenizer.ggml.add_space_prefix"] else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in ids]
        if not pairs:
            break
        _, at = min(pairs)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return [i for p in pieces for i in ([ids[p]] if p in ids else [ids[f"<0x{byte:02X}>"] for byte in p.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_sentencepiece_merges_by_score(prefix, seed):
    fields = spaced_fields(prefix, seed)
    made, config = read_tokenizer(fields)
    tokenizer = Tokenizer.from_str(json.dumps(made))
    chance = random.Random(seed)
    texts = ["".join(chance.choices("hello there  ab\né", k=chance.randint(0, 24))) for _ in range(200)]
    for text in [*texts, "hello there", "  two", "中\n"]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == merged_by_hand(fields, text), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert config["add_bos_token"] and tokenizer.encode("a").ids[0] == 1
    back = write_tokenizer(made, config, [2], len(fields["tokenizer.ggml.tokens"]), "llama")
    again, _ = read_tokenizer(back)
    assert again == made


def test_merges_that_no_scores_give_are_refused():
    made, config = read_tokenizer(spaced_fields())
    del made["model"]["merges"][3]
    with pytest.raises(Exception, match="do not follow from scores"):
        write_tokenizer(made, config, [2], 300, "llama")


def test_gemmas_runs_of_spaces_and_order(vocabulary):
    """Its runs are written as real spaces, of their own type; its merges follow the order of its tokens."""
    fields = spaced_fields(prefix=False) | {"general.architecture": "gemma2"}
    tokens = [token.replace("▁▁", "  ") for token in fields["tokenizer.ggml.tokens"]]
    types = [
        4 if token == "  " else kind for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    ]
    made, _ = read_tokenizer(fields | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
    assert "▁▁" in made["model"]["vocab"] and "  " not in [token["content"] for token in made["added_tokens"]]
    ids = made["model"]["vocab"]
    merges = [ids["".join(merge)] for merge in made["model"]["merges"]]
    assert merges == sorted(merges) and ["▁", "▁"] in made["model"]["merges"]


# ---- Modelfile


def spoken(go, messages):
    """What Go's template language makes of the one loop that is written."""
    before, body, after = re.fullmatch(r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", go, re.DOTALL).groups()
    turns = [body.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages]
    return before + "".join(turns) + after


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_modelfile_writes_what_the_chat_template_writes(name, adds_bos):
    specials = {"bos_token": "<|begin_of_text|>"} if name == "llama3" else {}
    template = load_template(name, None, {}, specials)
    text = modelfile("m.gguf", template, adds_bos, ["<|im_end|>", "<|im_end|>"])
    assert text.startswith("FROM ./m.gguf\n") and text.count('PARAMETER stop "<|im_end|>"\n') == 1
    go = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)[1]
    messages = chat("Hi.", "Yes?", "What is 2 + 2?")["messages"]
    expected = template.render(messages, None, True)
    assert spoken(go, messages) == (expected.removeprefix(specials.get("bos_token", "")) if adds_bos else expected)


def test_a_default_system_prompt_becomes_SYSTEM():
    source = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + load_template("chatml", None, {}, {}).source  # fmt: skip
    assert 'SYSTEM """Be kind."""\n' in modelfile("m.gguf", Template(source, "x", {}), False, [])
    unknown = modelfile("m.gguf", Template("{{ messages[0].content }}", "x", {}), False, [])
    assert "TEMPLATE" not in unknown and unknown.startswith("FROM ./m.gguf\n")


def test_text_that_ollama_would_misread_is_quoted_or_left_out():
    source = "<|im_start|>system\\n" + 'Say """x""".' + "<|im_end|>\\n"
    of_quotes = (
        "{% if messages[0].role != 'system' %}" + source + "{% endif %}" + load_template("chatml", None, {}, {}).source
    )
    text = modelfile("m.gguf", Template(of_quotes.replace("\\n", "\n"), "x", {}), False, ['a"b', "c\nd", '"""', "e"])
    assert "SYSTEM" not in text and "# the system prompt" in text
    assert 'stop """a"b"""\n' in text and 'stop """c\nd"""\n' in text and 'stop "e"\n' in text
    assert text.count("PARAMETER stop") == 3


def test_a_run_is_exported_and_its_vocabulary_must_fit(sft, built, tmp_path):
    folder = shutil.copytree(built("llama"), tmp_path / "run" / "model")
    result = sft("export", tmp_path / "run", "--gguf", "bf16")
    assert result.code == 0 and {"model-bf16.gguf", "Modelfile"} <= {path.name for path in folder.iterdir()}
    small = read_config(folder)["vocab_size"] - 20
    weights = {k: v[:small] if v.shape[0] == VOCABULARY else v for k, v in load_file(folder / WEIGHTS).items()}
    save_file({k: v.clone() for k, v in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    change_config(folder, vocab_size=small)
    result = sft("export", folder, "--gguf", "f16", "-o", tmp_path / "m.gguf")
    assert result.code == 5 and "its embedding 290 rows" in result.err


def test_kinds_and_dtypes_that_do_not_exist_are_usage_errors(sft, built, exported, tmp_path):
    assert sft("export", built("llama"), "--gguf", "q4_k").code == 2
    assert sft("import", exported, "-o", tmp_path / "x", "--dtype", "int8").code == 2
    assert sft("import", exported, "-o", tmp_path / "y", "--dtype", "float32").code == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "y" / WEIGHTS).values()} == {torch.float32}
