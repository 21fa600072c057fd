"""What the host is asked before an engine loads a model. Every refusal is caused for real."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dynamo_connectors import host_room
from dynamo_connectors.config import KvbmConfig
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.host_limits import check_host
from dynamo_connectors.host_room import container_limit_bytes, memory_bytes


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
    assert memory_bytes() == min(int(total.split()[1]) * 1024, container_limit_bytes() or 2**62)


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert container_limit_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert container_limit_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("4096\n")
    assert container_limit_bytes(tmp_path) == 4096
    monkeypatch.setattr(host_room, "container_limit_bytes", lambda: 4096)
    assert "more than this host's" in refusal(KvbmConfig(host_dram_bytes=4097))


def test_what_fits_is_accepted(tmp_path: Path) -> None:
    check_host(KvbmConfig(("hbm",)))
    check_host(KvbmConfig(host_dram_bytes=memory_bytes()))
    check_host(nvme(tmp_path))


def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    """It may lie on a disk that is not mounted: made, it would fill the disk of the system."""
    for directory in (tmp_path / "kv", tmp_path / "new" / "kv", Path("/proc/nowhere")):
        line = refusal(nvme(directory))
        assert line == f"--kvbm-nvme-path {directory} does not exist; mount its disk, or mkdir -p {directory}"
    assert list(tmp_path.iterdir()) == [], "nothing is made, and nothing is left where it was tried"


def test_a_directory_is_left_empty(tmp_path: Path) -> None:
    check_host(nvme(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_more_memory_than_the_host_has() -> None:
    line = refusal(KvbmConfig(host_dram_bytes=memory_bytes() + 1))
    assert line.startswith("--kvbm-host-dram-gb")
    assert "lower it" in line


def test_numbers_beyond_any_machine(tmp_path: Path) -> None:
    assert "--kvbm-host-dram-gb" in refusal(KvbmConfig(host_dram_bytes=int(1e308)))
    assert "--kvbm-nvme-gb" in refusal(nvme(tmp_path, int(1e308)))


def test_more_disk_than_is_free(tmp_path: Path) -> None:
    line = refusal(nvme(tmp_path, shutil.disk_usage(tmp_path).total * 2))
    assert line.startswith("--kvbm-nvme-gb")
    assert str(tmp_path) in line


@pytest.mark.parametrize("place", ["file", "/proc"])
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
