"""The whole job as a shell pipeline and from a recipe: the same rows, the same weights; and pipes that break."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sftcli.artifacts import COMPLETIONS, MODEL, ROWS
from sftcli.rowfile import RowFile

DATA = Path(__file__).parent.parent / "data" / "samples"
SIZE = "--set layers=2 --set width=32 --set heads=2 --set context=256"
RECIPE = """
init: {{data: {data}, layers: 2, width: 32, heads: 2, context: 256}}
tokenize: {{data: {data}}}
train: {{max_steps: 4, batch_tokens: 1024}}
generate: {{prompts: {prompts}, max_new_tokens: 8}}
evaluate: {{metrics: [exact_match]}}
"""


@pytest.fixture(scope="module", autouse=True)
def sft_on_path(warm_sft: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(warm_sft), prepend=os.pathsep)
        yield


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail\n{script}"], cwd=folder, env=environment, capture_output=True, text=True
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def recipe_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the recipe has run into `byrecipe`; `data.jsonl` and `prompts.jsonl` beside it."""
    folder = tmp_path_factory.mktemp("pipeline")
    lines = (DATA / "train.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "data.jsonl").write_bytes(b"".join(lines[:120]))
    (folder / "prompts.jsonl").write_bytes(b"".join(lines[120:126]))
    (folder / "r.yaml").write_text(RECIPE.format(data="data.jsonl", prompts="prompts.jsonl"))
    done = shell("sft run r.yaml -o byrecipe", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_shell_pipeline_gives_the_rows_and_the_weights_of_the_recipe(recipe_run: Path) -> None:
    done = shell(
        f"""sft init data.jsonl -o base {SIZE}
        sft tokenize data.jsonl -m base | sft mask | sft train - -m base -o run --max-steps 4 --batch-tokens 1024
        sft generate prompts.jsonl -m run --max-new-tokens 8 > answers.jsonl""",
        recipe_run,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (RowFile(recipe_run / name / ROWS) for name in ("run", "byrecipe"))
    assert len(ours) == 120 and list(ours) == list(theirs)
    weights = [recipe_run / name / MODEL / "model.safetensors" for name in ("run", "byrecipe")]
    assert sha256(weights[0]) == sha256(weights[1])
    assert (recipe_run / "answers.jsonl").read_bytes() == (recipe_run / "byrecipe" / COMPLETIONS).read_bytes()


def test_second_run_skips_every_stage_and_a_changed_setting_only_what_depends_on_it(recipe_run: Path) -> None:
    (recipe_run / "byrecipe" / MODEL / "model-f16.gguf").write_bytes(b"as `sft export` leaves it")
    (recipe_run / "byrecipe" / MODEL / "Modelfile").write_bytes(b"")
    again = shell("sft run r.yaml -o byrecipe", recipe_run)
    assert again.returncode == 0, again.stderr
    for stage in ("init", "tokenize", "mask", "train", "generate"):
        assert f"{stage}: nothing has changed, skipped" in again.stderr
    before = (recipe_run / "byrecipe" / COMPLETIONS).read_bytes()
    changed = shell("sft run r.yaml -o byrecipe --set generate.max_new_tokens=3", recipe_run)
    assert "train: nothing has changed, skipped" in changed.stderr
    assert "generate: nothing has changed" not in changed.stderr
    assert (recipe_run / "byrecipe" / COMPLETIONS).read_bytes() != before
    assert (recipe_run / "byrecipe" / MODEL / "model-f16.gguf").is_file()
    (recipe_run / "byrecipe" / "tokens.jsonl").write_bytes(b"")  # somebody damages an output
    healed = shell("sft run r.yaml -o byrecipe", recipe_run)
    assert "tokenize: nothing has changed" not in healed.stderr
    assert "mask: nothing has changed, skipped" in healed.stderr  # it got the same tokens as before


@pytest.mark.slow
def test_an_adapter_that_is_switched_on_in_a_recipe_is_trained_anew(recipe_run: Path) -> None:
    only_train = "--set generate=null --set evaluate=null"
    assert shell(f"sft run r.yaml -o first {only_train}", recipe_run).returncode == 0
    lora = f"--set model=first --set init=null {only_train} --set train.adapter.rank=2"
    for flags in (lora, lora + " --set train.adapter=null", lora):
        done = shell(f"sft run r.yaml -o switched {flags}", recipe_run)
        assert done.returncode == 0 and "resuming" not in done.stderr, done.stderr
    assert (recipe_run / "switched" / "adapter").is_dir() and not (recipe_run / "switched" / MODEL).exists()


def test_a_tokenize_that_fails_in_the_pipe_ends_in_a_train_that_refuses(recipe_run: Path) -> None:
    done = shell(
        f"""sft init data.jsonl -o base2 {SIZE}
        (head -n 40 data.jsonl; echo '{{"messages": [{{"role": "user", "content": 7}}]}}') > bad.jsonl
        sft tokenize bad.jsonl -m base2 | sft mask | sft train - -m base2 -o refused""",
        recipe_run,
    )
    assert done.returncode == 3
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 3  # each stage says one line
    assert "bad.jsonl:41" in errors[0] and "$.messages[0].content" in errors[0]
    assert "the stage before this one failed" in errors[2] and "bad.jsonl:41" in errors[2]
    assert not (recipe_run / "refused" / MODEL).exists()


def test_stdout_of_a_failing_filter_ends_with_the_error_line_after_the_last_good_row(recipe_run: Path) -> None:
    done = shell(
        f"sft init data.jsonl -o base3 {SIZE} && (head -n 2 data.jsonl; echo no) | sft tokenize - -m base3",
        recipe_run,
    )
    assert done.returncode == 3
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("id") for line in lines[:2]] == ["train-00000", "train-00001"]
    assert lines[2] == {"sft_error": {"code": 3, "message": lines[2]["sft_error"]["message"]}}
    assert "<stdin>:3" in lines[2]["sft_error"]["message"] and len(lines) == 3


def test_dry_run_counts_steps_and_touches_nothing(recipe_run: Path) -> None:
    (recipe_run / "dry.yaml").write_text(
        RECIPE.format(data="data.jsonl", prompts="prompts.jsonl").replace("max_steps: 4, ", "")
    )
    before = sorted(path.name for path in recipe_run.iterdir())
    done = shell("sft run dry.yaml --dry-run", recipe_run)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    elsewhere = shell("sft run dry.yaml --dry-run --set train.device=gpu", recipe_run)
    assert json.loads(elsewhere.stdout.splitlines()[-1])["memory_bytes"] >= figures["memory_bytes"]
    assert figures["rows"] == 120
    assert figures["steps"] >= 3 * figures["tokens"] / 1024
    assert figures["memory_bytes"] > figures["weights_bytes"] == 4 * figures["parameters"]
    assert sorted(path.name for path in recipe_run.iterdir()) == before


def test_reader_that_goes_away_ends_a_filter_silently(recipe_run: Path) -> None:
    done = shell(
        f"sft init {DATA}/train.jsonl -o base4 {SIZE} -q 2>/dev/null; sft -q tokenize {DATA}/train.jsonl -m byrecipe | head -n 1 | wc -l; echo ${{PIPESTATUS[0]}}",
        recipe_run,
    )
    assert done.stdout.split() == ["1", "141"]
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr
