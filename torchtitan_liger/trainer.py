"""torchtitan's trainer, with the loss computed by the LM head.

`B` batch, `L` sequence, `l` this rank's part of it, `D` width.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.tools.logging import logger, warn_once
from torchtitan.tools.utils import device_module, device_type
from torchtitan.train import Trainer

from torchtitan_liger import data, device, models
from torchtitan_liger.cli import FLAG_OFF
from torchtitan_liger.config_validator import head_loss_settings, model_args, resolve
from torchtitan_liger.head_loss.checks import check_candidate_range, check_label_range
from torchtitan_liger.head_loss.chunking import MIB
from torchtitan_liger.head_loss_plan import NUM_LABELED
from torchtitan_liger.head_loss_report import HeadLossReport
from torchtitan_liger.lm_head import LMHead
from torchtitan_liger.parallelize import (
    check_degrees,
    early_gather,
    gather_last_norm,
    shard_last_norm,
)
from torchtitan_liger.preflight import check_head

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class LigerTrainer(Trainer):
    """Trains as `torchtitan.train.Trainer` does.

    With `liger_kernel.enable_fused_linear_cross_entropy` the head is called with hidden
    states and labels. Without it, every step is torchtitan's own.
    """

    def __init__(self, job_config: JobConfig) -> None:
        if module := job_config.experimental.custom_import:
            importlib.import_module(module)  # may register what follows looks up
        models.register(job_config.model.name)
        model_args(job_config)  # raises for a flavor that does not exist
        if device_type == "cpu":
            for option in device.switch_off_what_needs_one(job_config):
                logger.warning(f"{option} is switched off: it needs a GPU")
        # A config module of the user's own may have the section liger_kernel alone.
        data.register_datasets(getattr(job_config.training, "text_field", "text"))
        # Before any model is built.
        self.head_loss_plan = resolve(job_config)
        if job_config.comm.mode == "default":  # else torchtitan makes up its ranks
            check_degrees(job_config, int(os.environ.get("WORLD_SIZE", 1)))
        self.head_loss_report = HeadLossReport()
        if self.head_loss_plan.enabled:
            models.check_spec(job_config.model.name)
        if self.head_loss_plan.warning:
            logger.warning(self.head_loss_plan.warning)
        super().__init__(job_config)
        if self.head_loss_plan.enabled:
            logger.info(self.head_loss_plan.announcement())
            if settings := head_loss_settings(job_config):
                logger.info(
                    f"The head's loss is {self.head_loss_plan.formula} ({settings})"
                )
            self._check_built()
            self._log_memory_plan()

    @property
    def lm_head(self) -> LMHead:
        head = self.model_parts[0].output
        assert isinstance(head, LMHead)
        return head

    def _check_built(self) -> None:
        """
        Raises:
            ValueError: where the head has no loss, or where ranks have other
                implementations, as when Liger-Kernel is missing on one machine: they would
                wait for each other's metrics for ever.
        """
        if getattr(self.model_parts[0].output, "head_loss", None) is None:
            raise ValueError(
                f"model.name is {self.job_config.model.name!r}, whose train spec has a "
                "parallelize_fn that leaves the LM head without its loss: make it "
                "functools.partial(torchtitan_liger.parallelize.parallelize, yours), or "
                f"turn the fused loss off ({FLAG_OFF})"
            )
        if self.job_config.comm.mode != "default" or not dist.is_initialized():
            return
        plan = self.head_loss_plan
        plans = [(plan.impl, plan.announcement())] * dist.get_world_size()
        dist.all_gather_object(plans, plans[0])
        (impl, here), *_ = plans
        for rank, (other, there) in enumerate(plans):
            if other != impl:
                raise ValueError(
                    f"rank 0 says: {here}; rank {rank}: {there}. All ranks need one "
                    "implementation: mend the environment, or choose "
                    "--liger_kernel.impl chunked"
                )

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        """As torchtitan's; refuses labels and candidates that are no token ids, while they
        are on the host.

        Raises:
            ValueError: with the value and the position of the first such number.
        """
        batches = super().batch_generator(data_iterable)
        for number, (input_dict, labels) in enumerate(batches, start=1):
            if self.head_loss_plan.enabled:
                rule = labels, self.model_args.vocab_size, IGNORE_INDEX
                check_label_range(*rule)
                candidates = input_dict.get("candidates")
                if isinstance(candidates, torch.Tensor):
                    check_candidate_range(candidates, *rule)
                # Counted here, while nobody has to wait for a GPU. torchtitan moves the
                # tensors of the dict and leaves the rest alone.
                num_labeled: Any = self.head_loss_plan.count_labels(labels)
                input_dict = {**input_dict, NUM_LABELED: num_labeled}
                is_last = number % self.gradient_accumulation_steps == 0
                if is_last and self.lm_head.num_fused_calls:
                    gather_last_norm(self.model_parts[0])
            yield input_dict, labels

    def forward_backward_step(
        self,
        *,
        input_dict: dict[str, torch.Tensor],
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor,
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch.

        Returns:
            [] this rank's sum of losses / tokens with a label on all ranks.

        Raises:
            ValueError: for tensors in the batch that do not fit the terms.
        """
        if not self.head_loss_plan.enabled:
            return super().forward_backward_step(
                input_dict=input_dict,
                labels=labels,
                global_valid_tokens=global_valid_tokens,
            )
        input_dict = dict(input_dict)
        num_labeled: Any = input_dict.pop(NUM_LABELED, None)
        unread = self.head_loss_plan.check_batch(input_dict)
        if unread:
            names = ", ".join(unread)
            warn_once(
                logger, f"The batch has {names}, which no term of [head_loss] reads"
            )
        rows, input_dict = self.head_loss_plan.split_batch(input_dict)
        whole_shape = labels.shape
        inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(
            input_dict, labels
        )
        if self.parallel_dims.cp_enabled:
            rows = shard_rows(rows, whole_shape, extra_kwargs["positions"])
            num_labeled = None  # of all ranks' shares
        (model,) = self.model_parts
        gather_early = early_gather(model)
        with self.train_context():
            with self.maybe_enable_amp:
                hidden_BLD = model(
                    inputs, **extra_inputs, **extra_kwargs, return_hidden_states=True
                )
                gather_early()
                output = self.lm_head(
                    hidden_BLD,
                    labels,
                    normalizer=global_valid_tokens,
                    check_labels=False,  # batch_generator has
                    num_labeled=num_labeled,
                    **rows,
                )
            del hidden_BLD
            output.loss.backward()
        self.head_loss_report.add(output, num_tokens=global_valid_tokens)
        return output.loss

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """As torchtitan's; logs what the loss consists of where torchtitan logs it."""
        self.head_loss_report.clear()
        try:
            super().train_step(data_iterator)
        except BaseException:
            if self.head_loss_plan.enabled:
                shard_last_norm(self.model_parts[0])
            raise
        if self.head_loss_plan.enabled and self.metrics_processor.should_log(self.step):
            self._log_head_loss()

    def _log_head_loss(self) -> None:
        mesh = self.parallel_dims.get_optional_mesh("loss")
        group = None if mesh is None else mesh.get_group()
        values = self.head_loss_report.values(group)
        if not values:
            return
        if "nll" in values:
            # In torch: Python's own raises where this is infinite.
            nats = torch.tensor(values.pop("nll"), dtype=torch.float64)
            values["perplexity"] = nats.exp().item()
        self.metrics_processor.logger.log(
            {f"head_loss/{name}": value for name, value in values.items()}, self.step
        )
        if not self.head_loss_plan.is_plain:
            color = self.metrics_processor.color
            line = "  ".join(f"{name} {value:.5g}" for name, value in values.items())
            logger.info(
                f"{color.red}step: {self.step:2}  {color.green}head_loss: "
                f"{line}{color.reset}"
            )

    def train(self) -> None:
        """As torchtitan's; says at the end how often the fused loss ran.

        Raises:
            RuntimeError: for a checkpoint that cannot be loaded or saved.
        """
        if self.head_loss_plan.enabled and self.head_loss_plan.preflight:
            self._preflight()
        try:
            super().train()
        except CheckpointException as error:  # no Exception: torchrun would not show it
            raise RuntimeError(explain_checkpoint(error)) from error
        plan, calls = self.head_loss_plan, 0
        if plan.enabled:
            calls = self.lm_head.num_fused_calls
            steps = self.job_config.training.steps
            never = not calls and plan.impl != "reference"  # which is not counted
            if never and self.step >= steps:
                logger.warning(f"No step was left to train: training.steps is {steps}")
        logger.info(f"The LM head computed {calls} losses without logits ({plan.impl})")

    def _preflight(self) -> None:
        if (mode := self.job_config.comm.mode) != "default":
            logger.warning(f"No preflight: comm.mode = {mode} has no other ranks")
            return
        no_backward = self._no_backward_before_training()
        report = check_head(
            self.model_parts[0],
            self.parallel_dims,
            self.post_dataloading_process,
            self.train_context,
            self.maybe_enable_amp,
            self.job_config.training.seq_len,
            self.device,
            backward=not no_backward,
        )
        if no_backward:
            logger.warning(f"No preflight of the gradients: {no_backward}")
        else:
            logger.info(str(report))
        # Neither its memory nor its time belongs to the first step.
        device_module.empty_cache()
        self.metrics_processor.device_memory_monitor.reset_peak_stats()
        self.metrics_processor.time_last_log = time.perf_counter()

    def _no_backward_before_training(self) -> str | None:
        """Why there can be none; None if there can."""
        if self.job_config.optimizer.early_step_in_backward:
            return (
                "with optimizer.early_step_in_backward its backward pass would change "
                "the weights"
            )
        dims, (model,) = self.parallel_dims, self.model_parts
        tied = model.output.weight is model.tok_embeddings.weight
        if tied and dims.dp_replicate_enabled and not dims.fsdp_enabled:
            return "DDP cannot reduce the head's share of a tied weight alone"
        return None

    def _log_memory_plan(self) -> None:
        training, parallel = self.job_config.training, self.parallel_dims
        num_tokens = training.local_batch_size * training.seq_len // parallel.cp
        head = self.lm_head
        assert head.head_loss is not None
        if head.head_loss.impl == "reference":
            logger.info("The LM head holds all logits at one time (reference)")
            return
        precision = training.mixed_precision_param
        off_on_cpu = self.device.type == "cpu" and precision == "float32"
        if not parallel.fsdp_enabled and (parallel.tp_enabled or off_on_cpu):
            precision = training.dtype  # torchtitan mixes none there
        plan = head.head_loss.plan(
            num_tokens,
            head.in_features,
            -(-head.out_features // parallel.tp),
            TORCH_DTYPE_MAP[precision],
            self.device.type,
            sharded=parallel.tp > 1,
        )
        logger.info(f"The LM head holds {plan}")
        budget = head.head_loss.options.logits_memory_mib
        if budget and plan.logits_bytes > budget * MIB:
            impl = head.head_loss.impl
            other = "; --liger_kernel.impl chunked has" if impl == "liger" else ""
            logger.warning(
                f"liger_kernel.logits_memory_mib is {budget}, but {impl} has no smaller "
                f"chunk than this{other}"
            )


def explain_checkpoint(error: CheckpointException) -> str:
    """What went wrong, and the way out where a finished run is to go on."""
    reasons = [reason for reason, _ in error.failures.values()]
    said = [
        str(x) if type(x) is RuntimeError else f"{type(x).__name__}: {x}"
        for x in reasons
    ]
    text = "; ".join(dict.fromkeys(said))
    # What torchtitan loads first of what a model alone has not.
    if re.search(
        r"Missing key .*: (dataloader|lr_scheduler|optimizer|train_state)", text
    ):
        text += (
            " The last checkpoint of a finished run holds the model alone: go on from an "
            "earlier one (--checkpoint.load_step N), or train with "
            "--checkpoint.no-last_save_model_only"
        )
    return text


def shard_rows(
    rows: Mapping[str, torch.Tensor],
    shape_BL: Sequence[int],
    positions_Bl: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """This rank's part of tensors [B, L, ...] under context parallelism.

    Args:
        shape_BL: that of the labels of the whole sequences.
        positions_Bl: which tokens of the whole sequence this rank has, in its order:
            torchtitan shards them as it does the labels.

    Raises:
        ValueError: for a tensor of another shape, of which positions would take anything.
    """
    for name, row in rows.items():
        if not isinstance(row, torch.Tensor) or row.shape[:2] != torch.Size(shape_BL):
            got = list(row.shape) if isinstance(row, torch.Tensor) else type(row)
            raise ValueError(
                f"{name} must be a tensor like the labels, {list(shape_BL)}, got {got}"
            )
    batch_B1 = torch.arange(len(positions_Bl), device=positions_Bl.device)[:, None]
    return {name: row_BL[batch_B1, positions_Bl] for name, row_BL in rows.items()}
