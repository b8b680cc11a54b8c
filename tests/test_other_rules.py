"""Masks by other people's rules: what we write is trained there as here, what they write is trained here as there.

GPT-NeoX's loader, Hugging Face's shift and MiniMind's scan and loss are written out plainly below, from their
definitions; all of them score the same logits Z in float64.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from model_fixtures import model_folder, model_of

from sftcli.model.batches import make_batch, weight_of
from sftcli.model.loss import projected_loss
from sftcli.rows import IGNORE, Row

CLASSES = 40
SEQ_LEN = 40
START, END = [1, 30, 31], [2, 32]  # markers as MiniMind's: <|im_start|>assistant\n and <|im_end|>\n


def z(b, length, classes=CLASSES):
    """The deterministic test logits (length, classes)."""
    t, v = torch.arange(length, dtype=torch.float64)[:, None], torch.arange(classes, dtype=torch.float64)
    return ((3 * b + 5 * t + 7 * v + t * v) % 13) / 5


# ---- their rules, plainly


def neox_loss(rows, eod=None):
    """megatron's get_batch_pipe and loss over rows of seq_len + 1 `text` and `label`."""
    text, label = (torch.tensor([row[name] for row in rows]) for name in ("text", "label"))
    tokens = text[:, :-1]
    mask = (label >= 0)[:, 1:].double()
    labels = torch.where(label >= 0, label, torch.zeros_like(label))[:, 1:]
    if eod is not None:
        mask = mask * (tokens != eod)
    logits = torch.stack([z(b, tokens.shape[1]) for b in range(len(rows))])
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(mask)
    return float((nll * mask).sum() / mask.sum()), mask


