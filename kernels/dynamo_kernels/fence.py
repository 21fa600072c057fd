"""Orders background copies after the compute that produced, or still reads, the same HBM blocks."""

from __future__ import annotations

import torch


class ComputeFence:
    """Everything enqueued on the current stream so far. Made on the engine's thread, waited for on a copy thread.

    Without it a copy reads blocks that the GPU has not written yet (vLLM #45704: 150 of 150 iterations corrupt). On the
    CPU compute is done when the call returns, so there is nothing to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Blocks the calling thread, not the GPU, until that work is done."""
        if self._event is not None:
            self._event.synchronize()
