"""Text to ids: which token belongs to whom, the hard cut, control strings, and equality with transformers."""

import json
import os
import shutil
import subprocess
import sys
from itertools import chain, pairwise

import pytest
from conftest import ROOT, SAMPLES, TEMPLATES, chat
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sftcli.errors import CheckpointError, DataError, UsageError
from sftcli.reading import line_fields, read_objects
from sftcli.stages.common import codec_for, template_for
from sftcli.text.folder import folder_template, load_codec, load_tokenizer_file, stop_ids
from sftcli.text.records import read_record, renamed
from sftcli.text.speaker import Rendered, Speaker
from sftcli.text.tokenizer import Codec
from sftcli.text.vocabulary import train_bpe

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHAPES = {
    "chats.jsonl": {},
    "tools.jsonl": {},
    "sharegpt.jsonl": {},
    "alpaca.jsonl": {},
    "qa.jsonl": {"prompt": "question", "completion": "answer"},
    "heldout.jsonl": {},
}


def byte_codec(merges=(), controls=CHATML):
    """A byte-level BPE whose tokens are single bytes and the given merges (as bytes)."""
    of = dict(zip(range(256), sorted(pre_tokenizers.ByteLevel.alphabet()), strict=True))
    spelled = Tokenizer(models.BPE())
    spelled.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def spell(data):
        table = {}
        bs = [*range(33, 127), *range(161, 173), *range(174, 256)]
        extra = 0
        for b in range(256):
            table[b] = chr(b) if b in bs else chr(256 + extra)
            extra += b not in bs
        return "".join(table[b] for b in data)

    vocabulary = {token: i for i, token in enumerate([*controls, *of.values()])}
    pairs = []
    for left, right in merges:
        vocabulary[spell(left) + spell(right)] = len(vocabulary)
        pairs.append((spell(left), spell(right)))
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(controls))
    return Codec(tokenizer.to_str().encode(), "bytes", {"eos_token": "<|im_end|>"})


BYTES = byte_codec()


def rendered(*pieces, cuts=()):
    """A text of (text, role) pieces; roles in capitals are the model's own; 'template' is scaffold, others content."""
    text, segments, content = "", [], []
    for piece, role in pieces:
        span = (len(text), len(text) + len(piece))
        segments.append((*span, role.lower(), role.isupper(), 1.0))
        if role != "template":
            content.append(span)
        text += piece
    return Rendered(text, segments, content, [a for a, _, _, own, _ in segments if own and (not cuts or a in cuts)])


def tokens_by_role(codec, text):
    ((ids, segments),) = codec.encode([text])
    assert [s.end for s in segments[:-1]] == [s.start for s in segments[1:]]  # they cover the ids, in order
    assert not segments or (segments[0].start, segments[-1].end) == (0, len(ids))
    return [([codec.tokenizer.id_to_token(i) for i in ids[s.start : s.end]], s.role) for s in segments]


# ---- which token belongs to whom


def test_a_token_belongs_where_its_first_character_does():
    codec = byte_codec(merges=[(b"b", b"c")])
    found = tokens_by_role(codec, rendered(("ab", "user"), ("cd", "template"), ("ef", "ASSISTANT")))
    assert found == [(["a", "bc"], "user"), (["d"], "template"), (["e", "f"], "assistant")]


def test_the_tokenizer_never_merges_across_the_start_of_the_models_words():
    codec = byte_codec(merges=[(b"b", b"c")])
    found = tokens_by_role(codec, rendered(("ab", "user"), ("cd", "ASSISTANT")))
    assert found == [(["a", "b"], "user"), (["c", "d"], "assistant")]
    assert codec.counts.merges_cut == 1


def test_a_cut_that_no_merge_crosses_is_not_counted():
    codec = byte_codec(merges=[(b"b", b"c")])
    tokens_by_role(codec, rendered(("abc", "user"), ("bcd", "ASSISTANT")))
    assert codec.counts.merges_cut == 0


