"""Filling blanks: batched as one by one, each token as if the row so far were a trained row, several from left to right."""

import json

import pytest
import torch
from conftest import ROOT
from model_fixtures import PRESETS, make_row, model_folder, random_ids, randomised
from test_block_positions import logits_of, with_table

from sftcli.model.checkpoint import add_block_positions, load_model, open_folder, save_model
from sftcli.model.decoding import Completion, generate, in_order
from sftcli.model.growth import Blanks, Grown, Prompt, blanks_of_row
from sftcli.recipe import Generate
from sftcli.recipefile import load_recipe
from sftcli.rows import Document
from sftcli.text.folder import load_codec
from sftcli.text.objectives import blank_infilling
from sftcli.text.objectives.blank_infilling import Marks

MASK, SOP, EOP = 3, 4, 5


@pytest.fixture(params=PRESETS)
def model(request, tmp_path):
    return with_table(model_folder(tmp_path / "m", request.param))


def prompt_of(length, places, key):
    ids = random_ids(length, length)
    for place in places:
        ids[place] = MASK
    return Prompt(ids, key, blanks=Blanks(tuple(places), SOP))


PROMPTS = [
    prompt_of(6, [2, 4], "a"),
    prompt_of(3, [2], "b"),
    prompt_of(11, [0, 5, 10], "c"),
    Prompt(random_ids(7, 7), "plain"),
    prompt_of(20, [7], "d"),
]


def complete(model, prompts, stops, **options):
    options = Generate(**{"max_new_tokens": 12} | options)
    return list(in_order(generate(model, prompts, options, stops)))


def stops_of(model):
    """Ids that end a blank after a few tokens: the third of each greedy fill, and every third id."""
    return {done.ids[2] for done in complete(model, PROMPTS, ())} | set(range(0, 300, 3))


def by_trained_rows(model, prompt, stops, limit=12):
    """The same by a whole forward a token, of a row as the text side lays it out: no cache, no batch."""
    places, text = prompt.blanks.places, list(prompt.ids)
    fills, made = [[] for _ in places], 0
    for number in range(len(places)):
        while True:
            spans, whole = [], []
            for place, token in enumerate(text):
                words = [token]
                if place in places[: number + 1]:
                    fill = fills[places.index(place)]
                    words = [*fill, 0] if place == places[number] else fill
                    spans.append((len(whole), len(whole) + len(words)))
                whole += words
            row = blank_infilling.infilled(
                Document(id="r", input_ids=whole, segments=[]),
                blank_infilling.Blanks(spans, list(range(len(spans)))),
                Marks(MASK, SOP, EOP),
            )
            row = cut(row, text, fills, number)
            (logits,) = logits_of(model, row)
            token = int(logits[-1].argmax())
            if token in stops:
                break
            fills[number].append(token)
            made += 1
            if made == limit:
                return fills
    return fills


def cut(row, text, fills, number):
    """The row as it stands before the next token of blank `number`: its last filling ends with the newest token."""
    size = len(text)
    fed = sum(1 + len(fill) for fill in fills[: number + 1])
    names = ("input_ids", "labels", "position_ids", "block_position_ids", "order")
    columns = {name: getattr(row, name)[: size + fed] for name in names}
    assert columns["input_ids"][:size] == text
    return make_row(columns.pop("input_ids"), columns.pop("labels"), align="same", **columns)


def test_a_filled_prompt_is_the_row_that_would_be_trained(model):
    stops = stops_of(model)
    for prompt in PROMPTS:
        if prompt.blanks is None:
            continue
        (done,) = complete(model, [prompt], stops)
        expected = by_trained_rows(model, prompt, stops)
        assert done.ids == [token for fill in expected for token in fill]
        ends = torch.tensor([len(fill) for fill in expected]).cumsum(0).tolist()
        assert done.ends == ends[: len(done.ends)] and (done.finish_reason == "stop") == (len(done.ends) == len(ends))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_padded_batch_equals_one_by_one(model, side, temperature):
    stops = stops_of(model)
    together = complete(model, PROMPTS, stops, pad_side=side, batch_size=3, temperature=temperature)
    for number, prompt in enumerate(PROMPTS):
        (alone,) = complete(model, [prompt], stops, temperature=temperature)
        assert together[number] == Completion(
            number, alone.ids, alone.finish_reason, alone.context_full, ends=alone.ends
        )
    assert any(len(done.ends) > 1 for done in together)  # several blanks were filled


def test_a_later_blank_sees_the_earlier_fill(model):
    first, second = PROMPTS[0].blanks.places
    found = set()
    for seed in range(6):  # other first fills
        (done,) = complete(model, [PROMPTS[0]], range(0, 300, 2), temperature=3.0, seed=seed, max_new_tokens=8)
        found.add(tuple(done.ids))
    logits = []
    for token in (20, 21):
        row = Grown(PROMPTS[0].ids, PROMPTS[0].blanks)
        row.feed(token)
        assert row.next_blank() and not row.next_blank()
        assert row.positions[-3:] == [first, first, second] and row.blocks[-3:] == [1, 2, 1]
        order = row.order(torch.device("cpu"))[0].tolist()
        given = make_row(
            row.ids, row.ids, align="same", position_ids=row.positions, block_position_ids=row.blocks, order=order
        )
        logits.append(logits_of(model, given)[0])
    assert (logits[0][-1] - logits[1][-1]).abs().max() > 1e-4
    assert torch.equal(logits[0][:7], logits[1][:7])  # the text and the opening see nothing of it
    assert len(found) > 1


