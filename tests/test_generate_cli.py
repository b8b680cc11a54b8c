"""sft generate as a command: order, fields that pass through, references, tables, and how it fails."""

import json

import pytest
from model_fixtures import (
    PRESETS,
    empty_folder,
    model_folder,
    model_of,
    random_ids,
    randomised,
    read_jsonl,
    save_weights,
    write_jsonl,
)

from sftcli.cli import app
from sftcli.errors import CheckpointError, DataError, Exit, UsageError
from sftcli.model.decoding import Completion
from sftcli.recipe import Generate, Init
from sftcli.stages.generate import TAIL, _line, _text_stops, complete
from sftcli.stages.init import init
from sftcli.stages.prompts import Asked
from sftcli.text.folder import load_codec

QUESTIONS = [
    "How many rivers?",
    "Name one.",
    "Why?",
    "Where is the Danube, and how long is it?",
    "Who",
    "12+7",
    "Is it?",
]


@pytest.fixture(params=PRESETS)
def folder(request, tmp_path):
    return model_folder(tmp_path / "m", request.param)


@pytest.fixture
def prompts(tmp_path):
    return write_jsonl(tmp_path / "q.jsonl", [{"id": f"q{i}", "prompt": text} for i, text in enumerate(QUESTIONS)])


def answer(folder, prompts, tmp_path, **options):
    """The lines of a completions file."""
    options = {"max_new_tokens": 6} | options
    complete(Generate(**options), prompts, str(folder), str(tmp_path / "out.jsonl"))
    return read_jsonl(tmp_path / "out.jsonl")


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        app(["generate", *map(str, arguments)])
    return left.value.code


def test_command_answers_every_line_in_input_order(folder, prompts, capsysbinary):
    assert run(prompts, "-m", folder, "--batch-size", 3, "--max-new-tokens", 5, "--temperature", 1) == 0
    lines = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert [(line["id"], line["prompt"]) for line in lines] == [(f"q{i}", text) for i, text in enumerate(QUESTIONS)]
    codec = load_codec(folder)
    for line in lines:
        assert set(line) == {"id", "prompt", "completion", "completion_ids", "finish_reason"}
        assert line["completion"] == codec.decode(line["completion_ids"])
        assert line["finish_reason"] == ("length" if len(line["completion_ids"]) == 5 else "stop")


def test_unknown_fields_pass_through_byte_for_byte(folder, tmp_path):
    path = tmp_path / "q.jsonl"
    extra = b'"score":1.50,"big":123456789012345678901234567890,"x":{"b":1,  "a":[ ]},"e":"\\u00e9"'
    path.write_bytes(b'{"prompt":"Why?",' + extra + b"}\n")
    answer(folder, str(path), tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes().startswith(b'{"prompt":"Why?",' + extra + b',"completion":')


def test_answers_of_the_input_are_left_out_and_kept_as_reference(folder, tmp_path):
    lines = [
        {"prompt": "Why?", "completion": "Because."},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]},
        {"prompt": "Why?"},
    ]
    found = answer(folder, write_jsonl(tmp_path / "q.jsonl", lines), tmp_path)
    assert [line.get("reference") for line in found] == ["Because.", "Because.", None]
    assert "reference" not in found[2]
    assert len({tuple(line["completion_ids"]) for line in found}) == 1  # the same prompt was fed
    assert found[0]["completion"] != "Because."


def test_show_batch_prints_the_tables_of_bg_2_and_bg_3(folder, tmp_path, capsys):
    path = write_jsonl(tmp_path / "q.jsonl", [{"input_ids": [1, 3, 2]}, {"input_ids": [1, 3, 6, 2]}])
    tables = {
        "left": ["ids", "0 1 3 2", "1 3 6 2", "mask", "0 1 1 1", "1 1 1 1", "positions", "0 0 1 2", "0 1 2 3"],
        "right": ["ids", "1 3 2 0", "1 3 6 2", "mask", "1 1 1 0", "1 1 1 1", "positions", "0 1 2 2", "0 1 2 3"],
    }
    for side, expected in tables.items():
        out = tmp_path / f"{side}.jsonl"
        assert run(path, "-m", folder, "--show-batch", "--pad-side", side, "--max-new-tokens", 3, "-o", out) == 0
        shown = [line.removesuffix(f" ({side}-padded):").strip() for line in capsys.readouterr().err.splitlines()]
        start = shown.index("ids")
        assert shown[start : start + 9] == expected
        assert len(read_jsonl(out)) == 2


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.95}], ids=["greedy", "sampled"])
def test_deterministic_files_are_byte_equal_at_every_batch_size(folder, prompts, tmp_path, options):
    files = set()
    for size in (1, 3, 32):
        for side in ("left", "right"):
            answer(folder, prompts, tmp_path, batch_size=size, pad_side=side, deterministic=True, **options)
            files.add((tmp_path / "out.jsonl").read_bytes())
    assert len(files) == 1


