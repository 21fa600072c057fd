"""The log of a slab: whatever happens to its bytes, what it says is true and was written; only less of it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.index_log import MIN_GROWTH_BYTES, IndexLog
from dynamo_connectors.tiers.slab_format import (
    LOG_HEADER_BYTES,
    MAX_RECORD_BYTES,
    Fact,
    encode_fact,
    encode_log_header,
    newest_facts,
    read_facts,
)
from dynamo_connectors.tiers.slot_header import MAX_KEY_BYTES

GENERATION, OTHER = b"g" * 16, b"h" * 16
CAPACITY = 8
STAGES = ("before the new file", "half of the new file", "before the rename", "after the rename")
#: Opens the log argv[1], appends a fact, then is killed at stage argv[2] of a checkpoint.
CHILD = """
import os, signal, sys
from pathlib import Path
from dynamo_connectors.tiers.index_log import IndexLog
from dynamo_connectors.tiers.slab_format import Fact
log = IndexLog(Path(sys.argv[1]), b"g" * 16, 8)
log.append([Fact(5, 5, b"five")])
log.append([Fact(6, 1, b"six")])
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
real_open, real_write, real_rename = os.open, os.write, os.rename
def half_write(fd, data):
    real_write(fd, data[: len(data) // 2])
    die()
def rename_then_die(*names):
    real_rename(*names)
    die()
if sys.argv[2] == "before the new file": os.open = lambda *_: die()
if sys.argv[2] == "half of the new file": os.write = half_write
if sys.argv[2] == "before the rename": os.rename = lambda *_: die()
if sys.argv[2] == "after the rename": os.rename = rename_then_die
log.close()
"""


def fact(sequence: int, slot: int, name: object = None) -> Fact:
    return Fact(sequence, slot, BlockKey(f"key-{sequence if name is None else name}".encode().ljust(32, b".")))


def log_of(facts: list[Fact]) -> bytes:
    return encode_log_header(GENERATION) + b"".join(encode_fact(GENERATION, each) for each in facts)


def replay(log: bytes) -> list[Fact]:
    return [each for each, _ in newest_facts(read_facts(log, GENERATION), CAPACITY)]


def written(count: int) -> list[Fact]:
    return [fact(sequence, sequence % CAPACITY) for sequence in range(1, count + 1)]


def test_the_newest_fact_of_a_slot_wins_and_the_order_is_by_age() -> None:
    assert replay(log_of([fact(1, 0), fact(2, 1), fact(3, 0), fact(4, 2)])) == [fact(2, 1), fact(3, 0), fact(4, 2)]


def test_a_block_that_moved_is_found_where_it_was_written_last() -> None:
    assert replay(log_of([fact(1, 0, "a"), fact(2, 1, "b"), fact(3, 2, "a")])) == [fact(2, 1, "b"), fact(3, 2, "a")]


def test_cut_at_every_byte_it_is_the_facts_before_the_cut() -> None:
    facts = written(6)
    log = log_of(facts)
    ends = [len(log_of(facts[:count])) for count in range(7)]
    for cut in range(len(log) + 1):
        whole = sum(end <= cut for end in ends) - 1
        assert replay(log[:cut]) == facts[: max(whole, 0)], cut


def test_every_flipped_bit_costs_facts_and_invents_none() -> None:
    facts = written(4)
    log = bytearray(log_of(facts))
    for bit in range(8 * len(log)):
        log[bit // 8] ^= 1 << bit % 8
        found = replay(bytes(log))
        assert found == facts[: len(found)]
        assert len(found) < len(facts), f"bit {bit} is not covered by any checksum"
        log[bit // 8] ^= 1 << bit % 8


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_to_the_tail_leaves_facts_that_were_written(data: st.DataObject) -> None:
    """Cut, garbage, duplicated and reordered records, records of another log, in any mixture."""
    facts = written(data.draw(st.integers(0, 30)))
    records = [encode_fact(GENERATION, each) for each in facts]
    keep = data.draw(st.integers(0, len(records)))
    pieces = st.one_of(
        st.sampled_from(records) if records else st.just(b""),
        st.binary(max_size=80),
        st.builds(lambda n: encode_fact(OTHER, fact(n, n % CAPACITY, "other")), st.integers(1, 99)),
        st.builds(lambda r, n: r[:n], st.sampled_from(records) if records else st.just(b""), st.integers(0, 60)),
    )
    tail = data.draw(st.lists(pieces, max_size=12))
    found = replay(encode_log_header(GENERATION) + b"".join(records[:keep] + tail))
    assert set(found) <= set(facts)
    by_slot = {each.slot: each for each in facts[:keep]}
    for each in found:
        assert each.sequence >= by_slot.get(each.slot, each).sequence, "an older fact won"


@pytest.mark.parametrize(
    "log",
    [b"", b"DYNKVLOG", encode_log_header(OTHER) + encode_fact(OTHER, fact(1, 1)), log_of([fact(1, CAPACITY)])],
)
def test_what_is_not_this_generations_says_nothing(log: bytes) -> None:
    assert replay(log) == []


def test_a_reopened_log_knows_what_was_appended_even_behind_a_damaged_tail(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    log = IndexLog(path, GENERATION, CAPACITY)
    log.append([fact(1, 0), fact(2, 1)])
    log.abandon()
    with path.open("ab") as file:
        file.write(b"garbage")
    log = IndexLog(path, GENERATION, CAPACITY)
    assert log.recovered == [fact(1, 0), fact(2, 1)]
    log.append([fact(3, 2)])
    log.drop(0, fact(1, 0).key)
    log.drop(1, fact(1, 0).key)
    log.close()
    log = IndexLog(path, GENERATION, CAPACITY)
    assert log.recovered == [fact(2, 1), fact(3, 2)]
    log.close()


def test_a_late_older_fact_does_not_replace_a_newer_one(tmp_path: Path) -> None:
    log = IndexLog(tmp_path / "x.log", GENERATION, CAPACITY)
    log.append([fact(9, 3)])
    log.append([fact(4, 3)])
    log.close()
    assert replay((tmp_path / "x.log").read_bytes()) == [fact(9, 3)]


def test_checkpoints_bound_its_size(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    log = IndexLog(path, GENERATION, CAPACITY)
    sizes, sequence = [], 0
    for _ in range(120):
        batch = []
        for slot in range(CAPACITY):
            sequence += 1
            batch += [Fact(sequence * 50 + n, slot, BlockKey(bytes(MAX_KEY_BYTES))) for n in range(20)]
        log.append(batch)
        sizes.append(path.stat().st_size)
    log.check()
    assert max(sizes) <= LOG_HEADER_BYTES + CAPACITY * MAX_RECORD_BYTES + MIN_GROWTH_BYTES
    assert sum(sizes[n] < sizes[n - 1] for n in range(1, 120)) >= 2, "never rewritten: the test proves nothing"
    log.close()
    assert path.stat().st_size <= LOG_HEADER_BYTES + CAPACITY * MAX_RECORD_BYTES


@pytest.mark.parametrize("stage", STAGES)
def test_killed_during_a_checkpoint_nothing_is_lost(tmp_path: Path, stage: str) -> None:
    path = tmp_path / "x.log"
    before = IndexLog(path, GENERATION, CAPACITY)
    before.append([fact(1, 0), fact(2, 1)])
    before.abandon()
    process = subprocess.run([sys.executable, "-c", CHILD, str(path), stage], check=False)
    assert process.returncode == -signal.SIGKILL
    after = IndexLog(path, GENERATION, CAPACITY)
    assert after.recovered == [fact(1, 0), Fact(5, 5, BlockKey(b"five")), Fact(6, 1, BlockKey(b"six"))]
    after.close()
    assert [each.name for each in tmp_path.iterdir()] == ["x.log"], "a temporary file stayed"


def test_a_log_that_takes_no_more_bytes_is_given_up_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """/dev/full: the system's own ENOSPC."""
    path = tmp_path / "x.log"
    log = IndexLog(path, GENERATION, CAPACITY)
    log.append([fact(1, 0)])
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._fd, inheritable=False)
    os.close(full)
    for sequence in range(2, 6):
        log.append([fact(sequence, 1)])
    assert caplog.text.count("cannot be written") == 1
    assert "No space left" in caplog.text
    log.close()
    assert replay(path.read_bytes()) == [fact(1, 0)]


def test_a_directory_that_vanishes_costs_the_log_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    log = IndexLog(folder / "x.log", GENERATION, CAPACITY)
    log.append([fact(1, 0)])
    (folder / "x.log").unlink()
    folder.rmdir()
    log.append([fact(2, 0)])
    log.close()
    assert caplog.text.count("cannot be written") == 1


def test_threads_may_append_together(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    log = IndexLog(tmp_path / "x.log", GENERATION, 64)
    numbers = list(range(1, 2001))
    random.Random(1).shuffle(numbers)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: log.append([fact(n, n % 64)]), numbers))
    log.abandon()
    log = IndexLog(tmp_path / "x.log", GENERATION, 64)
    assert log.recovered == [fact(n, n % 64) for n in range(2000 - 63, 2001)]
    log.close()
