"""What the host is asked before an engine loads a model. Every refusal is caused for real."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dynamo_connectors.config import KvbmConfig
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.host_limits import check_host, physical_memory_bytes


def nvme(path: Path, num_bytes: int = 4096) -> KvbmConfig:
    return KvbmConfig(("hbm", "host_dram", "nvme_ssd"), 4096, nvme_path=path, nvme_bytes=num_bytes)


def refusal(config: KvbmConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_host(config)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_the_memory_of_this_host_is_known() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert physical_memory_bytes() == int(total.split()[1]) * 1024


def test_what_fits_is_accepted(tmp_path: Path) -> None:
    check_host(KvbmConfig(("hbm",)))
    check_host(KvbmConfig(host_dram_bytes=physical_memory_bytes()))
    check_host(nvme(tmp_path))


def test_the_directory_is_made_and_left_empty(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "kv"
    check_host(nvme(directory))
    assert list(directory.iterdir()) == []


def test_more_memory_than_the_host_has() -> None:
    line = refusal(KvbmConfig(host_dram_bytes=physical_memory_bytes() + 1))
    assert line.startswith("--kvbm-host-dram-gb")
    assert "lower it" in line


def test_numbers_beyond_any_machine(tmp_path: Path) -> None:
    assert "--kvbm-host-dram-gb" in refusal(KvbmConfig(host_dram_bytes=int(1e308)))
    assert "--kvbm-nvme-gb" in refusal(nvme(tmp_path, int(1e308)))


def test_more_disk_than_is_free(tmp_path: Path) -> None:
    line = refusal(nvme(tmp_path, shutil.disk_usage(tmp_path).total * 2))
    assert line.startswith("--kvbm-nvme-gb")
    assert str(tmp_path) in line


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_path_that_cannot_hold_files(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    line = refusal(nvme(tmp_path / place))
    assert line.startswith("--kvbm-nvme-path")
    assert "name a directory" in line


def test_a_dead_engines_slab_counts_as_free(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    slab = tmp_path / "kvbm-0.slab"
    slab.write_bytes(bytes(64 << 20))
    check_host(nvme(tmp_path, free - (32 << 20)))


def test_a_slab_that_goes_away_meanwhile_is_no_mistake(tmp_path: Path) -> None:
    """As seen between listing and asking: the name is there, the file is not."""
    (tmp_path / "kvbm-0.slab").symlink_to(tmp_path / "gone")
    check_host(nvme(tmp_path))
