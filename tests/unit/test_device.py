from __future__ import annotations

import mmap
import sys

import pytest
import torch
import torchtitan.tools.utils as torchtitan_utils
from torchtitan.config import JobConfig

from tests.conftest import HAS_GPU
from tests.helpers import ROOT, python_env, run_command
from torchtitan_liger import device

MIB = 2**20


def test_torchtitan_uses_the_device_that_is_there():
    assert torchtitan_utils.device_type == ("cuda" if HAS_GPU else "cpu")
    assert device.prepare() == torchtitan_utils.device_type


@pytest.mark.skipif(HAS_GPU, reason="the CPU is used only where there is no GPU")
def test_torch_is_left_as_it_was():
    assert torch._utils._get_available_device_type() is None
    assert torch._utils._get_device_module("cpu") is torch.cpu


@pytest.mark.skipif(HAS_GPU, reason="the CPU is used only where there is no GPU")
def test_too_late_is_an_error(monkeypatch):
    monkeypatch.setattr(torchtitan_utils, "device_type", "cuda")
    with pytest.raises(RuntimeError, match="call prepare"):
        device.prepare()


def test_the_cpu_module_is_torch_cpu_with_memory():
    module = device.CPUDeviceModule()
    assert module.is_available is torch.cpu.is_available
    assert module.current_device() == 0
    assert module.get_device_properties().total_memory > 2**28
    assert isinstance(module.get_device_name(), str)


def test_peak_memory_is_that_of_the_process_since_the_reset():
    module = device.CPUDeviceModule()
    module.reset_peak_memory_stats()
    before = module.memory_stats()["reserved_bytes.all.peak"]
    with mmap.mmap(-1, 64 * MIB) as block:  # what an allocator has kept would not count
        block[:: mmap.PAGESIZE] = bytes(64 * MIB // mmap.PAGESIZE)
    during = module.memory_stats()["reserved_bytes.all.peak"]
    assert 48 * MIB < during - before < 128 * MIB
    module.reset_peak_memory_stats()
    after = module.memory_stats()["reserved_bytes.all.peak"]
    assert after < during - 32 * MIB


LATE_THREAD = """
import sys, threading, time
sys.argv[1:] = ["--job.config_file=train_configs/debug_model.toml"]
from torchtitan_liger import device, train
device.prepare()
import torchtitan.train

def let_go():
    time.sleep(0.3)
    print("let go", flush=True)

def main(trainer_class):
    threading.Thread(target=let_go, daemon=True).start()

torchtitan.train.main = main
train.main()
"""


def test_a_thread_that_needs_the_gil_gets_it_before_the_interpreter_ends():
    env = python_env(LOCAL_RANK="0")
    run = run_command(sys.executable, "-c", LATE_THREAD, cwd=ROOT, env=env)
    assert run.returncode == 0, run.stdout
    assert run.stdout.endswith("let go\n")


def test_what_torchtitan_cannot_do_on_a_cpu_is_switched_off():
    job = JobConfig()
    assert device.switch_off_what_needs_one(job) == []
    job.profiling.enable_profiling = job.training.gc_debug = True
    found = device.switch_off_what_needs_one(job)
    assert found == ["profiling.enable_profiling", "training.gc_debug"]
    assert not job.profiling.enable_profiling
    assert not job.training.gc_debug
