"""sft run: the stages of a recipe in order; what has not changed is not done again."""

import json
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from sftcli import __version__, artifacts, console, reading, writing
from sftcli.artifacts import ADAPTER, BASE, COMPLETIONS, EVALUATION, MODEL, RECIPE, ROWS, RUN, TOKENS
from sftcli.errors import DataError, UsageError
from sftcli.recipe import Generate, Recipe
from sftcli.recipefile import dump_recipe
from sftcli.text.records import COMPLETION_NAMES, read_record, renamed
from sftcli.text.template import load_template

NAMES = {RECIPE, RUN, BASE, TOKENS, ROWS, MODEL, ADAPTER}
SHOWN_ANSWERS = 3
SHOWN_CHARACTERS = 120


def run(recipe: Recipe, output: str) -> dict[str, Any]:
    """Run every stage of the recipe into a run folder; returns the evaluation (empty if there is none)."""
    begin = time.monotonic()
    _refuse(recipe)
    with writing.output_folder(output, NAMES) as folder:
        with writing.alone_in(folder):
            writing.remove_leftovers(folder)
        with writing.atomic_file(folder / RECIPE) as file:
            file.write(dump_recipe(recipe).encode())
        model = _base(recipe, folder)
        _data(recipe, folder, model)
        _train(recipe, folder, model)
        if recipe.generate and recipe.generate.prompts:
            _generate(recipe, folder, model)
        results = _evaluate(recipe, folder) if recipe.evaluate else {}
    console.note(f"run: done in {console.clock(time.monotonic() - begin)}; everything is in {folder}")
    console.note(f"run: look at it with `sft show {folder}`, use it with `sft generate PROMPTS -m {folder}`")
    return results


def _refuse(recipe: Recipe) -> None:
    """Raise what can be known before anything is done, so that no training ends with it."""
    if not recipe.model and not recipe.init:
        raise UsageError("the recipe names no model", hint="`model: DIR`, or an `init:` section")
    if not recipe.tokenize.data:
        raise UsageError("the recipe names no data", hint="`tokenize: {data: FILE}`")
    if recipe.model:
        artifacts.model_folder(recipe.model)
    asked = recipe.generate.prompts if recipe.generate else None
    named = [*(recipe.init.data if recipe.init else ()), *recipe.tokenize.data, recipe.train.eval_data, asked]
    for path in named:
        if path and path != "-" and not Path(path).exists():
            raise UsageError(f"there is no {path}", hint="paths in a recipe start where `sft run` is called")
    if recipe.generate and asked:
        _refuse_generate(recipe.generate)
    if recipe.evaluate and recipe.generate and not asked:
        raise UsageError("`evaluate` needs prompts", hint="`generate: {prompts: FILE}`")
    if recipe.evaluate and recipe.generate and asked and Path(asked).is_file():  # a pipe can be read only once
        _refuse_without_reference(asked, recipe.generate.columns)


def _refuse_generate(options: Generate) -> None:
    if options.template or options.template_text is not None:
        load_template(options.template, options.template_text, options.columns, {})
    if "" in options.stop:
        raise UsageError("generate.stop must not be empty")


def _refuse_without_reference(prompts: str, columns: dict[str, str]) -> None:
    """Some prompt must hold an answer that its completion can be compared with."""
    where = ""
    for where, _, fields in reading.read_objects(prompts):
        known = {*fields, *(wanted for wanted, given in columns.items() if given in fields)}
        if known & {"reference", *COMPLETION_NAMES}:
            return
        try:
            messages = read_record(renamed(fields, columns, where), where, 1).messages
        except DataError:  # the stage will tell
            return
        if messages and messages[-1]["role"] == "assistant":
            return
    if where:
        hint = "a completion, or a last message of the assistant; or a recipe without `evaluate`"
        raise UsageError(f"{prompts}: `evaluate` compares with answers, and no prompt has one", hint=hint)


class _Files:
    """Fingerprints of files, kept in the run: a file is read again only where its size or its times have changed."""

    def __init__(self, folder: Path):
        self.known = _recorded(folder, "files")

    def content(self, path: str | Path) -> str:
        """A fingerprint of a file, or of all in a folder but what `sft export` adds; '' where there is nothing, another
        one each time for what can be read only once."""
        path = Path(path)
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix != ".gguf" and p.name != "Modelfile")
            return artifacts.fingerprint(*(f"{p.name} {self._of(p)}" for p in files))
        if path.is_file():
            return self._of(path)
        return secrets.token_hex(6) if path.exists() or str(path) == "-" else ""

    def _of(self, path: Path) -> str:
        status, name = path.stat(), str(path.resolve())
        seen = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        known = self.known.get(name)
        if not isinstance(known, list) or known[:-1] != seen:
            known = self.known[name] = [*seen, artifacts.file_fingerprint(path)]
        return str(known[-1])


