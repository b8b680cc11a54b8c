"""Masked LM (BERT): the vectors through the command line, and what every drawn row must hold."""

import json
import random

import pytest
from conftest import write_lines
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sftcli.recipe import MaskedLM, Tokenize
from sftcli.rows import IGNORE, Document
from sftcli.stages.tokenize import tokenize
from sftcli.text.folder import load_codec
from sftcli.text.objectives.masked_lm import POOL, count_of, pairs, sentences_of

LINES = ["One is here, or two.", "Is it three? Four", "five", "Six (seven) 8.5 nine."]


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A folder whose byte-level tokenizer has BERT's control tokens."""
    from conftest import run_in_process

    path = tmp_path_factory.mktemp("bert")
    data = write_lines(path / "data.jsonl", {"text": "\n".join(LINES)})
    made = run_in_process(
        "init", data, "-o", path / "base", "--set", "controls=bert", "--vocab-size", 320, "--set", "layers=1",
        "--set", "heads=2", "--set", "width=16",
    )  # fmt: skip
    assert made.code == 0, made.err
    return path / "base"


SIZE, COUNT = 40, 120  # tokens of a document, documents


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A folder whose vocabulary has SIZE words of every document; (folder, id of the first of them)."""
    from conftest import run_in_process

    path = tmp_path_factory.mktemp("words")
    data = write_lines(path / "data.jsonl", {"text": " ".join(f"w{n:05d}" for n in range(SIZE * COUNT))})
    made = run_in_process("init", data, "-o", path / "base", "--tokenizer", "whitespace", "--set", "controls=bert")
    assert made.code == 0, made.err
    codec = load_codec(path / "base")
    ids = codec.tokenizer.encode(" ".join(f"w{n:05d}" for n in range(SIZE * COUNT))).ids
    assert ids == list(range(ids[0], ids[0] + SIZE * COUNT))
    return path / "base", ids[0]


def document(number, first, sizes):
    """A document of one segment a sentence; its ids tell document and place."""
    ids = list(range(first + number * SIZE, first + number * SIZE + sum(sizes)))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    segments = [[end - size, end, "text", True] for end, size in zip(ends, sizes, strict=True)]
    return {"id": f"d{number}", "input_ids": ids, "segments": segments}


@pytest.fixture
def documents(words, tmp_path):
    stream = random.Random(4)
    made = []
    for number in range(COUNT):
        sizes, left = [], SIZE
        while left > 8:
            sizes.append(stream.randint(2, 8))
            left -= sizes[-1]
        made.append(document(number, words[1], sizes))
    return write_lines(tmp_path / "documents.jsonl", *made)


def restored(row):
    """The row before it was masked."""
    columns = zip(row["input_ids"], row["labels"], strict=True)
    return [token if label == IGNORE else label for token, label in columns]


def halves(row, codec):
    """A and B of a pair, as they were."""
    ids, middle = restored(row), row["token_type_ids"].index(1)
    assert (ids[0], ids[middle - 1], ids[-1]) == tuple(codec.added[name] for name in ("[CLS]", "[SEP]", "[SEP]"))
    assert row["token_type_ids"] == [0] * middle + [1] * (len(ids) - middle)
    return ids[1 : middle - 1], ids[middle:-1]


# ---- the vectors


@pytest.mark.parametrize(
    "length, count", [(3, 1), (10, 2), (13, 2), (20, 3), (30, 4), (50, 8), (70, 10), (90, 14), (200, 20)]
)
def test_bt_1_the_number_of_chosen_tokens_is_rounded_to_even_and_capped(sft, lines, words, length, count):
    folder, first = words
    data = lines({"input_ids": list(range(first, first + length - 2))})
    result = sft("mask", data, "-m", folder, "--objective", "bert", "--no-nsp", "--max-length", 200)
    (row,) = result.rows
    assert len(row["input_ids"]) == length
    assert sum(label != IGNORE for label in row["labels"]) == count == count_of(length, MaskedLM())


MARKS = [f"--set=objective.{name}={token}" for name, token in (("mask", 0), ("cls", 1), ("sep", 3))]


def test_bt_2_named_positions_are_masked_and_labelled_where_they_stand(sft, lines):
    data = lines({"input_ids": [4, 7, 5, 6, 8, 9, 10, 11]})
    result = sft("mask", data, "--objective", "bert", "--no-nsp", "--mask-positions", "2,6", "--show", 1, *MARKS)
    assert result.code == 0, result.err
    (row,) = result.rows
    assert row["input_ids"] == [1, 4, 0, 5, 6, 8, 0, 10, 11, 3]
    assert row["labels"] == [IGNORE, IGNORE, 7, IGNORE, IGNORE, IGNORE, 9, IGNORE, IGNORE, IGNORE]
    assert row["align"] == "same" and row["order"] == [0] * 10 and row["token_type_ids"] == [0] * 10
    assert "next_sentence_label" not in row and row["objective"] == "bert"
    assert result.err.split("sees\n")[1].count("1111111111") == 10


# ---- what is drawn


def drawn(sft, documents, folder, *flags):
    result = sft("mask", documents, "-m", folder, "--objective", "bert", *flags)
    assert result.code == 0, result.err
    return result.rows


def test_drawn_rows_keep_every_promise_over_ten_thousand_choices(sft, words, documents):
    folder, first = words
    codec = load_codec(folder)
    mask, kept, hidden, other, labels = codec.added["[MASK]"], 0, 0, 0, {0: 0, 1: 0}
    rows = drawn(sft, documents, folder, "--max-length", 24, "--set", "objective.copies=20")
    for row in rows:
        a, b = halves(row, codec)
        assert a and b and len(row["input_ids"]) <= 24 and row["order"] == [0] * len(row["input_ids"])
        assert a == list(range(a[0], a[-1] + 1)) and b == list(range(b[0], b[-1] + 1))
        number = int(row["id"][1:].partition(".")[0])
        of_a, of_b = (a[0] - first) // SIZE, (b[0] - first) // SIZE
        labels[row["next_sentence_label"]] += 1
        assert of_a == number and (of_b != number if row["next_sentence_label"] else of_b == number)
        if not row["next_sentence_label"]:  # it follows; what is missing between them was too much
            assert b[0] == a[-1] + 1 or (b[0] > a[-1] and len(row["input_ids"]) == 24)
        chosen = [t for t, label in enumerate(row["labels"]) if label != IGNORE]
        assert len(chosen) == count_of(len(row["input_ids"]), MaskedLM())
        assert not {row["labels"][t] for t in chosen} & codec.special_ids
        for t in chosen:
            now = row["input_ids"][t]
            hidden, kept = hidden + (now == mask), kept + (now == row["labels"][t])
            other += now not in (mask, row["labels"][t])
    total = hidden + kept + other
    assert total > 10_000 and len({row["id"] for row in rows}) == len(rows)
    assert [hidden / total, kept / total, other / total] == pytest.approx([0.8, 0.1, 0.1], abs=0.015)
    assert labels[1] > labels[0] > len(rows) / 4


def test_the_second_half_is_random_in_half_of_the_chunks_and_always_where_there_is_one_sentence():
    stream, counts = random.Random(7), {0: 0, 1: 0}
    alone = 0
    for number in range(4000):
        sentences = [[10 * n, 10 * n + 1] for n in range(stream.randint(1, 9))]
        at = 0
        for a, b, label in pairs(sentences, 8, 0.0, random.Random(number), lambda: [[900], [901], [902]]):
            left = min(len(sentences) - at, 4)  # of 2 tokens each, in 8
            if left == 1:
                assert label == 1
                alone += 1
            else:
                counts[label] += 1
            assert (b[0] >= 900) == (label == 1)
            at += len(a) // 2 if label else left
        assert at == len(sentences)  # nothing was lost
    assert alone > 500 and counts[1] / sum(counts.values()) == pytest.approx(0.5, abs=0.02)


def test_documents_of_one_sentence_always_get_a_stranger(sft, lines, words):
    folder, first = words
    rows = drawn(sft, lines(*(document(n, first, [6]) for n in range(50))), folder)
    assert len(rows) == 50 and {row["next_sentence_label"] for row in rows} == {1}


def test_a_row_is_drawn_from_the_seed_and_its_id_alone(sft, words, documents):
    folder = words[0]
    whole = drawn(sft, documents, folder, "--no-nsp", "--max-length", 24)
    assert whole == drawn(sft, documents, folder, "--no-nsp", "--max-length", 24, "--seed", 0)
    other = drawn(sft, documents, folder, "--no-nsp", "--max-length", 24, "--seed", 1)
    assert sum(a["input_ids"] == b["input_ids"] for a, b in zip(whole, other, strict=True)) < 5
    some = write_lines(documents.with_name("some.jsonl"), *reversed([json.loads(x) for x in documents.open()][30:]))
    ids = {row["id"]: row for row in whole}
    assert all(row == ids[row["id"]] for row in drawn(sft, some, folder, "--no-nsp", "--max-length", 24))
    assert drawn(sft, documents, folder) == drawn(sft, documents, folder)
    assert drawn(sft, documents, folder) != drawn(sft, documents, folder, "--seed", 1)


def test_strangers_come_from_all_that_was_read_and_memory_does_not_grow(sft, lines, words, monkeypatch):
    folder, first = words
    monkeypatch.setattr("sftcli.text.objectives.masked_lm.POOL", 16)
    codec = load_codec(folder)
    rows = drawn(sft, lines(*(document(n, first, [4]) for n in range(COUNT))), folder)
    origins = [(halves(row, codec)[1][0] - first) // SIZE for row in rows]
    assert POOL == 256 and len(rows) == COUNT
    assert all(origin < max(16, number) and origin != number for number, origin in enumerate(origins))
    assert len({origin for origin in origins[60:] if origin >= 16}) > 10


def test_without_pairs_a_text_is_cut_into_rows_that_lose_nothing(sft, lines, words):
    folder, first = words
    rows = drawn(sft, lines(document(0, first, [33])), folder, "--no-nsp", "--max-length", 12)
    codec = load_codec(folder)
    cls, sep = codec.added["[CLS]"], codec.added["[SEP]"]
    assert [len(row["input_ids"]) for row in rows] == [12, 12, 12, 5]
    texts = [restored(row) for row in rows]
    assert all(ids[0] == cls and ids[-1] == sep for ids in texts)
    assert [token for ids in texts for token in ids[1:-1]] == list(range(first, first + 33))


# ---- sentences


def sentences(folder, text, tmp_path):
    data = write_lines(tmp_path / "text.jsonl", {"text": text})
    tokenize(Tokenize(data=[str(data)]), str(folder), str(tmp_path / "tokens.jsonl"))
    codec = load_codec(folder)
    (line,) = (tmp_path / "tokens.jsonl").read_text().splitlines()
    found = Document(**json.loads(line) | {"segments": []})
    return [codec.decode(sentence) for sentence in sentences_of(found, codec)]


def test_a_line_is_a_sentence(bert, tmp_path):
    assert sentences(bert, "\n".join(LINES), tmp_path) == LINES
    assert sentences(bert, "\n\n".join(LINES) + "\n", tmp_path) == LINES
    assert sentences(bert, "one", tmp_path) == ["one"]


SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece(folder):
    """A tokenizer as BERT's folders have it, which writes [CLS] and [SEP] by itself."""
    words = [
        "one",
        "is",
        "here",
        "or",
        "two",
        "it",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "8",
        "5",
        "nine",
        ".",
        ",",
        "?",
        "(",
        ")",
        "the",
        "cat",
        "sat",
        "##s",
    ]
    vocabulary = {word: n for n, word in enumerate(SPECIALS + words)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(SPECIALS)
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {f"{name[1:-1].lower()}_token": name for name in SPECIALS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "BertTokenizer"}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(vocabulary)}))
    return folder


