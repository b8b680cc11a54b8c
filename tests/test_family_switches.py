"""Each switch of a family matters: with it wrong the logits differ by far more than the tests of families allow."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from family_cases import LENGTH, TOLERANCE, built, change_config, ids_of, read_config, write_config
from model_fixtures import model_of, row_logits

from sftcli.errors import CheckpointError, Exit
from sftcli.model.checkpoint import open_folder
from sftcli.model.gpt import GPT, GPTConfig
from sftcli.model.rope import Rope
from sftcli.model.tensorfile import WEIGHTS, write_tensors

WRONG = 5e-4  # fifty times what the right model may differ; only the two forms of GELU are that near
IDS = ids_of(LENGTH)


@pytest.fixture(autouse=True)
def transformers():
    return pytest.importorskip("transformers", reason="transformers is the oracle here: pip install '.[test]'")


def largest_difference(model, expected):
    return float((row_logits(model, IDS) - expected).abs().max())


def with_config(right: GPT, **switches: Any) -> GPT:
    """The same weights under another config; what only one of the two has is left out or neutral."""
    wrong = GPT(replace(right.config, **switches))
    for name, parameter in wrong.named_parameters():
        torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    wrong.load_state_dict(right.state_dict(), strict=False)
    return wrong


# ---- a switch of GPTConfig that is wrong

Change = Callable[[GPTConfig], dict[str, Any]]


def ropes(**switches: Any) -> Change:
    """Every layer's rope with some fields changed."""
    return lambda config: {"ropes": tuple(rope and replace(rope, **switches) for rope in config.ropes)}


def scalings(**switches: Any) -> Change:
    """Every scaling with some fields changed."""

    def changed(rope: Rope) -> Rope:
        return replace(rope, scaling=rope.scaling and replace(rope.scaling, **switches))

    return lambda config: {"ropes": tuple(changed(rope) for rope in config.ropes)}


def windows(by: int) -> Change:
    return lambda config: {"windows": tuple(window and window + by for window in config.windows)}


def shifted(key: str) -> Change:
    """A value of each layer, moved on by one layer."""
    return lambda config: {key: getattr(config, key)[1:] + getattr(config, key)[:1]}


def everywhere(key: str, layer: int = 0) -> Change:
    """One layer's value on all layers."""
    return lambda config: {key: (getattr(config, key)[layer],) * config.layers}


def fixed(**switches: Any) -> Change:
    return lambda config: switches


