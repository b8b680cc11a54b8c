"""The raw shapes of training data -> Conversation: what a line of JSON means, before any template."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from sftcli.errors import DataError
from sftcli.reading import decode_json
from sftcli.rows import Extra
from sftcli.text.pretokenized import is_tokens

COMPLETION_NAMES = ("completion", "answer", "output", "response")  # fields that hold the model's own words
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")

Weight = Annotated[float, msgspec.Meta(ge=0)]
Shape = Literal["messages", "conversations", "prompt+completion", "prompt", "instruction", "text", "fields", "tokens"]


class Message(msgspec.Struct):
    """One message of the OpenAI shape, as checked; templates see the JSON object itself."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    train: bool = True
    weight: Weight = 1.0


class ShareGPT(msgspec.Struct):
    """One turn of the ShareGPT shape; MiniMind writes role and content instead."""

    sender: str | None = msgspec.field(default=None, name="from")
    value: str | None = None
    role: str | None = None
    content: str | None = None
    train: bool = True
    weight: Weight = 1.0


class Common(msgspec.Struct):
    """Fields that any record may carry."""

    id: str | int | None = None
    source: str | None = None
    weight: Weight = 1.0
    tools: list[dict[str, Any]] | None = None


@dataclass
class Conversation:
    """Messages with roles (as templates read them) and, for each, the weight of its words in the loss."""

    id: str
    messages: list[dict[str, Any]]
    weights: list[float]
    shape: Shape
    tools: list[dict[str, Any]] | None = None
    source: str | None = None
    extra: Extra = field(default_factory=dict)  # unknown fields, byte for byte
    paths: list[str] = field(default_factory=list)  # where each message stands in its line

    def path(self, message: int) -> str | None:
        """The JSON path of a message, for errors."""
        return self.paths[message] if message < len(self.paths) else None


def renamed(fields: Mapping[str, msgspec.Raw], columns: Mapping[str, str], where: str) -> dict[str, msgspec.Raw]:
    """Apply `--columns wanted=given`: the given column is known under the wanted name."""
    if not columns:
        return dict(fields)
    missing = [given for given in columns.values() if given not in fields]
    if missing:
        raise DataError(f"no column {missing[0]!r} (the line has {', '.join(fields)})", where, hint="see --columns")
    new = {wanted: fields[given] for wanted, given in columns.items()}
    return new | {name: raw for name, raw in fields.items() if name not in columns.values() and name not in new}


def shape_of(fields: Mapping[str, msgspec.Raw], wanted: tuple[str, ...], where: str) -> Shape:
    """Which raw shape a record has, by its field names. `wanted`: the fields that a text template names."""
    if wanted and all(name in fields for name in wanted):
        return "fields"
    if is_tokens(fields):
        return "tokens"
    if "messages" in fields:
        return "messages"
    if "conversations" in fields:
        return "conversations"
    if "prompt" in fields:
        return "prompt+completion" if any(name in fields for name in COMPLETION_NAMES) else "prompt"
    if "instruction" in fields:
        return "instruction"
    if "text" in fields:
        return "text"
    if wanted and any(name in fields for name in wanted):
        return "fields"  # a prompt for a text template: its completion is missing
    raise DataError(
        f"no known shape: the line has {', '.join(fields) or 'no fields'}",
        where,
        hint="name the columns, for example --columns prompt=question,completion=answer",
    )


def read_record(
    fields: Mapping[str, msgspec.Raw], where: str, number: int, wanted: tuple[str, ...] = ()
) -> Conversation:
    """One line's fields -> Conversation. `number` names records that have no id. Raises DataError with the field."""
    shape = shape_of(fields, wanted, where)
    common = Common(**{name: _get(fields, name, kind, where) for name, kind in _COMMON.items() if name in fields})
    record = _READERS[shape](fields, where) if shape != "fields" else _from_fields(fields, where, wanted)
    record.shape = shape
    record.id = str(number if common.id is None else common.id)
    record.source, record.tools = common.source, common.tools
    record.weights = [weight * common.weight for weight in record.weights]
    if math.inf in record.weights:
        raise DataError("the weights of record and message are too large together", where, "$.weight")
    consumed = _CONSUMED[shape].union(wanted) if shape == "fields" else _CONSUMED[shape]
    record.extra = {name: raw for name, raw in fields.items() if name not in consumed}
    return record


_COMMON = dict(Common.__annotations__)
_SHAPE_FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations", "system"),
    "prompt+completion": ("prompt", *COMPLETION_NAMES),
    "prompt": ("prompt",),
    "instruction": ("instruction", "input", "system", *COMPLETION_NAMES),
    "text": ("text",),
    "tokens": (),
    "fields": (),
}
_CONSUMED = {shape: frozenset((*names, *Common.__struct_fields__)) for shape, names in _SHAPE_FIELDS.items()}


def _get(fields: Mapping[str, msgspec.Raw], name: str, kind: Any, where: str) -> Any:
    """Decode one field as `kind`; an error carries the path from the top of the line."""
    try:
        return decode_json(bytes(fields[name]), where, kind)
    except DataError as error:
        inside = (error.field or "$").removeprefix("$")
        raise DataError(error.reason, where, f"$.{name}{inside}") from None


def _blank(messages: list[dict[str, Any]], paths: list[str], weights: list[float] | None = None) -> Conversation:
    weights = [1.0] * len(messages) if weights is None else weights
    return Conversation(id="", messages=messages, weights=weights, shape="messages", paths=paths)


