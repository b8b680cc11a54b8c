"""BERT's files: equal to transformers in logits, losses, gradients and what is saved; old names, and files without heads."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import safetensors.torch
import torch
from family_cases import change_config, ids_of, randomise, read_config
from make_frozen import BERT_CONFIG, BERT_TENSORS
from model_fixtures import make_row, model_of
from test_masked_lm import SPECIALS, wordpiece

from sftcli.errors import CheckpointError
from sftcli.model.batches import make_batch
from sftcli.model.checkpoint import add_masked_lm, load_model, open_folder, save_model, upstream_tensors
from sftcli.model.tensorfile import EXTRA, WEIGHTS, write_tensors
from sftcli.rows import IGNORE

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
CASES = {
    "bert": {},
    "deep": {"num_hidden_layers": 5, "layer_norm_eps": 1e-3, "num_attention_heads": 2},
    "others": {"hidden_act": "gelu_new", "type_vocab_size": 3, "intermediate_size": 40},
}
_FOLDERS = TemporaryDirectory(prefix="bert-")


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is the oracle here: pip install '.[test]'")


@cache
def built(name, kind="BertForPreTraining"):
    """(folder as transformers saved it, transformers' model); the folder must not be changed."""
    import transformers

    path = Path(_FOLDERS.name, f"{name}-{kind}")
    config = transformers.BertConfig(**SHAPE | CASES[name])
    model = getattr(transformers, kind)._from_config(config, attn_implementation="eager").float().eval()
    randomise(model, 5)
    model.save_pretrained(path)
    return path, model


def pair(length=14, label=1, seed=7):
    ids, labels = ids_of(length, seed), [IGNORE] * length
    labels[2], labels[length - 3] = 40, ids[length - 3]
    types = [0] * 6 + [1] * (length - 6)
    columns = {"order": [0] * length, "token_type_ids": types, "next_sentence_label": label}
    return make_row(ids, labels, f"r{seed}", align="same", **columns)


ROWS = [pair(), pair(9, 0, 8), pair(20, 0, 9)]


def their_outputs(model, rows):
    """transformers' (prediction logits, next-sentence logits, loss) of right-padded rows."""
    width = max(len(row.input_ids) for row in rows)

    def padded(name, pad):
        return torch.tensor([getattr(row, name) + [pad] * (width - len(row.input_ids)) for row in rows])

    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    with torch.set_grad_enabled(len(rows) == 1):
        found = model(
            padded("input_ids", 0),
            attention_mask=mask,
            token_type_ids=padded("token_type_ids", 0),
            labels=padded("labels", IGNORE),
            next_sentence_label=torch.tensor([row.next_sentence_label for row in rows]),
        )
    return found.prediction_logits, found.seq_relationship_logits, found.loss


def our_outputs(model, rows):
    """(logits of each row, next-sentence logits, loss)"""
    batch = make_batch(rows)
    with torch.no_grad():
        hidden = model.eval().hidden(batch.ids, batch.positions, batch.attention, types=batch.types)
        parts = model.logits(hidden).split([len(row.input_ids) for row in batch.rows])
        following = model.nsp(torch.tanh(model.pooler(hidden[batch.starts])))
    loss = sum(found.total / found.weight for found in model(batch).values())
    return dict(zip([row.id for row in batch.rows], parts, strict=True)), following, loss, [r.id for r in batch.rows]


# ---- equal to transformers


@pytest.mark.parametrize("name", CASES)
def test_bt_4_logits_and_loss_equal_transformers_on_padded_rows(transformers, name):
    path, theirs = built(name)
    logits, following, loss = their_outputs(theirs, ROWS)
    mine, ours_following, ours_loss, order = our_outputs(model_of(path), ROWS)
    assert logits.std() > 0.3 and following.std() > 0.02
    for number, row in enumerate(ROWS):
        expected = logits[number, : len(row.input_ids)]
        torch.testing.assert_close(mine[row.id], expected, atol=5e-6, rtol=0)
        torch.testing.assert_close(ours_following[order.index(row.id)], following[number], atol=1e-6, rtol=1e-6)
    assert float(ours_loss.detach()) == pytest.approx(float(loss), abs=2e-6)


def test_bt_4_weights_as_they_are_drawn_give_the_same_logits_to_a_millionth(transformers, tmp_path):
    torch.manual_seed(0)
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SHAPE)).eval()
    theirs.save_pretrained(tmp_path / "m")
    logits, following, loss = their_outputs(theirs, ROWS[:2])
    mine, ours_following, ours_loss, _ = our_outputs(model_of(tmp_path / "m"), ROWS[:2][::-1])
    for number, row in enumerate(ROWS[:2]):
        torch.testing.assert_close(mine[row.id], logits[number, : len(row.input_ids)], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours_following, following.flip(0), atol=1e-7, rtol=0)
    assert float(ours_loss.detach()) == pytest.approx(float(loss), abs=1e-6)


