#!/usr/bin/env python3
"""Builds one of the project's environments from its lock file, with nothing but Python and pip.

    python3 tools/bootstrap.py vllm      # .envs/vllm: real vLLM for CPU, the test tools, this project (editable)
    python3 tools/bootstrap.py sglang    # .envs/sglang: real SGLang for CPU, this project (editable)
    python3 tools/bootstrap.py vllm-0.24 # .envs/vllm-0.24: another vLLM's Python files, to put before .envs/vllm's own

An environment is reused while its lock file and pyproject.toml are unchanged; an interrupted build is started anew.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {"vllm": "vllm-cpu.txt", "sglang": "sglang-cpu.txt"}
#: Not environments of their own: folders for PYTHONPATH, in front of what .envs/vllm has installed.
OVERLAYS = {"vllm-0.24": "vllm-0.24.txt", "vllm-0.33": "vllm-0.33.txt"}

# vllm-cpu installs no metadata under the name `vllm`, which its own command line and platform detection read: "cpu" in
# the version makes it the CPU platform.
VLLM_METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"


class BootstrapError(RuntimeError):
    """An environment could not be built; the text says what to do."""


def fingerprint(*parts: Path) -> str:
    """Changes whenever this interpreter or one of the files does."""
    digest = hashlib.sha256(sys.version.encode())
    for part in parts:
        digest.update(part.read_bytes())
    return digest.hexdigest()


def is_current(stamp: Path, wanted: str) -> bool:
    return stamp.is_file() and stamp.read_text() == wanted


def run_with_progress(title: str, command: list[str], log: Path) -> None:
    """Runs `command` with its output in `log`, and a ticking line so that nobody thinks it hangs."""
    started = time.monotonic()
    tty = sys.stdout.isatty()
    # pip leaves gigabytes in its temporary folder when it is killed; in a folder of ours they go with the next build.
    scratch = log.with_suffix(".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    env = {**os.environ, "TMPDIR": str(scratch)}
    with (
        log.open("a") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=env) as child,
    ):
        while child.poll() is None:
            if tty:
                print(f"\r  {title} ... {time.monotonic() - started:4.0f} s", end="", flush=True)
            try:
                child.wait(timeout=1)
            except subprocess.TimeoutExpired:
                continue
            except KeyboardInterrupt:
                child.kill()
                raise
    shutil.rmtree(scratch, ignore_errors=True)
    print(f"\r  {title}: {time.monotonic() - started:.0f} s" + " " * 12, flush=True)
    if child.returncode:
        tail = "\n    ".join(log.read_text().splitlines()[-8:])
        raise BootstrapError(f"{title} failed (exit {child.returncode}); whole log in {log}:\n    {tail}")


def write_vllm_metadata(lock: Path, site_packages: Path) -> None:
    lines = lock.read_text().splitlines()
    version = next(line.split("==")[1].strip() for line in lines if line.startswith(("vllm-cpu==", "vllm==")))
    folder = site_packages / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(VLLM_METADATA.format(version=version))


def build_overlay(name: str) -> None:
    """Another vLLM's Python files, without its binaries and dependencies. They are imported, not run on a model."""
    python = build("vllm") / "bin" / "python"
    lock, folder = ROOT / "locks" / OVERLAYS[name], ROOT / ".envs" / name
    log, stamp, wanted = folder.parent / f"{name}.log", folder / "locked-from", fingerprint(lock, Path(__file__))
    if is_current(stamp, wanted):
        return
    print(f"building {folder.relative_to(ROOT)} from {lock.relative_to(ROOT)}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    log.unlink(missing_ok=True)
    download = ["download", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--dest", str(wheels)]
    run_with_progress("locked packages", [str(python), "-m", "pip", *download, "-r", str(lock)], log)
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [member for member in archive.namelist() if member.endswith(".py")])
    shutil.rmtree(wheels)
    write_vllm_metadata(lock, folder)
    stamp.write_text(wanted)


def build(name: str) -> Path:
    """Returns the environment's folder, built if it is absent or out of date."""
    lock = ROOT / "locks" / LOCKS[name]
    folder = ROOT / ".envs" / name
    log = folder.parent / f"{name}.log"
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-compile", "--progress-bar", "off", "--no-deps"]

    locked, wanted = folder / "locked-from", fingerprint(lock, Path(__file__))
    if not is_current(locked, wanted):
        print(f"building {folder.relative_to(ROOT)} from {lock.relative_to(ROOT)}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        log.unlink(missing_ok=True)
        run_with_progress("virtual environment", [sys.executable, "-m", "venv", str(folder)], log)
        run_with_progress("locked packages", [*pip, "-r", str(lock)], log)
        if name == "vllm":
            write_vllm_metadata(lock, next((folder / "lib").glob("python*/site-packages")))
        locked.write_text(wanted)

    installed, wanted = folder / "installed-from", fingerprint(ROOT / "pyproject.toml")
    if not is_current(installed, wanted):
        run_with_progress(f"{name}: this project, editable", [*pip, "--no-build-isolation", "-e", str(ROOT)], log)
        installed.write_text(wanted)
    return folder


def main(names: list[str]) -> int:
    known = [*LOCKS, *OVERLAYS]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        print(f"bootstrap: name one or more of {', '.join(known)}, not {unknown or 'nothing'}", file=sys.stderr)
        return 2
    if sys.version_info[:2] != (3, 11):
        print(
            f"bootstrap: the lock files are for Python 3.11, this is {sys.version.split()[0]}; "
            "run `make PYTHON=/path/to/python3.11 ...`",
            file=sys.stderr,
        )
        return 2
    try:
        for name in names:
            build_overlay(name) if name in OVERLAYS else build(name)
    except BootstrapError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbootstrap: interrupted; the next run starts this environment anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    sys.exit(main(sys.argv[1:]))