SWITCHES: dict[tuple[str, str], Change] = {
    ("gpt2", "GELU by erf"): fixed(activation="gelu"),
    ("gpt2", "larger epsilon"): fixed(norm_eps=1e-2),
    ("gpt_neo", "scores divided by the root of the head width"): fixed(attention_scale=None),
    ("gpt_neo", "local layers swapped"): shifted("windows"),
    ("gpt_neo local", "no window"): fixed(windows=()),
    ("gpt_neox", "sequential"): fixed(residual="sequential"),
    ("gpt_neox", "one norm for both branches"): fixed(residual="parallel_shared"),
    ("gpt_neox", "whole head rotated"): ropes(dim=8),
    ("gpt_neox", "interleaved"): ropes(interleaved=True, dim=8),
    ("gpt_neox", "GELU by tanh"): fixed(activation="gelu_tanh"),
    ("gpt_neox sequential", "parallel"): fixed(residual="parallel"),
    ("llama", "interleaved"): ropes(interleaved=True),
    ("llama", "other theta"): ropes(theta=5e5),
    ("llama biases", "no bias on the MLP"): fixed(mlp_bias=False),
    ("llama attention bias", "no bias on the output"): fixed(output_bias=False),
    ("llama linear", "no scaling"): ropes(scaling=None),
    ("llama dynamic", "no scaling"): ropes(scaling=None),
    ("llama dynamic", "other factor"): scalings(factor=4.0),
    ("llama llama3", "no scaling"): ropes(scaling=None),
    ("llama llama3", "other ramp"): scalings(high=8.0),
    ("llama yarn", "no scaling"): ropes(scaling=None),
    ("llama yarn", "no amplitude"): scalings(amplitude=1.0),
    ("llama yarn", "ramp not rounded"): scalings(truncate=False),
    ("llama yarn factor", "amplitude by the factor"): scalings(amplitude=1.1386),
    ("llama yarn mscale", "amplitude by the factor"): scalings(amplitude=1.1386),
    ("llama yarn exact", "ramp rounded"): scalings(truncate=True),
    ("mistral", "no window"): fixed(windows=()),
    ("mistral", "window + 1"): windows(1),
    ("mistral no window", "a window"): fixed(windows=(6,) * 4),
    ("qwen2", "no biases"): fixed(qkv_bias=False),
    ("qwen2 window", "on all layers"): everywhere("windows", 3),
    ("qwen3", "no norms on queries and keys"): fixed(qk_norm=None),
    ("qwen3 window", "no window"): fixed(windows=()),
    ("minimind", "no norms on queries and keys"): fixed(qk_norm=None),
    ("glm", "half-split"): ropes(interleaved=False),
    ("glm", "whole head rotated"): ropes(dim=12),
    ("glm4", "no norms after"): fixed(placement="pre"),
    ("smollm3", "rotated everywhere"): everywhere("ropes"),
    ("smollm3", "other layers rotated"): shifted("ropes"),
    ("smollm3 window", "no window"): fixed(windows=()),
    ("olmo", "RMS"): fixed(norm="rms"),
    ("olmo clip", "no clip"): fixed(qkv_clip=None),
    ("olmo2", "norms before"): fixed(placement="pre"),
    ("olmo2", "no norms on queries and keys"): fixed(qk_norm=None),
    ("olmo3", "sliding layers shifted"): shifted("windows"),
    ("olmo3 yarn", "scaled on all layers"): everywhere("ropes", 3),
    ("olmo3 yarn", "scaled on no layer"): everywhere("ropes", 0),
    ("gemma", "w for 1 + w"): fixed(norm="rms"),
    ("gemma", "embeddings not scaled"): fixed(embedding_scale=1.0),
    ("gemma2", "scale by the head width"): fixed(attention_scale=None),
    ("gemma2", "no cap on scores"): fixed(attention_cap=None),
    ("gemma2", "no cap on logits"): fixed(logit_cap=None),
    ("gemma2 caps", "no cap on logits"): fixed(logit_cap=None),
    ("gemma2", "sliding layers shifted"): shifted("windows"),
    ("gemma2", "no norms after"): fixed(placement="pre"),
    ("gemma3_text", "one theta"): everywhere("ropes", 0),
    ("gemma3_text", "one theta of full layers"): everywhere("ropes", 5),
    ("gemma3_text", "sliding layers shifted"): shifted("windows"),
    ("gemma3_text", "no norms on queries and keys"): fixed(qk_norm=None),
    ("gemma3_text linear", "no scaling"): ropes(scaling=None),
    ("phi3 window", "no window"): fixed(windows=()),
    ("phi3 longrope", "short factors"): lambda config: scalings(long=config.ropes[0].scaling.short)(config),
    ("phi3 longrope", "no amplitude"): scalings(amplitude=1.0),
    ("phi3 partial", "whole head rotated"): ropes(dim=8),
    ("phi", "whole head rotated"): ropes(dim=8),
    ("phi", "sequential"): fixed(residual="sequential"),
    ("phi", "no bias on the head"): fixed(head_bias=False),
    ("gptj", "half-split"): ropes(interleaved=False),
    ("gptj", "whole head rotated"): ropes(dim=8),
    ("gptj", "no bias on the head"): fixed(head_bias=False),
    ("starcoder2", "no biases"): fixed(qkv_bias=False, output_bias=False, mlp_bias=False),
    ("starcoder2 window", "no window"): fixed(windows=()),
    ("stablelm", "less of the head rotated"): ropes(dim=2),
    ("stablelm", "RMS"): fixed(norm="rms"),
    ("stablelm parallel", "sequential"): fixed(residual="sequential"),
    ("stablelm qkv bias", "no biases"): fixed(qkv_bias=False),
    ("granite", "scale by the head width"): fixed(attention_scale=None),
    ("granite", "embeddings not scaled"): fixed(embedding_scale=1.0),
    ("granite", "residuals not scaled"): fixed(residual_scale=1.0),
    ("granite", "logits not scaled"): fixed(logit_scale=1.0),
}


@pytest.mark.parametrize(("name", "what"), SWITCHES, ids=[": ".join(key) for key in SWITCHES])
def test_wrong_switch_changes_the_logits(name, what):
    expected = built(name).logits
    right = model_of(built(name).path)
    assert largest_difference(right, expected) < TOLERANCE
    wrong = with_config(right, **SWITCHES[name, what](right.config))
    assert largest_difference(wrong, expected) > WRONG


# ---- tensors laid out wrongly


def blocks_for_heads(fused):
    """[q, k, v] of each of 4 heads -> all q, all k, all v."""
    return fused.unflatten(0, (4, 3, -1)).transpose(0, 1).flatten(0, 2)


def halves_swapped(fused):
    return torch.cat(fused.chunk(2)[::-1])


LAYOUTS: dict[tuple[str, str], Callable[[torch.Tensor], torch.Tensor]] = {
    ("gpt2", "attn.c_proj.weight"): torch.t,
    ("gpt2", "attn.c_attn.weight"): lambda fused: torch.cat(fused.chunk(3, 1)[::-1], 1),
    ("gpt_neox", "attention.query_key_value.weight"): blocks_for_heads,
    ("gpt_neox", "attention.query_key_value.bias"): blocks_for_heads,
    ("glm", "mlp.gate_up_proj.weight"): halves_swapped,
    ("phi3", "mlp.gate_up_proj.weight"): halves_swapped,
    ("phi3", "self_attn.qkv_proj.weight"): lambda fused: torch.cat([fused[:32], fused[48:], fused[32:48]]),
}


