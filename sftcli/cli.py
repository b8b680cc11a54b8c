"""The commands: parse, call a stage, report. Nothing heavy is imported before a command runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sftcli import __version__, console, tools
from sftcli.errors import UsageError
from sftcli.exits import Commands
from sftcli.flags import (
    AdapterKind,
    Adapters,
    Columns,
    Kind,
    LearningRate,
    Lengths,
    Level,
    MaskPositions,
    Model,
    ModelOrRecipe,
    NewTemplate,
    NextSentence,
    ObjectiveSeed,
    Order,
    Output,
    Places,
    RecipeFile,
    Set,
    Spans,
    SpecialInContent,
    Template,
    TemplateText,
    WeightedRows,
    dies_with_its_reader,
    filter_options,
    objective_settings,
    options_of,
)

HELP = """Supervised fine-tuning as a pipeline of small, visible filters.

\b
everything from one file:
  sft run recipes/quickstart.yaml
look before you train:
  sft tokenize chat.jsonl -m MODEL | sft mask --show 3
the whole job as a pipeline:
  sft tokenize chat.jsonl -m MODEL | sft mask | sft train - -m MODEL -o run
  sft generate questions.jsonl -m run > answers.jsonl
"""


app = typer.Typer(
    cls=Commands,
    name="sft",
    help=HELP,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sft {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Warnings and errors only.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    console.QUIET = quiet


@app.command()
def init(
    data: Annotated[list[str] | None, typer.Argument(metavar="DATA", help="Raw JSONL files, or - .")] = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="FOLDER", help="The model folder to make.")] = "base",
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Add --template and its control tokens to this model instead.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="llama (default), gpt2 or bert.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Tokens of the byte-level BPE (1024).")] = None,
    template: NewTemplate = None,
    template_text: TemplateText = None,
    tokenizer: Annotated[str | None, typer.Option(help="bpe (default), or whitespace for tiny vocabularies.")] = None,
    columns: Columns = None,
    recipe: RecipeFile = None,
    settings: Set = [],  # noqa: B006
) -> None:
    """Make a tokenizer and an empty GPT from data, or teach a model's tokenizer a chat template.

    \b
    sft init chat.jsonl -o base --preset llama --vocab-size 1024 --set width=192
    sft init --base MODEL --template chatml -o base
    """

    options = options_of(
        "init",
        recipe,
        settings,
        data=data,
        preset=preset,
        vocab_size=vocab_size,
        template=template,
        template_text=template_text,
        tokenizer=tokenizer,
        columns=columns,
    )
    if base:
        if data or preset or vocab_size or tokenizer or any(not s.startswith("controls=") for s in settings):
            raise UsageError("--base takes a model as it is", hint="beside it: --template, --set controls=..., -o")
        from sftcli.stages.extend import extend

        extend(base, options, output)
        return
    from sftcli.stages.init import init as stage

    stage(options, output)


@app.command()
def tokenize(
    data: Annotated[list[str] | None, typer.Argument(metavar="DATA", help="Raw JSONL files, or - .")] = None,
    model: Model = None,
    output: Output = None,
    columns: Columns = None,
    template: Template = None,
    template_text: TemplateText = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE|whitespace", help="A tokenizer.json instead of -m.")
    ] = None,
    special_in_content: SpecialInContent = None,
    on_error: Annotated[str | None, typer.Option(help="fail (default) or skip bad lines.")] = None,
    rejects: Annotated[str | None, typer.Option(metavar="FILE", help="Where skipped lines go, with reasons.")] = None,
    recipe: RecipeFile = None,
    settings: Set = [],  # noqa: B006
) -> None:
    """Raw JSONL -> documents: ids, and whose words are where.

    \b
    sft tokenize chat.jsonl -m MODEL -o tokens.jsonl
    """
    from sftcli.stages.tokenize import tokenize as stage

    dies_with_its_reader()
    options = filter_options(
        output,
        "tokenize",
        recipe,
        settings,
        data=data or ([] if recipe else ["-"]),
        columns=columns,
        template=template,
        template_text=template_text,
        tokenizer=tokenizer,
        special_in_content=special_in_content,
        on_error=on_error,
        rejects=rejects,
    )
    stage(options, model, output)


@app.command()
def mask(
    tokens: Annotated[str, typer.Argument(metavar="TOKENS", help="From sft tokenize, or pretokenised; - .")] = "-",
    output: Output = None,
    show: Annotated[
        int, typer.Option(metavar="N", min=0, help="Print the first N rows, trained tokens in colour.")
    ] = 0,
    train_on: Annotated[
        str | None,
        typer.Option(
            metavar="RULE", help="own (default), own-final, own-reasoning, last, all, after:IDS or between:A:B."
        ),
    ] = None,
    roles: Annotated[str | None, typer.Option(metavar="A,B", help="Train these roles instead.")] = None,
    no_match: Annotated[
        str | None, typer.Option(help="Rows without the pattern: drop (default), error or train.")
    ] = None,
    eod_mask_loss: Annotated[int | None, typer.Option(metavar="ID", help="Do not train what follows this id.")] = None,
    format: Annotated[str | None, typer.Option(help="rows (default), hf or neox (-o NAME.bin: its datasets).")] = None,
    seq_len: Annotated[int | None, typer.Option(metavar="N", help="Row length of --format neox.")] = None,
    max_length: Annotated[int | None, typer.Option(metavar="N", help="Rows may have N tokens.")] = None,
    too_long: Annotated[str | None, typer.Option(help="drop (default), error, truncate-prompt or truncate.")] = None,
    drop_duplicates: Annotated[
        bool | None, typer.Option("--drop-duplicates", help="Drop and count rows that have come before.")
    ] = None,
    rejects: Annotated[str | None, typer.Option(metavar="FILE", help="Where dropped lines go, with reasons.")] = None,
    objective: Kind = None,
    level: Level = None,
    spans: Spans = None,
    lengths: Lengths = None,
    places: Places = None,
    order: Order = None,
    mask_positions: MaskPositions = None,
    nsp: NextSentence = None,
    seed: ObjectiveSeed = None,
    model: Annotated[str | None, typer.Option("-m", "--model", help="Names tokens in what is shown.")] = None,
    recipe: RecipeFile = None,
    settings: Set = [],  # noqa: B006
) -> None:
    """Documents -> rows: which tokens are trained.

    \b
    sft tokenize chat.jsonl -m MODEL | sft mask --show 3 -o rows.safetensors
    """
    from sftcli.stages.mask import mask as stage

    dies_with_its_reader()
    drawn = {"level": level, "spans": spans, "lengths": lengths, "places": places, "order": order}
    options = filter_options(
        output,
        "mask",
        recipe,
        [*objective_settings(objective, **drawn, mask_positions=mask_positions, nsp=nsp, seed=seed), *settings],
        train_on=train_on,
        roles=roles,
        no_match=no_match,
        eod_mask_loss=eod_mask_loss,
        format=format,
        seq_len=seq_len,
        max_length=max_length,
        too_long=too_long,
        drop_duplicates=drop_duplicates,
        rejects=rejects,
    )
    stage(options, tokens, output, show, model)


@app.command()
def train(
    rows: WeightedRows = None,
    model: ModelOrRecipe = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="RUN", help="The run folder.")] = "run",
    epochs: Annotated[float | None, typer.Option(help="Times through the data (3).")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Exactly this many steps instead.")] = None,
    lr: LearningRate = None,
    adapter: AdapterKind = None,
    prefix_length: Annotated[int | None, typer.Option(metavar="P", help="Positions of a prefix (10).")] = None,
    prefix_mlp: Annotated[int | None, typer.Option(metavar="M", help="Train it through an MLP this wide.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of one optimizer step (8192) ...")] = None,
    batch_rows: Annotated[int | None, typer.Option(help="... or its rows.")] = None,
    eval_data: Annotated[str | None, typer.Option(metavar="ROWS", help="Held-out rows.")] = None,
    eval_share: Annotated[float | None, typer.Option(help="Hold out this share of the rows (0).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and dropout (0).")] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes on this machine (1); a GPU each with CUDA.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in -o.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the finished run in -o.")] = False,
    recipe: RecipeFile = None,
    settings: Set = [],  # noqa: B006
) -> None:
    """Rows -> a model folder in RUN/model, or an adapter in RUN/adapter.

    \b
    sft train rows.safetensors -m MODEL -o run --set optimizer.lr=1e-4
    sft train chat.safetensors 'web.safetensors*0.3' -m MODEL -o run
    sft train rows.safetensors -m MODEL -o run --adapter lora --set adapter.targets=[q_proj,v_proj]
    sft train rows.safetensors -m MODEL -o run --adapter prefix --prefix-length 10
    """
    from sftcli.stages.train import start

    if model and model.endswith((".yaml", ".yml")):
        from sftcli.recipefile import load_recipe

        recipe, model = model, load_recipe(model).model
        if not model:
            raise UsageError(f"{recipe} names no `model:`", hint="sft run RECIPE makes one by its `init:`; or -m MODEL")
    if not model:
        hint = _begun_by(output) if resume else "-m MODEL; `sft init DATA -o base` makes one from nothing"
        raise UsageError("no model", hint=hint)
    if batch_tokens and batch_rows:
        raise UsageError("--batch-tokens and --batch-rows both say how large a step is", hint="give one of them")
    inner = {"adapter.kind": adapter, "adapter.mlp": prefix_mlp, "adapter.length": prefix_length, "optimizer.lr": lr}
    settings = [*(f"{key}={value}" for key, value in inner.items() if value is not None), *settings]
    options = options_of(
        "train",
        recipe,
        settings,
        epochs=epochs,
        max_steps=max_steps,
        batch_tokens=batch_tokens,
        batch_rows=batch_rows,
        eval_data=eval_data,
        eval_share=eval_share,
        seed=seed,
        nproc=nproc,
    )
    start(options, rows or ["-"], model, output, resume, overwrite)


def _begun_by(run: str) -> str:
    """What --resume goes on from: the command that began a run."""
    from shlex import join

    from sftcli.artifacts import RUN
    from sftcli.reading import read_json

    facts = read_json(Path(run, RUN)) if Path(run, RUN).is_file() else {}
    command = facts.get("command")
    if not isinstance(command, list) or not command:
        return f"{run} holds no run; --resume stands beside the rows and the -m that a run was begun with"
    again = "the same goes on" if command[1:2] == ["run"] else "the same with --resume goes on"
    return f"that run was begun with `{join(['sft', *map(str, command[1:])])}`; {again}"


@app.command()
def generate(
    prompts: Annotated[str, typer.Argument(metavar="PROMPTS", help="Raw JSONL, as for training; - .")] = "-",
    model: Model = None,
    output: Output = None,
    adapter: Adapters = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows decoded side by side (32).")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="At most so many tokens a row (256).")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 (default) is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k best (0: all).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the best that hold this mass (1: all).")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop what is below this share of the best (0).")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 (default) is off.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End a row at this text, too.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Completions a prompt (1).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random streams, one a row (0).")] = None,
    pad_side: Annotated[str | None, typer.Option(help="left (default) or right.")] = None,
    deterministic: Annotated[bool | None, typer.Option("--deterministic", help="Byte-equal, slower.")] = None,
    quantize: Annotated[str | None, typer.Option(metavar="int8", help="Weights in a quarter of the memory.")] = None,
    show_batch: Annotated[bool, typer.Option("--show-batch", help="Print the first batch: ids, mask ...")] = False,
    columns: Columns = None,
    template: Template = None,
    template_text: TemplateText = None,
    special_in_content: SpecialInContent = None,
    recipe: RecipeFile = None,
    settings: Set = [],  # noqa: B006
) -> None:
    """Prompts -> completions, in input order; of a masked LM, each text with its [MASK] tokens filled.

    jq -c '{prompt}' q.jsonl | sft generate - -m run --batch-size 32 > answers.jsonl
    """
    from sftcli.stages.generate import complete

    dies_with_its_reader()
    if not model:
        raise UsageError("no model", hint="-m MODEL, a model folder or a run")
    options = filter_options(
        output,
        "generate",
        recipe,
        settings,
        adapter=adapter,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        n=n,
        seed=seed,
        pad_side=pad_side,
        deterministic=deterministic,
        quantize=quantize,
        columns=columns,
        template=template,
        template_text=template_text,
        special_in_content=special_in_content,
    )
    complete(options, prompts, model, output, show_batch)


app.command()(tools.chat)
app.command()(tools.merge)


app.command()(tools.evaluate)
app.command()(tools.show)
app.command()(tools.check)
app.command()(tools.checkpoints)
app.command("import")(tools.import_gguf)
app.command()(tools.export)


@app.command()
def run(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A YAML file, one section a stage.")] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="RUN", help="The run folder (runs/RECIPE).")
    ] = None,
    settings: Set = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Resolve and count; train nothing.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
) -> None:
    """All stages of a recipe in order; what has not changed is skipped.

    \b
    sft run recipes/quickstart.yaml --set train.epochs=2
    """
    from sftcli.recipe import Recipe
    from sftcli.recipefile import dump_recipe, load_recipe
    from sftcli.stages import run as stage
    from sftcli.writing import json_line

    if schema:
        sys.stdout.buffer.write(json_line(Recipe.model_json_schema()))
        return
    if recipe is None:
        raise UsageError("no recipe", hint="sft run recipes/quickstart.yaml")
    whole = load_recipe(recipe, list(settings))
    if dry_run:
        for line in dump_recipe(whole).splitlines():
            console.note(line)
        sys.stdout.buffer.write(json_line(stage.dry_run(whole)))
        return
    results = stage.run(whole, output or str(Path("runs", Path(recipe).stem)))
    if results:
        sys.stdout.buffer.write(json_line(results))
