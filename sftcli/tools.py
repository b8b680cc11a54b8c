"""Commands beside the pipeline: look at files, talk with a model, turn models into other forms. In cli.py by name."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sftcli.errors import Exit, UsageError
from sftcli.flags import Columns, Model, RecipeFile, Template, TemplateText, dies_with_its_reader, options_of


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a run.")],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told before all else.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="At most so many tokens an answer (256).")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 (default) is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k best (0: all).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the best that hold this mass (1: all).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random streams, one an answer (0).")] = None,
    quantize: Annotated[str | None, typer.Option(metavar="int8", help="Weights in a quarter of the memory.")] = None,
    template: Template = None,
    template_text: TemplateText = None,
) -> None:
    """Talk with a model; /help inside lists the commands.

    \b
    sft chat run --temperature 0.8
    printf 'Why?\\nAnd how?\\n' | sft chat run > answers.txt

    In a pipe every line is a question (or a command, where it begins with /; // asks what begins so), and its answer is
    one line: line ends in it are written as \\n, other control characters as \\x1b and the like.
    """
    from sftcli.stages.chat import chat as stage

    dies_with_its_reader()
    options = options_of(
        "generate",
        None,
        [],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        quantize=quantize,
        template=template,
        template_text=template_text,
    )
    stage(options, model, system)


def merge(
    adapter: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="An adapter run or a PEFT folder.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FOLDER", help="The model folder to make.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="BASE", help="Its base (what the adapter itself names).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (as the base is stored).")] = None,
    shard_size: Annotated[str, typer.Option(help="At most so much in one file.")] = "5GB",
) -> None:
    """Base + adapter -> one model folder, added in float32.

    \b
    sft merge run -o merged
    """
    from sftcli.stages.merge import merge as stage

    stage(adapter, output, model, dtype, shard_size)


def show(
    path: Annotated[
        str, typer.Argument(metavar="FILE", help="Data, tokens, rows, metrics, completions, a model or a run.")
    ],
    count: Annotated[int, typer.Option("-n", "--count", min=0, help="Lines to show.")] = 3,
    model: Annotated[str | None, typer.Option("-m", "--model", help="Names the tokens.")] = None,
) -> None:
    """Any artifact, for people.

    \b
    sft show run/rows.safetensors -n 5
    """
    from sftcli.stages.show import show as stage

    dies_with_its_reader()
    stage(path, count, model)


def checkpoints(run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """List a run's checkpoints and read every byte of them: a JSON line each. Exit code 5 if one is damaged.

    \b
    sft checkpoints run | jq -c 'select(.whole) | .step'
    """
    from sftcli.stages.checkpoints import checkpoints as stage

    dies_with_its_reader()
    if not stage(run):
        raise typer.Exit(int(Exit.CHECKPOINT))


def check(
    data: Annotated[list[str], typer.Argument(metavar="DATA|FOLDER", help="Raw JSONL files, or -; or a model folder.")],
    model: Model = None,
    columns: Columns = None,
    template: Template = None,
    template_text: TemplateText = None,
) -> None:
    """Data, template, tokenizer and model, before a run. Exit code 3 if a check fails.

    \b
    sft check chat.jsonl -m MODEL
    sft check FOLDER

    Of a model folder alone: what each file is and what it may do, without loading any. Exit code 5 if one is unsafe.
    """
    dies_with_its_reader()
    if len(data) == 1 and Path(data[0]).is_dir() and not model:
        from sftcli.stages.check_folder import check_folder

        if not check_folder(data[0]):
            raise typer.Exit(int(Exit.CHECKPOINT))
        return
    from sftcli.stages.check import check as stage

    if not model:
        missing = [path for path in data if path != "-" and not Path(path).exists()]
        hint = "-m MODEL, a model folder or a run"
        raise UsageError(f"there is no {missing[0]}") if missing else UsageError("no model", hint=hint)
    options = options_of(
        "tokenize", None, [], data=data, columns=columns, template=template, template_text=template_text
    )
    if not stage(options, model):
        raise typer.Exit(int(Exit.DATA))


def import_gguf(
    file: Annotated[str, typer.Argument(metavar="FILE.gguf", help="A GGUF file, quantised or not.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FOLDER", help="The model folder to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (what the file has; float32 if quantised).")
    ] = None,
) -> None:
    """A GGUF file -> a model folder: weights, tokenizer, chat template.

    \b
    sft import model.gguf -o model
    """
    from sftcli.stages.import_gguf import import_gguf as stage

    stage(file, output, dtype)


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a run.")],
    gguf: Annotated[str, typer.Option("--gguf", metavar="KIND", help="f16, bf16 or q8_0.")],
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where to write (model-KIND.gguf in the folder)."),
    ] = None,
) -> None:
    """A model folder -> a GGUF file for llama.cpp, and a Modelfile for Ollama beside it.

    \b
    sft export run --gguf q8_0 -o model.gguf
    """
    from sftcli.stages.export import export as stage

    stage(model, gguf, output)


def evaluate(
    rows: Annotated[str | None, typer.Argument(metavar="ROWS", help="From sft mask.")] = None,
    model: Model = None,
    per_row: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write nll per trained token, a line a row.")
    ] = None,
    completions: Annotated[str | None, typer.Option(metavar="FILE", help="Score completions instead.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="exact_match, token_f1, regex_match.")] = None,
    regex: Annotated[str | None, typer.Option(help="What regex_match compares: its first group.")] = None,
    recipe: RecipeFile = None,
) -> None:
    """Score rows under a model, or completions against their references. Prints one JSON object.

    \b
    sft evaluate rows.safetensors -m run
    sft evaluate --completions answers.jsonl
    """
    from sftcli.stages.evaluate import evaluate_completions, evaluate_rows
    from sftcli.writing import json_line

    if bool(rows) == bool(completions):
        raise UsageError("what to evaluate?", hint="ROWS -m MODEL, or --completions FILE")
    if completions:
        metrics = metric or (["regex_match"] if regex else None)
        results = evaluate_completions(options_of("evaluate", recipe, [], metrics=metrics, regex=regex), completions)
    else:
        if not model:
            raise UsageError("no model", hint="-m MODEL, a model folder or a run")
        results = evaluate_rows(str(rows), model, per_row)
    if per_row != "-":
        sys.stdout.buffer.write(json_line(results))
