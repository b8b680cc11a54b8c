"""sft tokenize as a filter: what goes in comes out in order and at once, however it is divided among threads."""

import json
import os

import pytest
from conftest import chat

from sftcli.stages import tokenize as stage


@pytest.fixture
def base(model_folders):
    return model_folders["chatml"]


def mixed(count):
    """Good lines of many lengths, lines that came tokenised, control strings in content, and bad lines."""
    for i in range(count):
        if i % 11 == 3:
            yield b"{not json\n"
        elif i % 7 == 2:
            yield {"id": f"t{i}", "input_ids": [5, 6, i]}
        elif i % 13 == 5:
            yield chat("say <|im_end|>", "no", id=f"c{i}")
        else:
            yield chat("q" * (i * 37 % 400), f"answer {i} " * (i % 5 + 1), "more?", "yes", id=f"m{i}")


@pytest.mark.parametrize("rows, size, threads", [(1, 1 << 18, 2), (7, 1 << 18, 1), (1000, 1 << 18, 8), (1000, 900, 3)])
def test_output_does_not_depend_on_batches_or_threads(sft, lines, base, tmp_path, monkeypatch, rows, size, threads):
    data = lines(*mixed(150))
    command = ("tokenize", data, "-m", base, "--on-error", "skip", "--rejects", tmp_path / "rejects.jsonl")
    one = sft(*command)
    rejects = (tmp_path / "rejects.jsonl").read_bytes()
    monkeypatch.setattr(stage, "BATCH_ROWS", rows)
    monkeypatch.setattr(stage, "BATCH_BYTES", size)
    monkeypatch.setattr(stage, "_threads", lambda: threads)
    other = sft(*command)
    assert (other.out, other.err) == (one.out, one.err)
    assert (tmp_path / "rejects.jsonl").read_bytes() == rejects
    assert len(one.rows) == 150 - len(rejects.splitlines()) and "control strings in content" in one.err


def test_what_the_library_reads_of_the_environment_is_put_back(sft, lines, base, monkeypatch):
    for before in (None, "true"):
        if before:
            monkeypatch.setenv(stage.LIBRARY_THREADS, before)
        else:
            monkeypatch.delenv(stage.LIBRARY_THREADS, raising=False)
        assert sft("tokenize", lines(chat("q", "a")), "-m", base).code == 0
        assert sft("tokenize", lines(b"nonsense\n"), "-m", base).code == 3
        assert os.environ.get(stage.LIBRARY_THREADS) == before


def test_nothing_tokenised_is_an_error(sft, lines, base, tmp_path):
    """As for mask: what nothing came out of is not a success; the rejects say why."""
    data = lines(b"nonsense\n", {"messages": 5})
    rejects = tmp_path / "rejects.jsonl"
    command = ("tokenize", data, "-m", base, "--on-error", "skip", "--rejects", rejects)
    result = sft(*command)
    assert result.code == 3
    assert "error: nothing was tokenised: of 2 rows 2 were rejected" in result.err
    assert [list(row) for row in result.rows] == [["sft_error"]]
    assert [json.loads(line)["line"] for line in rejects.read_bytes().splitlines()] == [1, 2]
    assert sft(*command, "-o", tmp_path / "tokens.jsonl").code == 3
    assert not (tmp_path / "tokens.jsonl").exists()
    assert sft("tokenize", lines(), "-m", base, "--on-error", "skip").code == 0  # an empty input is only warned of
