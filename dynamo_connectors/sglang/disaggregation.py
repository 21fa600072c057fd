"""`--disaggregation-transfer-backend dynamo`: SGLang's own bootstrap, rooms and states, and our transport below them.

The decode worker reads the prefill worker's pages (SGLang's own backends let prefill write). So everything that may
still write to a page is known where the page is: SGLang holds an aborted request's pages until its READ has ended.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll, KVTransferDestination
from sglang.srt.disaggregation.common.conn import (
    CommonKVBootstrapServer,
    CommonKVManager,
    CommonKVReceiver,
    CommonKVSender,
)
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.utils import is_cpu

from dynamo_connectors.blocks import Namespace
from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.peer_config import is_this_host
from dynamo_connectors.sglang import compat
from dynamo_connectors.sglang.handoff_layout import METADATA_KEY, EngineLayout, layout_of, page_key
from dynamo_connectors.sglang.handoff_lookup import Lookups, ask
from dynamo_connectors.sglang.handoff_metrics import HandoffMeter
from dynamo_connectors.sglang.handoff_settings import BACKEND, BACKEND_FLAG, told_handoff
from dynamo_connectors.sglang.handoff_wire import (
    DELIVERED,
    OFFERED,
    WAITING,
    WANTED,
    PageReader,
    PageServer,
    RoomRead,
    lease_of,
)
from dynamo_connectors.transport.peer_tier import PeerSettings
from dynamo_connectors.transport.server import ServerSettings
from dynamo_connectors.transport.tickets import Ticket

_HERE = "127.0.0.1"
#: Readers renew a lease every 5 s.
_LEAST_LEASE_SECONDS = 10.0
#: Late READs may hold this part of the pages before they are ended by force.
_QUARANTINE_PART = 8
_STATES = {
    WAITING: KVPoll.Bootstrapping,
    WANTED: KVPoll.WaitingForInput,
    OFFERED: KVPoll.Transferring,
    DELIVERED: KVPoll.Success,
}
_IN_USE = "its bootstrap_room is in use by another request; give every attempt a new one"
#: After these the prefill engine is looked up anew.
_GONE = ("unreachable", "unavailable", "restarted", "refused", "disconnected", "closed", "gone")


class DynamoKVManager(CommonKVManager):
    supports_deferred_decode_kv_release = True

    def __init__(self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool = False) -> None:
        if not is_cpu():
            raise ConfigError(f"{BACKEND_FLAG} {BACKEND} works on SGLang's CPU engine only so far; use nixl")
        if args.state_types:
            raise ConfigError(f"{BACKEND_FLAG} {BACKEND} hands over plain attention KV only, not {args.state_types}")
        self.config = told_handoff(os.environ)
        self.layout = _layout(args)
        self.page_server: PageServer | None = None
        self.page_reader: PageReader | None = None
        self._meter = HandoffMeter() if getattr(server_args, "enable_metrics", False) else None
        self._owners: dict[str, tuple[str, int]] = {}
        self._lookups = Lookups(self._look_up)
        self._held: dict[int, list[RoomRead]] = {}
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        # The engine's own control socket believes everybody, and nobody of ours talks to it.
        self.server_socket.close(linger=0)
        if disaggregation_mode == DisaggregationMode.DECODE:
            settings = PeerSettings(
                rank=0,
                namespace=self._namespace(),
                row_bytes=self.layout.row_bytes,
                secret=self.config.secret(),
                deadline_seconds=self.config.deadline_seconds,
                quarantine_bytes=self.layout.row_bytes * self.layout.pages // _QUARANTINE_PART,
            )
            self.page_reader = PageReader(settings, self.layout, self._meter)

    # -- prefill -----------------------------------------------------------------------------------------------------

    def register_to_bootstrap(self) -> None:
        """The port that decode engines are told of is ours."""
        if self.config.is_local:
            self.local_ip = _HERE
        lease_seconds = max(self.config.deadline_seconds, _LEAST_LEASE_SECONDS)
        settings = ServerSettings(self.local_ip, 0, self._namespace(), self.config.secret(), lease_seconds)
        self.page_server = PageServer(settings, self.layout, self._meter)
        self.rank_port = self.page_server.port
        super().register_to_bootstrap()

    # -- decode ------------------------------------------------------------------------------------------------------

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """As the engine's, but a prefill engine that stands still, or does not fit, harms its own requests only."""
        if not self._is_known(bootstrap_addr):
            self._lookups.attempt(bootstrap_addr)
        return self._is_known(bootstrap_addr)

    def owner_of(self, bootstrap_addr: str) -> tuple[str, int] | None:
        return self._owners.get(bootstrap_addr)

    def forget(self, bootstrap_addr: str) -> None:
        """It is asked again what it is when the next request comes."""
        self.prefill_info_table.pop(bootstrap_addr, None)
        self._owners.pop(bootstrap_addr, None)

    def hold(self, room: int, reads: list[RoomRead]) -> None:
        self._held[room] = reads

    def is_held(self, room: int) -> bool:
        return room in self._held

    def is_abort_release_safe(self, bootstrap_room: int, required_acks: int) -> bool:
        return all(read.has_ended for read in self._held.get(bootstrap_room, ()))

    def clear_deferred_abort_state(self, bootstrap_room: int) -> None:
        self._held.pop(bootstrap_room, None)

    def _is_known(self, bootstrap_addr: str) -> bool:
        return bootstrap_addr in self._owners and bootstrap_addr in self.prefill_info_table

    def _look_up(self, bootstrap_addr: str) -> None:
        try:
            host = bootstrap_addr.rpartition(":")[0].strip("[]")
            if self.config.is_local and not is_this_host(host):
                raise ConfigError("without --kvbm-peer-secret-file no other host is asked")
            super().try_ensure_parallel_info(bootstrap_addr)
            self._owners[bootstrap_addr] = self._find_owner(bootstrap_addr)
        except Exception:
            self.prefill_info_table.pop(bootstrap_addr, None)
            raise

    def _find_owner(self, bootstrap_addr: str) -> tuple[str, int]:
        """Where the prefill worker of our rank listens."""
        url = f"http://{bootstrap_addr}/route"
        facts = self.prefill_info_table.get(bootstrap_addr)
        if facts is None:
            raise StoreError("unreachable", "its bootstrap server does not say what it is")
        shape = {"attn_tp_size": self.attn_tp_size, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1}
        for name, wanted in shape.items():
            if getattr(facts, name) != wanted:
                raise ConfigError(f"its {name} is not {wanted}; start both engines alike")
        others = dict.fromkeys(("prefill_dp_rank", "prefill_cp_rank", "target_pp_rank"), 0)
        rank = ask(url, {**others, "target_tp_rank": self.attn_tp_rank})
        host, port = str(rank["rank_ip"]), int(rank["rank_port"])
        if self.config.is_local and not is_this_host(host):
            raise ConfigError(f"it lies at {host}, and without --kvbm-peer-secret-file no other host is asked")
        Ticket.decode(Ticket(host, port, lease_of(0)).encode())  # raises for what no ticket can say
        return host, port

    def _namespace(self) -> bytes:
        facts = compat.engine_facts()
        return Namespace(
            engine="sglang",
            model=facts["model"],
            revision=facts["revision"],
            dtype=str(self.kv_cache_dtype_str),
            layout_fingerprint=f"{self.layout.page_bytes} {self.layout.metadata_bytes} {self.kv_layout}",
            block_size_tokens=int(self.kv_args.page_size),
            tp_rank=self.attn_tp_rank,
            tp_size=self.attn_tp_size,
            key_rules=facts["key_rules"],
            weights=facts["weights"],
        ).digest


