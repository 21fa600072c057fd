"""The tool that breaks engines behind a proxy: its gates do what they say, and its judgement tells right from wrong."""

from __future__ import annotations

import asyncio

from soak.proxy.gate import Gate
from soak.proxy.traffic import CHAT, COMPLETIONS, TOKENS, Case, Clients
from tests.proxy.proxy_fakes import FakeEngine, ask, chat, get, post, proxy_before, run, wait_until
from tests.proxy.token_engine import TokenEngine, chat_ids, expected_text
from tests.vllm.proxied import Standing

TEXT = "how does it end"
RIGHT = expected_text([ord(letter) for letter in TEXT], TOKENS)
CASES = [Case(CHAT, TEXT, RIGHT), Case(COMPLETIONS, TEXT, RIGHT)]


class Gated(Standing):
    """An engine behind a gate."""

    def __init__(self, engine: FakeEngine, gate: Gate) -> None:
        super().__init__(f"http://127.0.0.1:{gate.port}")
        self.engine, self.gate = engine, gate

    @classmethod
    async def start(cls) -> Gated:
        engine = await TokenEngine().start()
        return cls(engine, await Gate(engine.port).start())

    async def stop(self) -> None:
        await self.gate.stop()
        await self.engine.stop()


def test_a_gate_passes_refuses_hangs_and_cuts() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        gate = await Gate(engine.port).start()
        try:
            assert (await ask(gate.port, post("/v1/chat/completions", chat()))).status == 200
            gate.set("refuse")
            assert (await ask(gate.port, post("/v1/chat/completions", chat()))).status == 503
            assert (await ask(gate.port, get("/health", "connection: close"))).status == 200
            await wait_until(lambda: gate.open_links == 0, "earlier links are over")
            gate.set("hang")
            hung = asyncio.ensure_future(ask(gate.port, get("/health")))
            await wait_until(lambda: gate.open_links >= 1, "it is connected")
            done, _ = await asyncio.wait([hung], timeout=0.2)
            assert not done
            gate.set("slow")
            assert (await hung).status == 200
            await wait_until(lambda: gate.open_links == 0, "earlier links are over")
            gate.set("hang")
            cut = asyncio.ensure_future(ask(gate.port, get("/health")))
            await wait_until(lambda: gate.open_links >= 1, "it is connected")
            gate.cut()
            assert isinstance((await asyncio.gather(cut, return_exceptions=True))[0], (ConnectionError, EOFError))
        finally:
            await gate.stop()
            await engine.stop()

    run(body())


def test_streams_that_gates_cut_are_whole_and_a_wrong_answer_is_seen() -> None:
    async def body() -> None:
        gated = [await Gated.start() for _ in range(2)]
        async with proxy_before(*gated) as proxy:
            clients = Clients(f"http://127.0.0.1:{proxy.port}", CASES, 8, 1, whole=0.0)
            await clients.start()
            for turn in range(300):
                await asyncio.sleep(0.2)
                gated[turn % 2].gate.cut()
                if turn >= 10 and clients.tally.ended["right"] > 20:
                    break
            await clients.stop()
            assert clients.tally.ended["right"] > 20
            assert not clients.tally.faults
            wrong = Clients(
                f"http://127.0.0.1:{proxy.port}", [Case(COMPLETIONS, TEXT, RIGHT + "more")], 2, 1, whole=0.0
            )
            await wrong.start()
            await wait_until(lambda: wrong.tally.ended["wrong"] > 0, "it is seen")
            await wrong.stop()
            assert not wrong.tally.ended["right"]

    assert chat_ids([{"content": TEXT}]) == [ord(letter) for letter in TEXT]
    run(body())
