"""Make tests/frozen: a very small checkpoint of every family with its logits by transformers, in two files.

    python tests/make_frozen.py

families.json holds the configurations; families.safetensors every tensor as "family/name" in float16, and the expected
logits of IDS as "family/" in float32; bert.json and bert.safetensors those of a BertForPreTraining. They keep the families covered where transformers is not installed.
"""

import json
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from family_cases import FAMILIES, build, randomise, read_config, their_logits

from sftcli.model.tensorfile import write_tensors

HERE = Path(__file__).parent / "frozen"
CONFIGS, TENSORS = HERE / "families.json", HERE / "families.safetensors"
BERT_CONFIG, BERT_TENSORS = HERE / "bert.json", HERE / "bert.safetensors"
FROZEN_VOCABULARY = 32
IDS = [5, 17, 3, 29, 11, 8, 23, 14, 30, 6, 19, 27]  # longer than the window

WINDOW = {"sliding_window": 4}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
HEADS = {"head_dim": 8}
OPENAI = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 24}
YARN = {"rope_type": "yarn", "rope_theta": 10.0, "factor": 4.0, "original_max_position_embeddings": 6, "beta_fast": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1], "long_factor": [1.5, 3.0]}
LINEAR = {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}
OWN = {
    "gpt2": OPENAI,
    "gptj": OPENAI | {"rotary_dim": 2},
    "gpt_neo": {
        "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 24,
        "attention_types": [[["global", "local"], 1]], "window_size": 4,
    },
    "gpt_neox": SIZES | {"rotary_pct": 0.5},
    "llama": SIZES | HEADS | {"rope_parameters": LLAMA3},
    "mistral": SIZES | HEADS | WINDOW,
    "qwen2": SIZES | {"rope_parameters": YARN},
    "minimind": SIZES | {"head_dim": 4},
    "smollm3": SIZES | {"no_rope_layers": [1, 0]},
    "olmo3": SIZES | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": SIZES | HEADS | WINDOW | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": SIZES | HEADS | WINDOW | {"sliding_window_pattern": 2, "rope_parameters": {
        "full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "phi3": SIZES | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 6},
    **dict.fromkeys(("qwen3", "glm", "glm4", "gemma"), SIZES | HEADS),
}  # fmt: skip


def freeze(name: str, path: Path) -> dict[str, torch.Tensor]:
    """Save a model whose weights are float16 numbers; returns its tensors and expected logits."""
    model = build(name, path, **(OWN.get(name, SIZES) | {"vocab_size": FROZEN_VOCABULARY}))
    for parameter in model.parameters():  # not buffers: model.half() would round the frequencies of RoPE
        parameter.data = parameter.data.half().float()
    logits = their_logits(model, IDS)
    assert 0.3 < float(logits.std()) < 3, name
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    return {f"{name}/": logits} | {f"{name}/{key}": value.half() for key, value in tensors.items()}


def freeze_bert(path: Path) -> None:
    import transformers

    model = transformers.BertForPreTraining(transformers.BertConfig(**SIZES | {"vocab_size": FROZEN_VOCABULARY})).eval()
    randomise(model, 5)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    types = [0] * 7 + [1] * (len(IDS) - 7)
    with torch.no_grad():
        found = model(torch.tensor([IDS]), token_type_ids=torch.tensor([types]))
    model.save_pretrained(path)
    tensors = {key: value.half() for key, value in safetensors.torch.load_file(path / "model.safetensors").items()}
    expected = {"logits": found.prediction_logits[0], "following": found.seq_relationship_logits}
    write_tensors(BERT_TENSORS, tensors | expected)
    config = read_config(path) | {"dtype": "float16"}
    BERT_CONFIG.write_text(json.dumps({"ids": IDS, "types": types, "config": config}, indent=1) + "\n")


def main() -> None:
    tensors, configs = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in FAMILIES:
            tensors |= freeze(name, Path(temporary, name))
            configs[name] = read_config(Path(temporary, name)) | {"dtype": "float16"}
        freeze_bert(Path(temporary, "bert"))
    HERE.mkdir(exist_ok=True)
    write_tensors(TENSORS, tensors)
    CONFIGS.write_text(json.dumps({"ids": IDS, "configs": configs}, indent=1) + "\n")
    print(f"{len(configs)} families, {TENSORS.stat().st_size + CONFIGS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
