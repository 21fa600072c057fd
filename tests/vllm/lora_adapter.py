"""A tiny random adapter (LoRA) for the tiny model of `tools/tiny_model.py`."""

from __future__ import annotations

import json
from pathlib import Path

_RANK, _WIDTH = 8, 0.2


def make_adapter(folder: Path, model: Path, seed: int) -> Path:
    """Changes the keys and values of every layer, and so the answers; returns `folder`."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 2 * _RANK, "target_modules": ["k_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "bias": "none", "lora_dropout": 0.0}))
    base = json.loads((model / "config.json").read_text())
    columns = base["hidden_size"]
    rows = columns // base["num_attention_heads"] * base["num_key_value_heads"]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * _WIDTH).to(torch.bfloat16)

    weights = {}
    for layer in range(base["num_hidden_layers"]):
        for name in settings["target_modules"]:
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = random(_RANK, columns)
            weights[f"{place}.lora_B.weight"] = random(rows, _RANK)
    save_file(weights, str(folder / "adapter_model.safetensors"))
    return folder