@pytest.mark.parametrize("answer", [" ", "\t", "\n ", "  "])
def test_an_answer_of_whitespace_alone_is_the_models_and_not_the_prompts(answer):
    """GPT-2's pattern takes a run of spaces whole at the end of a text, as before a control token."""
    codec = Codec(train_bpe(["a\n \t\n  b\n\t"] * 9, 300, list(CHATML)), "t", {"eos_token": "<|im_end|>"})
    assert len(codec.tokenizer.encode("\n ").ids) == 1  # it has learned to merge across the cut
    text = rendered(("<|im_start|>assistant\n", "template"), (answer, "ASSISTANT"), ("<|im_end|>", "ASSISTANT"))
    text.content[-1:] = []  # the end token is the template's
    text.cuts[1:] = []
    ((ids, segments),) = codec.encode([text])
    prompt = codec.tokenizer.encode("<|im_start|>assistant\n").ids
    assert ids == [*prompt, *codec.tokenizer.encode(answer).ids, codec.added["<|im_end|>"]]
    assert min(s.start for s in segments if s.own) == len(prompt)


def test_tags_stay_in_decoded_text_and_are_one_token_each():
    codec = Codec(train_bpe(["a b"], 300, ["<|im_end|>", "<think>", "</think>"], ["<think>", "</think>"]), "t")
    ids = codec.tokenizer.encode("<think>a</think>b<|im_end|>").ids
    assert len(ids) == 5 and codec.decode(ids) == "<think>a</think>b"
    assert codec.special_ids == {codec.added["<|im_end|>"]}
    assert set(codec.controls) == {"<|im_end|>", "<think>", "</think>"}  # content never becomes one


def test_a_segment_whose_characters_went_into_the_token_before_it_vanishes():
    codec = byte_codec(merges=[(b"b", b"c"), (b"bc", b"d")])
    found = tokens_by_role(codec, rendered(("ab", "user"), ("c", "template"), ("de", "tool")))
    assert found == [(["a", "bcd"], "user"), (["e"], "tool")]


def test_characters_of_several_bytes_lie_in_one_segment():
    codec = byte_codec()
    ((ids, segments),) = codec.encode([rendered(("é🙂", "user"), ("🙂é", "tool"), ("ß", "ASSISTANT"))])
    assert [(s.end - s.start, s.role) for s in segments] == [(6, "user"), (6, "tool"), (2, "assistant")]
    assert codec.decode(ids) == "é🙂🙂éß"


def test_a_token_of_two_halves_of_characters_belongs_to_the_first():
    """é is C3 A9: a token A9 C3 reaches from the last byte of one é into the first of the next."""
    codec = byte_codec(merges=[(b"\xa9", b"\xc3")])
    ((ids, segments),) = codec.encode([rendered(("é", "user"), ("é", "tool"))])
    assert len(ids) == 3
    assert [(s.start, s.end, s.role) for s in segments] == [(0, 2, "user"), (2, 3, "tool")]


def test_control_tokens_are_the_templates_and_stop_the_turn():
    codec = byte_codec()
    text = rendered(
        ("<|im_start|>", "template"), ("a", "user"), ("<|im_end|>", "template"), ("b<|im_end|>", "ASSISTANT")
    )
    text.content[-1] = (text.content[-1][0], text.content[-1][0] + 1)  # the end token is the template's
    assert tokens_by_role(codec, text) == [
        (["<|im_start|>"], "template"),
        (["a"], "user"),
        (["<|im_end|>"], "template"),
        (["b", "<|im_end|>"], "assistant"),
    ]


words = st.text("ab é🙂<|>\n", max_size=4)
merge = st.sampled_from([b"a", b"b", b" ", b"<", b"|", b"\xc3", b"\xa9", b"\xf0"])


