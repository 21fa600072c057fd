"""A worker's part in the fleet: lets peers read what it is told to export, and reads what peers keep for it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from dynamo_connectors.blocks import Namespace
from dynamo_connectors.config import KvbmConfig
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.hbm_rows import LEFT_FREE_BYTES, HbmRows
from dynamo_connectors.head_map import Heads
from dynamo_connectors.host_limits import read_secret
from dynamo_connectors.jobs import JobReport
from dynamo_connectors.peer_config import DEFAULT_PEER_HBM_GB, PeerConfig
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.transport.agent import GpuMemoryError, Region
from dynamo_connectors.transport.divided_peers import DividedPeerTier
from dynamo_connectors.transport.peer_tier import PeerSettings, PeerTier
from dynamo_connectors.transport.server import PeerServer, ServerSettings, host_rows
from dynamo_connectors.transport.tickets import Ticket
from dynamo_connectors.vllm.compat import engine_logger, hashes_end_with_process
from dynamo_connectors.vllm.groups import Geometry
from dynamo_connectors.vllm.handoff import Identity, Trust
from dynamo_connectors.vllm.messages import StepPlan
from dynamo_connectors.window import Window

log = engine_logger(__name__)

#: Late READs may hold this share of the rows that loads from peers pass through.
_QUARANTINE_SHARE = 0.5


class Shared(NamedTuple):
    """What a worker has for its peers. `device`: where the engine's pages lie; `heads`: in its rows, if known."""

    space: Namespace
    dram: DramStore
    device: torch.device
    heads: Heads | None = None


