"""The scale commands for Slurm and docker that we ship, under a whole planner, on stand-ins of these programs that
start real child engines. REAL_SLURM_BIN, a folder with a real sbatch, runs the Slurm story on a real cluster instead.
"""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from dynamo_planner.child_process import group_alive

from tests.planner.planner_fakes import Bench, FakeProxy, bench, child_command, served

SCALERS = Path(__file__).parents[2] / "planner_sidecar" / "scalers"
#: Jobs are files: JOB_ID -> process group, comment. A job starts at once, or never where the cluster is `full`.
SLURM = """
import os, pathlib, signal, subprocess, sys
home, name, words = pathlib.Path(os.environ["FAKE_HOME"]), pathlib.Path(sys.argv[0]).name, sys.argv[1:]
home.joinpath("asked").open("a").write(name + " " + " ".join(words) + "\\n")
jobs = sorted((path for path in home.glob("job-*")), reverse=True)
def runs(job):
    group = int(job.read_text().split()[0])
    if group:
        try: os.killpg(group, 0)
        except ProcessLookupError: return False
    return True
if name == "sbatch":
    number = 1 + max([int(job.name[4:]) for job in jobs], default=0)
    job, env = home / f"job-{number}", {**os.environ, "SLURM_JOB_ID": str(number)}
    job.write_text("0 ")
    if not home.joinpath("full").exists():
        child = subprocess.Popen(["sleep", "0"]); child.wait()
        with open(home / "job.log", "ab") as log:
            child = subprocess.Popen([words[-1]], env=env, start_new_session=True, stdout=log, stderr=log)
        job.write_text(f"{child.pid} ")
elif name == "squeue":
    waiting = sorted(job for job in jobs if job.read_text().startswith("0 "))
    for job in [*waiting, *(job for job in jobs if job not in waiting)]:
        if runs(job):
            print(job.name[4:], job.with_name("comment-" + job.name[4:]).read_text()
                  if job.with_name("comment-" + job.name[4:]).exists() else "(null)")
elif name == "scontrol":
    home.joinpath("comment-" + words[1].partition("=")[2]).write_text(words[2].partition("=")[2])
elif name == "scancel":
    job = home / f"job-{words[0]}"
    group = int(job.read_text().split()[0])
    job.unlink()
    if group: os.killpg(group, signal.SIGTERM)
"""
#: Containers are files: NAME -> process group and label.
DOCKER = """
import os, pathlib, signal, subprocess, sys
home, words = pathlib.Path(os.environ["FAKE_HOME"]), sys.argv[1:]
home.joinpath("asked").open("a").write("docker " + " ".join(words) + "\\n")
if words[0] == "ps":
    for box in home.glob("box-*"): print(box.read_text().split()[1])
elif words[0] == "run":
    port = words[words.index("--publish") + 1].partition(":")[0]
    command = [*os.environ["FAKE_ENGINE"].split(), port]
    child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    home.joinpath("box-" + words[words.index("--name") + 1]).write_text(f"{child.pid} {port}")
elif words[0] == "stop":
    box = home / ("box-" + words[-1])
    os.killpg(int(box.read_text().split()[0]), signal.SIGTERM)
    box.unlink()
"""