def test_the_context_bounds_fills_and_openings_together(model):
    prompt = prompt_of(60, [3, 50], "long")  # a context of 64: two openings, two tokens
    (done,) = complete(model, [prompt], ())
    assert (len(done.ids), done.finish_reason) == (2, "length")
    (none,) = complete(model, [prompt_of(62, [3, 50], "longer")], ())
    assert (none.ids, none.finish_reason, none.context_full) == ([], "length", True)


def test_a_trained_row_is_its_prompt_and_its_fills_from_left_to_right():
    row = blank_infilling.infilled(
        Document(id="r", input_ids=[6, 7, 8, 9, 10, 11], segments=[]),
        blank_infilling.Blanks([(2, 3), (4, 6)], [1, 0]),
        Marks(MASK, SOP, EOP),
    )
    prompt, fills = blanks_of_row(row)
    assert (prompt.ids, prompt.blanks.places, prompt.blanks.sop) == ([6, 7, MASK, 9, MASK], (2, 4), SOP)
    assert fills == [8, EOP, 10, 11, EOP]


# ---- through the command


@pytest.fixture
def filler(tmp_path):
    """A folder of a model with the table, and GLM's control tokens in its tokenizer."""
    folder = open_folder(model_folder(tmp_path / "base", "llama", controls="glm"))
    add_block_positions(folder)
    save_model(randomised(load_model(folder)), folder, tmp_path / "filler")
    return tmp_path / "filler"


def test_masks_in_a_text_are_blanks_and_a_prompt_without_one_is_a_question(sft, filler, lines):
    data = lines(
        {"text": "The [MASK] is a [MASK] river."},
        {"text": "No <|im_end|> here: [sMASK]", "reference": "x"},
        {"prompt": "Name a river."},
        {"prompt": "Say [MASK] here"},
    )
    result = sft("generate", data, "-m", filler, "--max-new-tokens", 5, "--show-batch")
    assert result.code == 0, result.err
    codec = load_codec(filler)
    mask, whole, end = (codec.added[text] for text in ("[MASK]", "[gMASK]", "<|im_end|>"))
    table = result.err.split("ids (left-padded):\n")[1].split("\nmask")[0]
    ids = [[int(token) for token in line.split()] for line in table.splitlines()]
    assert [row.count(mask) for row in ids] == [2, 0, 0, 1] and [row.count(whole) for row in ids] == [0, 0, 1, 0]
    assert ids[0][-2:] == [end, codec.added["<|startofpiece|>"]]  # the end of a text is seen by its fillings
    assert ids[1].count(end) == 1  # the content's stays text
    assert result.rows[1]["reference"] == "x" and len(result.rows[0]["completion_ids"]) <= 5
    assert "block positions (left-padded):" in result.err


def test_batched_output_is_byte_equal_to_one_by_one(sft, filler, lines):
    data = lines(*({"text": f"{'so ' * n}a [MASK] and {n} [gMASK] end"} for n in range(6)), {"prompt": "q"})
    flags = ("generate", data, "-m", filler, "--max-new-tokens", 9)
    one = sft(*flags, "--batch-size", 1)
    assert one.code == 0 and len(one.rows) == 7
    for side in ("left", "right"):
        assert sft(*flags, "--batch-size", 4, "--pad-side", side).out == one.out


def test_fills_of_several_blanks_are_listed(sft, filler, lines, monkeypatch):
    from sftcli.stages import generate as stage
    from sftcli.stages.prompts import Asked

    codec = load_codec(filler)
    ids = codec.tokenizer.encode("onetwothree").ids
    done = Completion(0, ids, "stop", ends=[2, 2, len(ids)])
    ask = Asked({}, None, 0)
    line = json.loads(stage._line(ask, done, codec, [], Generate(), ""))
    assert line["fills"] == [codec.decode(ids[:2]), "", codec.decode(ids[2:])]
    assert line["completion"] == "\n".join(line["fills"])


def test_models_that_did_not_learn_it_say_so(sft, base, tmp_path, filler, lines):
    plain = model_folder(tmp_path / "plain", "llama")
    result = sft("generate", lines({"prompt": "q"}), "-m", plain, "--set", "fill=true")
    assert result.code == 2 and "did not learn to fill blanks" in result.err
    chat = sft("chat", filler, stdin=b"hi\n")
    assert chat.code == 2 and "does not chat" in chat.err
    off = sft("generate", lines({"prompt": "q"}), "-m", filler, "--set", "fill=false", "--max-new-tokens", 2)
    assert off.code == 0


def test_samples_of_a_run_fill_the_blanks_of_held_out_rows(sft, filler, tmp_path, lines):
    data = lines({"prompt": "Name a river.", "completion": "The Danube."}, {"prompt": "And?", "completion": "Rhine."})
    tokens = sft("tokenize", data, "-m", filler).out
    rows = sft("mask", "--objective", "glm", "--level", "sft", "-o", tmp_path / "rows.jsonl", stdin=tokens)
    assert rows.code == 0, rows.err
    flags = ("--max-steps", 1, "--set", "sample_every=1", "--set", "sample_tokens=4")
    result = sft("train", tmp_path / "rows.jsonl", "-m", filler, "-o", tmp_path / "run", *flags)
    assert result.code == 0, result.err
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_bytes().splitlines()]
    assert [sample["reference"] for sample in samples] == ["The Danube.", "Rhine."]
    assert all(sample["prompt"].endswith("[gMASK]") for sample in samples)


def test_the_recipe_is_one():
    recipe = load_recipe(str(ROOT / "recipes" / "glm.yaml"))
    assert recipe.mask.objective.level == "sft" and "[gMASK]" in recipe.init.controls