@settings(max_examples=60)
@given(
    st.lists(st.tuples(words, st.sampled_from(["user", "template", "tool", "ASSISTANT"])), min_size=1, max_size=6),
    st.lists(st.tuples(merge, merge), max_size=5, unique=True),
)
def test_segments_cover_the_ids_and_a_cut_parts_them_exactly(pieces, merges):
    """Two ways to one segmentation: by offsets of the whole, and by encoding what lies before each cut alone."""
    codec = byte_codec(merges)
    text = rendered(*[piece for piece in pieces if piece[0]])
    ((ids, segments),) = codec.encode([text])
    assert codec.decode(ids, keep_special=True) == text.text
    if segments:
        assert (segments[0].start, segments[-1].end) == (0, len(ids))
    assert all(a.end == b.start for a, b in pairwise(segments))
    whole = codec.tokenizer.encode(text.text, add_special_tokens=False).ids
    assert (ids == whole) == (codec.counts.merges_cut == 0)
    for cut in text.cuts:
        before = Rendered(
            text.text[:cut], [(0, cut, "x", False, 1.0)] if cut else [], text.content, [c for c in text.cuts if c < cut]
        )
        ((head, _),) = codec.encode([before])
        assert ids[: len(head)] == head
        assert len(head) == len(ids) or any(s.own and s.start == len(head) for s in segments)


def spaced_codec(kind):
    """A BPE that writes a space before every text, as Llama 2's, T5's or RoBERTa's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(
        ["the capital is\nBeijing", "where is the capital of China", "[Q] [/Q] the"] * 5, trainer
    )
    return Codec(tokenizer.to_str().encode(), kind)


@pytest.mark.parametrize("kind", ["prepend", "first", "always", "never", "bytes"])
@pytest.mark.parametrize("prompt", ["<s>[Q] where is [/Q]", "<s>[Q] where is [/Q] ", "<s>where is\n", "where is<s>"])
@pytest.mark.parametrize("answer", ["the capital</s>", " the capital</s>", "\nthe</s>"])
def test_the_models_words_go_on_where_the_tokenizer_would_begin_a_text_with_a_space(kind, prompt, answer):
    """No space is trained that is not there: ids are those of the whole text wherever nothing merges across the cut."""
    codec = spaced_codec(kind)
    text = Rendered(prompt + answer, [], [], [len(prompt)])
    text.segments = [(0, len(prompt), "user", False, 1.0), (len(prompt), len(text.text), "assistant", True, 1.0)]
    ((ids, segments),) = codec.encode([text])
    whole = codec.tokenizer.encode(text.text, add_special_tokens=False).ids
    head = codec.tokenizer.encode(prompt, add_special_tokens=False).ids
    assert ids[: len(head)] == head
    assert [(s.start, s.end) for s in segments] == [(0, len(head)), (len(head), len(ids))]
    assert (ids == whole) == (codec.counts.merges_cut == 0)
    if prompt.endswith("\n") and answer.startswith("the"):
        assert ids == whole


def test_a_whitespace_vocabulary_gives_no_token_to_spaces():
    codec = load_tokenizer_file("whitespace")
    text = rendered(
        ("<bos> where ", "template"), ("is  the", "user"), (" <sep> ", "template"), ("Beijing <eos>", "ASSISTANT")
    )
    text.content = [(12, 19)]
    assert tokens_by_role(codec, text) == [
        (["<bos>", "where"], "template"),
        (["is", "the"], "user"),
        (["<sep>"], "template"),
        (["Beijing", "<eos>"], "assistant"),
    ]


# ---- whole words only


PLAIN = ("--tokenizer", "whitespace", "--template-text", "<bos> {question} <sep> {answer} <eos>")


def test_an_unknown_word_is_named_with_its_line(sft, lines):
    data = lines({"question": "where is", "answer": "the"}, {"question": "who is", "answer": "the"})
    result = sft("tokenize", data, *PLAIN)
    assert result.code == 3
    assert f"error: {data}:2: unknown word 'who': the vocabulary has whole words only" in result.err
    assert [list(row) for row in result.rows] == [
        ["id", "input_ids", "segments", "tokenizer", "template"],
        ["sft_error"],
    ]


def test_answers_longer_than_the_window_around_a_cut_are_words_too(sft, lines):
    long = "The capital of China is where the capital of China is"
    (row,) = sft("tokenize", lines({"question": long, "answer": long}), *PLAIN).rows
    assert len(row["input_ids"]) == 2 * 11 + 3


# ---- prompts, and equality with transformers


ONE_TURN = ("alpaca.jsonl", "qa.jsonl", "heldout.jsonl")
PAIRS = [
    (name, template)
    for template in TEMPLATES
    for name in SHAPES
    if (template != "plain" or name in ONE_TURN) and (template != "alpaca" or name != "tools.jsonl")
]


def rows_of(name):
    return [(where, fields) for where, _, fields in read_objects(str(SAMPLES / name))]


@pytest.mark.parametrize("name, template", PAIRS)
def test_prompt_ids_are_a_prefix_of_the_training_ids(model_folders, name, template):
    folder = str(model_folders[template])
    codec = codec_for(folder, None)
    made = template_for(codec, folder, None, None, {})
    speaker = Speaker(made, codec.ends)
    found = 0
    for where, fields in rows_of(name):
        record = read_record(renamed(fields, SHAPES[name], where), where, 1, made.wanted)
        prompt, reference = speaker.prompt(record)
        ((ids, _),) = codec.encode([prompt])
        trained, segments = codec.encode(speaker.documents(record)[-1:])[0]
        assert trained[: len(ids)] == ids, where
        if reference is not None:
            turn = segments[-1] if segments[-1].own else segments[-2]
            assert (turn.start, turn.own) == (len(ids), True), where  # the model's words begin where the prompt ends
            found += 1
    assert found


LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def oracle_folders(model_folders, tmp_path_factory):
    """The model folders; that of llama3 cuts words as Llama 3 does (GPT-2's pattern joins its two newlines to words)."""
    llama3 = tmp_path_factory.mktemp("oracle") / "llama3"
    shutil.copytree(model_folders["llama3"], llama3)
    definition = json.loads((llama3 / "tokenizer.json").read_bytes())
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated", "invert": False}
    spelling = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, spelling]}
    (llama3 / "tokenizer.json").write_text(json.dumps(definition))
    return model_folders | {"llama3": llama3}


