"""What `version_scenario` does with loads that arrive layer by layer, each copy as late as it may be: `late_layers`."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

import pytest

from tests.vllm import late_layers as late
from tests.vllm.late_layers import late_layers, stream_of
from tests.vllm.simulated_engine import BLOCK, Mode, SimulatedEngine, ours

BY_LAYERS = (
    Mode("by layers", by_layers=True),
    Mode("by layers, async scheduling, two workers", async_scheduling=True, workers=2, by_layers=True),
    Mode("by layers, V2 runner", v2_runner=True, by_layers=True),
    Mode("by layers, V2 runner, async scheduling", async_scheduling=True, v2_runner=True, by_layers=True),
)


def prompt(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(500), k=tokens)


def evict_hbm(engine: SimulatedEngine, name: str) -> None:
    for index in range(4):
        engine.submit(f"{name}-filler-{index}", prompt(1000 + index, 12 * BLOCK), 2)
        engine.run()


def layers_wait_for_their_part(engine: SimulatedEngine) -> None:
    """One to three requests at a time, so that loads find the engine idle. Prefixes are shared, some requests leave."""
    counts = [stream_of(worker).counts for worker in engine.workers]
    for each in counts:
        each.update(loads=0, waits=0, joins=0)
    chance = random.Random(11)
    stems = [prompt(300 + index, chance.randrange(2 * BLOCK, 6 * BLOCK)) for index in range(8)]
    for index in range(40):
        names = [f"few-{index}-{number}" for number in range(chance.randrange(1, 4))]
        stem = chance.choice(stems)
        for name in names:
            engine.submit(
                name, stem + prompt(400 + chance.randrange(9), chance.randrange(1, 70)), chance.randrange(1, 9)
            )
        for _ in range(chance.randrange(8)):
            engine.step()
        if chance.random() < 0.2 and engine.scheduler.requests:
            engine.abort(chance.choice(list(engine.scheduler.requests)))
        if chance.random() < 0.7:
            engine.run()
        ours(engine.scheduler.connector)._scheduler.check()
        for name in names:
            engine.expect_answer(name)
    engine.run()
    for each in counts:
        assert each["loads"] > 5, f"hardly any load came by layers: {each}"
        assert each["waits"] > 5, f"hardly any layer waited: {each}"


def what_is_loaded_whole_comes_at_once(engine: SimulatedEngine) -> None:
    """Its last token is computed again, and written into the last block that was loaded, before any layer waits."""
    text = prompt(8, 5 * BLOCK)
    engine.submit("first", text, 8)
    engine.run()
    # A single token more is computed in one graph, which asks for no layer.
    for name, longer, by_layers in (("whole", [], 0), ("longer", prompt(9, 9), 1), ("one more", prompt(9, 1), 1)):
        evict_hbm(engine, name)
        loads, before = engine.planned["loads"], stream_of(engine.workers[0]).counts["loads"]
        engine.submit(name, text + longer, 8)
        engine.run()
        assert engine.planned["loads"] == loads + 5
        assert stream_of(engine.workers[0]).counts["loads"] == before + by_layers, name
    assert engine.answers["whole"] == engine.answers["first"]


def waits_are_needed(config: Any, mode: Mode, hbm_blocks: int) -> None:
    """With any of them left out the step that would compute on old bytes is seen."""
    text = prompt(1, 5 * BLOCK)
    for left_out, more in (("wait", 9), ("join", 1)):
        with late_layers(), patch.object(late, "AT_LAST_SECONDS", 600):
            engine = SimulatedEngine(config, mode, hbm_blocks)
            engine.submit("cold", text, 8)
            engine.run()
            evict_hbm(engine, left_out)
            engine.submit("hit", text + prompt(9, more), 8)
            nothing = patch.object(late.LateStream, left_out, lambda *_: None)
            with nothing, pytest.raises(AssertionError, match="wrong KV"):
                engine.run()
            stream_of(engine.workers[0]).arrive()
            engine.close()
        print(f"passed: {mode.name}: without {left_out} old bytes are seen", flush=True)
