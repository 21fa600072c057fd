"""How much of a prompt each engine already holds: exact events where they are complete, sent prompts
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .approx_index import DEFAULT_CAPACITY_UNITS, ApproxIndex
from .block_hash import token_chain
from .hints import Reach
from .kv_index import KvIndex
from .policy import TierWeights, credited_blocks
from .text_chain import UNIT_BYTES, UNIT_TOKENS, Prompt, chain_units
from .token_memo import TokenMemo, TokenRun

# A prompt just sent is counted as held although the engine has not said so yet.
SPECULATION_SECONDS = 5.0
_MOST_KEPT_TOKENS = 262_144
TIER_NAMES = ("hbm", "host", "disk", "object")


class Knowledge:
    """The exact index, the approximate index, and the memo that lets a text prompt meet the exact one.

    `exact_mask` has the bit of every engine whose events are complete; only for those may the events say
    "no".
    """

    def __init__(self, default_block_tokens: int = 16) -> None:
        self.exact = KvIndex()
        self.approx = ApproxIndex()
        self.memo = TokenMemo()
        self.exact_mask = 0
        self.event_mask = 0
        self.weights = TierWeights()
        self.on_sent: Callable[[int, tuple[int, ...]], None] | None = None  # who tells other proxies, if there are any
        self._default_block_tokens = default_block_tokens
        #: Of the last prompt of token ids: its ids, root, block size and chain. Who asks twice asks at once.
        self._last: tuple[tuple[int, ...], int, int, list[int]] = ((), 0, 0, [])

    def prompt_tokens(self, prompt: Prompt) -> int:
        """The prompt's length in tokens; an estimate for a text that no engine has tokenised."""
        if prompt.token_ids:
            return len(prompt.token_ids)
        if not prompt.chain:
            return 0
        return max(1, int(len(prompt.text) * self.memo.tokens_per_byte))

    def matched_tokens(self, prompt: Prompt, mask: int, now: float) -> dict[int, int]:
        """Tokens of the prompt that each engine of `mask` holds (engines with none may be left out)."""
        chain = prompt.chain
        if not chain and not prompt.token_ids:
            return {}
        nodes = self.approx.matched(chain, mask)
        if not nodes and not self.event_mask:
            return nodes
        unit = self._unit_tokens(prompt)
        sent = {slot: int(chain_units(depth) * unit) for slot, depth in nodes.items()}
        events = mask & self.event_mask
        if not events:
            return sent
        exact, known = self._exact_tokens(prompt, events)
        since = now - SPECULATION_SECONDS
        for slot in _slots(events):
            said = exact.get(slot, 0)
            guess = sent.get(slot, 0)
            if self.exact_mask >> slot & 1 and known and guess > said:
                # The events deny it, or do not reach that far: believe what was sent a moment ago, or lies
                # beyond.
                beyond = said + self._block(slot) > known
                if not beyond:
                    guess = int(chain_units(self.approx.fresh(slot, chain, nodes.get(slot, 0), since)) * unit)
            sent[slot] = max(said, guess)
        return sent

    def reaches(self, prompt: Prompt, mask: int) -> dict[int, Reach]:
        """In which tiers each engine of `mask` holds the prompt. Where events cannot tell, what was sent to an engine
        counts as held in all of them.
        """
        found: dict[int, Reach] = {}
        if not prompt.chain and not prompt.token_ids:
            return found
        recalled = None if prompt.token_ids else self.memo.recall(prompt.chain)
        told = mask & self.event_mask if prompt.token_ids or recalled is not None else 0
        for size, slots in self._by_size(told).items():
            blocks = self._blocks(prompt, recalled, size)
            for slot, depth in self.exact.walk(blocks, slots).items():
                near = self.exact.tier_runs(slot, blocks, depth)[1]
                host = self.exact.host_run(slot, blocks, depth)
                found[slot] = Reach(depth * size, near * size, host * size)
        unit = self._unit_tokens(prompt)
        for slot, nodes in self.approx.matched(prompt.chain, mask & ~told).items():
            tokens = int(chain_units(nodes) * unit)
            found[slot] = Reach(tokens, tokens, tokens)
        return found

    def tiers(self, prompt: Prompt, slot: int) -> dict[str, int]:
        """How many of the prompt's leading tokens one engine holds, by the nearest tier; where events cannot tell, what
        was sent to it is taken to lie in HBM. The last unit of a text may be a part of one.
        """
        recalled = None if prompt.token_ids else self.memo.recall(prompt.chain)
        if self.event_mask >> slot & 1 and (prompt.token_ids or recalled is not None):
            size = self._block(slot)
            blocks = self._blocks(prompt, recalled, size)
            depth = self.exact.walk(blocks, 1 << slot).get(slot, 0)
            ends = [run * size for run in self.exact.tier_runs(slot, blocks, depth)] if depth else []
        else:
            nodes = self.approx.matched(prompt.chain, 1 << slot).get(slot, 0)
            ends = [min(int(chain_units(nodes) * self._unit_tokens(prompt)), self.prompt_tokens(prompt))]
        found = {name: end - start for name, start, end in zip(TIER_NAMES, (0, *ends), ends, strict=False)}
        return {name: tokens for name, tokens in found.items() if tokens}

    def sent(self, slot: int, prompt: Prompt, now: float) -> None:
        """The prompt was dispatched to an engine."""
        if prompt.chain:
            self.approx.insert(slot, prompt.chain, now)
        if self.on_sent is not None:
            self.on_sent(slot, prompt.chain)

    def set_capacity_tokens(self, slot: int, tokens: int) -> None:
        """Bound the approximate model by the engine's KV capacity."""
        per_unit = UNIT_BYTES * self.memo.tokens_per_byte
        self.approx.set_capacity(slot, min(int(tokens / max(per_unit, 1.0)), DEFAULT_CAPACITY_UNITS * 16))

    def forget(self, slot: int) -> None:
        """An engine left, or its number goes to another one."""
        self.exact.clear(slot)
        self.approx.clear(slot)
        self.exact_mask &= ~(1 << slot)
        self.event_mask &= ~(1 << slot)

    def _block(self, slot: int) -> int:
        return self.exact.block_tokens(slot) or self._default_block_tokens

    def _exact_tokens(self, prompt: Prompt, mask: int) -> tuple[dict[int, int], int]:
        """Held tokens per engine by the events, and how many of the prompt's tokens are known at all."""
        found: dict[int, int] = {}
        known = len(prompt.token_ids)
        recalled = None if prompt.token_ids else self.memo.recall(prompt.chain)
        if recalled is not None:
            known = recalled[1]
        if not known:
            return found, known
        for size, slots in self._by_size(mask).items():
            blocks = self._blocks(prompt, recalled, size)
            for slot, depth in self.exact.walk(blocks, slots).items():
                runs = self.exact.tier_runs(slot, blocks, depth)
                found[slot] = depth * size if runs[0] == depth else int(credited_blocks(runs, self.weights) * size)
        return found, known

    def _by_size(self, mask: int) -> dict[int, int]:
        """The engines of `mask` by the size of their blocks, as masks."""
        by_size: dict[int, int] = {}
        for slot in _slots(mask):
            size = self._block(slot)
            by_size[size] = by_size.get(size, 0) | 1 << slot
        return by_size

    def _blocks(self, prompt: Prompt, recalled: tuple[TokenRun, int, int] | None, size: int) -> Sequence[int]:
        """The chain of the prompt's full blocks, as far as its tokens are known."""
        if recalled is not None:
            return recalled[0].chain(size)[: recalled[1] // size]
        ids, root, block_tokens, chain = self._last
        if ids is not prompt.token_ids or root != prompt.root or block_tokens != size:
            chain = token_chain(prompt.token_ids, size, prompt.root)
            if len(prompt.token_ids) <= _MOST_KEPT_TOKENS:
                self._last = prompt.token_ids, prompt.root, size, chain
        return chain

    def _unit_tokens(self, prompt: Prompt) -> float:
        """Tokens that a unit of the prompt's text chain is worth."""
        return UNIT_TOKENS if prompt.token_ids else UNIT_BYTES * self.memo.tokens_per_byte

    def check(self) -> None:
        self.exact.check()
        self.approx.check()
        self.memo.check()
        assert not self.exact_mask & ~self.event_mask, "an engine is exact without events"


def _slots(mask: int) -> list[int]:
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found
