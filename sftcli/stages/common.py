"""What several stages share: the tokenizer and template that flags name, and lines that are rejected."""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from os.path import exists, isfile, realpath
from typing import IO

import msgspec

from sftcli.artifacts import text_folder
from sftcli.console import note, tell_of_waiting, warn
from sftcli.errors import CheckpointError, DataError, UsageError
from sftcli.lines import name_of, read_lines
from sftcli.reading import PreviousStageFailed, line_fields
from sftcli.recipe import InContent
from sftcli.text.folder import folder_template, load_codec, load_tokenizer_file
from sftcli.text.speaker import Rendered
from sftcli.text.store import remember
from sftcli.text.template import Template, control_tokens, load_template
from sftcli.text.tokenizer import Codec, Encoded
from sftcli.writing import json_line, open_output

SHOWN_REJECTS = 10
LULL = 0.1  # seconds: a row that has waited so long for others goes on without them

Input = tuple[str, bytes, dict[str, msgspec.Raw] | DataError, bool]


def codec_for(model: str | None, tokenizer: str | None, in_content: InContent = "escape") -> Codec:
    """The tokenizer of `-m`, or the one that --tokenizer names; `in_content` is --special-in-content."""
    if not tokenizer and not model:
        raise UsageError("no model", hint="-m MODEL (a folder or a run), or --tokenizer FILE")
    codec = load_tokenizer_file(tokenizer) if tokenizer else load_codec(text_folder(str(model)))
    codec.in_content = in_content
    return codec


def report_controls(stage: str, codec: Codec) -> None:
    """Tell how often content held a control string, and what became of it."""
    if codec.counts.defused:
        note(f"{stage}: {codec.counts.defused:,} control strings in content were encoded as plain text")
    if codec.counts.allowed:
        warn(f"{stage}: {codec.counts.allowed:,} control strings in content became control tokens")


def template_for(
    codec: Codec, model: str | None, name: str | None, text: str | None, columns: Mapping[str, str]
) -> Template:
    """The template that flags name, else the model folder's own. Its control tokens must be the tokenizer's."""
    if name or text is not None:
        template = load_template(name, text, columns, codec.specials)
    else:
        folder = text_folder(model) if model else None
        source = folder_template(folder) if folder else None
        if source is None and codec.specials.get("cls_token") in codec.added:  # BERT's: its texts have no turns
            return load_template(None, "{prompt} {completion}", {}, codec.specials)
        if source is None:
            raise UsageError(
                f"{folder or 'the tokenizer'} has no chat template",
                hint="--template chatml|llama3|alpaca|FILE, or --template-text '<bos>{question}<sep>{answer}<eos>'",
            )
        try:
            template = Template(source, f"of {folder}", codec.specials)
        except UsageError as error:  # nobody asked for this one by a flag
            raise CheckpointError(str(error), error.hint) from None
    if "controls" in template.header and (missing := missing_controls(template, codec)):
        raise UsageError(
            f"template {template.name} needs the control token {missing[0]}, which the tokenizer lacks",
            hint="the model's own template, another --template, or `sft init --base MODEL --template NAME -o NEW`",
        )
    return template


def missing_controls(template: Template, codec: Codec) -> list[str]:
    """The control tokens that a template writes and the tokenizer lacks."""
    controls, written = control_tokens(template)["controls"], template.source.partition("-#}")[2] or template.source
    return [token for token in controls if token in written and token not in codec.added]


def keep_for_later(codec: Codec, template: Template | None) -> None:
    """Let `sft mask --show` name tokens and `sft train` save the template that rows were made with."""
    remember(f"{codec.hash}.tokenizer.json", codec.definition)
    if template:
        remember(f"{template.hash}.jinja", template.source.encode())


def read_lines_of(paths: Sequence[str]) -> Iterator[Input]:
    """(file:line, line, its fields, whether the input pauses after it) of several JSONL inputs; a line that is not an
    object comes as its error."""
    for path in paths:
        tell_of_waiting(path)
        for number, line, last, pause in read_lines(path):
            where = f"{name_of(path)}:{number}"
            try:
                yield where, line, line_fields(line, where, last), pause
            except PreviousStageFailed:
                raise
            except DataError as error:
                yield where, line, error, pause


def encode_lines(
    codec: Codec, lines: Sequence[tuple[str, list[Rendered]]], together: Callable[[], list[Encoded]] | None = None
) -> list[list[Encoded] | DataError]:
    """The texts of every (file:line, texts), encoded at once; if that fails, one by one, to know which line it was.

    `together`: the end of a call of `codec` on all the texts that was begun elsewhere."""
    try:
        whole = together() if together else codec.encode([text for _, texts in lines for text in texts])
    except DataError:
        return [_encode_line(codec, where, texts) for where, texts in lines]
    encoded = iter(whole)
    return [[next(encoded) for _ in texts] for _, texts in lines]


def _encode_line(codec: Codec, where: str, texts: list[Rendered]) -> list[Encoded] | DataError:
    try:
        return codec.encode(texts)
    except DataError as error:
        return error.located(where)


class Rejects:
    """Bad lines under --on-error: the first one stops (fail), or each is counted and written to --rejects (skip)."""

    def __init__(self, on_error: str, path: str | None, inputs: Sequence[str], output: str | None):
        if path and output and realpath(path) == realpath(output) and (isfile(path) or not exists(path)):
            raise UsageError(f"{path} is to take both the output and the rejects", hint="give each a file of its own")
        self.skip, self.path, self.inputs, self.count = on_error == "skip", path, inputs, 0
        self.stack = ExitStack()
        self.out: IO[bytes] | None = None

    def __enter__(self) -> "Rejects":
        if self.path:
            self.out = self.stack.enter_context(open_output(self.path, self.inputs))
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()  # whatever ended the stage: the lines that were rejected are needed then most of all

    def add(self, error: DataError, line: bytes) -> None:
        """Count a bad line, or raise where --on-error fail."""
        if not self.skip:
            raise error
        self.count += 1
        if self.count <= SHOWN_REJECTS:
            note(f"rejected: {error}")
        if self.out:
            file, _, number = (error.where or "").rpartition(":")
            self.out.write(
                json_line(
                    {
                        "file": file,
                        "line": int(number) if number.isdigit() else None,
                        "byte": error.byte,
                        "reason": error.reason,
                        "field": error.field,
                        "raw_b64": base64.b64encode(line).decode(),
                    }
                )
            )
