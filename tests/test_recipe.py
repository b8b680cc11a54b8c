"""Recipes: strict YAML, typed sections, --set, shorthands, and errors that name the key and the way out."""

import pytest
from conftest import ROOT

from sftcli.errors import UsageError
from sftcli.recipe import AdamW, Init, Mask, Muon, Recipe, Train
from sftcli.recipefile import apply_settings, dump_recipe, load_recipe, parse, read_yaml


def recipe_of(tmp_path, text, *settings):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return load_recipe(str(path), list(settings))


def refusal(tmp_path, text, *settings):
    with pytest.raises(UsageError) as caught:
        recipe_of(tmp_path, text, *settings)
    return f"{caught.value}; {caught.value.hint}".replace(f"{tmp_path}/", "")


# ---- what is read


def test_numbers_are_numbers_in_every_spelling(tmp_path):
    """YAML 1.1 reads 1e-4 as a text."""
    for spelled in ("1e-4", "1.0e-4", "0.0001", "'1e-4'", "1E-4"):
        assert recipe_of(tmp_path, f"train: {{optimizer: {{lr: {spelled}}}}}").train.optimizer.lr == 1e-4
        assert recipe_of(tmp_path, "{}", f"train.optimizer.lr={spelled}").train.optimizer.lr == 1e-4


def test_shorthands_mean_their_long_forms(tmp_path):
    short = recipe_of(
        tmp_path,
        "{tokenize: {data: a.jsonl, columns: 'prompt=q, completion=a'}, mask: {roles: 'user,tool', objective: causal}, train: {optimizer: muon, schedule: wsd}}",
    )
    long = recipe_of(
        tmp_path,
        "{tokenize: {data: [a.jsonl], columns: {prompt: q, completion: a}}, mask: {roles: [user, tool], objective: {kind: causal}},"
        " train: {optimizer: {kind: muon}, schedule: {kind: wsd}}}",
    )
    assert short == long
    assert isinstance(short.train.optimizer, Muon)


def test_an_optimizer_without_a_kind_is_adamw(tmp_path):
    assert recipe_of(tmp_path, "train: {optimizer: {lr: 1e-3}}").train.optimizer == AdamW(lr=1e-3)


def test_an_empty_recipe_has_every_default(tmp_path):
    found = recipe_of(tmp_path, "{}")
    assert (found.train, found.mask) == (Train(), Mask())
    assert (found.init, found.generate, found.evaluate) == (None, None, None)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_the_repository_loads_and_dumps_to_itself(path, tmp_path):
    found = load_recipe(str(path))
    (tmp_path / "again.yaml").write_text(dump_recipe(found))
    assert load_recipe(str(tmp_path / "again.yaml")) == found


# ---- --set


def test_set_lays_values_over_the_file(tmp_path):
    text = "train: {optimizer: {kind: muon, lr: 3e-3}, epochs: 4}"
    found = recipe_of(tmp_path, text, "train.optimizer.lr=1e-3", "train.epochs=2", "mask.train_on=last")
    assert found.train.optimizer == Muon(lr=1e-3)
    assert (found.train.epochs, found.mask.train_on) == (2, "last")


def test_set_reaches_into_a_shorthand_and_makes_sections(tmp_path):
    found = recipe_of(tmp_path, "train: {schedule: wsd}", "train.schedule.decay=0.5", "generate.top_k=5")
    assert (found.train.schedule.kind, found.train.schedule.decay) == ("wsd", 0.5)
    assert found.generate.top_k == 5


def test_set_takes_lists_flags_and_texts_with_equal_signs(tmp_path):
    found = recipe_of(
        tmp_path,
        "{}",
        "tokenize.data=[a.jsonl, b.jsonl]",
        "train.gradient_checkpointing=true",
        "tokenize.template_text={prompt}={answer}",
    )
    assert found.tokenize.data == ["a.jsonl", "b.jsonl"]
    assert found.train.gradient_checkpointing is True
    assert found.tokenize.template_text == "{prompt}={answer}"


def test_set_of_a_stage_may_leave_its_own_name_out():
    for setting in ("optimizer.lr=1", "train.optimizer.lr=1"):
        assert apply_settings({}, [setting], prefix="train") == {"optimizer": {"lr": 1}}


def test_set_without_an_equal_sign_is_refused(tmp_path):
    assert "--set epochs: expected key=value" in refusal(tmp_path, "{}", "epochs")


# ---- what is refused


