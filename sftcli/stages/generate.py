"""sft generate: prompts -> completions, in input order, as soon as order allows."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Any

from sftcli import artifacts, console
from sftcli.errors import UsageError
from sftcli.model.adapters.peft import Adapter, applied, apply, open_adapter, open_model, trained_on_another
from sftcli.model.adapters.prefix_files import PrefixAdapter
from sftcli.model.cache import padded, positions_of
from sftcli.model.checkpoint import ModelFolder, load_trained, open_folder
from sftcli.model.decoding import Completion, TextStops, generate, in_order
from sftcli.model.filling import fill
from sftcli.model.growth import Grown, Prompt
from sftcli.model.layout import PAYS, laid_out
from sftcli.model.training import choose_engine
from sftcli.recipe import Generate
from sftcli.stages.common import codec_for, report_controls, template_for
from sftcli.stages.prompts import Asked, Filling, Prompts, first_of
from sftcli.text.folder import folder_template, stop_ids
from sftcli.text.objectives.blank_infilling import Filler, filler_of
from sftcli.text.objectives.masked_lm import Cloze, cloze_of
from sftcli.text.tokenizer import Codec
from sftcli.writing import json_line, open_output

TAIL = 16  # generated tokens beside the bytes of a stop text that are looked at for it: a token may be one byte
NONE = "none"  # --adapter none: the base alone


@dataclass
class Summary:
    """What one run of the stage did."""

    prompts: int = 0
    completions: int = 0
    tokens: int = 0
    stopped: int = 0
    context_full: int = 0
    no_room: int = 0  # prompts as long as the context: their completions are empty


def complete(options: Generate, source: str, model: str, output: str | None, show_batch: bool = False) -> Summary:
    """Run the stage."""
    with open_output(output, [source]) as out:
        return _complete(options, source, model, out, show_batch)


def _complete(options: Generate, source: str, model: str, out: IO[bytes], show_batch: bool) -> Summary:
    folder, adapters = _models(options, model)
    words = _words_of(model, options)
    codec = codec_for(words, None, options.special_in_content)
    template = template_for(codec, words, options.template, options.template_text, options.columns)
    engine = choose_engine(options.device, options.dtype)
    network = load_trained(folder, engine.dtype).to(engine.device)
    filler = _filler(options, folder, codec)
    cloze = filler if isinstance(filler, Cloze) else None
    stops, texts = ([], []) if cloze else _stop_set(options, codec, folder.path, artifacts.text_folder(words))
    if outside := [token for token in stops if not 0 <= token < folder.config.vocab_size]:
        console.warn(f"generate: stop token {outside[0]} is beyond the vocabulary of {folder.config.vocab_size:,}")
    stops += [filler.marks.eop] if isinstance(filler, Filler) and filler.marks.eop not in stops else []
    summary = Summary()
    prompts = Prompts(options, source, codec, template, folder.config.vocab_size, filler)
    first, groups = first_of(prompts.groups(), options.batch_size)
    if show_batch:
        _show_table(first, options, adapters[0][1])
    rows = 1 if options.deterministic else options.batch_size if source == "-" else max(len(first), 1)
    waiting = [list(chain.from_iterable(groups))] if len(adapters) > 1 else groups  # a list can be asked again

    def answers(group: Iterable[Prompt]) -> Iterator[Completion]:
        if cloze:
            return fill(network, group, options, cloze.marks.mask)
        return in_order(generate(network, group, options, stops, _text_stops(codec, texts)))

    with console.live() as line, engine.autocast():
        counter = console.Counter(line, "generate")
        for name, adapter in adapters:
            asking = deque(prompts.asked) if len(adapters) > 1 else prompts.asked
            if options.quantize and adapter:
                apply(network, adapter)  # for good: what would undo it keeps the weights
            with applied(network, None if options.quantize else adapter):
                if options.quantize or options.max_new_tokens >= PAYS:
                    laid_out(network, rows, options.quantize)
                for done in chain.from_iterable(map(answers, waiting)):
                    out.write(_line(asking.popleft(), done, codec, texts, options, name, cloze))
                    out.flush()
                    _count(done, summary)
                    counter.add(1)
        for error in prompts.errors:
            raise error
    summary.prompts = prompts.read
    _report(summary, cloze)
    report_controls("generate", codec)
    return summary


def _models(options: Generate, model: str) -> tuple[ModelFolder, list[tuple[str, Adapter | None]]]:
    """The base, and what it is asked with, one after the other: --adapter, else what -m brings along."""
    if not options.adapter:
        folder, own = open_model(model)
        return folder, [("", own)]
    folder = open_folder(artifacts.model_and_adapter(model)[0])
    if options.quantize and len(options.adapter) > 1:  # an update goes into the whole numbers, for good
        raise UsageError("--quantize takes one adapter at a time")
    found = [(name, None if name == NONE else open_adapter(name, folder)) for name in options.adapter]
    for name, adapter in found:
        if adapter and trained_on_another(adapter, folder):
            console.warn(f"generate: adapter {name} was trained on another model than {folder.path}")
    return folder, found


def _filler(options: Generate, folder: ModelFolder, codec: Codec) -> Filling | None:
    """How prompts with blanks or masks are read; None where the model goes on at the end of its prompts."""
    learned = folder.config.block_positions or folder.config.fills_masks
    if options.fill and not learned:
        hint = "`sft mask --objective glm` (or bert) teaches it"
        raise UsageError(f"{folder.path} did not learn to fill blanks", hint=hint)
    if not (learned if options.fill is None else options.fill):
        return None
    if folder.config.block_positions:
        return filler_of(codec)
    if options.stop:
        raise UsageError(f"{folder.path} fills masks, each with one token: no --stop")
    return cloze_of(codec)


def _words_of(model: str, options: Generate) -> str:
    """Whose tokenizer, template and stop set count: those of the first adapter that brings them, else of -m."""
    places = [artifacts.adapter_folder(name) for name in options.adapter if name != NONE]
    bringing = [place for place in places if place and (place / "tokenizer.json").is_file()]
    if len({folder_template(place) for place in bringing}) > 1 and not (options.template or options.template_text):
        raise UsageError("the adapters were trained with different chat templates", hint="--template, or one at a time")
    return str(bringing[0]) if bringing else model


def _stop_set(options: Generate, codec: Codec, *folders: Path) -> tuple[list[int], list[str]]:
    """(ids, texts) that end a row: the last folder's stop set that there is and --stop (control tokens are ids)."""
    known = [ids for ids in map(stop_ids, folders) if ids]
    ids = (known[-1] if known else []) + [codec.added[text] for text in options.stop if text in codec.added]
    texts = [text for text in options.stop if text not in codec.added]
    if "" in texts:
        raise UsageError("--stop must not be empty")
    if not ids and not texts:
        console.warn("generate: no stop token is known: every row runs to --max-new-tokens")
    return ids, texts


