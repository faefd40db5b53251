"""What computes the loss of a job: the frozen result of reading its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from torchtitan_liger.head_loss import (
    CrossEntropy,
    HeadLoss,
    HeadLossOptions,
    SequenceTerm,
    Term,
)
from torchtitan_liger.head_loss.statistics import OF_TEACHER
from torchtitan_liger.liger_api import LigerHeadLoss

Tensors = Mapping[str, torch.Tensor]
NUM_LABELED = "num_labeled"
"""What `count_labels` has counted of a batch, on its way through the trainer."""
TEACHER_LOGITS = "teacher_logits"
TOKEN_WEIGHTS = "token_weights"
"""A factor of each token's loss; the head takes it from any batch that has it."""
FOR_TERMS = frozenset(
    {
        "advantages",
        "candidates",
        "desirable",
        "generation_logp",
        "old_logp",
        "ref_logp",
        "reference_point",
        TEACHER_LOGITS,
        TOKEN_WEIGHTS,
    }
)
"""What terms read from a batch: never the decoder's, also if none of this job's reads it."""


def inputs_of(term: Term) -> set[str]:
    """The tensors that a term reads from the batch."""
    teacher = {TEACHER_LOGITS} if term.needs & OF_TEACHER else set()
    return {*term.inputs, *teacher}


@dataclass(frozen=True)
class HeadLossPlan:
    """What computes the loss of a job, and why."""

    impl: Literal["liger", "chunked", "reference", "stock"]
    options: HeadLossOptions
    terms: tuple[Term, ...] = (CrossEntropy(),)
    """What is summed up."""
    reason: str = ""
    """Why it is not Liger-Kernel, where that was wanted."""
    validate: bool = True
    """Whether validation goes through the head's loss as well."""
    preflight: bool = True
    """Whether the head is checked on the real mesh before the first step."""
    warning: str = ""
    """What the user has to hear about the choice; empty if nothing."""

    @property
    def enabled(self) -> bool:
        """Whether the head computes the loss; otherwise training is torchtitan's own."""
        return self.impl != "stock"

    def head_loss(self) -> HeadLoss | LigerHeadLoss:
        if self.impl == "liger":
            return LigerHeadLoss(self.terms, self.options)
        assert self.impl != "stock", "torchtitan's own loss"
        return HeadLoss(self.terms, self.options, impl=self.impl)

    def plain_cross_entropy(self) -> HeadLoss | LigerHeadLoss:
        """The loss of validation, by which runs with other head losses compare."""
        return replace(self, terms=(CrossEntropy(),)).head_loss()

    def count_labels(self, labels_BL: torch.Tensor) -> int | list[int]:
        """How many of a batch's labels, on the host, are not ignored: what the head drops its
        tokens by. Terms over sequences need it of each sequence."""
        counts: list[int] = (labels_BL != self.options.ignore_index).sum(dim=1).tolist()
        over_sequences = any(isinstance(term, SequenceTerm) for term in self.terms)
        return counts if over_sequences else sum(counts)

    @property
    def row_inputs(self) -> dict[str, str]:
        """The tensors that terms read from the batch: name -> who reads it."""
        return {
            name: f"head_loss.{term.name}"
            for term in self.terms
            for name in sorted(inputs_of(term))
        }

    def split_batch(
        self, batch: Tensors
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What the head reads of a batch beside the labels, and what the decoder does."""
        names = {*self.row_inputs, TOKEN_WEIGHTS}
        for_head = names | FOR_TERMS
        rows = {name: batch[name] for name in batch if name in names}
        return rows, {name: batch[name] for name in batch if name not in for_head}

    def check_batch(self, batch: Tensors) -> list[str]:
        """Whether a batch has what the terms read.

        Returns:
            The tensors for terms that none of this job's reads.

        Raises:
            ValueError: for a tensor that a term reads and the batch lacks; for those of
                terms where no term reads from the batch, or the implementation takes none.
        """
        for name, reader in self.row_inputs.items():
            if name not in batch:
                raise ValueError(
                    f"the batch has no {name}, which {reader} reads; it has "
                    f"{', '.join(sorted(batch))}. Your dataloader puts it beside input; "
                    f"or leave {reader} out"
                )
        unread = sorted(FOR_TERMS & batch.keys() - {*self.row_inputs, TOKEN_WEIGHTS})
        if unread and not self.row_inputs:
            raise ValueError(
                f"the batch has {', '.join(unread)}, but no term of [head_loss] reads from "
                "the batch: give the table of the one that should a weight (0: it is "
                "reported alone), or leave them out of the batch"
            )
        if TOKEN_WEIGHTS in batch and self.impl == "liger":
            raise ValueError(
                f"the batch has {TOKEN_WEIGHTS}, which Liger-Kernel does not know: use "
                "--liger_kernel.impl chunked"
            )
        return unread

    @property
    def formula(self) -> str:
        """Such as `cross_entropy + 0.0001 * z_loss`."""
        return " + ".join(
            term.name if term.weight == 1 else f"{term.weight:g} * {term.name}"
            for term in self.terms
        )

    @property
    def is_plain(self) -> bool:
        """Whether cross entropy is all there is to report."""
        return self.formula == "cross_entropy"

    def announcement(self) -> str:
        """One line for the log."""
        if self.impl == "liger":
            return "Using Liger-Kernel fused linear cross entropy loss"
        because = f": {self.reason}" if self.reason else ""
        return f"Using the {self.impl} linear cross entropy loss{because}"
