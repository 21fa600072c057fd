"""NIXL as the transport needs it: memory that is registered once, peers, and READs that end or do not. One thread.

Facts of NIXL 1.5 behind it: errors are raised; a peer that is stopped keeps its READs in PROC for ever; releasing such
a READ, or its memory, or the peer does not keep late bytes away. So a READ is over when NIXL says DONE or that the peer
is disconnected, and at no other time; destroying the agent ends all of them.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from dynamo_connectors.errors import ConfigError, DynamoConnectorsError, StoreError
from dynamo_connectors.transport.progress import resting_progress

#: Either may be installed alone; both do the same in host memory.
_BUILDS = ("nixl_cu13", "nixl_cu12")


Numbers: TypeAlias = npt.NDArray[np.int64]


class Region(NamedTuple):
    """Memory of the host, or of the GPU `device`."""

    address: int
    num_bytes: int
    device: int | None = None

    def holds(self, addresses: Numbers, num_bytes: int) -> npt.NDArray[np.bool_]:
        """Which of these begin so many bytes of it."""
        return (self.address <= addresses) & (addresses <= self.address + self.num_bytes - num_bytes)

    def enter(self) -> None:
        """The calling thread will have NIXL read into it."""
        if self.device is not None:
            import torch

            torch.cuda.set_device(self.device)

    def settle(self) -> None:
        """Returns when no copy of this process is under way in it."""
        if self.device is not None:
            import torch

            torch.cuda.synchronize(self.device)


#: The GPU on each side of a READ, None for host memory.
Devices: TypeAlias = tuple[int | None, int | None]


class GpuMemoryError(DynamoConnectorsError):
    """NIXL does not take a GPU's memory, and may take the host's all the same."""


class Measured(NamedTuple):
    """What NIXL's own telemetry says of a READ that is over."""

    num_bytes: int
    descriptors: int
    #: Of the call that started it, and of all of it.
    post_microseconds: int
    microseconds: int


class TransferEndedError(StoreError):
    """A READ failed, and nothing of it will arrive any more."""


class TransferUnknownError(StoreError):
    """A READ failed, and bytes of it may still arrive."""


def installed_build() -> str | None:
    """The NIXL build to import."""
    present = [name for name in _BUILDS if importlib.util.find_spec(name) is not None]
    return present[-1] if present else None


def require_nixl() -> str:
    """The build to import. Raises `ConfigError` when there is none."""
    build = installed_build()
    if build is None:
        raise ConfigError("--kvbm-role needs NIXL, which is not installed: pip install 'dynamo-connectors[nixl]'")
    return build


class Agent:
    """`name` must be unlike that of any peer's agent, ever."""

    def __init__(self, name: str, regions: list[Region], build: str | None = None) -> None:
        self._regions = regions
        build = build or require_nixl()
        api, self._errors = importlib.import_module(f"{build}._api"), importlib.import_module(f"{build}._bindings")
        self._disconnected: type[Exception] = self._errors.nixlRemoteDisconnectError
        try:
            with resting_progress(self._errors):
                self._agent: Any = api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"], capture_telemetry=True))
            for address, num_bytes, device in regions:
                rows = _pieces([address], num_bytes, device)
                self._agent.register_memory(rows, _kind(device), backends=["UCX"])
        except Exception as error:
            if any(region.device is not None for region in regions):
                raise GpuMemoryError(f"NIXL cannot read GPU memory over UCX here ({error})") from error
            raise ConfigError(
                f"NIXL cannot serve host memory over UCX here ({error}); run `dynamo-connectors doctor`, or start "
                "without --kvbm-role"
            ) from error

    @property
    def metadata(self) -> bytes:
        return bytes(self._agent.get_agent_metadata())

    def connect(self, metadata: bytes) -> str:
        """Meets a peer, or its next run. Raises `StoreError` for metadata that is none."""
        try:
            name = self._agent.add_remote_agent(metadata)
            name = name.decode() if isinstance(name, bytes) else str(name)
            self._agent.make_connection(name)
        except Exception as error:
            raise StoreError("bad_metadata", f"NIXL cannot use what the peer says of itself ({error})") from error
        return name

    def forget(self, peer: str) -> None:
        """The peer's run is over. Not a fence."""
        try:
            self._agent.remove_remote_agent(peer)
        except Exception as error:  # noqa: BLE001 - it is gone, which was the point
            del error

    def post(
        self,
        peer: str,
        local: Sequence[int] | Numbers,
        remote: Sequence[int] | Numbers,
        num_bytes: int | Sequence[int] | Numbers,
        devices: Devices = (None, None),
    ) -> Any:
        """Starts a READ of pieces of `num_bytes`, one for all or one each. `devices`: the GPU here and there, if any.

        Raises `TransferEndedError` or `TransferUnknownError`.
        """
        try:
            here, there = (
                self._agent.get_xfer_descs(_pieces(addresses, num_bytes, device), _kind(device))
                for addresses, device in zip((local, remote), devices, strict=True)
            )
            handle = self._agent.initialize_xfer("READ", here, there, peer)
        except Exception as error:  # nothing was started
            raise TransferEndedError("disconnected", f"NIXL refuses the READ ({error})") from error
        self._act(self._agent.transfer, handle)
        return handle

    def is_done(self, handle: Any) -> bool:
        """Raises `TransferEndedError` or `TransferUnknownError`."""
        return bool(self._act(self._agent.check_xfer_state, handle) == "DONE")

    def measured(self, handle: Any) -> Measured | None:
        """Of a READ that is over. None where NIXL does not tell."""
        try:
            said = self._agent.get_xfer_telemetry(handle)
            return Measured(
                int(said.totalBytes),
                int(said.descCount),
                _microseconds(said.postDuration),
                _microseconds(said.xferDuration),
            )
        except Exception as error:  # noqa: BLE001 - a figure less
            del error
            return None

    def release(self, handle: Any) -> None:
        """Of a READ that is over."""
        self._agent.release_xfer_handle(handle)

    def close(self) -> None:
        """Ends every READ: afterwards nothing writes to the regions. The caller holds no handle any more."""
        self._agent = None
        gc.collect()
        # NIXL reads GPUs of this host by copies on streams of its own, and nobody says that they end with it.
        for region in self._regions:
            region.settle()

    def _act(self, what: Any, handle: Any) -> str:
        try:
            state = what(handle)
        except self._disconnected as error:
            raise TransferEndedError("disconnected", str(error)) from error
        except Exception as error:
            raise TransferUnknownError("transfer_failed", str(error)) from error
        if state not in ("DONE", "PROC"):
            raise TransferUnknownError("transfer_failed", f"NIXL says {state}")
        return str(state)


def _microseconds(duration: Any) -> int:
    """NIXL gives a `timedelta`, or a number of microseconds."""
    return round(duration.total_seconds() * 1e6) if hasattr(duration, "total_seconds") else int(duration)


def _pieces(addresses: Sequence[int] | Numbers, num_bytes: int | Sequence[int] | Numbers, device: int | None) -> Any:
    pieces = np.zeros((len(addresses), 3), dtype=np.uint64)
    pieces[:, 0] = addresses
    pieces[:, 1] = num_bytes
    pieces[:, 2] = device or 0
    return pieces


def _kind(device: int | None) -> str:
    return "DRAM" if device is None else "VRAM"