def huggingface_loss(rows):
    """A collator's right pads, then the model's shift: labels padded with one -100 and moved by one."""
    longest = max(len(row["labels"]) for row in rows)
    labels = torch.tensor([row["labels"] + [IGNORE] * (longest - len(row["labels"])) for row in rows])
    shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    logits = torch.stack([z(b, longest) for b in range(len(rows))])
    items = (labels[:, 1:] != IGNORE).sum()
    return float(F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum") / items)


def minimind_mask(ids, start, end):
    """Its generate_loss_mask: from behind each start marker to the end marker, which counts, or the end of the row."""
    mask, i = [0] * len(ids), 0
    while i < len(ids):
        if ids[i : i + len(start)] == start:
            begin = i + len(start)
            stop = begin
            while stop < len(ids) and ids[stop : stop + len(end)] != end:
                stop += 1
            for j in range(begin, min(stop + len(end), len(ids))):
                mask[j] = 1
            i = stop + len(end)
        else:
            i += 1
    return mask


def minimind_loss(rows):
    """Its older form: X = ids[:-1], Y = ids[1:], loss_mask = mask[1:], CE with reduction='none', then the mask."""
    total = weight = 0.0
    for b, (ids, mask) in enumerate(rows):
        kept = torch.tensor(mask[1:], dtype=torch.float64)
        nll = F.cross_entropy(z(b, len(ids))[:-1], torch.tensor(ids[1:]), reduction="none")
        total, weight = total + float((nll * kept).sum()), weight + float(kept.sum())
    return total / weight


def our_loss(lines):
    """Lines of rows through our batch, which shifts, and our loss."""
    rows = [Row(**{"tokenizer": None, "template": None} | line) for line in lines]
    batch = make_batch(rows)
    number = {id(row): b for b, row in enumerate(rows)}
    logits = torch.cat([z(number[id(row)], len(row.input_ids)) for row in batch.rows]).float()
    found = projected_loss(
        torch.eye(len(logits))[batch.scored], logits.T.contiguous(), None, batch.targets, batch.weights
    )
    return float(found.total) / weight_of(rows)


# ---- data


@pytest.fixture
def documents():
    """Conversations of ids under MiniMind's markers; the last answer of some is cut off, the last row is full."""
    draw = random.Random(0)
    found = []
    for length in (13, 16, 20, 27, 33, SEQ_LEN + 1):
        ids, segments = [], []
        while len(ids) < length:
            question = [1, 33, 31, *draw.choices(range(3, 30), k=draw.randint(1, 3)), *END]
            answer = [*draw.choices(range(3, 30), k=draw.randint(1, 3)), *END]
            begin = len(ids) + len(question) + len(START)
            segments.append([begin, begin + len(answer), "assistant", True])
            ids += question + START + answer
        segments = [[a, min(b, length), *rest] for a, b, *rest in segments if a < length]
        if segments:
            found.append({"id": str(length), "input_ids": ids[:length], "segments": segments})
    assert len(found) == 6
    return found


def written(sft, data, *flags):
    result = sft("mask", data, *flags)
    assert result.code == 0, result.err
    return result.rows


def trained(row):
    return [t for t, label in enumerate(row["labels"]) if label != IGNORE]


# ---- out


def test_rows_have_the_same_loss_under_every_projects_rule(sft, lines, documents):
    data = lines(*documents)
    ours = written(sft, data)
    expected = our_loss(ours)
    assert huggingface_loss(written(sft, data, "--format", "hf")) == pytest.approx(expected, abs=1e-6)
    neox = written(sft, data, "--format", "neox", "--seq-len", SEQ_LEN)
    assert neox_loss(neox)[0] == pytest.approx(expected, abs=1e-6)
    assert {len(row["text"]) for row in neox} == {SEQ_LEN + 1}
    marked = [(doc["input_ids"], minimind_mask(doc["input_ids"], START, END)) for doc in documents]
    assert minimind_loss(marked) == pytest.approx(expected, abs=1e-6)
    assert [trained(row) for row in ours] == [[t for t, m in enumerate(mask) if m] for _, mask in marked]


@pytest.mark.parametrize("flags", [(), ("--train-on", "all")])
def test_eod_mask_loss_is_gpt_neoxs(sft, lines, documents, flags):
    """Its second mask is made of the inputs; ours of labels before the shift."""
    data = lines(*documents)
    for eod in (2, 32, 5):
        ours = written(sft, data, *flags, "--eod-mask-loss", eod)
        neox = written(sft, data, *flags, "--eod-mask-loss", eod, "--format", "neox", "--seq-len", SEQ_LEN)
        loss, mask = neox_loss(neox, eod)
        assert loss == pytest.approx(our_loss(ours), abs=1e-6)
        assert mask.tolist() == [row["loss_mask"] for row in neox]  # from `label`, theirs; from our labels, ours


def test_markers_train_what_minimind_trains_wherever_a_row_is_cut(sft, lines, documents):
    ids = next(doc["input_ids"] for doc in documents if doc["id"] == "33")
    rule = f"between:{','.join(map(str, START))}:{','.join(map(str, END))}"
    cuts = [cut for cut in range(len(START) + 6, len(ids) + 1) if any(minimind_mask(ids[:cut], START, END))]
    found = written(sft, lines(*({"input_ids": ids[:cut]} for cut in cuts)), "--train-on", rule)
    assert len(found) == len(cuts) > 5
    for cut, row in zip(cuts, found, strict=True):
        assert trained(row) == [t for t, m in enumerate(minimind_mask(ids[:cut], START, END)) if m]


def test_off_by_one_of_minimind_in_2025_is_another_mask(sft, lines):
    """Markers that end in the newline and a range that starts one late: {14 15 16}, {29 .. 32} instead of MM-1's."""
    from test_vectors_masks import MARKERS, MINIMIND

    right = trained(written(sft, lines({"input_ids": MINIMIND}), *MARKERS)[0])
    late = [t + 1 for t in right]
    assert (right, late) == ([13, 14, 15, 28, 29, 30, 31], [14, 15, 16, 29, 30, 31, 32])
    assert right == [t for t, m in enumerate(minimind_mask(MINIMIND, [1, 1388, 570, 811, 234], [2, 234])) if m]


def test_conversations_as_minimind_has_them_are_trained_as_minimind_does(sft, lines, base):
    """Through the chat template: our own words, and the newline behind the end of turn where its markers say so."""
    from sftcli.text.folder import load_codec

    turns = [("user", "How many bikes?"), ("assistant", "Two."), ("user", "And cars?"), ("assistant", "None at all.")]
    data = lines({"conversations": [{"role": role, "content": text} for role, text in turns]})
    tokens = sft("tokenize", data, "-m", base)
    assert tokens.code == 0, tokens.err
    codec = load_codec(base)
    newline = codec.tokenizer.encode("\n", add_special_tokens=False).ids
    start = [codec.added["<|im_start|>"], *codec.tokenizer.encode("assistant\n", add_special_tokens=False).ids]
    end = [codec.added["<|im_end|>"], *newline]
    rule = f"between:{','.join(map(str, start))}:{','.join(map(str, end))}"
    (marked,) = sft("mask", "--train-on", rule, stdin=tokens.out).rows
    (own,) = sft("mask", stdin=tokens.out).rows
    ids = own["input_ids"]
    assert trained(marked) == [t for t, m in enumerate(minimind_mask(ids, start, end)) if m]
    assert set(trained(marked)) - set(trained(own)) == {
        end_at + 1 for _, end_at, _, _ in own["turns"] for end_at in [end_at - 1]
    }
    assert set(trained(own)) < set(trained(marked))


# ---- in, and round trips


@pytest.mark.parametrize("flags", [(), ("--train-on", "last"), ("--train-on", "all"), ("--eod-mask-loss", "32")])
@pytest.mark.parametrize("form", [("hf",), ("neox", "--seq-len", SEQ_LEN)])
def test_what_is_written_for_others_is_read_back_as_it_was(sft, lines, documents, form, flags):
    ours = written(sft, lines(*documents), *flags)
    theirs = written(sft, lines(*documents), *flags, "--format", *form)
    again = written(sft, lines(*theirs, name="again.jsonl"))
    assert [row["input_ids"] for row in again] == [row["input_ids"] for row in ours]
    assert [trained(row) for row in again] == [trained(row) for row in ours]
    assert again == [{k: v for k, v in row.items() if k != "turns"} for row in ours]


def test_weights_come_back_from_hugging_faces_format_and_gpt_neoxs_says_that_it_has_none(sft, lines, documents):
    documents[0]["segments"][0].append(0.5)
    documents[0]["segments"] = documents[0]["segments"][:1]
    data = lines(*documents)
    theirs = written(sft, data, "--format", "hf")
    again = written(sft, lines(*theirs, name="again.jsonl"))
    assert again[0]["loss_weight"] == written(sft, data)[0]["loss_weight"]
    told = sft("mask", data, "--format", "neox", "--seq-len", SEQ_LEN).err
    assert "warning: mask: GPT-NeoX's labels hold no weights: 1 rows are trained in full there" in told


def test_files_of_gpt_neox_are_trained_as_there(sft, lines):
    """`text` and `label` alone (any negative label is masked), or `text` alone, whose every token is trained."""
    text = [9, 9, 4, 5, 4, 5, 7, 0, 0]
    label = [-100, -1, -100, -100, 4, 5, 7, -100, -100]
    (row,) = written(sft, lines({"text": text, "label": label}))
    assert (row["input_ids"], row["labels"]) == (text[:7], [-100] * 4 + [4, 5, 7])
    assert our_loss([row]) == pytest.approx(neox_loss([{"text": text, "label": label}])[0], abs=1e-6)
    (row,) = written(sft, lines({"text": text}), "--train-on", "all")
    assert our_loss([row]) == pytest.approx(neox_loss([{"text": text, "label": text}])[0], abs=1e-6)
    for flags in ((), ("--train-on", "last")):
        assert sft("mask", lines({"text": text}), *flags).code == 3
    kept = written(sft, lines({"text": text, "label": [-100] * 8 + [0]}))
    assert kept[0]["input_ids"] == text  # a trained 0 is no padding


def test_padded_rows_of_hugging_face_are_read_without_their_pads(sft, lines):
    plain = {"id": "1", "input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    (expected,) = written(sft, lines(plain))
    for left, right in ((2, 0), (0, 3), (2, 1)):
        padded = {
            "id": "1",
            "input_ids": [9] * left + [5, 6, 7] + [9] * right,
            "labels": [-100] * left + [-100, 6, 7] + [-100] * right,
            "attention_mask": [0] * left + [1] * 3 + [0] * right,
        }
        assert written(sft, lines(padded)) == [expected]


@pytest.mark.parametrize(
    "record, told",
    [
        ({"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1, 0]}, "a pad is trained at $.attention_mask; hint"),
        ({"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1]}, "1 values for 2 input_ids at $.attention_mask"),
        ({"input_ids": [5, 6, 7], "labels": [5, 6, 7], "attention_mask": [1, 0, 1]}, "not 0 for pads at an end"),
        ({"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [0, 0]}, "no tokens but pads"),
        ({"input_ids": [5, 6], "labels": [5, 6], "loss_weight": [1]}, "1 values for 2 input_ids at $.loss_weight"),
        ({"input_ids": [5, 6], "labels": [5, 6], "loss_weight": [1, -1]}, "a weight must be 0 or more at $.loss_weight"),
        ({"text": [], "label": []}, "no tokens at $.text"),
        ({"text": [5, 6], "label": [6, -100]}, "label 6 under token 5 at $.label[0]; hint: these labels are shifted"),
        ({"text": [5, 6], "label": [5]}, "1 values for 2 input_ids at $.label"),
        ({"text": [5, "x"], "label": [5, 6]}, "Expected `int`, got `str` at $.text[1]"),
    ],
)  # fmt: skip
def test_what_would_be_trained_otherwise_there_is_refused_with_its_field(sft, lines, record, told):
    result = sft("mask", lines({"input_ids": [5, 6], "labels": [-100, 6]}, record))
    assert result.code == 3
    assert "data.jsonl:2: " in result.err and told in result.err, result.err


def test_rows_of_gpt_neox_go_through_tokenize(sft, lines, base):
    record = {"id": "x", "text": [5, 6, 7, 0], "label": [-100, 6, 7, -100], "topic": "t"}
    tokens = sft("tokenize", lines(record), "-m", base)
    assert "1 rows in (1 tokens), 1 documents" in tokens.err
    (row,) = sft("mask", stdin=tokens.out).rows
    assert (row["input_ids"], row["labels"], row["topic"]) == ([5, 6, 7], [-100, 6, 7], "t")
    assert not {"text", "label"} & set(row)
    result = sft("tokenize", lines({"text": [5, 400], "label": [-100, 400]}), "-m", base)
    assert result.code == 3 and "id 400 is beyond the vocabulary of 400" in result.err


# ---- a model: loss and gradient


def test_loss_and_gradient_are_the_same_under_the_three_views_and_those_of_transformers(
    sft, lines, documents, tmp_path
):
    """DEFINITIONS 2 (d): hf, neox and minimind views of rows, and LlamaForCausalLM(labels=...) on the same folder."""
    transformers = pytest.importorskip("transformers")
    folder = model_folder(tmp_path / "m", "llama", layers=1)
    ours = [Row(**{"tokenizer": None, "template": None} | line) for line in written(sft, lines(*documents))]
    neox = written(sft, lines(*documents), "--format", "neox", "--seq-len", SEQ_LEN)
    model = model_of(folder)
    found = model(make_batch(ours))
    (sum(part.total for part in found.values()) / weight_of(ours)).backward()
    expected, gradient = (
        sum(float(part.total.detach()) for part in found.values()) / weight_of(ours),
        model.embedding.weight.grad,
    )

    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    nlls = {"hf": [], "neox": [], "minimind": []}
    for row, line in zip(ours, neox, strict=True):
        n, ids, labels = len(row.input_ids), torch.tensor([row.input_ids]), torch.tensor([row.labels])
        nlls["hf"].append(theirs(ids, labels=labels, num_items_in_batch=1).loss)
        padded = theirs(torch.tensor([line["tokens"]])).logits[0]
        each = F.cross_entropy(padded, torch.tensor(line["labels"]), reduction="none")
        nlls["neox"].append((each * torch.tensor(line["loss_mask"])).sum())
        each = F.cross_entropy(theirs(ids).logits[0, : n - 1], ids[0, 1:], reduction="none")
        nlls["minimind"].append((each * torch.tensor(minimind_mask(row.input_ids, START, END)[1:])).sum())
    for name, sums in nlls.items():
        theirs.zero_grad()
        loss = sum(sums) / weight_of(ours)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(expected, abs=1e-6), name
        torch.testing.assert_close(theirs.model.embed_tokens.weight.grad, gradient, atol=1e-5, rtol=1e-4, msg=name)
