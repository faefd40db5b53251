"""Lets torchtitan start, measure memory and end on a machine without an accelerator.

torchtitan 0.2.2 takes the device to be CUDA when torch finds none, and asks its device
module for memory statistics that `torch.cpu` does not have. Both are decided while
`torchtitan.tools.utils` is imported, so `prepare()` must come before any other import of
torchtitan. It replaces two functions of torch for the time of that one import; nothing
else in this package reassigns another package's names.
"""

from __future__ import annotations

import importlib
import os
import platform
import resource
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import torch


def prepare() -> str:
    """Make torchtitan use the accelerator if there is one, else the CPU.

    Returns:
        The device type that torchtitan will use.

    Raises:
        RuntimeError: when there is no accelerator and torchtitan was imported before.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        return accelerator.type
    utils = sys.modules.get("torchtitan.tools.utils")
    if utils is not None and utils.device_type != "cpu":
        raise RuntimeError(
            f"torchtitan was imported before torchtitan_liger.device.prepare() and took "
            f"the device to be {utils.device_type!r}, which this machine lacks; call "
            "prepare() first"
        )
    with (
        mock.patch("torch._utils._get_available_device_type", return_value="cpu"),
        mock.patch("torch._utils._get_device_module", return_value=CPUDeviceModule()),
    ):
        importlib.import_module("torchtitan.tools.utils")
    return "cpu"


def switch_off_what_needs_one(job: Any) -> list[str]:
    """Switch off the options of a `JobConfig` for which torchtitan 0.2.2 needs an
    accelerator; those that were on."""
    found = []
    for section, key in (
        ("profiling", "enable_profiling"),
        ("profiling", "enable_memory_snapshot"),
        ("training", "gc_debug"),
    ):
        if getattr(getattr(job, section), key):
            setattr(getattr(job, section), key, False)
            found.append(f"{section}.{key}")
    return found


def let_gloo_finish() -> None:
    """Wait until Gloo's threads have let go of what the last collectives worked on.

    They do so a moment after a collective is done, and need the GIL for it. A thread that
    asks for the GIL while the interpreter ends aborts the process, so that a finished
    training counts as a failed one (https://github.com/pytorch/pytorch/issues/190489).
    Destroying the process groups does not end the threads where a cache of DTensor's
    still holds a device mesh.
    """
    time.sleep(1)


class CPUDeviceModule(ModuleType):
    """`torch.cpu` with the memory functions that torchtitan calls on `torch.cuda`.

    "Reserved" memory is the resident memory of this process, with the pages that it
    shares with others; its peak is the operating system's own.
    """

    def __init__(self) -> None:
        super().__init__("torch.cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0  # torch.cpu says "cpu", which a barrier cannot take

    def get_device_name(self, device: Any = None) -> str:
        return platform.processor() or platform.machine()

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=psutil.virtual_memory().total)

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        peak = peak_resident_bytes()
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        reset_peak_resident_bytes()

    def empty_cache(self) -> None:
        """The CPU allocator keeps no cache."""


def peak_resident_bytes() -> int:
    """The most memory this process has held since `reset_peak_resident_bytes`.

    Where the peak cannot be read or reset (not Linux), since the start of the process.
    """
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_resident_bytes() -> None:
    """Start a new measurement of `peak_resident_bytes`, where the system can."""
    try:
        fd = os.open("/proc/self/clear_refs", os.O_WRONLY)
    except OSError:
        return
    try:
        os.write(fd, b"5")
    except OSError:
        pass
    finally:
        os.close(fd)
