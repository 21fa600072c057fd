"""How much of everything: once for one H200, once small enough to dry-run the same code on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prefix:
    """The long prefix. Its length ends 8 tokens behind a whole block: every kind of hit computes as much."""

    tokens: int
    prompts: int
    rounds: int


@dataclass(frozen=True)
class Disk:
    tokens: int
    prompts: int


@dataclass(frozen=True)
class Chat:
    users: int
    turns: int
    first_tokens: int
    turn_tokens: int
    answer_tokens: int
    think_seconds: float


@dataclass(frozen=True)
class Load:
    """Prompts that nothing has seen before."""

    requests: int
    prompt_tokens: int
    answer_tokens: int
    concurrency: int
    rounds: int


@dataclass(frozen=True)
class Exact:
    prompts: int
    shortest_tokens: int
    longest_tokens: int
    answer_tokens: int
    #: More than the tiered engine's HBM has room for.
    concurrency: int
    #: So few that even the longest fit, and none is preempted.
    calm_concurrency: int
    #: From one request of a calm pass to the next.
    calm_seconds: float
    #: Prompts that the reference keeps in HBM at one time.
    batch: int


@dataclass(frozen=True)
class Scale:
    block_tokens: int
    vocabulary: int
    prefix: Prefix
    disk: Disk
    chat: Chat
    load: Load
    exact: Exact


H200 = Scale(
    block_tokens=16,
    vocabulary=128_000,
    prefix=Prefix(tokens=32_768 + 8, prompts=4, rounds=3),
    disk=Disk(tokens=8_192 + 8, prompts=4),
    # Their KV is twice HBM, and fits DRAM: 24 users, 8,192 to 9,700 tokens each.
    chat=Chat(users=24, turns=6, first_tokens=8_192, turn_tokens=256, answer_tokens=48, think_seconds=4.0),
    load=Load(requests=48, prompt_tokens=2_048, answer_tokens=128, concurrency=16, rounds=3),
    exact=Exact(500, 200, 600, answer_tokens=32, concurrency=32, calm_concurrency=16, calm_seconds=0.06, batch=100),
)
TINY = Scale(
    block_tokens=32,
    vocabulary=500,
    prefix=Prefix(tokens=1_024 + 8, prompts=2, rounds=2),
    disk=Disk(tokens=512 + 8, prompts=2),
    chat=Chat(users=8, turns=3, first_tokens=512, turn_tokens=64, answer_tokens=8, think_seconds=0.5),
    load=Load(requests=6, prompt_tokens=256, answer_tokens=8, concurrency=3, rounds=1),
    exact=Exact(40, 100, 300, answer_tokens=80, concurrency=8, calm_concurrency=3, calm_seconds=0.1, batch=20),
)
