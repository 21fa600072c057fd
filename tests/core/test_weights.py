"""Other weights, another name; the same weights, the same name."""

from __future__ import annotations

import os
import random
from pathlib import Path

from dynamo_connectors.weights import weights_identity


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345678")
    (folder / "config.json").write_text("{}")
    return folder


def test_a_changed_file_changes_the_name(tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    name = weights_identity(model, "auto", 0)
    assert weights_identity(model, "auto", 7) == name
    (model / "notes.txt").write_text("not a weight")
    assert weights_identity(model, "auto", 0) == name
    stat = (model / "model.safetensors").stat()
    (model / "model.safetensors").write_bytes(b"87654321")
    os.utime(model / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert weights_identity(model, "auto", 0) != name


def test_a_commit_of_a_hub_says_the_same_everywhere(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    here, there = (make(tmp_path / side / "models--x" / "snapshots" / commit) for side in ("here", "there"))
    assert weights_identity(here, "auto", 0) == weights_identity(there, "auto", 0)
    assert weights_identity(here, "gguf", 0) != weights_identity(there, "auto", 0)


def test_dummy_weights_are_named_by_their_seed(tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    assert weights_identity(model, "dummy", 1) == weights_identity(model, "dummy", 1)
    assert weights_identity(model, "dummy", 1) != weights_identity(model, "dummy", 2)


def test_weights_nobody_can_see_have_a_name_of_their_own(tmp_path: Path) -> None:
    assert weights_identity(None, "auto", 0) != weights_identity(None, "auto", 0)
    assert weights_identity(tmp_path, "auto", 0) != weights_identity(tmp_path, "auto", 0)


def test_other_bytes_of_the_same_size_and_time_have_another_name(tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    names = set()
    for seed in range(3):  # as an image whose files all have one time brings them
        (model / "model.safetensors").write_bytes(random.Random(seed).randbytes(1_000_000))
        os.utime(model / "model.safetensors", (0, 0))
        names.add(weights_identity(model, "auto", 0))
    assert len(names) == 3
    assert weights_identity(model, "auto", 0) in names


def test_a_folder_without_weights_does_not_say_which_they_are(tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    (model / "model.safetensors").unlink()
    assert weights_identity(model, "runai_streamer", 0) != weights_identity(model, "runai_streamer", 0)
    assert weights_identity(model, "dummy", 0) == weights_identity(model, "dummy", 0)