def test_gradients_equal_transformers(transformers):
    path, theirs = built("bert")
    _, _, loss = their_outputs(theirs, ROWS[:1])
    named = dict(theirs.named_parameters())
    expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    model = model_of(path).train()
    sum(found.total / found.weight for found in model(make_batch(ROWS[:1])).values()).backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    found = upstream_tensors(model, open_folder(path).family)
    assert set(found) == set(expected)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertForMaskedLM"])
@pytest.mark.parametrize("name", CASES)
def test_saved_folder_is_the_one_that_transformers_wrote_and_loads(transformers, name, kind, tmp_path):
    path, model = built(name, kind)
    folder = open_folder(path)
    save_model(load_model(folder), folder, tmp_path / "saved")
    expected, found = (safetensors.torch.load_file(place / WEIGHTS) for place in (path, tmp_path / "saved"))
    assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in found)
    assert read_config(tmp_path / "saved") == read_config(path) and not (tmp_path / "saved" / EXTRA).exists()
    again, told = getattr(transformers, kind).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(told.values()), told
    ids = torch.tensor([ids_of(9)])
    with torch.no_grad():
        assert torch.allclose(again.eval()(ids)[0], model(ids)[0], atol=1e-6)


def test_a_masked_lm_without_the_other_head_gets_one_when_it_is_trained_on_pairs(transformers, tmp_path):
    path, theirs = built("bert", "BertForMaskedLM")
    folder = open_folder(path)
    assert not folder.config.nsp_head
    row = make_row(ROWS[0].input_ids, ROWS[0].labels, align="same", order=ROWS[0].order)
    batch = make_batch([row])
    with torch.no_grad():
        logits = load_model(folder).eval()
        mine = logits.logits(logits.hidden(batch.ids, batch.positions, batch.attention))
        torch.testing.assert_close(mine, theirs(torch.tensor([row.input_ids])).logits[0], atol=5e-6, rtol=0)
    add_masked_lm(folder, pairs=True)
    model = load_model(folder, seed=3)
    assert model.nsp.weight.any() and model.pooler.weight.any()
    save_model(model, folder, tmp_path / "saved")
    _, told = transformers.BertForPreTraining.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(told.values()) and read_config(tmp_path / "saved")["architectures"] == ["BertForPreTraining"]
    assert torch.equal(model_of(tmp_path / "saved").nsp.weight, model.nsp.weight)


# ---- files as they are found


def changed(path, target, change):
    folder = shutil.copytree(path, target)
    write_tensors(folder / WEIGHTS, change(safetensors.torch.load_file(folder / WEIGHTS)))
    return folder


def old_names(tensors):
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    return {next((k.removesuffix(a) + b for a, b in ends.items() if k.endswith(a)), k): v for k, v in tensors.items()}


def with_copies(tensors):
    """What older versions of transformers stored, too."""
    copies = {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
        "bert.embeddings.position_ids": torch.arange(64.0)[None],
    }
    return tensors | copies


@pytest.mark.parametrize("change", [old_names, with_copies])
def test_old_files_give_the_same_model(transformers, tmp_path, change):
    path, _ = built("bert")
    old = model_of(changed(path, tmp_path / "old", change))
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), model_of(path).parameters(), strict=True))


def test_missing_and_unknown_tensors_are_refused_by_name(transformers, tmp_path):
    path, _ = built("bert")
    missing = "bert.encoder.layer.1.output.LayerNorm.bias"
    with pytest.raises(CheckpointError, match=missing):
        model_of(changed(path, tmp_path / "a", lambda t: {k: v for k, v in t.items() if k != missing}))
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        model_of(changed(path, tmp_path / "b", lambda t: t | {"classifier.weight": torch.ones(2, 32)}))
    with pytest.raises(CheckpointError, match="is not the embedding"):
        model_of(changed(path, tmp_path / "c", lambda t: t | {"cls.predictions.decoder.weight": torch.ones(96, 32)}))


@pytest.mark.parametrize(
    "key, value",
    [("position_embedding_type", "relative_key"), ("is_decoder", True), ("tie_word_embeddings", False)],
)
def test_switches_that_are_not_supported_are_named(transformers, tmp_path, key, value):
    folder = shutil.copytree(built("bert")[0], tmp_path / "m")
    change_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=key):
        open_folder(folder)


