"""The raw shapes: what a line of JSON means, and what is said of a line that means nothing."""

import json

import msgspec
import pytest
from conftest import SAMPLES, chat

from sftcli.errors import DataError
from sftcli.reading import line_fields
from sftcli.text.records import read_record, renamed


def read(record, columns=None, wanted=(), number=7):
    fields = line_fields(json.dumps(record).encode(), "data.jsonl:1")
    return read_record(renamed(fields, columns or {}, "data.jsonl:1"), "data.jsonl:1", number, wanted)


def turns(record, **given):
    return [(message["role"], message["content"]) for message in read(record, **given).messages]


QA = [("user", "2+2?"), ("assistant", "4")]


@pytest.mark.parametrize(
    "shape, record",
    [
        ("messages", {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}),
        ("conversations", {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}),
        ("conversations", {"conversations": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}),
        ("prompt+completion", {"prompt": "2+2?", "completion": "4"}),
        ("prompt+completion", {"prompt": "2+2?", "answer": "4"}),
        ("prompt+completion", {"prompt": "2+2?", "response": "4"}),
        ("prompt+completion", {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]}),
        ("prompt+completion", {"prompt": [{"role": "user", "content": "2+2?"}], "completion": "4"}),
        ("instruction", {"instruction": "2+2?", "output": "4"}),
        ("instruction", {"instruction": "2+2?", "input": "", "output": "4"}),
    ],
)  # fmt: skip
def test_every_shape_of_one_conversation_reads_the_same(shape, record):
    assert read(record).shape == shape
    assert turns(record) == QA


def test_a_prompt_alone_is_a_turn_that_waits_for_its_answer():
    assert read({"prompt": "2+2?"}).shape == "prompt"
    assert turns({"prompt": "2+2?"}) == QA[:1]


def test_a_text_has_no_turns():
    record = read({"text": "Once upon a time"})
    assert record.shape == "text"
    assert record.messages == [{"role": "text", "content": "Once upon a time"}]


def test_alpaca_input_follows_the_instruction_and_templates_may_use_the_parts():
    record = read({"instruction": "Translate.", "input": "school", "output": "école"})
    message = record.messages[0]
    assert message["content"] == "Translate.\n\nschool"
    assert (message["instruction"], message["input"]) == ("Translate.", "school")


@pytest.mark.parametrize("shape", [{"conversations": [{"from": "human", "value": "hi"}]}, {"instruction": "hi"}])
def test_a_system_column_becomes_the_first_message(shape):
    record = read({"system": "Be brief.", **shape})
    assert record.messages[0] == {"role": "system", "content": "Be brief."}
    assert len(record.weights) == len(record.messages) == len(record.paths) == 2
    assert "system" not in record.extra


def test_sharegpt_roles_are_the_usual_ones():
    names = ["system", "human", "gpt", "user", "assistant", "model", "bot", "tool"]
    record = {"conversations": [{"from": name, "value": "."} for name in names]}
    roles = [role for role, _ in turns(record)]
    assert roles == ["system", "user", "assistant", "user", "assistant", "assistant", "assistant", "tool"]


def test_columns_give_other_names_their_meaning():
    record = {"question": "2+2?", "answer": "4", "topic": "sums"}
    assert turns(record, columns={"prompt": "question", "completion": "answer"}) == QA
    found = read(record, columns={"prompt": "question", "completion": "answer"})
    assert found.shape == "prompt+completion"
    assert set(found.extra) == {"topic"}


def test_a_column_that_is_renamed_wins_over_one_of_that_name():
    record = {"prompt": "an old prompt", "question": "2+2?", "completion": "4"}
    assert turns(record, columns={"prompt": "question"}) == QA


def test_a_missing_column_is_named_with_what_the_line_has():
    with pytest.raises(DataError, match=r"data.jsonl:1: no column 'question' \(the line has q, a\)") as caught:
        read({"q": 1, "a": 2}, columns={"prompt": "question"})
    assert "--columns" in caught.value.hint


def test_the_columns_of_a_text_template_are_its_turns_in_its_order():
    record = {"answer": "4", "question": "2+2?", "hint": "even"}
    wanted = ("question", "hint", "answer")
    assert turns(record, wanted=wanted) == [("user", "2+2?"), ("user", "even"), ("assistant", "4")]
    assert turns({"question": "q", "hint": "h"}, wanted=wanted) == [("user", "q"), ("user", "h")]  # a prompt
    with pytest.raises(DataError, match="no column 'hint', which the template text names"):
        read({"question": "q", "answer": "a"}, wanted=wanted)


def test_train_and_weight_of_a_message_become_its_weight():
    record = chat("q", "a", "q", "b", "q", "c")
    record["messages"][1]["train"] = False
    record["messages"][3]["weight"] = 0.5
    found = read(record)
    assert found.weights == [1.0, 0.0, 1.0, 0.5, 1.0, 1.0]
    assert not any({"train", "weight"} & set(message) for message in found.messages)  # templates do not see them


def test_the_weight_of_a_record_multiplies_those_of_its_messages():
    record = chat("q", "a", weight=2)
    record["messages"][1]["weight"] = 0.25
    assert read(record).weights == [2.0, 0.5]
    assert read({"prompt": "q", "completion": "a", "weight": 0.5}).weights == [0.5, 0.5]


