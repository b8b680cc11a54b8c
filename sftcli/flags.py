"""What commands share: flags, and how flags, a recipe and --set become a section's options."""

import signal
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, Any

import typer

Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any option of the recipe, e.g. width=192.")]
RecipeFile = Annotated[
    str | None, typer.Option("--recipe", metavar="FILE", help="Take this stage's options from a recipe.")
]
Model = Annotated[str | None, typer.Option("-m", "--model", metavar="MODEL", help="A model folder or a run.")]
Output = Annotated[str | None, typer.Option("-o", "--output", metavar="FILE", help="Where to write (standard output).")]
Columns = Annotated[
    str | None, typer.Option(metavar="A=B,...", help="Column names: prompt=question,completion=answer.")
]
Template = Annotated[
    str | None, typer.Option(metavar="NAME|FILE", help="chatml, llama3, alpaca, plain or a Jinja file.")
]
NewTemplate = Annotated[
    str | None, typer.Option(metavar="NAME|FILE", help="chatml (default), llama3, alpaca, plain or a Jinja file.")
]
WeightedRows = Annotated[
    list[str] | None,
    typer.Argument(metavar="ROWS", help="From sft mask; - . FILE*0.3: 30% of its rows an epoch, FILE#500: 500."),
]
ModelOrRecipe = Annotated[
    str | None, typer.Option("-m", "--model", metavar="MODEL|RECIPE", help="A model folder, a run, or a recipe.")
]
LearningRate = Annotated[
    float | None,
    typer.Option(help="Peak learning rate (1e-3 from nothing, 2e-5 pretrained, 2e-4 an adapter, 1e-2 a prefix)."),
]
AdapterKind = Annotated[
    str | None,
    typer.Option(
        metavar="lora|prefix|prompt", help="Train a low-rank update or a prefix; --set adapter.rank=16 and more."
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(metavar="RUN|FOLDER|none", help="On -m; several are asked in turn, `none` is -m alone."),
]
TemplateText = Annotated[str | None, typer.Option(metavar="TEXT", help="e.g. '<bos>{question}<sep>{answer}<eos>'.")]
SpecialInContent = Annotated[
    str | None, typer.Option(metavar="HOW", help="Control strings in messages: escape (default), error or allow.")
]
Kind = Annotated[
    str | None, typer.Option("--objective", metavar="KIND", help="causal (default), glm or bert; its flags:")
]
Level = Annotated[str | None, typer.Option(help="glm: token (default), sentence, document, or sft.")]
Spans = Annotated[str | None, typer.Option(metavar="A:B,...", help="glm: these blanks instead of drawn ones,")]
Lengths = Annotated[str | None, typer.Option(metavar="N,...", help="glm: or blanks of these lengths")]
Places = Annotated[str | None, typer.Option(metavar="N,...", help="glm: at these places,")]
Order = Annotated[str | None, typer.Option(metavar="I,...", help="glm: filled in this order.")]
MaskPositions = Annotated[str | None, typer.Option(metavar="N,...", help="bert: mask these instead of drawn tokens.")]
NextSentence = Annotated[bool | None, typer.Option("--nsp/--no-nsp", help="bert: pairs of sentences (default).")]
ObjectiveSeed = Annotated[int | None, typer.Option("--seed", help="Of what the objective draws (0).")]


def objective_settings(kind: str | None, **options: Any) -> list[str]:
    """--objective and the flags that are options of it, as settings (in quotes: YAML reads 2:3 as a number)."""
    given = {"kind": kind} | options
    return [f'objective.{name}="{value}"' for name, value in given.items() if value is not None]


def dies_with_its_reader() -> None:
    """A filter dies quietly when its reader goes away (`| head -n1`)."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def filter_options(output: str | None, name: str, recipe: str | None, settings: Sequence[str], **flags: Any) -> Any:
    """A filter's options; if they are wrong, the next stage of the pipe is told so."""
    from sftcli.writing import open_output

    with open_output(None) if output in (None, "-") else nullcontext():
        return options_of(name, recipe, settings, **flags)


def options_of(name: str, recipe: str | None, settings: Sequence[str], **flags: Any) -> Any:
    """A section's options: the recipe's, then flags that were given, then --set."""
    from sftcli.recipe import SECTIONS, Recipe
    from sftcli.recipefile import apply_settings, parse, read_yaml

    values: dict[str, Any] = {}
    if recipe:
        parse(Recipe, whole := read_yaml(recipe), source=recipe)
        values = dict(whole.get(name) or {})
    values |= {key: value for key, value in flags.items() if value is not None and value != []}
    return parse(SECTIONS[name], apply_settings(values, list(settings), prefix=name), section=name)
