"""sft chat: the answers of sft generate, streamed; commands, a full context, pipes and a real terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from conftest import TEMPLATES, chat
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_fixtures import PRESETS, empty_folder, make_model, model_folder, random_ids, read_jsonl, write_jsonl
from tokenizers import Tokenizer, decoders, models

from sftcli.errors import Exit
from sftcli.model import decoding
from sftcli.model.cache import Held, Table, prefill
from sftcli.model.decoding import Completion, Prompt, Token, decode, generate
from sftcli.recipe import Generate
from sftcli.stages import chat as stage
from sftcli.stages.chat import Chat, Model, _Text
from sftcli.stages.generate import _text_stops
from sftcli.text.folder import load_codec
from sftcli.text.tokenizer import Codec

QUESTIONS = ["How many rivers are there?", "Name one.", "Why?"]
CHAT = ("--max-new-tokens", 12)


@pytest.fixture
def folder(tmp_path):
    return model_folder(tmp_path / "m", "llama", context=256)


@pytest.fixture
def talk(sft, folder):
    """Lines in, (lines out, stderr)."""

    def talk(*lines, options=CHAT, code=0):
        result = sft("chat", folder, *options, stdin="".join(f"{line}\n" for line in lines).encode())
        assert result.code == code, result.err
        return result.out.decode().split("\n")[:-1], result.err

    return talk


def chat_of(folder, system=None, **options):
    options = Generate(**({"max_new_tokens": 12} | options))
    return Chat(Model(str(folder), options), options, system)


def said(talk, line):
    return "".join(talk.respond(line))


# ---- the same answers as sft generate


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("template", ["chatml", "llama3"])
@pytest.mark.parametrize("system", [None, "Be <|im_end|> brief."])
def test_greedy_answers_equal_sft_generate_of_the_same_messages(sft, tmp_path, preset, template, system, monkeypatch):
    fed = []
    prefill = decoding.prefill
    monkeypatch.setattr(decoding, "prefill", lambda *a: fed.extend(map(list, a[2])) or prefill(*a))
    folder = model_folder(tmp_path / "m", preset, context=512, template=template)
    talk = chat_of(folder, system)
    answers = [said(talk, question) for question in QUESTIONS]
    by_chat, fed[:] = [talk.model.prompt_ids(talk.messages(talk.exchanges)[: -2 * n - 1]) for n in (2, 1, 0)], []
    messages = talk.messages(talk.exchanges)
    assert len(messages) == 6 + bool(system)
    data = write_jsonl(tmp_path / "q.jsonl", [{"messages": messages[: len(messages) - 2 * n]} for n in (2, 1, 0)])
    lines = sft("generate", data, "-m", folder, *CHAT).rows
    assert [line["completion"] for line in lines] == answers
    assert [line["reference"] for line in lines] == answers
    assert fed == by_chat


def test_adapter_run_talks_as_sft_generate_does(sft, tmp_path, folder):
    data = write_jsonl(tmp_path / "d.jsonl", [chat("Why?", "Because.")] * 4)
    tokens, rows, run = tmp_path / "tokens.jsonl", tmp_path / "rows.jsonl", tmp_path / "run"
    assert sft("tokenize", data, "-m", folder, "-o", tokens).code == 0
    assert sft("mask", tokens, "-o", rows).code == 0
    trained = sft("train", rows, "-m", folder, "-o", run, "--adapter", "lora", "--max-steps", 2, "--lr", 0.05)
    assert trained.code == 0, trained.err
    talk = chat_of(run)
    answer = said(talk, "Why?")
    (line,) = sft("generate", data, "-m", run, *CHAT).rows[:1]
    assert answer == line["completion"] != said(chat_of(folder), "Why?")


def test_first_sampled_answer_equals_sft_generate_with_that_seed(sft, folder, talk, tmp_path):
    options = (*CHAT, "--temperature", 1, "--seed", 7, "--top-k", 40, "--top-p", 0.9)
    (answer,), _ = talk("Why?", options=options)
    data = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Why?"}])
    (line,) = sft("generate", data, "-m", folder, *options).rows
    assert answer == stage._shown(line["completion"]).replace("\n", "\\n")


def test_tokens_are_those_of_the_completions(tmp_path):
    model = make_model(tmp_path / "m", "llama")
    prompts = [Prompt(random_ids(length, length), str(length)) for length in (9, 1, 30, 64, 4, 17)]
    options, stops = Generate(max_new_tokens=14, batch_size=3), range(40)
    made, done = {}, []
    for event in decode(model, prompts, options, stops):
        if isinstance(event, Token):
            assert event.number not in [completion.number for completion in done]
            made.setdefault(event.number, []).append(event.id)
        else:
            done.append(event)
    assert done == list(generate(model, prompts, options, stops))
    assert {completion.number: completion.ids for completion in done if completion.ids} == made


# ---- a row that goes on


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sizes", [{}, {"windows": 4}, {"attention_cap": 5.0}], ids=["plain", "window", "cap"])
def test_prompt_that_goes_on_from_a_held_row_equals_one_encoded_from_nothing(tmp_path, preset, sizes):
    model = make_model(tmp_path / "m", preset)
    for block in model.blocks:
        changed = {"window": sizes.get("windows"), "cap": sizes.get("attention_cap")}
        block.attention.sight = replace(block.attention.sight, **changed)
    held, options = Held(), Generate(max_new_tokens=9)
    first = random_ids(12, 1)
    (done,) = [
        event for event in decode(model, [Prompt(first, "a")], options, (), held=held) if not isinstance(event, Token)
    ]
    assert held.ids == first + done.ids[:-1]
    whole = held.ids + random_ids(7, 2)
    for ids in (whole, whole[:5], whole[:15] + random_ids(6, 3), random_ids(4, 4), held.ids):
        expected = decode(model, [Prompt(ids, "a")], options, ())
        fed = Held(held.ids, held.keys, held.values)
        assert list(decode(model, [Prompt(ids, "a")], options, (), held=fed)) == list(expected)
        table, nothing = Table(model, "left"), Table(model, "left")
        with torch.no_grad():
            found = prefill(model, table, [ids], held)
            torch.testing.assert_close(found, prefill(model, nothing, [ids]), atol=1e-5, rtol=1e-5)
        for mine, other in zip(table.keys + table.values, nothing.keys + nothing.values, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
        assert torch.equal(table.mask, nothing.mask)


def test_next_turn_encodes_only_what_is_new(folder, monkeypatch):
    talk = chat_of(folder)
    lengths = []
    hidden = talk.model.network.hidden
    monkeypatch.setattr(talk.model.network, "hidden", lambda ids, *rest: lengths.append(len(ids)) or hidden(ids, *rest))
    said(talk, "How many rivers are there, and how long is the longest?")
    lengths.clear()
    said(talk, "Why?")
    one, two = talk.exchanges
    assert lengths[0] <= two.prompt_tokens - one.prompt_tokens  # of the answer, too, what encodes as it was said
    lengths.clear()
    assert said(talk, "/retry") == two.answer
    assert lengths[0] == 1


# ---- text as it comes


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=30))
def test_pieces_join_to_the_whole_text_and_end_with_whole_characters(chat_codec, ids):
    text = _Text(chat_codec)
    pieces = [text.add(token) for token in ids]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert "".join(pieces) + text.rest() == chat_codec.decode(ids) == text.shown


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_characters_of_many_bytes_come_whole(chat_codec, words):
    text = _Text(chat_codec)
    ids = chat_codec.tokenizer.encode(words, add_special_tokens=False).ids
    pieces = [text.add(token) for token in ids]
    if "\ufffd" not in words:
        assert "".join(pieces) == chat_codec.decode(ids) and not any("\ufffd" in piece for piece in pieces)


@pytest.fixture(scope="module")
def fallback_codec():
    """Letters are tokens; of all else each byte is one (Llama 2's way): a run of bytes is text only as a whole."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abc "]
    spelled = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    spelled.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Codec(spelled.to_str().encode(), "fallback")


@given(words=st.text("ab \n🙂中é", max_size=12))
def test_nothing_is_said_twice_where_bytes_are_tokens(fallback_codec, words):
    text = _Text(fallback_codec)
    pieces = [text.add(token) for token in fallback_codec.tokenizer.encode(words).ids]
    assert "".join(pieces) + text.rest() == words == text.shown


@given(words=st.text("ab中九一", max_size=40), stop=st.sampled_from(["中", "九一", "b中"]))
@example(words="九" * 7 + "中", stop="中")  # what is decoded first begins inside of a character
def test_a_stop_text_is_found_at_its_last_byte_where_bytes_are_tokens(fallback_codec, words, stop):
    found, ids = _text_stops(fallback_codec, [stop]), fallback_codec.tokenizer.encode(words).ids
    ends = next((n for n in range(len(ids) + 1) if found(ids[:n])), None)
    at = words.find(stop)
    expected = None if at < 0 else len(fallback_codec.tokenizer.encode(words[: at + len(stop)]).ids)
    assert ends == expected


@pytest.fixture(scope="module")
def chat_codec(model_folders):
    return load_codec(model_folders["chatml"])


def scripted(monkeypatch, folder, *texts, finish="stop"):
    """Let the model say these texts, one an answer, byte by byte; `KeyboardInterrupt` in the place of one: Ctrl-C."""
    codec = load_codec(folder)
    answers = iter(texts)

    def decode(model, prompts, options, stops, held):
        for text in next(answers):
            if text is KeyboardInterrupt:
                raise text
            yield from (Token(0, token) for token in codec.tokenizer.encode(text, add_special_tokens=False).ids)
        yield Completion(0, [], finish)

    monkeypatch.setattr(stage, "decode", decode)


def test_what_the_model_says_is_safe_for_a_terminal_and_one_line_in_a_pipe(monkeypatch, folder, talk):
    scripted(monkeypatch, folder, "a\x1b]0;title\x07\x1b[31m\u202eb", "1\n2\n\n3", "")
    lines, _ = talk("a", "b", "c")
    assert lines == ["a\\x1b]0;title\\x07\\x1b[31m\\u202eb", "1\\n2\\n\\n3", ""]


# ---- commands


def test_undo_takes_the_last_exchange_back(folder):
    talk, other = chat_of(folder), chat_of(folder)
    first = said(talk, "Why?")
    said(talk, "Name one.")
    talk.respond("/undo")
    second = said(talk, "Where?")
    assert (said(other, "Why?"), said(other, "Where?")) == (first, second)
    assert talk.messages(talk.exchanges) == other.messages(other.exchanges)
    assert said(talk, "Why?") != first  # the history counts


def test_retry_answers_with_another_stream_and_the_same_seed_tells_it_all_again(folder):
    def session():
        talk = chat_of(folder, temperature=1.0)
        answers = []
        for line in ("/seed 5", "Why?", "/retry", "/retry", "Name one.", "/undo", "Name one.", "/reset", "Why?"):
            answer = talk.respond(line)
            answers += ["".join(answer)] if answer else []
        return answers

    first = session()
    assert first == session()
    why, again, once_more, name, same_name, same_why = first
    assert len({why, again, once_more}) == 3
    assert (same_name, same_why) == (name, why)
    assert said(chat_of(folder, temperature=1.0, seed=6), "Why?") != why


def test_retry_in_greedy_mode_and_in_the_middle_keeps_the_history_before_it(folder):
    talk = chat_of(folder)
    answers = [said(talk, question) for question in QUESTIONS]
    assert said(talk, "/retry") == answers[-1]
    assert [exchange.answer for exchange in talk.exchanges] == answers


def test_system_message_comes_first_can_be_changed_and_survives_reset(folder, capsys):
    talk = chat_of(folder, "Be brief.")
    said(talk, "Why?")
    assert [m["role"] for m in talk.messages(talk.exchanges)] == ["system", "user", "assistant"]
    talk.respond("/system Be long.")
    talk.respond("/reset")
    assert talk.messages(talk.exchanges) == [{"role": "system", "content": "Be long."}]
    talk.respond("/system")
    assert talk.messages(talk.exchanges) == []


def test_tokens_says_how_full_the_context_is(folder, capsys):
    talk = chat_of(folder)
    talk.respond("/tokens")
    said(talk, "Why?")
    talk.respond("/tokens")
    empty, held, speed = capsys.readouterr().err.splitlines()
    assert empty == "0 of 256 tokens of context"
    fed = len(talk.model.prompt_ids([{"role": "user", "content": "Why?"}]))
    assert held == f"{fed + 12} of 256 tokens of context"
    assert re.fullmatch(r"last answer: 12 tokens, [\d,]+\.\d tokens/s, the first after \d+\.\d\d s", speed)


def test_temp_changes_the_answers_and_refuses_what_is_no_temperature(talk):
    lines, _ = talk("Why?", "/temp 5", "/undo", "Why?", "/temp 0", "/undo", "Why?")
    assert lines[0] == lines[2] != lines[1]
    _, err = talk("Why?", "/temp hot", code=Exit.USAGE)
    assert "<stdin>:2: temperature" in err and "'hot'" in err
    talk("/temp -1", code=Exit.USAGE)
    talk("/seed x", code=Exit.USAGE)


def test_help_names_every_command(talk):
    _, err = talk("/help")
    for command in ("system", "reset", "undo", "retry", "save", "temp", "seed", "tokens", "help", "exit"):
        assert f"/{command}" in err
    assert "Ctrl-C" in err and "Ctrl-D" in err


def test_unknown_command_is_refused_and_two_slashes_ask(talk, folder):
    _, err = talk("/foo bar", code=Exit.USAGE)
    assert "no command /foo" in err and "//foo" in err
    talker = chat_of(folder)
    said(talker, "//etc/hosts?")
    assert talker.exchanges[0].question == "/etc/hosts?"


@pytest.mark.parametrize("command", ["/undo", "/retry", "/save", "/save x.jsonl"])
def test_command_that_has_nothing_to_work_on_says_so(talk, command):
    _, err = talk(command, code=Exit.USAGE)
    assert "nothing" in err or "where" in err


# ---- saving


def test_saved_conversation_can_be_tokenized_and_trained_on(sft, talk, tmp_path, folder):
    path = tmp_path / "saved.jsonl"
    lines, _ = talk("/system Be brief.", *QUESTIONS, f"/save {path}", options=("--max-new-tokens", 3))
    (record,) = read_jsonl(path)
    assert [m["role"] for m in record["messages"]] == ["system", *["user", "assistant"] * 3]
    assert [m["content"] for m in record["messages"]][1::2] == QUESTIONS
    assert [stage._shown(m["content"]).replace("\n", "\\n") for m in record["messages"]][2::2] == lines
    (document,) = sft("tokenize", path, "-m", folder).rows
    assert sum(own for *_, own, _ in document["segments"]) == 3


def test_answers_that_did_not_end_by_themselves_are_saved_untrained(sft, monkeypatch, tmp_path, folder):
    path = tmp_path / "saved.jsonl"
    talk = chat_of(folder)
    scripted(monkeypatch, folder, ["It is."], ["It", " is", KeyboardInterrupt])
    said(talk, "Is it?")
    with pytest.raises(KeyboardInterrupt), closing(talk.respond("And now?")) as answer:
        list(answer)
    talk.respond(f"/save {path}")
    (record,) = read_jsonl(path)
    assert record["messages"][1] == {"role": "assistant", "content": "It is."}
    assert record["messages"][3] == {"role": "assistant", "content": "It is", "train": False}
    (document,) = sft("tokenize", path, "-m", folder).rows
    assert [weight for *_, own, weight in document["segments"] if own] == [1.0, 0.0]


def test_save_appends_and_a_conversation_that_went_on_replaces_its_line(tmp_path, folder):
    path = tmp_path / "saved.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "old"}]}))  # without a line end
    talk = chat_of(folder)
    for line in ("one", f"/save {path}", "two", f"/save {path}", f"/save {path}", "/reset", "one", f"/save {path}"):
        list(talk.respond(line) or ())
    asked = [[m["content"] for m in record["messages"] if m["role"] == "user"] for record in read_jsonl(path)]
    assert asked == [["old"], ["one", "two"], ["one"]]


def test_each_file_has_its_own_line_of_a_conversation(tmp_path, folder):
    one, other, talk = tmp_path / "one.jsonl", tmp_path / "other.jsonl", chat_of(folder)
    for line in ("first", f"/save {one}", "second", f"/save {other}", "third", f"/save {one}"):
        list(talk.respond(line) or ())
    assert [len(record["messages"]) for record in read_jsonl(one)] == [6]
    assert [len(record["messages"]) for record in read_jsonl(other)] == [4]


def test_a_line_that_is_too_long_is_no_question(talk, monkeypatch):
    monkeypatch.setattr("sftcli.lines.MAX_LINE_BYTES", 20)
    _, err = talk("x" * 21, code=Exit.DATA)
    assert "<stdin>:1: line longer than 20 bytes" in err


@pytest.mark.parametrize("content", [b'{"architectures": []}', b"\x00\x01binary", b'{"messages": 1', b"# Notes\n"])
def test_save_leaves_other_files_alone(talk, tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    _, err = talk("Why?", f"/save {path}", code=Exit.USAGE)
    assert "other than conversations" in err and path.read_bytes() == content
    _, err = talk("Why?", f"/save {tmp_path}/none/x.jsonl", code=Exit.WRITE)
    assert "cannot write" in err


# ---- a full context


@pytest.mark.parametrize("context", [84, 90, 96, 102, 108, 114])
def test_full_context_lets_the_oldest_whole_turns_leave_and_says_so(folder, capsys, context):
    talk = chat_of(folder, "Be brief.")
    talk.model.context = context
    asked = [f"Question {i}?" for i in range(7)]
    seen = []
    prompt_ids = talk.model.prompt_ids
    talk.model.prompt_ids = lambda messages: seen.append(messages) or prompt_ids(messages)
    for i, question in enumerate(asked):
        said(talk, question)
        fed = seen[-1]
        assert fed[0] == {"role": "system", "content": "Be brief."}
        assert [m["content"] for m in fed[1::2]] == asked[talk.left_out : i + 1]  # whole turns, the newest ones
        assert len(prompt_ids(fed)) + 12 <= context
        if talk.left_out:  # no more left than had to
            more = [*talk.messages(talk.exchanges[talk.left_out - 1 : -1]), fed[-1]]
            assert len(prompt_ids(more)) + 12 > context
    assert talk.left_out > 2
    notes = [line for line in capsys.readouterr().err.splitlines() if "context is full" in line]
    told = r"chat: the context is full: the oldest (question and its|2 questions and their) answers? are left out"
    assert re.match(told, notes[0])
    assert len(talk.exchanges) == 7  # /save and /undo still have them


def test_question_that_cannot_fit_is_refused_and_forgotten(talk):
    _, err = talk("Why?", "so long " * 300, code=Exit.DATA)
    assert "<stdin>:2: the question makes a prompt of" in err and "context has 256" in err


def test_answer_ends_where_the_context_does(tmp_path):
    folder = model_folder(tmp_path / "m", "llama", context=64)
    talk = chat_of(folder, max_new_tokens=200)
    said(talk, "Why is it so?")
    (exchange,) = talk.exchanges
    assert exchange.context_full and exchange.prompt_tokens + exchange.tokens == 64


# ---- pipes and refusals


def test_pipe_gives_a_line_for_every_question_and_notes_on_stderr(talk):
    lines, err = talk("Why?", "", "  ", "/tokens", "Name one.", "/exit", "never asked")
    assert len(lines) == 2 and "tokens of context" in err and "/help" not in err


def test_question_that_is_not_utf_8_is_refused(sft, folder):
    result = sft("chat", folder, *CHAT, stdin=b"Why?\n\xff\n")
    assert result.code == Exit.DATA and "<stdin>:2: not UTF-8" in result.err
    assert result.out.count(b"\n") == 1


def test_folder_without_weights_or_template_is_refused(sft, tmp_path, folder):
    result = sft("chat", empty_folder(tmp_path / "empty", "llama"))
    assert result.code == Exit.CHECKPOINT and "no weights yet" in result.err
    (folder / "chat_template.jinja").unlink()
    result = sft("chat", folder, stdin=b"Why?\n")
    assert result.code == Exit.USAGE and "no chat template" in result.err and "--template" in result.err
    assert sft("chat", folder, "--template", "alpaca", *CHAT, stdin=b"Why?\n").code == 0
    assert sft("chat", tmp_path / "nowhere").code == Exit.CHECKPOINT


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_built_in_template_can_hold_a_conversation(tmp_path, template):
    folder = model_folder(tmp_path / "m", "llama", context=512, template=template)
    talk = chat_of(folder)
    for question in QUESTIONS:
        said(talk, question)
    assert len(talk.exchanges) == 3


# ---- Ctrl-C


def test_interrupted_answer_stays_as_far_as_it_was_said(monkeypatch, folder):
    talk = chat_of(folder)
    scripted(
        monkeypatch, folder, ["Because", " it", KeyboardInterrupt], [KeyboardInterrupt], [KeyboardInterrupt], ["x"]
    )
    for line in ("Why?", "And?", "/retry"):  # the second and third said nothing: nothing changes
        with pytest.raises(KeyboardInterrupt), closing(talk.respond(line)) as answer:
            list(answer)
        assert [(e.question, e.answer, e.finish_reason) for e in talk.exchanges] == [("Why?", "Because it", "")]
    assert said(talk, "/retry") == "x"
    assert [(e.question, e.answer, e.finish_reason) for e in talk.exchanges] == [("Why?", "x", "stop")]


class Terminal:
    """A process on a pseudo-terminal, and what it showed."""

    def __init__(self, *command):
        master, side = pty.openpty()
        self.master, self.shown = master, ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sftcli", *map(str, command)], stdin=side, stdout=side, stderr=side,
            start_new_session=True, preexec_fn=_own_terminal, env=os.environ | {"TERM": "xterm"},
        )  # fmt: skip
        os.close(side)

    def type(self, text):
        self.shown = ""
        os.write(self.master, text.encode())

    def wait(self, pattern, seconds=60):
        """Read until the pattern is there; the match."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, self.shown
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:  # the other side is closed
                    break
        return found


def _own_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C reaches the process as a signal


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or sys.platform == "win32", reason="needs a pty")
def test_terminal_streams_and_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    folder = model_folder(tmp_path / "m", "llama", context=16384)
    (folder / "generation_config.json").write_text('{"eos_token_id": []}')  # it talks for ever
    terminal = Terminal("chat", folder, "--max-new-tokens", 16000)
    try:
        terminal.wait(r"/help for commands, Ctrl-D ends[\s\S]*> ")
        terminal.type("Why?\n")
        terminal.wait(r"Why\?[\s\S]*\n[\s\S]{40}")  # text is there long before the end
        terminal.type("\x03")
        terminal.wait(r"stopped; /retry asks again[\s\S]*> ")
        terminal.type("/tokens\n")
        held = terminal.wait(r"([\d,]+) of 16,384 tokens of context[\s\S]*> ")  # Ctrl-C now would be a second one
        assert 20 < int(held[1].replace(",", "")) < 16000
        terminal.type("half a quest")
        terminal.wait("half a quest")  # a signal before readline waits for keys is heard with the next key only
        time.sleep(0.5)
        terminal.type("\x03")
        terminal.wait(r"Ctrl-D ends[\s\S]*> ")
        terminal.type("/nothing\n")
        terminal.wait(r"no command /nothing[\s\S]*> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