def test_stream_of_a_row_is_named_by_its_id_or_else_its_line(folder, tmp_path):
    options = {"temperature": 1.0, "deterministic": True}
    named = [{"id": f"q{i}", "prompt": text} for i, text in enumerate(QUESTIONS)]
    straight = answer(folder, write_jsonl(tmp_path / "a.jsonl", named), tmp_path, **options)
    turned = answer(folder, write_jsonl(tmp_path / "b.jsonl", named[::-1]), tmp_path, **options)
    assert turned == straight[::-1]
    same = answer(folder, write_jsonl(tmp_path / "c.jsonl", [{"prompt": "Why?"}] * 3), tmp_path, **options)
    assert len({line["completion"] for line in same}) == 3


def test_several_completions_a_prompt_differ_and_the_first_is_the_one_of_n_1(folder, prompts, tmp_path):
    options = {"temperature": 1.0, "deterministic": True}
    single = answer(folder, prompts, tmp_path, **options)
    several = answer(folder, prompts, tmp_path, n=3, **options)
    assert [(line["id"], line["sample"]) for line in several] == [(f"q{i}", n) for i in range(7) for n in range(3)]
    assert [line["completion_ids"] for line in several[::3]] == [line["completion_ids"] for line in single]
    assert all(len({tuple(line["completion_ids"]) for line in several[i : i + 3]}) == 3 for i in range(0, 21, 3))


def test_stop_text_ends_a_row_and_is_cut_off(folder, prompts, tmp_path):
    free = answer(folder, prompts, tmp_path, max_new_tokens=20)
    letters = [c for line in free for c in line["completion"][3:] if c.isascii() and c.isalpha()]
    stop = max(set(letters), key=letters.count)
    found = answer(folder, prompts, tmp_path, max_new_tokens=20, stop=[stop])
    assert [line["completion"] for line in found] == [line["completion"].partition(stop)[0] for line in free]
    stopped = [stop in line["completion"] for line in free]
    assert any(stopped)
    assert all(line["finish_reason"] == "stop" for line, ended in zip(found, stopped, strict=True) if ended)
    assert all(len(a["completion_ids"]) <= len(b["completion_ids"]) for a, b in zip(found, free, strict=True))


def test_a_stop_text_is_found_where_each_of_its_bytes_is_a_token(folder):
    codec = load_codec(folder)
    for stop in ("请回答以下的几个问题", "🙂🙃🙂🙃🙂🙃"):
        ids = codec.tokenizer.encode(f"ab{stop}").ids
        assert len(ids) > len(stop) + TAIL // 2
        found = _text_stops(codec, ["other", stop])
        assert found(ids) and not found(ids[:-1])


@pytest.mark.parametrize("stops", [["Q:", "\nQ:"], ["\nQ:", "Q:"]])
def test_of_several_stop_texts_the_first_in_the_text_cuts_it(folder, stops):
    codec = load_codec(folder)
    asked = Asked({}, None, 0, [])
    done = Completion(0, codec.tokenizer.encode("answer\nQ: more").ids, "stop")
    line = json.loads(_line(asked, done, codec, stops, Generate(), ""))
    assert line["completion"] == "answer"


def test_documents_are_prompts_up_to_the_last_turn_of_the_model(folder, tmp_path):
    document = {"id": "d", "input_ids": [5, 6, 7, 8, 9], "tokenizer": None, "template": None}
    document["segments"] = [[0, 1, "user", False, 1.0], [1, 2, "assistant", True, 1.0], [2, 3, "user", False, 1.0]]
    document["segments"] += [[3, 5, "assistant", True, 1.0]]
    of_document = answer(folder, write_jsonl(tmp_path / "d.jsonl", [document]), tmp_path)
    of_prompt = answer(folder, write_jsonl(tmp_path / "p.jsonl", [{"id": "d", "input_ids": [5, 6, 7]}]), tmp_path)
    assert of_document[0]["completion_ids"] == of_prompt[0]["completion_ids"]
    asks = document | {"segments": [*document["segments"][:3], [3, 5, "user", False, 1.0]]}  # the last word
    text = document | {"segments": [[0, 5, "text", True, 1.0]]}  # all of it is the model's
    found = answer(folder, write_jsonl(tmp_path / "d.jsonl", [asks, text]), tmp_path)
    whole = answer(folder, write_jsonl(tmp_path / "p.jsonl", [{"id": "d", "input_ids": [5, 6, 7, 8, 9]}]), tmp_path)
    assert [line["completion_ids"] for line in found] == [whole[0]["completion_ids"]] * 2


def test_stop_token_by_name_ends_a_row(folder, prompts, tmp_path):
    stopped = answer(folder, prompts, tmp_path, stop=["<|im_start|>"], temperature=50.0, max_new_tokens=40, n=4)
    start = load_codec(folder).added["<|im_start|>"]
    assert not any(start in line["completion_ids"] for line in stopped)
    free = answer(folder, prompts, tmp_path, temperature=50.0, max_new_tokens=40, n=4)
    assert any(start in line["completion_ids"] for line in free)