class _Stage:
    """A stage of this run: skipped if its settings, its inputs and its outputs are those of the last time."""

    def __init__(self, folder: Path, name: str, settings: Any, inputs: list[str | Path], outputs: list[str]):
        self.folder, self.name, self.files = folder, name, _Files(folder)
        self.outputs = [folder / output for output in outputs]
        text = json.dumps([__version__, settings], sort_keys=True)
        self.key = artifacts.fingerprint(text, *(self.files.content(path) for path in inputs))

    def unchanged(self) -> bool:
        same = _recorded(self.folder, "stages").get(self.name, {}).get("key") == self.key and self.complete()
        if same:
            console.note(f"{self.name}: nothing has changed, skipped")
        return same

    def complete(self) -> bool:
        """Whether the outputs are those that the stage has recorded, whatever its settings were."""
        recorded = _recorded(self.folder, "stages").get(self.name, {}).get("outputs")
        return bool(recorded == [self.files.content(path) for path in self.outputs])

    def done(self) -> None:
        entry = {"key": self.key, "outputs": [self.files.content(path) for path in self.outputs]}
        stages = _recorded(self.folder, "stages") | {self.name: entry}
        writing.update_json(self.folder / RUN, {"stages": stages, "files": self.files.known})


def _recorded(folder: Path, name: str) -> dict[str, Any]:
    path = folder / RUN
    found = reading.read_json(path).get(name, {}) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _files(*values: str | None) -> list[str]:
    """Those of the values of options that name a file or folder."""
    return [value for value in values if value and Path(value).exists()]


def _settings(section: Any) -> Any:
    return section.model_dump(mode="json")


def _base(recipe: Recipe, folder: Path) -> str:
    """The model to start from: the recipe's, or one that `init` makes in base/."""
    if recipe.model:
        return recipe.model
    from sftcli.stages.init import init

    assert recipe.init
    options = recipe.init
    stage = _Stage(folder, "init", _settings(options), [*options.data, *_files(options.template)], [BASE])
    if not stage.unchanged():
        shutil.rmtree(folder / BASE, ignore_errors=True)
        init(options, str(folder / BASE))
        stage.done()
    return str(folder / BASE)


def _data(recipe: Recipe, folder: Path, model: str) -> None:
    from sftcli.stages.mask import mask
    from sftcli.stages.tokenize import tokenize

    options = recipe.tokenize
    text_files = [
        artifacts.model_folder(model) / name
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    ]
    inputs: list[str | Path] = [*options.data, *text_files, *_files(options.template, options.tokenizer)]
    stage = _Stage(folder, "tokenize", _settings(options), inputs, [TOKENS])
    if not stage.unchanged():
        tokenize(options, model, str(folder / TOKENS))
        stage.done()
    stage = _Stage(folder, "mask", _settings(recipe.mask), [folder / TOKENS], [ROWS])
    if not stage.unchanged():
        mask(recipe.mask, str(folder / TOKENS), str(folder / ROWS), model=model)
        stage.done()


def _train(recipe: Recipe, folder: Path, model: str) -> None:
    base = artifacts.model_folder(model)
    inputs: list[str | Path] = [folder / ROWS, base]
    inputs += [recipe.train.eval_data] if recipe.train.eval_data else []
    stage = _Stage(folder, "train", _settings(recipe.train), inputs, [MODEL, ADAPTER])  # one of them is not there
    if stage.unchanged():
        place = str(base.resolve())
        if recipe.train.adapter and reading.read_json(folder / RUN).get("base") != place:  # it has moved
            writing.update_json(folder / RUN, {"base": place})
        return
    from sftcli.manifest import checkpoints
    from sftcli.model.training import choose_engine
    from sftcli.stages.train import start

    asks = recipe.generate
    if asks and asks.prompts and asks.device != "auto":
        choose_engine(asks.device, asks.dtype)  # refused now, not when all is trained
    unfinished = bool(checkpoints(folder)) and not stage.complete()  # killed anywhere before it was recorded
    start(recipe.train, [str(folder / ROWS)], str(base), str(folder), resumed=unfinished, overwrite=True)
    for name in (COMPLETIONS, EVALUATION):  # of the model before
        writing.discard(folder / name)
    stage.done()