def test_a_tokenizer_without_line_ends_ends_sentences_with_their_marks(tmp_path):
    found = sentences(wordpiece(tmp_path / "m"), "One is here, or \u2603 two.\nIs it three? Four\n", tmp_path)
    assert found == ["one is here, or two.", "is it three?", "four"]  # decoding leaves [UNK] out


def test_a_bert_tokenizer_needs_no_template_and_its_control_tokens_come_once(sft, lines, tmp_path):
    folder = wordpiece(tmp_path / "m")
    data = lines(*({"text": f"one is here. {word} is [MASK] two."} for word in ("three", "four", "five")))
    tokens = sft("tokenize", data, "-m", folder)
    assert tokens.code == 0, tokens.err
    assert not any({2, 3, 4} & set(row["input_ids"]) for row in tokens.rows)  # a mask in a text stays text
    for flags in ((), ("--no-nsp",)):
        for row in sft("mask", "-m", folder, "--objective", "bert", *flags, stdin=tokens.out).rows:
            ids = restored(row)
            assert ids.count(2) == 1 and ids[0] == 2 and ids.count(3) == 2 - bool(flags) and ids[-1] == 3


# ---- what is shown and refused


def test_a_pair_is_shown_with_its_label(sft, lines, words):
    folder, first = words
    result = sft(
        "mask", lines(*(document(n, first, [3]) for n in range(2))), "-m", folder, "--objective", "bert", "--show", 1
    )
    assert "B is random" in result.err and "[[" in result.err


def test_pairs_need_a_second_document(sft, lines, words):
    folder, first = words
    data = lines(document(0, first, [4, 4, 4]))
    alone = sft("mask", data, "-m", folder, "--objective", "bert")
    assert alone.code == 3 and "need a second document" in alone.err and "--no-nsp" in alone.err
    assert sft("mask", data, "-m", folder, "--objective", "bert", "--no-nsp").code == 0


@pytest.mark.parametrize(
    "flags, code, told",
    [
        (("--train-on", "last"), 2, "objective bert has no train_on last"),
        (("--level", "sentence"), 2, "objective.level: unknown key"),
        (("--set", "objective.rate=1.5"), 2, "objective.rate"),
        (("--max-length", "4"), 2, "too short for masked LM"),
        (("--set", "objective.sep=1"), 2, "must be three ids"),
        (("--mask-positions", "0"), 3, "mask position 0 is that of a control token"),
        (("--mask-positions", "10"), 3, "mask position 10 of 10"),
        ((), 2, "random tokens need the tokenizer"),
    ],
)
def test_flags_that_do_not_fit_are_named(sft, lines, flags, code, told):
    data = lines(*({"input_ids": [4, 5, 6, 7, 8, 9, 10, 11]} for _ in range(40)))
    result = sft("mask", data, "--objective", "bert", "--no-nsp", *MARKS, *flags)
    assert (result.code, told in result.err) == (code, True), result.err


def test_control_tokens_come_from_the_tokenizer_or_are_asked_for(sft, lines, base):
    data = lines({"input_ids": [4, 5, 6]})
    nowhere = sft("mask", data, "--objective", "bert")
    assert nowhere.code == 2 and "the tokenizer of these documents is not known here" in nowhere.err
    lacking = sft("mask", data, "--objective", "bert", "-m", base)
    assert lacking.code == 2 and "[CLS], which the tokenizer lacks" in lacking.err and "controls=bert" in lacking.err


def test_a_document_of_control_tokens_is_dropped_and_counted(sft, lines, words):
    folder, first = words
    cls = load_codec(folder).added["[CLS]"]
    data = lines({"input_ids": [cls, cls]}, {"input_ids": list(range(first, first + 9))})
    result = sft("mask", data, "-m", folder, "--objective", "bert", "--no-nsp")
    assert len(result.rows) == 1 and "1 dropped (1 no text" in result.err
