"""What is known of the token ids behind prompt texts: text-chain nodes -> how many tokens of which tokenised
prompt.

Engines tokenise off the hot path; the next request that shares a text prefix finds its token blocks here.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from .block_hash import token_chain
from .text_chain import UNIT_BYTES, chain_units

DEFAULT_MAX_NODES = 100_000
DEFAULT_MAX_TOKENS = 8_000_000  # 64 MB of ids, and at most half as much again of block chains


class TokenRun:
    """One tokenised prompt; its block chains are made once per block size."""

    __slots__ = ("_chains", "_root", "nodes", "token_ids")

    def __init__(self, token_ids: Sequence[int], root: int) -> None:
        self.token_ids = array("q", token_ids)
        self.nodes = 0  # text-chain nodes that lead here
        self._root = root
        self._chains: dict[int, list[int]] = {}

    def chain(self, block_tokens: int) -> list[int]:
        found = self._chains.get(block_tokens)
        if found is None:
            found = self._chains[block_tokens] = token_chain(self.token_ids, block_tokens, self._root)
        return found


class TokenMemo:
    """A bounded LRU from text-chain node to (run, tokens of that run that the text prefix surely covers)."""

    def __init__(self, max_nodes: int = DEFAULT_MAX_NODES, max_tokens: int = DEFAULT_MAX_TOKENS) -> None:
        self._max_nodes = max_nodes
        self._max_tokens = max_tokens
        self._tokens = 0  # of all runs that a node leads to
        self._known: OrderedDict[int, tuple[TokenRun, int]] = OrderedDict()
        self.tokens_per_byte = 0.25

    def __len__(self) -> int:
        return len(self._known)

    def knows(self, node: int) -> bool:
        return node in self._known

    def learn(self, chain: Sequence[int], text_bytes: int, token_ids: Sequence[int], root: int) -> None:
        """The engine says that a text of `text_bytes` bytes with this chain is these ids.

        A partial prefix is credited its proportional share, rounded down; only the whole text is credited in
        full.
        """
        if not chain or not token_ids:
            return
        run = TokenRun(token_ids, root)
        count = len(run.token_ids)
        self._tokens += count
        for depth in range(len(chain), 0, -1):
            covered = min(chain_units(depth) * UNIT_BYTES, text_bytes)
            node = chain[depth - 1]
            run.nodes += 1
            self._leave(self._known.pop(node, None))
            self._known[node] = run, count if covered == text_bytes else count * covered // text_bytes
        # One leftover node keeps a whole run: a long conversation leaves one per turn.
        while len(self._known) > self._max_nodes or self._tokens > self._max_tokens:
            self._leave(self._known.popitem(last=False)[1])
        if text_bytes >= UNIT_BYTES:
            self.tokens_per_byte += 0.1 * (min(2.0, count / text_bytes) - self.tokens_per_byte)

    def _leave(self, known: tuple[TokenRun, int] | None) -> None:
        if known is not None:
            known[0].nodes -= 1
            if not known[0].nodes:
                self._tokens -= len(known[0].token_ids)

    def recall(self, chain: Sequence[int]) -> tuple[TokenRun, int, int] | None:
        """The deepest known node: (run, tokens covered, nodes covered), or None."""
        for depth in range(len(chain), 0, -1):
            known = self._known.get(chain[depth - 1])
            if known is not None:
                return known[0], known[1], depth
        return None

    def check(self) -> None:
        assert len(self._known) <= self._max_nodes, f"{len(self._known)} nodes of {self._max_nodes}"
        runs = {id(run): run for run, _ in self._known.values()}
        assert sum(run.nodes for run in runs.values()) == len(self._known), "nodes of runs miscounted"
        held = sum(len(run.token_ids) for run in runs.values())
        assert held == self._tokens <= self._max_tokens, f"{held} tokens held, {self._tokens} counted"
        for run, covered in self._known.values():
            assert 0 <= covered <= len(run.token_ids), f"{covered} tokens covered of {len(run.token_ids)}"
        assert 0 <= self.tokens_per_byte <= 2, f"{self.tokens_per_byte} tokens per byte"
