"""How scripts/bench_head_loss.py measures a step: its time, its memory, its errors."""

from __future__ import annotations

import gc
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from head_loss_cases import Case, Step
from head_loss_mixtures import Inputs
from torch.profiler import ProfilerActivity, profile

SETTLING_SECONDS = 0.3  # a GPU at its power limit lowers its clock over many passes


def release(inputs: Inputs) -> None:
    """Forget what the case before has left."""
    drop_gradients(inputs)
    if inputs.hidden_TD.is_cuda:
        gc.collect()
        torch.cuda.empty_cache()


def drop_gradients(inputs: Inputs) -> None:
    inputs.hidden_TD.grad = inputs.weight_VD.grad = None


def peak_memory(step: Step, device: torch.device) -> tuple[int, torch.Tensor | None]:
    """Bytes that a step takes above those that are taken before it, and its loss."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = step()
        return torch.cuda.max_memory_allocated() - before, loss
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else two lines for each profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [e for e in events if e["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    taken = itertools.accumulate(event["args"]["Bytes"] for event in changes)
    return max(taken, default=0), loss


def relative_error(value: torch.Tensor | None, truth: torch.Tensor) -> float:
    assert value is not None, "no gradient"
    return ((value.double() - truth).norm() / truth.norm()).item()


def time_once(case: Case, inputs: Inputs) -> float:
    step = case.prepare(inputs)
    drop_gradients(inputs)
    if not inputs.hidden_TD.is_cuda:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    # As in training, the GPU comes from work of the same kind: its clock has settled, and
    # the host is ahead, unless the implementation makes it wait.
    start = time.perf_counter()
    while time.perf_counter() - start < SETTLING_SECONDS:
        step()
        drop_gradients(inputs)
        torch.cuda.synchronize()
    step()
    drop_gradients(inputs)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
