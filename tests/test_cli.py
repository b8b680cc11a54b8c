"""The command line itself: what it says before a stage runs."""

import json

from conftest import chat


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
