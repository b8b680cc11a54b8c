"""sft init: a tokenizer and an empty GPT, from data - a model folder without weights."""

from collections.abc import Iterator
from itertools import chain

from sftcli import console
from sftcli.errors import DataError, UsageError
from sftcli.fieldtypes import MASKED_LM_CONTROLS
from sftcli.recipe import Init
from sftcli.stages.common import read_lines_of
from sftcli.text.records import read_record, renamed
from sftcli.text.template import Template, control_tokens, load_template
from sftcli.text.tokenizer import Codec
from sftcli.text.vocabulary import train_bpe, whitespace_tokenizer
from sftcli.writing import atomic_file, output_folder, write_json

NAMES = {"config.json", "tokenizer.json", "chat_template.jinja"}
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def init(options: Init, output: str) -> None:
    """Write the folder: config.json, tokenizer.json, its configs and the chat template."""
    with output_folder(output, NAMES) as folder:
        if weights := sorted(path.name for path in folder.iterdir() if path.name.endswith(WEIGHTS)):
            told = f"{folder} holds a model's weights ({weights[0]}), which fit no new one"
            raise UsageError(told, hint="another -o")
        template = load_template(options.template, options.template_text, options.columns, {})
        controls = control_tokens(template)
        masks = MASKED_LM_CONTROLS if options.preset == "bert" else {}
        added = [*controls["controls"], *options.controls, *masks.values()]
        controls = controls | masks | {"controls": list(dict.fromkeys(added))}
        specials = {f"{name}_token": controls[name] for name in ("bos", "eos", "pad", *masks) if controls.get(name)}
        template = Template(template.source, template.name, specials)
        definition = _tokenizer(options, template, controls["controls"], controls.get("tags", []))
        codec = Codec(definition, "the new tokenizer", specials)
        config = huggingface_config(options, codec, specials)
        before = folder / "tokenizer.json"
        if before.is_file() and before.read_bytes() != definition:
            console.warn(f"init: {folder} held another tokenizer: tokens and rows made with that do not fit this one")
        for name, content in (("tokenizer.json", definition), ("chat_template.jinja", template.source.encode())):
            with atomic_file(folder / name) as file:
                file.write(content)
        write_json(folder / "tokenizer_config.json", _tokenizer_config(options, specials))
        write_json(folder / "special_tokens_map.json", specials)
        write_json(folder / "generation_config.json", {"eos_token_id": config["eos_token_id"]})
        write_json(folder / "config.json", config)
    console.note(
        f"init: {output}: {options.preset}, {parameters(options, codec.size):,} parameters, {options.layers} layers of "
        f"width {options.width}, context {options.context}; tokenizer of {codec.size:,} tokens, "
        f"template {template.name}; no weights yet: `sft train` draws them from --seed"
    )


def _tokenizer(options: Init, template: Template, controls: list[str], tags: list[str]) -> bytes:
    """tokenizer.json, learned from the data."""
    texts = _texts(options, template, controls)
    if options.tokenizer == "whitespace":
        return whitespace_tokenizer(controls, (word for text in texts for word in text.split()), tags)
    return train_bpe(texts, options.vocab_size, controls, tags)


def _texts(options: Init, template: Template, controls: list[str]) -> Iterator[str]:
    """The data as the template writes it, without the control tokens (they are tokens of their own)."""
    rows = 0
    for where, _, fields, _ in read_lines_of(options.data):
        if isinstance(fields, DataError):
            raise fields
        rows += 1
        record = read_record(renamed(fields, options.columns, where), where, rows, template.wanted)
        if record.shape == "tokens":
            raise DataError("these rows are tokenised already: init needs text", where)
        try:
            messages = template.readable(record.messages, record.tools)
            text = template.render(messages, record.tools, False) if record.shape != "text" else None
        except DataError as error:
            raise error.located(where) from None
        yield from _without(record.messages[0]["content"] if text is None else text, controls)
    if rows == 0 and options.tokenizer == "whitespace":
        raise UsageError("a whitespace vocabulary needs data", hint="sft init DATA... --tokenizer whitespace -o BASE")
    if rows == 0:
        console.warn("init: no data: the tokenizer knows bytes only")


def _without(text: str, controls: list[str]) -> Iterator[str]:
    pieces = [text]
    for control in controls:
        pieces = list(chain.from_iterable(piece.split(control) for piece in pieces))
    yield from (piece for piece in pieces if piece)


def _tokenizer_config(options: Init, specials: dict[str, str]) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": options.context,
        "clean_up_tokenization_spaces": False,
        **specials,
    }


def mlp_width(options: Init) -> int:
    """llama: 8/3 of the width, rounded up to 64 (its gate makes three matrices as dear as two of 4); else 4 times."""
    if options.mlp_width:
        return options.mlp_width
    return -(-options.width * 8 // 3 // 64) * 64 if options.preset == "llama" else 4 * options.width


def huggingface_config(options: Init, codec: Codec, specials: dict[str, str]) -> dict[str, object]:
    """config.json as transformers writes it for the preset."""
    ids = {f"{name}_id": codec.added[token] for name, token in specials.items()}
    common = {"vocab_size": codec.size, "dtype": "float32", "tie_word_embeddings": options.tied}
    common |= {f"{name}_token_id": ids.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if options.preset == "llama":
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **common,
            "hidden_size": options.width,
            "intermediate_size": mlp_width(options),
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "num_key_value_heads": options.kv_heads or options.heads,
            "head_dim": options.width // options.heads,
            "hidden_act": "silu",
            "max_position_embeddings": options.context,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": options.rope_theta},
            "rope_theta": options.rope_theta,
            "attention_bias": False,
            "mlp_bias": False,
        }
    if options.preset == "bert":
        return {
            "architectures": ["BertForPreTraining"],
            "model_type": "bert",
            **common,
            "hidden_size": options.width,
            "intermediate_size": mlp_width(options),
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "hidden_act": "gelu",
            "max_position_embeddings": options.context,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **common,
        "n_embd": options.width,
        "n_inner": mlp_width(options),
        "n_layer": options.layers,
        "n_head": options.heads,
        "n_positions": options.context,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def parameters(options: Init, vocabulary: int) -> int:
    """How many weights the model will have (a test holds this equal to the model's own count)."""
    width, heads, layers = options.width, options.heads, options.layers
    inner = mlp_width(options)
    embedding = vocabulary * width * (1 if options.tied else 2)
    if options.preset != "llama":
        block = 4 * width * width + 4 * width + 2 * width * inner + inner + width + 4 * width
        added = 2 * width  # the last norm; bert's is on the embedding
        if options.preset == "bert":  # token types, transform and bias of the head, pooler, two classes
            added += 2 * width + width * width + 3 * width + vocabulary + width * width + width + 2 * width + 2
        return embedding + options.context * width + layers * block + added
    kv_width = (options.kv_heads or heads) * (width // heads)
    block = 2 * width * width + 2 * width * kv_width + 3 * width * inner + 2 * width
    return embedding + layers * block + width
