"""GPUs and their driver, asked of NVML through ctypes: no torch, no CUDA context."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from dynamo_connectors.doctor.finding import Finding, Level

NVML_LIBRARY = "libnvidia-ml.so.1"
TEXT_BYTES = 96
NO_GPU_REMEDY = "on a GPU host: install NVIDIA's driver; in a container: docker run --gpus all"


class NvmlError(RuntimeError):
    """NVML is there and refuses."""


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@dataclass(frozen=True)
class Gpu:
    """One device, as NVML names it."""

    name: str
    memory_bytes: int


def call(nvml: ctypes.CDLL, function: str, *arguments: object) -> None:
    try:
        code = int(getattr(nvml, function)(*arguments))
    except AttributeError:
        raise NvmlError(f"it has no {function}") from None
    if code:
        nvml.nvmlErrorString.restype = ctypes.c_char_p
        raise NvmlError(f"{function}: {nvml.nvmlErrorString(code).decode()}")


def query(nvml: ctypes.CDLL) -> tuple[str, list[Gpu]]:
    """(driver version, devices). Raises NvmlError."""
    text, count, memory = ctypes.create_string_buffer(TEXT_BYTES), ctypes.c_uint(), _Memory()
    call(nvml, "nvmlInit_v2")
    try:
        call(nvml, "nvmlSystemGetDriverVersion", text, TEXT_BYTES)
        driver = text.value.decode()
        call(nvml, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        gpus = []
        for index in range(count.value):
            device = ctypes.c_void_p()
            call(nvml, "nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(device))
            call(nvml, "nvmlDeviceGetName", device, text, TEXT_BYTES)
            call(nvml, "nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
            gpus.append(Gpu(text.value.decode(), memory.total))
        return driver, gpus
    finally:
        nvml.nvmlShutdown()


def examine_gpu(library: str = NVML_LIBRARY) -> list[Finding]:
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return [Finding(Level.WARN, "GPU", "CPU only: no NVIDIA driver here", NO_GPU_REMEDY)]
    try:
        driver, gpus = query(nvml)
    except NvmlError as error:
        return [Finding(Level.FAIL, "GPU", f"the driver does not answer: {error}", "reload the driver or reboot")]
    if not gpus:
        return [Finding(Level.WARN, "GPU", f"CPU only: driver {driver}, no device", NO_GPU_REMEDY)]
    names = ", ".join(f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in gpus)
    return [Finding(Level.OK, "GPU", f"{names}; driver {driver}")]