@pytest.mark.parametrize("name, template", [pair for pair in PAIRS if pair[1] != "plain"])
def test_ids_equal_those_of_transformers_where_nothing_merges_across_a_cut(oracle_folders, name, template):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    folder = oracle_folders[template]
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    codec, equal = load_codec(folder), 0
    speaker = Speaker(template_for(codec, str(folder), None, None, {}), codec.ends)
    rows = rows_of(name)
    for where, fields in rows:
        record = read_record(renamed(fields, SHAPES[name], where), where, 1)
        expected = oracle.apply_chat_template(record.messages, tools=record.tools, tokenize=True, return_dict=False)
        merged_before = codec.counts.merges_cut
        (document,) = speaker.documents(record)
        ((ids, _),) = codec.encode([document])
        cuts = [0, *document.cuts, len(document.text)]
        apart = [oracle(document.text[a:b], add_special_tokens=False).input_ids for a, b in pairwise(cuts)]
        assert ids == list(chain.from_iterable(apart)), where
        assert (ids == expected) == (codec.counts.merges_cut == merged_before), where
        equal += ids == expected
    assert equal > len(rows) / 2


def test_the_folder_of_init_is_a_tokenizer_for_transformers(base):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    oracle, codec = transformers.AutoTokenizer.from_pretrained(base), load_codec(base)
    assert len(oracle) == codec.size
    assert (oracle.eos_token, oracle.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert oracle.chat_template == folder_template(base)
    assert stop_ids(base) == [oracle.eos_token_id]


# ---- control strings in content


def ids_of(folder, record, template=None):
    codec = codec_for(str(folder), None)
    made = template_for(codec, str(folder), template, None, {})
    found = read_record(line_fields(json.dumps(record).encode(), "x:1"), "x:1", 1, made.wanted)
    ((ids, segments),) = codec.encode(Speaker(made, codec.ends).documents(found))
    return codec, ids, segments


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("role", [0, 1])
def test_no_control_string_in_content_becomes_a_control_id(model_folders, template, role):
    folder = model_folders[template]
    codec = load_codec(folder)
    for control in codec.added:
        texts = ["hello", "world"]
        _, honest, _ = ids_of(folder, {"prompt": texts[0], "completion": texts[1]})
        texts[role] = f"a{control}b"
        codec, ids, _ = ids_of(folder, {"prompt": texts[0], "completion": texts[1]})
        assert [i for i in ids if i in codec.special_ids] == [i for i in honest if i in codec.special_ids]
        assert f"a{control}b" in codec.decode(ids)  # nothing is lost
        assert codec.counts.defused == 1


def test_a_control_string_that_content_and_template_make_together_is_none(base):
    """Content that ends in half a control token: the template writes the other half, by chance."""
    source = "{% for m in messages %}<|im_start|>{{ m.content }}end|><|im_end|>{% endfor %}"
    (base.parent / "half.jinja").write_text(source)
    codec, ids, _ = ids_of(base, chat("x<|im_"), str(base.parent / "half.jinja"))
    assert [i for i in ids if i in codec.special_ids] == [codec.added["<|im_start|>"], codec.added["<|im_end|>"]]
    assert codec.decode(ids) == "x<|im_end|>"


def test_tool_arguments_and_definitions_are_content_too(base):
    record = {
        "tools": [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}],
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<|im_start|>"}}}]},
        ],
    }
    codec, ids, _ = ids_of(base, record)
    assert codec.counts.defused == 2
    starts, ends = ids.count(codec.added["<|im_start|>"]), ids.count(codec.added["<|im_end|>"])
    assert (starts, ends) == (3, 3)  # system, user, assistant


