from __future__ import annotations

import math

import torch

from torchtitan_liger.head_loss import HeadLossOutput
from torchtitan_liger.head_loss_report import HeadLossReport


def output(**values):
    tensors = {name.replace("__", "/"): torch.tensor(x) for name, x in values.items()}
    return HeadLossOutput(torch.tensor(0.0), {"a": tensors.pop("a")}, tensors)


def add(report, num_tokens=5.0, **values):
    report.add(output(**values), num_tokens=torch.tensor(num_tokens))


def test_shares_are_summed_and_extremes_are_kept():
    report = HeadLossReport()
    add(report, a=1.0, ratio__max=3.0, ratio__min=0.5, max=0.25)
    add(report, a=2.0, ratio__max=2.0, ratio__min=0.1, max=0.5)
    values = report.values(None)
    # In the order of the terms and metrics; "max" alone is a name like any other.
    assert list(values) == ["a", "ratio/max", "ratio/min", "max"]
    assert values["a"] == 3.0
    assert values["ratio/max"] == 3.0
    assert abs(values["ratio/min"] - 0.1) < 1e-7
    assert values["max"] == 0.75


def test_a_step_without_labels_has_nothing_to_report():
    report = HeadLossReport()
    add(report, a=0.0, r__max=-math.inf, r__min=math.inf, num_tokens=0.0)
    assert report.values(None) == {}


def test_a_new_step_starts_from_nothing():
    report = HeadLossReport()
    add(report, a=1.0)
    report.clear()
    assert report.values(None) == {}
    add(report, a=4.0)
    assert report.values(None) == {"a": 4.0}


def test_one_collective_for_sums_and_one_for_extremes(monkeypatch):
    calls, ops = [], torch.distributed.ReduceOp

    def all_reduce(packed, op, group):
        calls.append((len(packed), op, group))
        if op == ops.MAX:  # of another rank, with a lower minimum
            packed.copy_(torch.maximum(packed, torch.tensor([1.0, -2.5])))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    report = HeadLossReport()
    add(report, a=1.0, b=2.0, c=3.0)
    group = object()
    report.values(group)
    assert calls == [(3, ops.SUM, group)]
    report.clear()
    add(report, a=1.0, b__max=2.0, c__min=3.0)
    assert report.values(group) == {"a": 1.0, "b/max": 2.0, "c/min": 2.5}
    assert calls[1:] == [(1, ops.SUM, group), (2, ops.MAX, group)]


def test_a_step_without_labels_after_one_with_them_has_nothing_to_report():
    report = HeadLossReport()
    add(report, a=1.0)
    report.clear()
    add(report, a=0.0, num_tokens=0.0)
    assert report.values(None) == {}
