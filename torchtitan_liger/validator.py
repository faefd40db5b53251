"""Validation without logits. `B` batch, `L` sequence, `D` width."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import BaseValidator, Validator, build_validator
from torchtitan.config import JobConfig
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from torchtitan_liger.config_validator import resolve
from torchtitan_liger.data import explain_empty_shard
from torchtitan_liger.head_loss.checks import check_label_range
from torchtitan_liger.lm_head import LMHead


class LigerValidator(Validator):
    """torchtitan's validator with the loss from the head.

    The loss is the cross entropy alone, whatever is trained on, as the mean over all
    tokens with a label, of all batches and ranks. torchtitan 0.2.2's own is the mean over
    batches of the mean over a batch's tokens.
    """

    def __init__(self, job_config: JobConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(job_config, *args, **kwargs)
        self.plan = resolve(job_config)
        # torchtitan's datasets that end stay at their end.
        is_whole = job_config.validation.steps == -1
        self.start = self.validation_dataloader.state_dict() if is_whole else None

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log the validation loss of `self.job_config.validation.steps` batches."""
        (model,) = model_parts
        head = model.get_submodule("output")
        assert isinstance(head, LMHead)
        cross_entropy = self.plan.plain_cross_entropy()
        model.eval()
        # Float64 sums: one number for up to billions of tokens.
        totals = torch.zeros(2, dtype=torch.float64, device=device_type)
        most_steps = self.job_config.validation.steps
        if self.start is not None:
            self.validation_dataloader.load_state_dict(self.start)
        for num_steps, (input_dict, labels) in enumerate(self.validation_dataloader):
            if num_steps == most_steps:  # -1: all
                break
            check_label_range(labels, head.out_features, IGNORE_INDEX)
            # Counted on the host; under context parallelism ranks have shares of it.
            num_labeled = int((labels != IGNORE_INDEX).sum())
            self.metrics_processor.ntokens_since_last_log += labels.numel()
            _, input_dict = self.plan.split_batch(input_dict)
            input_dict = {k: v.to(device_type) for k, v in input_dict.items()}
            inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(
                input_dict, labels.to(device_type), model_parts
            )
            with self.validation_context(), self.maybe_enable_amp:
                hidden_BLD = model(
                    inputs, **extra_inputs, **extra_kwargs, return_hidden_states=True
                )
                loss_sum = head(
                    hidden_BLD,
                    labels,
                    head_loss=cross_entropy,
                    check_labels=False,
                    num_labeled=None if self.parallel_dims.cp_enabled else num_labeled,
                ).loss
            totals += torch.stack([loss_sum.double(), (labels != IGNORE_INDEX).sum()])
        mesh = self.parallel_dims.get_optional_mesh("loss")
        loss_sum, num_tokens = (dist_utils.dist_sum(total, mesh) for total in totals)
        model.train()
        if num_tokens:
            self.metrics_processor.log_validation(loss=loss_sum / num_tokens, step=step)
        else:
            logger.warning(f"validate step: {step}: no token with a label, so no loss")


def build(
    job_config: JobConfig, dp_world_size: int, dp_rank: int, **kwargs: Any
) -> BaseValidator:
    """Our validator where the head has a loss, torchtitan's otherwise."""
    plan = resolve(job_config)
    builder = LigerValidator if plan.enabled and plan.validate else build_validator
    with explain_empty_shard(job_config.validation.dataset, dp_rank, dp_world_size):
        return builder(
            job_config=job_config,
            dp_world_size=dp_world_size,
            dp_rank=dp_rank,
            **kwargs,
        )
