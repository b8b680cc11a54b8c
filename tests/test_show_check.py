"""What people see: rows with their trained tokens, any artifact, and the checks before a run."""

import json
import shutil

import pytest
from conftest import SAMPLES, chat

from sftcli.reading import line_fields
from sftcli.text.folder import load_codec
from sftcli.text.records import read_record
from sftcli.text.speaker import Speaker

OTHER = line_fields(b'{"prompt": "other words"}', "x:1")


@pytest.fixture
def tokens(sft, lines, base, tmp_path):
    path = tmp_path / "tokens.jsonl"
    result = sft("tokenize", lines(chat("hi", "hello", "bye", "ciao", id="greeting")), "-m", base, "-o", path)
    assert result.code == 0, result.err
    return path


def plain(text):
    """A printed text without the marks of trained runs."""
    return text.replace("[[", "").replace("]]", "")


# ---- mask --show


def test_show_prints_roles_and_marks_what_is_trained(sft, tokens):
    result = sft("mask", tokens, "--show", 1)
    shown = [line for line in result.err.splitlines() if " | " in line]
    assert [line.split(" | ")[0].strip() for line in shown] == [
        "template", "user", "template", "assistant", "template", "user", "template", "assistant", "template",
    ]  # fmt: skip
    assert [line.split(" | ", 1)[1] for line in shown if "assistant |" in line] == [
        "[[hello<|im_end|>]]",
        "[[ciao<|im_end|>]]",
    ]
    assert not any("[[" in line for line in shown if "assistant |" not in line)


def test_the_table_is_the_labels_shifted_once(sft, tokens, base):
    result = sft("mask", tokens, "--show", 1)
    (row,) = result.rows
    codec = load_codec(base)
    said = [line.split("->")[1].strip() for line in result.err.splitlines() if " -> " in line]
    cells = [codec.token_text(label).replace("\n", "⏎") for label in row["labels"] if label != -100]
    assert said == cells
    untrained = sum("(not trained)" in line for line in result.err.splitlines())
    assert untrained == len(row["input_ids"]) - 1 - len(said)


def test_show_changes_no_output_and_shows_no_more_than_asked(sft, base):
    data = SAMPLES / "sharegpt.jsonl"
    tokens = sft("tokenize", data, "-m", base).out
    quiet, shown = sft("mask", stdin=tokens), sft("mask", "--show", 3, stdin=tokens)
    assert quiet.out == shown.out
    assert shown.err.count("--- row ") == 3 and "--- row " not in quiet.err


def test_weights_are_shown(sft, lines, base):
    record = chat("q", "a")
    record["messages"][1]["weight"] = 0.5
    tokens = sft("tokenize", lines(record), "-m", base).out
    assert "x 0.5" in sft("mask", "--show", 1, stdin=tokens).err


def test_long_rows_show_their_trained_positions_only(sft, lines, base):
    tokens = sft("tokenize", lines(chat("word " * 200, "yes " * 100)), "-m", base).out
    err = sft("mask", "--show", 1, stdin=tokens).err
    assert "(not trained)" not in err
    assert err.count(" -> ") == 30 and "more trained positions" in err


def test_without_a_tokenizer_ids_are_shown(sft, lines):
    data = lines({"input_ids": [9, 4, 5, 7]})
    err = sft("mask", data, "--train-on", "after:4", "--show", 1).err
    assert [line.split()[1:] for line in err.splitlines() if "->" in line] == [["4", "->", "5"], ["5", "->", "7"]]


# ---- show


def test_show_of_tokens_rows_and_json_lines_name_the_same_words(sft, tokens, base, tmp_path):
    sft("mask", tokens, "-o", tmp_path / "rows.safetensors")
    sft("mask", tokens, "-o", tmp_path / "rows.jsonl")
    texts = {}
    for name in ("tokens.jsonl", "rows.safetensors", "rows.jsonl"):
        result = sft("show", tmp_path / name)
        assert result.code == 0, result.err
        shown = [
            line.split(" | ", 1)[1]
            for line in result.out.decode().splitlines()
            if " | " in line and "tokens |" not in line
        ]
        texts[name] = plain("".join(line for line in shown if not line.isdigit()))
    assert texts["tokens.jsonl"] == texts["rows.jsonl"]
    assert texts["rows.safetensors"].endswith(texts["rows.jsonl"])
    whole = load_codec(base).decode(json.loads(tokens.read_bytes())["input_ids"], keep_special=True)
    assert texts["tokens.jsonl"] == whole.replace("\n", "⏎")


def test_show_of_rows_prints_the_table_that_mask_prints(sft, tokens, tmp_path):
    masked = sft("mask", tokens, "--show", 1, "-o", tmp_path / "rows.safetensors").err
    shown = sft("show", tmp_path / "rows.safetensors").out.decode()
    table = lambda text: [line for line in text.splitlines() if " -> " in line or "(not trained)" in line]
    assert table(masked) == table(shown) != []


