"""sft chat: talk with a model; answers appear as they come. In a pipe: a question a line in, an answer a line out."""

import sys
import time
from bisect import bisect_left
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftcli import console
from sftcli.artifacts import text_folder
from sftcli.errors import DataError, SftError, UsageError
from sftcli.lines import read_lines, refuse_too_long
from sftcli.model.adapters.peft import apply, open_model
from sftcli.model.cache import Held
from sftcli.model.checkpoint import load_trained
from sftcli.model.decoding import Token, decode
from sftcli.model.growth import Prompt
from sftcli.model.layout import laid_out
from sftcli.model.training import choose_engine
from sftcli.reading import line_fields, read_bytes
from sftcli.recipe import Generate
from sftcli.recipefile import parse
from sftcli.stages.common import codec_for, template_for
from sftcli.text.folder import stop_ids
from sftcli.text.records import Conversation
from sftcli.text.speaker import Speaker
from sftcli.text.tokenizer import Codec
from sftcli.writing import atomic_file, json_line

HELP = """\
/system TEXT  what the model is told before everything else (without TEXT: nothing)
/retry        the last question again, with another random stream (at temperature 0: the same answer)
/undo         forget the last question and its answer
/reset        forget all of them; the system message stays
/temp X       temperature; 0 takes the best token every time
/seed N       seed: the same seed and the same conversation give the same answer
/tokens       how full the context is, and how fast the last answer came
/save FILE    add this conversation to FILE, a line of JSON for sft tokenize (again: it replaces its line)
/help         this
/exit         end; Ctrl-D, too
//TEXT        a question that begins with /
Ctrl-C stops an answer: what was said stays in the conversation, and is saved as not to be trained."""
UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are no character, or not yet


@dataclass
class Exchange:
    """A question and what the model said to it."""

    question: str
    sample: int = 0  # the number of its random stream
    answer: str = ""
    finish_reason: str = ""  # stop | length; empty: it did not come to its end
    context_full: bool = False
    prompt_tokens: int = 0
    tokens: int = 0
    first_after: float = 0.0  # seconds until the first token
    seconds: float = 0.0


class Model:
    """A model that is ready to speak: tokenizer, template, weights, and the adapter that an adapter run has."""

    def __init__(self, path: str, options: Generate):
        folder, adapter = open_model(path)
        if folder.config.block_positions or folder.config.fills_masks:
            raise UsageError(f"{path} fills blanks and does not chat", hint="`sft generate` asks it")
        self.codec = codec_for(path, None, options.special_in_content)
        template = template_for(self.codec, path, options.template, options.template_text, options.columns)
        self.speaker = Speaker(template, self.codec.ends)
        self.engine = choose_engine(options.device, options.dtype)
        self.network = load_trained(folder, self.engine.dtype).to(self.engine.device)
        if adapter:
            apply(self.network, adapter)
        laid_out(self.network, 1, options.quantize)
        self.stops = stop_ids(text_folder(path)) or stop_ids(folder.path)
        config = self.network.config
        self.path, self.context, self.vocabulary = path, config.context, config.vocab_size
        if not self.stops:
            console.warn("chat: no stop token is known: every answer runs to --max-new-tokens")

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """What `sft generate` feeds for these messages."""
        conversation = Conversation("", messages, [1.0] * len(messages), "messages")
        ids = self.codec.encode([self.speaker.prompt(conversation)[0]])[0][0]
        if outside := [token for token in ids if token >= self.vocabulary]:
            raise DataError(f"the tokenizer gives id {outside[0]}, the model's vocabulary has {self.vocabulary}")
        return ids


@dataclass
class _Text:
    """The text of tokens as they come: whole characters only, no control tokens."""

    codec: Codec
    ids: list[int] = field(default_factory=list)
    shown: str = ""

    def add(self, token: int) -> str:
        """The characters that a token completes."""
        self.ids.append(token)
        text = self.codec.decode(self.ids).rstrip(UNFINISHED)
        # bytes that begin a character make some decoders take back whole ones before it, until it is whole itself
        return self._up_to(text) if text.startswith(self.shown) else ""

    def rest(self) -> str:
        """What is left at the end."""
        return self._up_to(self.codec.decode(self.ids))

    def _up_to(self, text: str) -> str:
        new, self.shown = text[len(self.shown) :], text
        return new