def stand_ins(folder: Path, source: str, *names: str) -> Path:
    """A folder of programs for PATH."""
    made = folder / "bin"
    made.mkdir()
    for name in names:
        program = made / name
        program.write_text(f"#!{sys.executable} -S\n{source}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return made


@asynccontextmanager
async def scaled(
    folder: Path, script: str, monkeypatch: pytest.MonkeyPatch, **env: str
) -> AsyncIterator[tuple[Bench, FakeProxy]]:
    proxy = FakeProxy()
    async with served(proxy.app()) as admin:
        for name, value in {"PROXY_ADMIN": admin, "ENGINE_HOST": "127.0.0.1", **env}.items():
            monkeypatch.setenv(name, value)
        settings = {
            "advisory": False,
            "proxy_admin": admin,
            "scale_command": f"{SCALERS / script} {{replicas}} {{victims}}",
            "down_period_seconds": 0,
        }
        async with bench(folder, **settings) as stand:
            yield stand, proxy


async def up_and_down(stand: Bench, proxy: FakeProxy) -> str:
    """Two start, two more looks start no third, and the one with least in flight is drained and stopped: its URL."""
    _, outcome = await stand.planner.order(2)
    assert outcome.accepted, outcome
    await stand.eventually(lambda: len(proxy.states) == 2, 60)
    assert (await stand.planner.order(2))[1].accepted
    first, second = proxy.states
    proxy.in_flight = {first: 3, second: 1}
    await answering(stand, first, second)
    await stand.planner.order(1)
    await stand.eventually(lambda: proxy.states[second] == "draining")
    await get_ready_to_go(proxy, second)
    await stand.until(f"stopped {second}")
    assert list(proxy.states) == [first]
    return second


async def answering(stand: Bench, *urls: str) -> None:
    peers = stand.planner.parts.observer._peers
    waiting = set(urls)
    while waiting:
        waiting = {url for url in waiting if not await peers.healthy(url)}
        await asyncio.sleep(0.05)


async def get_ready_to_go(proxy: FakeProxy, url: str) -> None:
    await asyncio.sleep(0.2)  # many polls, none of which may stop it
    assert proxy.states[url] == "draining"
    proxy.in_flight[url] = 0


def jobs_of(name: str, bin_folder: Path) -> list[str]:
    words = [bin_folder / "squeue", "--noheader", "--states=PENDING,RUNNING", "--name", name, "--format=%A %k"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.split("\n")[:-1]


def ends(gone: Callable[[], bool]) -> None:
    """What was told to stop does; nothing is left when this returns."""
    end = time.monotonic() + 60
    while not gone():
        assert time.monotonic() < end, "something runs on"
        time.sleep(0.05)


def test_slurm_jobs_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.environ.get("REAL_SLURM_BIN")
    programs = ("sbatch", "squeue", "scancel", "scontrol")
    where = Path(real) if real else stand_ins(tmp_path, SLURM, *programs)
    name = f"engines-{os.getpid()}"
    engine = child_command(tmp_path).replace("{port}", "$PORT")
    env = {"PATH": f"{where}:{os.environ['PATH']}", "FAKE_HOME": str(tmp_path), "ENGINE_JOB_NAME": name}
    env |= {"ENGINE_COMMAND": engine, "ENGINE_LOG": str(tmp_path / "engine-%j.log")}

    async def story() -> None:
        async with scaled(tmp_path, "slurm.sh", monkeypatch, **env) as (stand, proxy):
            victim = await up_and_down(stand, proxy)
            left = await asyncio.to_thread(jobs_of, name, where)
            assert len(left) == 1
            assert victim not in left[0]
            (tmp_path / "full").touch()
            assert (await stand.planner.order(2))[1].accepted  # one job waits
            assert (await stand.planner.order(2))[1].accepted
            if not real:
                assert len(await asyncio.to_thread(jobs_of, name, where)) == 2, "asked again it adds nothing"

    try:
        asyncio.run(story())
    finally:
        groups = [int(job.read_text().split()[0]) for job in tmp_path.glob("job-*")]
        subprocess.run([str(SCALERS / "slurm.sh"), "0", ""], check=False, env=os.environ | env)
        ends(lambda: not jobs_of(name, where) and not any(group_alive(group) for group in groups if group))


def test_docker_containers_come_and_go_each_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = stand_ins(tmp_path, DOCKER, "docker")
    engine = child_command(tmp_path).replace(" {port} ", "")
    env = {"PATH": f"{where}:{os.environ['PATH']}", "FAKE_HOME": str(tmp_path), "FAKE_ENGINE": engine}
    env |= {"ENGINE_IMAGE": "vllm/vllm-openai", "ENGINE_ARGS": "--model tiny", "ENGINE_GPUS": "2"}
    env |= {"ENGINE_FIRST_PORT": "18300"}

    async def story() -> None:
        async with scaled(tmp_path, "docker.sh", monkeypatch, **env) as (stand, proxy):
            victim = await up_and_down(stand, proxy)
            asked = (tmp_path / "asked").read_text()
            assert f"docker stop --time 60 dynamo-engine-{victim[-5:]}" in asked
            assert "--gpus device=0" in asked
            assert "--gpus device=1" in asked
            assert asked.count("docker run") == 2
            assert "vllm/vllm-openai --model tiny" in asked
            _, outcome = await stand.planner.order(3)
            assert (outcome.accepted, outcome.reason) == (False, "command_failed")
            assert "only 2 of 3 engines fit on 2 GPUs" in " ".join(outcome.actions)

    try:
        asyncio.run(story())
    finally:
        boxes = {box: int(box.read_text().split()[0]) for box in tmp_path.glob("box-*")}
        for box in boxes:
            subprocess.run([str(where / "docker"), "stop", box.name[4:]], check=False, env=os.environ | env)
        ends(lambda: not any(map(group_alive, boxes.values())))