@pytest.fixture
def frozen(tmp_path):
    """The folder of a frozen checkpoint, a row, and the logits that transformers gave for it."""
    told, own = json.loads(BERT_CONFIG.read_text()), safetensors.torch.load_file(BERT_TENSORS)
    expected, following = own.pop("logits"), own.pop("following")
    safetensors.torch.save_file(own, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(told["config"]))
    size = len(told["ids"])
    row = make_row(
        told["ids"],
        [IGNORE] * size,
        align="same",
        order=[0] * size,
        token_type_ids=told["types"],
        next_sentence_label=0,
    )
    return tmp_path, row, expected, following


def test_logits_equal_frozen_ones(frozen):
    folder, row, expected, following = frozen
    logits, mine, _, _ = our_outputs(model_of(folder), [row])
    torch.testing.assert_close(logits[row.id], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine, following, atol=1e-6, rtol=0)


# ---- the whole way with a folder as transformers has it


def test_a_bert_folder_is_trained_further_and_fills_masks_as_transformers_does(transformers, sft, lines, tmp_path):
    from tokenizers import Tokenizer

    size = Tokenizer.from_file(str(wordpiece(tmp_path / "bert") / "tokenizer.json")).get_vocab_size()
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SHAPE | {"vocab_size": size})).eval()
    randomise(theirs, 3)
    theirs.save_pretrained(tmp_path / "bert")
    data = lines(
        {"text": "the cat [MASK] here ."},
        {"text": "[MASK] or [MASK] ?"},
        {"text": "one is [MASK]"},
        name="prompts.jsonl",
    )
    filled = sft("generate", data, "-m", tmp_path / "bert")
    assert filled.code == 0, filled.err
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "bert" / "tokenizer.json"), **{f"{n[1:-1].lower()}_token": n for n in SPECIALS}
    )
    for row in filled.rows:
        ids = tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            best = theirs(input_ids=ids["input_ids"]).prediction_logits[0].argmax(-1)
        assert row["completion_ids"] == best[ids["input_ids"][0] == tokenizer.mask_token_id].tolist()
    text = {"text": "one is here .\nthe cat sat .\nis it two ?\nfour five six seven ."}
    tokens = sft("tokenize", lines(*[text] * 12), "-m", tmp_path / "bert")
    rows = sft("mask", "-m", tmp_path / "bert", "--objective", "bert", "-o", tmp_path / "rows.jsonl", stdin=tokens.out)
    assert tokens.code == rows.code == 0, rows.err
    run = sft("train", tmp_path / "rows.jsonl", "-m", tmp_path / "bert", "-o", tmp_path / "run", "--max-steps", 3)
    assert run.code == 0, run.err
    _, told = transformers.BertForPreTraining.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not any(told.values())
    assert not (tmp_path / "run" / "model" / EXTRA).exists()


def test_a_bert_from_nothing_is_one_for_transformers(transformers, sft, lines, tmp_path):
    data = lines(*({"text": f"{word} is here.\nIt was {word}."} for word in ("one", "two", "three", "four")))
    sizes = [f"--set={size}" for size in ("layers=2", "heads=2", "width=16", "context=40")]
    made = sft("init", data, "-o", tmp_path / "base", "--preset", "bert", "--vocab-size", 300, *sizes)
    assert made.code == 0, made.err
    count = sum(p.numel() for p in load_model(open_folder(tmp_path / "base")).parameters())
    assert f"bert, {count:,} parameters" in made.err
    tokens = sft("tokenize", data, "-m", tmp_path / "base").out
    assert (
        sft("mask", "--objective", "bert", "-o", tmp_path / "rows.jsonl", "-m", tmp_path / "base", stdin=tokens).code
        == 0
    )
    run = sft("train", tmp_path / "rows.jsonl", "-m", tmp_path / "base", "-o", tmp_path / "run", "--max-steps", 1)
    assert run.code == 0, run.err
    folder = tmp_path / "run" / "model"
    theirs, told = transformers.AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()) and type(theirs).__name__ == "BertForPreTraining"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.mask_token, tokenizer.cls_token, tokenizer.sep_token) == ("[MASK]", "[CLS]", "[SEP]")
    refused = sft("init", data, "-o", tmp_path / "x", "--preset", "bert", "--set", "tied=false")
    assert refused.code == 2 and "its head, too" in refused.err
