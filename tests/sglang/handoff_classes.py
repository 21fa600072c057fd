"""Run by SGLang's interpreter: its real manager, sender, receiver and bootstrap server with ours in them, no model.

What a scheduler does with them is done here by hand, over real NIXL. Writes a JSON object: case -> what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace as Facts
from typing import Any

import numpy as np

_PAGES, _ROWS, _PAGE_BYTES, _ROW_BYTES, _BUFFERS, _METADATA = 64, 8, 4096, 128, 8, 3


def prepare(port: int) -> None:
    """What a launch has set up by the time that a scheduler makes its manager."""
    import sglang.srt.disaggregation.common.conn as common

    from dynamo_connectors.sglang import compat
    from dynamo_connectors.sglang.handoff_settings import translate_handoff

    launch = Facts(disaggregation_transfer_backend="dynamo", disaggregation_mode="prefill")
    translate_handoff(launch, {"kvbm_peer_deadline_ms": "3000"}, os.environ)
    ones = ("attn_tp_size", "attn_cp_size", "attn_dcp_size", "attn_dp_size", "dp_size", "pp_size", "num_dp_ranks")
    ranks = ("attn_tp_rank", "attn_cp_rank", "attn_dcp_rank", "attn_dp_rank")
    off = ("enable_kv_cache_sharding", "enable_dsa_cache_layer_split", "enable_cp_tp_group_sharing")
    parallel = Facts(
        **dict.fromkeys(ones, 1),
        **dict.fromkeys(ranks, 0),
        **dict.fromkeys(off, False),
        dist_init_addr=None,
        load_balance_method="round_robin",
        pp_group=None,
        world_group=Facts(rank=0, world_size=1),
    )
    disagg = Facts(disaggregation_bootstrap_port=port, disaggregation_decode_allocation_policy="early")
    common.get_serving = lambda: Facts(host="127.0.0.1", port=1)
    common.get_disagg = lambda: disagg
    common.get_parallel = lambda: parallel
    common.get_observability = lambda: Facts(enable_trace=False)
    common.linear_attn_tp_size = lambda: 1
    compat.engine_facts = lambda: {"model": "m", "revision": "", "weights": "w", "key_rules": "k"}


class Memory:
    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.pages = random.integers(0, 256, (_BUFFERS, _PAGES, _PAGE_BYTES), dtype=np.uint8)
        self.rows = random.integers(0, 256, (_METADATA, _ROWS, _ROW_BYTES), dtype=np.uint8)

    def arguments(self) -> Any:
        from sglang.srt.disaggregation.base.conn import KVArgs

        given = KVArgs()
        given.engine_rank = given.pp_rank = given.system_dp_rank = given.gpu_id = 0
        given.kv_data_ptrs = [buffer.ctypes.data for buffer in self.pages]
        given.kv_data_lens = [buffer.nbytes for buffer in self.pages]
        given.kv_item_lens = [_PAGE_BYTES] * _BUFFERS
        given.aux_data_ptrs = [buffer.ctypes.data for buffer in self.rows]
        given.aux_data_lens = [buffer.nbytes for buffer in self.rows]
        given.aux_item_lens = [_ROW_BYTES] * _METADATA
        given.state_types, given.state_item_lens = [], []
        given.kv_cache_dtype_str, given.kv_layout, given.page_size = "bf16", None, 16
        given.kv_layer_ids, given.rust_http_port = list(range(_BUFFERS)), None
        return given


class World:
    def __init__(self, port: int) -> None:
        from sglang.srt.disaggregation.utils import DisaggregationMode, KVClassType, TransferBackend, get_kv_class

        made = {kind.value: get_kv_class(TransferBackend("dynamo"), kind) for kind in KVClassType}
        self.sender, self.receiver = made["sender"], made["receiver"]
        self.bootstrap, self.address = made["bootstrap_server"]("127.0.0.1", port), f"127.0.0.1:{port}"
        self.p, self.d = Memory(1), Memory(2)
        self.prefill = made["manager"](self.p.arguments(), DisaggregationMode.PREFILL, None)
        self.decode = made["manager"](self.d.arguments(), DisaggregationMode.DECODE, None)

    def room(self, number: int) -> tuple[Any, Any]:
        sender = self.sender(self.prefill, self.address, number, False)
        receiver = self.receiver(self.decode, self.address, number)
        until(lambda: self.decode.try_ensure_parallel_info(self.address))
        receiver.init(0)
        return sender, receiver

    def wanted(self, number: int, pages: list[int], row: int = 2) -> tuple[Any, Any]:
        sender, receiver = self.room(number)
        receiver.send_metadata(np.array(pages, dtype=np.int32), row)
        until(lambda: sender.poll() == 2)
        return sender, receiver


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def why(side: Any) -> str:
    try:
        side.failure_exception()
    except Exception as error:  # noqa: BLE001 - SGLang's own
        return str(error)
    raise AssertionError("a failure without a reason")


def a_prompt_is_handed_over_in_chunks(world: World) -> None:
    sender, receiver = world.wanted(5, [3, 4, 9])
    sender.init(3, 1)
    sender.send(np.array([10, 11], dtype=np.int32))
    assert receiver.poll() == 2
    sender.send(np.array([40], dtype=np.int32))
    until(lambda: receiver.poll() == 4 and sender.poll() == 4)
    assert (world.d.pages[:, [3, 4, 9]] == world.p.pages[:, [10, 11, 40]]).all()
    assert (world.d.rows[:, 2] == world.p.rows[:, 1]).all()
    assert sender.get_transfer_metric().transfer_total_bytes == 3 * _BUFFERS * _PAGE_BYTES
    sender.clear()
    receiver.clear()


def an_abort_of_decode_ends_prefill(world: World) -> None:
    sender, receiver = world.wanted(6, [3])
    receiver.abort()
    assert receiver.poll() == 0
    assert "Aborted" in why(receiver)
    until(lambda: world.decode.is_abort_release_safe(6, 1))
    world.decode.clear_deferred_abort_state(6)
    until(lambda: sender.poll() == 0)
    assert "wants it no more" in why(sender)


def an_abort_of_prefill_ends_decode(world: World) -> None:
    sender, receiver = world.wanted(7, [3])
    sender.abort()
    until(lambda: receiver.poll() == 0)
    assert "new bootstrap_room" in why(receiver)
    sender.clear()


def pages_are_held_while_a_read_is_under_way(world: World) -> None:
    class Late:
        has_ended = False
        is_decided, failure = True, "timeout"

    sender, receiver = world.wanted(8, [3])
    receiver._reads = [late := Late()]
    assert receiver.poll() == 0
    receiver.ensure_abort_notified(force_arm=True)
    assert receiver.abort_notified
    why(receiver)
    assert not world.decode.is_abort_release_safe(8, 1)
    assert world.receiver(world.decode, world.address, 8).poll() == 0, "its room is another request's already"
    late.has_ended = True
    assert world.decode.is_abort_release_safe(8, 1)
    world.decode.clear_deferred_abort_state(8)
    sender.clear()


def a_room_that_is_in_use_is_refused_alone(world: World) -> None:
    sender, receiver = world.room(9)
    second = world.receiver(world.decode, world.address, 9)
    assert second.poll() == 0
    assert "in use" in why(second)
    assert receiver.poll() != 0
    receiver.abort()
    receiver.clear()
    sender.clear()


def a_room_that_prefill_has_stays_its_request_s(world: World) -> None:
    sender, receiver = world.wanted(13, [5])
    seconds = [world.sender(world.prefill, world.address, 13, False) for _ in range(2)]
    for second in seconds:
        assert second.poll() == 0
        second.init(1, 1)
        second.send(np.array([12], dtype=np.int32))
        second.abort()
    assert "in use" in why(seconds[0])
    sender.init(1, 1)
    sender.send(np.array([10], dtype=np.int32))
    late = world.sender(world.prefill, world.address, 13, False)
    assert late.poll() == 0
    late.clear()
    until(lambda: receiver.poll() == 4 and sender.poll() == 4)
    assert (world.d.pages[:, [5]] == world.p.pages[:, [10]]).all()
    sender.clear()
    receiver.clear()


def liar(whole: dict[str, Any], rank: dict[str, Any]) -> type[BaseHTTPRequestHandler]:
    """A bootstrap server that says this of itself and of the worker of a rank."""

    class Liar(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(whole if "target_pp_rank=-1" in self.path else rank).encode())

        def log_message(self, *_: Any) -> None:
            """It is quiet about it."""

    return Liar


def a_bootstrap_server_that_lies_harms_its_own_requests_only(world: World) -> None:
    answers = {"attn_tp_size": 1, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 16}
    answers |= {"kv_cache_dtype": None, "follow_bootstrap_room": False}
    for number, lies in enumerate(
        ({"rank_port": 10**30}, {"rank_ip": "\ud800"}, {"rank_ip": "10.0.0.7"}, {"dp_size": 0}, {"attn_tp_size": "x"})
    ):
        answer = {"rank_ip": "127.0.0.1", "rank_port": 1, **answers, **lies}
        whole = {name: answer[name] for name in answers}
        rank = {name: answer[name] for name in ("rank_ip", "rank_port")}

        with ThreadingHTTPServer(("127.0.0.1", 0), liar(whole, rank)) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"127.0.0.1:{server.server_port}"
            receiver = world.receiver(world.decode, address, 100 + number)

            def failed(address: str = address, receiver: Any = receiver) -> bool:
                assert not world.decode.try_ensure_parallel_info(address), "it is believed"
                return bool(receiver.poll() == 0)

            until(failed)
            assert "does not fit" in why(receiver)
            server.shutdown()
    receiver = world.receiver(world.decode, "10.0.0.7:80", 120)
    assert not world.decode.try_ensure_parallel_info("10.0.0.7:80")
    receiver.abort()
    why(receiver)


def a_room_is_not_used_twice(world: World) -> None:
    sender, receiver = world.room(5)
    receiver.send_metadata(np.array([3], dtype=np.int32), 2)
    until(lambda: receiver.poll() == 0 and sender.poll() == 0)
    assert "used before" in why(sender)
    why(receiver)


def nobody_at_the_other_end_is_a_failure(world: World) -> None:
    receiver = world.receiver(world.decode, "127.0.0.1:1", 11)

    def failed() -> bool:
        world.decode.try_ensure_parallel_info("127.0.0.1:1")
        return bool(receiver.poll() == 0)

    until(failed)
    assert "does not answer" in why(receiver)


def a_decode_engine_that_never_comes_is_a_failure(world: World) -> None:
    sender = world.sender(world.prefill, world.address, 12, False)
    until(lambda: sender.poll() == 0)
    assert "not heard of" in why(sender)


CASES = (
    a_prompt_is_handed_over_in_chunks,
    an_abort_of_decode_ends_prefill,
    an_abort_of_prefill_ends_decode,
    pages_are_held_while_a_read_is_under_way,
    a_room_that_is_in_use_is_refused_alone,
    a_room_that_prefill_has_stays_its_request_s,
    a_bootstrap_server_that_lies_harms_its_own_requests_only,
    a_room_is_not_used_twice,
    nobody_at_the_other_end_is_a_failure,
    a_decode_engine_that_never_comes_is_a_failure,
)

if __name__ == "__main__":
    from sglang.srt.plugins import load_plugins

    load_plugins()
    prepare(int(sys.argv[1]))
    the_world = World(int(sys.argv[1]))
    outcomes = {}
    for case in CASES:
        try:
            case(the_world)
            outcomes[case.__name__] = ""
        except Exception:  # noqa: BLE001 - told to the test
            outcomes[case.__name__] = traceback.format_exc()
    print("RESULTS " + json.dumps(outcomes), flush=True)
    os._exit(0)  # the engine's own threads never end
