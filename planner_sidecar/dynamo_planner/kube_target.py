"""Names and records of the Kubernetes side: what to scale, what a pod is to the planner, who goes first. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
DRAINING_MARK = "dynamo-connectors.io/planner-draining"
_LWS_WORKER = "leaderworkerset.sigs.k8s.io/worker-index"
_LWS_GROUP = "leaderworkerset.sigs.k8s.io/group-index"
_LWS_NAME = "leaderworkerset.sigs.k8s.io/name"
_KINDS = {
    "deployment": ("apps", "v1", "deployments"),
    "statefulset": ("apps", "v1", "statefulsets"),
    "leaderworkerset": ("leaderworkerset.x-k8s.io", "v1", "leaderworkersets"),
}
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")


@dataclass(frozen=True)
class ScaleTarget:
    """An object with a scale subresource. `is_ordered`: the highest ordinals go first, whatever anybody wishes."""

    group: str
    version: str
    plural: str
    name: str
    namespace: str

    @property
    def path(self) -> str:
        return f"/apis/{self.group}/{self.version}/namespaces/{self.namespace}/{self.plural}/{self.name}/scale"

    @property
    def is_ordered(self) -> bool:
        return self.plural in ("statefulsets", "leaderworkersets")

    @property
    def own_selector(self) -> str:
        """Which pods are its own, where the scale subresource does not say."""
        return f"{_LWS_NAME}={self.name}" if self.plural == "leaderworkersets" else ""

    def __str__(self) -> str:
        return f"{self.plural}/{self.name} in {self.namespace}"


def parse_target(text: str, namespace: str) -> ScaleTarget:
    """KIND/NAME, or PLURAL.VERSION.GROUP/NAME for any other resource. Raises ValueError with the remedy."""
    remedy = f"{text!r}: write deployment/NAME, statefulset/NAME, leaderworkerset/NAME or PLURAL.VERSION.GROUP/NAME"
    kind, slash, name = text.strip().partition("/")
    if not slash or not _NAME.match(name):
        raise ValueError(remedy)
    known = _KINDS.get(kind.lower().removesuffix("s"))
    if known is not None:
        return ScaleTarget(*known, name, namespace)
    plural, _, rest = kind.partition(".")
    version, _, group = rest.partition(".")
    if not (plural and re.match(r"v\d", version) and "." in group):
        raise ValueError(remedy)
    return ScaleTarget(group, version, plural, name, namespace)


@dataclass(frozen=True)
class KubeSettings:
    """What to scale and how to see its pods."""

    target: ScaleTarget
    pod_port: int = 8000
    pending_seconds: float = 600.0


@dataclass(frozen=True)
class Pod:
    """One pod as far as scaling goes. `created_seconds` is wall time; `ordinal` is None where pods have no order."""

    name: str
    url: str
    is_ready: bool
    is_leaving: bool
    is_marked: bool
    created_seconds: float
    ordinal: int | None


def pod_of(plain: Mapping[str, Any], port: int, is_ordered: bool) -> Pod | None:
    """A pod from the API's JSON; None for what is no replica of its own: finished pods, workers of a group."""
    meta, status = plain["metadata"], plain.get("status", {})
    labels, notes = meta.get("labels") or {}, meta.get("annotations") or {}
    if labels.get(_LWS_WORKER, "0") != "0" or status.get("phase") in ("Succeeded", "Failed"):
        return None
    conditions = {entry["type"]: entry["status"] for entry in status.get("conditions") or ()}
    host = status.get("podIP") or meta["name"]
    host = f"[{host}]" if ":" in host else host
    ordinal = labels.get(_LWS_GROUP) or meta["name"].rpartition("-")[2]
    return Pod(
        name=meta["name"],
        url=f"http://{host}:{port}",
        is_ready=conditions.get("Ready") == "True" and bool(status.get("podIP")),
        is_leaving=bool(meta.get("deletionTimestamp")),
        is_marked=DRAINING_MARK in notes,
        created_seconds=_seconds(meta.get("creationTimestamp")),
        ordinal=int(ordinal) if is_ordered and str(ordinal).isdecimal() else None,
    )


def choose_pods(pods: Iterable[Pod], count: int, in_flight: Mapping[str, int], is_ordered: bool) -> list[Pod]:
    """Who goes when `count` go. Ordered kinds lose their highest ordinals; others first what is not ready, as their
    controllers do, then least in flight, then youngest.
    """
    living = [pod for pod in pods if not pod.is_leaving]
    if is_ordered:
        living.sort(key=lambda pod: -(pod.ordinal if pod.ordinal is not None else -1))
    else:
        living.sort(key=lambda pod: (pod.is_ready, in_flight.get(pod.url, 0), -pod.created_seconds, pod.name))
    return living[: max(0, count)]


def _seconds(stamp: str | None) -> float:
    return 0.0 if not stamp else datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
