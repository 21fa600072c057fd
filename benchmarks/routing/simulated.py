"""A simulated engine: continuous batching, chunked prefill, a block prefix cache with LRU. Virtual time, no I/O.

Step time = T_0 + T_P * prefill tokens + T_A * their token pairs + T_D * decoding sequences + T_K * their cached tokens:
a mid-sized model on one large GPU. Blocks have 512 tokens, as in the Mooncake traces.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

T_0, T_P, T_A, T_D, T_K = 0.008, 1 / 12000, 2e-9, 5e-5, 4e-8
STEP_TOKENS, MAX_SEQUENCES, BLOCK_TOKENS = 8192, 256, 512


@dataclass(eq=False)
class Running:
    """One request on its engine. `blocks` are the ids of its whole prompt blocks."""

    number: int
    blocks: Sequence[int]
    prompt_tokens: int
    output_tokens: int
    computed: int = 0
    hit_tokens: int = 0
    made: int = 0
    held: list[int] = field(default_factory=list)  # cached blocks it refers to
    private_blocks: int = 0


class SimulatedEngine:
    """Call `begin_step` when idle and work waits; after the seconds it returns, `end_step`."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens // BLOCK_TOKENS
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.busy = False
        self._references: dict[int, int] = {}
        self._free_cached: OrderedDict[int, None] = OrderedDict()  # cached and not referred to, oldest first
        self._used = 0
        self._plan: list[tuple[Running, int]] = []

    def begin_step(self) -> float | None:
        """Plan a step: its seconds, or None if there is nothing to do."""
        decoding = [one for one in self.running if one.computed >= one.prompt_tokens]
        budget = STEP_TOKENS - len(decoding)
        self._plan, seconds = [], T_0 + T_D * len(decoding) + T_K * sum(one.computed for one in decoding)
        for one in self.running:
            if budget > 0 and one.computed < one.prompt_tokens:
                budget -= self._take(one, budget)
        while self.waiting and budget > 0 and len(self.running) < MAX_SEQUENCES and self._admit(self.waiting[0]):
            one = self.waiting.popleft()
            self.running.append(one)
            budget -= self._take(one, budget)
        self.busy = bool(self._plan or decoding)
        if not self.busy:
            return None
        for one, tokens in self._plan:
            seconds += T_P * tokens + T_A * tokens * (one.computed + tokens / 2)
        return seconds

    def end_step(self) -> tuple[list[Running], list[Running]]:
        """Who got a first token, and who is done."""
        first, done, prefilled = [], [], set()
        for one, tokens in self._plan:
            one.computed += tokens
            prefilled.add(one)
            self._cache(one)
            if one.computed >= one.prompt_tokens:
                one.made = 1
                first.append(one)
        kept = []
        for one in self.running:
            if one.computed >= one.prompt_tokens and one not in prefilled:
                one.computed += 1
                one.made += 1
            if one.made >= one.output_tokens:
                self._release(one)
                done.append(one)
            else:
                kept.append(one)
        self.running, self.busy = kept, False
        return first, done

    def _take(self, one: Running, budget: int) -> int:
        tokens = min(budget, one.prompt_tokens - one.computed)
        self._plan.append((one, tokens))
        return tokens

    def _admit(self, one: Running) -> bool:
        whole = (one.prompt_tokens - 1) // BLOCK_TOKENS
        hits = 0
        while hits < min(whole, len(one.blocks)) and one.blocks[hits] in self._references:
            hits += 1
        needed = -(-(one.prompt_tokens + one.output_tokens) // BLOCK_TOKENS) - hits
        revived = sum(1 for block in one.blocks[:hits] if not self._references[block])
        if self._used + revived + needed > self._capacity:
            return False
        for block in one.blocks[:hits]:
            if not self._references[block]:
                del self._free_cached[block]
                self._used += 1
            self._references[block] += 1
            one.held.append(block)
        while self._used + len(self._free_cached) + needed > self._capacity:
            block, _ = self._free_cached.popitem(last=False)
            del self._references[block]
        self._used += needed
        one.private_blocks, one.computed, one.hit_tokens = needed, hits * BLOCK_TOKENS, hits * BLOCK_TOKENS
        return True

    def _cache(self, one: Running) -> None:
        whole = min(one.computed, one.prompt_tokens - 1) // BLOCK_TOKENS
        for block in one.blocks[len(one.held) : whole]:
            if block in self._references:
                break  # somebody else was first: this one keeps its own copy
            self._references[block] = 1
            one.held.append(block)
            one.private_blocks -= 1

    def _release(self, one: Running) -> None:
        self._used -= one.private_blocks
        for block in reversed(one.held):
            self._references[block] -= 1
            if not self._references[block]:
                self._used -= 1
                self._free_cached[block] = None

    def leading(self, blocks: Sequence[int]) -> int:
        """How many leading blocks it has cached."""
        return next((number for number, block in enumerate(blocks) if block not in self._references), len(blocks))

    def take(self, blocks: Sequence[int]) -> None:
        """These come from a peer: cached, and referred to by nobody."""
        for block in blocks:
            if block in self._references:
                continue
            if self._used + len(self._free_cached) >= self._capacity:
                if not self._free_cached:
                    return
                oldest, _ = self._free_cached.popitem(last=False)
                del self._references[oldest]
            self._references[block] = 0
            self._free_cached[block] = None

    def check(self) -> None:
        assert len(self._references) >= len(self._free_cached), "a free block that is not cached"
        assert self._used + len(self._free_cached) <= self._capacity, "more blocks than the cache has"
