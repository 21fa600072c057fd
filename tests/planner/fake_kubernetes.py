"""A small Kubernetes API: scale subresources, pods and leases with resourceVersions, and a controller with a kubelet
that makes the pods true. `make test-kubernetes` holds the actuator against a real API server.

It differs from the real one in one thing on purpose: it honours pod-deletion-cost, which 1.22 brought.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from aiohttp import web

COST = "controller.kubernetes.io/pod-deletion-cost"


def now_stamp() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class FakeCluster:
    """One namespace. `mood` is ok, down or forbidden; `stuck` pods never become ready."""

    plural: str = "deployments"
    replicas: int = 1
    mood: str = "ok"
    forbidden: set[str] = field(default_factory=set)
    stuck: bool = False
    conflicts: int = 0
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    leases: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    address: str = "127.0.0.1"
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    version: int = 1

    def bump(self) -> str:
        self.version += 1
        return str(self.version)

    def reconcile(self) -> None:
        """What the controller manager and the kubelet would do by now."""
        living = [pod for pod in self.pods.values() if not pod["metadata"].get("deletionTimestamp")]
        for name in self._missing(len(living)):
            living.append(self._create(name))
        for pod in self._order(living)[: max(0, len(living) - self.replicas)]:
            pod["metadata"]["deletionTimestamp"] = now_stamp()
        if not self.stuck:
            for pod in living:
                self._make_ready(pod)

    def vanish(self) -> None:
        """The kubelet has let the leaving pods end."""
        for name in [name for name, pod in self.pods.items() if pod["metadata"].get("deletionTimestamp")]:
            del self.pods[name]

    def _missing(self, living: int) -> list[str]:
        """A StatefulSet waits until a leaving pod has freed its name."""
        if self.plural == "deployments":
            return [f"vllm-{next(self.numbers):05d}" for _ in range(self.replicas - living)]
        return [name for name in (f"vllm-{place}" for place in range(self.replicas)) if name not in self.pods]

    def _create(self, name: str) -> dict[str, Any]:
        labels = {"app": "vllm"}
        meta = {"name": name, "creationTimestamp": now_stamp(), "labels": labels, "resourceVersion": self.bump()}
        pod: dict[str, Any] = {"metadata": meta, "status": {"phase": "Pending"}}
        self.pods[name] = pod
        return pod

    def _make_ready(self, pod: dict[str, Any]) -> None:
        if pod["status"].get("podIP"):
            return
        host = f"127.0.1.{next(self.numbers)}"
        pod["status"] = {"phase": "Running", "podIP": host, "conditions": [{"type": "Ready", "status": "True"}]}

    def _order(self, living: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Who goes first: not ready, then the lowest deletion cost; in a StatefulSet the highest ordinal."""
        if self.plural != "deployments":
            return sorted(living, key=lambda pod: -int(pod["metadata"]["name"].rpartition("-")[2]))

        def rank(pod: dict[str, Any]) -> tuple[bool, int]:
            notes = pod["metadata"].get("annotations") or {}
            return bool(pod["status"].get("podIP")), int(notes.get(COST, 0))

        return sorted(living, key=rank)

    @web.middleware
    async def _mood(self, request: web.Request, handler: Any) -> web.StreamResponse:
        call = f"{request.method} {request.path.rpartition('/')[2]}"
        self.calls.append(call)
        if self.mood == "down":
            assert request.transport is not None
            request.transport.close()
            await asyncio.sleep(0)
        if request.headers.get("Authorization") != "Bearer secret":
            return refusal(401, "Unauthorized")
        if self.mood == "forbidden" or call in self.forbidden:
            return refusal(403, f"User planner cannot {call}")
        answer: web.StreamResponse = await handler(request)
        return answer

    def scale(self) -> dict[str, Any]:
        return {
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": {"name": "vllm", "namespace": "default", "resourceVersion": str(self.version)},
            "spec": {"replicas": self.replicas},
            "status": {"replicas": len(self.pods), "selector": "app=vllm"},
        }

    async def get_scale(self, request: web.Request) -> web.Response:
        return web.json_response(self.scale())

    async def put_scale(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.conflicts > 0:
            self.conflicts -= 1
            self.bump()
        if body["metadata"]["resourceVersion"] != str(self.version):
            return refusal(409, "the object has been modified; please apply your changes to the latest version")
        self.replicas = body["spec"]["replicas"]
        self.bump()
        self.reconcile()
        return web.json_response(self.scale())

    async def list_pods(self, request: web.Request) -> web.Response:
        assert request.query["labelSelector"] == "app=vllm"
        return web.json_response({"items": list(self.pods.values()), "metadata": {}})

    async def patch_pod(self, request: web.Request) -> web.Response:
        pod = self.pods.get(request.match_info["name"])
        if pod is None:
            return refusal(404, "pods not found")
        notes = pod["metadata"].setdefault("annotations", {})
        for key, value in (await request.json())["metadata"]["annotations"].items():
            notes[key] = value
            if value is None:
                del notes[key]
        return web.json_response(pod)

    async def delete_pod(self, request: web.Request) -> web.Response:
        pod = self.pods.get(request.match_info["name"])
        if pod is None:
            return refusal(404, "pods not found")
        pod["metadata"]["deletionTimestamp"] = now_stamp()
        self.reconcile()
        return web.json_response(pod)

    async def get_lease(self, request: web.Request) -> web.Response:
        lease = self.leases.get(request.match_info["name"])
        return refusal(404, "leases not found") if lease is None else web.json_response(lease)

    async def post_lease(self, request: web.Request) -> web.Response:
        lease = await request.json()
        if lease["metadata"]["name"] in self.leases:
            return refusal(409, "already exists")
        return self._keep(lease)

    async def put_lease(self, request: web.Request) -> web.Response:
        lease = await request.json()
        if (
            lease["metadata"]["resourceVersion"]
            != self.leases[lease["metadata"]["name"]]["metadata"]["resourceVersion"]
        ):
            return refusal(409, "the object has been modified")
        return self._keep(lease)

    def _keep(self, lease: dict[str, Any]) -> web.Response:
        lease["metadata"]["resourceVersion"] = self.bump()
        self.leases[lease["metadata"]["name"]] = lease
        return web.json_response(lease)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._mood])
        scale = f"/apis/apps/v1/namespaces/default/{self.plural}/vllm/scale"
        pods = "/api/v1/namespaces/default/pods"
        leases = "/apis/coordination.k8s.io/v1/namespaces/default/leases"
        app.router.add_get(scale, self.get_scale)
        app.router.add_put(scale, self.put_scale)
        app.router.add_get(pods, self.list_pods)
        app.router.add_patch(pods + "/{name}", self.patch_pod)
        app.router.add_delete(pods + "/{name}", self.delete_pod)
        app.router.add_get(leases + "/{name}", self.get_lease)
        app.router.add_post(leases, self.post_lease)
        app.router.add_put(leases + "/{name}", self.put_lease)
        return app


def refusal(status: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": status, "message": message}, status=status)
