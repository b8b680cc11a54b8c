"""sft check: data, template, tokenizer and model, before a run."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftcli import artifacts, console
from sftcli.errors import CheckpointError, DataError, UsageError
from sftcli.reading import read_json
from sftcli.recipe import Tokenize
from sftcli.rows import own_turns
from sftcli.stages.common import codec_for, encode_lines, read_lines_of, template_for
from sftcli.text.records import Conversation, read_record, renamed
from sftcli.text.speaker import Rendered, Speaker
from sftcli.text.tokenizer import Codec

BATCH = 256
ASKING = {"user", "system", "developer", "tool"}  # roles that a prompt may end with
MARKS = {True: ("ok", "green"), False: ("FAIL", "bold red"), None: ("note", "yellow")}


@dataclass
class Findings:
    """What was seen in the rows; the first place of each trouble."""

    rows: int = 0
    read: int = 0
    last_roles: Counter[str] = field(default_factory=Counter)
    turns: int = 0
    longest: int = 0
    longest_at: str = ""
    too_long: int = 0
    bos_counts: Counter[int] = field(default_factory=Counter)
    ends: Counter[int] = field(default_factory=Counter)
    control_in_content: Counter[str] = field(default_factory=Counter)
    top_id: int = 0
    not_a_prefix: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def check(options: Tokenize, model: str) -> bool:
    """Print one line a check on stdout; True if none failed."""
    if not options.data:
        raise UsageError("no data", hint="sft check FILE... -m MODEL")
    folder, _ = artifacts.model_and_adapter(model)
    codec = codec_for(model, None)
    template = template_for(codec, model, options.template, options.template_text, options.columns)
    config = read_json(folder / "config.json")
    context = _whole(folder / "config.json", config, "max_position_embeddings", "n_positions", "n_ctx")
    vocabulary = _whole(folder / "config.json", config, "vocab_size") or 0
    with console.libraries_silenced():
        found = _examine(options, codec, Speaker(template, codec.ends), template.wanted, context)
    results = _judge(found, codec, vocabulary, context)
    screen = console.console(stderr=False)
    for passed, name, text in results:
        mark, style = MARKS[passed]
        screen.print(console.styled([(f"{mark:>5}  ", style), (f"{name:<18} ", "bold"), (text, "")]))
    return all(passed is not False for passed, _, _ in results)


def _whole(path: Path, config: dict[str, Any], *names: str) -> int | None:
    """The first of these keys that a config has. Raises CheckpointError where it is no positive whole number."""
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None:
        return None
    if type(config[name]) is not int or config[name] < 1:
        raise CheckpointError(f"{path}: {name} = {config[name]!r} is not a positive whole number")
    return int(config[name])


def _examine(
    options: Tokenize, codec: Codec, speaker: Speaker, wanted: tuple[str, ...], context: int | None
) -> Findings:
    found = Findings()
    batch: list[tuple[str, Conversation, list[Rendered], Rendered]] = []
    for where, _, fields, _ in read_lines_of(options.data):
        found.rows += 1
        try:
            if isinstance(fields, DataError):
                raise fields
            record = read_record(renamed(fields, options.columns, where), where, found.rows, wanted)
            if record.shape != "tokens":
                batch.append((where, record, speaker.documents(record), speaker.prompt(record)[0]))
        except DataError as error:
            _examine_batch(batch, codec, context, found)  # what is told first is the first in the file
            batch = []
            found.refused.append(str(error.located(where)))
        if len(batch) == BATCH:
            _examine_batch(batch, codec, context, found)
            batch = []
    _examine_batch(batch, codec, context, found)
    return found


def _examine_batch(
    batch: list[tuple[str, Conversation, list[Rendered], Rendered]], codec: Codec, context: int | None, found: Findings
) -> None:
    bos = codec.added.get(codec.specials.get("bos_token", ""))
    encoded = encode_lines(codec, [(where, [*texts, prompt]) for where, _, texts, prompt in batch])
    for (where, record, texts, _), result in zip(batch, encoded, strict=True):
        if isinstance(result, DataError):
            found.refused.append(str(result))
            continue
        found.read += 1
        found.last_roles.update(message["role"] for message in record.messages[-1:])
        *documents, (prompt, _) = result
        for ids, segments in documents:
            if len(ids) > found.longest:
                found.longest, found.longest_at = len(ids), where
            found.too_long += bool(context and len(ids) > context)
            found.top_id = max(found.top_id, *ids) if ids else found.top_id
            if bos is not None:
                found.bos_counts[next((i for i, token in enumerate(ids) if token != bos), len(ids))] += 1
            for turn in own_turns(segments):
                found.turns += 1
                found.ends[ids[turn.end - 1]] += turn.weight > 0
        for text in texts:
            if codec.control:
                pieces = (text.text[a:b] for a, b in text.content)
                found.control_in_content.update(m[0] for piece in pieces for m in codec.control.finditer(piece))
        answered = bool(record.messages) and record.messages[-1]["role"] == "assistant"
        if answered and documents and documents[-1][0][: len(prompt)] != prompt:
            found.not_a_prefix.append(where)


def _judge(found: Findings, codec: Codec, vocabulary: int, context: int | None) -> list[tuple[bool | None, str, str]]:
    results: list[tuple[bool | None, str, str]] = []
    refused = f"{len(found.refused):,} refused, first: {found.refused[0]}" if found.refused else "every row was read"
    results.append((not found.refused and found.rows > 0, "rows", f"{found.rows:,} rows; {refused}"))
    if not found.read:
        results.append((None, "the rest", "no row of text to look at"))
        return results
    results.append(_judge_bos(found))
    stops = {token: n for token, n in found.ends.items() if token in codec.special_ids}
    named = ", ".join(f"{codec.token_text(token)} {n:,} times" for token, n in stops.items())
    trained = bool(stops) and sum(stops.values()) > 0
    if not found.turns:
        strange = ", ".join(sorted(set(found.last_roles) - ASKING))
        told = (
            f"no turn of the model: rows end with role {strange}" if strange else "no turn of the model: prompts only"
        )
        results.append((False if strange else None, "stop token", told))
    elif trained:
        results.append((True, "stop token", f"trained: {named}, in {found.turns:,} turns"))
    else:
        results.append((False, "stop token", "no turn of the model ends with a trained stop token"))
    text = f"highest id {found.top_id}, vocabulary {vocabulary}"
    results.append((found.top_id < vocabulary, "ids", text))
    text = f"longest row {found.longest:,} tokens ({found.longest_at}), context {context or 'unknown'}"
    if found.too_long:
        text += f"; {found.too_long:,} rows are longer: `sft mask --max-length {context}` drops them"
    results.append((not found.too_long, "lengths", text))
    total = sum(found.control_in_content.values())
    common = ", ".join(f"{token} {n:,}" for token, n in found.control_in_content.most_common(3))
    results.append(
        (
            None if total else True,
            "control strings",
            f"{common} in content, encoded as plain text" if total else "none in content",
        )
    )
    bad = found.not_a_prefix
    text = (
        f"{len(bad):,} rows where it is not, first {bad[0]}"
        if bad
        else "what generate feeds begins every training text"
    )
    results.append((not bad, "prompt is prefix", text))
    return results


def _judge_bos(found: Findings) -> tuple[bool | None, str, str]:
    if not found.bos_counts:
        return True, "BOS", "the tokenizer names none"
    several = sum(n for count, n in found.bos_counts.items() if count > 1)
    none = found.bos_counts[0]
    if several:
        return False, "BOS", f"{several:,} rows begin with more than one"
    return (None if none else True), "BOS", f"{none:,} rows begin with none" if none else "each row begins with one"
