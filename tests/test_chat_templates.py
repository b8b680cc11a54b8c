"""Chat templates that real families ship: ids as transformers has them, prompts as prefixes, content as text."""

import json
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from chat_families import BY_NAME, FAMILIES, TOOLS, conversation, definition
from tokenizers import AddedToken, Tokenizer, models, normalizers

from sftcli.errors import DataError
from sftcli.reading import line_fields
from sftcli.rows import own_turns
from sftcli.text import watch
from sftcli.text.records import Conversation, read_record
from sftcli.text.speaker import Rendered, Speaker
from sftcli.text.template import Template
from sftcli.text.tokenizer import Codec
from sftcli.text.traced import trace


def conversations(few, many):
    """The same test twice: of few conversations, and of many where marked slow."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def record_of(record) -> Conversation:
    return read_record(line_fields(json.dumps(record).encode(), "x:1"), "x:1", 1)


class Bench:
    """A family at work twice: here, and in transformers."""

    def __init__(self, family, made=None, source=None):
        self.family = family
        self.template = Template(source or family.source, family.name, family.specials)
        if made is None:
            texts = [
                self.template.render(r.messages, r.tools, False)
                for r in (record_of(conversation(family, i)) for i in range(1000, 1040))
            ]
            made = definition(family, texts)
        self.made = made
        self.codec = Codec(json.dumps(made).encode(), family.name, family.specials)
        self.speaker = Speaker(self.template, self.codec.ends)
        self._oracle = None

    @property
    def oracle(self):
        if self._oracle is None:
            transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
            self._oracle = transformers.PreTrainedTokenizerFast(
                tokenizer_object=self.codec.tokenizer.from_str(json.dumps(self.made)),
                chat_template=self.template.source,
                **self.family.specials,
            )
        return self._oracle

    def encode(self, rendered):
        """(ids, segments, number of merges that were cut) of one text."""
        before = self.codec.counts.merges_cut
        ((ids, segments),) = self.codec.encode([rendered])
        return ids, segments, self.codec.counts.merges_cut - before

    def expected(self, record, count, prompt=False):
        """(text, ids) of the oracle: rendered once, and encoded as `apply_chat_template` does."""
        messages, tools = record.messages[:count], record.tools
        text = self.oracle.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
        return text, self.oracle(text, add_special_tokens=False)["input_ids"]


BENCHES = {}


def bench(name):
    if name not in BENCHES:
        BENCHES[name] = Bench(BY_NAME[name])
    return BENCHES[name]


def cut_at(record, count):
    return Conversation(record.id, record.messages[:count], record.weights[:count], record.shape, record.tools)


def check(bench, record):
    """One conversation, document by document. Returns (documents, those with ids equal to the oracle's)."""
    own = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
    documents = bench.speaker.documents(record)
    whole = bench.expected(record, len(record.messages))
    rewritten = [document.text for document in documents] != [whole[0]]
    counts = [i + 1 for i in own] if rewritten else [len(record.messages)]
    turns = [[i] for i in own] if rewritten else [own]
    equal = 0
    for document, count, spoken in zip(documents, counts, turns, strict=True):
        ids, segments, merged = bench.encode(document)
        text, expected = bench.expected(record, count) if count < len(record.messages) else whole
        assert document.text == text
        assert (ids == expected) == (not merged)
        equal += ids == expected
        starts = [turn.start for turn in own_turns(segments)]
        assert len(starts) == len(spoken)
        for i, start in zip(spoken, starts, strict=True):
            prompt, _ = bench.speaker.prompt(cut_at(record, i))
            head, _, merged_before = bench.encode(prompt)
            assert ids[:start] == head
            assert merged_before or head == bench.expected(record, i, prompt=True)[1]
    return len(documents), equal


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
@conversations(40, 400)
def test_ids_equal_those_of_transformers_and_prompts_are_prefixes(name, count):
    """But for merges across the start of the model's words, which are counted."""
    total = equal = 0
    for number in range(count):
        documents, same = check(bench(name), record_of(conversation(BY_NAME[name], number)))
        total, equal = total + documents, equal + same
    assert total >= count and equal > total / 2


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1"])
@conversations(40, 400)
def test_every_document_of_a_family_that_drops_old_reasoning_is_that_of_transformers(name, count):
    records = [record_of(conversation(BY_NAME[name], number, reasoning=True)) for number in range(count)]
    made = [check(bench(name), record) for record in records]
    assert all(documents == same for documents, same in made)
    expanded = sum(documents > 1 for documents, _ in made)
    assert expanded > count / 4 if name == "qwen3" else expanded == 0  # DeepSeek's drops the reasoning of every turn


# ---- content is never control


def renamed(text, family):
    """A text whose control strings are spelled otherwise."""
    for i, token in enumerate(sorted((*family.controls, *family.tags), key=len, reverse=True)):
        text = text.replace(token, f"⟦{i:02d}⟧")
    return text


def renamed_bench(name):
    """The family as it would be had it other names for its control tokens: theirs are then words like any other."""
    family = BY_NAME[name]
    other = replace(family, **{key: renamed(getattr(family, key) or "", family) or None for key in ("bos", "eos")})
    made = json.loads(json.dumps(bench(name).made))
    for token in made["added_tokens"]:
        token["content"] = renamed(token["content"], family)
    made["model"]["vocab"] = {renamed(piece, family): i for piece, i in made["model"]["vocab"].items()}
    return Bench(other, made, renamed(family.source, family))


def with_controls(record, family, number):
    """The conversation with a control string in every text, and in the names and values of every call and tool."""
    chance = random.Random(number)
    tokens = [token for token in (*family.controls, *family.tags) if token != "</think>"]  # templates look for that one

    def put(text):
        at = chance.randint(0, len(text))
        return text[:at] + chance.choice(tokens) + text[at:]

    record = json.loads(json.dumps(record))
    for message in record["messages"]:
        message["content"] = put(message["content"]) if message["content"] else message["content"]
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = {put("x"): put("y"), "list": [put("z")]}
    for tool in record.get("tools", ()):
        tool["function"] |= {
            "description": put("wet"),
            "parameters": {"properties": {put("p"): {"enum": [put("q")], "items": {put("r"): 1}}}},
        }
    return record


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
@conversations(20, 120)
def test_control_strings_in_content_are_words(name, count):
    """Ids are those of a tokenizer and a template that call their control tokens something else."""
    ours, other = bench(name), renamed_bench(name)
    for number in range(count):
        record = record_of(with_controls(conversation(BY_NAME[name], number), BY_NAME[name], number))
        ids = [document[0] for document in ours.codec.encode(ours.speaker.documents(record))]
        assert ids == [document[0] for document in other.codec.encode(other.speaker.documents(record))], number
    assert ours.codec.counts.defused and not other.codec.counts.defused


def test_a_template_that_writes_the_tags_itself_gets_their_ids_and_content_does_not():
    ours = bench("qwen3")
    text = "one <think> and </think>"
    record = record_of({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "so"}]})
    ((ids, _),) = ours.codec.encode(ours.speaker.documents(record))
    assert [ids.count(ours.codec.added[tag]) for tag in ("<think>", "</think>")] == [1, 1]
    assert text in ours.codec.decode(ids)


