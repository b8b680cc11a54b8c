"""Templates that write contents as they are need not run for each conversation: filling in is rendering."""

import copy
import time
from functools import cache
from pathlib import Path

import pytest
from conftest import chat
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcli.errors import DataError, UsageError
from sftcli.text.records import Conversation
from sftcli.text.speaker import Speaker
from sftcli.text.template import NAMES, Template, load_template
from sftcli.text.tokenizer import _pattern

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
FAMILIES = {path.stem: path.read_text() for path in (Path(__file__).parent / "chat_templates").glob("*.jinja")}
LOOP = "{% for message in messages %}"
TURNS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(st.sampled_from("ab \n<\0|0"), max_size=4)),
    min_size=1,
    max_size=5,
)


@cache
def compiled(source):
    return Template(source, "test", SPECIALS)


def speaker(source):
    """With a template of its own, so that what a test changes in it stays there; what it was compiled to is shared."""
    return Speaker(copy.copy(compiled(source)), _pattern(["</s>"]))


def both_ways(source, messages, open_turn, tools=None, fills=None):
    """What `source` makes of messages: rendered, and by filling in (or rendered, too): text and spans, or the error.
    `fills`: whether it must, or must not, have been filled in."""
    conversation = Conversation("1", messages, [1.0] * len(messages), "messages", tools)
    found = []
    for contents in (None, "as read"):
        one = speaker(source)
        if contents is None:
            one.template.contents = None
        try:
            text = one._render(conversation, len(messages), open_turn)
            found.append((str.__str__(text), getattr(text, "spans", ())))
        except DataError as error:
            found.append(str(error))
    assert fills is None or any(one.literals.values()) == fills
    return found