class DynamoKVSender(CommonKVSender):
    """A room of the prefill worker."""

    conclude_state: Any
    _transfer_start_time: float | None

    def __init__(self, mgr: Any, bootstrap_addr: str, bootstrap_room: int, *more: Any, **options: Any) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room, *more, **options)
        self._lease = lease_of(bootstrap_room)
        self._pages: list[int] = []
        #: A room serves one request; another one's is neither offered nor ended from here.
        self._is_ours = self._is_open = mgr.page_server.open_room(self._lease)
        if not self._is_ours:
            mgr.record_failure(bootstrap_room, _IN_USE)
            self.conclude_state = KVPoll.Failed

    def send(self, kv_indices: Any, state_indices: Any = None, *_: Any, **__: Any) -> None:
        if self.conclude_state is not None:
            return
        kv_indices, _slice, is_last, should_skip = self._prepare_send_indices(kv_indices, state_indices)
        if should_skip:
            return
        if self._transfer_start_time is None:
            self._transfer_start_time = time.perf_counter()
        self._pages += [int(page) for page in kv_indices]
        self._record_transfer_indices(kv_indices, state_indices)
        if is_last:
            slots = {page_key(position): page for position, page in enumerate(self._pages)}
            slots[METADATA_KEY] = self.kv_mgr.layout.metadata_slot(int(self.aux_index))
            self.kv_mgr.page_server.offer(self._lease, slots)

    def poll(self) -> Any:
        if self.conclude_state is not None:
            return self.conclude_state
        state, why = self.kv_mgr.page_server.look(self._lease)
        if state is None:
            self.kv_mgr.record_failure(self.bootstrap_room, _why_no_room(why))
            self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Failed)
            self.conclude_state = KVPoll.Failed
        elif state == DELIVERED:
            self.conclude_state = KVPoll.Success
            self._transfer_metric.transfer_latency_s = time.perf_counter() - (self._transfer_start_time or 0.0)
        return KVPoll.Failed if state is None else _STATES[state]

    def clear(self) -> None:
        self._close()
        if self._is_ours:
            super().clear()

    def abort(self) -> None:
        self._close()
        if self._is_ours:
            super().abort()

    def _close(self) -> None:
        """Once: by now the room may be a later request's."""
        if self._is_open:
            self._is_open = False
            self.kv_mgr.page_server.close_room(self._lease)


