"""sft import: a GGUF file -> a model folder."""

from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from sftcli import console
from sftcli.errors import CheckpointError, UsageError
from sftcli.model.checkpoint import DTYPES, open_folder
from sftcli.model.gguf.architectures import Architecture, architecture_of_file
from sftcli.model.gguf.configs import read_config
from sftcli.model.gguf.file import GGUF, open_gguf
from sftcli.model.gguf.tensors import import_weights
from sftcli.text.gguf_vocabulary import read_tokenizer, stop_tokens
from sftcli.writing import atomic_folder, write_json

TEMPLATE = "tokenizer.chat_template"
NAMED_TEMPLATE = TEMPLATE + "."


def import_gguf(path: str, output: str, dtype: str | None) -> None:
    """Write the folder; it is there only when it is complete."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty", hint="choose another -o, or remove it yourself")
    file = open_gguf(path)
    one = architecture_of_file(file.fields)
    files = _files_of(file, one, dtype or _dtype_of(file))
    with atomic_folder(folder) as made:
        try:
            _write(file, one, files, made)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(made), path), error.hint) from None
    packed = ", ".join(sorted({str(tensor.tensor_type.name) for tensor in file.tensors.values()}))
    config = files["config.json"]
    console.note(
        f"import: {output}: {one.model_type}, {len(file.tensors)} tensors of {packed} -> {config['dtype']}; "
        f"tokenizer of {len(files['tokenizer.json']['model']['vocab']):,} tokens"
    )


def _files_of(file: GGUF, one: Architecture, dtype: str) -> dict[str, Any]:
    """What the small files of the folder hold, by their names. Raises CheckpointError."""
    try:
        tokenizer, tokenizer_config = read_tokenizer(file.fields)
        config = read_config(file, one) | {"dtype": dtype}
        stops = stop_tokens(file.fields)
        templates = _templates(file.fields)
    except (TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError(f"{file.path} is damaged: a field has a value that it cannot have ({error})") from None
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    eos = {"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {}
    named = {name: ids.get(tokenizer_config.get(f"{name}_token", "")) for name in ("bos", "pad")}
    special = eos | {f"{name}_token_id": token for name, token in named.items() if token is not None}
    _check_vocabulary(file, tokenizer, config)
    return {
        "config.json": config | special,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config | {"model_max_length": config[one.keys["context_length"]]},
        "generation_config.json": special,
        **templates,
    }


def _write(file: GGUF, one: Architecture, files: dict[str, Any], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        else:
            write_json(folder / name, content)
    made = open_folder(folder)
    import_weights(file, one, made, folder, DTYPES[files["config.json"]["dtype"]])


def _check_vocabulary(file: GGUF, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    if len(tokenizer["model"]["vocab"]) > config["vocab_size"]:
        raise CheckpointError(f"{file.path} has more tokens than rows in its embedding ({config['vocab_size']})")
    try:
        Tokenizer.from_buffer(msgspec.json.encode(tokenizer))
    except Exception as error:  # the library raises plain Exception for a file it cannot take
        raise CheckpointError(f"{file.path}: its tokens and merges do not fit together: {error}") from None


def _templates(fields: dict[str, Any]) -> dict[str, str]:
    """chat_template.jinja, and named ones where the file has several, as Hugging Face's folders hold them."""
    found = {"chat_template.jinja": fields[TEMPLATE]} if TEMPLATE in fields else {}
    for key, template in fields.items():
        name = key.removeprefix(NAMED_TEMPLATE)
        if key.startswith(NAMED_TEMPLATE) and name.replace("_", "").replace("-", "").isalnum():
            found[f"additional_chat_templates/{name}.jinja"] = template
    if not all(isinstance(template, str) for template in found.values()):
        raise ValueError("a chat template is text")
    return found


def _dtype_of(file: GGUF) -> str:
    """What the matrices are in, where all are in the same 16 bits; float32 for packed ones."""
    kinds = {tensor.tensor_type.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    kinds -= {"F32"} if kinds - {"F32"} in ({"F16"}, {"BF16"}) else set()  # positions, in float32 everywhere
    return {"F16": "float16", "BF16": "bfloat16"}.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"
