"""Engines that do not fit, and greetings that were changed on their way: ours, and vLLM's own NixlConnector.

Options: one column alone (`dynamo` or `stock`), and words; only the rows that say one of them. Somebody between a real
prefill and a real decode vLLM changes what they say when they meet. At the end the prefill engine is started again with
other weights in the same place.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import msgspec
from msgspec.structs import replace

from benchmarks.handoff_columns import Column, Held, OurPair, StockPair, run_columns
from dynamo_connectors.transport.messages import MAGIC, Codec, Hello, Reply, Request, Welcome
from tests.transport.peers import Between, Relay
from tests.vllm.handoff_tickets import SECRET, signed
from tools.server_process import free_port
from tools.tiny_model import make_model

_CODEC = Codec(SECRET)


def _versioned(frame: bytes) -> bytes:
    """The same, signed, of the version after ours."""
    head = len(MAGIC) + 1
    body = bytes([frame[len(MAGIC)] + 1]) + frame[head + 32 :]
    return MAGIC + body[:1] + _CODEC._mac(body) + body[1:]


def _half(metadata: bytes) -> bytes:
    return metadata[: len(metadata) // 2]


#: What becomes of a greeting of ours.
OURS: Mapping[str, Callable[[Any], bytes]] = {
    "other model": lambda said: _CODEC.encode(replace(said, namespace=b"other")),
    "other block size": lambda said: _CODEC.encode(replace(said, row_bytes=said.row_bytes + 4096)),
    "other version": lambda said: _versioned(_CODEC.encode(said)),
    "other secret": lambda said: Codec(b"another fleet's").encode(said),
    "noise": lambda said: os.urandom(200),
    "metadata cut short": lambda said: _CODEC.encode(replace(said, metadata=_half(said.metadata))),
}


def _inside(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A change to the part that is decoded when the hash fits."""

    def changed(said: dict[str, Any]) -> dict[str, Any]:
        inner = change(msgspec.msgpack.decode(said["agent_metadata_bytes"]))
        return {**said, "agent_metadata_bytes": msgspec.msgpack.encode(inner)}

    return changed


#: What becomes of NixlConnector's: one hash says model and version, and it knows no secret.
STOCK: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "other model": lambda said: {**said, "compatibility_hash": "0" * 64},
    "other block size": _inside(lambda inner: {**inner, "block_size": inner["block_size"] * 2}),
    "other version": lambda said: {**said, "compatibility_hash": "1" * 64},
    "noise": lambda said: os.urandom(200),
    "metadata cut short": _inside(lambda inner: {**inner, "agent_metadata": _half(inner["agent_metadata"])}),
}


class StockMiddle(Relay):
    """Passes NixlConnector's questions on, and its answers changed, under a name that nobody had before.

    NixlConnector remembers an engine's block size from a meeting that failed, and dies of it at the next.
    """

    def __init__(self, port: int, owner_port: int, change: Callable[[dict[str, Any]], object]) -> None:
        self.name = f"stranger at {port}"
        self._rename = _inside(lambda inner: {**inner, "engine_id": self.name})
        self._change = change
        super().__init__(port, owner_port)

    def _answered(self, client: bytes, frames: list[bytes]) -> None:
        empty, answer, *rest = frames
        changed = self._change(self._rename(msgspec.msgpack.decode(answer)))
        frame = changed if isinstance(changed, bytes) else msgspec.msgpack.encode(changed)
        super()._answered(client, [empty, frame, *rest])


class Strangers(Column):
    def rows(self) -> Iterator[tuple[str, Callable[[], str]]]:
        for what in OURS:
            if what in STOCK or not isinstance(self.pair, StockPair):
                yield what, partial(self._greeted, what)
        yield "afterwards, 5 prompts", partial(self.handed_over, 5)
        yield "other weights in the same place", self._other_weights

    def _greeted(self, what: str) -> str:
        held, port = self.hold(), free_port()
        if isinstance(self.pair, StockPair):
            with closing(StockMiddle(port, self.pair._peer_port, STOCK[what])) as stranger:
                there = {"remote_port": port, "remote_engine_id": stranger.name}
                return self.judge(held._replace(ticket={**held.ticket, **there}))
        greeting = Welcome if what == "metadata cut short" else Hello

        def frame_of(message: Request | Reply, frame: bytes) -> bytes:
            return OURS[what](message) if isinstance(message, greeting) else frame

        with closing(Between(port, self.pair._peer_port, SECRET)) as middle:
            middle.frame_of = frame_of
            return self.judge(held._replace(ticket=signed({**held.ticket, "remote_port": port})))

    def _other_weights(self) -> str:
        self.pair.prefill_server.kill()
        make_model(self.pair._model, width=0.3)
        self.pair.prefill_server.start().wait_ready(600.0)
        tokens = self.prompt()
        alone = self.pair.decode.complete(tokens, cache_salt="nobody else's").tokens
        return self.judge(Held(tokens, alone, self.pair.ticket(tokens)))


def main(arguments: list[str]) -> int:
    columns = {"dynamo": partial(OurPair, transports="tcp"), "stock": partial(StockPair, transports="tcp")}
    return run_columns(columns, Strangers, *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