def _text_stops(codec: Codec, texts: list[str]) -> TextStops | None:
    """Whether a stop text stands at the end of the generated ids; only their tail is decoded."""
    if not texts:
        return None
    tail = TAIL + max(len(text.encode()) for text in texts)

    def found(ids: list[int]) -> bool:
        start = max(len(ids) - tail, 0)
        while start and ids[start] in codec.byte_ids:  # bytes are decoded by runs: half of one is no text at all
            start -= 1
        text = codec.decode(ids[start:])
        return any(stop in text for stop in texts)

    return found


def _show_table(first: Sequence[Prompt], options: Generate, adapter: Adapter | None) -> None:
    """Print the first batch as the decoder lays it out: ids, mask and positions."""
    rows = [Grown(prompt.ids, prompt.blanks) for prompt in first]
    before = adapter.options.length if isinstance(adapter, PrefixAdapter) else 0
    for name, table in _tables(rows, options.pad_side, before) if rows else ():
        console.note(f"{name} ({options.pad_side}-padded):")
        for row in table:
            console.note("  " + " ".join(map(str, row)))


def _tables(rows: list[Grown], side: str, before: int) -> Iterator[tuple[str, list[list[int]]]]:
    """What rows are fed as, by name; positions count from the end of a prefix of `before` tokens."""
    ids, mask = padded([row.ids for row in rows], side)
    yield from (("ids", ids.tolist()), ("mask", mask.tolist()))
    if not any(row.blanks for row in rows):
        yield "positions", (positions_of(mask) + before).tolist()
        return
    yield "positions", (padded([row.positions for row in rows], side)[0] + before).tolist()
    yield "block positions", padded([row.blocks for row in rows], side)[0].tolist()


def _line(
    ask: Asked,
    done: Completion,
    codec: Codec,
    texts: list[str],
    options: Generate,
    adapter: str,
    cloze: Cloze | None = None,
) -> bytes:
    if cloze:
        fills = [codec.decode([token]) for token in done.ids]
        text = codec.decode(cloze.filled(ask.row, done.ids))
    else:
        bounds = [0, *done.ends, *([len(done.ids)] if done.ends[-1:] != [len(done.ids)] else [])]
        fills = [codec.decode(done.ids[a:b]) for a, b in pairwise(bounds)]
        text = "\n".join(fills)
    text = text[: min((at for stop in texts if (at := text.find(stop)) >= 0), default=None)]
    line: dict[str, Any] = {**ask.fields, "completion": text, "completion_ids": done.ids}
    if len(fills) > 1:
        line["fills"] = fills
    line["finish_reason"] = done.finish_reason
    if adapter:
        line["adapter"] = adapter
    if options.n > 1:
        line["sample"] = ask.sample
    if ask.reference is not None:
        line["reference"] = ask.reference
    return json_line(line)


def _count(done: Completion, summary: Summary) -> None:
    summary.completions += 1
    summary.tokens += len(done.ids)
    summary.stopped += done.finish_reason == "stop"
    if done.context_full and not done.ids:
        summary.no_room += 1
        if summary.no_room == 1:
            console.warn(f"generate: the prompt of completion {summary.completions} fills the model's context")
    elif done.context_full:
        summary.context_full += 1
        if summary.context_full == 1:
            console.note(f"generate: completion {summary.completions} filled the model's context and was ended there")


def _report(summary: Summary, cloze: Cloze | None) -> None:
    if not summary.prompts:
        console.warn("generate: the input is empty")
        return
    if cloze:
        console.note(f"generate: {summary.prompts:,} prompts, {summary.tokens:,} masks filled")
        return
    full = f", {summary.context_full:,} of them at the end of the context" if summary.context_full else ""
    full += f", {summary.no_room:,} after prompts that fill the context" if summary.no_room else ""
    cut = summary.completions - summary.stopped
    console.note(
        f"generate: {summary.prompts:,} prompts, {summary.completions:,} completions of {summary.tokens:,} tokens; "
        f"{summary.stopped:,} stopped by themselves, {cut:,} at the length limit{full}"
    )
