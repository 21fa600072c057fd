"""The fence on the CPU, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys

import dynamo_kernels
import pytest
import torch
from dynamo_kernels import ComputeFence


def test_on_the_cpu_there_is_nothing_to_wait_for() -> None:
    ComputeFence(torch.device("cpu")).wait()


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, dynamo_kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there_and_no_other() -> None:
    assert all(getattr(dynamo_kernels, name) for name in dynamo_kernels.__all__)
    with pytest.raises(AttributeError, match="no attribute 'memcpy'"):
        dynamo_kernels.memcpy  # noqa: B018
