"""KV of one GPU handed to another by our own transport: pages, host rows, window, READ, pages. Every byte is compared.

python -m benchmarks.served.window_check OUT.json [SECONDS] [TIER_GB] [HBM_GB]
The reader is this process, on the second GPU, the owner is its child, on the first; without GPUs both lie in host
memory. Each round hands over other bytes through the same host slots and window rows. In every third round the owner
writes over half of its host slots while they are read: what is then called loaded must be right all the same.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Llama-3.1-8B in blocks of 16 tokens: a block row of 2 MiB.
_LAYERS, _PAGE_BYTES = 32, 64 << 10
_OWNER_SECONDS = 240.0
_JOB_SECONDS = 60.0
_SECRET = b"window check"


def main(out: Path, seconds: float = 60.0, tier_gb: float = 4.3, hbm_gb: float = 1.0) -> None:
    # Before torch looks.
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    command = [sys.executable, "-m", "benchmarks.served.window_check", "own", str(tier_gb), str(hbm_gb)]
    owner = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    facts: dict[str, Any] = {"rounds": [], "wrong": 0}
    try:
        reader = Side(tier_gb, hbm_gb)
        reader.read_from(hbm_gb)
        port = json.loads(said(owner))["port"]
        started, number = time.monotonic(), 0
        while time.monotonic() - started < seconds or number < 6:
            facts["rounds"].append(one_round(reader, owner, port, number))
            facts["wrong"] += facts["rounds"][-1]["wrong"]
            number += 1
        facts["counts"] = {"|".join(key): count for key, count in reader.tier.take_counts().items()}
        print(json.dumps(facts), flush=True)
        assert owner.stdin is not None
        owner.stdin.close()
        facts["owner_ended"] = owner.wait(30.0)
        reader.engine.close()
    finally:
        owner.kill()
        out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{number} rounds, {facts['wrong']} wrong blocks, {facts['counts']}", flush=True)
    os._exit(1 if facts["wrong"] else 0)


def said(owner: subprocess.Popen[str]) -> str:
    """NIXL writes there as well."""
    assert owner.stdout is not None
    return next(line for line in owner.stdout if line.startswith("{"))


def one_round(reader: Side, owner: subprocess.Popen[str], port: int, number: int) -> dict[str, Any]:
    """Blocks that are called loaded are right, in a quiet round all of them are."""
    from dynamo_connectors.blocks import BlockKey
    from dynamo_connectors.config import PEER
    from dynamo_connectors.jobs import LoadItem, LoadJob
    from dynamo_connectors.transport.tickets import Ticket

    blocks = (reader.blocks, reader.blocks // 8, 64, 8)[number // 3 % 4]
    is_hostile, lease = number % 3 == 2, os.urandom(16)
    assert owner.stdin is not None
    owner.stdin.write(json.dumps({"round": number, "blocks": blocks, "lease": lease.hex()}) + "\n")
    owner.stdin.flush()
    owner_facts = json.loads(said(owner))
    places = random.Random(number).sample(range(reader.blocks), blocks)
    reader.clear()
    ticket = BlockKey(Ticket("127.0.0.1", port, lease).encode())
    items = tuple(LoadItem(key(number, at), PEER, 0, places[at], ticket) for at in range(blocks))
    if is_hostile:
        owner.stdin.write(json.dumps({"spoil": number, "blocks": blocks}) + "\n")
        owner.stdin.flush()
    started = time.perf_counter()
    failed = reader.run(LoadJob(number + 1, f"r{number}", items))
    taken = time.perf_counter() - started
    if is_hostile:
        said(owner)
    good = [at for at in range(blocks) if items[at].key not in failed]
    wrong = reader.count_wrong(number, [(at, places[at]) for at in good])
    wrong += 0 if is_hostile else blocks - len(good)
    reader.tier.unwatch(Ticket("127.0.0.1", port, lease))
    reader.engine.check()
    facts = {"blocks": blocks, "hostile": is_hostile, "good": len(good), "wrong": wrong, "seconds": round(taken, 5)}
    facts |= {"gb_s": round(len(good) * reader.row_bytes / taken / 1e9, 2), "why": Counter(failed.values())}
    return facts | owner_facts


def key(number: int, at: int) -> Any:
    from dynamo_connectors.blocks import BlockKey

    return BlockKey(b"round %d block %d" % (number, at))


class Side:
    """Pages of an engine that is not there, and our transfer engine over them."""

    def __init__(self, tier_gb: float, hbm_gb: float) -> None:
        import torch
        from dynamo_kernels.block_view import BlockView

        from dynamo_connectors.pinning import pin_host_memory
        from dynamo_connectors.tiers.dram import DramStore

        self.torch, is_gpu = torch, torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if is_gpu else torch.device("cpu")
        layers, page = (_LAYERS, _PAGE_BYTES) if is_gpu else (4, 4 << 10)
        self.row_bytes = layers * page
        self.blocks = max(64, int(tier_gb * 1e9 // self.row_bytes))
        self.pages = [torch.zeros((self.blocks, page), dtype=torch.uint8, device=self.device) for _ in range(layers)]
        self.view = BlockView.of_pages(self.pages, [page] * layers)
        self.dram = DramStore(self.blocks, self.row_bytes, pin_host_memory if is_gpu else None)

    def read_from(self, hbm_gb: float) -> None:
        from dynamo_connectors.hbm_rows import HbmRows
        from dynamo_connectors.tiers.dram import DramStore
        from dynamo_connectors.transfer import Stores, TransferEngine
        from dynamo_connectors.transport.agent import Region
        from dynamo_connectors.transport.peer_tier import PeerSettings, PeerTier

        def make(staging: DramStore, rows: HbmRows | None) -> PeerTier:
            assert rows is not None
            host = Region(staging.rows.ctypes.data, staging.rows.nbytes)
            settings = PeerSettings(0, b"n", self.row_bytes, _SECRET, _JOB_SECONDS, 1 << 30, 1 << 40)
            self.tier = PeerTier(settings, [host, rows.region])
            return self.tier

        rows = HbmRows(max(16, int(hbm_gb * 1e9 // self.row_bytes)), self.row_bytes, self.device)
        self.engine = TransferEngine(self.view, Stores(self.dram, peer=make, peer_rows=rows))

    def run(self, job: Any) -> dict[Any, str]:
        from dynamo_kernels.fence import ComputeFence

        self.engine.submit(job, ComputeFence(self.device))
        deadline = time.monotonic() + _JOB_SECONDS
        while time.monotonic() < deadline:
            for report in self.engine.poll(0.0005):
                return dict(report.failed)
        raise TimeoutError("a job does not end")

    def pattern(self, number: int, ats: list[int], layer: int) -> Any:
        """What layer `layer` of these blocks holds in a round: another word at every place."""
        torch = self.torch
        words = self.pages[0].shape[1] // 8
        block = torch.tensor(ats, dtype=torch.int64, device=self.device)[:, None]
        inside = torch.arange(words, dtype=torch.int64, device=self.device)[None, :]
        seed = (number * 1_000_003 + layer) * 7_919
        mixed = (block * 2_654_435_761 + inside * 40_503 + seed) * 6_364_136_223_846_793_005
        return (mixed ^ (mixed >> 29)).view(torch.uint8)

    def write(self, number: int, blocks: int) -> None:
        for layer, pages in enumerate(self.pages):
            pages[:blocks] = self.pattern(number, list(range(blocks)), layer)

    def clear(self) -> None:
        for pages in self.pages:
            pages.zero_()
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def count_wrong(self, number: int, pairs: list[tuple[int, int]]) -> int:
        """Of (block of the owner, page here)."""
        torch = self.torch
        if not pairs:
            return 0
        ats, here = [at for at, _ in pairs], torch.tensor([place for _, place in pairs], device=self.device)
        wrong = torch.zeros(len(pairs), dtype=torch.bool, device=self.device)
        for layer, pages in enumerate(self.pages):
            wrong |= (pages[here] != self.pattern(number, ats, layer)).any(dim=1)
        return int(wrong.sum().item())


def own(tier_gb: float, hbm_gb: float) -> None:
    from dynamo_connectors.hbm_rows import HbmRows
    from dynamo_connectors.jobs import StoreItem, StoreJob
    from dynamo_connectors.transfer import Stores, TransferEngine
    from dynamo_connectors.transport.server import PeerServer, ServerSettings, host_rows
    from dynamo_connectors.window import Window

    side = Side(tier_gb, hbm_gb)
    side.engine = TransferEngine(side.view, Stores(side.dram))
    window = Window(side.dram, HbmRows(max(16, int(hbm_gb * 1e9 // side.row_bytes)), side.row_bytes, side.device))
    settings = ServerSettings("127.0.0.1", 0, b"n", _SECRET, opens_shelf=True)
    server = PeerServer(settings, host_rows(side.dram, window))
    print(json.dumps({"port": server.port}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        number, blocks = asked.get("round", asked.get("spoil")), asked["blocks"]
        if "spoil" in asked:
            for slot in range(0, blocks, 2):
                side.dram.set_key(slot, None)
                side.dram.rows[slot] = number % 251
            print(json.dumps({}), flush=True)
            continue
        side.write(number, blocks)
        items = tuple(StoreItem(key(number, at), at, at) for at in range(blocks))
        started = time.perf_counter()
        failed = side.run(StoreJob(number + 1, items))
        down = round(blocks * side.row_bytes / (time.perf_counter() - started) / 1e9, 2)
        server.take_ended()
        server.export(bytes.fromhex(asked["lease"]), {item.key: item.slot for item in items})
        server.check()
        print(json.dumps({"store_gb_s": down, "store_failed": len(failed)}), flush=True)
    assert server.close(), "the server does not end"
    side.engine.close()
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "own":
        own(*map(float, sys.argv[2:]))
    else:
        main(Path(sys.argv[1]), *map(float, sys.argv[2:]))