def _trained(recipe: Recipe) -> str:
    """What training leaves in the run: a model, or an adapter beside the base."""
    return ADAPTER if recipe.train.adapter else MODEL


def _generate(recipe: Recipe, folder: Path, model: str) -> None:
    options = recipe.generate
    assert options and options.prompts
    inputs: list[str | Path] = [options.prompts, folder / _trained(recipe), *_files(options.template, *options.adapter)]
    inputs += [artifacts.model_folder(model)] if recipe.train.adapter else []
    stage = _Stage(folder, "generate", _settings(options), inputs, [COMPLETIONS])
    if not stage.unchanged():
        from sftcli.stages.generate import complete

        complete(options, options.prompts, str(folder / _trained(recipe)), str(folder / COMPLETIONS))
        stage.done()
    for number, (_, _, fields) in enumerate(reading.read_objects(str(folder / COMPLETIONS))):
        if number == SHOWN_ANSWERS:
            break
        console.note(f"  {_one_line(_question(fields))}")
        console.note(f"    -> {_one_line(json.loads(bytes(fields['completion'])))}")
        if "reference" in fields and bytes(fields["reference"]) != bytes(fields["completion"]):
            console.note(f"       {_one_line(json.loads(bytes(fields['reference'])))}  (the reference)")


def _question(fields: dict[str, Any]) -> str:
    """What a completions line was asked."""
    if "messages" in fields:
        asked = [m for m in json.loads(bytes(fields["messages"])) if m.get("role") == "user"]
        text = asked[-1].get("content") if asked else ""
    else:
        text = next((json.loads(bytes(fields[n])) for n in ("prompt", "question", "instruction") if n in fields), "")
    return str(text)


def _one_line(text: str) -> str:
    """Text for a summary: line ends as bars, no longer than a line of the screen."""
    text = " | ".join(text.split("\n"))
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _evaluate(recipe: Recipe, folder: Path) -> dict[str, Any]:
    from sftcli.stages.evaluate import evaluate_completions

    assert recipe.evaluate
    results = evaluate_completions(recipe.evaluate, str(folder / COMPLETIONS))
    writing.write_json(folder / EVALUATION, results)
    scores = ", ".join(f"{name} {results[name]:.1%}" for name in recipe.evaluate.metrics)
    console.note(f"evaluate: {scores} of {results['completions']:,} completions")
    return results


# ---- --dry-run


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """Counts, steps and a memory estimate of a recipe; its data stages run in a temporary folder."""
    from sftcli.model.batches import steps_in_run
    from sftcli.model.checkpoint import open_folder
    from sftcli.model.dataset import split
    from sftcli.model.memory import estimate
    from sftcli.model.mixture import Input, parts_of
    from sftcli.rowfile import RowFile
    from sftcli.stages.training_job import with_base_dtype

    _refuse(recipe)
    with tempfile.TemporaryDirectory(prefix="sft-dry-run-") as temporary:
        folder = Path(temporary)
        model = _base(recipe, folder)
        _data(recipe, folder, model)
        rows = RowFile(folder / ROWS)
        lengths = rows.lengths()
        trained, _ = split(len(rows), recipe.train.eval_share, recipe.train.seed)
        parts = parts_of(rows, trained, [(Input(ROWS), len(rows))], recipe.train.mix)
        opened = open_folder(artifacts.model_folder(model))
    found = {
        "rows": len(lengths),
        "tokens": sum(lengths),
        "longest_row": max(lengths),
        "steps": steps_in_run([lengths[i] for i in trained], recipe.train, parts),
        **estimate(opened.config, with_base_dtype(recipe.train, opened), max(lengths), opened.family),
    }
    size = found["memory_bytes"] / 1e9
    console.note(
        f"run: {found['rows']:,} rows of {found['tokens']:,} tokens make {found['steps']:,} steps, in about "
        f"{f'{size:,.0f}' if size >= 10 else f'{size:.2g}'} GB of memory; nothing was trained"
    )
    return {"recipe": recipe.model_dump(mode="json", exclude_none=True), **found}
