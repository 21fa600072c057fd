"""The engines that are compared, as launch lines. Arms of one comparison differ in nothing but their tier."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.served.client import MODEL_NAME
from benchmarks.served.weights import LOAD_FORMAT
from tools.server_process import ServerProcess, free_port

GIB = 1 << 30
#: Host memory of a tier. vLLM's flag counts in GiB, ours in GB.
TIER_GIB = 28
DYNAMO = ("--kv-connector", "dynamo")

NONE, NATIVE, DYNAMO_ARM, FP8 = "none", "native", "dynamo", "dynamo_fp8"
#: Its loads arrive at once instead of layer by layer. For `prefix` only, and only where it is asked for.
AT_ONCE = "dynamo_at_once"
#: Those that are timed, the most telling first.
TIMED = (NONE, DYNAMO_ARM, NATIVE, FP8)
EXACT_REFERENCE, EXACT = "exact_reference", "exact_dynamo"


@dataclass(frozen=True)
class Arm:
    name: str
    #: HBM for KV. Sized by hand, because engines that start at the same time cannot measure what is free.
    kv_gib: float
    flags: tuple[str, ...] = ()
    hbm_blocks: int | None = None
    max_tokens: int = 40_960
    #: Bit-equal whatever else is in the batch (vLLM's own mode): needed to compare answers, too slow to time.
    batch_invariant: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """Where the arms run."""

    model: Path
    logs: Path
    tiny: bool
    extra_flags: Sequence[str] = ()
    import_path: Sequence[Path] = field(default_factory=tuple)


def gpu_arms(disk: Path) -> list[Arm]:
    """The timed ones fit on one H200 together, two of them on one H100."""
    dram_gb = round(TIER_GIB * GIB / 1e9, 3)
    exact = (*DYNAMO, *_tier_flags(disk / EXACT, 10, 33), *_EAGER_DISK)
    return [
        Arm(NONE, 12),
        Arm(NATIVE, 12, ("--kv-offloading-size", str(TIER_GIB))),
        Arm(DYNAMO_ARM, 12, (*DYNAMO, *_tier_flags(disk / DYNAMO_ARM, dram_gb, 20))),
        Arm(
            AT_ONCE,
            12,
            (*DYNAMO, *_tier_flags(disk / AT_ONCE, dram_gb, 20)),
            variables={"DYNAMO_KVBM_BY_LAYERS": "off"},
        ),
        Arm(EXACT_REFERENCE, 7, max_tokens=2_048, batch_invariant=True),
        # HBM for about 27 of the 32 requests, DRAM for a third of what they leave behind.
        Arm(EXACT, 2, exact, hbm_blocks=700, max_tokens=10_240, batch_invariant=True),
        Arm(FP8, 12, (*DYNAMO, *_tier_flags(disk / FP8, dram_gb, 20), "--kvbm-compression", "fp8")),
    ]


def tiny_arms(disk: Path) -> list[Arm]:
    """vLLM's own offloading needs a GPU."""
    compressed = (*DYNAMO, *_tier_flags(disk / FP8, 0.012, 0.03), "--kvbm-compression", "fp8")
    exact = (*DYNAMO, *_tier_flags(disk / EXACT, 0.008, 0.04), *_EAGER_DISK)
    return [
        Arm(NONE, 0, hbm_blocks=80),
        Arm(DYNAMO_ARM, 0, (*DYNAMO, *_tier_flags(disk / DYNAMO_ARM, 0.012, 0.03)), hbm_blocks=80),
        Arm(FP8, 0, compressed, hbm_blocks=80),
        Arm(EXACT_REFERENCE, 0, hbm_blocks=300),
        Arm(EXACT, 0, exact, hbm_blocks=40, max_tokens=1_024),
    ]


#: Of an engine beside its KV: weights in bfloat16, activations, graphs, its context.
_ENGINE_GIB = 20
#: What an engine must find free beyond that, at the least.
_SPARE_GIB = 2


def waves(arms: Sequence[Arm], gpu_bytes: int | None) -> list[list[Arm]]:
    """`arms` in order, as many at a time as the GPU holds; all at once without one."""
    found: list[list[Arm]] = []
    left = 0.0
    for arm in arms:
        needed = _ENGINE_GIB + arm.kv_gib
        if not found or (gpu_bytes is not None and needed > left):
            found.append([])
            left = (gpu_bytes or 0) / GIB - _SPARE_GIB
        found[-1].append(arm)
        left -= needed
    return found


#: Every block goes to disk at once, and is read from there even where computing it again were faster.
_EAGER_DISK = ("--kvbm-nvme-min-touches", "1", "--kvbm-load-gate", "off")


def _tier_flags(folder: Path, dram_gb: float, disk_gb: float) -> tuple[str, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    tiers = ("--kvbm-storage-tiers", "hbm,host_dram,nvme_ssd", "--kvbm-host-dram-gb", str(dram_gb))
    return (*tiers, "--kvbm-nvme-path", str(folder), "--kvbm-nvme-gb", str(disk_gb))


def server(arm: Arm, site: Site) -> ServerProcess:
    """The arm's engine, not started yet."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(site.model),
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL_NAME, "--dtype", "bfloat16",
        *(_tiny_flags(arm) if site.tiny else _gpu_flags(arm)), *site.extra_flags, *arm.flags,
    ]  # fmt: skip
    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "PYTHONPATH": os.pathsep.join([*map(str, site.import_path), os.environ.get("PYTHONPATH", "")]),
        **arm.variables,
    }
    if site.tiny:
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    elif arm.batch_invariant:
        env |= {"VLLM_BATCH_INVARIANT": "1"}
    return ServerProcess(arm.name, command, f"http://127.0.0.1:{port}", site.logs / f"{arm.name}.log", env)


#: Decode runs from CUDA graphs, as in production, without the minute that compiling takes.
_GRAPHS = (
    '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32, 40, 64]}'
)


def _gpu_flags(arm: Arm) -> list[str]:
    flags = [
        "--load-format", LOAD_FORMAT,
        "--max-model-len", str(arm.max_tokens),
        "--max-num-batched-tokens", "8192",
        "--max-num-seqs", "64",
        "--gpu-memory-utilization", "0.1",
        "--kv-cache-memory-bytes", str(int(arm.kv_gib * GIB)),
        *(("--enforce-eager",) if arm.batch_invariant else ("--compilation-config", _GRAPHS)),
    ]  # fmt: skip
    if arm.hbm_blocks is not None:
        flags += ["--num-gpu-blocks-override", str(arm.hbm_blocks)]
    return flags


def _tiny_flags(arm: Arm) -> list[str]:
    return [
        "--block-size", "32",
        "--max-model-len", str(min(arm.max_tokens, 2_048)),
        "--max-num-batched-tokens", "512",
        "--num-gpu-blocks-override", str(arm.hbm_blocks),
        "--enforce-eager",
    ]  # fmt: skip