def test_row_that_outgrows_the_context_is_finished_with_length_and_said_once(folder, tmp_path, capsys):
    path = write_jsonl(tmp_path / "q.jsonl", [{"input_ids": random_ids(n, n)} for n in (62, 64, 80, 5)])
    found = answer(folder, path, tmp_path)
    assert [len(line["completion_ids"]) for line in found] == [2, 0, 0, 6]
    assert {line["finish_reason"] for line in found} == {"length"}
    assert capsys.readouterr().err.count("filled the model's context") == 1


def test_bfloat16_answers_too(folder, prompts, tmp_path):
    assert len(answer(folder, prompts, tmp_path, dtype="bfloat16", batch_size=2)) == len(QUESTIONS)


def test_run_folder_serves_as_model(folder, prompts, tmp_path):
    expected = answer(folder, prompts, tmp_path)
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "model")
    assert answer(tmp_path / "run", prompts, tmp_path) == expected


def test_output_appears_as_soon_as_order_allows(folder, tmp_path, monkeypatch):
    """The first answers are written before the last prompts are read."""
    from sftcli.stages import generate as stage
    from sftcli.stages import prompts

    log = []
    record_of, line_of = prompts.Prompts._record, stage._line
    monkeypatch.setattr(prompts, "READ_AHEAD", 2)
    monkeypatch.setattr(prompts.Prompts, "_record", lambda *a: log.append("in") or record_of(*a))
    monkeypatch.setattr(stage, "_line", lambda *a: log.append("out") or line_of(*a))
    path = write_jsonl(tmp_path / "q.jsonl", [{"prompt": text} for text in QUESTIONS * 3])
    answer(folder, path, tmp_path, batch_size=2)
    assert log.index("out") <= 4
    assert log.count("in") == log.count("out") == 21


# ---- how it fails


def test_bad_line_fails_after_the_good_ones_before_it(folder, tmp_path, capsysbinary):
    path = tmp_path / "q.jsonl"
    previous = b'{"sft_error": {"code": 3, "message": "broken"}}'
    of_tokens = (b'{"input_ids": [5, 300]}', b'{"input_ids": [-1]}', b'{"input_ids": []}')
    for bad in (b"{not json", b'{"nothing": 1}', previous, *of_tokens):
        path.write_bytes(b'{"prompt":"Why?"}\n{"prompt":"Who?"}\n' + bad + b'\n{"prompt":"Where?"}\n')
        assert run(path, "-m", folder, "--max-new-tokens", 3) == Exit.DATA
        out, err = capsysbinary.readouterr()
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line.get("prompt") for line in lines] == ["Why?", "Who?", None]
        assert lines[2]["sft_error"]["code"] == Exit.DATA
        assert b"q.jsonl:3" in err.splitlines()[-1]


def test_unknown_word_of_a_word_vocabulary_names_its_line(tmp_path, capsysbinary):
    data = write_jsonl(tmp_path / "d.jsonl", [{"question": "where is China", "answer": "The capital"}])
    whitespace = {"tokenizer": "whitespace", "template": "plain", "layers": 1, "heads": 2, "width": 8}
    init(Init(data=[data], template_text="<bos> {question} <sep> {answer} <eos>", **whitespace), str(tmp_path / "m"))
    save_weights(tmp_path / "m", randomised(model_of(tmp_path / "m")))
    lines = [{"question": words} for words in ("where is China", "where is Spain", "where is")]
    assert run(write_jsonl(tmp_path / "q.jsonl", lines), "-m", tmp_path / "m", "--max-new-tokens", 2) == Exit.DATA
    out, _ = capsysbinary.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first["question"] == "where is China"
    assert "q.jsonl:2: unknown word 'Spain'" in second["sft_error"]["message"]


def test_failed_run_leaves_an_older_output_file_alone(folder, tmp_path):
    (tmp_path / "out.jsonl").write_text("older\n")
    with pytest.raises(DataError):
        answer(folder, write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Why?"}, {"nothing": 1}]), tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "older\n"


def test_empty_input_is_an_empty_output_and_a_warning(folder, tmp_path, capsys):
    assert answer(folder, write_jsonl(tmp_path / "q.jsonl", []), tmp_path) == []
    assert "the input is empty" in capsys.readouterr().err


def test_model_without_weights_or_tokenizer_is_refused(tmp_path, prompts):
    with pytest.raises(CheckpointError, match="no weights"):
        answer(empty_folder(tmp_path / "empty", "llama"), prompts, tmp_path)
    folder = model_folder(tmp_path / "m", "llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        answer(folder, prompts, tmp_path)


def test_missing_prompts_and_empty_stop_are_refused(folder, tmp_path, prompts):
    with pytest.raises(UsageError, match=r"none\.jsonl"):
        answer(folder, str(tmp_path / "none.jsonl"), tmp_path)
    with pytest.raises(UsageError, match="--stop"):
        answer(folder, prompts, tmp_path, stop=[""])
