"""The sample data: made by a script that gives the same bytes, and a task whose held-out rows cannot be memorised."""

import json
import shutil
import subprocess
import sys
from functools import cache

import pytest
from conftest import SAMPLES, TEMPLATES

FILES = sorted(path.name for path in SAMPLES.glob("*.jsonl"))


@cache
def rows_of(name):
    return [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def remade(tmp_path_factory):
    """What the script writes in a folder of its own."""
    folder = tmp_path_factory.mktemp("samples")
    for path in SAMPLES.glob("*.py"):
        shutil.copy(path, folder)
    subprocess.run([sys.executable, str(folder / "make_samples.py")], check=True, capture_output=True, timeout=60)
    return folder


def test_the_script_makes_every_committed_file(remade):
    assert sorted(path.name for path in remade.glob("*.jsonl")) == FILES


@pytest.mark.parametrize("name", FILES)
def test_the_script_gives_the_committed_bytes(remade, name):
    assert (remade / name).read_bytes() == (SAMPLES / name).read_bytes()


def test_held_out_rows_share_no_schema_and_phrasing_with_the_training_rows():
    pairs = [{(row["schema"], row["phrasing"]) for row in rows_of(name)} for name in ("train.jsonl", "heldout.jsonl")]
    assert len(pairs[0]) > 1000 and len(pairs[1]) > 50
    assert not pairs[0] & pairs[1]


def test_held_out_questions_are_not_in_the_training_rows():
    questions = [{row["messages"][0]["content"] for row in rows_of(name)} for name in ("train.jsonl", "heldout.jsonl")]
    questions.append({row["prompt"] for row in rows_of("prompts.jsonl")})
    assert not questions[0] & (questions[1] | questions[2])
    assert not questions[1] & questions[2]


def test_every_held_out_schema_and_phrasing_was_seen_on_its_own():
    """The task is to combine what is known, not to guess what never was."""
    for field in ("schema", "phrasing"):
        seen, held_out = ({row[field] for row in rows_of(name)} for name in ("train.jsonl", "heldout.jsonl"))
        assert held_out <= seen


def test_there_are_enough_held_out_rows():
    assert len(rows_of("heldout.jsonl")) >= 300


def test_the_readme_counts_the_rows():
    readme = (SAMPLES / "README.md").read_text(encoding="utf-8")
    for name in FILES:
        assert f"| `{name}` | {len(rows_of(name)):,} |" in readme


@pytest.mark.parametrize("name", FILES)
def test_every_sample_goes_through_tokenize_and_mask(sft, base, name):
    columns = ("--columns", "prompt=question,completion=answer") if name == "qa.jsonl" else ()
    tokens = sft("tokenize", SAMPLES / name, "-m", base, *columns)
    assert tokens.code == 0, tokens.err
    assert tokens.out.count(b"\n") == len(rows_of(name))
    if name != "prompts.jsonl":  # nothing to train there
        rows = sft("mask", stdin=tokens.out)
        assert (rows.code, rows.out.count(b"\n")) == (0, len(rows_of(name)))


@pytest.mark.parametrize("template", TEMPLATES)
def test_init_gives_the_same_folder_every_time(sft, tmp_path, template):
    made = []
    for name in ("one", "two"):
        columns = ("--columns", "prompt=question,completion=answer")
        result = sft("init", SAMPLES / "qa.jsonl", "-o", tmp_path / name, "--template", template, *columns)
        assert result.code == 0, result.err
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert made[0] == made[1]
    assert set(made[0]) == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
    }
