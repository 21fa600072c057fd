"""Models and parallelism that cannot be tiered are refused by name: better no server than wrong or useless KV."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from dynamo_kernels.compression import Codec, Compression, HeadLayout
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SlidingWindowSpec,
)

from dynamo_connectors.blocks import Namespace
from dynamo_connectors.config import parse_config
from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.tiers.nvme import NvmeStore, slot_bytes
from dynamo_connectors.vllm import setup
from dynamo_connectors.vllm.compat import log_where_the_engine_logs, page_readers
from dynamo_connectors.vllm.groups import Geometry, Group
from dynamo_connectors.vllm.kv_pages import Pages
from dynamo_connectors.vllm.setup import check_model

SHAPE: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
FULL = FullAttentionSpec(**SHAPE)
LARGE = FullAttentionSpec(**{**SHAPE, "block_size": 48})
SLIDING = SlidingWindowSpec(**SHAPE, sliding_window=128)
LOCAL = ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=64)
GAP = RSWASpec(**SHAPE, rswa_window=128)
MAMBA = MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,))


def configs(
    *specs: Any, prefix_caching: bool = True, hash_tokens: int | None = None, **parallel: int
) -> tuple[Any, Any]:
    sizes = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    sizes.update(parallel)
    model = SimpleNamespace(is_prefix_caching_supported=prefix_caching)
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=["layer"]) for spec in specs]
    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(**sizes), model_config=model)
    return vllm_config, SimpleNamespace(kv_cache_groups=groups, hash_block_size=hash_tokens)


@pytest.mark.parametrize("specs", [(FULL,), (FULL, FULL), (SLIDING,), (FULL, SLIDING, SLIDING), (FULL, LARGE)])
def test_full_attention_and_windows_are_taken(specs: tuple[Any, ...]) -> None:
    check_model(*configs(*specs))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (configs(), "no KV cache"),
        (configs(FULL, LOCAL), "ChunkedLocalAttentionSpec"),
        (configs(FULL, MAMBA), "MambaSpec"),
        (configs(GAP), "RSWASpec"),
        (configs(FULL, LARGE, hash_tokens=48), "blocks of 16, 48 tokens"),
        (configs(FULL, pipeline_parallel_size=2), "--pipeline-parallel-size"),
        # A block of the scheduler then spans several blocks of a worker, so blocks would be taken for full too early.
        (configs(FULL, decode_context_parallel_size=2), "--decode-context-parallel-size"),
        (configs(FULL, prefill_context_parallel_size=2), "--prefill-context-parallel-size"),
        # Pooling over all tokens (MEAN, CLS): on 0.32 the first hit is a fatal error in the worker.
        (configs(FULL, prefix_caching=False), "prefix caching"),
    ],
)
def test_what_cannot_be_tiered_is_refused_by_name(given: tuple[Any, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_model(*given)


@pytest.mark.parametrize("specs", [(SLIDING,), (FULL, SLIDING), (FULL, FULL)])
def test_windows_need_an_engine_that_tells_what_they_have_left(
    specs: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "tells_block_tables", lambda: False)
    check_model(*configs(FULL))
    with pytest.raises(ConfigError, match=r"0\.32 or newer"):
        check_model(*configs(*specs))


def test_host_memory_of_a_gpu_is_pinned_on_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, made = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: {gpu: "the GPU"}[device])
    monkeypatch.setattr(setup, "nearest_node", lambda properties: {"the GPU": 3}[properties])
    monkeypatch.setattr(setup, "DramStore", lambda *arguments: made.append(arguments))
    for device in (gpu, torch.device("cpu")):
        setup._host_memory(8, SimpleNamespace(view=SimpleNamespace(device=device), row_bytes=64))
    assert made == [(8, 64, setup.pin_host_memory, 3), (8, 64)]


def test_another_draft_model_in_its_place_is_another_model(tmp_path: Path) -> None:
    for name in ("model", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"first")
    model, draft = (SimpleNamespace(model=str(tmp_path / name), revision=None, seed=0) for name in ("model", "draft"))
    drafter = SimpleNamespace(draft_model_config=draft)
    load = SimpleNamespace(load_format="auto")
    config = SimpleNamespace(model_config=model, load_config=load, speculative_config=drafter)
    before = setup._weights(config)
    assert setup._weights(config) == before
    (tmp_path / "draft" / "model.safetensors").write_bytes(b"other")
    assert setup._weights(config) != before


def test_pages_that_another_backend_or_instruction_set_packed_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their shapes and strides may be the same, so the layout alone cannot tell."""

    def readers(backend: str, device: str) -> list[str]:
        layer = SimpleNamespace(get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend))
        layers = SimpleNamespace(static_forward_context={"layer": layer, "mlp": object()})
        return page_readers(SimpleNamespace(compilation_config=layers), torch.device(device))

    assert readers("ONE", "cuda") != readers("OTHER", "cuda")
    assert readers("ONE", "cuda") == readers("ONE", "cuda")
    found = []
    for has_amx in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        found.append(readers("CPU_ATTN", "cpu"))
    assert found[0] != found[1]


