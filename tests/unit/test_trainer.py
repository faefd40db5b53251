from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.config import ConfigManager
from torchtitan.protocols import train_spec as torchtitan_specs
from torchtitan.train import Trainer

from torchtitan_liger.head_loss import (
    CrossEntropy,
    HeadLoss,
    HeadLossOptions,
    HeadLossOutput,
    ZLoss,
)
from torchtitan_liger.head_loss_plan import HeadLossPlan
from torchtitan_liger.head_loss_report import HeadLossReport
from torchtitan_liger.liger_api import LigerHeadLoss
from torchtitan_liger.lm_head import LMHead
from torchtitan_liger.trainer import LigerTrainer, explain_checkpoint, shard_rows

OUTPUT = HeadLossOutput(
    torch.tensor(0.0),
    {"cross_entropy": torch.tensor(1000.0), "z_loss": torch.tensor(2.0)},
    {"nll": torch.tensor(500.0), "accuracy": torch.tensor(0.25)},
)


@pytest.fixture
def trainer(monkeypatch):
    """One that trains nothing, of two micro-batches each step."""

    def train_step(self, _):
        for _ in range(2):
            self.head_loss_report.add(OUTPUT, num_tokens=self.num_tokens)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    trainer = LigerTrainer.__new__(LigerTrainer)
    trainer.head_loss_plan = HeadLossPlan(
        "chunked", HeadLossOptions(), (CrossEntropy(), ZLoss(0.0))
    )
    trainer.head_loss_report = HeadLossReport()
    trainer.num_tokens = torch.tensor(8.0)
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


@pytest.mark.parametrize(
    "row", [torch.ones(2, 6), torch.ones(3, 4), torch.ones(2), [[1.0] * 4] * 2]
)
def test_what_is_no_row_of_the_batch_is_not_cut_into_one(row):
    positions = torch.tensor([[0, 3], [0, 3]])
    shape = torch.Size([2, 4])
    found = shard_rows({"x": torch.arange(8).view(2, 4)}, shape, positions)
    assert found["x"].tolist() == [[0, 3], [4, 7]]
    with pytest.raises(
        ValueError, match=r"advantages must be .* labels, \[2, 4\], got"
    ):
        shard_rows({"advantages": row}, shape, positions)


def test_a_step_without_labels_logs_nothing(trainer):
    trainer.step, trainer.num_tokens = 2, torch.tensor(0.0)
    trainer.train_step(iter(()))
    assert trainer.logged == {}


CUSTOM = """
from dataclasses import replace
from torchtitan.models.llama3 import get_train_spec
from torchtitan.protocols.train_spec import register_train_spec
from torchtitan_liger.models import train_spec

def triple(*_, **__):
    return None

ours = train_spec("llama3")
specs = {"mine": ours, "plain": get_train_spec()}
specs["other_loss"] = replace(ours, build_loss_fn=triple)
for name, spec in specs.items():
    args = {"small": spec.model_args["debugmodel"]}
    register_train_spec(name, replace(spec, model_args=args))
"""


