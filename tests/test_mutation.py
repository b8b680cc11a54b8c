"""Whatever is read may be damaged in any way: what comes out is what was asked for, or one line that says why not.

A few hundred cases run by default; `-m slow` runs ten thousand.
"""

import json
import struct
import time

import pytest
import safetensors
from chat_families import BY_NAME
from conftest import SAMPLES, run_in_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_fixtures import model_folder

from sftcli.errors import CheckpointError, SftError
from sftcli.model.checkpoint import open_folder
from sftcli.model.tensorfile import INDEX, WEIGHTS, weight_files
from sftcli.recipefile import load_recipe
from sftcli.rowfile import RowFile
from sftcli.stages.check_folder import check_folder
from sftcli.tensorheader import read_header
from sftcli.text.template import BUILT_IN, Template

SLOWEST = 5.0  # seconds of a case


def cases(few, many):
    """The same test twice: a few examples by default, many of them where marked slow."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def tried(strategy, examples, work):
    """work(drawn) raises nothing but our own errors, each of one line, and none takes long."""

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def each(drawn):
        start = time.process_time()
        try:
            work(drawn)
        except SftError as error:
            assert str(error) and "\n" not in str(error)
        assert time.process_time() - start < SLOWEST

    each()


@st.composite
def damaged(draw, originals, tokens):
    """One of some texts with pieces cut out, doubled, exchanged, or put in from `tokens` and from anywhere."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.integers(0, 12))
        piece = draw(
            st.one_of(st.sampled_from(tokens), st.binary(max_size=6), st.just(bytes(data[at : at + size]) * 2))
        )
        data[at : at + draw(st.sampled_from([0, 0, 1, size]))] = piece
    return bytes(data[: draw(st.sampled_from([len(data)] * 4 + [draw(st.integers(0, len(data)))]))])


JSON = [b"[", b"]", b"{", b"}", b",", b":", b'"', b"null", b"true", b"-1", b"1e999", b"0", b"9" * 30, b"NaN", b"\\ud800", b"\\u0000", b"\xff", b"\n", b"[" * 300, b'"role"', b'"tool_calls"', b'"content"']  # fmt: skip
LINES = b"".join((SAMPLES / "chats.jsonl").read_bytes().splitlines(keepends=True)[:3])
CALLS = b'{"tools":[{"type":"function","function":{"name":"f","parameters":{}}}],"messages":[{"role":"user","content":"q"},{"role":"assistant","tool_calls":[{"id":"1","function":{"name":"f","arguments":"{\\"a\\":1}"}}]},{"role":"tool","content":"x"}]}\n'
SHAPES = b'{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b"}]}\n{"instruction":"a","input":"b","output":"c"}\n{"text":"x"}\n{"input_ids":[5,6],"labels":[-100,6]}\n'
DOCUMENTS = b'{"id":"1","input_ids":[1,7,8,2],"segments":[[0,2,"user",false,1.0],[2,4,"assistant",true,0.5]],"tokenizer":null,"z":[1]}\n'


@cases(20, 600)
def test_damaged_lines_give_rows_or_one_line(base, examples):
    def work(content):
        for command in (["tokenize", "-", "-m", base], ["tokenize", "-", "-m", base, "--on-error", "skip"], ["mask"]):
            result = run_in_process(*command, stdin=content)
            assert result.code in (0, 2, 3) and "Traceback" not in result.err
            errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
            assert len(errors) == (result.code != 0)

    tried(damaged([LINES, CALLS, SHAPES, DOCUMENTS], JSON), examples, work)


SOURCES = [path.read_bytes() for path in sorted(BUILT_IN.glob("*.jinja"))]
SOURCES += [BY_NAME[name].source.encode() for name in ("qwen3", "llama3", "gemma3", "mistral")]
JINJA = [b"{{", b"}}", b"{%", b"%}", b"{#", b"-%}", b" for i in range(9999) ", b"endfor", b"endif", b" if ", b"|tojson", b"|join", b"messages", b".content", b"[0]", b"[-1]", b" * 9999999", b" ~ ", b" % ", b"**9", b"namespace(", b"__class__", b".split('", b"loop.index", b" set x = "]  # fmt: skip
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]  # fmt: skip


