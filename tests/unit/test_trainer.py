from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torchtitan.train import Trainer

from torchtitan_liger.head_loss import (
    CrossEntropy,
    HeadLossOptions,
    HeadLossOutput,
    ZLoss,
)
from torchtitan_liger.head_loss_plan import HeadLossPlan
from torchtitan_liger.head_loss_report import HeadLossReport
from torchtitan_liger.trainer import LigerTrainer

OUTPUT = HeadLossOutput(
    torch.tensor(0.0),
    {"cross_entropy": torch.tensor(1000.0), "z_loss": torch.tensor(2.0)},
    {"accuracy": torch.tensor(0.25)},
)


@pytest.fixture
def trainer(monkeypatch):
    """One that trains nothing, of two micro-batches each step."""

    def train_step(self, _):
        for _ in range(2):
            self.head_loss_report.add(OUTPUT, weighted=self.weighted)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    trainer = LigerTrainer.__new__(LigerTrainer)
    trainer.head_loss_plan = HeadLossPlan(
        True, "chunked", HeadLossOptions(), (CrossEntropy(), ZLoss(0.0))
    )
    trainer.head_loss_report = HeadLossReport()
    trainer.weighted = False
    trainer.parallel_dims = SimpleNamespace(get_optional_mesh=lambda _: None)
    trainer.logged = {}
    trainer.metrics_processor = SimpleNamespace(
        should_log=lambda step: step == 2,
        color=SimpleNamespace(red="", green="", reset=""),
        logger=SimpleNamespace(
            log=lambda found, step: trainer.logged.update({step: found})
        ),
    )
    return trainer


def test_a_step_is_logged_where_torchtitan_logs_it(trainer):
    for trainer.step in (1, 2, 3):
        trainer.train_step(iter(()))
    assert trainer.logged == {
        2: {
            "head_loss/cross_entropy": 2000.0,
            "head_loss/z_loss": 4.0,
            "head_loss/accuracy": 0.5,
            "head_loss/perplexity": float("inf"),
        }
    }


def test_weights_of_tokens_leave_no_perplexity(trainer):
    trainer.step, trainer.weighted = 2, True
    trainer.train_step(iter(()))
    assert "head_loss/perplexity" not in trainer.logged[2]


def test_torchtitans_own_loss_has_no_terms_to_log(trainer):
    trainer.step = 2
    trainer.head_loss_plan = HeadLossPlan(False, "stock", HeadLossOptions())
    trainer.train_step(iter(()))
    assert trainer.logged == {}
