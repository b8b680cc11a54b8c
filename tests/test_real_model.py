"""A real pretrained model (SmolLM2-135M-Instruct, imported from GGUF) equals transformers: ids, logits, answers, loss."""

import json
import math
import os

import pytest
import torch
from conftest import SAMPLES, write_lines
from model_fixtures import row_logits
from real_model import fetched

from sftcli.model.checkpoint import load_model, open_folder

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

LOGITS, TIE, PERPLEXITY = 2e-4, 1e-3, 1e-4
QUESTIONS, NEW_TOKENS, ANSWERS = 50, 32, 40
ODD = [
    "",
    " ",
    "a  12  b",
    "\t\n \r\n x",
    "é中文😀👨‍👩‍👧 مرحبا",
    "don't I'LL 'S",
    "<|im_start|>user\nhi<|im_end|>",
    "١٢٣ ½ ²",
]


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    """The other tests' models are too small for more than one thread; this one is not."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is the oracle here: pip install '.[test]'")


@pytest.fixture(scope="module")
def theirs(transformers, smollm2):
    """transformers' reading of the same GGUF file: its own tokenizer and model, none of our code."""
    gguf = fetched()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    )
    return tokenizer, model.eval()


@pytest.fixture(scope="module")
def ours(smollm2):
    return load_model(open_folder(smollm2))


def rows(name):
    return [json.loads(line) for line in (SAMPLES / name).read_text().splitlines()]


QA = rows("qa.jsonl")
TEXTS = [f"{row['question']}\n{row['answer']}" for row in QA]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_tokenizer_equals_the_one_that_transformers_builds(theirs, smollm2, transformers):
    """transformers leaves out that the file's words are cut between digits (`tokenizer.ggml.pre` = smollm)."""
    from tokenizers import pre_tokenizers

    tokenizer = theirs[0]
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    found = transformers.AutoTokenizer.from_pretrained(smollm2)
    texts = [*TEXTS, *(line for line in (SAMPLES / "heldout.jsonl").read_text().splitlines()), *ODD]
    for text in texts:
        assert found(text).input_ids == tokenizer(text).input_ids, text
        assert found.decode(found(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    assert found.get_vocab() == tokenizer.get_vocab()


def test_chat_template_renders_as_in_transformers(theirs, smollm2, transformers):
    found = transformers.AutoTokenizer.from_pretrained(smollm2)
    chats = [row["messages"] for row in rows("chats.jsonl")[:20]]
    for messages in chats:
        for opened in (False, True):
            texts = [t.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened) for t in (found, theirs[0])]  # fmt: skip
            assert texts[0] == texts[1]


def test_logits_equal_transformers(theirs, ours):
    tokenizer, model = theirs
    for text in TEXTS[:10]:
        ids = ids_of(tokenizer, text)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(row_logits(ours, ids), expected, atol=LOGITS, rtol=0)


@pytest.fixture(scope="module")
def expected_answers(theirs):
    """transformers.generate, greedily, one question at a time: (prompt ids, answer ids)."""
    tokenizer, model = theirs
    found = []
    for row in QA[:QUESTIONS]:
        chat = [{"role": "user", "content": row["question"]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = ids_of(tokenizer, text)
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=NEW_TOKENS, eos_token_id=2, pad_token_id=2,
        )  # fmt: skip
        answer = out[0, len(prompt) :].tolist()
        found.append((prompt, answer[:-1] if answer[-1:] == [2] else answer))
    return found


@pytest.mark.parametrize("batch_size", [1, 16])
def test_greedy_answers_equal_transformers(sft, smollm2, ours, expected_answers, tmp_path, batch_size):
    """Equal tokens; a difference only where the two best logits are closer than a tie, and few of those."""
    prompts = write_lines(tmp_path / "prompts.jsonl", *({"prompt": row["question"]} for row in QA[:QUESTIONS]))
    result = sft("generate", prompts, "-m", smollm2, "--batch-size", batch_size, "--max-new-tokens", NEW_TOKENS)
    assert result.code == 0, result.err
    ties = 0
    for row, (prompt, expected) in zip(result.rows, expected_answers, strict=True):
        found = [token for token in row["completion_ids"] if token != 2]
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))  # fmt: skip
            best = row_logits(ours, prompt + found[:at])[-1].topk(2).values
            assert float(best[0] - best[1]) < TIE, f"{row} differs at token {at}"
            ties += 1
    assert ties <= 2


def test_perplexity_of_answers_equals_transformers(sft, smollm2, theirs, tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in QA[:ANSWERS]
    ]
    data = write_lines(tmp_path / "chats.jsonl", *chats)
    tokens, masked = tmp_path / "tokens.jsonl", tmp_path / "rows.jsonl"
    for command in (["tokenize", data, "-m", smollm2, "-o", tokens], ["mask", tokens, "-o", masked]):
        assert (result := sft(*command)).code == 0, result.err
    found = sft("evaluate", masked, "-m", smollm2).rows[0]
    nll, count = 0.0, 0
    for line in masked.read_text().splitlines():
        row = json.loads(line)
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        trained = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            nll += float(theirs[1](ids, labels=labels).loss) * trained
        count += trained
    assert found["perplexity"] == pytest.approx(math.exp(nll / count), rel=PERPLEXITY)