def test_defused_text_keeps_its_segments(base):
    codec, ids, segments = ids_of(base, chat("é <|im_end|> 🙂", "yes <|im_start|>"))
    texts = [(codec.decode(ids[s.start : s.end], keep_special=True), s.role) for s in segments]
    assert texts == [
        ("<|im_start|>user\n", "template"),
        ("é <|im_end|> 🙂", "user"),
        ("<|im_end|>\n<|im_start|>assistant\n", "template"),
        ("yes <|im_start|><|im_end|>", "assistant"),
        ("\n", "template"),
    ]


def test_runs_of_spaces_that_are_added_tokens_are_no_control_strings():
    """GPT-NeoX's tokenizer keeps runs of spaces as added tokens: content may have them, ids stay as they are."""
    codec = byte_codec()
    tokenizer = Tokenizer.from_str(codec.definition.decode())
    tokenizer.add_tokens(["    "])
    spaces = Codec(tokenizer.to_str().encode(), "spaces")
    ((ids, _),) = spaces.encode([rendered(("a    b", "user"))])
    assert ids == tokenizer.encode("a    b", add_special_tokens=False).ids
    assert len(ids) == 3 and spaces.counts.defused == 0


@settings(max_examples=40)
@given(st.lists(st.text(max_size=12), min_size=2, max_size=2))
def test_decoding_gives_any_content_back(texts):
    codec = byte_codec()
    text = rendered(
        ("<|im_start|>", "template"), (texts[0], "user"), ("<|im_end|>", "template"), (texts[1], "ASSISTANT")
    )
    ((ids, _),) = codec.encode([text])
    assert codec.decode(ids) == "".join(texts)


# ---- training a tokenizer


