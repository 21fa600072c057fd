"""The whole planner on a fake cluster, and the pure half of the Kubernetes side."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from dynamo_planner.errors import ConfigError
from dynamo_planner.hand_offs import HandOffs
from dynamo_planner.kube_access import find_access
from dynamo_planner.kube_target import parse_target, pod_of
from dynamo_planner.peers import Peers

from tests.planner.fake_kubernetes import FakeCluster
from tests.planner.kubernetes_stand import planned
from tests.planner.planner_fakes import FakeEngine, served, vllm_text


def test_the_planner_holds_while_the_api_is_down_and_goes_on_after(tmp_path: Path) -> None:
    async def story() -> None:
        cluster = FakeCluster(replicas=3)
        cluster.reconcile()
        async with planned(cluster, tmp_path) as (fleet, engine):
            engine.text = vllm_text(running=0, kv=0.0)
            cluster.mood = "down"
            decision, _ = (await fleet.tick())["default"]
            assert (decision.reason, decision.desired) == ("fleet_unknown", 0)
            cluster.mood = "ok"
            decision, outcome = (await fleet.tick())["default"]
            assert (decision.current, decision.desired, outcome.reason) == (3, 1, "draining")
            cluster.mood = "down"
            for _ in range(3):  # busy or idle: nothing is done blind
                engine.text = vllm_text(running=9, waiting=99, kv=0.99)
                decision, outcome = (await fleet.tick())["default"]
                assert (decision.direction, decision.reason) == ("hold", "fleet_unknown")
            cluster.mood = "ok"
            assert fleet.first.parts.metrics.value(
                "dynamo_planner_observation_failures_total", reason="api_unreachable"
            )

    asyncio.run(story())


def test_hand_offs_are_waited_for_until_no_lease_can_be_open() -> None:
    async def story() -> None:
        engine, now = FakeEngine(vllm_text() + 'dynamo_nixl_open_leases{engine="0"} 2.0\n'), [100.0]
        async with served(engine.app()) as url, aiohttp.ClientSession() as session:
            hand_offs = HandOffs(Peers(session, 5.0), lambda: now[0], 40.0)
            assert not await hand_offs.are_over(url)
            engine.mood = "error"
            assert not await hand_offs.are_over(url), "one reading that fails does not end the wait"
            engine.mood = "ok"
            assert not await hand_offs.are_over(url)
            now[0] = 140.0
            assert await hand_offs.are_over(url), "the number of an engine that does nothing may stand still"
            engine.text = vllm_text()
            assert await HandOffs(Peers(session, 5.0), lambda: now[0], 40.0).are_over(url)

    asyncio.run(story())


def test_an_edit_by_hand_gets_a_window_of_its_own(tmp_path: Path) -> None:
    async def story() -> None:
        cluster = FakeCluster(replicas=1)
        cluster.reconcile()
        async with planned(cluster, tmp_path, stabilisation_seconds=300) as (fleet, engine):
            engine.text = vllm_text(running=0, kv=0.0)
            await fleet.tick()
            fleet.first.memory = fleet.first.memory.__class__(since_seconds=0.0)  # a window long full
            cluster.replicas = 4
            cluster.reconcile()
            decision, _ = (await fleet.tick())["default"]
            assert (decision.current, decision.desired, decision.reason) == (4, 4, "stabilising")

    asyncio.run(story())


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("deployment/vllm", "/apis/apps/v1/namespaces/n/deployments/vllm/scale"),
        ("StatefulSets/a-b", "/apis/apps/v1/namespaces/n/statefulsets/a-b/scale"),
        ("lws/x", None),
        ("leaderworkerset/x", "/apis/leaderworkerset.x-k8s.io/v1/namespaces/n/leaderworkersets/x/scale"),
        ("things.v1beta1.example.com/x", "/apis/example.com/v1beta1/namespaces/n/things/x/scale"),
        ("deployment", None),
        ("deployment/", None),
        ("deployment/../secrets", None),
        ("things.example.com/x", None),
    ],
)
def test_targets(text: str, path: str | None) -> None:
    if path is None:
        with pytest.raises(ValueError, match="write deployment/NAME"):
            parse_target(text, "n")
    else:
        assert parse_target(text, "n").path == path


def test_groups_count_by_their_leaders() -> None:
    labels = {"leaderworkerset.sigs.k8s.io/worker-index": "1", "leaderworkerset.sigs.k8s.io/group-index": "3"}
    pod = {"metadata": {"name": "d-3-1", "labels": labels}, "status": {"podIP": "10.0.0.9"}}
    assert pod_of(pod, 8000, True) is None
    labels["leaderworkerset.sigs.k8s.io/worker-index"] = "0"
    leader = pod_of(pod, 8000, True)
    assert leader is not None
    assert (leader.ordinal, leader.url, leader.is_ready) == (3, "http://10.0.0.9:8000", False)


def test_ways_into_the_cluster_that_do_not_work_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="--kubeconfig"):
        find_access(None)
    for content, says in (
        ("", "no kubeconfig"),
        ("a: [", "no kubeconfig"),
        ("users: [{name: u, user: {exec: {command: aws}}}]", "no kubeconfig"),
    ):
        (tmp_path / "k").write_text(content)
        with pytest.raises(ConfigError, match=says):
            find_access(tmp_path / "k")
    parts = "current-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n"
    (tmp_path / "k").write_text(
        parts + "clusters: [{name: k, cluster: {server: 'http://a'}}]\nusers: [{name: u, user: {exec: {command: aws}}}]"
    )
    with pytest.raises(ConfigError, match="token or a client certificate"):
        find_access(tmp_path / "k")
    account = tmp_path / "account"
    account.mkdir()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(ConfigError, match="service account"):
        find_access(None, account)
