"""Real vLLM requests, hashed as the engine hashes them."""

from __future__ import annotations

from typing import Any

from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

BLOCK = 4
HASH = get_hash_fn_by_name("sha256")


def real_request(tokens: int = 3 * BLOCK, image: str | None = None, lora: str | None = None, **extra: Any) -> Request:
    init_none_hash(HASH)
    features = []
    if image is not None:
        place = PlaceholderRange(offset=BLOCK, length=2)
        features = [MultiModalFeatureSpec(data=None, modality="image", identifier=image, mm_position=place)]
    return Request(
        request_id="r",
        prompt_token_ids=list(range(tokens)),
        sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None,
        mm_features=features,
        lora_request=LoRARequest(lora, 1, f"/adapters/{lora}") if lora is not None else None,
        block_hasher=get_request_block_hasher(BLOCK, HASH),
        **extra,
    )
