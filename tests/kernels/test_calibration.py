"""Figures on disk: read back as written, never believed when anything is odd about them, and shown to people."""

from __future__ import annotations

import json
from pathlib import Path as FilePath

import pytest
from dynamo_kernels.calibration import Calibration, as_json, calibration_file, from_json, load, save, table
from dynamo_kernels.choices import Choice, Direction, Figure, Path, Point

POINT = Point(Direction.H2D, 16 << 10, 4096, True)
FIGURES = (Figure(Choice(Path.DMA), 41e9, 0.038), Figure(Choice(Path.SPLIT, 1, 0.5), 48e9, None))
MADE = Calibration("NVIDIA H200", 13000, 1.5, {POINT: FIGURES})


def test_figures_come_back_as_they_were_written(tmp_path: FilePath) -> None:
    file = tmp_path / "deep" / "copy.json"
    save(MADE, file)
    assert load(file, MADE.device, MADE.driver) == MADE
    assert list(file.parent.iterdir()) == [file], "no temporary file stays"


def test_a_device_and_a_driver_have_a_file_of_their_own() -> None:
    home = {"HOME": "/srv/me"}
    assert calibration_file("NVIDIA H200", 13000, home) == FilePath(
        "/srv/me/.cache/dynamo-connectors/copy-nvidia-h200-driver13000.json"
    )
    elsewhere = calibration_file("A/../B", 1, {"XDG_CACHE_HOME": "/cache", **home})
    assert elsewhere == FilePath("/cache/dynamo-connectors/copy-a-b-driver1.json")


def test_without_a_file_there_are_no_figures(tmp_path: FilePath) -> None:
    assert load(tmp_path / "none", "x", 1) is None


@pytest.mark.parametrize(("device", "driver"), [("NVIDIA H100", 13000), ("NVIDIA H200", 12080)])
def test_another_devices_figures_are_not_used(device: str, driver: int, tmp_path: FilePath) -> None:
    save(MADE, tmp_path / "copy.json")
    assert load(tmp_path / "copy.json", device, driver) is None


def test_whatever_is_wrong_with_the_file_it_is_measured_again(tmp_path: FilePath) -> None:
    file, whole = tmp_path / "copy.json", as_json(MADE)
    for text in (whole[: len(whole) // 2], "", "[]", "null", "{}", whole.replace("split", "fastest")):
        file.write_text(text)
        assert load(file, MADE.device, MADE.driver) is None
    file.write_bytes(b"\xff\xfe")
    assert load(file, MADE.device, MADE.driver) is None


@pytest.mark.parametrize(
    ("field", "value"), [("bytes_per_second", -1), ("bytes_per_second", 0), ("slowdown", "much"), ("choice", {})]
)
def test_figures_that_cannot_be_are_refused(field: str, value: object) -> None:
    written = json.loads(as_json(MADE))
    written["points"][0]["figures"][0][field] = value
    with pytest.raises((ValueError, KeyError)):
        from_json(json.dumps(written), MADE.device, MADE.driver)


def test_a_place_that_cannot_be_written_is_no_failure(tmp_path: FilePath, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    save(MADE, tmp_path / "file" / "copy.json")
    assert "could not be kept" in caplog.text


def test_the_table_names_the_choice() -> None:
    assert table(MADE).splitlines() == [
        "NVIDIA H200, driver 13000: measured in 1.50 s",
        "h2d 16 KiB x 4096 lines",
        "    dma                                  41.0 GB/s  decode +3.8%",
        "  * split, 50% engines, 1 CTAs           48.0 GB/s",
    ]
