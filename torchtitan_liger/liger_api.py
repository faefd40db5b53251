"""Liger-Kernel: whether it is usable here, if not why, and how we call it.

The only file that imports `liger_kernel`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from dataclasses import dataclass

import torch
from packaging.version import InvalidVersion, Version

from torchtitan_liger.head_loss.chunking import ChunkPlan, budget_bytes, make_plan
from torchtitan_liger.head_loss.engine import (
    HeadLossOutput,
    check_inputs,
    check_label_range,
    inverse,
    products_dtype,
)
from torchtitan_liger.head_loss.options import HeadLossOptions
from torchtitan_liger.head_loss.terms import terms_of
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
    runs_on_device: bool
    """Its kernels run on the device that was asked about."""
    reason: str = ""
    """Why it cannot run; empty when it can."""

    @property
    def usable(self) -> bool:
        return self.importable and self.runs_on_device


def liger_status(device_type: str) -> LigerStatus:
    """Look at the installed Liger-Kernel, for tensors on `device_type`."""
    try:
        version = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        version = None
    try:
        if version is not None and Version(version) < Version(MINIMUM_VERSION):
            return LigerStatus(
                False,
                False,
                f"Liger-Kernel {version} is too old, at least {MINIMUM_VERSION} is "
                "needed. Please upgrade it with: pip install -U liger-kernel",
            )
        importlib.import_module("liger_kernel.transformers.functional")
    except ModuleNotFoundError as error:
        if error.name == "liger_kernel":
            return LigerStatus(False, False, INSTALL_HINT)
        return _broken(version, error)
    except InvalidVersion as error:
        return _broken(version, error)
    # An import that compiles and looks for devices can raise anything.
    except Exception as error:
        return _broken(version, error)
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return LigerStatus(
            True,
            False,
            "Liger-Kernel's Triton kernels need a GPU; this run is on the CPU",
        )
    return LigerStatus(True, True)


def _broken(version: str | None, error: Exception) -> LigerStatus:
    return LigerStatus(
        False,
        False,
        f"Liger-Kernel {version or ''} is installed but its import fails with "
        f"{type(error).__name__}: {error}",
    )


class LigerHeadLoss:
    """`HeadLoss` computed by Liger-Kernel's fused linear cross entropy.

    Differences from `HeadLoss`: the gradients are rounded once more, when Liger scales
    them by the incoming gradient; and Liger waits for the GPU twice per call.
    """

    impl = "liger"

    def __init__(self, options: HeadLossOptions | None = None) -> None:
        self.options = HeadLossOptions() if options is None else options
        self.terms = terms_of(self.options)

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        *,
        normalizer: torch.Tensor | float = 1,
        shard: VocabShard | None = None,
        check_labels: bool = True,
    ) -> HeadLossOutput:
        """As `HeadLoss.__call__`.

        Raises:
            ValueError: also for a sharded vocabulary, which Liger does not support.
        """
        from liger_kernel.transformers.functional import (
            liger_fused_linear_cross_entropy,
        )

        if shard is not None:
            raise ValueError(
                'impl="liger" needs the whole vocabulary on each rank; '
                'use impl="chunked" for a sharded head'
            )
        check_inputs(hidden, weight, labels)
        options = self.options
        if check_labels:
            check_label_range(labels, weight.shape[0], options.ignore_index)
        dtype = products_dtype(hidden, weight)
        # Cast once, here: under autocast Liger would cast the weight for every chunk.
        hidden_TD = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        weight_VD = weight.to(dtype)
        labels_T = labels.reshape(-1)
        wants_grad = torch.is_grad_enabled() and weight.requires_grad
        if wants_grad and not hidden_TD.requires_grad:
            # Liger computes the weight's gradient only beside that of the hidden states.
            hidden_TD = hidden_TD.detach().requires_grad_()
        num_tokens, dim = hidden_TD.shape
        if num_tokens == 0:  # Liger divides by the number of chunks
            loss = hidden_TD.sum() * 0.0 + weight_VD.sum() * 0.0
            zero = loss.detach().float()
            return HeadLossOutput(loss.float(), {t.name: zero for t in self.terms})
        with torch.autocast(hidden.device.type, enabled=False):
            # By keyword: the order has grown between versions.
            result = liger_fused_linear_cross_entropy(
                input=hidden_TD,
                weight=weight_VD,
                target=labels_T,
                ignore_index=options.ignore_index,
                lse_square_scale=options.z_loss,
                label_smoothing=options.label_smoothing,
                reduction="sum",
                softcap=options.logit_softcap or None,
                return_z_loss=bool(options.z_loss),
                accum_dtype=options.acc_dtype,
                chunk_mem_const=chunk_mem_const(
                    num_tokens,
                    dim,
                    weight_VD.shape[0],
                    dtype.itemsize,
                    self._budget(hidden),
                ),
            )
        scale = inverse(normalizer, torch.float32, hidden.device)
        if not options.z_loss:
            loss = result * scale
            return HeadLossOutput(loss, {"cross_entropy": loss.detach()})
        loss = result.loss * scale
        weighted_z = result.z_loss.detach().float() * scale
        terms = {
            "cross_entropy": loss.detach() - weighted_z,
            "z_loss": weighted_z / options.z_loss,
        }
        return HeadLossOutput(loss, terms)

    def plan(
        self,
        num_tokens: int,
        dim: int,
        vocab_size: int,
        dtype: torch.dtype,
        device_type: str,
    ) -> ChunkPlan:
        """How a call with these sizes goes through its logits, and in which memory."""
        budget = budget_bytes(self.options.logits_memory_mib, device_type)
        const = chunk_mem_const(num_tokens, dim, vocab_size, dtype.itemsize, budget)
        rows = liger_rows(num_tokens, dim, vocab_size, const)
        return make_plan(num_tokens, rows, vocab_size, dtype.itemsize, dtype.itemsize)

    def _budget(self, hidden: torch.Tensor) -> int:
        return budget_bytes(self.options.logits_memory_mib, hidden.device.type)


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
