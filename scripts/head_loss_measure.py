"""How scripts/bench_head_loss.py measures a step: its time, its memory, its errors."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from head_loss_cases import Case, Step
from head_loss_mixtures import Inputs
from torch.profiler import ProfilerActivity, profile

SETTLING_SECONDS = 1.0
PASSES = 3  # that are timed together: a clock that is held down goes up and down


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
    error = ((value.double() - truth).norm() / truth.norm()).item()
    return math.inf if math.isnan(error) else error  # `max` may pass over a NaN


def time_once(
    case: Case, inputs: Inputs, agreed: Callable[[bool], bool] = bool
) -> float:
    """Seconds that a pass takes, forward and backward; on a GPU the mean of a few.

    Args:
        agreed: turns a process's answer into that of all processes of a run.
    """
    step = case.prepare(inputs)
    drop_gradients(inputs)
    if not inputs.hidden_TD.is_cuda:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    # As in training, the GPU comes from work of the same kind: its clock has settled, and
    # the host is ahead, unless the implementation makes it wait.
    settle(step, inputs, agreed)
    step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(PASSES):
        drop_gradients(inputs)
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / PASSES


def settle(step: Step, inputs: Inputs, agreed: Callable[[bool], bool]) -> None:
    """Passes until a GPU at its power limit has found its clock.

    Each process has a clock of its own, but a pass may wait for the other processes': all
    have to make as many.
    """
    start = time.perf_counter()
    while agreed(time.perf_counter() - start < SETTLING_SECONDS):
        step()
        drop_gradients(inputs)
        torch.cuda.synchronize()
