"""The model folder for the GPU, and weights under which wrong KV changes the answer.

vLLM's own dummy weights lie within 0.001, its norms too: the attention of such a model is smaller than the rounding of
what it is added to, so that any KV gives the same tokens. `spread_dummy` draws them as wide as a fresh Llama's.
"""

from __future__ import annotations

import json
from pathlib import Path

LOAD_FORMAT = "spread_dummy"
#: Uniform with the standard deviation of 0.02 that Llama's `initializer_range` names.
_WIDEST = 0.02 * 3**0.5
_VOCABULARY = 128_256


def make_model(folder: Path) -> Path:
    """Llama-3.1-8B's shape, and a tokenizer with a word for each id."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": _VOCABULARY,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    vocabulary = {f"w{index}": index for index in range(_VOCABULARY)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w2")).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "w0",
        "eos_token": "w1",
        "unk_token": "w2",
        "model_max_length": 131_072,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return folder


def make_plugin(folder: Path) -> Path:
    """Installation metadata through which every process of vLLM calls `register`; `folder` goes on PYTHONPATH."""
    metadata = folder / "dynamo_bench_weights-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dynamo-bench-weights\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\nbench_weights = {__name__}:register\n",
    )
    return folder


def register() -> None:
    import torch
    from vllm.model_executor.model_loader import DummyModelLoader, register_model_loader
    from vllm.model_executor.model_loader.weight_utils import initialize_dummy_weights

    class SpreadDummyLoader(DummyModelLoader):
        def load_weights(self, model: torch.nn.Module, model_config: object) -> None:
            initialize_dummy_weights(model, model_config, low=-_WIDEST, high=_WIDEST)
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.data.fill_(1.0)

    register_model_loader(LOAD_FORMAT)(SpreadDummyLoader)