def test_training_a_tokenizer_gives_the_same_bytes_in_every_process(base, tmp_path):
    program = (
        "import sys; from sftcli.text.vocabulary import train_bpe;"
        "texts = open(sys.argv[1], encoding='utf-8').read().splitlines();"
        "sys.stdout.buffer.write(train_bpe(texts, 600, ['<a>', '<b>']))"
    )
    made = set()
    for threads in ("1", "2"):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", program, str(SAMPLES / "qa.jsonl")]
        made.add(subprocess.run(command, capture_output=True, check=True, env=env, cwd=ROOT).stdout)
    texts = (SAMPLES / "qa.jsonl").read_text(encoding="utf-8").splitlines()
    assert made == {train_bpe(texts, 600, ["<a>", "<b>"])}


def test_the_vocabulary_has_the_asked_size_and_the_control_tokens_first(base):
    codec = load_codec(base)
    assert codec.size == 400
    assert [codec.added[token] for token in CHATML] == [0, 1, 2]


def test_a_vocabulary_smaller_than_its_bytes_is_a_usage_error():
    with pytest.raises(UsageError, match="256 bytes and 1 control tokens are always there"):
        train_bpe(["text"], 256, ["<a>"])


# ---- loading


def test_a_tokenizer_file_that_is_none_is_a_checkpoint_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": "nonsense"}')
    with pytest.raises(CheckpointError, match=r"cannot load tokenizer .*tokenizer.json"):
        load_codec(tmp_path)


def test_special_tokens_are_read_from_both_files_and_both_spellings(tmp_path, base):
    (tmp_path / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "bos_token": "old"}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|im_start|>", "chat_template": "{{ bos_token }}"}')
    assert load_codec(tmp_path).specials == {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    assert folder_template(tmp_path) == "{{ bos_token }}"
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}'
    )
    assert folder_template(tmp_path) == "d"
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        load_codec(tmp_path)


def test_a_template_whose_control_tokens_the_tokenizer_lacks_is_refused(base):
    codec = load_codec(base)
    with pytest.raises(UsageError, match="template llama3 needs the control token <.begin_of_text.>"):
        template_for(codec, str(base), "llama3", None, {})


def test_a_tokenizer_that_panics_is_an_error_of_the_line(sft, lines, tmp_path, capfd):
    """The library's Rust code panics where a regular expression gives up; that is no Exception in Python."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate("ab")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = lines({"prompt": "a", "completion": "b"}, {"prompt": "a" * 27 + "b", "completion": "b"})
    result = sft(
        "tokenize", data, "--tokenizer", tmp_path / "tokenizer.json", "--template-text", "{prompt}{completion}"
    )
    assert result.code == 3
    assert f"error: {data}:2: the tokenizer refused it: " in result.err
    assert [list(row)[0] for row in result.rows] == ["id", "sft_error"]
    capfd.readouterr()  # what Rust has to say


def test_what_was_encoded_as_plain_text_is_counted_once(sft, lines, tmp_path):
    """A batch that fails is encoded line by line: neither is anything counted twice, nor what was rejected."""
    pieces = [*"ab<>/es", "<s", "<s>"]
    merges = [("<", "s"), ("<s", ">")]  # the words of a text become a control token all by themselves
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = lines({"prompt": "a</s>", "completion": "b"}, {"prompt": "a<s>", "completion": "b"})
    flags = (
        "--tokenizer",
        tmp_path / "tokenizer.json",
        "--template-text",
        "{prompt}{completion}",
        "--on-error",
        "skip",
    )
    result = sft("tokenize", data, *flags)
    assert [row["id"] for row in result.rows] == ["1"]
    assert "content spells a control token that this tokenizer cannot write as text" in result.err
    assert "tokenize: 1 control strings in content were encoded as plain text" in result.err


def test_what_a_tokenizer_cannot_encode_is_an_error_of_the_data():
    codec = load_tokenizer_file("whitespace")
    with pytest.raises(DataError, match="unknown word 'Oslo'"):
        codec.encode([rendered(("Oslo", "user"))])
