"""Prefill and decode in two real SGLang servers: the answers of one server, or an error; never another answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.proxy.proxy_fakes import proxy_before, run
from tests.sglang.apart import BOOT_SECONDS, Fleet, answer, ask, make, metric, started_fleet
from tests.sglang.asking import wait_until
from tests.sglang.server import prompts
from tests.vllm.proxied import PATIENT, Standing, aside
from tools.server_process import ServerProcess

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

_LENGTHS = (5, 16, 33, 100, 300, 700)


def mine() -> list[list[int]]:
    return [prompts(seed, 1, length)[0] for seed, length in enumerate(_LENGTHS)]


@pytest.fixture(scope="module")
def expected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[int], list[Any]]]:
    """Of one server alone, which is gone again."""
    alone = make("alone", tiny_model, tmp_path_factory.mktemp("alone"))
    try:
        alone.start().wait_ready(BOOT_SECONDS)
        return [answer(ask(alone, prompt)) for prompt in mine()]
    finally:
        alone.stop()


@pytest.fixture(scope="module")
def fleet(
    expected: list[tuple[list[int], list[Any]]], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    with started_fleet(tiny_model, tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


def test_answers_are_those_of_one_server(fleet: Fleet, expected: list[tuple[list[int], list[Any]]]) -> None:
    assert len({tuple(tokens) for tokens, _ in expected}) == len(expected), "the answers do not tell prompts apart"
    for prompt, wanted in zip(mine(), expected, strict=True):
        assert answer(fleet.ask(prompt)) == wanted
    wait_until(lambda: metric(fleet.decode, "dynamo_nixl_read_blocks_total") > len(expected), "/metrics tells of READs")
    wait_until(lambda: metric(fleet.prefill, "dynamo_nixl_leases_ended_total") >= len(expected), "and of leases")


def test_dynamo_proxy_brings_both_halves_together(
    fleet: Fleet, expected: list[tuple[list[int], list[Any]]], tmp_path: Path
) -> None:
    async def shown() -> None:
        both = Standing(f"{fleet.prefill.url},role=prefill"), Standing(f"{fleet.decode.url},role=decode")
        async with proxy_before(*both, timeouts=PATIENT) as proxy:
            through = ServerProcess("proxy", [], f"http://127.0.0.1:{proxy.port}", tmp_path / "log")
            answers = [await aside(lambda: ask(through, prompt)) for prompt in mine()]  # noqa: B023
            assert [answer(each) for each in answers] == expected
            body = {"prompt": mine()[3], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            whole, streamed, with_ids = [
                await aside(lambda: requests.post(f"{through.url}/v1/completions", json=asked, timeout=120).text)  # noqa: B023
                for asked in (body, {**body, "stream": True}, {**body, "stream": True, "return_token_ids": True})
            ]
            events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
            said = "".join(choice["text"] for event in events for choice in event["choices"])
            assert said == json.loads(whole)["choices"][0]["text"], streamed
            assert streamed.rstrip().endswith("[DONE]")
            # What a stream that breaks would go on with: every token of prompt and answer, the one from prefill too.
            told = [json.loads(line[6:])["choices"] for line in with_ids.splitlines() if line.startswith("data: {")]
            ids = [token for choices in told for choice in choices for token in choice["token_ids"] or ()]
            assert (told[0][0]["prompt_token_ids"], ids) == (mine()[3], expected[3][0])
            assert b'prefill_legs_total{reason="handed_over"} 9.0' in proxy.front_end.metrics()

    run(shown())


@pytest.mark.parametrize("lack", ["bootstrap_host", "bootstrap_port", "bootstrap_room"])
def test_a_request_that_ends_a_stock_server_is_refused_in_one_line(fleet: Fleet, lack: str) -> None:
    fields = fleet.room()
    fields[lack] = {"bootstrap_host": None, "bootstrap_port": 70_000, "bootstrap_room": 0}[lack]
    refused = ask(fleet.decode, mine()[0], **fields)
    assert refused.status_code == 400
    assert lack in refused.json()["error"]["message"]
    assert "\n" not in refused.json()["error"]["message"]
    assert requests.get(f"{fleet.decode.url}/server_info", timeout=60).status_code == 200


def test_one_leg_alone_is_an_error_on_either_side(fleet: Fleet) -> None:
    for server in (fleet.decode, fleet.prefill):
        assert ask(server, mine()[1], **fleet.room()).status_code == 500


def test_a_prefill_engine_that_stands_still_then_goes_on(
    fleet: Fleet, expected: list[tuple[list[int], list[Any]]]
) -> None:
    fleet.prefill.stand_still()
    try:
        failed = ask(fleet.decode, mine()[2], **fleet.room())
        assert failed.status_code == 500
    finally:
        fleet.prefill.go_on()
    # A peer that was silent is asked again after 3 s.
    wait_until(lambda: fleet.ask(mine()[3]).status_code == 200, "prefill is met again")
    assert answer(fleet.ask(mine()[3])) == expected[3]


def test_a_prefill_engine_that_is_killed_is_an_error_and_decode_lives(fleet: Fleet) -> None:
    fleet.prefill.kill()
    for _ in range(2):
        assert ask(fleet.decode, mine()[4], **fleet.room()).status_code == 500
    assert requests.get(f"{fleet.decode.url}/server_info", timeout=60).status_code == 200


def test_a_prefill_engine_that_comes_back_at_the_same_address_is_met_anew(
    fleet: Fleet, expected: list[tuple[list[int], list[Any]]]
) -> None:
    fleet.prefill.kill()
    try:
        fleet.prefill.start().wait_ready(BOOT_SECONDS)
        wait_until(lambda: fleet.ask(mine()[5]).status_code == 200, "its next run is met")
        assert [answer(fleet.ask(prompt)) for prompt in mine()] == expected
    finally:
        fleet.prefill.kill()  # this run is the test's own
