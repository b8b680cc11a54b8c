"""Several inputs with weights: which rows an epoch has, against lists counted by hand."""

import json
from collections import Counter
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import make_row, make_rows, model_folder, read_jsonl, tokenizer_hash, write_jsonl
from test_training import END, interrupted, metrics, options_of, same_weights, save_rows, weights

from sftcli.errors import UsageError
from sftcli.model.batches import epoch_order, shuffled, steps_in_run
from sftcli.model.mixture import Input, Part, drawn, input_of, parts_of
from sftcli.model.training import Plan
from sftcli.recipe import Train
from sftcli.rowfile import RowFile
from sftcli.stages.train import train


def epochs_of(parts, count, seed=0):
    return [Counter(drawn(parts, seed, epoch)) for epoch in range(count)]


def test_weights_are_read_off_the_end_of_a_path(tmp_path, monkeypatch):
    assert input_of("a.safetensors") == Input("a.safetensors")
    assert input_of("a.safetensors*0.3") == Input("a.safetensors", 0.3)
    assert input_of("b/a.jsonl*2") == Input("b/a.jsonl", 2.0)
    assert input_of("a.jsonl*.5") == Input("a.jsonl", 0.5)
    assert input_of("a.jsonl#500") == Input("a.jsonl", rows=500)
    assert input_of("-*0.3") == Input("-", 0.3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl#2").write_text("")
    assert input_of("a.jsonl#2") == Input("a.jsonl#2")
    for text in ("a*0", "a*0.0", "a#0"):
        with pytest.raises(UsageError, match="a weight must be more than 0"):
            input_of(text)


def test_a_share_takes_so_many_rows_an_epoch_and_all_rows_equally_often():
    parts = [Part("a", range(0, 10), 3.0), Part("b", range(10, 14), 8.0), Part("c", range(14, 20), 6.0)]
    epochs = epochs_of(parts, 10)
    for seen in epochs:
        assert sum(seen[i] for i in range(10)) == 3 and max(seen[i] for i in range(10)) == 1
        assert [seen[i] for i in range(10, 20)] == [2] * 4 + [1] * 6
    total = sum(epochs, Counter())
    assert {total[i] for i in range(10)} == {3}  # ten epochs of 30 % are three times all of it
    assert len({tuple(sorted(seen)) for seen in epochs}) > 5  # another sample each epoch


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(1, 30)), min_size=1, max_size=4),
    st.integers(0, 9),
    st.integers(1, 12),
)
def test_no_row_of_a_part_is_ever_more_than_one_ahead_of_another(shapes, seed, epochs):
    parts, at = [], 0
    for size, per_epoch in shapes:
        parts.append(Part("p", range(at, at + size), per_epoch))
        at += size
    found = epochs_of(parts, epochs, seed)
    assert all(found[k] == Counter(drawn(parts, seed, k)) for k in (0, epochs - 1))
    total = sum(found, Counter())
    for part in parts:
        times = [total[i] for i in part.rows]
        assert max(times) - min(times) <= 1
        assert abs(sum(times) - epochs * part.per_epoch) <= 0.5 + 1e-6
        assert all(sum(seen[i] for i in part.rows) >= 1 for seen in found)


def test_weights_of_one_are_the_plain_order():
    parts = [Part("a", range(0, 7), 7.0), Part("b", range(7, 11), 4.0)]
    for epoch in range(3):
        assert (
            epoch_order(11, Train(seed=5), epoch, parts)
            == shuffled(11, 5, epoch)
            == epoch_order(11, Train(seed=5), epoch)
        )


def test_plan_of_a_mixture_is_a_function_of_seed_and_epoch_from_any_step_on():
    lengths, parts = [5] * 9, [Part("a", range(0, 6), 2.5), Part("b", range(6, 9), 4.0)]
    options = Train(batch_rows=2, epochs=4)
    whole = list(Plan(lengths, options, parts).from_step(0))
    assert len(whole) == steps_in_run(lengths, options, parts)
    for step in range(len(whole)):
        assert list(Plan(lengths, options, parts).from_step(step)) == whole[step:]
    first = [rows for rows, epoch, _ in whole if epoch <= 1]
    assert sorted(chain(*first)) == sorted(drawn(parts, 0, 0)) != sorted(drawn(parts, 1, 0))
    assert list(chain(*first)) != sorted(chain(*first))  # the inputs are interleaved


# ---- the command


@pytest.fixture
def base(tmp_path):
    return model_folder(tmp_path / "base", "llama", layers=1)


@pytest.fixture
def some(base):
    """`some(9, "a")`: rows a0..a8; `some(4, "b", source="web")`."""
    hashed = {"tokenizer": tokenizer_hash(base)}

    def made(count, name, **columns):
        rows = make_rows([6 + i % 5 for i in range(count)], prompt=3, seed=len(name))
        return [
            make_row([*r.input_ids, END], [*r.labels, END], f"{name}{i}", **hashed, **columns)
            for i, r in enumerate(rows)
        ]

    return made