@pytest.mark.parametrize(("name", "tensor"), LAYOUTS, ids=[": ".join(key) for key in LAYOUTS])
def test_wrong_layout_of_a_tensor_changes_the_logits(name, tensor, tmp_path):
    folder = shutil.copytree(built(name).path, tmp_path / "wrong")
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    wrong = {key: LAYOUTS[name, tensor](value).contiguous() for key, value in tensors.items() if key.endswith(tensor)}
    assert len(wrong) == 4  # every layer's
    write_tensors(folder / WEIGHTS, tensors | wrong)
    assert largest_difference(model_of(folder), built(name).logits) > WRONG


# ---- keys that are absent from config.json


def without(name, path, *keys, **changed):
    """A copy of a case's folder whose config.json lacks some keys and has others changed."""
    folder = shutil.copytree(built(name).path, path)
    kept = {key: value for key, value in read_config(folder).items() if key not in keys}
    write_config(folder, kept | changed)
    return folder


def test_absent_window_of_mistral_is_not_null(tmp_path):
    assert open_folder(built("mistral no window").path).config.windows == ()
    absent = without("mistral no window", tmp_path / "absent", "sliding_window")
    assert open_folder(absent).config.windows == (4096,) * 4


def test_window_of_qwen_is_used_only_where_use_sliding_window_says_so(tmp_path):
    told = {"sliding_window": 6, "max_window_layers": 0}
    unused = without("qwen2", tmp_path / "unused", "layer_types", use_sliding_window=False, **told)
    assert largest_difference(model_of(unused), built("qwen2").logits) < TOLERANCE
    used = without("qwen2", tmp_path / "used", "layer_types", use_sliding_window=True, **told)
    assert largest_difference(model_of(used), built("qwen2").logits) > WRONG


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gpt2", ["n_inner", "activation_function", "tie_word_embeddings"]),
        ("gptj", ["rotary_pct", "tie_word_embeddings", "activation_function"]),
        ("llama all heads", ["num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps", "mlp_bias"]),
        ("gpt_neox", ["rope_parameters", "attention_bias", "use_parallel_residual", "hidden_act"]),
        ("glm", ["rope_parameters", "attention_bias", "rms_norm_eps", "num_key_value_heads"]),
        ("glm4", ["rope_parameters", "attention_bias", "rms_norm_eps", "num_key_value_heads"]),
        ("smollm3", ["rope_parameters", "no_rope_layers", "layer_types", "tie_word_embeddings"]),
        ("olmo2", ["rope_parameters", "rms_norm_eps"]),
        ("olmo3", ["rope_parameters", "layer_types", "rms_norm_eps"]),
        ("gemma", ["rope_parameters", "hidden_act", "tie_word_embeddings"]),
        ("gemma2 caps", ["attn_logit_softcapping", "final_logit_softcapping", "layer_types", "hidden_activation"]),
        ("gemma3_text", ["rope_parameters", "layer_types", "_sliding_window_pattern"]),
        ("phi3", ["rope_parameters", "rms_norm_eps", "sliding_window", "original_max_position_embeddings"]),
        ("phi", ["rope_parameters", "hidden_act", "layer_norm_eps"]),
        ("starcoder2", ["rope_parameters", "use_bias", "norm_epsilon", "num_key_value_heads", "tie_word_embeddings"]),
        ("granite", ["rope_parameters", "rms_norm_eps", "tie_word_embeddings"]),
    ],
)
def test_absent_keys_mean_what_transformers_says(name, keys, tmp_path):
    folder = without(name, tmp_path / "absent", *keys)
    assert largest_difference(model_of(folder), built(name).logits) < TOLERANCE


# ---- refusals


@pytest.mark.parametrize(
    ("name", "changed", "named"),
    [
        ("llama", {"model_type": "mixtral"}, "mixtral"),
        ("llama", {"model_type": "qwen3_moe"}, "qwen3_moe"),
        ("llama", {"model_type": None}, "model_type"),
        ("glm", {"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration_chatglm.C"}}, "chatglm"),
        ("gemma3_text", {"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "gemma3"),
        ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "proportional"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "spiral"}}, "spiral"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ("llama", {"hidden_act": "mish"}, "mish"),
        ("gpt2", {"activation_function": "mish"}, "mish"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"hidden_activation": "mish"}, "mish"),
        ("minimind", {"use_moe": True}, "use_moe"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("gpt_neo", {"attention_types": [[["global", "sparse"], 2]]}, "attention_types"),
        (
            "phi3 longrope",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "short_factor",
        ),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "longrope"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_not_supported_is_refused_by_name(name, changed, named, tmp_path):
    folder = shutil.copytree(built(name).path, tmp_path / "refused")
    change_config(folder, **changed)
    with pytest.raises(CheckpointError, match=named) as told:
        model_of(folder)
    assert told.value.code == Exit.CHECKPOINT
