"""The command line itself: what it says before a stage runs."""

import json
import re

import pytest
import typer
from conftest import chat

from sftcli.cli import app
from sftcli.recipe import SECTIONS


def test_wrong_options_of_a_filter_end_stdout_with_the_error_line(sft, lines):
    data = lines(chat("q", "a"))
    for command in (["tokenize", data], ["mask", data], ["generate", data, "-m", "none"]):
        result = sft(*command, "--set", "lenght=3")
        assert result.code == 2 and "lenght: unknown key" in result.err
        assert json.loads(result.out)["sft_error"]["code"] == 2
        assert sft(*command, "--set", "lenght=3", "-o", "out.jsonl").out == b""


def test_every_command_has_help_with_an_example(sft):
    commands = ("init", "tokenize", "mask", "train", "generate", "evaluate", "show", "check", "run")
    whole = sft("--help")
    assert whole.code == 0
    for command in commands:
        told = sft(command, "--help")
        assert told.code == 0 and f"  {command} " in whole.out.decode()
        assert any(f"sft {command} " in line for line in told.out.decode().splitlines()[2:8]), command
        assert not any(line.startswith("Options") and len(line) > 9 for line in told.out.decode().splitlines())


def test_recipe_schema_names_every_section(sft):
    schema = json.loads(sft("run", "--schema").out)
    assert {"model", "init", "tokenize", "mask", "train", "generate", "evaluate"} <= set(schema["properties"])


def test_a_misspelt_command_names_the_nearest(sft):
    result = sft("trian")
    assert result.code == 2 and "train" in result.err


def test_help_names_the_default_of_every_flag_that_has_one():
    named = 0
    for name in ("init", "mask", "train", "generate"):
        command = typer.main.get_command(app).commands[name]
        for flag in command.params:
            field = SECTIONS[name].model_fields.get(flag.name)
            default = None if field is None or field.is_required() else field.default
            if isinstance(default, bool) or not isinstance(default, str | int | float):
                continue
            value = re.escape(str(default).removesuffix(".0"))
            assert re.search(rf"\b{value} \(default\)|\({value}[):]", flag.help), (name, flag.name, flag.help)
            named += 1
    assert named > 20


@pytest.mark.parametrize(
    "content, hint",
    [
        (b"prompt,completion\na,b\n", "an object a line; `jq -cR '{text: .}' data.jsonl`"),
        (b'[{"prompt": "a"}]\n', "`jq -c '.[]' data.jsonl`"),
        (b'[\n {"prompt": "a"}\n]\n', "`jq -c '.[]' data.jsonl`"),
        (b'{\n "prompt": "a"\n}\n', "`jq -c . data.jsonl`"),
        (b"PAR1\x00\x80\xff\x10", "pandas.read_parquet('data.jsonl')"),
    ],
)
def test_a_file_of_another_format_is_told_how_to_become_lines(sft, base, tmp_path, monkeypatch, content, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_bytes(content)
    (tmp_path / "data.csv").write_bytes(content)
    result = sft("tokenize", "data.jsonl", "-m", base)
    assert result.code == 3 and hint in result.err, result.err
    if content.startswith(b"prompt"):
        assert "pandas.read_csv('data.csv')" in sft("tokenize", "data.csv", "-m", base).err


def test_what_is_no_text_is_not_told_to_become_lines(sft, base, tmp_path):
    zipped = tmp_path / "data.xlsx"
    zipped.write_bytes(b"PK\x03\x04\x14\x00\x08\x08\xff\xfe")
    (tmp_path / "it's.tsv").write_bytes(b"prompt\tcompletion\n")
    assert "jq" not in sft("tokenize", zipped, "-m", base).err
    assert "sep='\\t'" in sft("tokenize", tmp_path / "it's.tsv", "-m", base).err


def test_a_bad_line_among_good_ones_is_no_other_format(sft, base, lines):
    assert "hint" not in sft("tokenize", lines(chat("q", "a"), b"nonsense"), "-m", base).err


@pytest.mark.parametrize(
    "command, told",
    [
        ("train rows -m none --batch-rows 3 --batch-tokens 100", "--batch-tokens and --batch-rows both"),
        ("train --resume -o nosuch", "nosuch holds no run"),
        ("train rows -m none --adapter lroa", "'lroa' is not one of lora, prefix, prompt; hint: did you mean lora?"),
        ("tokenize - -m none --on-error skp", "'skp' is not one of fail, skip; hint: did you mean skip?"),
        ("init --set width=64", "width 64 must be heads 6 times an even number (heads=4 fits it)"),
        ("init --set width=63", "width 63 must be heads 6 times an even number\n"),
    ],
)
def test_what_does_not_fit_is_told_with_what_does(sft, tmp_path, monkeypatch, command, told):
    monkeypatch.chdir(tmp_path)
    result = sft(*command.split())
    assert result.code == 2 and told in result.err, result.err
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_and_a_folder_name_each_other(sft, base, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert f"`sft import {tmp_path / 'm.gguf'} -o FOLDER`" in sft("tokenize", "-", "-m", tmp_path / "m.gguf").err
    assert "is a folder, not a GGUF file" in sft("import", base, "-o", tmp_path / "new").err