@pytest.mark.parametrize(
    "text, told",
    [
        ("trian: {}", "r.yaml: trian: unknown key; did you mean train?"),
        ("mask: {lenght: 3}", "r.yaml: mask.lenght: unknown key"),
        ("mask: {max_lenght: 3}", "r.yaml: mask.max_lenght: unknown key; did you mean max_length?"),
        ("train: {optimizer: {learning: 1}}", "r.yaml: train.optimizer.learning: unknown key; known keys: betas, eps, "),
        ("train: {optimizer: {weigth_decay: 1}}", "r.yaml: train.optimizer.weigth_decay: unknown key; did you mean weight_decay?"),
        ("train: {optimizer: {kind: muon, momentun: 1}}", "r.yaml: train.optimizer.momentun: unknown key; did you mean momentum?"),
        ("train: {schedule: {warmpu: 1}}", "r.yaml: train.schedule.warmpu: unknown key; did you mean warmup?"),
        ("init: {widht: 3}", "r.yaml: init.widht: unknown key; did you mean width?"),
        ("train: {optimizer: {lr: fast}}", "r.yaml: train.optimizer.lr: input should be a valid number"),
        ("train: {optimizer: {lr: fast}}", "got 'fast'"),
        ("train: {epochs: 0}", "r.yaml: train.epochs: input should be greater than 0, got 0"),
        ("train: {batch_tokens: 1.5}", "r.yaml: train.batch_tokens: "),
        ("train: {epochs: .inf}", "r.yaml: train.epochs: input should be a finite number, got inf"),
        ("train: {optimizer: {lr: .inf}}", "r.yaml: train.optimizer.lr: input should be a finite number"),
        ("train: {adapter: {alpha_pattern: {q: .nan}}}", "train.adapter.alpha_pattern.q: input should be a finite number"),
        ("train: {optimizer: {betas: [1.0, 0.9]}}", "train.optimizer.betas.0: input should be less than 1, got 1.0"),
        ("train: {optimizer: {kind: muon, betas: [0.9, -1]}}", "betas.1: input should be greater than or equal to 0"),
        ("generate: {batch_size: 99999999999999999999}", "generate.batch_size: "),
        ("train: {adapter: {rank: 99999999999999999999}}", "train.adapter.rank: "),
        ("train: {shard_size: 0.0 GB}", "r.yaml: train.shard_size: expected more than 0, got '0.0 GB'"),
        ("mask: {too_long: cut}", "r.yaml: mask.too_long: 'cut' is not one of drop, error, truncate-prompt, truncate"),
        ("init: {preset: llama3}", "r.yaml: init.preset: 'llama3' is not one of llama, gpt2, bert; did you mean llama?"),
        ("init: {width: 100, heads: 6}", "r.yaml: init: width 100 must be heads 6 times an even number"),
        ("init: {kv_heads: 4}", "r.yaml: init: heads 6 must be a multiple of kv_heads 4"),
        ("init: {preset: gpt2, kv_heads: 2}", "r.yaml: init: gpt2 has as many kv_heads as heads"),
        ("{model: m, init: {}}", "r.yaml: both `model` and `init` are given"),
        ("evaluate: {}", "r.yaml: `evaluate` needs a `generate` section"),
        ("tokenize: {columns: question}", "r.yaml: tokenize.columns: expected prompt=question,completion=answer"),
        ("train: 5", "r.yaml: train: "),
        ("[1, 2]", "r.yaml is not a recipe: expected sections such as `train:`"),
        ("", "r.yaml is not a recipe"),
        ("just words", "r.yaml is not a recipe"),
        ("train: {epochs: 1}\ntrain: {epochs: 2}", "r.yaml:2: not a recipe: duplicate key 'train'"),
        ("train:\n  epochs: 1\n  epochs: 2", "r.yaml:3: not a recipe: duplicate key 'epochs'"),
        ("a: &x {}\ntrain: *x", "r.yaml:2: not a recipe: aliases are not allowed"),
        ("train: {epochs: [", "r.yaml:1: not a recipe: "),
        ("train: !!python/object/apply:os.system ['id']", "r.yaml:1: not a recipe: could not determine a constructor"),
        ("1: 2", "r.yaml: 1: "),
        ("base: &b {epochs: 1}\ntrain: {<<: *b}", "r.yaml:2: not a recipe: aliases are not allowed"),
        ("[" * 5000, "r.yaml is nested too deeply"),
        ("\x01", "r.yaml:1: not a recipe: "),
        ("train: {epochs: 2001-99-99}", "not a recipe: "),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place_and_the_way_out(tmp_path, text, told):
    assert told in refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["? [1, 2]\n: 3", "? {a: 1}\n: 3"])
def test_a_key_that_is_a_list_or_a_mapping_is_refused(tmp_path, text):
    assert "r.yaml:1: not a recipe: " in refusal(tmp_path, text)


def test_text_that_is_not_utf8_and_files_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"train: \xff\xfe")
    with pytest.raises(UsageError, match="not a recipe"):
        read_yaml(str(tmp_path / "r.yaml"))
    with pytest.raises(UsageError, match="cannot read recipe"):
        read_yaml(str(tmp_path / "none.yaml"))
    with pytest.raises(UsageError, match="cannot read recipe"):
        read_yaml(str(tmp_path))


def test_a_file_that_is_too_large_is_not_parsed(tmp_path):
    (tmp_path / "r.yaml").write_text("#" * (1 << 20) + "\nmodel: m\n")
    with pytest.raises(UsageError, match="larger than"):
        read_yaml(str(tmp_path / "r.yaml"))


def test_sections_of_a_stage_are_named_in_its_errors():
    with pytest.raises(UsageError, match=r"mask\.max_length: input should be greater than 0, got 0"):
        parse(Mask, {"max_length": 0}, section="mask")


# ---- through the command line


def test_an_unknown_key_exits_2_with_the_nearest_name(sft, lines, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("mask: {train_onn: last}")
    for args in (
        ("mask", "-", "--recipe", recipe),
        ("run", recipe, "--dry-run"),
        ("mask", "-", "--set", "train_onn=last"),
    ):
        result = sft(*args)
        assert result.code == 2
        assert "mask.train_onn: unknown key; hint: did you mean train_on?" in result.err


def test_flags_win_over_the_recipe_and_set_over_flags(sft, lines, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("mask: {train_on: 'after:9'}")
    data = lines({"input_ids": [9, 8, 7, 6]})
    labels = lambda *flags: sft("mask", data, "--recipe", recipe, *flags).rows[0]["labels"]
    assert labels() == [-100, 8, 7, 6]
    assert labels("--train-on", "after:8") == [-100, -100, 7, 6]
    assert labels("--train-on", "after:8", "--set", "train_on=after:7") == [-100, -100, -100, 6]


def test_the_resolved_recipe_names_every_default():
    dumped = dump_recipe(Recipe(init=Init()))
    assert "weight_decay: 0.1" in dumped and "vocab_size: 1024" in dumped and "train_on: own" in dumped
