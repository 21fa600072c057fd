"""A tiny random model of Gemma 3's kind: two layers of full attention and four with a sliding window.

vLLM makes three KV cache groups of it, two of them windowed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tools.tiny_model import SPECIAL, VOCABULARY, make_model

WINDOW_TOKENS = 96


def make_hybrid_model(folder: Path, plain: Path) -> Path:
    """Writes the model, with the tokenizer of the `plain` one."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    make_model(plain)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain / name, folder / name)
    torch.manual_seed(20261122)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=WINDOW_TOKENS,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        max_position_embeddings=4096,
        query_pre_attn_scalar=64,
        initializer_range=0.2,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
        pad_token_id=SPECIAL.index("<unk>"),
    )
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
