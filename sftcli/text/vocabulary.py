"""New tokenizers: a byte-level BPE trained on text, or one word = one token."""

from collections.abc import Collection, Iterable

import msgspec
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sftcli.errors import UsageError

W12 = ("where", "is", "the", "capital", "of", "China", "The", "Beijing")  # ids 4..11 of `--tokenizer whitespace`
W12_CONTROLS = ("<pad>", "<bos>", "<eos>", "<sep>")


def whitespace_tokenizer(controls: Iterable[str], words: Iterable[str], tags: Collection[str] = ()) -> bytes:
    """One word = one token; ids by first occurrence, the control tokens before all. An unknown word is an error."""
    controls = list(controls)
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*controls, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(_added(controls))
    return with_tags(tokenizer, tags)


def train_bpe(texts: Iterable[str], vocab_size: int, controls: list[str], tags: Collection[str] = ()) -> bytes:
    """A byte-level BPE: digits one by one, GPT-2's word pattern, the control tokens first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(controls):
        raise UsageError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(controls)} control tokens are always there"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=_added(controls), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_tags(tokenizer, tags)


def _added(controls: Iterable[str]) -> list[tokenizers.AddedToken]:
    return [tokenizers.AddedToken(text, special=True, normalized=False) for text in controls]


def with_tags(tokenizer: Tokenizer, tags: Collection[str]) -> bytes:
    """tokenizer.json, in which tags are one token each and not special: they stay in decoded text, as Qwen's."""
    definition = msgspec.json.decode(tokenizer.to_str())
    for token in definition["added_tokens"]:
        token["special"] &= token["content"] not in tags  # to the library all that it was trained with are special
    return msgspec.json.format(msgspec.json.encode(definition), indent=2)
