"""The few calls to the Kubernetes API that the planner needs, over aiohttp. Every failure is one KubeError."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from .errors import KubeError
from .kube_access import KubeAccess
from .kube_target import DELETION_COST, DRAINING_MARK, ScaleTarget

if TYPE_CHECKING:
    from aiohttp import ClientSession

Plain = dict[str, Any]
_REMEDIES = {
    401: ("unauthorized", "its token is not accepted"),
    403: ("forbidden", "grant it with planner_sidecar/kubernetes/rbac.yaml"),
    404: ("not_found", "check --kubernetes and --kubernetes-namespace"),
    409: ("conflict", "somebody else has changed it"),
}
_PAGE = 500


class KubeClient:
    """Requests with one time limit. The session belongs to the caller."""

    def __init__(self, session: ClientSession, access: KubeAccess, timeout_seconds: float) -> None:
        self._session = session
        self._access = access
        self._timeout_seconds = timeout_seconds

    async def get_scale(self, target: ScaleTarget) -> Plain:
        return await self._call("GET", target.path)

    async def put_scale(self, target: ScaleTarget, scale: Plain) -> Plain:
        """Write a scale that was read before: its resourceVersion makes it fail if anybody wrote in between."""
        return await self._call("PUT", target.path, scale)

    async def list_pods(self, namespace: str, selector: str) -> list[Plain]:
        """All pods that match, page by page."""
        found: list[Plain] = []
        query = {"labelSelector": selector, "limit": str(_PAGE)}
        while True:
            answer = await self._call("GET", f"/api/v1/namespaces/{namespace}/pods", query=query)
            found += answer.get("items", [])
            more = answer.get("metadata", {}).get("continue")
            if not more:
                return found
            query = query | {"continue": more}

    async def mark_pod(self, namespace: str, name: str, since: str | None) -> None:
        """Say on the pod that it is the one to go first, or take that back (`since` None)."""
        cost = None if since is None else "-1000"
        notes = {"metadata": {"annotations": {DELETION_COST: cost, DRAINING_MARK: since}}}
        await self._call("PATCH", f"/api/v1/namespaces/{namespace}/pods/{name}", notes)

    async def delete_pod(self, namespace: str, name: str) -> None:
        """Let its controller make a new one; the pod's own grace period holds."""
        await self._call("DELETE", f"/api/v1/namespaces/{namespace}/pods/{name}")

    async def get_lease(self, namespace: str, name: str) -> Plain | None:
        try:
            return await self._call("GET", f"{_leases(namespace)}/{name}")
        except KubeError as error:
            if error.reason == "not_found":
                return None
            raise

    async def create_lease(self, namespace: str, lease: Plain) -> Plain:
        return await self._call("POST", _leases(namespace), lease)

    async def put_lease(self, namespace: str, name: str, lease: Plain) -> Plain:
        return await self._call("PUT", f"{_leases(namespace)}/{name}", lease)

    async def _call(
        self, method: str, path: str, body: Plain | None = None, query: dict[str, str] | None = None
    ) -> Plain:
        import aiohttp

        headers = {"Accept": "application/json"}
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        if body is not None:
            headers["Content-Type"] = kind
        try:
            token = self._access.token()
            if token:
                headers["Authorization"] = f"Bearer {token}"
            async with self._session.request(
                method,
                self._access.url + path,
                params=query,
                data=None if body is None else json.dumps(body),
                headers=headers,
                ssl=self._access.tls if self._access.tls is not None else True,
                timeout=aiohttp.ClientTimeout(total=self._timeout_seconds),
            ) as answer:
                return _checked(method, path, answer.status, await answer.text())
        except (asyncio.TimeoutError, TimeoutError) as error:
            text = f"the Kubernetes API gave no answer in {self._timeout_seconds:g} s"
            raise KubeError("api_timeout", text) from error
        except (aiohttp.ClientError, OSError, UnicodeDecodeError) as error:
            raise KubeError("api_unreachable", f"the Kubernetes API cannot be reached: {error or error!r}") from error


def _checked(method: str, path: str, status: int, text: str) -> Plain:
    try:
        plain = json.loads(text)
    except ValueError:
        plain = {}
    if 200 <= status < 300 and isinstance(plain, dict):
        return plain
    said = plain.get("message", "") if isinstance(plain, dict) else ""
    reason, remedy = _REMEDIES.get(status, (f"api_{status}", "see the API server's log"))
    raise KubeError(reason, f"{method} {path} was answered {status} ({said or 'no reason given'}); {remedy}")


def _leases(namespace: str) -> str:
    return f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
