"""Templates: whose words are where, checked against lists written by hand; and what a template may not do."""

import datetime
import json
import subprocess
import sys
import time

import pytest
from conftest import ROOT, chat

from sftcli.errors import DataError, UsageError
from sftcli.reading import line_fields
from sftcli.text.records import Conversation, read_record
from sftcli.text.speaker import Speaker
from sftcli.text.template import Template, control_tokens, load_template
from sftcli.text.tokenizer import _pattern

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
ENDS = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>", "<eos>")


def record_of(record) -> Conversation:
    return read_record(line_fields(json.dumps(record).encode(), "x:1"), "x:1", 1)


def speaker_of(template: str, specials=None) -> Speaker:
    """A speaker of a built-in template (by name) or of a Jinja text."""
    specials = SPECIALS if specials is None else specials
    built_in = template.isalnum()
    found = load_template(template, None, {}, specials) if built_in else Template(template, "test", specials)
    return Speaker(found, _pattern(ENDS))


def pieces(rendered):
    """(text, role) of each segment; the model's own words in capitals: ROLE."""
    found = [(rendered.text[a:b], role.upper() if own else role) for a, b, role, own, _ in rendered.segments]
    assert "".join(text for text, _ in found) == rendered.text
    return found


def documents(template, record, specials=None):
    return [pieces(document) for document in speaker_of(template, specials).documents(record_of(record))]


def only(template, record, specials=None):
    (found,) = documents(template, record, specials)
    return found


# ---- the built-in templates


def test_chatml_turns():
    assert only("chatml", chat("hi", "hello", "bye", "ciao")) == [
        ("<|im_start|>user\n", "template"),
        ("hi", "user"),
        ("<|im_end|>\n<|im_start|>assistant\n", "template"),
        ("hello<|im_end|>", "ASSISTANT"),
        ("\n<|im_start|>user\n", "template"),
        ("bye", "user"),
        ("<|im_end|>\n<|im_start|>assistant\n", "template"),
        ("ciao<|im_end|>", "ASSISTANT"),
        ("\n", "template"),
    ]


