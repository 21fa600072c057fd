"""A tiny random model of BLIP-2's kind: an image becomes 64 tokens before the text. And adapters (LoRA) for it."""

from __future__ import annotations

import json
from pathlib import Path

from tools.tiny_model import SPECIAL, VOCABULARY, make_model

IMAGE_TOKENS, IMAGE_PIXELS = 64, 112
_HIDDEN, _LAYERS, _RANK, _WIDTH = 256, 4, 8, 0.2


def make_image_model(folder: Path) -> Path:
    """Writes the model; returns `folder`."""
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    make_model(folder)
    _write_processor(folder)
    torch.manual_seed(20261128)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "model_type": "opt",
        "vocab_size": VOCABULARY + 64,
        "hidden_size": _HIDDEN,
        "word_embed_proj_dim": _HIDDEN,
        "ffn_dim": 512,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "init_std": _WIDTH,
        "bos_token_id": SPECIAL.index("<s>"),
        "eos_token_id": SPECIAL.index("</s>"),
        "pad_token_id": SPECIAL.index("<unk>"),
    }
    config = Blip2Config(
        vision_config={**small, "image_size": IMAGE_PIXELS, "patch_size": 14, "initializer_range": _WIDTH},
        qformer_config={**small, "encoder_hidden_size": 64, "cross_attention_frequency": 1, "vocab_size": VOCABULARY},
        text_config=text,
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=VOCABULARY,
        initializer_range=_WIDTH,
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    (folder / "model.safetensors").unlink()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _write_processor(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    assert tokenizer.token_to_id("<image>") == VOCABULARY
    tokenizer.save(str(folder / "tokenizer.json"))
    size = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    image = {"image_processor_type": "BlipImageProcessor", "size": size, "processor_class": "Blip2Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    whole = {"processor_class": "Blip2Processor", "num_query_tokens": None}
    (folder / "processor_config.json").write_text(json.dumps(whole))


def make_adapter(folder: Path, seed: int) -> Path:
    """Changes the keys and values of every layer, and so the answers; returns `folder`."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 2 * _RANK, "target_modules": ["k_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "bias": "none", "lora_dropout": 0.0}))
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * _WIDTH).to(torch.bfloat16)

    weights = {}
    for layer in range(_LAYERS):
        for name in ("k_proj", "v_proj"):
            place = f"base_model.model.language_model.model.decoder.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = random(_RANK, _HIDDEN)
            weights[f"{place}.lora_B.weight"] = random(_HIDDEN, _RANK)
    save_file(weights, str(folder / "adapter_model.safetensors"))
    return folder