def test_rooms_without_an_engine_log_where_vllm_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ours = logging.getLogger("vllm"), logging.getLogger("dynamo_connectors")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(engine, "handlers", [handler])
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr(ours, "level", ours.level)
    monkeypatch.setattr(engine, "level", logging.INFO)
    log_where_the_engine_logs()
    log_where_the_engine_logs()
    logging.getLogger("dynamo_connectors.tiers.nvme").info("a slab starts empty")
    assert lines == ["a slab starts empty"]


MLA = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("given", "words"),
    [(configs(FULL, SLIDING), "2 groups"), (configs(MLA), "MLAAttentionSpec"), (configs(FULL, FULL), "2 groups")],
)
def test_what_cannot_be_compressed_is_tiered_as_it_is_and_refused_with_compression(
    given: tuple[Any, Any], words: str
) -> None:
    check_model(*given)
    with pytest.raises(ConfigError, match=words) as caught:
        check_model(*given, "fp8")
    assert "start without --kvbm-compression" in str(caught.value)


def test_compressed_bytes_are_in_namespaces_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "_weights", lambda config: "the same")
    model = SimpleNamespace(model="m", revision=None, dtype="bfloat16", compute_hash=lambda: "h")
    config = SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(rank=0, tensor_parallel_size=1),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    layout = HeadLayout(torch.bfloat16, (2, 2, 16, 64), (0, 1))
    view = SimpleNamespace(device=torch.device("cpu"))
    geometry = Geometry((Group(16),), 16)
    codecs = (None, *(Codec(kind, (layout,)) for kind in Compression))
    pages = [Pages(view, "print", codec) for codec in codecs]  # type: ignore[arg-type]
    assert len({setup.namespace(config, geometry, each).digest for each in pages}) == 3


@pytest.mark.parametrize(
    ("capability", "kind", "is_refused"), [((8, 0), "fp8", True), ((8, 0), "int8", False), ((8, 9), "fp8", False)]
)
def test_a_gpu_without_fp8_is_told_so_at_start(
    capability: tuple[int, int], kind: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    layout = HeadLayout(torch.bfloat16, (2, 2, 16, 64), (0, 1))
    view = SimpleNamespace(device=torch.device("cuda", 0))
    pages = Pages(view, "print", Codec(Compression(kind), (layout,)))  # type: ignore[arg-type]
    if is_refused:
        with pytest.raises(ConfigError, match="write --kvbm-compression int8"):
            setup._refuse_old_gpu(pages)
    else:
        setup._refuse_old_gpu(pages)


def test_a_disk_that_breaks_while_it_is_probed_is_let_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever comes next gets the slab; what would be left behind of threads and files, the house finds."""
    pages = SimpleNamespace(
        view=SimpleNamespace(device=torch.device("cpu"), part_bytes=(64,)),
        codec=None,
        row_bytes=64,
        fingerprint="print",
    )
    space = Namespace("vllm", "m", "", "bf16", "print", 16, weights="the same")
    instead = {
        "read_pages": pages,
        "read_geometry": Geometry((Group(16),), 16),
        "planned_row_bytes": 64,
        "prepare_cpu": None,
        "namespace": space,
    }
    for name, value in instead.items():
        monkeypatch.setattr(setup, name, lambda *_, value=value: value)

    def broken(disk: NvmeStore) -> float:
        raise StoreError("read_failed", "it is gone")

    monkeypatch.setattr(setup, "read_rate", broken)
    parallel = SimpleNamespace(parallel_config=SimpleNamespace(world_size=1))
    tiers = {"kvbm_storage_tiers": "hbm,host_dram,nvme_ssd", "kvbm_host_dram_gb": 0.001, "kvbm_nvme_gb": 1e-4}
    config = parse_config({**tiers, "kvbm_nvme_path": str(tmp_path)})
    with pytest.raises(StoreError, match="it is gone"):
        setup.build_worker_half(config, parallel, None, {})
    NvmeStore(tmp_path, int(1e5) // slot_bytes(64), 64, space).close()
    assert len(list(tmp_path.glob("*.slab"))) == 1
