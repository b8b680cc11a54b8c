"""What a person has is not replaced, dropped or deleted by a command that was meant for something else."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import SAMPLES, chat, write_lines
from model_fixtures import model_folder, write_turns

from sftcli.errors import UsageError
from sftcli.model.checkpoint import open_folder
from sftcli.model.memory import estimate
from sftcli.recipe import Recipe, Train
from sftcli.recipefile import apply_settings, parse
from sftcli.stages.run import _refuse
from sftcli.writing import alone_in


@pytest.fixture(scope="module")
def made(model_folders, tmp_path_factory):
    """A folder with a file of each kind."""
    folder = tmp_path_factory.mktemp("made")
    model_folder(folder / "model", "llama")
    shutil.copytree(model_folders["chatml"], folder / "base")
    write_lines(folder / "data.jsonl", chat("q", "a"), b"nonsense\n")
    write_lines(folder / "prompts.jsonl", {"prompt": "q"})
    document = {"id": "d", "input_ids": [5, 6, 7], "segments": [[0, 3, "assistant", True, 1.0]]}
    write_lines(folder / "tokens.jsonl", document | {"tokenizer": None, "template": None}, b"nonsense\n")
    write_turns(folder / "model", folder / "rows.safetensors", [7, 9])
    return folder


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "command",
    [
        "tokenize prompts.jsonl data.jsonl -m base -o data.jsonl",
        "tokenize data.jsonl -m base -o base/../data.jsonl",
        "tokenize data.jsonl -m base --on-error skip -o new.jsonl --rejects data.jsonl",
        "tokenize data.jsonl -m base --rejects data.jsonl",
        "mask tokens.jsonl -o tokens.jsonl",
        "mask tokens.jsonl -o new.jsonl --rejects tokens.jsonl",
        "mask rows.safetensors -o rows.safetensors",
        "generate prompts.jsonl -m model --max-new-tokens 1 -o prompts.jsonl",
        "evaluate rows.safetensors -m model --per-row rows.safetensors",
    ],
)
def test_an_output_that_is_an_input_is_refused(sft, made, monkeypatch, command):
    monkeypatch.chdir(made)
    before = content(made)
    result = sft(*command.split())
    assert result.code == 2 and "is an input, which this output would replace" in result.err, result.err
    assert content(made) == before


@pytest.mark.parametrize("command", ["tokenize data.jsonl -m base", "mask tokens.jsonl"])
def test_one_file_for_output_and_rejects_is_refused(sft, made, monkeypatch, command):
    monkeypatch.chdir(made)
    before = content(made)
    result = sft(*command.split(), "-o", "new.jsonl", "--rejects", "base/../new.jsonl")
    assert result.code == 2 and "both the output and the rejects" in result.err, result.err
    assert content(made) == before


def test_devices_may_be_input_and_output(sft):
    assert sft("mask", "/dev/null", "-o", "/dev/null").code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/stdout and its pipe are Linux's")
def test_a_pipe_may_be_an_output_by_any_of_its_names(made):
    mask = f"{sys.executable} -m sftcli mask tokens-good.jsonl"
    write_lines(made / "tokens-good.jsonl", (made / "tokens.jsonl").read_bytes().splitlines(keepends=True)[0])
    script = f"{mask} -o /dev/stdout 2>/dev/null | cat > by-name; {mask} 2>/dev/null > plain; {mask} -o >(cat > by-fd)"
    done = subprocess.run(["bash", "-c", f"{script}; wait $!"], cwd=made, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (made / "plain").read_bytes() == (made / "by-name").read_bytes() == (made / "by-fd").read_bytes() != b""
    told = subprocess.run([*mask.split(), "-o", "/dev/full"], cwd=made, capture_output=True, timeout=60)
    assert told.returncode == 6 and b"error: cannot write /dev/full: No space left" in told.stderr


def test_one_process_at_a_time_is_in_a_run(sft, made, monkeypatch):
    monkeypatch.chdir(made)
    command = ["train", "rows.safetensors", "-m", "model", "-o", "one", "--max-steps", 1, "--set", "sample_rows=0"]
    (made / "one").mkdir()
    with alone_in(made / "one"):
        told = sft(*command)
    assert told.code == 2 and "another process is training in one; hint: wait for it" in told.err
    assert list((made / "one").iterdir()) == []
    assert sft(*command).code == 0


def test_init_does_not_write_over_a_model_with_weights(sft, made):
    before = content(made)
    result = sft("init", SAMPLES / "chats.jsonl", "-o", made / "model")
    assert result.code == 2 and "holds a model's weights (model.safetensors)" in result.err
    assert content(made) == before


def test_init_in_the_place_of_another_tokenizer_says_so(sft, lines, tmp_path):
    sizes = ("--set", "layers=1", "--set", "heads=2", "--set", "width=16", "-o", tmp_path / "base")
    warning = "warning: init: {} held another tokenizer".format(tmp_path / "base")
    for texts, told in (("abab", False), ("abab", False), ("cdcd", True)):
        result = sft("init", lines(chat(texts, texts)), "--vocab-size", 300, *sizes)
        assert result.code == 0 and (warning in result.err) == told


def test_a_finished_run_is_replaced_only_where_that_is_asked_for(sft, made, tmp_path):
    command = [
        "train",
        made / "rows.safetensors",
        "-m",
        made / "model",
        "-o",
        tmp_path / "run",
        "--set",
        "sample_rows=0",
    ]
    assert sft(*command, "--max-steps", 1).code == 0
    before = content(tmp_path / "run")
    again = sft(*command, "--max-steps", 2)
    assert again.code == 2 and "holds a finished training run; hint: another -o; --overwrite" in again.err
    assert content(tmp_path / "run") == before
    assert sft(*command, "--max-steps", 2, "--overwrite").code == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()) == 2


@pytest.mark.parametrize("kind", ["image_url", "input_audio", None])
def test_a_part_of_a_message_that_is_no_text_is_refused_by_its_path(sft, base, lines, kind):
    parts = [{"type": "text", "text": "What is in it?"}, {"x": 1} | ({"type": kind} if kind else {})]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]}
    result = sft("tokenize", lines(row), "-m", base)
    assert (
        result.code == 3
        and f"a part that is no text ({kind or 'without text'}) at $.messages[0].content[1]" in result.err
    )


def test_a_prompt_as_long_as_the_context_is_told_apart_from_a_completion_that_fills_it(sft, made, lines):
    prompts = lines({"prompt": "a"}, {"prompt": "word " * 200})
    result = sft("generate", prompts, "-m", made / "model", "--max-new-tokens", 500)
    assert [len(row["completion_ids"]) > 0 for row in result.rows] == [True, False]
    assert result.err.count("the prompt of completion 2 fills the model's context") == 1
    assert "1 after prompts that fill the context" in result.err


@pytest.mark.parametrize(
    "command", ["show rows.safetensors -n -1", "show tokens.jsonl -n -1", "mask tokens.jsonl --show -1"]
)
def test_fewer_than_no_rows_cannot_be_shown(sft, made, monkeypatch, command):
    monkeypatch.chdir(made)
    assert sft(*command.split()).code == 2


def test_a_key_of_another_kind_is_told_with_that_kind():
    with pytest.raises(UsageError, match="train.adapter.length: unknown key of this kind") as refused:
        parse(Train, apply_settings({}, ["adapter.length=4"]), section="train")
    assert refused.value.hint == "train.adapter.kind: prefix has it"


def test_check_of_what_is_not_there_says_so(sft, tmp_path):
    result = sft("check", tmp_path / "nowhere")
    assert result.code == 2 and f"there is no {tmp_path / 'nowhere'}" in result.err


def test_the_estimate_of_memory_knows_that_a_step_may_be_a_few_short_rows(made):
    folder = open_folder(made / "model")

    def bytes_of(**options):
        return estimate(folder.config, Train(**options), 24, folder.family)

    rows, tokens = bytes_of(batch_rows=4), bytes_of(batch_tokens=96)
    assert rows == tokens and rows["activations_bytes"] < bytes_of()["activations_bytes"]
    assert rows["logits_bytes"] == json.loads((made / "model" / "config.json").read_text())["vocab_size"] * 96 * 8


@pytest.mark.parametrize(
    "command",
    [
        "train nosuch.safetensors -m model -o new/deep/run",
        "train rows.safetensors -m model -o new/run --set batch_rows=2 --set device=nosuch",
        "init nosuch.jsonl -o new/base",
        "merge model -o new/merged",
        "run nosuch.yaml -o new/run",
        "run nodata.yaml -o new/run",
    ],
)
def test_whoever_is_refused_leaves_no_empty_folder(sft, made, monkeypatch, command):
    monkeypatch.chdir(made)
    (made / "nodata.yaml").write_text("model: model\ntokenize: {data: nosuch.jsonl}\n")
    result = sft(*command.split())
    assert result.code in (2, 5), result.err
    assert not (made / "new").exists()


def test_a_folder_that_was_there_stays_when_a_run_is_refused(sft, made, monkeypatch):
    monkeypatch.chdir(made)
    (made / "empty").mkdir()
    assert sft("train", "nosuch.safetensors", "-m", "model", "-o", "empty/run").code == 2
    assert list((made / "empty").iterdir()) == []


def test_a_finished_run_that_is_resumed_says_so(sft, made, monkeypatch):
    monkeypatch.chdir(made)
    command = ["train", "rows.safetensors", "-m", "model", "-o", "done", "--max-steps", 2, "--set", "sample_rows=0"]
    monkeypatch.setattr("sys.argv", ["/bin/sft", *map(str, command)])
    before = sft(*command).err
    after = sft(*command, "--resume").err
    assert "all 2 steps are done" in after and "tokens/s" not in after
    assert before.split("sha256")[1] == after.split("sha256")[1]
    told = sft("train", "--resume", "-o", "done")
    assert told.code == 2 and "begun with `sft train rows.safetensors -m model" in told.err


@pytest.mark.parametrize(
    "recipe, told",
    [
        ("generate: {prompts: nosuch.jsonl}", "there is no nosuch.jsonl"),
        ("train: {eval_data: nosuch.jsonl}", "there is no nosuch.jsonl"),
        ("generate: {prompts: prompts.jsonl}\nevaluate: {}", "prompts.jsonl: `evaluate` compares with answers"),
        ("generate: {prompts: data.jsonl}\nevaluate: {metrics: [regex_match]}", "regex_match needs a regex"),
        ("generate: {prompts: data.jsonl}\nevaluate: {regex: (}", "regex '('"),
        ("generate: {}\nevaluate: {}", "`evaluate` needs prompts"),
        ("generate: {prompts: data.jsonl, template: nope}", "no template nope"),
        ("generate: {prompts: data.jsonl, stop: ['']}", "generate.stop must not be empty"),
    ],
)
def test_what_would_fail_after_the_training_is_refused_before_it(sft, made, monkeypatch, recipe, told):
    monkeypatch.chdir(made)
    (made / "r.yaml").write_text("model: model\ntokenize: {data: data.jsonl}\n" + recipe + "\n")
    result = sft("run", "r.yaml", "-o", "new")
    assert result.code == 2 and told in result.err, result.err
    assert not (made / "new").exists()


def test_a_device_that_is_not_there_to_generate_on_is_told_before_the_training(sft, made, monkeypatch):
    monkeypatch.chdir(made)
    write_lines(made / "good.jsonl", chat("q", "a"), chat("r", "b"))
    (made / "r.yaml").write_text(
        "model: model\ntokenize: {data: good.jsonl}\ngenerate: {prompts: prompts.jsonl, device: nosuch}\n"
    )
    result = sft("run", "r.yaml", "-o", "without")
    assert result.code == 2 and "nosuch" in result.err.splitlines()[-1], result.err
    assert not (made / "without" / "model").exists() and "tokens/s" not in result.err


def test_a_generate_section_without_prompts_is_asked_for_nothing(made, monkeypatch):
    monkeypatch.chdir(made)
    _refuse(parse(Recipe, read_yaml_text("generate: {template: nope}")))


@pytest.mark.parametrize(
    "second, columns",
    [
        ({"prompt": "q", "completion": "a"}, ""),
        ({"prompt": "q", "reference": "a"}, ""),
        ({"text": "q", "answer": "a"}, ""),
        ({"text": "q", "label": "a"}, ", columns: {completion: label}"),
        (chat("q", "a"), ""),
    ],
    ids=str,
)
def test_one_prompt_with_an_answer_is_enough_for_evaluate(made, monkeypatch, second, columns):
    monkeypatch.chdir(made)
    prompts = write_lines(made / "some.jsonl", {"prompt": "q"} | ({"label": "x"} if columns else {}), second)
    recipe = parse(Recipe, read_yaml_text(f"generate: {{prompts: {prompts}{columns}}}\nevaluate: {{}}"))
    _refuse(recipe)


def test_what_can_be_read_only_once_is_never_the_same_again(sft, made, monkeypatch):
    monkeypatch.chdir(made)
    write_lines(made / "good.jsonl", chat("q", "a"), chat("r", "b"))
    recipe = "model: model\ntokenize: {data: '-'}\ntrain: {max_steps: 1, sample_rows: 0}\ngenerate: {prompts: prompts.jsonl, max_new_tokens: 1}\n"
    (made / "once.yaml").write_text(recipe)
    data = (made / "good.jsonl").read_bytes()
    for lines in (2, 1):
        result = sft("run", "once.yaml", "-o", "once", stdin=b"".join(data.splitlines(keepends=True)[:lines]))
        assert result.code == 0, result.err
        assert len((made / "once" / "tokens.jsonl").read_bytes().splitlines()) == lines
    again = sft("run", "once.yaml", "-o", "once", stdin=data.splitlines(keepends=True)[0]).err
    assert "mask: nothing has changed" in again and "train: nothing has changed" in again  # the same lines came


def test_a_recipes_adapter_is_asked_on_the_recipes_model_wherever_it_lies(sft, made, monkeypatch):
    monkeypatch.chdir(made)
    write_lines(made / "good.jsonl", chat("q", "a"), chat("r", "b"))
    shutil.copytree(made / "model", made / "before")
    (made / "moved.yaml").write_text(
        "tokenize: {data: good.jsonl}\ntrain: {adapter: lora, max_steps: 1, sample_rows: 0, optimizer: {lr: 0.1}}\n"
        "generate: {prompts: prompts.jsonl, max_new_tokens: 4}\n"
    )
    assert sft("run", "moved.yaml", "-o", "on", "--set", "model=before").code == 0
    first = (made / "on" / "completions.jsonl").read_bytes()
    (made / "before").rename(made / "after")
    moved = sft("run", "moved.yaml", "-o", "on", "--set", "model=after", "--set", "generate.seed=1")
    assert moved.code == 0, moved.err
    assert "train: nothing has changed" in moved.err and "generate: nothing has changed" not in moved.err
    assert (made / "on" / "completions.jsonl").read_bytes() == first
    assert sft("generate", "prompts.jsonl", "-m", "on", "--max-new-tokens", 1).code == 0


def test_answers_of_another_model_do_not_stay_in_a_run(sft, made, monkeypatch):
    monkeypatch.chdir(made)
    write_lines(made / "good.jsonl", chat("q", "a"), chat("r", "b"))
    (made / "asks.yaml").write_text(
        "model: model\ntokenize: {data: good.jsonl}\ntrain: {max_steps: 1, sample_rows: 0}\n"
        "generate: {prompts: good.jsonl, max_new_tokens: 1}\nevaluate: {}\n"
    )
    assert sft("run", "asks.yaml", "-o", "asks").code == 0
    answers = {made / "asks" / name for name in ("completions.jsonl", "evaluation.json")}
    assert all(path.is_file() for path in answers)
    (made / "asks.yaml").write_text((made / "asks.yaml").read_text().partition("generate")[0])
    assert sft("run", "asks.yaml", "-o", "asks").code == 0
    assert all(path.is_file() for path in answers)  # the model is the one that gave them
    assert sft("run", "asks.yaml", "-o", "asks", "--set", "train.max_steps=2").code == 0
    assert not any(path.exists() for path in answers)


def test_a_pipe_of_prompts_is_left_to_generate(made, monkeypatch):
    monkeypatch.chdir(made)
    os.mkfifo(made / "fifo")
    _refuse(parse(Recipe, read_yaml_text("generate: {prompts: fifo}\nevaluate: {}")))  # opened, it would wait


def read_yaml_text(more):
    return {"model": "model", "tokenize": {"data": "data.jsonl"}} | yaml.safe_load(more)


def test_a_folder_that_cannot_be_made_is_one_line_and_leaves_none_of_its_parents(sft, made, monkeypatch):
    monkeypatch.chdir(made)
    result = sft("init", "-o", "deep/" + "x" * 300)
    assert result.code == 6 and "cannot write deep/" in result.err, result.err
    assert not (made / "deep").exists()
