"""Makes a tiny random Llama-shaped model on disk: real engines load it in seconds, and its answers are repeatable.

python tools/tiny_model.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

VOCABULARY = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def make_model(folder: Path, max_tokens: int = 8192, width: float = 0.2) -> Path:
    """Writes the model unless it is already there; returns `folder`. `width` is that of the random weights."""
    done = folder / "complete"
    if done.is_file() and done.read_text() == f"{max_tokens} {width}":
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, max_tokens)
    _write_weights(folder, max_tokens, width)
    done.write_text(f"{max_tokens} {width}")
    return folder


def _write_tokenizer(folder: Path, max_tokens: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = SPECIAL + alphabet
    # Two-letter merges fill the vocabulary, so that text takes fewer tokens than bytes.
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = [("Ġ", letter) for letter in letters]
    merges += [(first, second) for first in letters for second in "aeiourstnl"]
    merges = merges[: VOCABULARY - len(words)]
    words += ["".join(pair) for pair in merges]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": max_tokens,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _write_weights(folder: Path, max_tokens: int, width: float) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(20261122)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_tokens,
        # Random weights of the usual size give nearly equal logits; wider ones make wrong KV show up in the tokens.
        initializer_range=width,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    make_model(Path(sys.argv[1]))