@cache
def built_in(name):
    return load_template(name, None, {}, SPECIALS).source


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}.jinja" for name in FAMILIES)])
@settings(max_examples=20)
@given(turns=TURNS, open_turn=st.booleans())
def test_template_filled_in_is_the_template_rendered(name, turns, open_turn):
    source = built_in(name) if name in NAMES else FAMILIES[name.removesuffix(".jinja")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rendered, filled = both_ways(source, messages, open_turn)
    assert filled == rendered


def test_templates_of_the_usual_shapes_are_filled_in():
    found = {name: compiled(source).contents for name, source in FAMILIES.items()}
    assert {name for name, how in found.items() if how == "whole"} >= {"chatml", "smollm2", "zephyr"}
    assert found["gemma3"] == "stripped"
    assert load_template("alpaca", None, {}, SPECIALS).contents == "whole"
    assert load_template(None, "Q {question} A {answer}", {"prompt": "question", "completion": "answer"}, {}).contents


HARMFUL = [
    "message.content[:3]",
    "message.content | upper",
    "message.content.upper()",
    "message.get('content') | upper",
    "message['get']('content')[:2]",
    "message.values() | join",
    "message | tojson",
    "messages | map(attribute='content') | map('upper') | join",
    "'long' if message.content | length > 3 else 'short'",
    "'same' if message.content == 'hello' else 'other'",
    "'in' if 'h' in message.content else 'out'",
    "loop.previtem.content[:1] if loop.previtem else ''",
    "loop['previtem']['content'][:1] if not loop.first else ''",
    "(loop.previtem | default(message)).content[:1]",
    "namespace(x=message.content).x[:1]",
    "[message.content][0][:1]",
    "dict(x=message.content).x[:1]",
    "(message.content, 'x') | first | upper",
    "'%s' % message.content[:1]",
    "'abc'[message.content | length:]",
    "{'hello': 'known'}[message.content]",
    "message[('con' + 'tent')] | upper",
    "(message.content ~ 'x') | trim",
    "messages[0].content[0]",
    "message.content * 2",
    "message.content or message.content[:1]",
    "message.content and 'x' or message.content[1:]",
    "raise_exception(message.content)",
    "cycler(message.content).current[:1]",
    "('<' | safe) + message.content",
    "(message.role | e) + message.content",
    "(['<'] | map('safe') | first) + message.content",
    "[message.role, 'other'] | random",
    "lipsum()",
    "messages['copy'].content",
    "(message.content if messages[7].content is string else message.content | upper)",
]


@pytest.mark.parametrize("expression", HARMFUL)
def test_what_looks_into_a_content_is_rendered_each_time(expression):
    source = LOOP + "{{ message.role }}:{{ message.content }}{{ " + expression + " }}</s>{% endfor %}"
    assert compiled(source).contents is None
    for words in ("hello", "hi", "X <") if "random" not in expression and "lipsum" not in expression else ():
        rendered, filled = both_ways(source, chat("hi", words)["messages"], False, fills=False)
        assert filled == rendered


@pytest.mark.parametrize(
    "statements",
    [
        "{% set x = message.content %}{{ x[:1] }}",
        "{% set ns = namespace(x='') %}{% set ns.x = message.content %}{{ ns.x[:1] }}",
        "{% set x, y = message.content, 1 %}{{ x[:1] }}",
        "{% for letter in message.content %}{{ letter }},{% endfor %}",
        "{% for key in message %}{{ message[key][:1] }}{% endfor %}",
        "{% macro first(text) %}{{ text[:1] }}{% endmacro %}{{ first(message.content) }}",
        "{% set x %}{{ message.content }}{% endset %}{{ x[:1] }}",
        "{% filter upper %}{{ message.content }}{% endfilter %}",
        "{% with x = message.content %}{{ x[:1] }}{% endwith %}",
        "{% set l = loop %}{{ l.previtem.content[:1] if not l.first else '' }}",
        "{% if message.content is not string %}{% else %}{% set x = message.content %}{% endif %}{{ (x or '')[:1] }}",
        "{% for x in [message] %}{{ x.content[:1] }}{% endfor %}",
        "{% for m in messages if m.content[:1] == 'h' %}h{% endfor %}",
        "{% set m = messages[loop.index0] %}{% set m2 = m %}{{ m2.content | reverse }}",
        "{% if prev is defined %}{{ prev[:1] }}{% endif %}{% set prev = message.content %}",
        "{% call(x) cycler('a').next() %}{{ message.content[:1] }}{% endcall %}",
        "{% if loop.first %}{% set c = message.content %}{% endif %}{% if c is string %}{{ c }}{% else %}"
        "{{ message.content | upper }}{% endif %}",
        "{% generation %}{% set c = message.content %}{% endgeneration %}{% if c is string %}{{ c }}{% else %}"
        "{{ message.content | upper }}{% endif %}",
        "{% if message.content is string %}{{ message.content }}{% else %}{{ message.content | upper }}{% endif %}"
        "{% set message = messages[9] %}",
    ],
)
def test_what_looks_into_a_content_through_a_name_is_rendered_each_time(statements):
    assert Template(LOOP + statements + "{% endfor %}", "test", SPECIALS).contents is None


@pytest.mark.parametrize(
    ("source", "how"),
    [
        (LOOP + "{{ message['content'] }}{% endfor %}", "whole"),
        (LOOP + "{{ '<' ~ message.content ~ '>' }}{% endfor %}", "whole"),
        (LOOP + "{{ message.content.strip() + eos_token }}{% endfor %}", "stripped"),
        (LOOP + "{% set c = message.role + message.content | trim %}{% if loop.first %}{% set c = bos_token + c %}"
         "{% endif %}{{ c }}{% endfor %}", "stripped"),
        ("{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}{% set rest = messages[1:] %}"
         "{% else %}{% set first = false %}{% set rest = messages %}{% endif %}{% for m in rest %}"
         "{% if loop.index0 == 0 and first != false %}{{ first + '\n\n' + m.content }}{% else %}{{ m.content }}"
         "{% endif %}{% endfor %}", "whole"),
        (LOOP + "{% if message.content is string %}{{ message.content }}{% else %}{% for p in message.content %}"
         "{{ p.text }}{% endfor %}{% endif %}{% endfor %}", "whole"),
        (LOOP + "{{ message.words or message.content }}{% if 'tool_calls' in message %}!{% endif %}{% endfor %}", "whole"),
    ],
)  # fmt: skip
def test_what_writes_contents_only_is_filled_in(source, how):
    assert compiled(source).contents == how
    for messages, fills in (
        ([{"role": "system", "content": "be"}, *chat("hi", "ho")["messages"]], True),
        (chat(" hi", "x ")["messages"], how == "whole"),
        (chat("hi", "")["messages"], False),
    ):
        rendered, filled = both_ways(source, messages, False, fills=fills)
        assert filled == rendered


@pytest.mark.parametrize(
    "source",
    [
        LOOP + "{{ message.content + message.content }}{% endfor %}",
        "{% for message in messages[::-1] %}{{ message.content }}{% endfor %}",
        "{{ messages[0].content }}",
        "{{ '\0000\0' }}{{ messages[0].content is string }}",
    ],
)
def test_contents_that_are_written_twice_or_in_another_order_are_rendered(source):
    assert compiled(source).contents == "whole"
    rendered, filled = both_ways(source, chat("hi", "hello")["messages"], False)
    assert filled == rendered


def test_an_empty_list_of_tools_is_not_none():
    source = "{% if tools is not none %}TOOLS{% endif %}" + LOOP + "{{ message.content }}|{% endfor %}"
    for tools in (None, []):
        rendered, filled = both_ways(source, chat("hi", "hello")["messages"], False, tools, fills=tools is None)
        assert filled == rendered


@pytest.mark.parametrize(
    "source",
    [
        "{{ message" + " | trim" * 60 + " }}",
        "{{ message.role" + ".strip()" * 60 + " }}",
        "{{ message" + "[0]" * 60 + " }}",
        "".join(f"{{% set a{i} = a{i + 1} %}}" for i in range(2000)) + "{% set a2000 = messages[0].content %}",
    ],
)
def test_a_long_template_is_read_in_no_time(source):
    begin = time.process_time()
    Template(source, "test", SPECIALS)
    assert time.process_time() - begin < 2


def test_a_template_too_deep_for_python_or_patience_is_refused_in_one_line():
    begin = time.process_time()
    with pytest.raises(UsageError, match="template test is nested too deeply"):
        Template("{{ bos_token" + " | trim" * 300 + " }}", "test", SPECIALS)
    assert time.process_time() - begin < 2.5
