"""How to reach the API server: from inside a pod, or by a kubeconfig with a token or a client certificate."""

from __future__ import annotations

import base64
import os
import ssl
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True)
class KubeAccess:
    """`token` is read anew for every request: the kubelet replaces it about once an hour."""

    url: str
    namespace: str
    token: Callable[[], str]
    tls: ssl.SSLContext | None


def find_access(kubeconfig: Path | None, account: Path = ACCOUNT) -> KubeAccess:
    """A kubeconfig if one is named, else the pod's own service account. Raises ConfigError with the remedy."""
    if kubeconfig is not None:
        return _from_kubeconfig(kubeconfig)
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not (account / "token").exists():
        raise ConfigError("not inside a Kubernetes pod with a service account; give --kubeconfig PATH")
    host = f"[{host}]" if ":" in host else host
    namespace = (account / "namespace").read_text().strip() or "default"
    tls = ssl.create_default_context(cafile=str(account / "ca.crt"))
    return KubeAccess(f"https://{host}:{port}", namespace, lambda: (account / "token").read_text().strip(), tls)


def _from_kubeconfig(path: Path) -> KubeAccess:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        context = _named(content["contexts"], content["current-context"])["context"]
        cluster = _named(content["clusters"], context["cluster"])["cluster"]
        user = _named(content["users"], context["user"])["user"]
        server = str(cluster["server"]).rstrip("/")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check --kubeconfig") from error
    except (yaml.YAMLError, KeyError, TypeError, StopIteration, UnicodeDecodeError) as error:
        text = f"{path} is no kubeconfig with a current context, its cluster and its user; check --kubeconfig"
        raise ConfigError(text) from error
    if "exec" in user or "auth-provider" in user:
        raise ConfigError(f"{path} logs in through a program; give a kubeconfig with a token or a client certificate")
    token = str(user.get("token") or "")
    if user.get("tokenFile"):
        file = Path(path.parent, str(user["tokenFile"]))
        return KubeAccess(
            server, context.get("namespace", "default"), lambda: file.read_text().strip(), _tls(cluster, user, path)
        )
    return KubeAccess(server, str(context.get("namespace", "default")), lambda: token, _tls(cluster, user, path))


def _named(entries: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(entry for entry in entries if entry["name"] == name)


def _tls(cluster: dict[str, Any], user: dict[str, Any], path: Path) -> ssl.SSLContext | None:
    if not str(cluster["server"]).startswith("https"):
        return None
    try:
        data = cluster.get("certificate-authority-data")
        authority = base64.b64decode(data).decode() if data else None
        file = cluster.get("certificate-authority")
        context = ssl.create_default_context(cadata=authority, cafile=str(Path(path.parent, file)) if file else None)
        if cluster.get("insecure-skip-tls-verify"):
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        _load_certificate(context, user, path)
    except (OSError, ValueError, ssl.SSLError) as error:
        raise ConfigError(f"a certificate that {path} names cannot be used: {error}; check --kubeconfig") from error
    return context


def _load_certificate(context: ssl.SSLContext, user: dict[str, Any], path: Path) -> None:
    if user.get("client-certificate") and user.get("client-key"):
        context.load_cert_chain(Path(path.parent, user["client-certificate"]), Path(path.parent, user["client-key"]))
    elif user.get("client-certificate-data") and user.get("client-key-data"):
        # The standard library takes certificates from files only.
        with tempfile.TemporaryDirectory() as folder:
            pair = Path(folder, "certificate"), Path(folder, "key")
            for file, name in zip(pair, ("client-certificate-data", "client-key-data"), strict=True):
                file.touch(mode=0o600)
                file.write_bytes(base64.b64decode(user[name]))
            context.load_cert_chain(*pair)
