"""The kernels themselves, without a GPU: in Triton's interpreter, and as the instructions they compile to."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def child(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Triton decides when it is imported whether it interprets: each test has a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("part", "ran"),
    [
        ("copy", "42 copies"),
        ("tma", "8 stores, 5 by TMA"),
        ("compression", "42 codecs"),
        ("staged", "4 copies each way"),
    ],
)
def test_every_kernel_in_the_interpreter(part: str, ran: str) -> None:
    done = child("tests.kernels.interpreted", part, TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout.strip()) == (0, ran), done.stdout + done.stderr[-2000:]


def test_all_kv_moves_sixteen_bytes_at_a_time() -> None:
    """No load or store of KV is scalar. The pipeline reads even the ids ahead (4 and 8 bytes, asynchronously)."""
    done = child("tests.kernels.compiled")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 6
    for kernel in found:
        assert kernel["stores"], kernel
        assert all(".v2.b64" in each or ".v4.b32" in each for each in kernel["stores"]), kernel
        wide = [each for each in kernel["loads"] if ".v2.b64" in each or ".v4.b32" in each]
        if kernel["kernel"] == "pipelined":
            assert kernel["loads"] == []
            assert set(kernel["async_bytes"]) == {4, 8, 16}
            assert kernel["async_bytes"].count(16) >= 4 * 5, "five tiles of four loads a thread before the loop"
            assert kernel["shared_bytes"] >= 5 * (16 << 10)
        else:
            assert len(wide) == len(kernel["stores"]), "as many bytes come as go; the rest are ids and offsets"
            assert kernel["async_bytes"] == []


def test_tma_moves_all_kv() -> None:
    """No thread loads or stores KV: tensor copies both ways; no scratch memory (Triton wants an allocator for it)."""
    done = child("tests.kernels.compiled", "tma")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["loads"], found["stores"], found["bulk_stores"], found["scratch"]) == ([], [], 1, 0)
    assert found["bulk_loads"] == 6, "five tiles before the loop"
    assert 6 * (16 << 10) <= found["shared_bytes"] <= 100 << 10


def test_compression_moves_values_sixteen_bytes_at_a_time() -> None:
    """One value at a time, as at first, a load took as long as twice the bytes without compression (H200)."""
    done = child("tests.kernels.compiled", "compression")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 12
    for kernel in found:
        for kind, scales in (("loads", 12), ("stores", 1)):
            wide = [each for each in kernel[kind] if ".v4.b32" in each or ".v2.b64" in each]
            narrow = [each for each in kernel[kind] if each not in wide]
            assert wide, kernel
            # Ids, offsets and scales: a few, whatever the size of the tile.
            assert len(narrow) <= scales, kernel
            assert not any(".b8" in each or ".b16" in each for each in narrow), kernel