def test_weights_in_lists_of_prompt_and_completion_are_kept():
    record = {
        "prompt": [{"role": "user", "content": "q", "weight": 0.1}],
        "completion": [{"role": "assistant", "content": "a", "train": False}],
    }
    assert read(record).weights == [0.1, 0.0]


def test_the_id_is_the_records_own_or_its_number():
    assert read(chat("q")).id == "7"
    assert read(chat("q", id="x-1")).id == "x-1"
    assert read(chat("q", id=12)).id == "12"


def test_unknown_fields_stay_as_they_are_byte_for_byte():
    line = b'{"messages":[{"role":"user","content":"q"}],"score":0.10000000000000000555, "n":123456789012345678901234567890}'
    record = read_record(line_fields(line, "x:1"), "x:1", 1)
    assert {name: bytes(raw) for name, raw in record.extra.items()} == {
        "score": b"0.10000000000000000555",
        "n": b"123456789012345678901234567890",
    }


def test_tool_call_arguments_as_text_and_as_object_are_one():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    as_text = json.loads(json.dumps(call))
    as_text["function"]["arguments"] = '{"city": "Oslo"}'
    found = [read({"messages": [{"role": "assistant", "tool_calls": [given]}]}).messages for given in (call, as_text)]
    assert found[0] == found[1]
    assert found[0][0]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}


def test_arguments_of_a_call_without_function_are_made_an_object_too():
    record = {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}
    assert read(record).messages[0]["tool_calls"][0]["arguments"] == [1]


USER = {"role": "user", "content": "q"}
WRONG = [
    ({"messages": "hello"}, "Expected `array`, got `str` at $.messages"),
    ({"messages": []}, "no messages at $.messages"),
    ({"messages": [USER, {"role": "assistant", "content": 5}]}, "got `int` at $.messages[1].content"),
    ({"messages": [USER, "hi"]}, "Expected `object`, got `str` at $.messages[1]"),
    ({"messages": [{"content": "q"}]}, "missing required field `role` at $.messages[0]"),
    ({"messages": [{"role": None, "content": "q"}]}, "Expected `str`, got `null` at $.messages[0].role"),
    ({"messages": [{"role": "a b\n", "content": "q"}]}, "is not a name at $.messages[0].role"),
    ({"messages": [{"role": "assistant"}]}, "without content or tool_calls at $.messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "without content or tool_calls at $.messages[0].content"),
    ({"messages": [{**USER, "weight": -1}]}, "Expected `float` >= 0.0 at $.messages[0].weight"),
    ({"messages": [{**USER, "train": "no"}]}, "Expected `bool`, got `str` at $.messages[0].train"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "arguments are not JSON at $.messages[0].tool_calls[0].function.arguments",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": "f"}]}]},
        "expected an object at $.messages[0].tool_calls[0].function",
    ),
    ({"messages": [USER], "tools": {}}, "Expected `array | null`, got `object` at $.tools"),
    ({"messages": [USER], "id": [1]}, "got `array` at $.id"),
    (
        {"messages": [{**USER, "weight": 1e200}], "weight": 1e200},
        "the weights of record and message are too large together at $.weight",
    ),
    ({"messages": [USER], "weight": "heavy"}, "Expected `float`, got `str` at $.weight"),
    ({"messages": [USER], "source": 3}, "Expected `str | null`, got `int` at $.source"),
    ({"conversations": [{"from": "human"}]}, "expected from and value at $.conversations[0]"),
    ({"conversations": []}, "no messages at $.conversations"),
    ({"conversations": [{"from": "human", "value": 1}]}, "got `int` at $.conversations[0].value"),
    ({"conversations": [{"from": "h h", "value": "x"}]}, "is not a name at $.conversations[0].from"),
    ({"prompt": 5, "completion": "x"}, "Expected `str`, got `int` at $.prompt"),
    ({"prompt": "x", "completion": None}, "Expected `str`, got `null` at $.completion"),
    ({"prompt": [], "completion": "x"}, "no messages at $.prompt"),
    ({"instruction": ["x"], "output": "y"}, "Expected `str`, got `array` at $.instruction"),
    ({"instruction": "x", "input": 2, "output": "y"}, "got `int` at $.input"),
    ({"text": None}, "Expected `str`, got `null` at $.text"),
    ({"a": 1, "b": 2}, "no known shape: the line has a, b"),
    ({}, "no known shape: the line has no fields"),
]


@pytest.mark.parametrize("record, told", WRONG)
def test_an_error_names_file_line_and_field(record, told):
    with pytest.raises(DataError) as caught:
        read(record)
    assert str(caught.value).startswith("data.jsonl:1: ")
    assert str(caught.value).endswith(told)


@pytest.mark.parametrize("name", ["chats.jsonl", "tools.jsonl", "sharegpt.jsonl", "alpaca.jsonl", "prompts.jsonl"])
def test_every_message_of_the_samples_has_a_weight_and_a_place(name):
    for number, line in enumerate((SAMPLES / name).read_bytes().splitlines(), 1):
        record = read_record(line_fields(line, f"{name}:{number}"), f"{name}:{number}", number)
        assert len(record.messages) == len(record.weights) == len(record.paths)
        assert all(isinstance(raw, msgspec.Raw) for raw in record.extra.values())