@pytest.mark.parametrize("spelling", ["<THINK>", "＜think＞"])
def test_a_control_token_that_only_normalised_text_spells_is_none(spelling):
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate("<think>abs/")}, []))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.add_tokens([AddedToken("<think>", normalized=True), AddedToken("<s>", normalized=True)])
    assert tokenizer.encode("a" + spelling).ids == [7, 11]  # the library makes it one
    codec = Codec(tokenizer.to_str().encode(), "folding")
    text = Rendered(f"<s>a{spelling}b", [], [(3, 5 + len(spelling))], [])
    ((ids, _),) = codec.encode([text])
    assert (codec.decode(ids), 11 in ids, ids[0], codec.counts.defused) == ("<s> a < t h i n k > b", False, 12, 1)


# ---- what a template has no place for


def turn(role, content="words", **fields):
    return {"role": role, "content": content, **fields}


CALLED = {"type": "function", "id": "call12345", "function": {"name": "add", "arguments": {}}}
REFUSED = [
    ("gemma2", [turn("system"), turn("user"), turn("assistant")], r"System role not supported at \$.messages\[0\]"),
    ("gemma2", [turn("user"), turn("user")], r"must alternate .* at \$.messages\[1\]"),
    ("gemma3", [turn("user"), turn("assistant"), turn("tool")], r"must alternate .* at \$.messages\[2\]"),
    ("mistral", [turn("user"), turn("assistant"), turn("assistant")], r"must alternate .* at \$.messages\[2\]"),
    # Mistral's writes the system text only before a last question: what is fed would not be what was trained
    ("mistral", [turn("system", "be"), turn("user"), turn("assistant")], r"to open the model's turn is not"),
    ("mistral", [turn("user"), turn("assistant", "", tool_calls=[CALLED | {"id": "1"}])], r"nine .* \$.messages\[1\]"),
    ("llama3", [turn("user"), turn("assistant", "", tool_calls=[CALLED] * 2)], r"only one call .* at \$.messages\[1\]"),
    ("zephyr", [turn("user"), turn("tool", "result")], r"no place for role 'tool' at \$.messages\[1\]"),
    ("phi3", [turn("user"), turn("assistant", "", tool_calls=[CALLED])], r"no place for tool calls at \$.messages\[1\]"),
]  # fmt: skip


