"""TLS towards clients and towards engines. A certificate that is renewed on disk is used from then on."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from pathlib import Path

from .errors import ConfigError

_RELOAD_SECONDS = 30.0
log = logging.getLogger("dynamo_proxy")


def client_context(ca_file: str) -> ssl.SSLContext:
    """How engines' certificates are checked: by the system's authorities, or by those in a file. Raises
    ConfigError.
    """
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"cannot use --engine-ca-file {ca_file} ({error}); name a PEM file") from None


class ServerTls:
    """The certificate that clients see."""

    def __init__(self, cert_file: str, key_file: str) -> None:
        """Raises ConfigError."""
        self._files = (cert_file, key_file or cert_file)
        self._seen = self._stamp()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._load()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def reload(self) -> bool:
        """Use the files again if they changed; a pair that does not fit changes nothing."""
        seen = self._stamp()
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            self._load()
        except ConfigError as error:
            log.warning("%s; the certificate read before stays in use", error)
            return False
        log.info("TLS certificate read again")
        return True

    def _load(self) -> None:
        cert_file, key_file = self._files
        names = f"--tls-cert-file {cert_file}" + (f" and --tls-key-file {key_file}" if key_file != cert_file else "")

        def locked() -> str:
            raise ConfigError(f"the key in {key_file} is encrypted; write it without a passphrase (openssl pkey)")

        try:
            if b"PRIVATE KEY-----" not in Path(key_file).read_bytes():
                raise ConfigError(
                    f"cannot use {names} (no PEM key is in {key_file}); name the file that has it with --tls-key-file"
                )
            # A pair that does not fit would spoil the context in use: try it elsewhere first.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password=locked)
            self.context.load_cert_chain(cert_file, key_file, password=locked)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"cannot use {names} ({error}); give a PEM certificate and its key") from None

    def _stamp(self) -> tuple[float, ...]:
        return tuple(os.stat(path).st_mtime_ns if os.path.exists(path) else 0 for path in self._files)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_RELOAD_SECONDS)
            self.reload()

    def check(self) -> None:
        assert self._task is None or not self._task.done(), "nobody reads the certificate again"
