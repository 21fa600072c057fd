"""Experiment 3: what the planner advised, and one replica more, started and drained away under open streams."""

from __future__ import annotations

import json
import random
import shlex
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from demo.asking import client_for, complete
from demo.fleet import Fleet, post
from tools.server_process import ServerError, first_error

Value = TypeVar("Value")

ACTOR = "planner-acting"
STREAMS, STREAM_TOKENS = 6, 300


@dataclass(frozen=True)
class Advice:
    """Equal decisions in a row, told once. `after_seconds` is when the first of them was made."""

    after_seconds: float
    current: int
    desired: int
    explanation: str
    times: int


@dataclass(frozen=True)
class ScalingResult:
    started: str
    start_seconds: float
    streams_on_it: int
    whole_streams: int
    drain_seconds: float


def advice(log: Path) -> list[Advice]:
    """What an advisory planner asks for it asks for once a minute until somebody does it: one advice."""
    told: list[Advice] = []
    begun: datetime | None = None
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] != "decision":
            continue
        decision, at = entry["decision"], datetime.fromisoformat(entry["at"])
        begun = begun or at
        after = (at - begun).total_seconds()
        made = Advice(after, decision["current"], decision["desired"], decision["explanation"], 1)
        if told and told[-1].current == made.current and decision["reason"] == "rate_limited":
            made = replace(made, desired=told[-1].desired, explanation=told[-1].explanation)
        if told and (told[-1].current, told[-1].desired) == (made.current, made.desired):
            last = told.pop()
            made = replace(made, after_seconds=last.after_seconds, times=last.times + 1)
        told.append(made)
    return told


def scale_up_and_down(fleet: Fleet, tick: Callable[[str], None]) -> ScalingResult:
    """Orders one replica more, opens streams on the fleet, orders it away again: every stream must end whole."""
    before = {str(engine["url"]) for engine in fleet.engines()}
    planner = fleet.start_planner(
        ACTOR,
        "--no-advisory",
        "--max-replicas", str(len(before) + 1),
        "--engine-command", _engine_command(fleet),
        "--engine-log-dir", str(fleet.logs),
        "--stabilisation-seconds", "3600",
    )  # fmt: skip
    started_at = time.monotonic()
    post(planner + "/scale", {"replicas": len(before) + 1})
    new = _wait(lambda: _new_engine(fleet, before), "starting one more replica", tick).pop()
    start_seconds = time.monotonic() - started_at

    fleet.set_router_mode("least-loaded")
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(_stream, fleet.proxy_url, number) for number in range(STREAMS)]
        _wait(lambda: _in_flight(fleet, new), "opening streams on every replica", tick)
        on_it = _in_flight(fleet, new)
        ordered_at = time.monotonic()
        post(planner + "/scale", {"replicas": len(before)})
        _wait(
            lambda: new not in {engine["url"] for engine in fleet.engines()},
            "draining it: its streams end, then it is stopped",
            tick,
        )
        drain_seconds = time.monotonic() - ordered_at
        whole = sum(stream.result() == STREAM_TOKENS for stream in streams)
    return ScalingResult(new, start_seconds, on_it, whole, drain_seconds)


def _engine_command(fleet: Fleet) -> str:
    """The command of the first replica, on a port that the planner chooses and without its event socket."""
    command = list(fleet.replicas[0].command)
    for flag, value in (("--port", "{port}"), ("--kv-events-config", None)):
        position = command.index(flag)
        command[position : position + 2] = [flag, value] if value else []
    # The planner runs no shell, but `env` sets what the replicas here are started with.
    settings = [f"{name}={value}" for name, value in fleet.replicas[0].env.items()]
    return shlex.join(["env", *settings, *command]).replace("'{port}'", "{port}")


def _stream(url: str, number: int) -> int:
    rng = random.Random(900 + number)
    answer = complete(client_for(url), [rng.randrange(10, 500) for _ in range(64)], STREAM_TOKENS)
    return len(answer.tokens)


def _ready(fleet: Fleet) -> set[str]:
    return {str(engine["url"]) for engine in fleet.engines() if engine["state"] == "ready"}


def _new_engine(fleet: Fleet, before: set[str]) -> set[str]:
    """Raises `ServerError` as soon as the planner has given the start up."""
    for line in fleet.decision_log(ACTOR).read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] == "actuation" and entry["what"] == "failed":
            logs = sorted(fleet.logs.glob("engine-*.log"))
            cause = first_error(logs[-1]) if logs else entry["text"]
            raise ServerError(f"the replica that the planner started did not come up: {cause}")
    return _ready(fleet) - before


def _in_flight(fleet: Fleet, url: str) -> int:
    return sum(int(engine["in_flight"]) for engine in fleet.engines() if engine["url"] == url)


def _wait(condition: Callable[[], Value], what: str, tick: Callable[[str], None]) -> Value:
    deadline = time.monotonic() + 240
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise ServerError(f"{what}: gave up after 240 s; see the logs")
        tick(what)
        time.sleep(0.5)