def test_a_custom_import_comes_before_what_it_registers_is_looked_up(
    monkeypatch, tmp_path
):
    (tmp_path / "custom_models.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torchtitan_specs, "_extra_train_specs", {})
    monkeypatch.setattr(Trainer, "__init__", lambda self, job_config: None)
    monkeypatch.setattr(LigerTrainer, "_check_built", lambda self: None)
    monkeypatch.setattr(LigerTrainer, "_log_memory_plan", lambda self: None)

    def trainer(name, **settings):
        job = ConfigManager().parse_args(
            [
                "--job.custom_config_module=torchtitan_liger.job_config",
                "--experimental.custom_import=custom_models",
                f"--model.name={name}",
                "--model.flavor=small",
                "--model.hf_assets_path=.",
            ]
        )
        vars(job.liger_kernel).update(settings)
        return LigerTrainer(job)

    on = {"enable_fused_linear_cross_entropy": True, "impl": "chunked"}
    assert trainer("mine", **on).head_loss_plan.enabled
    assert not trainer("plain").head_loss_plan.enabled
    with pytest.raises(ValueError, match="'plain', .*Transformer, .*models.train_spec"):
        trainer("plain", **on)
    assert not trainer("other_loss").head_loss_plan.enabled
    with pytest.raises(
        ValueError, match=r"'other_loss', .* loss of triple, .*head_loss"
    ):
        trainer("other_loss", **on)


def batches_of(trainer, monkeypatch, labels_BL, **tensors):
    """What the trainer makes of a data pipeline with one batch."""
    trainer.model_args = SimpleNamespace(vocab_size=7)
    trainer.gradient_accumulation_steps = 2
    trainer.model_parts = [
        SimpleNamespace(output=LMHead.from_linear(torch.nn.Linear(4, 7, bias=False)))
    ]
    monkeypatch.setattr(Trainer, "batch_generator", lambda _self, data: iter(data))
    batch = {"input": torch.zeros_like(labels_BL), **tensors}, labels_BL
    return list(trainer.batch_generator([batch]))


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_that_is_no_token_id_is_found_on_the_host(trainer, monkeypatch, label):
    labels_BL = torch.zeros(2, 3, dtype=torch.long)
    labels_BL[1, 2] = label
    with pytest.raises(ValueError, match=rf"labels\[1, 2\] is {label}, "):
        batches_of(trainer, monkeypatch, labels_BL)


def test_a_candidate_beyond_the_vocabulary_is_found_on_the_host(trainer, monkeypatch):
    labels_BL = torch.tensor([[1, -100]])
    candidates = torch.tensor([[[6, -1], [7, 7]]])  # of an ignored token anything
    batches_of(trainer, monkeypatch, labels_BL, candidates=candidates)
    candidates[0, 0, 1] = 7
    with pytest.raises(ValueError, match=r"candidates\[0, 0, 1\] is 7, .*below 7"):
        batches_of(trainer, monkeypatch, labels_BL, candidates=candidates)


@pytest.mark.parametrize("cp_enabled", [False, True])
def test_labels_are_counted_but_for_shares_of_a_sequence(
    trainer, monkeypatch, cp_enabled
):
    """The head drops as many tokens as have no label; a rank that has a part of the
    sequence does not know how many those are."""
    labels_BL = torch.tensor([[1, -100, 3, 4], [-100, -100, 6, 0]])
    ((input_dict, _),) = batches_of(trainer, monkeypatch, labels_BL)
    share_Bl = torch.tensor([[0, 3], [0, 3]])
    calls = []

    def lm_head(_self, hidden, labels, **call):
        calls.append((labels, call))
        return OUTPUT._replace(loss=hidden.sum())

    def decoder(tokens, *, return_hidden_states, positions=None):
        return torch.zeros(*tokens.shape, 4, requires_grad=True)

    def post_dataloading_process(input_dict, labels):
        if not cp_enabled:
            return input_dict["input"], labels, {}, {}
        inputs, labels = (x.gather(1, share_Bl) for x in (input_dict["input"], labels))
        return inputs, labels, {}, {"positions": share_Bl}

    monkeypatch.setattr(LMHead, "forward", lm_head)
    monkeypatch.setattr("torchtitan_liger.trainer.early_gather", lambda _: lambda: None)
    decoder.output = trainer.lm_head
    trainer.model_parts = [decoder]
    trainer.parallel_dims.cp_enabled = cp_enabled
    trainer.post_dataloading_process = post_dataloading_process
    trainer.train_context = contextlib.nullcontext
    trainer.maybe_enable_amp = contextlib.nullcontext()
    input_dict["token_weights"] = torch.arange(8.0).view(2, 4)
    trainer.forward_backward_step(
        input_dict=input_dict, labels=labels_BL, global_valid_tokens=torch.tensor(5.0)
    )
    ((labels, call),) = calls
    assert call["num_labeled"] == (None if cp_enabled else 5)
    assert call["normalizer"] == 5
    assert call["check_labels"] is False  # which would wait for a GPU
    expected = [[0, 3], [4, 7]] if cp_enabled else [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert call["token_weights"].tolist() == expected
    assert labels.tolist() == labels_BL[:, [0, 3] if cp_enabled else slice(4)].tolist()


def test_a_head_that_was_not_prepared_is_refused():
    trainer = LigerTrainer.__new__(LigerTrainer)
    trainer.job_config = SimpleNamespace(
        model=SimpleNamespace(name="mine"), comm=SimpleNamespace(mode="default")
    )
    linear = torch.nn.Linear(4, 8, bias=False)
    for head in (linear, LMHead.from_linear(linear)):
        trainer.model_parts = [SimpleNamespace(output=head)]
        with pytest.raises(ValueError, match="'mine', .*parallelize_fn .*partial"):
            trainer._check_built()
    head.head_loss = HeadLoss()
    trainer._check_built()


def test_torchtitans_own_loss_has_no_terms_to_log(trainer):
    trainer.step = 2
    trainer.head_loss_plan = HeadLossPlan("stock", HeadLossOptions())
    trainer.train_step(iter(()))
    assert trainer.logged == {}


def test_with_torchtitans_own_loss_a_batch_is_torchtitans(trainer, monkeypatch):
    """A decoder may read what is a term's elsewhere."""
    trainer.head_loss_plan = HeadLossPlan("stock", HeadLossOptions())
    tokens_BL = torch.zeros(1, 8, dtype=torch.long)
    batch = {"input": tokens_BL, "old_logp": tokens_BL, "advantages": tokens_BL}
    monkeypatch.setattr(
        Trainer, "forward_backward_step", lambda _self, **step: step["input_dict"]
    )
    given = trainer.forward_backward_step(
        input_dict=batch, labels=tokens_BL, global_valid_tokens=torch.ones(())
    )
    assert given is batch


def memory_plan(caplog, head_loss, **dims):
    """What is logged for 8,192 tokens, a width of 256 and 8,192 token ids."""
    caplog.set_level(logging.INFO)
    linear = torch.nn.Linear(256, 8192, bias=False, device="meta")
    head = LMHead.from_linear(linear)
    head.head_loss = head_loss
    trainer = LigerTrainer.__new__(LigerTrainer)
    trainer.model_parts = [SimpleNamespace(output=head)]
    trainer.device = torch.device("cpu")
    trainer.job_config = SimpleNamespace(
        training=SimpleNamespace(
            local_batch_size=8,
            seq_len=1024,
            mixed_precision_param="bfloat16",
            dtype="float32",
        ),
    )
    degrees = {"cp": 1, "tp": 1, "tp_enabled": False, "fsdp_enabled": False}
    trainer.parallel_dims = SimpleNamespace(**degrees | dims)
    trainer._log_memory_plan()
    return caplog.text


@pytest.mark.parametrize(("fsdp", "mib"), [(True, 192), (False, 128)])
def test_the_memory_plan_is_in_the_jobs_dtype(caplog, fsdp, mib):
    """torchtitan mixes no precisions under tensor parallelism alone. Where it does, a CPU
    has each bfloat16 number in float32 as well, for the products."""
    dims = {"tp": 2, "tp_enabled": True, "fsdp_enabled": fsdp}
    text = memory_plan(caplog, HeadLoss(), **dims)
    assert f"all logits would take {mib}.0 MiB" in text
    assert "WARNING" not in text


def test_a_budget_below_the_smallest_chunk_is_said(caplog):
    options = HeadLossOptions(logits_memory_mib=1)
    text = memory_plan(caplog, LigerHeadLoss(options=options))
    assert "is 1, but liger has no smaller chunk than this; --liger_kernel.impl" in text
    caplog.clear()
    assert "WARNING" not in memory_plan(caplog, HeadLoss(options=options))


@pytest.mark.parametrize(
    ("key", "is_of_a_model_alone"),
    [
        ("dataloader.dp_rank_0", True),
        ("optimizer.param_groups.tok_embeddings.weight.lr", True),
        ("layers.6.attention.wq.weight", False),
    ],
)
def test_what_a_checkpoint_lacks_is_explained(key, is_of_a_model_alone):
    error = RuntimeError(f"Missing key in checkpoint state_dict: {key}.")
    failures = dict.fromkeys(range(2), (error, None))
    text = explain_checkpoint(CheckpointException("load", failures))
    assert text.startswith(str(error))
    assert text.count(key) == 1
    assert ("--checkpoint.load_step" in text) == is_of_a_model_alone


def test_context_parallelism_leaves_each_rank_fewer_tokens(caplog):
    text = memory_plan(caplog, HeadLoss(), cp=2, fsdp_enabled=True)
    assert "all logits would take 192.0 MiB" in text


def test_the_memory_plan_counts_both_buffers_of_a_sharded_head(caplog):
    options = HeadLossOptions(logits_memory_mib=16)
    text = memory_plan(caplog, HeadLoss(options=options), tp=2, tp_enabled=True)
    assert "(16 x 512 tokens)" in text
    assert "at most 16.0 MiB" in text
    assert "WARNING" not in text


EARLY = SimpleNamespace(early_step_in_backward=True)
LATE = SimpleNamespace(early_step_in_backward=False)


@pytest.mark.parametrize(
    ("optimizer", "tied", "dims", "why"),
    [
        (LATE, False, {}, None),
        (LATE, False, {"dp_replicate_enabled": True}, None),
        (LATE, True, {"dp_replicate_enabled": True, "fsdp_enabled": True}, None),
        (LATE, True, {"dp_replicate_enabled": True}, "DDP cannot"),
        (EARLY, False, {}, "early_step_in_backward"),
    ],
)
def test_the_preflight_goes_backward_only_where_a_step_might_come_before(
    trainer, monkeypatch, caplog, optimizer, tied, dims, why
):
    """And neither its memory nor its time is the first step's."""
    asked, resets = [], []
    weight, other = torch.zeros(3, 3), torch.zeros(3, 3)
    model = SimpleNamespace(
        output=SimpleNamespace(weight=weight),
        tok_embeddings=SimpleNamespace(weight=weight if tied else other),
    )
    trainer.model_parts = [model]
    trainer.job_config = SimpleNamespace(
        comm=SimpleNamespace(mode="default"),
        optimizer=optimizer,
        training=SimpleNamespace(seq_len=8),
    )
    no_mesh = {"dp_replicate_enabled": False, "fsdp_enabled": False}
    trainer.parallel_dims = SimpleNamespace(**no_mesh | dims)
    trainer.metrics_processor = SimpleNamespace(
        device_memory_monitor=SimpleNamespace(
            reset_peak_stats=lambda: resets.append(1)
        ),
        time_last_log=0.0,
    )
    trainer.post_dataloading_process = trainer.train_context = None
    trainer.maybe_enable_amp = None
    trainer.device = torch.device("cpu")
    monkeypatch.setattr(
        "torchtitan_liger.trainer.check_head",
        lambda *_, backward: asked.append(backward),
    )
    trainer._preflight()
    assert asked == [why is None]
    assert ("No preflight of the gradients" in caplog.text) == (why is not None)
    assert why is None or why in caplog.text
    assert resets == [1]
    assert trainer.metrics_processor.time_last_log > 0


def test_a_rank_that_is_alone_asks_no_others_which_loss_they_have(trainer, monkeypatch):
    """torchtitan's dry runs have made-up ranks."""
    trainer.job_config = SimpleNamespace(
        comm=SimpleNamespace(mode="fake_backend"), model=SimpleNamespace(name="mine")
    )
    head = LMHead.from_linear(torch.nn.Linear(4, 8, bias=False))
    head.head_loss = HeadLoss()
    trainer.model_parts = [SimpleNamespace(output=head)]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda *_: pytest.fail("it waits")
    )
    trainer._check_built()