class Chat:
    """A conversation: its state, and what each line that a person types does to it."""

    def __init__(self, model: Model, options: Generate, system: str | None):
        self.model, self.options, self.system = model, options, system
        self.exchanges: list[Exchange] = []
        self.left_out = 0  # the oldest exchanges, for which the context has no room
        self.saved: dict[Path, bytes] = {}  # the line of this conversation in each file that it was saved to
        self.held = Held()  # of the last answer: the next prompt begins like it

    def respond(self, line: str) -> Generator[str, None, None] | None:
        """The answer to a line, in pieces; None where the line is a command. Raises EOFError where it ends the chat."""
        if line.startswith("//"):
            return self._ask(line[1:])
        if not line.startswith("/"):
            return self._ask(line)
        name, _, text = line.partition(" ")
        return self._command(name, text.strip())

    def _command(self, name: str, text: str) -> Generator[str, None, None] | None:
        match name:
            case "/retry":
                return self._retry()
            case "/undo":
                self._undo()
            case "/system":
                self.system = text or None
                _tell(f"system message: {text}" if text else "no system message")
            case "/reset":
                self.exchanges, self.left_out, self.saved = [], 0, {}
                _tell("a new conversation" + ("; the system message stays" if self.system else ""))
            case "/temp":
                self._set("temperature", text)
            case "/seed":
                self._set("seed", text)
            case "/tokens":
                _tell(self._count())
            case "/save":
                self._save(text)
            case "/help":
                _tell(HELP)
            case "/exit":
                raise EOFError
            case _:
                raise UsageError(f"no command {name}", hint=f"/help lists them; /{name} asks the model")
        return None

    def messages(self, exchanges: list[Exchange]) -> list[dict[str, Any]]:
        found = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in exchanges:
            found.append({"role": "user", "content": exchange.question})
            found.append({"role": "assistant", "content": exchange.answer})
        return found

    def _ask(self, question: str, sample: int = 0) -> Generator[str, None, None]:
        """The answer in pieces. It joins the conversation however it ends, unless nothing was said."""
        exchange = Exchange(question, sample)
        start = time.monotonic()
        try:
            ids = self._fitted(question)
            exchange.prompt_tokens = len(ids)
            prompt = Prompt(ids, str(len(self.exchanges) + 1), sample)  # its stream: as of a line of sft generate
            text = _Text(self.model.codec)
            for event in decode(self.model.network, [prompt], self.options, self.model.stops, held=self.held):
                exchange.seconds = time.monotonic() - start
                if isinstance(event, Token):
                    exchange.first_after = exchange.first_after or exchange.seconds
                    exchange.tokens += 1
                    piece = text.add(event.id)
                else:
                    exchange.finish_reason, exchange.context_full = event.finish_reason, event.context_full
                    piece = text.rest()
                exchange.answer = text.shown
                if piece:
                    yield piece
        finally:
            if exchange.answer or exchange.finish_reason:
                self.exchanges.append(exchange)

    def _fitted(self, question: str) -> list[int]:
        """The ids of the prompt; as many of the oldest exchanges are left out as leave room for an answer."""
        context = self.model.context
        room = min(self.options.max_new_tokens, context // 4)

        def ids_without(oldest: int) -> list[int]:
            asked = {"role": "user", "content": question}
            return self.model.prompt_ids([*self.messages(self.exchanges[oldest:]), asked])

        count = len(self.exchanges)
        oldest = bisect_left(range(count), True, key=lambda n: len(ids_without(n)) + room <= context)
        ids = ids_without(oldest)
        if len(ids) >= context:
            raise DataError(
                f"the question makes a prompt of {len(ids)} tokens; the model's context has {context}",
                hint="a shorter question" + (", or a shorter /system" if self.system else ""),
            )
        if oldest > self.left_out:
            console.note(f"chat: the context is full: the oldest {_exchanges(oldest)} left out from here on")
        self.left_out = oldest
        return ids

    def _retry(self) -> Generator[str, None, None]:
        if not self.exchanges:
            raise UsageError("nothing to ask again")
        return self._asked_again()

    def _asked_again(self) -> Generator[str, None, None]:
        """The last question with its next random stream; where nothing is said, the old answer stays."""
        old = self.exchanges.pop()
        count = len(self.exchanges)
        try:
            yield from self._ask(old.question, old.sample + 1)
        finally:
            if len(self.exchanges) == count:
                self.exchanges.append(old)

    def _undo(self) -> None:
        if not self.exchanges:
            raise UsageError("nothing to forget")
        _tell(f"forgotten: {self.exchanges.pop().question}")

    def _set(self, name: str, text: str) -> None:
        if text:
            self.options = parse(Generate, self.options.model_dump() | {name: text})
        _tell(f"{name} {getattr(self.options, name)}")

    def _count(self) -> str:
        if not self.exchanges:
            return f"0 of {self.model.context:,} tokens of context"
        last = self.exchanges[-1]
        left_out = f", the oldest {_exchanges(self.left_out)} left out" if self.left_out else ""
        speed = (last.tokens - 1) / max(last.seconds - last.first_after, 1e-9) if last.tokens > 1 else 0.0
        return (
            f"{last.prompt_tokens + last.tokens:,} of {self.model.context:,} tokens of context{left_out}\n"
            f"last answer: {last.tokens:,} tokens, {speed:,.1f} tokens/s, the first after {last.first_after:.2f} s"
        )

    def _save(self, file: str) -> None:
        """Add the conversation to a JSONL file, or put it in the place of its shorter self."""
        if not file:
            raise UsageError("/save where?", hint="/save chats.jsonl")
        if not self.exchanges:
            raise UsageError("nothing to save yet")
        messages = self.messages(self.exchanges)
        for exchange, message in zip(self.exchanges, messages[-2 * len(self.exchanges) + 1 :: 2], strict=True):
            if exchange.finish_reason != "stop":
                message["train"] = False  # it would teach the model to end in the middle
        path, line = Path(file).expanduser(), json_line({"messages": messages})
        before = _lines_of(path).removesuffix(self.saved.get(path.resolve(), b""))
        with atomic_file(path) as out:
            out.write(before + line)
        self.saved[path.resolve()] = line
        lines = before.count(b"\n") + 1
        _tell(f"{path} holds {lines:,} conversation{'s' if lines > 1 else ''}")


def _lines_of(path: Path) -> bytes:
    """What a file of conversations holds so far. Raises UsageError for any other file: it would be spoilt."""
    if not path.exists():
        return b""
    data = read_bytes(path)
    last = data.rstrip().rpartition(b"\n")[2]
    try:
        if last and "messages" not in line_fields(last, str(path)):
            raise DataError("no messages")
    except DataError:
        raise UsageError(f"{path} holds something other than conversations", hint="another FILE") from None
    return data if data.endswith(b"\n") or not data else data + b"\n"


def _exchanges(count: int) -> str:
    return "question and its answer are" if count == 1 else f"{count} questions and their answers are"


def _tell(text: str) -> None:
    """What a command says: on stderr, as it was asked for even where --quiet."""
    for line in text.split("\n"):
        print(console.safe(line), file=sys.stderr, flush=True)


# ---- two ways to sit before it


def chat(options: Generate, model: str, system: str | None) -> None:
    """Run the stage: a terminal's person, or the lines of a pipe."""
    loaded = Model(model, options)
    talk = Chat(loaded, options, system)
    with loaded.engine.autocast():
        if sys.stdin.isatty():
            _at_a_terminal(talk)
        else:
            _in_a_pipe(talk)


def _write(text: str) -> None:
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def _shown(text: str) -> str:
    """The model's text made harmless for a terminal; its lines stay lines."""
    return "\n".join(map(console.safe, text.split("\n")))


def _in_a_pipe(talk: Chat) -> None:
    """A line of stdin is a question or a command; a line of stdout is an answer, its line ends written as \\n."""
    for number, line, *_ in read_lines("-"):
        refuse_too_long(line, f"<stdin>:{number}")
        try:
            answer = talk.respond(line.decode().strip())
            if answer is None:
                continue
            with closing(answer):
                for piece in answer:
                    _write(_shown(piece).replace("\n", "\\n"))
            _write("\n")
        except UnicodeDecodeError:
            raise DataError("not UTF-8", f"<stdin>:{number}") from None
        except SftError as error:
            raise SftError(f"<stdin>:{number}: {error}", error.code, error.hint) from None
        except EOFError:
            return


def _at_a_terminal(talk: Chat) -> None:
    """Ask, answer, ask: nothing but /exit and the end of input ends it."""
    with suppress(ImportError):
        import readline  # from now on, input() edits lines

        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question; Python turns it off
    model, options = talk.model, talk.options
    sampled = f"temperature {options.temperature}" if options.temperature else "greedy"
    console.note(f"chat: {model.path}, context {model.context:,} tokens, {sampled}")
    console.note("/help for commands, Ctrl-D ends")
    line = hint = ""
    while True:
        try:
            if hint:  # said here, so that a second Ctrl-C finds us inside of `try`
                _write("\n")
                console.note(hint)
            line = hint = ""
            if line := _read_question():
                _answer(talk, line)
        except KeyboardInterrupt:
            hint = "stopped; /retry asks again, /undo forgets it" if line else "Ctrl-D ends"
        except EOFError:
            return
        except SftError as error:
            console.fail(str(error), error.hint)


def _read_question() -> str:
    """A line from the person, in bold. Raises EOFError at its end."""
    bold, plain = ("\x1b[1m", "\x1b[0m") if console.coloured(stderr=False) else ("", "")
    shown = sys.stdout.isatty()
    try:
        if not shown:
            print("> ", end="", file=sys.stderr, flush=True)
        _write(bold)
        line = input("> " if shown else "")
    except EOFError:
        print(file=sys.stderr)
        raise
    finally:
        _write(plain)
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()


def _answer(talk: Chat, line: str) -> None:
    answer = talk.respond(line)
    if answer is None:
        return
    with closing(answer):
        for piece in answer:
            _write(_shown(piece))
    _write("\n")
    last = talk.exchanges[-1]
    if last.context_full:
        console.note("chat: ended here: the context is full")
    elif last.finish_reason == "length":
        console.note(f"chat: ended here: --max-new-tokens {talk.options.max_new_tokens}")
    elif not last.answer:
        console.note("chat: the model ended its answer without a word")
    _write("\n")
