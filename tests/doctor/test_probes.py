"""Each probe of the doctor, with the failure it looks for caused for real wherever this machine allows."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from dynamo_connectors.doctor import gpu, memory, nvme, plugins, transfer, versions
from dynamo_connectors.doctor.child import run_python
from dynamo_connectors.doctor.finding import Finding, Level
from tests.house.repository import import_path


def only(findings: list[Finding], name: str) -> Finding:
    (found,) = (finding for finding in findings if finding.name == name)
    return found


def write_distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


# -- records --------------------------------------------------------------------------------------------------------
def test_a_failure_without_remedy_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="without a remedy"):
        Finding(Level.FAIL, "x", "broken")


# -- versions -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("version", "inside"),
    [("0.24", True), ("0.24.0rc1", True), ("0.33.9+cpu", True), ("0.34.0", False), ("0.23.1", False), ("1.0", False)],
)
def test_version_ranges(version: str, inside: bool) -> None:
    assert versions.is_in_range(version, ">=0.24,<0.34") is inside


def test_the_range_comes_from_our_metadata() -> None:
    assert versions.supported_range("vllm") == ">=0.24,<0.34"
    assert versions.supported_range("sglang") == ">=0.5.14,<0.6"
    assert versions.supported_range("tgi") is None


def test_an_old_engine_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, "sglang", "0.4.1")
    monkeypatch.syspath_prepend(tmp_path)
    finding = only(versions.examine_versions(), "sglang")
    assert finding.level is Level.FAIL
    assert finding.remedy == "pip install 'sglang>=0.5.14,<0.6'"


def test_no_engine_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    findings = versions.examine_versions()
    assert only(findings, "engines").level is Level.ABSENT


def test_the_locked_engine_is_supported() -> None:
    assert only(versions.examine_versions(), "vllm").level is Level.OK


# -- plugins --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("value", ["other", "", "dynamo2, other"])
def test_an_allow_list_without_us_fails(engine: str, value: str) -> None:
    variable = plugins.ALLOW_LISTS[engine]
    finding = plugins.judge_allow_list(engine, {variable: value})
    assert finding is not None
    assert finding.level is Level.FAIL
    assert finding.remedy.endswith("dynamo")


def test_an_allow_list_with_us_is_fine() -> None:
    assert plugins.judge_allow_list("vllm", {}) is None
    finding = plugins.judge_allow_list("vllm", {"VLLM_PLUGINS": "other,dynamo"})
    assert finding is not None
    assert finding.level is Level.OK


def test_our_entry_points_are_registered() -> None:
    for engine, group in plugins.GROUPS.items():
        (entry,) = (entry for entry in metadata.entry_points(group=group) if entry.name == plugins.PLUGIN)
        assert entry.value == f"dynamo_entrypoints.{engine}_plugin:register"


def test_a_missing_entry_point_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    finding = plugins.examine_plugin("vllm")
    assert finding.level is Level.FAIL
    assert "no entry point" in finding.detail


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("dynamo_nowhere.plugin:register", "No module named 'dynamo_nowhere'"),
        ("dynamo_connectors:regster", "has no attribute 'regster'"),
        ("sys:exit(", "does not load"),
        ("os:abort", "killed by SIGABRT"),
    ],
)
def test_a_corrupted_entry_point_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, words: str) -> None:
    write_distribution(tmp_path, "dynamo-connectors", "9.9", f"[vllm.general_plugins]\ndynamo = {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = plugins.examine_plugin("vllm")
    assert finding.level is Level.FAIL
    assert words in finding.detail
    assert finding.remedy


def test_a_good_entry_point_loads() -> None:
    entry = EntryPoint(name="dynamo", value="os:getpid", group="vllm.general_plugins")
    assert plugins.load_plugin("vllm", entry).level is Level.OK


def test_an_entry_point_that_does_not_end_is_not_called_broken() -> None:
    """A busy machine looks the same as a plugin that hangs; reinstalling helps with neither."""
    entry = EntryPoint(name="dynamo", value="signal:pause", group="vllm.general_plugins")
    finding = plugins.load_plugin("vllm", entry, timeout_seconds=1)
    assert finding.level is Level.WARN
    assert "hangs" in finding.detail
    assert "no answer after 1 s" in finding.detail
    assert "reinstall" not in finding.remedy


def test_a_child_that_complains_is_quoted() -> None:
    outcome = run_python("import sys; print('fine'); sys.exit('it is broken\\n')", timeout_seconds=30)
    assert (outcome.ok, outcome.stdout, outcome.complaint) == (False, "fine\n", "it is broken")


# -- NIXL -----------------------------------------------------------------------------------------------------------
def test_nixl_of_the_locked_environment_loads() -> None:
    findings = transfer.examine_transfer()
    assert only(findings, "NIXL").level is Level.OK
    for plugin in ("UCX", "POSIX", "OBJ"):
        assert only(findings, f"NIXL {plugin}").level is Level.OK
    if only(gpu.examine_gpu(), "GPU").level is not Level.OK:
        assert only(findings, "NIXL GDS").level is Level.ABSENT


def test_nixl_missing_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    (finding,) = transfer.examine_transfer()
    assert finding.level is Level.ABSENT
    assert "nixl" in finding.remedy


def test_a_broken_nixl_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "nixl_cu12"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_api.py").write_text("raise ImportError('libucp.so.0: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = only(transfer.examine_transfer(), "NIXL UCX")
    assert finding.level is Level.FAIL
    assert "libucp.so.0" in finding.detail


# -- memory ---------------------------------------------------------------------------------------------------------
def test_more_memory_than_there_is_fails() -> None:
    assert only(memory.examine_memory(1e6), "memory").level is Level.FAIL
    assert only(memory.examine_memory(0.01), "memory").level is Level.OK
    assert memory.judge_memory(10 * 10**9, 10**9, 5).level is Level.WARN


def memory_under(limit_bytes: int, wanted_gb: float, rdma_devices: Path) -> Finding:
    """What a process without CAP_IPC_LOCK and with that RLIMIT_MEMLOCK finds."""
    code = (
        "import ctypes, json, resource, sys; from pathlib import Path\n"
        "limit, wanted, rdma = int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))\n"
        "from dynamo_connectors.doctor import memory\n"
        "found = [f for f in memory.examine_memory(wanted, rdma) if f.name == 'locked memory'][0]\n"
        "print(json.dumps([found.level.value, found.name, found.detail, found.remedy]))\n"
    )
    command = [sys.executable, "-c", code, str(limit_bytes), str(wanted_gb), str(rdma_devices)]
    if memory.has_ipc_lock(Path("/proc/self/status").read_text()):
        command = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", *command]
    environment = {**os.environ, "PYTHONPATH": import_path()}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout
    level, *texts = json.loads(output)
    return Finding(Level(level), *texts)


def test_tiny_memlock_fails_with_rdma(tmp_path: Path) -> None:
    (tmp_path / "mlx5_0").touch()
    finding = memory_under(65536, 1, rdma_devices=tmp_path)
    assert finding.level is Level.FAIL
    assert "memlock=-1" in finding.remedy


def test_tiny_memlock_warns_without_rdma(tmp_path: Path) -> None:
    assert memory_under(65536, 1, rdma_devices=tmp_path / "none").level is Level.WARN
    assert memory_under(65536, 0.00001, rdma_devices=tmp_path).level is Level.OK


def test_unlimited_memlock_is_fine() -> None:
    assert memory.judge_locked_memory(None, True, 100).level is Level.OK
    assert memory.judge_locked_memory(resource.getpagesize(), True, None).level is Level.WARN


@pytest.mark.parametrize(
    ("free", "total", "level"),
    [(60 * 2**20, 64 * 2**20, Level.WARN), (10**9, 2**40, Level.WARN), (5 * 10**9, 2**40, Level.OK)],
)
def test_shared_memory(free: int, total: int, level: Level) -> None:
    assert memory.judge_shared_memory(free, total, 4).level is level


# -- disk -----------------------------------------------------------------------------------------------------------
def test_a_missing_directory_fails(tmp_path: Path) -> None:
    (finding,) = nvme.examine_nvme(tmp_path / "none", None)
    assert finding.level is Level.FAIL
    assert "mkdir" in finding.remedy


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (finding,) = nvme.examine_nvme(tmp_path / "file", None)
    assert "is not a directory" in finding.detail


def test_an_unwritable_directory_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    folder = Path("/proc") if os.geteuid() == 0 else tmp_path  # root writes anywhere but there
    (finding,) = nvme.examine_nvme(folder, None)
    assert finding.level is Level.FAIL
    assert "cannot write" in finding.detail


def test_a_good_directory_is_left_as_it_was(tmp_path: Path) -> None:
    written, space = nvme.examine_nvme(tmp_path, 0.001)
    assert written.level in (Level.OK, Level.WARN)
    assert space.level is Level.OK
    assert list(tmp_path.iterdir()) == []


def test_a_slab_that_is_there_already_counts_as_room(tmp_path: Path) -> None:
    """A disk that is full of our own slab is no reason to stop the engine that will use it again."""
    (tmp_path / "kvbm-0.slab").write_bytes(bytes(64 << 20))
    free_gb = shutil.disk_usage(tmp_path).free / 1e9
    assert nvme.examine_nvme(tmp_path, free_gb + 0.03)[1].level is Level.OK


def test_too_little_space_fails(tmp_path: Path) -> None:
    assert nvme.examine_nvme(tmp_path, 1e9)[1].level is Level.FAIL


def test_no_path_no_finding() -> None:
    assert nvme.examine_nvme(None, 5) == []


# -- GPU ------------------------------------------------------------------------------------------------------------
def test_no_driver_means_cpu_only() -> None:
    (finding,) = gpu.examine_gpu("libnvidia-ml-nowhere.so.1")
    assert finding.level is Level.WARN
    assert "CPU only" in finding.detail


def test_a_driver_that_does_not_answer_fails() -> None:
    (finding,) = gpu.examine_gpu("libc.so.6")  # a library, but not NVML
    assert finding.level is Level.FAIL
    assert "nvmlInit_v2" in finding.detail
