"""A Llama of random weights, small enough for a CPU test and the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 512
_LAYERS, _HIDDEN, _HEADS, _KV_HEADS, _INNER = 4, 128, 4, 2, 256
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HIDDEN // _HEADS,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def write_tiny_model(folder: Path, seed: int = 7) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w0", "eos_token": "w1", "unk_token": "w2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    save_file(_weights(seed), str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def _weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        # Wide enough that attention over the prompt decides the next token: a wrong page changes the answer.
        return (torch.randn(*shape, generator=generator) * 2.0 * shape[-1] ** -0.5).to(torch.bfloat16)

    def ones() -> torch.Tensor:
        return torch.ones(_HIDDEN, dtype=torch.bfloat16)

    kv = _HIDDEN // _HEADS * _KV_HEADS
    weights = {
        "model.embed_tokens.weight": random(VOCABULARY, _HIDDEN),
        "lm_head.weight": random(VOCABULARY, _HIDDEN),
        "model.norm.weight": ones(),
    }
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": ones(),
            prefix + "post_attention_layernorm.weight": ones(),
            prefix + "self_attn.q_proj.weight": random(_HIDDEN, _HIDDEN),
            prefix + "self_attn.k_proj.weight": random(kv, _HIDDEN),
            prefix + "self_attn.v_proj.weight": random(kv, _HIDDEN),
            prefix + "self_attn.o_proj.weight": random(_HIDDEN, _HIDDEN),
            prefix + "mlp.gate_proj.weight": random(_INNER, _HIDDEN),
            prefix + "mlp.up_proj.weight": random(_INNER, _HIDDEN),
            prefix + "mlp.down_proj.weight": random(_HIDDEN, _INNER),
        }
    return weights
