"""Liger-Kernel: whether it is usable here, if not why, and how we call it.

The only file that imports `liger_kernel`. `T` tokens, `N` of them that count, `D` width, `V`
vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from packaging.version import Version

from torchtitan_liger.head_loss.calls import (
    Call,
    kept_rows,
    masked,
    prepare,
)
from torchtitan_liger.head_loss.chunking import ChunkPlan, budget_bytes, make_plan
from torchtitan_liger.head_loss.engine import HeadLossOutput
from torchtitan_liger.head_loss.gradients import (
    scale_gradient,
    without_second_derivative,
)
from torchtitan_liger.head_loss.options import HeadLossOptions
from torchtitan_liger.head_loss.terms import CrossEntropy, Term, as_terms, plain_of
from torchtitan_liger.head_loss.vocab_parallel import VocabShard

MINIMUM_VERSION = "0.8.4"  # the first with chunk_mem_const and a right softcap
INSTALL_HINT = (
    "Liger-Kernel is not installed. Please install it with: pip install liger-kernel"
)


@dataclass(frozen=True)
class LigerStatus:
    """Whether Liger-Kernel can run, and if not, why not."""

    importable: bool
    """It is installed, new enough and imports."""
    reason: str = ""
    """Why it cannot run on the device that was asked about; empty when it can."""

    @property
    def usable(self) -> bool:
        return not self.reason


def liger_status(device_type: str) -> LigerStatus:
    """Look at the installed Liger-Kernel, for tensors on `device_type`."""
    on_cpu = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"
    try:
        version = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        version = None
    try:
        if version is not None and Version(version) < Version(MINIMUM_VERSION):
            return LigerStatus(
                False,
                f"Liger-Kernel {version} is too old, at least {MINIMUM_VERSION} is "
                "needed. Please upgrade it with: pip install -U liger-kernel",
            )
        importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    # An import that compiles and looks for devices can raise anything.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "liger_kernel":
            too = " (on a machine with a GPU: this run is on the CPU)" if on_cpu else ""
            return LigerStatus(False, INSTALL_HINT + too)
        return LigerStatus(
            False,
            f"Liger-Kernel {version or ''} is installed but its import fails with "
            f"{type(error).__name__}: {error}",
        )
    if on_cpu:
        return LigerStatus(
            True,
            "Liger-Kernel's Triton kernels need a GPU; this run is on the CPU",
        )
    return LigerStatus(True)


class LigerHeadLoss:
    """`HeadLoss` computed by Liger-Kernel's fused linear cross entropy.

    Differences from `HeadLoss`: the loss is float32 for any inputs; the gradients are
    rounded once more where `normalizer` is neither 1 nor this call's number of labels;
    beside a z-loss, the terms that are reported, not loss and gradients, have the z-loss
    rounded to the inputs' dtype; Liger waits for the GPU once per call, has no float16, and
    overwrites its logits unseen by a selective checkpoint around it that keeps products.
    """

    impl = "liger"

    def __init__(
        self,
        terms: Sequence[Term] = (CrossEntropy(),),
        options: HeadLossOptions | None = None,
    ) -> None:
        """
        Raises:
            ValueError: for a term or a setting that Liger does not have.
        """
        self.terms = as_terms(terms)
        plain = plain_of(self.terms)
        if plain is None:
            raise ValueError(
                "Liger-Kernel has CrossEntropy(label_smoothing) and, after it, "
                f'ZLoss(weight) only, got {self.terms}; use impl="chunked"'
            )
        self._plain = plain
        self.options = HeadLossOptions() if options is None else options
        if self.options.temperature != 1:
            raise ValueError(
                f"Liger-Kernel has no temperature, got {self.options.temperature}; use "
                'impl="chunked"'
            )

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        *,
        normalizer: torch.Tensor | float = 1,
        shard: VocabShard | None = None,
        check_labels: bool = True,
        num_labeled: int | None = None,
    ) -> HeadLossOutput:
        """As `HeadLoss.__call__`, without what Liger does not have: `token_weights`,
        `reduction`, a teacher, sequences and row inputs.

        Raises:
            ValueError: also for a sharded vocabulary or products in float16, which Liger
                does not support.
        """
        if shard is not None:
            raise ValueError(
                'impl="liger" needs the whole vocabulary on each rank; '
                'use impl="chunked" for a sharded head'
            )
        call = prepare(
            hidden,
            weight,
            labels,
            normalizer=normalizer,
            ignore_index=self.options.ignore_index,
            check_labels=check_labels,
        )
        if call.products_dtype == torch.float16:
            raise ValueError(
                "Liger-Kernel rounds its gradients to float16 before the incoming gradient "
                'scales them to fit: use impl="chunked"'
            )
        kept_N, call, all_labeled = kept_rows(call, check_labels, num_labeled)
        # Where Liger's own reduction is the loss, its gradients need no other factor.
        is_sum = not isinstance(normalizer, torch.Tensor) and normalizer == 1
        hidden_TD = call.hidden_TD
        if kept_N is not None:
            hidden_TD = hidden_TD.index_select(0, kept_N)
            call = call._replace(
                labels_T=call.labels_T[kept_N], valid_T=call.valid_T[kept_N]
            )
        loss, z_loss = _LigerFunction.apply(
            hidden_TD,
            weight,
            call,
            self.options,
            self._plain,
            "sum" if is_sum else "mean",
            all_labeled,
            torch.is_grad_enabled(),
        )
        label_smoothing, z_loss_weight = self._plain
        terms = {"cross_entropy": loss.detach()}
        if z_loss_weight:
            terms["cross_entropy"] = loss.detach() - z_loss
            terms["z_loss"] = z_loss / z_loss_weight
        metrics = {} if label_smoothing else {"nll": terms["cross_entropy"]}
        return HeadLossOutput(loss, terms, metrics)

    def plan(
        self,
        num_tokens: int,
        dim: int,
        vocab_size: int,
        dtype: torch.dtype,
        device_type: str,
        *,
        sharded: bool = False,
    ) -> ChunkPlan:
        """How a call with these sizes goes through its logits, and in which memory."""
        budget = budget_bytes(
            self.options.logits_memory_mib, device_type, vocab_size * dtype.itemsize
        )
        const = chunk_mem_const(num_tokens, dim, vocab_size, dtype.itemsize, budget)
        rows = liger_rows(num_tokens, dim, vocab_size, const)
        return make_plan(num_tokens, rows, vocab_size, dtype.itemsize)


class _LigerFunction(torch.autograd.Function):
    """`apply(hidden, weight, call, options, plain, reduction, all_labeled, with_grad)`.

    Gives the loss and, a part of it, the weighted z-loss.

    Liger's own backward pass scales the gradients that it holds in place, so a second one
    through the same graph would scale them again, and waits for the GPU to see whether it
    has to. Here they are taken from the function below it, and scaled by us.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        call: Call,
        options: HeadLossOptions,
        plain: tuple[float, float],
        reduction: Literal["sum", "mean"],
        all_labeled: bool,
        with_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            fused_linear_cross_entropy_forward,
        )

        label_smoothing, z_loss_weight = plain
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        with_grad = with_grad and (needs_hidden or needs_weight)
        dtype = call.products_dtype
        # Cast here, once: under autocast Liger would cast the weight for every chunk.
        hidden, weight = hidden_TD.detach().to(dtype), weight_VD.detach().to(dtype)
        num_tokens, dim = hidden.shape
        num_valid: torch.Tensor | int = num_tokens
        if not all_labeled:
            # Nothing that an ignored row holds may reach the weight's gradient.
            hidden = masked(hidden, call.valid_T)
            num_valid = call.valid_T.sum()
        scale = call.scale.float()
        if reduction == "mean":
            scale = scale * num_valid
            # n * (1 / n) may miss one by a rounding.
            is_one = (scale - 1).abs() < 4 * torch.finfo(scale.dtype).eps
            scale = scale.masked_fill(is_one, 1.0)
        loss, z_loss = torch.zeros_like(scale), torch.zeros_like(scale)
        grads: list[torch.Tensor | None] = [None, None]
        if num_tokens == 0:  # Liger would divide by zero chunks
            grads = [torch.zeros_like(hidden), torch.zeros_like(weight)]
        else:
            row_bytes = weight.shape[0] * dtype.itemsize
            budget = budget_bytes(
                options.logits_memory_mib, hidden.device.type, row_bytes
            )
            with torch.autocast(hidden.device.type, enabled=False):
                # By keyword, and from both ends: arguments and results have grown between
                # versions. The weight's gradient comes only beside the hidden states'.
                loss, z_loss, *_, d_hidden, d_weight, _ = (
                    fused_linear_cross_entropy_forward(
                        _input=hidden,
                        weight=weight,
                        target=call.labels_T,
                        ignore_index=options.ignore_index,
                        lse_square_scale=z_loss_weight,
                        label_smoothing=label_smoothing,
                        reduction=reduction,
                        softcap=options.logit_softcap or None,
                        return_z_loss=bool(z_loss_weight),
                        accum_dtype=torch.promote_types(options.acc_dtype, dtype),
                        compute_gradients=with_grad,
                        weight_requires_grad=with_grad and needs_weight,
                        chunk_mem_const=chunk_mem_const(
                            num_tokens, dim, weight.shape[0], dtype.itemsize, budget
                        ),
                    )
                )
            if z_loss is None:
                z_loss = torch.zeros_like(scale)
            if with_grad:
                grads = [d_hidden if needs_hidden else None, d_weight]
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype
        ctx.save_for_backward(scale, *grads)
        z_loss = z_loss.detach().float() * scale
        ctx.mark_non_differentiable(z_loss)
        return loss.detach().float() * scale, z_loss

    @staticmethod
    @without_second_derivative
    def backward(
        ctx: Any, grad_loss: torch.Tensor, _grad_z_loss: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        scale, *grads = ctx.saved_tensors
        scaled = (
            None if grad is None else scale_gradient(grad, grad_loss * scale, dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None, None, None


def liger_rows(num_tokens: int, dim: int, vocab_size: int, const: int) -> int:
    """The tokens in one chunk of Liger's for a given `chunk_mem_const`.

    Liger allows its logits `const` times the memory of the hidden states and rounds the
    number of rows up to a power of two.
    """
    num_chunks = -(-vocab_size // (const * dim))
    rows = -(-num_tokens // num_chunks)
    return min(1 << (rows - 1).bit_length(), num_tokens)


def chunk_mem_const(
    num_tokens: int, dim: int, vocab_size: int, itemsize: int, budget: int
) -> int:
    """The largest `chunk_mem_const` whose logits fit into `budget` bytes, at least 1.

    Liger's smallest chunk (`chunk_mem_const=1`) may be larger than the budget.
    """
    best = 1
    for const in range(1, -(-vocab_size // dim) + 1):
        rows = liger_rows(num_tokens, dim, vocab_size, const)
        if rows * vocab_size * itemsize > budget:
            break
        best = const
    return best
