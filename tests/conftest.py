"""Set up before any test module is imported."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Liger's own kernels then run on the CPU. Triton reads this when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from torchtitan_liger import device  # noqa: E402

device.prepare()  # before any test imports torchtitan


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