def test_llama3_turns_with_system():
    record = chat("hi", "hello")
    record["messages"].insert(0, {"role": "system", "content": " Be brief. "})
    assert only("llama3", record) == [
        ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", "template"),
        ("Be brief.", "system"),
        ("<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n", "template"),
        ("hi", "user"),
        ("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "template"),
        ("hello<|eot_id|>", "ASSISTANT"),
    ]


def test_alpaca_with_and_without_input():
    assert only("alpaca", {"instruction": "Translate.", "input": "school", "output": "école"}) == [
        ("<s>### Instruction:\n", "template"),
        ("Translate.", "user"),
        ("\n\n### Input:\n", "template"),
        ("school", "user"),
        ("\n\n### Response:\n", "template"),
        ("école</s>", "ASSISTANT"),
    ]
    assert only("alpaca", {"instruction": "Sing.", "input": "", "output": "La"}) == [
        ("<s>### Instruction:\n", "template"),
        ("Sing.", "user"),
        ("\n\n### Response:\n", "template"),
        ("La</s>", "ASSISTANT"),
    ]


def test_plain_writes_what_its_text_says():
    template = load_template("plain", None, {}, {})
    record = read_record(line_fields(b'{"prompt": "2+2?", "completion": "4"}', "x:1"), "x:1", 1, template.wanted)
    (found,) = Speaker(template, _pattern(ENDS)).documents(record)
    assert pieces(found) == [
        ("<bos>", "template"),
        ("2+2?", "user"),
        ("<sep>", "template"),
        ("4<eos>", "ASSISTANT"),
    ]


@pytest.mark.parametrize(
    "text, fields, expected",
    [
        ("{question} {answer}", {"question": "q", "answer": "a"}, [("q", "user"), (" ", "template"), ("a", "ASSISTANT")]),
        ("{completion}", {"completion": "a"}, [("a", "ASSISTANT")]),
        ("<s>{completion}</s>", {"completion": "a"}, [("<s>", "template"), ("a</s>", "ASSISTANT")]),
        (
            "Q \"{a}\" {{'%}} {#b#} é🙂 {b}\n\\n{output}|",
            {"a": "1", "b": "2", "output": "3"},
            [
                ('Q "', "template"),
                ("1", "user"),
                ("\" {{'%}} {#b#} é🙂 ", "template"),
                ("2", "user"),
                ("\n\\n", "template"),
                ("3|", "ASSISTANT"),
            ],
        ),
    ],
)  # fmt: skip
def test_text_templates_say_what_they_show(text, fields, expected):
    template = load_template(None, text, {}, {})
    record = read_record(line_fields(json.dumps(fields).encode(), "x:1"), "x:1", 1, template.wanted)
    (found,) = Speaker(template, _pattern(ENDS)).documents(record)
    assert pieces(found) == expected
    assert Template(template.source, "again", {}).wanted == template.wanted  # a model folder keeps only the source


def test_a_text_template_whose_last_field_is_no_completion_is_a_usage_error():
    with pytest.raises(UsageError, match="must end with the completion field"):
        load_template(None, "{question} {reply}", {}, {})
    assert load_template(None, "{question} {reply}", {"completion": "reply"}, {}).wanted == ("question", "completion")


def test_a_text_template_refuses_turns_out_of_order():
    template = load_template(None, "{question}: {answer}", {}, {})
    with pytest.raises(DataError, match="a text template of 1 prompt field"):
        Speaker(template, None).documents(record_of(chat("q", "a", "q", "a") | {"messages": chat("q")["messages"] * 2}))


def test_the_text_shape_goes_past_the_template_and_ends_with_the_end_token():
    assert only("chatml", {"text": "Once"}) == [("Once</s>", "TEXT")]


TOOLS = [{"type": "function", "function": {"name": "weather", "description": 'Is it "wet"?', "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def test_tools_calls_and_results_have_their_roles():
    record = {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "yes"},
            {"role": "assistant", "content": "It rains."},
        ],
    }
    found = only("chatml", record)
    words = [piece for piece in found if piece[1] != "template"]
    assert words == [
        ("Rain?", "user"),
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>', "ASSISTANT"),
        ("yes", "tool"),
        ("It rains.<|im_end|>", "ASSISTANT"),
    ]
    assert json.dumps(TOOLS[0]) in found[0][0]  # as transformers' tojson writes it, quotes and all


def test_tool_definitions_are_content_whose_control_strings_are_defused():
    rendered = speaker_of("chatml").documents(record_of({"tools": TOOLS, **chat("q", "a")}))[0]
    definition = json.dumps(TOOLS[0])
    at = rendered.text.index(definition)
    assert (at, at + len(definition)) in rendered.content


# ---- any Hugging Face template

LOOP = "{% for message in messages %}"


def chatml_with(expression):
    """ChatML whose message content is written by an expression."""
    return (
        LOOP + "<|im_start|>{{ message.role }}\n{{ " + expression + " }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.mark.parametrize(
    "expression",
    [
        "message.content",
        "message['content'] | trim",
        "message.content.strip()",
        "message.content.split('</think>')[-1].lstrip()",
        "message.content[0:]",
        "'' ~ message.content ~ ''",
        "('' + message.content) | string",
        "[message.content] | join('')",
        "message.content.replace('zz', 'y')",
        "message.content.split('zz') | join('zz')",
        "message.content | replace('zz', 'y')",
        "namespace(x=message.content).x",
        "message.content * 1",
        "message.content.partition('!')[0]",
        "message.content | list | join",
        "'%s' % message.content",
        "'%s%%s' % '' % message.content",
        "'%(words)s' % {'words': message.content}",
        "'%s' | format(message.content)",
        "''.join([message.content])",
        "'$'.replace('$', message.content)",
        "message.content | safe",
        "message.content or ''",
        "(messages | map(attribute='content') | list)[loop.index0]",
    ],
)
def test_words_keep_their_trace_through_what_templates_do(expression):
    record = chat("hello", "yellow", "hollow", "lily")
    assert only(chatml_with(expression), record) == only("chatml", record)


def test_macros_set_blocks_and_filter_blocks_keep_the_trace():
    source = (
        "{% macro turn(role, text) %}<|im_start|>{{ role }}\n{{ text }}<|im_end|>\n{% endmacro %}"
        + LOOP
        + "{% set words %}{{ message.content }}{% endset %}"
        "{% filter trim %}  {{ turn(message.role, words) }}{% endfilter %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert only(source, chat("hi", "hello")) == only("chatml", chat("hi", "hello"))


def test_content_in_parts_is_read():
    record = chat("hi", "hello")
    record["messages"][0]["content"] = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert only("chatml", record) == only("chatml", chat("hi", "hello"))


READS_TEXT = [
    "message.content",
    "message.content | trim",
    "'' ~ message.content",
    "'' + message.content",
    "message.content.strip()",
]


@pytest.mark.parametrize("expression", [*READS_TEXT, "'\"type\"' + message.content", "message.content | tojson"])
def test_parts_are_lines_of_a_text_where_the_template_reads_no_parts(expression):
    source, lines, record = chatml_with(expression), chat("h\ni", "hello"), chat("h", "hello")
    record["messages"][0]["content"] = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    record["messages"][1]["content"] = [{"type": "text", "text": "hello"}]
    speaker = speaker_of(source)
    assert speaker.documents(record_of(record)) == speaker.documents(record_of(lines))
    assert speaker.prompt(record_of(record)) == speaker.prompt(record_of(lines))
    assert "{" not in speaker.documents(record_of(record))[0].text


@pytest.mark.parametrize("expression", ["message.content", "message.content | string"])
def test_no_parts_are_no_text(expression):
    record, empty = chat("q", "a"), chat("q", "")
    record["messages"][1]["content"] = []
    assert only(chatml_with(expression), record) == only(chatml_with(expression), empty)


FIRST_PART = "message.content if message.content is string else message.content[0].text"
OF_USERS = "message.content if message.content is string else (message.content | map(attribute='text') | join if message.role == 'user' else message.content | trim)"


@pytest.mark.parametrize("expression", [FIRST_PART, OF_USERS])
def test_parts_that_a_template_writes_in_some_messages_only_are_lost_nowhere(expression):
    record, lines = chat("q", "a", "q2", "a2"), chat("q", "hello\nyou", "q2", "a2")
    record["messages"][1]["content"] = [{"type": "text", "text": "hello"}, {"type": "text", "text": "you"}]
    assert only(chatml_with(expression), record) == only("chatml", lines)


def test_reasoning_in_parts_that_a_template_strips_later_is_no_error():
    text = (
        "{% set c = message.content if message.content is string else message.content | map(attribute='text') | join %}"
    )
    source = LOOP + text + "<|im_start|>{{ message.role }}\n"
    source += "{{ c if message.role == 'user' or loop.last else c.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    source += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    record, plain = chat("q", "", "q2", "a2"), chat("q", "<think>abc</think>answer", "q2", "a2")
    record["messages"][1]["content"] = [{"type": "text", "text": t} for t in ("<think>abc</think>", "answer")]
    found = speaker_of(source).documents(record_of(record))
    assert [d.text for d in found] == [d.text for d in speaker_of(source).documents(record_of(plain))]
    assert len(found) == 2


def test_a_template_that_reads_parts_alone_gets_them():
    one = "{% for part in message.content %}{{ part.text }}{% endfor %}"
    source = LOOP + "<|im_start|>{{ message.role }}\n" + one + "<|im_end|>\n{% endfor %}"
    source += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    record = {
        "messages": [
            {"role": r, "content": [{"type": "text", "text": t}]} for r, t in (("user", "hi"), ("assistant", "hello"))
        ]
    }
    assert only(source, record) == only("chatml", chat("hi", "hello"))


def test_generation_blocks_change_no_text():
    source = (
        LOOP + "<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert only(source, chat("hi", "hello")) == only("chatml", chat("hi", "hello"))


def test_loop_controls_work():
    source = (
        LOOP + "{% if loop.index > 2 %}{% break %}{% endif %}{% if message.role == 'user' %}{{ message.content }}:"
        "{% continue %}{% endif %}{{ message.content }}</s>{% endfor %}"
    )
    assert only(source, chat("hi", "hello")) == [("hi", "user"), (":", "template"), ("hello</s>", "ASSISTANT")]


def test_raise_exception_names_the_message():
    source = LOOP + "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}x{% endfor %}"
    record = {"messages": [*chat("q", "a")["messages"], {"role": "tool", "content": "t"}]}
    with pytest.raises(DataError, match=r"template test refused it: no tools here at \$\.messages\[2\]"):
        speaker_of(source).documents(record_of(record))
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "tool", "value": "t"}]}
    with pytest.raises(DataError, match=r"at \$\.conversations\[1\]"):
        speaker_of(source).documents(record_of(sharegpt))


@pytest.mark.parametrize("name", ["chatml", "llama3", "alpaca"])
def test_a_role_that_a_template_does_not_know_is_an_error(name):
    record = {"messages": [*chat("q")["messages"], {"role": "narrator", "content": "then"}]}
    with pytest.raises(DataError, match=rf"{name} has no role narrator at \$\.messages\[1\]"):
        speaker_of(name).documents(record_of(record))


def test_strftime_now_is_one_moment_for_the_prompt_and_its_training_text():
    source = "{{ strftime_now('%Y %H:%M:%S.%f') }}|" + chatml_with("message.content")
    speaker = speaker_of(source)
    record = record_of(chat("hi", "hello"))
    (document,) = speaker.documents(record)
    prompt, _ = speaker.prompt(record)
    assert document.text.startswith(prompt.text)
    assert document.text.startswith(datetime.datetime.now().strftime("%Y"))


def test_tojson_is_that_of_transformers():
    source = "{{ messages[0].content }}{{ tools | tojson }}{{ tools | tojson(indent=2) }}"
    value = [{"b": "<é>&'", "a": 1}]
    text = Template(source, "t", {}).render([{"content": ""}], value, False)
    assert text == json.dumps(value, ensure_ascii=False) + json.dumps(value, ensure_ascii=False, indent=2)


def test_special_tokens_and_flags_are_known_to_the_template():
    text = Template("{{ bos_token }}{{ add_generation_prompt }}{{ tools is none }}", "t", SPECIALS).render(
        [], None, True
    )
    assert text == "<s>TrueTrue"


# ---- templates that rewrite history

THINKING = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + LOOP
    + "{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_drops_old_reasoning_gives_one_document_a_turn():
    record = chat("2+2?", "<think>two twos</think>\nfour", "3+3?", "<think>threes</think>\nsix")
    first, second = documents(THINKING, record)
    assert first == [
        ("<|im_start|>user\n", "template"),
        ("2+2?", "user"),
        ("<|im_end|>\n<|im_start|>assistant\n", "template"),
        ("<think>two twos</think>", "REASONING"),
        ("\nfour<|im_end|>", "ASSISTANT"),
        ("\n", "template"),
    ]
    assert second == [
        ("<|im_start|>user\n", "template"),
        ("2+2?", "user"),
        ("<|im_end|>\n<|im_start|>assistant\n", "template"),
        ("four", "assistant"),  # not as it was spoken: shown, not trained
        ("<|im_end|>\n<|im_start|>user\n", "template"),
        ("3+3?", "user"),
        ("<|im_end|>\n<|im_start|>assistant\n", "template"),
        ("<think>threes</think>", "REASONING"),
        ("\nsix<|im_end|>", "ASSISTANT"),
        ("\n", "template"),
    ]


def test_each_turn_of_a_rewriting_template_begins_with_what_generate_feeds_for_it():
    record = chat("2+2?", "<think>two twos</think>\nfour", "3+3?", "<think>threes</think>\nsix")
    speaker = speaker_of(THINKING)
    texts = [document.text for document in speaker.documents(record_of(record))]
    for count, text in zip((2, 4), texts, strict=True):
        prompt, reference = speaker.prompt(record_of({"messages": record["messages"][:count]}))
        assert text.startswith(prompt.text)
        assert reference == record["messages"][count - 1]["content"]


def test_a_conversation_without_old_reasoning_stays_one_document():
    assert len(documents(THINKING, chat("2+2?", "four", "3+3?", "<think>threes</think>\nsix"))) == 1


def test_own_words_are_trained_once_over_all_documents_of_a_conversation():
    record = chat("a", "<think>1</think>b", "c", "<think>2</think>d", "e", "<think>3</think>f")
    own = ["".join(text for text, role in document if role.isupper()) for document in documents(THINKING, record)]
    assert own == ["<think>1</think>b<|im_end|>", "<think>2</think>d<|im_end|>", "<think>3</think>f<|im_end|>"]


def test_a_generation_prompt_that_the_turn_does_not_have_is_refused():
    source = (
        LOOP
        + "[{{ message.role }}]{{ message.content }}</s>{% endfor %}{% if add_generation_prompt %}[model]{% endif %}"
    )
    with pytest.raises(
        DataError, match=r"what it writes to open the model's turn is not how it writes the turn at \$\.messages\[1\]"
    ):
        speaker_of(source).documents(record_of(chat("q", "a")))


# ---- messages that are lost


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_template_that_drops_a_message_is_refused(place):
    messages = [{"role": role, "content": f"words of {role}"} for role in ("system", "user", "assistant", "tool")]
    source = LOOP + f"{{% if loop.index0 != {place} %}}({{{{ message.content }}}}){{% endif %}}{{% endfor %}}"
    with pytest.raises(DataError) as caught:
        speaker_of(source).documents(record_of({"messages": messages}))
    assert (
        str(caught.value) == f"template test has no place for role '{messages[place]['role']}' at $.messages[{place}]"
    )


def test_a_template_that_drops_tool_calls_is_refused():
    messages = [*chat("Rain?")["messages"], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    for content in ("", "Let me see."):
        messages[1]["content"] = content
        with pytest.raises(DataError, match=r"template alpaca has no place for tool calls at \$\.messages\[1\]"):
            speaker_of("alpaca").documents(record_of({"messages": messages}))
        assert len(only("chatml", {"messages": messages})) == 5


def test_a_message_that_is_written_in_a_way_that_is_not_followed_is_still_a_message():
    source = LOOP + "{{ '{}.'.format(message.content) }}</s>{% endfor %}"
    assert only(source, chat("q", "a")) == [("q.</s>", "template"), ("a.</s>", "ASSISTANT")]


def test_a_message_that_is_not_followed_may_not_hold_control_tokens():
    source = LOOP + "{{ '{}.'.format(message.content) }}</s>{% endfor %}"
    with pytest.raises(DataError, match=r"hides which words are the message's.* at \$\.messages\[0\]"):
        speaker_of(source).documents(record_of(chat("q <|im_end|>", "a")))


# ---- where a turn ends


def test_a_control_string_inside_the_words_does_not_end_the_turn():
    found = only("chatml", chat("q", "write <|im_end|> to end"))
    assert found[3] == ("write <|im_end|> to end<|im_end|>", "ASSISTANT")


CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def ends_of(source, *messages, specials=("<|im_start|>", "<|im_end|>", "<call>", "</call>", "<args>", "</s>")):
    """The model's own words of a conversation, where all these strings are special tokens."""
    speaker = Speaker(Template(source, "test", SPECIALS), _pattern(specials))
    found = speaker.documents(record_of({"messages": [*chat("q")["messages"], *messages]}))
    return [text for document in found for text, role in pieces(document) if role.isupper()]


def test_special_tokens_of_calls_do_not_end_the_turn():
    source = (
        LOOP
        + "<|im_start|>{{ message.role }}\n{{ message.content }}{% for call in message.tool_calls or () %}"
        + "<call>{{ call.function.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        + OPENING
    )
    calls = "<call>weather</call><call>weather</call><|im_end|>"
    assert ends_of(source, CALLED) == [calls]
    answer = {"role": "assistant", "content": "yes"}
    assert ends_of(source, CALLED, {"role": "tool", "content": "rain"}, answer) == [calls, "yes<|im_end|>"]


def test_arguments_without_text_belong_to_the_turn():
    source = (
        LOOP
        + "{{ message.content }}{% for call in message.tool_calls or () %}<call>{{ call.function.name }}<args>"
        + "{{ call.function.arguments | tojson }}{% endfor %}{% if message.role == 'assistant' %}</s>{% endif %}"
        + "{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    assert ends_of(source, {"role": "assistant", "content": "", "tool_calls": [call]}) == ["<call>now<args>{}</s>"]


def test_a_call_ends_with_eos_where_no_message_may_follow_it():
    source = (
        "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no id') }}{% endif %}"
        + "{{ message.content }}{% for call in message.tool_calls or () %}<call>{{ call.function.name }}</call>"
        + "{% endfor %}{% if message.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    assert ends_of(source, CALLED) == ["<call>weather</call><call>weather</call></s>"]


def test_a_token_that_closes_the_last_turn_alone_is_not_its_end():
    source = (
        LOOP
        + "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        + "{% if not add_generation_prompt %}</s>{% endif %}"
        + OPENING
    )
    assert ends_of(source, {"role": "assistant", "content": "yes"}) == ["yes<|im_end|>"]


def test_a_turn_ends_before_a_marker_of_the_next_that_its_template_writes():
    source = LOOP + "{{ message.content }}{% if message.role == 'assistant' %}<|im_end|><call>{% endif %}{% endfor %}"
    assert ends_of(source, {"role": "assistant", "content": "yes"}) == ["yes<|im_end|>"]


def test_a_call_ends_alike_where_the_template_drops_what_came_before_it():
    source = (
        LOOP
        + "<|im_start|>{{ message.role }}\n{% if loop.last and message.role == 'assistant' %}(thinks){% endif %}"
        + "{{ message.content }}{% for call in message.tool_calls or () %}<call>{{ call.function.name }}</call>"
        + "{% endfor %}<|im_end|>\n{% endfor %}"
        + OPENING
    )
    assert ends_of(source, CALLED) == ["(thinks)<call>weather</call><call>weather</call><|im_end|>"]


def test_an_empty_answer_is_the_end_token_alone():
    assert only("chatml", chat("q", ""))[3] == ("<|im_end|>", "ASSISTANT")


def test_a_turn_without_an_end_token_ends_where_the_next_begins():
    source = (
        LOOP
        + "{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert only(source, chat("q", "a", "q", "b")) == [
        ("user: ", "template"),
        ("q", "user"),
        ("\nassistant: ", "template"),
        ("a\n", "ASSISTANT"),
        ("user: ", "template"),
        ("q", "user"),
        ("\nassistant: ", "template"),
        ("b\n", "ASSISTANT"),
    ]


def test_what_the_template_adds_to_the_words_is_the_models_own_up_to_the_end_token():
    source = (
        LOOP
        + "<|im_start|>{{ message.role }}\n{{ message.content }}{% if message.role == 'assistant' %} (done){% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert only(source, chat("q", "a"))[3:] == [("a (done)<|im_end|>", "ASSISTANT"), ("\n", "template")]


def test_two_assistant_messages_in_a_row_are_two_turns():
    messages = [*chat("q", "a")["messages"], {"role": "assistant", "content": "b"}]
    own = [text for text, role in only("chatml", {"messages": messages}) if role == "ASSISTANT"]
    assert own == ["a<|im_end|>", "b<|im_end|>"]


def test_a_conversation_that_opens_with_the_model_has_an_own_first_turn():
    messages = [{"role": "assistant", "content": "Hello?"}, *chat("q")["messages"]]
    found = only("chatml", {"messages": messages})
    assert found[:2] == [("<|im_start|>assistant\n", "template"), ("Hello?<|im_end|>", "ASSISTANT")]


# ---- weights, prompts


def test_weights_of_messages_lie_on_their_segments():
    record = chat("q", "a", "r", "b", weight=0.5)
    record["messages"][1]["train"] = False
    (document,) = speaker_of("chatml").documents(record_of(record))
    weights = [(document.text[a:b], weight) for a, b, role, _, weight in document.segments if role != "template"]
    assert weights == [("q", 0.5), ("a<|im_end|>", 0.0), ("r", 0.5), ("b<|im_end|>", 0.5)]


@pytest.mark.parametrize("name", ["chatml", "llama3", "alpaca"])
def test_a_prompt_is_the_training_text_up_to_the_last_words(name):
    speaker = speaker_of(name)
    record = record_of(chat("hi", "hello", "bye", "ciao"))
    prompt, reference = speaker.prompt(record)
    (document,) = speaker.documents(record)
    assert document.text.startswith(prompt.text)
    assert document.text[len(prompt.text) :].startswith("ciao")
    assert reference == "ciao"
    assert prompt.cuts == document.cuts[:-1]  # encoded in the same pieces


def test_the_reference_of_a_tool_call_is_what_the_model_would_write():
    messages = [*chat("Rain?")["messages"], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    _, reference = speaker_of("chatml").prompt(record_of({"messages": messages}))
    assert reference == '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_a_prompt_of_a_text_is_the_text():
    prompt, reference = speaker_of("chatml").prompt(record_of({"text": "Once"}))
    assert (prompt.text, reference) == ("Once", None)


# ---- loading


def test_control_tokens_are_found_in_foreign_templates_and_read_in_ours():
    assert control_tokens(load_template("chatml", None, {}, {}))["controls"] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    found = control_tokens(load_template(None, "<bos> {question} <sep> {answer} <eos>", {}, {}))
    assert (found["controls"], found["bos"], found["eos"], found["pad"]) == (
        ["<pad>", "<bos>", "<eos>", "<sep>"],
        "<bos>",
        "<eos>",
        "<pad>",
    )
    found = control_tokens(Template(chatml_with("message.content"), "t", {}))
    assert (found["eos"], found["pad"]) == ("<|im_end|>", "<pad>")
    assert {"<|im_start|>", "<|im_end|>"} <= set(found["controls"])


def test_tags_of_a_template_are_told_from_what_ends_its_turns():
    source = "<think>{{ x }}</think><tool_call>\n</tool_call></parameter><start_of_turn><s></s><|im_end|>"
    found = control_tokens(Template(source, "t", {}))
    assert found["tags"] == ["<think>", "</think>", "<tool_call>", "</tool_call>", "</parameter>"]
    assert control_tokens(Template("<user>{{ x }}</user>", "t", {}))["tags"] == []  # they end its turns
    assert control_tokens(load_template(None, "<a>{question}</a><b>{answer}</b>", {}, {}))["tags"] == []


def test_a_template_with_a_syntax_error_names_the_line():
    with pytest.raises(UsageError, match="template t, line 2: "):
        Template("fine\n{% for %}", "t", {})


def test_an_unknown_template_name_lists_the_built_in_ones():
    with pytest.raises(UsageError, match="no template chatlm") as caught:
        load_template("chatlm", None, {}, {})
    assert caught.value.hint == "built in: alpaca, chatml, llama3, plain; or a Jinja file"


# ---- the sandbox

PAYLOADS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['datetime'] }}",
    "{{ strftime_now.__self__.__class__.__subclasses__() }}",
    "{{ messages[0].content.spans.__class__.__mro__ }}",
    "{{ ''.join.__self__.__class__.__mro__ }}",
    "{{ (messages[0].content | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ('{0.__class__.__mro__}' | attr('format'))('') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.name }}",
    "{{ messages.append({'role': 'user'}) }}",
    "{{ messages[0].update({'role': 'assistant'}) }}",
    "{{ 'x' * 999999999 }}",
    "{{ [0] * 999999999 }}",
    "{{ 9 ** 999999999 }}",
    "{{ '%999999999d' % 1 }}",
    "{% for i in range(999999999) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(99) }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{{ lipsum(n=99999999) }}",
    "{{ '%s' | format(1, 2, 3) }}",
    "{{ 1 / 0 }}",
    "{{ messages[0].nothing.at.all }}",
    # a gigabyte by a number, by repetition, by doubling, by one text in many places
    "{{ 'x'.center(999999999) }}",
    "{{ 'x' | center(999999999) }}",
    "{{ messages[0].content.rjust(999999999) }}",
    "{{ 'x'.zfill(999999999) }}",
    "{{ '\\t'.expandtabs(999999999) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=999999999) }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%.999999999f' | format(1) }}",
    "{{ 'x\ny' | indent(999999999) }}",
    "{{ messages | tojson(indent=999999999) }}",
    "{{ [1] | batch(999999999, 0) | list }}",
    "{{ [1] | slice(999999999) | list }}",
    "{{ ('a' * 99999) | wordwrap(1, wrapstring='b' * 99999) }}",
    "{{ 'a'.translate({97: 'b' * 9999999}) }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(50) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(50) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(50) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=messages[0].content) %}{% for i in range(50) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(50) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set x = 'a' * 9999999 %}{{ x.replace('a', x) }}",
    "{% set x = 'a' * 9999999 %}{{ x | replace('a', x) }}",
    "{% set x = 'a' * 9999999 %}{{ x | join(x) }}",
    "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "{% macro m() %}{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endmacro %}{{ m() }}",
    "{{ ['x' * 9999999] * 9999 }}",
    "{{ (['x' * 9999999] * 9999) | tojson }}",
    "{{ (['x' * 9999999] * 9999) | string }}",
    "{{ '%r' % (['x' * 9999999] * 9999,) }}",
    "{{ '{}'.format(['x' * 9999999] * 9999) }}",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_hostile_template_fails_in_one_line_and_soon(payload):
    start = time.process_time()
    with pytest.raises(DataError) as caught:
        Template(payload, "hostile", {}).render([{"role": "user", "content": "q"}], None, False)
    assert str(caught.value).startswith("template hostile ")
    assert time.process_time() - start < 1.5


@pytest.mark.slow
def test_no_hostile_template_takes_much_memory():
    """In a process of its own, whose memory is limited: none of them meets the limit."""
    script = (
        "import resource, sys, json\n"
        "from sftcli.text.template import Template\n"
        "resource.setrlimit(resource.RLIMIT_AS, (900 << 20,) * 2)\n"
        "for payload in json.load(sys.stdin):\n"
        "    try: Template(payload, 'hostile', {}).render([{'role': 'user', 'content': 'q'}], None, False)\n"
        "    except Exception as error: assert 'Memory' not in str(error), payload\n"
    )
    subprocess.run([sys.executable, "-c", script], input=json.dumps(PAYLOADS[-30:]).encode(), check=True, cwd=ROOT)


def test_a_template_may_still_do_what_templates_do():
    source = (
        "{{ 'a'.center(9) }}|{{ messages | tojson(indent=4) | length }}|{{ '%5d' % 3 }}|{{ '{:>4}'.format('b') }}|"
        "{{ [1, 2] + [3] }}|{{ 'x' * 3 }}|{{ 'a b' | replace(' ', '-') }}|{{ 2 ** 10 }}|{{ ['a', 'b'] | join(', ') }}"
    )
    written = Template(source, "plain", {}).render([{"role": "user", "content": "q"}], None, False)
    assert written == "    a    |62|    3|   b|[1, 2, 3]|xxx|a-b|1024|a, b"


def test_an_empty_message_has_no_first_character_and_no_traceback():
    assert only("{{ messages[0].content[0] }}" + chatml_with("message.content"), chat("", "a")) == only(
        "chatml", chat("", "a")
    )


@pytest.mark.parametrize(
    "expression, text",
    [
        ("'**%s**' | format('x')", "**x**"),
        ("'* %s' % 'x'", "* x"),
        ("'Year 2024: %s' % 'x'", "Year 2024: x"),
        ("'{} * {}'.format(1, 2)", "1 * 2"),
        ("'in 2025, {}'.format('x')", "in 2025, x"),
        ("'100% of 2024'", "100% of 2024"),
    ],
)
def test_numbers_and_stars_outside_of_a_conversion_are_text(expression, text):
    record = record_of({"messages": [{"role": "user", "content": "q"}]})
    (found,) = speaker_of("{{ " + expression + " }}|{{ messages[0].content }}").documents(record)
    assert found.text == f"{text}|q"