def _messages(fields: Mapping[str, msgspec.Raw], name: str, where: str) -> Conversation:
    """A list of messages: checked, `train` and `weight` taken out, tool-call arguments made objects."""
    checked: list[Message] = _get(fields, name, list[Message], where)
    plain: list[dict[str, Any]] = msgspec.json.decode(fields[name])
    if not checked:
        raise DataError("no messages", where, f"$.{name}")
    for i, (message, given) in enumerate(zip(checked, plain, strict=True)):
        if not ROLE.fullmatch(message.role):
            raise DataError(f"role {message.role[:64]!r} is not a name", where, f"$.{name}[{i}].role")
        if message.content is None and not message.tool_calls:  # templates would write None
            raise DataError("message without content or tool_calls", where, f"$.{name}[{i}].content")
        for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if not isinstance(part.get("text"), str):  # templates would pass over an image in silence
                kind = part.get("type", "without text")
                raise DataError(f"a part that is no text ({kind})", where, f"$.{name}[{i}].content[{j}]")
        given.pop("train", None)
        given.pop("weight", None)
        for j, call in enumerate(message.tool_calls or ()):
            _arguments_as_object(given["tool_calls"][j], where, f"$.{name}[{i}].tool_calls[{j}]")
            if not isinstance(call.get("function", call), dict):
                raise DataError("expected an object", where, f"$.{name}[{i}].tool_calls[{j}].function")
    paths = [f"$.{name}[{i}]" for i in range(len(plain))]
    return _blank(plain, paths, [m.weight if m.train else 0.0 for m in checked])


def _arguments_as_object(call: dict[str, Any], where: str, path: str) -> None:
    """Tool-call arguments come as JSON text (OpenAI) or as an object; templates want the object."""
    function = call.get("function", call)
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = msgspec.json.decode(function["arguments"])
        except (msgspec.DecodeError, RecursionError):
            raise DataError("arguments are not JSON", where, f"{path}.function.arguments") from None


def _from_messages(fields: Mapping[str, msgspec.Raw], where: str) -> Conversation:
    return _messages(fields, "messages", where)


def _from_conversations(fields: Mapping[str, msgspec.Raw], where: str) -> Conversation:
    turns: list[ShareGPT] = _get(fields, "conversations", list[ShareGPT], where)
    if not turns:
        raise DataError("no messages", where, "$.conversations")
    messages = []
    for i, turn in enumerate(turns):
        role, text = turn.sender or turn.role, turn.value if turn.value is not None else turn.content
        if role is None or text is None:
            raise DataError("expected from and value", where, f"$.conversations[{i}]")
        if not ROLE.fullmatch(role):
            raise DataError(f"role {role[:64]!r} is not a name", where, f"$.conversations[{i}].from")
        messages.append({"role": SHAREGPT_ROLES.get(role, role), "content": text})
    paths = [f"$.conversations[{i}]" for i in range(len(turns))]
    record = _blank(messages, paths, [turn.weight if turn.train else 0.0 for turn in turns])
    return _with_system(record, fields, where)


def _with_system(record: Conversation, fields: Mapping[str, msgspec.Raw], where: str) -> Conversation:
    """A `system` column beside the turns becomes the first message."""
    if "system" in fields and (system := _get(fields, "system", str | None, where)):
        record.messages.insert(0, {"role": "system", "content": system})
        record.weights.insert(0, 1.0)
        record.paths.insert(0, "$.system")
    return record


def _from_prompt(fields: Mapping[str, msgspec.Raw], where: str) -> Conversation:
    """`prompt`, with or without a completion; both may be texts or lists of messages."""
    found = [name for name in COMPLETION_NAMES if name in fields]
    sides = [("prompt", "user"), *((name, "assistant") for name in found[:1])]
    record = _blank([], [])
    for name, role in sides:
        if bytes(fields[name]).lstrip().startswith(b"["):
            part = _messages(fields, name, where)
            record.messages += part.messages
            record.weights += part.weights
            record.paths += part.paths
        else:
            record.messages.append({"role": role, "content": _get(fields, name, str, where)})
            record.weights.append(1.0)
            record.paths.append(f"$.{name}")
    return record


def _from_instruction(fields: Mapping[str, msgspec.Raw], where: str) -> Conversation:
    """Alpaca: instruction, input (may be missing or empty), output. Templates may use the two parts apart."""
    instruction = _get(fields, "instruction", str, where)
    given = _get(fields, "input", str | None, where) if "input" in fields else None
    content = f"{instruction}\n\n{given}" if given else instruction
    messages = [{"role": "user", "content": content, "instruction": instruction, "input": given or ""}]
    found = [name for name in COMPLETION_NAMES if name in fields][:1]
    messages += [{"role": "assistant", "content": _get(fields, name, str, where)} for name in found]
    return _with_system(_blank(messages, [f"$.{name}" for name in ("instruction", *found)]), fields, where)


def _from_text(fields: Mapping[str, msgspec.Raw], where: str) -> Conversation:
    return _blank([{"role": "text", "content": _get(fields, "text", str, where)}], ["$.text"])


def _from_fields(fields: Mapping[str, msgspec.Raw], where: str, wanted: tuple[str, ...]) -> Conversation:
    """The columns that a text template names, in its order; the last of them is the completion."""
    present = [name for name in wanted if name in fields]
    if missing := [name for name in wanted[:-1] if name not in fields]:
        raise DataError(f"no column {missing[0]!r}, which the template text names", where)
    roles = ["assistant" if name == wanted[-1] else "user" for name in present]
    texts = [_get(fields, name, str, where) for name in present]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return _blank(messages, [f"$.{name}" for name in present])


def _from_tokens(fields: Mapping[str, msgspec.Raw], where: str) -> Conversation:
    return _blank([], [])


_READERS = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "prompt+completion": _from_prompt,
    "prompt": _from_prompt,
    "instruction": _from_instruction,
    "text": _from_text,
    "tokens": _from_tokens,
}