@cases(40, 3000)
def test_damaged_templates_render_or_say_why_not(examples):
    def work(source):
        template = Template(source.decode(errors="replace"), "damaged", {"bos_token": "<s>", "eos_token": "</s>"})
        assert isinstance(template.render(MESSAGES, [{"name": "f"}], True), str)

    tried(damaged(SOURCES, JINJA), examples, work)


def taken_by_us(path):
    try:
        with open(path, "rb") as file:
            return set(read_header(file, path)[0])
    except CheckpointError:
        return set()


def taken_by_the_library(path):
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return set(file.keys())
    except safetensors.SafetensorError:
        return set()


@cases(40, 3000)
def test_damaged_headers_and_indexes_are_refused_or_whole(tmp_path, examples, capsys):
    folder = model_folder(tmp_path / "m", "llama")
    whole = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, config = whole[8 : 8 + length], (folder / "config.json").read_bytes()
    entries = [name for name in json.loads(header) if name != "__metadata__"]
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(entries, "a.safetensors")}).encode()
    numbers = [b"-1", b"1", b"99999999999999999999", b"[", b"]", b"{", b"}", b",", b":", b'"', b'"F32"', b'"I64"', b"null", b"1e9", b"../a", b"data_offsets"]  # fmt: skip

    def work(drawn):
        kind, text = drawn
        (folder / "config.json").write_bytes(text if kind == "config" else config)
        (folder / WEIGHTS).unlink(missing_ok=True)
        (folder / INDEX).unlink(missing_ok=True)
        (folder / "a.safetensors").write_bytes(whole)
        if kind == "index":
            (folder / INDEX).write_bytes(text)
            weight_files(folder)
        elif kind == "header":
            size = len(text) + (text[:1] == b"{" and len(text) % 7 == 0)  # now and then of the wrong length
            (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + text + whole[8 + length :])
        else:
            (folder / WEIGHTS).write_bytes(whole)
        if kind == "header":
            assert taken_by_us(folder / WEIGHTS) <= taken_by_the_library(folder / WEIGHTS)
        check_folder(str(folder))
        capsys.readouterr()
        open_folder(folder)

    drawn = st.one_of(*(st.tuples(st.just(kind), damaged([text], numbers)) for kind, text in (("header", header), ("index", index), ("config", config))))  # fmt: skip
    tried(drawn, examples, work)


RECIPES = [path.read_bytes() for path in sorted((SAMPLES.parent.parent / "recipes").glob("*.yaml"))]
YAML = [b": ", b"- ", b"[", b"]", b"{", b"}", b"&a ", b"*a", b"<<", b"!!python/name:os.system", b"!!binary", b"|", b">", b"'", b'"', b"#", b"?", b"\t", b"\n", b"1e-4", b"2001-01-01", b".nan", b".inf", b"0x1F", b"1:30", b"null", b"%TAG", b"---\n", b"\x00", b"\xef\xbb\xbf", b"[" * 400]  # fmt: skip


@cases(60, 3000)
def test_damaged_recipes_load_or_are_refused(tmp_path, examples):
    def work(content):
        (tmp_path / "r.yaml").write_bytes(content)
        load_recipe(str(tmp_path / "r.yaml"))

    tried(damaged(RECIPES, YAML), examples, work)


@cases(40, 500)
def test_damaged_files_of_rows_are_refused_or_whole(tmp_path, base, examples):
    path = tmp_path / "rows.safetensors"
    tokens = run_in_process("tokenize", SAMPLES / "chats.jsonl", "-m", base).out
    assert run_in_process("mask", "-o", path, stdin=b"".join(tokens.splitlines(keepends=True)[:5])).code == 0
    whole = path.read_bytes()

    def work(content):
        path.write_bytes(content)
        list(RowFile(path))

    tried(damaged([whole], [b"\xff" * 8, b"-1", b"99999999999", b'"I64"', b"offsets"]), examples, work)  # fmt: skip
