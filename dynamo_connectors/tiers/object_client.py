"""S3 in five verbs, and every way it fails in one word each.

The library is obstore (Apache Arrow's Rust `object_store`): bytes move without the interpreter lock, which the engine
needs, and a cancelled request closes its connection at once, whatever the peer does. NIXL's OBJ plugin is not used: it
cannot cancel, has no deadline, and its CUDA 13 build does not load without cuObject; a second way would only be slower.
Credentials come from the AWS_* environment or the machine's role; they are never read, kept or logged here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dynamo_connectors.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from obstore.store import S3Store

#: The whole request, connection included; callers have shorter deadlines of their own.
_REQUEST_SECONDS = 60
#: What S3 lists at once.
PAGE = 1000
#: What S3 says besides 404.
_NO_BUCKET = "<Code>NoSuchBucket</Code>"
_STATUS = re.compile(r"status code: (\d{3})")
#: Where the library asks for the machine's role when the environment holds no keys: EC2's metadata service, which on
#: other machines does not answer, or answers anything (403 from a proxy, 404 where the machine has no role).
_ROLE = re.compile(r"Error performing (?:PUT|GET) https?://[^/\s]+/latest/(?:api/token|meta-data/iam/)")


class ObjectClient:
    """The objects under one prefix of one bucket. Every method raises `StoreError` with the reason."""

    def __init__(self, url: str, endpoint_url: str | None, folder: str) -> None:
        try:
            import obstore.exceptions
            from obstore.store import S3Store
        except ImportError as error:
            raise ConfigError(
                f"the object_store tier needs the obstore library ({error}); pip install 'dynamo-connectors[s3]'"
            ) from error
        self._obstore = obstore
        place = urlsplit(url)
        self.name = f"s3://{place.netloc}/{'/'.join(filter(None, (place.path.strip('/'), folder)))}"
        settings: dict[str, Any] = {"endpoint": endpoint_url} if endpoint_url else {}
        if (endpoint_url or "").startswith("http://"):
            settings["allow_http"] = True
        try:
            self._store: S3Store | None = S3Store(
                place.netloc,
                prefix=self.name.removeprefix(f"s3://{place.netloc}/"),
                client_options={"timeout": f"{_REQUEST_SECONDS}s", "connect_timeout": "5s"},
                # Nothing is asked twice here: a read has no time for it, and back-off is the circuit's business.
                retry_config={"max_retries": 0},
                **settings,
            )
        except (ValueError, obstore.exceptions.BaseError) as error:
            raise ConfigError(f"--kvbm-object-url {url} cannot be used: {_first_line(error)}") from None

    async def get(self, name: str, start: int, end: int) -> memoryview:
        """Bytes `start` to `end` of an object, all of them."""
        with self._failing("GET", name) as store:
            body = memoryview(await self._obstore.get_range_async(store, name, start=start, end=end))
        # The library hands out what came when an object ends before `end`.
        if len(body) != end - start:
            raise StoreError("cut_body", f"GET {self.name}/{name}: {len(body)} of {end - start} bytes")
        return body

    async def put(self, name: str, body: bytearray) -> None:
        """Stores an object, whole or not at all: one request, no multipart upload that a dead engine leaves behind."""
        with self._failing("PUT", name) as store:
            await self._obstore.put_async(store, name, body, use_multipart=False)

    async def size_of(self, name: str) -> int | None:
        """None when there is no such object."""
        try:
            with self._failing("HEAD", name) as store:
                return (await self._obstore.head_async(store, name))["size"]
        except StoreError as error:
            if error.reason == "not_found":
                return None
            raise

    async def page(self, after: str | None) -> list[tuple[str, int]]:
        """(name, size) of the objects behind the name `after`, in order: `PAGE` of them, or all that are left."""
        with self._failing("LIST", "") as store:
            async for entries in self._obstore.list(store, offset=after, chunk_size=PAGE):
                return [(entry["path"], entry["size"]) for entry in entries]
        return []

    async def delete(self, names: Sequence[str]) -> None:
        """Removes objects; one that is not there counts as removed."""
        try:
            with self._failing("DELETE", names[0]) as store:
                await self._obstore.delete_async(store, list(names))
        except StoreError as error:
            if error.reason not in ("not_found", "no_bucket"):
                raise

    def close(self) -> None:
        """Gives the connections back. Idempotent."""
        self._store = None

    @contextmanager
    def _failing(self, verb: str, name: str) -> Iterator[S3Store]:
        """The library's store; what the library raises leaves as `StoreError`."""
        if self._store is None:
            raise StoreError("closed", f"{self.name} is closed")
        try:
            yield self._store
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            reason, what = _reason(error), _first_line(error)
            if reason == "no_credentials":
                what = f"no credentials found in the environment, and none from a role of this machine ({what})"
            # A list is empty where there is nothing; only its bucket can be missing.
            elif _NO_BUCKET in str(error) or (reason == "bad_answer" and verb == "LIST" and _status(error) == 404):
                reason = "no_bucket"
                what = "there is no such bucket; create it or name another --kvbm-object-url"
            raise StoreError(reason, f"{verb} {self.name}/{name}: {what}") from None


def _status(error: Exception) -> int:
    """The HTTP status in an error's text; 0 when there is none."""
    status = _STATUS.search(str(error))
    return int(status[1]) if status else 0


def _reason(error: Exception) -> str:
    """The library has types for a few failures; the others differ in their text alone."""
    if isinstance(error, FileNotFoundError):
        return "not_found"
    if _ROLE.search(str(error)):
        return "no_credentials"
    code = _status(error)
    if code in (401, 403) or type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return "forbidden"
    if code == 429 or code >= 500:
        return "unavailable"
    if code == 416:
        return "cut_body"
    if "error sending request" in str(error):
        return "unreachable"
    return "bad_answer"


def _first_line(error: Exception) -> str:
    """What the library says, without the dump of its internals behind it."""
    return (str(error).splitlines() or [""])[0][:200]