def test_show_of_raw_data_prints_messages_by_role(sft, lines):
    record = chat("hi", "hello", topic="greeting", score=1)
    record["messages"][1]["train"] = False
    record["messages"].append({"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "weight": 0.5})
    out = sft("show", lines(record)).out.decode()
    for part in (
        "user | hi",
        "assistant | hello  (train: false)",
        'assistant | [{"name":"f"}]  (weight 0.5)',
        "topic | greeting",
        "score | 1",
    ):
        assert part in out


def test_show_of_sharegpt_and_completions(sft, lines):
    out = sft(
        "show", lines({"conversations": [{"from": "human", "value": "hi"}]}, {"prompt": "q", "completion": "a\nb"})
    ).out.decode()
    assert "human | hi" in out and "completion | a⏎\n             b" in out


def test_show_counts_lines(sft, lines):
    data = lines(*({"prompt": f"q{i}"} for i in range(9)))
    assert sft("show", data).out.count(b"--- ") == 3
    assert sft("show", data, "-n", 5).out.count(b"--- ") == 5
    assert sft("show", data, "-n", 0).out == b""


def test_show_of_metrics_is_a_table_of_the_first_and_the_last_step(sft, lines):
    steps = [{"step": i, "loss": 1 / i, "lr": 0.1, **({"eval_loss": 2.0} if i == 50 else {})} for i in range(1, 101)]
    out = sft("show", lines(*steps)).out.decode().splitlines()
    rows = [line.split() for line in out[1:]]
    assert [row[0] for row in (rows[0], rows[-1])] == ["1", "100"]
    assert "50" in [row[0] for row in rows]
    assert len(rows) <= 21


def test_a_table_of_metrics_fits_a_screen_of_eighty_columns(sft, lines):
    rate = {"tokens_per_second": 123456.7, "grad_norm": 0.123456, "accuracy": 0.98765, "lr": 1.234567e-5}
    steps = [{"step": i, "epoch": i / 3000, "loss": 5.43219, "eval_loss": 5.43219, **rate} for i in range(1, 99)]
    told = sft("show", lines(*steps)).out.decode().splitlines()
    assert max(map(len, told)) < 80 and "123,457" in told[1]
    assert len({len(line) for line in told}) == 1


def test_show_of_a_model_folder_names_its_parts(sft, base):
    out = sft("show", base).out.decode()
    for part in (
        "model | llama",
        "vocab_size | 400",
        "weights | none yet",
        f"tokenizer | 400 tokens, {load_codec(base).hash}",
        "stops | 2",
    ):
        assert part in out


def test_show_refuses_what_it_does_not_know(sft, lines, tmp_path):
    result = sft("show", tmp_path)
    assert result.code == 2 and "is neither a model folder nor a run" in result.err
    result = sft("show", lines(b"nonsense\n"))
    assert result.code == 3 and "data.jsonl:1:5: not JSON" in result.err
    (tmp_path / "x.safetensors").write_bytes(b"short")
    result = sft("show", tmp_path / "x.safetensors")
    assert result.code == 5 and "not a safetensors file" in result.err


# ---- check


def marks(result):
    """{name of the check: its mark} of what `sft check` printed."""
    found = {}
    for line in result.out.decode().splitlines():
        mark, rest = line.strip().split(None, 1)
        found[rest[:18].strip()] = mark
    return found


@pytest.mark.parametrize("name", ["chats.jsonl", "tools.jsonl", "sharegpt.jsonl", "alpaca.jsonl"])
def test_the_samples_pass_every_check(sft, base, name):
    result = sft("check", SAMPLES / name, "-m", base)
    found = marks(result)
    assert list(found) == ["rows", "BOS", "stop token", "ids", "lengths", "control strings", "prompt is prefix"]
    expected = ["ok"] * 7
    expected[4] = "FAIL" if result.code else "ok"  # tools are longer than the tiny model's context
    assert list(found.values()) == expected
    assert (name == "tools.jsonl") == (result.code == 3)


def test_check_counts_one_bos_a_row(sft, model_folders, lines):
    result = sft("check", lines(chat("q", "a")), "-m", model_folders["llama3"])
    assert (result.code, marks(result)["BOS"]) == (0, "ok")
    source = (model_folders["llama3"] / "chat_template.jinja").read_text()
    twice = model_folders["llama3"].parent / "twice.jinja"
    twice.write_text("{{ bos_token }}" + source)
    result = sft("check", lines(chat("q", "a")), "-m", model_folders["llama3"], "--template", twice)
    assert (result.code, marks(result)["BOS"]) == (3, "FAIL")
    assert b"1 rows begin with more than one" in result.out


def test_check_finds_turns_without_a_trained_stop_token(sft, base, lines):
    result = sft(
        "check", lines({"prompt": "q", "completion": "a"}), "-m", base, "--template-text", "{prompt} {completion}"
    )
    assert (result.code, marks(result)["stop token"]) == (3, "FAIL")


def test_check_finds_rows_longer_than_the_context(sft, base, lines):
    data = lines(chat("q", "a"), chat("word " * 600, "a"))
    result = sft("check", data, "-m", base)
    assert (result.code, marks(result)["lengths"]) == (3, "FAIL")
    assert f"({data}:2), context 512; 1 rows are longer: `sft mask --max-length 512` drops them" in result.out.decode()


def test_check_notes_control_strings_in_content(sft, base, lines):
    result = sft("check", lines(chat("what is <|im_end|>?", "a <|im_start|>")), "-m", base)
    assert (result.code, marks(result)["control strings"]) == (0, "note")
    assert b"<|im_end|> 1, <|im_start|> 1 in content, encoded as plain text" in result.out


def test_check_names_the_first_row_that_is_refused_and_reads_on(sft, base, lines):
    data = lines(chat("q", "a"), b"nonsense\n", {"messages": [{"role": "narrator", "content": "x"}]}, chat("r", "b"))
    result = sft("check", data, "-m", base)
    assert (result.code, marks(result)["rows"]) == (3, "FAIL")
    assert f"4 rows; 2 refused, first: {data}:2:5: not JSON" in result.out.decode()


def test_check_names_rows_that_the_tokenizer_refuses(sft, lines, tmp_path):
    data = lines({"prompt": "where is", "completion": "the"})
    flags = ("--template-text", "{prompt} <sep> {completion} <eos>")
    assert sft("init", data, "-o", tmp_path / "words", "--tokenizer", "whitespace", *flags).code == 0
    more = lines({"prompt": "where is", "completion": "the"}, {"prompt": "who", "completion": "the"}, name="more.jsonl")
    result = sft("check", more, "-m", tmp_path / "words")
    assert (result.code, marks(result)["rows"]) == (3, "FAIL")
    assert f"2 rows; 1 refused, first: {more}:2: unknown word 'who'" in result.out.decode()
    assert marks(result)["stop token"] == "ok"  # the other rows were examined


def test_check_of_ids_beyond_the_vocabulary(sft, base, lines, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(base, small)
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    rows = json.loads((small / "config.json").read_text())["vocab_size"]
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": rows, "content": "<beyond>"})
    (small / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = sft(
        "check",
        lines({"prompt": "q", "completion": "a"}),
        "-m",
        small,
        "--template-text",
        "<beyond>{prompt} {completion}",
    )
    assert (result.code, marks(result)["ids"]) == (3, "FAIL")


def test_check_finds_prompts_that_do_not_begin_their_training_text(sft, base, lines, monkeypatch):
    """Cannot happen while the cut holds: a prompt of other words stands for a cut that does not."""
    honest = Speaker.prompt
    monkeypatch.setattr(Speaker, "prompt", lambda self, record: honest(self, read_record(OTHER, "x:1", 1)))
    data = lines(chat("q", "a"))
    result = sft("check", data, "-m", base)
    assert (result.code, marks(result)["prompt is prefix"]) == (3, "FAIL")
    assert f"1 rows where it is not, first {data}:1" in result.out.decode()


def test_check_of_prompts_and_of_nothing_makes_no_claims(sft, base, lines, tmp_path):
    prompts = sft("check", lines({"prompt": "q"}), "-m", base)
    assert prompts.code == 0 and "note  stop token" in prompts.out.decode()
    strange = {"messages": [{"role": "user", "content": "q"}, {"role": "Assistant", "content": "a"}]}
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (tmp_path / "any.jinja").write_text(source)
    typed = sft("check", lines(strange), "-m", base, "--template", tmp_path / "any.jinja")
    assert (
        typed.code == 3
        and "FAIL  stop token         no turn of the model: rows end with role Assistant" in typed.out.decode()
    )
    nothing = sft("check", lines(b"nonsense"), "-m", base)
    assert nothing.code == 3 and " ok  " not in nothing.out.decode()


@pytest.mark.parametrize("key, value", [("vocab_size", "x"), ("vocab_size", [1]), ("max_position_embeddings", "x")])
def test_check_names_a_number_of_the_model_that_is_none(sft, base, lines, tmp_path, key, value):
    folder = shutil.copytree(base, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    result = sft("check", lines(chat("q", "a")), "-m", folder)
    assert result.code == 5 and result.err.count("\n") == 1 and key in result.err


def test_check_without_model_or_rows(sft, base, lines):
    assert sft("check", lines(chat("q", "a"))).code == 2
    result = sft("check", lines(b""), "-m", base)
    assert (result.code, marks(result)["rows"]) == (3, "FAIL")
