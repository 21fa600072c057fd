"""Models of random weights, small enough for a CPU test and the same every time.

A Llama; one whose KV is latent (MLA); one with sliding windows, whose KV SGLang keeps in a pool of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 512
_LAYERS, _HIDDEN, _HEADS, _KV_HEADS, _INNER = 4, 128, 4, 2, 256
_HEAD = _HIDDEN // _HEADS
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HEAD,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
_LATENT = 128
_LATENT_CONFIG = {
    **_CONFIG,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_key_value_heads": _HEADS,
    "kv_lora_rank": _LATENT,
    "q_lora_rank": None,
    "qk_rope_head_dim": _HEAD,
    "qk_nope_head_dim": _HEAD,
    "v_head_dim": _HEAD,
    # No layer has experts, and yet the model asks how many.
    "first_k_dense_replace": _LAYERS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "attention_bias": False,
    # The one rotation that SGLang has for MLA on a CPU.
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "deepseek_yarn",
        "factor": 1.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
WINDOW_TOKENS = 96
_WINDOW_CONFIG = {
    **_CONFIG,
    "architectures": ["LagunaForCausalLM"],
    "model_type": "laguna",
    "sliding_window": WINDOW_TOKENS,
    "layer_types": ["sliding_attention", "full_attention"] * (_LAYERS // 2),
    "mlp_layer_types": ["dense"] * _LAYERS,
    "num_experts": 4,
    "gating": "disabled",
    "pad_token_id": 2,
}
_CHAT_TEMPLATE = "{% for message in messages %}w003 {{ message['content'] }} w004 {% endfor %}w005"
Tensors = dict[str, torch.Tensor]
Random = Callable[..., torch.Tensor]


def write_tiny_model(folder: Path, seed: int = 7) -> Path:
    return _write(folder, seed, _CONFIG, _plain_attention)


def write_latent_model(folder: Path, seed: int = 7) -> Path:
    return _write(folder, seed, _LATENT_CONFIG, _latent_attention)


def write_window_model(folder: Path, seed: int = 7) -> Path:
    return _write(folder, seed, _WINDOW_CONFIG, _window_attention)


def _plain_attention(random: Random) -> Tensors:
    kv = _HEAD * _KV_HEADS
    return {
        "q_proj": random(_HIDDEN, _HIDDEN),
        "k_proj": random(kv, _HIDDEN),
        "v_proj": random(kv, _HIDDEN),
        "o_proj": random(_HIDDEN, _HIDDEN),
    }


def _window_attention(random: Random) -> Tensors:
    return {**_plain_attention(random), "q_norm": _ones(_HEAD), "k_norm": _ones(_HEAD)}


def _latent_attention(random: Random) -> Tensors:
    return {
        "q_proj": random(_HEADS * 2 * _HEAD, _HIDDEN),
        "kv_a_proj_with_mqa": random(_LATENT + _HEAD, _HIDDEN),
        "kv_a_layernorm": _ones(_LATENT),
        "kv_b_proj": random(_HEADS * 2 * _HEAD, _LATENT),
        "o_proj": random(_HIDDEN, _HEADS * _HEAD),
    }


def _write(folder: Path, seed: int, config: dict[str, Any], attention: Callable[[Random], Tensors]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    words = {word(number): number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=word(2)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": word(0), "eos_token": word(1), "unk_token": word(2), "chat_template": _CHAT_TEMPLATE}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    save_file(_weights(seed, attention), str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def word(token: int) -> str:
    """The text of a token. None is a part of another's: tokenisers look for special ones anywhere."""
    return f"w{token:03}"


def _ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


def _weights(seed: int, attention: Callable[[Random], Tensors]) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        # Wide enough that attention over the prompt decides the next token: a wrong page changes the answer.
        return (torch.randn(*shape, generator=generator) * 2.0 * shape[-1] ** -0.5).to(torch.bfloat16)

    weights = {
        "model.embed_tokens.weight": random(VOCABULARY, _HIDDEN),
        "lm_head.weight": random(VOCABULARY, _HIDDEN),
        "model.norm.weight": _ones(_HIDDEN),
    }
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": _ones(_HIDDEN),
            prefix + "post_attention_layernorm.weight": _ones(_HIDDEN),
        }
        weights |= {f"{prefix}self_attn.{name}.weight": weight for name, weight in attention(random).items()}
        weights |= {
            prefix + "mlp.gate_proj.weight": random(_INNER, _HIDDEN),
            prefix + "mlp.up_proj.weight": random(_INNER, _HIDDEN),
            prefix + "mlp.down_proj.weight": random(_HIDDEN, _INNER),
        }
    return weights