class DynamoKVReceiver(CommonKVReceiver):
    """A room of the decode worker."""

    conclude_state: Any

    def __init__(self, mgr: Any, bootstrap_addr: str, bootstrap_room: int | None = None) -> None:
        is_taken = bootstrap_room in mgr.request_status or mgr.is_held(bootstrap_room)
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        self._began = time.monotonic()
        self._ticket: Ticket | None = None
        self._reads: list[RoomRead] = []
        self.bootstrap_infos: list[None] = [None]
        #: The room of another request is not ours to end.
        self._owns_bootstrap_room = not is_taken
        if is_taken:
            self._fail(_IN_USE)

    def init(self, prefill_dp_rank: int) -> None:
        owner = self.kv_mgr.owner_of(self.bootstrap_addr)
        if self.conclude_state is not None:
            return
        if owner is None:
            self.kv_mgr.forget(self.bootstrap_addr)
            self._fail("the prefill engine is gone")
            return
        self._ticket = Ticket(owner[0], owner[1], lease_of(self.bootstrap_room))
        self.kv_mgr.page_reader.watch(self._ticket)
        self.kv_mgr.update_status(self.bootstrap_room, KVPoll.WaitingForInput)

    def send_metadata(
        self,
        kv_indices: Any,
        aux_index: int | None = None,
        state_indices: Any = None,
        decode_prefix_len: int | None = None,
        destination: Any = KVTransferDestination.DEVICE,
        **_: Any,
    ) -> None:
        if self.conclude_state is not None:
            return
        if decode_prefix_len or destination != KVTransferDestination.DEVICE or self._ticket is None:
            self._fail("this way of receiving KV is not built; use --disaggregation-transfer-backend nixl")
            return
        slots = {page_key(position): int(page) for position, page in enumerate(kv_indices)}
        slots[METADATA_KEY] = self.kv_mgr.layout.metadata_slot(int(aux_index or 0))
        self._reads = self.kv_mgr.page_reader.read_room(self._ticket, slots)
        self.init_time = time.time()

    def poll(self) -> Any:
        if self.conclude_state is None:
            self._conclude()
        if self.conclude_state is not None:
            return self.conclude_state
        return KVPoll.WaitingForInput if self._ticket is not None else KVPoll.Bootstrapping

    def _conclude(self) -> None:
        failures = (read.failure for read in self._reads if read.is_decided)
        failure = next((why for why in failures if why is not None), None)
        if failure is not None:
            if failure in _GONE:
                self.kv_mgr.forget(self.bootstrap_addr)
            self._fail(f"the prefill engine's KV did not arrive ({failure}); try again with a new bootstrap_room")
        elif self._reads and all(read.has_ended for read in self._reads):
            self.conclude_state = KVPoll.Success
            self._let_go()
        elif self._ticket is None and time.monotonic() - self._began > self.kv_mgr.config.deadline_seconds:
            self._fail(f"prefill engine {self.bootstrap_addr} does not answer, or does not fit")

    def _fail(self, why: str) -> None:
        self.kv_mgr.record_failure(self.bootstrap_room, why)
        self.conclude_state = KVPoll.Failed
        self._let_go()

    def _let_go(self) -> None:
        if self._ticket is not None:
            self.kv_mgr.page_reader.abandon(self._ticket)

    def abort(self) -> None:
        if self.conclude_state is None:
            self._fail("Aborted by AbortReq.")
        self.ensure_abort_notified()

    def ensure_abort_notified(self, *, force_arm: bool = False) -> None:
        """Here: its pages are held while anything may still write to them, which is what SGLang reads of the flag."""
        self._let_go()
        if self._owns_bootstrap_room and not all(read.has_ended for read in self._reads):
            self.kv_mgr.hold(self.bootstrap_room, self._reads)
            self.abort_notified = True

    def clear(self) -> None:
        self._let_go()
        super().clear()


class DynamoKVBootstrapServer(CommonKVBootstrapServer):
    """SGLang's own."""


def kv_classes() -> dict[str, type]:
    """By the value of SGLang's `KVClassType`."""
    return {
        "manager": DynamoKVManager,
        "sender": DynamoKVSender,
        "receiver": DynamoKVReceiver,
        "bootstrap_server": DynamoKVBootstrapServer,
    }


def _layout(args: Any) -> EngineLayout:
    def buffers(pointers: Sequence[int], lengths: Sequence[int], items: Sequence[int]) -> list[tuple[int, int, int]]:
        return [(int(at), int(size), int(item)) for at, size, item in zip(pointers, lengths, items, strict=True)]

    return layout_of(
        buffers(args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens),
        buffers(args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens),
    )


def _why_no_room(why: str) -> str:
    reasons = {
        "expired": "the decode engine was not heard of within the deadline",
        "done": "the decode engine wants it no more, or its bootstrap_room was used before; use a new one",
        "revoked": "it was aborted, or its bootstrap_room was used before; use a new one",
    }
    return reasons.get(why, f"its lease has ended ({why})")
