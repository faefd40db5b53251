"""In which ways the engine runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import torchtitan_liger.head_loss.sweeps as torch_sweeps
from torchtitan_liger.head_loss import engine, passes, triton_sweeps


@pytest.fixture(params=[torch_sweeps, triton_sweeps], ids=["torch", "triton"])
def impl(request):
    """The passes by themselves."""
    return request.param


@pytest.fixture(params=["torch", "triton"])
def sweeps(request, monkeypatch):
    """Both implementations of the passes; Triton's on its interpreter."""
    if request.param == "triton":
        one_at_a_time = threading.Lock()  # the interpreter knows one grid

        def locked(sweep):
            def run(*args, **kwargs):
                with one_at_a_time:
                    return sweep(*args, **kwargs)

            return run

        names = [
            "statistics_sweep",
            "mixture_sweep",
            "mixture_gradient_sweep",
            "gradient_sweep",
            "one_trip_sweep",
        ]
        locked_sweeps = {name: locked(getattr(triton_sweeps, name)) for name in names}
        module = SimpleNamespace(**locked_sweeps)
        monkeypatch.setattr(passes, "sweeps_for", lambda _: module)
    return request.param


@pytest.fixture(params=[11, 10**6], ids="{}_tokens_per_chunk".format)
def chunks(request, monkeypatch):
    plan = engine.ChunkPlan(request.param, 0, 0, 0)
    monkeypatch.setattr(engine, "plan_chunks", lambda *_, **__: plan)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def nothing_dropped(monkeypatch):
    """Called, it keeps ignored tokens: as on a GPU, where nobody has counted the labels."""

    def drop_nothing(call, *_):
        return None, call, False

    return lambda: monkeypatch.setattr(engine, "kept_rows", drop_nothing)