@pytest.mark.parametrize("name, messages, reason", REFUSED)
def test_what_a_template_refuses_is_named_with_its_message(name, messages, reason):
    with pytest.raises(DataError, match=f"template {name}.*{reason}"):
        bench(name).speaker.documents(record_of({"messages": messages}))


@pytest.mark.parametrize("name", ["chatml", "gemma3", "phi3", "smollm3", "zephyr", "olmo2"])
def test_tools_that_a_template_does_not_show_are_refused(name):
    record = {"tools": TOOLS, "messages": [turn("user"), turn("assistant")]}
    for call in (bench(name).speaker.documents, bench(name).speaker.prompt):
        with pytest.raises(DataError, match=rf"template {name} has no place for tools at \$.tools"):
            call(record_of(record))


# ---- what templates are made of


EXPRESSIONS = [
    "{{ tools | tojson }}{{ tools | tojson(indent=2, sort_keys=true) }}{{ tools | tojson(true, none, [',', ':']) }}",
    "{% for t in tools %}{{ t.function | string }}{{ t }}{{ '' ~ t.function.parameters }}{% endfor %}",
    "{% for k, v in tools[0].function | items %}{{ k }}={{ v }};{% endfor %}{{ messages[0].keys() | list }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
    "{{ messages[::-1] | map(attribute='content') | join('|') }}{{ messages[1:][0].content[2:-1] }}",
    "{% for m in messages %}{{ loop.previtem.content if loop.previtem }}>{{ loop.nextitem is defined }}{% endfor %}",
    "{% set ns = namespace(n=0, text='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.text = ns.text ~ m.content %}{% endfor %}{{ ns.n }}{{ ns.text }}",
    "{{ '%s:%5s|%-6s|%.2s|%d%%' % (messages[0].role, messages[0].content, 'b', messages[1].content, 3) }}",
    "{{ 'a%%' % () }}{{ '%(x)s%(y)r' % {'x': messages[0].content, 'y': messages[0].content} }}",
    "{{ messages[0].content | title }}{{ messages[0].content | indent(2) }}{{ messages[0].content | replace('o', '0') }}",
    "{{ messages[1].reasoning_content }}{{ messages[1].thinking }}{{ messages[1].reasoning }}",
    "{{ messages[0].content is string }}{{ messages[0] is mapping }}{{ messages is sequence }}{{ none }}{{ 1.5 }}{{ true }}",
    "{% generation %}{{ messages[1].content.rsplit('</think>', 1)[-1].lstrip('\\n') }}{% endgeneration %}{{ dict(a=1) }}",
    "{{ '-'.join(messages | map(attribute='content')) }}{{ '{}'.format(messages[0].content) }}{{ strftime_now('%Y') }}",
]  # fmt: skip


@pytest.mark.parametrize("source", EXPRESSIONS)
def test_a_text_is_that_of_transformers_whatever_a_template_does(source):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    messages = [turn("user", "où is\nthe “sea”?"), turn("assistant", "<think>\nhm\n</think>\n\nthere", reasoning="why")]
    ours = Template(source, "t", {})
    oracle = transformers.utils.chat_template_utils.render_jinja_template([messages], TOOLS, chat_template=source)[0][0]
    traced = [{key: trace(value, i) for key, value in message.items()} for i, message in enumerate(messages)]
    assert ours.render(messages, TOOLS, False) == ours.render(traced, trace(TOOLS, -1), False) == oracle


def test_a_template_that_never_ends_names_the_record_once(monkeypatch):
    assert watch.MAX_SECONDS == 1
    monkeypatch.setattr(watch, "MAX_SECONDS", 0.4)
    source = "{% if messages | length > 2 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    speaker = Speaker(Template(source + "{{ messages[0].content }}", "endless", {}), None)
    start = time.process_time()
    with pytest.raises(DataError, match=r"template endless failed: it ran for more than 0.4 s"):
        speaker.documents(record_of({"messages": [turn("user")] * 9}))
    assert time.process_time() - start < 0.8


def test_the_clock_of_templates_does_not_outlive_the_program():
    """Its signal kills a process whose handlers are gone, as they are at the end of Python: with a clock that
    stopped itself, with one that runs, and with that of a child."""
    program = (
        "import os, sys, time; from sftcli.text.template import Template\n"
        "def busy(now=time.process_time):\n"
        "    end = now() + 0.35\n"
        "    while now() < end: pass\n"
        "class Slow:\n"
        "    def __del__(self, busy=busy): busy()\n"
        "def render(template=Template('x', 't', {})): template.render([], None, False)\n"
        "render(); sys.modules['slow'] = Slow()\n"
    )
    for then in ("busy()", "child = os.fork(); render()\nassert not child or not os.waitpid(child, 0)[1]"):
        assert subprocess.run([sys.executable, "-c", program + then], timeout=60).returncode == 0
