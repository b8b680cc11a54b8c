"""Every operation a template does to a message gives the text that str gives, and spans of the right characters."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.text.traced import Traced, concat, join_traced, trace

# every character of a message is one of these, every character of a template is not: spans can be checked by looking
OURS = "aAbB 0-\n\tß"
THEIRS = "xXyY·"

own = st.text(OURS, max_size=8)
foreign = st.text(THEIRS, max_size=4)


@st.composite
def mixed(draw):
    """A text made of template's and message's pieces in turn."""
    pieces = [trace(draw(own), 0) if i % 2 else draw(foreign) for i in range(draw(st.integers(1, 5)))]
    return join_traced(pieces)


def followed(text):
    """Whether the spans cover exactly the characters that came out of the message."""
    covered = {i for start, end, _ in text.spans for i in range(start, end)}
    return covered == {i for i, c in enumerate(str.__str__(text)) if c in OURS or c in OURS.upper()}


def in_order(text):
    flat = [place for start, end, _ in text.spans for place in (start, end)]
    ends = [0, *flat, len(text)]
    return all(a <= b for a, b in itertools.pairwise(ends)) and all(start < end for start, end, _ in text.spans)


def check(result, expected):
    """Equal to what str gives; traced exactly."""
    assert result == expected
    assert isinstance(result, Traced)
    assert in_order(result) and followed(result), (result, result.spans)


places = st.one_of(st.none(), st.integers(-6, 12))


@given(mixed(), places, places)
def test_a_slice_keeps_the_trace(text, start, stop):
    check(text[start:stop], str.__str__(text)[start:stop])


@given(mixed(), st.integers(-20, 20))
def test_a_character_keeps_the_trace_or_is_an_index_error(text, place):
    plain = "".join(text)
    if -len(plain) <= place < len(plain):
        check(text[place], plain[place])
    else:
        with pytest.raises(IndexError):
            text[place]


@given(mixed(), st.sampled_from([None, " ", " \n", "aA", "x", "xa"]))
def test_strip_keeps_the_trace(text, chars):
    plain = "".join(text)
    check(text.strip(chars), plain.strip(chars))
    check(text.lstrip(chars), plain.lstrip(chars))
    check(text.rstrip(chars), plain.rstrip(chars))


@given(mixed(), st.sampled_from([None, " ", "a", "aa", "xa", "-", "ab", "·"]), st.integers(-1, 3))
def test_split_and_rsplit_keep_the_trace(text, separator, most):
    plain = "".join(text)
    for name in ("split", "rsplit"):
        pieces = getattr(text, name)(separator, most)
        expected = getattr(plain, name)(separator, most)
        assert len(pieces) == len(expected)
        for piece, wanted in zip(pieces, expected, strict=True):
            check(piece, wanted)


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3))
def test_split_at_a_separator_that_overlaps_itself_points_at_the_right_copy(before, after, most):
    """`aaa` split at `aa` leaves the last a, not the first: the trace says which."""
    text = join_traced([trace("a" * before, 0), trace("a" * after, 1)])
    pieces = text.split("aa", most)
    at = 0
    for piece in pieces:
        owners = [m for start, end, m in piece.spans for _ in range(start, end)]
        assert owners == [0 if i < before else 1 for i in range(at, at + len(piece))]
        at += len(piece) + 2


@given(mixed(), st.booleans())
def test_splitlines_keeps_the_trace(text, ends):
    plain = "".join(text)
    pieces = text.splitlines(ends)
    assert pieces == plain.splitlines(ends)
    assert all(followed(piece) for piece in pieces)


@given(mixed(), st.sampled_from(["a", "xa", "0", "·", " "]))
def test_partition_keeps_the_trace(text, separator):
    plain = "".join(text)
    for name in ("partition", "rpartition"):
        pieces = getattr(text, name)(separator)
        assert isinstance(pieces, tuple)
        assert pieces == getattr(plain, name)(separator)
        assert all(followed(piece) for piece in pieces)


@given(mixed(), st.sampled_from(["a", "xa", "  ", "a0", "·"]), foreign, own, st.integers(-1, 3))
def test_replace_keeps_the_trace(text, old, theirs, ours, count):
    plain = "".join(text)
    for new in (theirs, trace(ours, 0)):
        check(text.replace(old, new, count), plain.replace(old, new, count))
    assert text.replace("", "-") == plain.replace("", "-")


@given(mixed(), foreign, own)
def test_addition_from_both_sides_keeps_the_trace(text, theirs, ours):
    plain = "".join(text)
    check(text + theirs, plain + theirs)
    check(theirs + text, theirs + plain)
    check(text + trace(ours, 0), plain + ours)


@given(mixed(), st.integers(-1, 3))
def test_repetition_keeps_the_trace(text, count):
    plain = "".join(text)
    check(text * count, plain * count)
    check(count * text, count * plain)


@given(mixed(), st.sampled_from(["a", "ab", "x", ""]))
def test_removing_a_prefix_or_suffix_keeps_the_trace(text, part):
    plain = "".join(text)
    check(text.removeprefix(part), plain.removeprefix(part))
    check(text.removesuffix(part), plain.removesuffix(part))


@given(st.lists(mixed(), max_size=4), own, foreign)
def test_joining_keeps_the_trace(pieces, ours, theirs):
    plain = ["".join(piece) for piece in pieces]
    check(trace(ours, 0).join(pieces), ours.join(plain))
    assert concat([theirs, *pieces]) == theirs + "".join(plain)


@given(mixed())
def test_iterating_gives_characters_that_know_where_they_come_from(text):
    for character, plain in zip(text, "".join(text), strict=True):
        check(character, plain)


@given(mixed())
def test_str_of_a_traced_text_is_traced(text):
    assert str(text) is text  # Jinja writes every output as str(value)


@given(mixed())
def test_a_case_change_keeps_the_text_and_covers_all_of_the_message(text):
    plain = "".join(text)
    for name in ("lower", "upper", "title", "capitalize", "swapcase", "casefold"):
        result = getattr(text, name)()
        assert result == getattr(plain, name)()
        assert in_order(result)
        assert not text.spans or result.spans  # where lengths change, all of it counts as the message's


@given(mixed(), st.integers(0, 12))
def test_what_is_not_followed_counts_as_content_as_a_whole(text, width):
    plain = "".join(text)
    for name, given_ in [("center", (width,)), ("ljust", (width,)), ("zfill", (width,)), ("expandtabs", (4,))]:
        result = getattr(text, name)(*given_)
        assert result == getattr(plain, name)(*given_)
        assert [span[:2] for span in result.spans] == ([(0, len(result))] if text.spans and result else [])


def test_touching_spans_of_one_message_become_one_and_of_two_stay_two():
    assert join_traced([trace("ab", 0), trace("cd", 0)]).spans == ((0, 4, 0),)
    assert join_traced([trace("ab", 0), trace("cd", 1)]).spans == ((0, 2, 0), (2, 4, 1))


def test_every_text_of_a_value_is_traced_and_the_keys_too():
    value = trace({"name": "f", "arguments": {"city": ["Oslo", 3, None]}}, 7)
    assert value["arguments"]["city"][0].spans == ((0, 4, 7),)
    assert [key.spans for key in value] == [((0, 4, 7),), ((0, 9, 7),)]  # templates write names of arguments
    assert value["arguments"]["city"][1:] == [3, None]