class WorkerPeers:
    """Called by the worker half only. The transports have threads of their own."""

    def __init__(self, peer: PeerConfig, rank: int, shared: Shared) -> None:
        space, dram, device, self._heads = shared
        self._peer = peer
        #: Rows in HBM that its peers' are read into.
        self.rows: HbmRows | None = None
        self._counts: Counter[tuple[str, str]] = Counter()
        self._rank = rank
        if self._heads is not None:
            space = replace(space, layout_fingerprint=self._heads.fingerprint(space.tp_size))
        #: One a rank, so that a reader says whom it expects at a port.
        self._space = space
        self._namespace = space.digest
        self._secret = read_secret(peer)
        self._tier: PeerTier | None = None
        self._server: PeerServer | None = None
        #: Lease -> the job that exports it.
        self._exports: dict[bytes, int] = {}
        if peer.reads:
            self.rows = self._hbm_rows(dram.row_bytes, device)
        if peer.serves:
            settings = ServerSettings(peer.host, peer.port + rank, self._namespace, self._secret, opens_shelf=True)
            self._server = self._serve(settings, dram, self._hbm_rows(dram.row_bytes, device))
            log.info("dynamo: peers may read this worker's host memory at %s:%d", peer.host, peer.port + rank)

    def make_tier(self, staging: DramStore, rows: HbmRows | None) -> PeerTier:
        """The peer tier, which reads into these."""
        region = Region(staging.rows.ctypes.data, staging.rows.nbytes)
        settings = PeerSettings(
            rank=self._rank,
            namespace=self._namespace,
            row_bytes=staging.row_bytes,
            secret=self._secret,
            deadline_seconds=self._peer.deadline_seconds,
            quarantine_bytes=int(region.num_bytes * _QUARANTINE_SHARE),
            window_quarantine_bytes=0 if rows is None else int(rows.region.num_bytes * _QUARANTINE_SHARE),
            workers=self._space.tp_size,
        )
        divide = partial(self._divided, settings)
        try:
            self._tier = DividedPeerTier(settings, [region] if rows is None else [region, rows.region], divide)
        except GpuMemoryError as error:
            self._no_window(error)
            if rows is not None:
                rows.close()
            self._tier = DividedPeerTier(settings, [region], divide)
        return self._tier

    def _divided(self, settings: PeerSettings, workers: int) -> list[PeerSettings]:
        """How the ranks of an engine with so many are read; none where this engine's heads are not to be had there."""
        if self._heads is None:
            return []
        return [
            replace(
                settings,
                rank=part.rank,
                namespace=replace(self._space, tp_rank=part.rank, tp_size=workers).digest,
                row_bytes=part.row_bytes,
                # As many rows late as with any other peer.
                quarantine_bytes=settings.quarantine_bytes * part.row_bytes // settings.row_bytes,
                parts=part.pieces,
                readers=part.readers,
            )
            for part in self._heads.parts(self._space.tp_rank, self._space.tp_size, workers)
        ]

    def _serve(self, settings: ServerSettings, dram: DramStore, rows: HbmRows | None) -> PeerServer:
        window = None if rows is None else Window(dram, rows)
        try:
            return PeerServer(settings, host_rows(dram, window))
        except BaseException as error:
            if window is not None:
                window.close()
            if not isinstance(error, GpuMemoryError):
                raise
            self._no_window(error)
        return PeerServer(settings, dram)

    def _hbm_rows(self, row_bytes: int, device: torch.device) -> HbmRows | None:
        """Memory that is asked for must be there; that which is only usual need not."""
        blocks = self._peer.hbm_bytes_on(device.type) // row_bytes
        try:
            if not blocks and self._peer.hbm_bytes:
                raise ConfigError(f"--kvbm-peer-hbm-gb is too small: one block takes {row_bytes / 1e6:.2f} MB")
            return HbmRows(blocks, row_bytes, device) if blocks else None
        except ConfigError as error:
            if self._peer.hbm_bytes is not None:
                raise
            self._no_window(error)
            return None

    def _no_window(self, error: Exception) -> None:
        log.warning("dynamo: KV goes to other engines, and comes from them, through host memory alone: %s", error)
        self._counts["nixl_windows_off", ""] += 1

    def start(self, plan: StepPlan) -> None:
        if self._server is not None:
            for lease in plan.announced:
                self._server.announce(lease)
            for job in plan.exports:
                self._exports[job.lease] = job.job_id
                self._server.export(job.lease, dict(job.slots))
        if plan.forget:  # after the plan's own exports: they may be of before
            self._isolate()
        if self._tier is not None:
            for encoded in plan.watch:
                self._tier.watch(Ticket.decode(encoded))
            for encoded in plan.unwatch:
                self._tier.unwatch(Ticket.decode(encoded))

    def _isolate(self) -> None:
        """Weights may have changed, and nobody knows to what: peers that fitted this engine fit it no more."""
        namespace = self._namespace + os.urandom(16)
        if self._server is not None:
            self._server.isolate(namespace)
        if self._tier is not None:
            self._tier.isolate(namespace)
        log.warning("dynamo: after a reset of its KV cache this engine hands KV over no more; restart it for that")

    def take_reports(self) -> list[JobReport]:
        """Exports that have ended."""
        if self._server is None:
            return []
        return [JobReport(self._exports.pop(lease), {}) for lease in self._server.take_ended()]

    def take_counts(self) -> Counter[tuple[str, str]]:
        counts, self._counts = self._counts, Counter()
        for part in (self._server, self._tier):
            if part is not None:
                counts += part.take_counts()
        return counts

    def levels(self) -> dict[str, int]:
        """What stands at a level now, by metric."""
        levels = {}
        if self._server is not None:
            levels["nixl_open_leases"] = self._server.open_leases
        if self._tier is not None:
            levels["nixl_quarantined_bytes"] = self._tier.quarantined_bytes
        return levels

    def close(self) -> None:
        """The server only: the tier belongs to the transfer engine."""
        if self._server is not None and not self._server.close():
            log.error("dynamo: peers are still served while this worker ends")

    def check(self) -> None:
        assert self._server is not None or not self._exports, "blocks are exported and nobody serves them"


def identity_of(config: KvbmConfig, vllm_config: Any) -> Identity | None:
    """Where this engine serves peers; None when it does not."""
    if not config.peer.serves:
        return None
    parallel = vllm_config.parallel_config
    engine_id = str(vllm_config.kv_transfer_config.engine_id)
    port, secret = _first_port(config, parallel), read_secret(config.peer)
    return Identity(engine_id, config.peer.host, port, parallel.world_size, secret)


def trust_of(config: KvbmConfig) -> Trust | None:
    """Whose blocks this engine may load; None when it loads nobody's."""
    return Trust(read_secret(config.peer), config.peer.is_local) if config.peer.reads else None


