"""The text side of a model folder: its tokenizer, special tokens, chat template and stop set."""

from pathlib import Path
from typing import Any

from sftcli.errors import CheckpointError, UsageError
from sftcli.reading import read_bytes, read_json
from sftcli.text.tokenizer import Codec
from sftcli.text.vocabulary import W12, W12_CONTROLS, whitespace_tokenizer

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def load_codec(folder: Path) -> Codec:
    """The tokenizer of a model folder. Raises CheckpointError where it has none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"model folder {folder} has no tokenizer.json", hint="copy it from the model's base")
    codec = Codec(read_bytes(path), str(path), _specials(folder))
    _check_vocabulary(codec, folder / "config.json")
    return codec


def _check_vocabulary(codec: Codec, path: Path) -> None:
    """Refuse a tokenizer with more tokens than the model has rows; added ones may lie beyond (Gemma 3's for images)."""
    config = read_json(path) if path.is_file() else {}
    rows = config.get("vocab_size") if isinstance(config, dict) else None
    tokens = codec.tokenizer.get_vocab_size(with_added_tokens=False)
    if type(rows) is int and tokens > rows:
        raise CheckpointError(
            f"{path.parent}: its tokenizer has {tokens:,} tokens, its embedding {rows:,} rows",
            hint="the tokenizer belongs to another model, or was extended without it",
        )


def load_tokenizer_file(name: str) -> Codec:
    """`--tokenizer`: `whitespace` (the twelve words of the test vectors) or a tokenizer.json."""
    if name == "whitespace":
        specials = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "sep_token": "<sep>"}
        return Codec(whitespace_tokenizer(W12_CONTROLS, W12), "whitespace", specials)
    if not Path(name).is_file():
        raise UsageError(f"no tokenizer file {name}", hint="a tokenizer.json, or `whitespace`")
    return Codec(read_bytes(Path(name)), name, _specials(Path(name).parent))


def _specials(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, ... of a folder: tokenizer_config.json, else special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config = read_json(folder / name)
            for key in SPECIAL_NAMES:
                value = config.get(key)
                if isinstance(value, dict):
                    value = value.get("content")
                if isinstance(value, str):
                    found[key] = value
    return found


def folder_template(folder: Path) -> str | None:
    """The chat template of a model folder: chat_template.jinja, else chat_template.json, else tokenizer_config.json.

    Of several named ones (there, or in additional_chat_templates/) it is the default.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return read_bytes(path).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{path} is not UTF-8 text") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        config = read_json(folder / name) if (folder / name).is_file() else {}
        field = config.get("chat_template") if isinstance(config, dict) else None
        if isinstance(field, list):  # named templates
            field = _default_of(field, folder / name)
        if isinstance(field, str):
            return field
    return None


def _default_of(named: list[Any], where: Path) -> Any:
    templates = {item.get("name"): item.get("template") for item in named if isinstance(item, dict)}
    if templates and "default" not in templates:
        names = ", ".join(map(str, templates))
        raise CheckpointError(
            f"{where}: none of its chat templates ({names}) is the default", hint="save one as FILE, --template FILE"
        )
    return templates.get("default")


def stop_ids(folder: Path) -> list[int]:
    """The stop set of a model folder: generation_config's eos (one or a list), else config.json's."""
    for name in ("generation_config.json", "config.json"):
        config = read_json(folder / name) if (folder / name).is_file() else {}
        eos = config.get("eos_token_id") if isinstance(config, dict) else None
        if eos is not None:
            found = eos if isinstance(eos, list) else [eos]
            if not all(type(token) is int for token in found):
                raise CheckpointError(f"{folder / name}: eos_token_id {eos!r} is not an id or a list of ids")
            return found
    return []