def test_several_inputs_are_one_joined_file(base, some, tmp_path):
    a, b = some(6, "a"), some(4, "bb")
    files = [save_rows(tmp_path / "a.safetensors", a), write_jsonl(tmp_path / "b.jsonl", b)]
    joined = save_rows(tmp_path / "joined.safetensors", a + b)
    train(options_of(), files, str(base), str(tmp_path / "two"))
    train(options_of(), joined, str(base), str(tmp_path / "one"))
    assert list(RowFile(tmp_path / "two" / "rows.safetensors")) == a + b
    assert same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_rows_of_two_templates_are_a_warning(base, some, tmp_path, capsys):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", some(3, name, template=name * 12)) for name in "ab"]
    train(options_of("max_steps=1"), files, str(base), str(tmp_path / "run"))
    assert "warning: train: rows of several templates (aaaaaaaaaaaa, bbbbbbbbbbbb)" in capsys.readouterr().err


def test_an_epoch_of_two_weighted_inputs_has_so_many_rows_of_each(base, some, tmp_path, capsys):
    files = [save_rows(tmp_path / "a.safetensors", some(9, "a")) + "*2"]
    files += [save_rows(tmp_path / "b.safetensors", some(8, "b")) + "*0.25"]
    files += [save_rows(tmp_path / "c.safetensors", some(7, "c")) + "#3"]
    train(options_of("batch_rows=1", "epochs=2"), files, str(base), str(tmp_path / "run"))
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 2 * (18 + 2 + 3)
    told = capsys.readouterr().err
    for name, rows, per_epoch in (("a", 9, 18), ("b", 8, 2), ("c", 7, 3)):
        assert f"train: {rows} rows of {tmp_path}/{name}.safetensors: {per_epoch} an epoch" in told


def test_held_out_rows_are_in_no_epoch_of_a_mixture(some, tmp_path):
    path = save_rows(tmp_path / "r.safetensors", some(4, "a", source="a") + some(6, "b"))
    rows = RowFile(path)
    kept = [0, 2, 3, 5, 8, 9]  # 0 2 3 are of the source a, 5 8 9 of none
    (b, a) = sorted(parts_of(rows, kept, [(Input(path), 10)], {"a": 2.0}), key=lambda part: part.name)
    assert (list(a.rows), a.per_epoch) == ([0, 1, 2], 6.0)
    assert (list(b.rows), b.per_epoch) == ([3, 4, 5], 3.0)


def test_mixing_by_source_is_mixing_by_file(base, some, tmp_path):
    a, web = some(6, "a"), some(8, "b", source="web")
    joined = save_rows(tmp_path / "joined.safetensors", a + web)
    files = [save_rows(tmp_path / "a.safetensors", a), save_rows(tmp_path / "b.safetensors", web) + "*0.5"]
    train(options_of("mix.web=0.5"), joined, str(base), str(tmp_path / "source"))
    train(options_of(), files, str(base), str(tmp_path / "file"))
    assert metrics(tmp_path / "source") == metrics(tmp_path / "file")
    assert len(metrics(tmp_path / "source")) == 2 * 4  # 6 + 4 rows, 3 a step
    with pytest.raises(UsageError, match="no row is from 'wob'") as refused:
        train(options_of("mix.wob=0.5"), joined, str(base), str(tmp_path / "wrong"))
    assert refused.value.hint == "the sources are web"


def test_a_mixture_resumes_to_the_same_weights_and_only_with_the_same_weights(base, some, tmp_path):
    paths = [save_rows(tmp_path / "a.safetensors", some(7, "a")), save_rows(tmp_path / "b.safetensors", some(9, "b"))]
    files = [paths[0] + "*1.5", paths[1] + "*0.3"]
    options = options_of("checkpoint_every=1", "keep=99", "epochs=3")
    train(options, files, str(base), str(tmp_path / "whole"))
    run = tmp_path / "run"
    interrupted(tmp_path / "whole", run, 4)
    with pytest.raises(UsageError, match="the weights changed"):
        train(options, [files[0], paths[1] + "*0.4"], str(base), str(run), resumed=True)
    train(options, files, str(base), str(run), resumed=True)
    assert same_weights(weights(tmp_path / "whole"), weights(run))
    assert metrics(tmp_path / "whole") == metrics(run)


def test_collected_rows_are_not_an_input_of_their_own_run(base, some, tmp_path):
    files = [save_rows(tmp_path / "a.safetensors", some(4, "a")), save_rows(tmp_path / "b.safetensors", some(4, "b"))]
    train(options_of("max_steps=1"), files, str(base), str(tmp_path / "run"))
    again = [str(tmp_path / "run" / "rows.safetensors"), files[0]]
    with pytest.raises(UsageError, match="is where the rows of this run are collected"):
        train(options_of("max_steps=1"), again, str(base), str(tmp_path / "run"))


def test_dry_run_counts_the_steps_of_a_mixture(sft, lines, tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}], **({"source": "web"} if i < 20 else {})}
        for i in range(30)
    ]  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"init: {{data: {lines(*chats)}, layers: 1, width: 16, heads: 2}}\ntokenize: {{data: {tmp_path / 'data.jsonl'}}}\n"
        "train: {batch_rows: 1, epochs: 3, mix: {web: 0.25}}\n"
    )
    result = sft("run", recipe, "--dry-run")
    assert result.code == 0, result.err
    assert json.loads(result.out.splitlines()[-1])["steps"] == 3 * (5 + 10)