def worker_peers(config: KvbmConfig, vllm_config: Any, shared: Shared) -> WorkerPeers | None:
    if not config.peer.role:
        return None
    parallel = vllm_config.parallel_config
    if why := _why_undivided(config, vllm_config, shared):
        shared = shared._replace(heads=None)
        if parallel.rank == 0:
            log.info("dynamo: KV goes to and comes from engines of this --tensor-parallel-size only: %s", why)
    peer = replace(config.peer, port=_first_port(config, parallel))
    if peer.hbm_bytes is None and (why := _why_no_hbm(peer, vllm_config, shared.device)):
        log.info("dynamo: no HBM for blocks of peers, which pass through host memory: %s", why)
        peer = replace(peer, hbm_bytes=0)
    return WorkerPeers(peer, parallel.rank, shared)


def divides_heads(config: KvbmConfig, vllm_config: Any) -> bool:
    """Whether engines with other numbers of ranks may read this one's KV, or it theirs, if its pages lie right."""
    is_mla = getattr(vllm_config.model_config, "use_mla", False)
    return bool(config.peer.role) and config.compression is None and not is_mla


def _why_undivided(config: KvbmConfig, vllm_config: Any, shared: Shared) -> str:
    """Why this engine's heads cannot be divided anew among other numbers of ranks; empty when they can."""
    if not divides_heads(config, vllm_config):
        return "KV that is compressed, or of MLA, is not divided by heads"
    if shared.heads is None:
        return (
            "it is not plain attention in 16 or 32 bits whose heads lie one behind the other in each page "
            "(VLLM_KV_CACHE_LAYOUT=HND, and an attention backend that has it)"
        )
    if str(vllm_config.load_config.load_format) == "dummy":
        return "with --load-format dummy every rank makes up weights of its own"
    total = int(vllm_config.model_config.get_total_num_kv_heads())
    if any(page.heads * shared.space.tp_size != total for page in shared.heads.pages):
        return f"not every one of its {shared.space.tp_size} ranks has its own, even share of {total} KV heads"
    return ""


def _takes_memory_away(vllm_config: Any) -> bool:
    """vLLM unmaps what its sleep mode keeps, though peers read it."""
    model = vllm_config.model_config
    return any(getattr(model, flag, False) for flag in ("enable_sleep_mode", "enable_cumem_allocator"))


def _why_no_hbm(peer: PeerConfig, vllm_config: Any, device: torch.device) -> str:
    """Why the usual size is not taken here; empty when it is."""
    if _takes_memory_away(vllm_config):
        return "vLLM's sleep mode would take it away"
    if device.type != "cuda":
        return ""
    # What is free now is no measure: the engine takes some of it back in its first step.
    beside = (1 - float(vllm_config.cache_config.gpu_memory_utilization)) * torch.cuda.mem_get_info(device)[1]
    wanted = int(DEFAULT_PEER_HBM_GB * 1e9) + LEFT_FREE_BYTES
    if beside >= wanted:
        return ""
    return f"--gpu-memory-utilization leaves {beside / 1e9:.1f} GB, {wanted / 1e9:g} are wanted (or --kvbm-peer-hbm-gb)"


def check_role(config: KvbmConfig, vllm_config: Any, geometry: Geometry) -> None:
    """Raises `ConfigError` when this engine cannot hand KV over."""
    if not config.peer.role:
        return
    if len(geometry.groups) > 1 or geometry.has_windows:
        raise ConfigError(
            "--kvbm-role needs a model with one kind of attention: dynamo does not hand over the KV of sliding windows "
            "or several KV cache groups yet; start without --kvbm-role"
        )
    if config.peer.hbm_bytes and _takes_memory_away(vllm_config):
        raise ConfigError(
            "--kvbm-peer-hbm-gb does not go with vLLM's sleep mode, which unmaps that memory while peers read it; "
            "leave it out, and blocks pass through host memory, or drop --enable-sleep-mode"
        )
    if hashes_end_with_process(vllm_config.cache_config.prefix_caching_hash_algo):
        raise ConfigError(
            "--kvbm-role needs engines that name blocks alike, and this vLLM names them anew at every start; "
            "set PYTHONHASHSEED to the same number for all of them"
        )


def _first_port(config: KvbmConfig, parallel: Any) -> int:
    """Each data-parallel engine has its own ports."""
    return config.peer.port + int(getattr(parallel, "data_parallel_index", 0) or 0) * int(parallel.world_size)
