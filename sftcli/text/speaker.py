"""Whose words are where: conversations -> text with segments, the model's own words marked.

The model's words of a turn begin exactly where the text that `sft generate` feeds for it ends (the same conversation
up to that turn, rendered with add_generation_prompt), and end with the end-of-turn token that stops it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sftcli.errors import DataError
from sftcli.rows import REASONING as REASONING_ROLE
from sftcli.text.records import Conversation
from sftcli.text.template import Template, TooSlow
from sftcli.text.traced import REASONING, Traced, trace

MAX_LITERALS = 1024  # sequences of roles whose literals are kept
OWN_ROLE = "assistant"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # of a message, as templates and servers name it
CLOSING_TAG = re.compile(r"</[A-Za-z_]+>")
OPENING, CLOSING = "<think>", "</think>"  # around reasoning that stands in the content
SCAFFOLD = "template"  # the role of text that no message holds: headers, separators

TextSegment = tuple[int, int, str, bool, float]  # characters start..end, role, own, weight


@dataclass
class Rendered:
    """A rendered conversation. Segments cover the text; `content`: the characters that came out of messages;
    `cuts`: where turns of the model begin - the text is encoded apart on both sides, as it will be generated."""

    text: str
    segments: list[TextSegment]
    content: list[tuple[int, int]]
    cuts: list[int]


@dataclass
class _Turn:
    """One turn of the model inside its own rendering: `text[:end]` is everything up to its end-of-turn token."""

    message: int
    start: int
    text: str
    end: int
    reasoned: int  # behind what closes its reasoning; `start` where it has none


class Speaker:
    """Renders conversations and finds the model's own words. `ends`: matches the tokenizer's special tokens."""

    def __init__(self, template: Template, ends: re.Pattern[str] | None):
        self.template, self.ends = template, ends
        self.literals: dict[tuple[tuple[str, ...], bool], list[str] | None] = {}

    def documents(self, conversation: Conversation) -> list[Rendered]:
        """The conversation as trained: one text, or one a turn where the template rewrites history."""
        if conversation.shape == "text":
            return [self._plain_text(conversation)]
        conversation = self._readable(conversation)
        own = [i for i, message in enumerate(conversation.messages) if message["role"] == OWN_ROLE]
        whole = self._render(conversation, len(conversation.messages), False)
        last = own[-1] if own and own[-1] == len(conversation.messages) - 1 else None
        turns = [self._turn(conversation, i, whole if i == last else None) for i in own]
        if len(_spoken(turns, whole)) == len(turns):
            return [self._described(conversation, whole, len(conversation.messages), turns, turns)]
        return [
            self._described(conversation, turn.text, turn.message + 1, _spoken(turns, turn.text), [turn])
            for turn in turns
        ]

    def prompt(self, conversation: Conversation) -> tuple[Rendered, str | None]:
        """The text to feed, and the last turn of the model if the conversation ends with one (its reference)."""
        if conversation.shape == "text":
            text = conversation.messages[0]["content"]
            return Rendered(text, [], [(0, len(text))], []), None
        conversation = self._readable(conversation)
        messages, reference = conversation.messages, None
        answered = bool(messages) and messages[-1]["role"] == OWN_ROLE
        count = len(messages) - answered
        text = self._render(conversation, count, True)
        if answered:
            reference = self._reference(conversation, count, text)
        own = [i for i in range(count) if messages[i]["role"] == OWN_ROLE]
        turns = [self._turn(conversation, i, None) for i in own]
        return self._described(conversation, text, count, _spoken(turns, text), []), reference

    def _readable(self, conversation: Conversation) -> Conversation:
        messages = self.template.readable(conversation.messages, conversation.tools)
        return conversation if messages is conversation.messages else replace(conversation, messages=messages)

    def _reference(self, conversation: Conversation, i: int, prompt: str) -> str:
        """The words of the last turn: its content, or what the template writes for calls."""
        content = conversation.messages[i].get("content")
        if isinstance(content, str) and not conversation.messages[i].get("tool_calls"):
            spoken = self._render(conversation, i + 1, False, traced=False)
            self._refuse_other_opening(conversation, i, spoken, prompt)
            return content
        turn = self._turn(conversation, i, None)
        words = str.__str__(turn.text[turn.start : turn.end])
        return re.sub(f"(?:{self.ends.pattern})+$", "", words) if self.ends else words

    def _plain_text(self, conversation: Conversation) -> Rendered:
        """The `text` shape goes past the template: everything is trained, and it ends with the end token."""
        text = conversation.messages[0]["content"]
        whole = text + self.template.specials.get("eos_token", "")
        return Rendered(whole, [(0, len(whole), "text", True, conversation.weights[0])], [(0, len(text))], [])

    def _render(self, conversation: Conversation, count: int, open_turn: bool, traced: bool = True) -> str:
        messages, tools = conversation.messages[:count], conversation.tools
        try:
            if literals := self._literals(messages, tools, open_turn):
                return _filled(messages, literals)
            if traced:
                messages = [
                    {
                        key: value if key == "role" else trace(value, _traced_to(key, i))
                        for key, value in message.items()
                    }
                    for i, message in enumerate(messages)
                ]
                tools = trace(tools, -1)
            return self.template.render(messages, tools, open_turn)
        except DataError as error:
            if count > 1 and not isinstance(error, TooSlow):  # name the first message that the template cannot take
                for shorter in range(1, count):
                    try:
                        self.template.render(messages[:shorter], conversation.tools, False)
                    except DataError:
                        count = shorter
                        break
            raise DataError(error.reason, None, conversation.path(max(count - 1, 0))) from None

    def _literals(self, messages: list[dict[str, Any]], tools: Any, open_turn: bool) -> list[str] | None:
        """What the template writes before, between and after the contents of such messages, where it writes them as
        they are: then it need not run for each conversation."""
        if tools is not None or not self.template.contents:
            return None
        for message in messages:
            content = message.get("content")
            if len(message) != 2 or not isinstance(content, str) or not content:
                return None
            if self.template.contents == "stripped" and (content[0].isspace() or content[-1].isspace()):
                return None
        key = (tuple([message["role"] for message in messages]), open_turn)
        if key not in self.literals:
            if len(self.literals) >= MAX_LITERALS:
                self.literals.clear()
            self.literals[key] = self._between_contents(*key)
        return self.literals[key]

    def _between_contents(self, roles: tuple[str, ...], open_turn: bool) -> list[str] | None:
        """The texts around the contents of these roles; None if a content is not written once, in its turn."""
        marks = [f"\0{i}\0" for i in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        text = self.template.render(messages, None, open_turn)
        found = re.split("(\0[0-9]+\0)", text)
        return found[::2] if found[1::2] == marks and "\0" not in "".join(found[::2]) else None

    def _turn(self, conversation: Conversation, i: int, whole: str | None) -> _Turn:
        """Where the words of message i begin and end, in the conversation rendered up to and including it."""
        prompt = self._render(conversation, i, True, traced=False)
        text = whole if whole is not None else self._render(conversation, i + 1, False)
        self._refuse_other_opening(conversation, i, text, prompt)
        start = len(prompt)
        said = _said(text, i, start)
        end = self._turn_end(conversation, i, text, said)
        return _Turn(i, start, text, end, self._reasoned(text, i, start, end))

    def _reasoned(self, text: str, i: int, start: int, end: int) -> int:
        """Behind what closes the reasoning of message i, whose turn is text[start:end]: a fact of rendering where the
        message names it, else what stands between <think> tags at the beginning of the turn."""
        spans, plain = getattr(text, "spans", ()), str.__str__(text)
        named = [b for a, b, m in spans if m == i + REASONING and a >= start and plain[a:b].strip()]
        if not named:
            return _tagged(plain, start, end)
        said = max(named)
        if any(start <= a < said for a, _, m in spans if m == i):
            return start  # content comes first: there is no reasoning that the rest follows
        limit = min((a for a, _, m in spans if m == i and a >= said), default=end)
        closings = [pattern.search(plain, said, limit) for pattern in (self.ends, CLOSING_TAG) if pattern]
        return min((found.span() for found in closings if found), default=(limit, limit))[1]

    def _refuse_other_opening(self, conversation: Conversation, i: int, text: str, prompt: str) -> None:
        """What is trained must begin as what will be fed."""
        if not text.startswith(prompt):
            raise DataError(
                f"template {self.template.name}: what it writes to open the model's turn is not how it writes the turn",
                None,
                conversation.path(i),
                hint="the turn lacks something the template opens with (reasoning, for example), or use --template",
            )

    def _turn_end(self, conversation: Conversation, i: int, text: str, said: int) -> int:
        """After the special token behind the words of message i; without one, the end of the text.

        Of several, those count that stay where the conversation goes on (Phi 3 closes the last turn alone with
        another): eos among them, else the first, of a turn that calls the last (marks of calls may be special, too)."""
        found = list(self.ends.finditer(text, said)) if self.ends else []
        if len(found) < 2:
            return found[0].end() if found else len(text)
        kept = self._kept(conversation, i, text, said)
        staying = [match for match in found if match.end() <= kept]
        eos = self.template.specials.get("eos_token")
        likely = staying[-1] if staying and conversation.messages[i].get("tool_calls") else found[0]
        return next((match for match in staying or found if match[0] == eos), likely).end()

    def _kept(self, conversation: Conversation, i: int, text: str, said: int) -> int:
        """Up to where the text of messages 0..i, whose last words end at `said`, stays behind them where another
        message follows; 0 where none can."""
        called = bool(conversation.messages[i].get("tool_calls"))
        following = {"role": "tool" if called else "user", "content": "-"}
        longer = replace(conversation, messages=[*conversation.messages[: i + 1], following])
        try:
            more = self._render(longer, i + 2, False)
        except DataError:
            return 0
        behind, there = str.__str__(text)[said:], str.__str__(more)[_said(more, i, 0) or said :]
        while not there.startswith(behind):
            behind = behind[:-1]
        return said + len(behind)

    def _described(
        self, conversation: Conversation, text: str, count: int, cuts: list[_Turn], own: list[_Turn]
    ) -> Rendered:
        """Segments of the text of the first `count` messages. `cuts`: turns that stand in it as spoken; `own`: those
        that it trains."""
        spans = [(a, b, m % REASONING if m >= 0 else m) for a, b, m in getattr(text, "spans", ())]
        self._refuse_lost_messages(conversation, text, count, {message for _, _, message in spans})
        pieces = [
            (a, b, conversation.messages[m]["role"] if m >= 0 else SCAFFOLD, conversation.weights[m] if m >= 0 else 1.0)
            for a, b, m in spans
        ]
        mine = [
            (t.start, t.reasoned if t in own else t.start, t.end, conversation.weights[t.message], t in own)
            for t in cuts
        ]
        content = [(a, b) for a, b, _ in spans]
        return Rendered(str.__str__(text), _segments(len(text), pieces, mine), content, [turn.start for turn in cuts])

    def _refuse_lost_messages(self, conversation: Conversation, text: str, count: int, shown: set[int]) -> None:
        """A template that leaves a message out trains on half a conversation; one that writes it in a way that is not
        followed lets its control strings through."""
        for i, message in enumerate(conversation.messages[:count]):
            content = message.get("content")
            words = content.strip() if isinstance(content, str) else ""
            if len(message) > 2 and any(name not in text for name in _called(message)):
                reason = "has no place for tool calls"
            elif i in shown or not words:
                continue
            elif words not in text:
                reason = f"has no place for role {message['role']!r}"
            elif self.ends and self.ends.search(words):
                reason = "hides which words are the message's, and it has control tokens in them"
            else:
                continue
            raise DataError(f"template {self.template.name} {reason}", None, conversation.path(i))
        if any(name not in text for name in _named(conversation.tools)):
            hint = "leave `tools` out of the data, or use --template"
            raise DataError(f"template {self.template.name} has no place for tools", None, "$.tools", hint)


def _said(text: str, i: int, start: int) -> int:
    """Behind the last character that comes out of message i; `start` where none does behind it."""
    return max((b for _, b, m in getattr(text, "spans", ()) if m % REASONING == i and b > start), default=start)


def _filled(messages: list[dict[str, Any]], literals: list[str]) -> Traced:
    """Contents put between the literals of their roles."""
    pieces, spans, at = [literals[0]], [], len(literals[0])
    for i, (message, literal) in enumerate(zip(messages, literals[1:], strict=True)):
        content = message["content"]
        spans.append((at, at + len(content), i))
        pieces += (content, literal)
        at += len(content) + len(literal)
    return Traced("".join(pieces), tuple(spans))


def _traced_to(field: str, message: int) -> int:
    return message + REASONING if field in REASONING_FIELDS else message


def _tagged(text: str, start: int, end: int) -> int:
    """Behind the closing tag of reasoning at the beginning of text[start:end]; `start` where there is none or it is
    blank. The opening tag may stand in the prompt."""
    begin = start + len(text[start:end]) - len(text[start:end].lstrip())
    if text.startswith(OPENING, begin, end):
        begin += len(OPENING)
    elif not text[max(start - 40, 0) : start].rstrip().endswith(OPENING):
        return start
    close = text.find(CLOSING, begin, end)
    return close + len(CLOSING) if close >= 0 and text[begin:close].strip() else start


def _called(message: Mapping[str, Any]) -> list[str]:
    """Names of the functions that a message calls."""
    return _named(message.get("tool_calls"))


def _named(calls_or_tools: list[dict[str, Any]] | None) -> list[str]:
    functions = [item.get("function", item) for item in calls_or_tools or ()]
    return [
        function["name"]
        for function in functions
        if isinstance(function, dict) and isinstance(function.get("name"), str)
    ]


def _spoken(turns: list[_Turn], text: str) -> list[_Turn]:
    """The turns that stand in a text as they were spoken."""

    def begins_alike(turn: _Turn) -> bool:
        return text.startswith(str.__getitem__(turn.text, slice(turn.end)))  # a slice that need not be traced

    return [turn for turn in turns if turn.text is text or begins_alike(turn)]


def _segments(
    length: int, pieces: list[tuple[int, int, str, float]], mine: list[tuple[int, int, int, float, bool]]
) -> list[TextSegment]:
    """Cover 0..length: the model's turns first, then message content, the rest is scaffold."""
    found: list[TextSegment] = []

    def add(start: int, end: int, role: str, own: bool, weight: float) -> None:
        if start >= end:
            return
        if found and found[-1][2:] == (role, own, weight) and not own:
            found[-1] = (found[-1][0], end, role, own, weight)
        else:
            found.append((start, end, role, own, weight))

    def add_others(start: int, end: int) -> None:
        at = start
        for a, b, role, weight in pieces:
            if b > start and a < end:
                add(at, max(a, start), SCAFFOLD, False, 1.0)
                add(max(a, start), min(b, end), role, False, weight)
                at = min(b, end)
        add(at, end, SCAFFOLD, False, 1.0)

    at = 0
    for start, reasoned, end, weight, own in mine:
        add_others(at, start)
        add(start, reasoned, REASONING_ROLE, own, weight)
        add(reasoned, end, OWN_ROLE, own, weight)
        at = end
    add_others(at, length)
    return found
