"""sft export: a model folder -> a GGUF file for llama.cpp, and a Modelfile for Ollama beside it."""

from pathlib import Path
from typing import Any

from sftcli import console
from sftcli.artifacts import model_folder
from sftcli.errors import CheckpointError, UsageError
from sftcli.model.checkpoint import ModelFolder, open_folder
from sftcli.model.gguf.architectures import architecture_of_config
from sftcli.model.gguf.configs import write_config
from sftcli.model.gguf.file import KINDS, Planned, write_gguf
from sftcli.model.gguf.tensors import exported, plan
from sftcli.reading import read_json
from sftcli.text.folder import folder_template, load_codec, stop_ids
from sftcli.text.gguf_vocabulary import KEY, STOPS, write_tokenizer
from sftcli.text.modelfile import modelfile
from sftcli.text.template import Template
from sftcli.text.tokenizer import Codec
from sftcli.writing import atomic_file

MODELFILE = "Modelfile"


def export(model: str, kind: str, output: str | None) -> None:
    """Write FILE (model-KIND.gguf in the folder) and the Modelfile."""
    if kind not in KINDS:
        raise UsageError(f"GGUF kind {kind!r} is not one of {', '.join(KINDS)}")
    folder = open_folder(model_folder(model))
    if not folder.has_weights:
        raise CheckpointError(f"{folder.path} has no weights yet", hint="`sft train` makes them")
    if folder.extra:
        raise CheckpointError(f"{folder.path} has a table of block positions or token types: GGUF has no place for it")
    path = Path(output) if output else folder.path / f"model-{kind}.gguf"
    one = architecture_of_config(folder.json)
    fields, factors = write_config(one, folder.json, folder.config)
    codec, template = load_codec(folder.path), folder_template(folder.path)
    vocabulary = _vocabulary(folder, codec, one.name)
    names = {"general.type": "model", "general.name": folder.path.resolve().name}
    chat = {} if template is None else {"tokenizer.chat_template": template}
    planned = plan(one, folder)
    extra = [Planned(name, tuple(tensor.shape), True) for name, tensor in factors.items()]
    weights = (tensor for source in (factors.values(), exported(one, folder, planned)) for tensor in source)
    every = [*extra, *(tensor for tensor, _ in planned)]
    write_gguf(path, kind, one.name, names | fields | vocabulary | chat, every, weights)
    _write_modelfile(path, codec, template, vocabulary)
    console.note(f"export: {path}: {one.name}, {len(every)} tensors in {kind}, {path.stat().st_size:,} bytes")
    if one.model_type == "mistral" and any(folder.config.windows):
        console.warn("llama.cpp sees all tokens where this model has a window: longer rows will differ")


def _vocabulary(folder: ModelFolder, codec: Codec, architecture: str) -> dict[str, Any]:
    path = folder.path / "tokenizer_config.json"
    config = (read_json(path) if path.is_file() else {}) | codec.specials
    for token in codec.json.get("added_tokens") or []:
        if token.get("lstrip") or token.get("rstrip"):
            console.warn(f"added token {token['content']!r} takes the spaces beside it, which GGUF cannot say")
            break
    return write_tokenizer(codec.json, config, stop_ids(folder.path), folder.config.vocab_size, architecture)


def _write_modelfile(path: Path, codec: Codec, template: str | None, vocabulary: dict[str, Any]) -> None:
    keys = [f"{KEY}{name}_token_id" for name in STOPS]
    tokens = vocabulary[KEY + "tokens"]
    stops = [tokens[vocabulary[key]] for key in keys if vocabulary.get(key, len(tokens)) < len(tokens)]
    written = Template(template, "of the folder", codec.specials) if template is not None else None
    content = modelfile(path.name, written, vocabulary[KEY + "add_bos_token"], stops).encode()
    place = path.with_name(MODELFILE)
    if place.is_file() and place.read_bytes() != content:
        place = path.with_name(f"{path.stem}.{MODELFILE}")
        console.warn(f"export: {path.with_name(MODELFILE)} is there already; this one's is {place}")
    with atomic_file(place) as file:
        file.write(content)
