"""The LM head: a linear layer that can also be called with labels and gives back a loss.

Shape suffixes: `B` batch, `L` sequence, `D` width, `V` vocabulary, `v` this rank's
columns of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan_liger.cli import FLAG_OFF
from torchtitan_liger.head_loss import HeadLoss, HeadLossOutput, Teacher, VocabShard
from torchtitan_liger.liger_api import LigerHeadLoss

CHANGES_LOGITS = (
    "the model changes the logits that its LM head gives (in its own forward, or in a hook), "
    "which the fused loss would not see: leave that to logit_softcap and temperature in "
    f"[head_loss], or turn the fused loss off ({FLAG_OFF})"
)


class LMHead(nn.Linear):
    """`nn.Linear` without bias, with the same state dict, for the last projection.

    `head(hidden_BLD)` gives logits, as before. `head(hidden_BLD, labels_BL)` gives the
    loss from `head.head_loss`, without logits. The head is *called* in both cases: FSDP
    gathers, casts and reduces its weight by the hooks of that call. A weight read from
    outside would get silently wrong gradients.

    Under tensor parallelism the weight is a DTensor that shards the vocabulary, and the
    hidden states a DTensor in any layout.
    """

    head_loss: HeadLoss | LigerHeadLoss | None = None
    tp_mesh: DeviceMesh | None = None
    """The mesh over which the vocabulary is sharded."""
    gather_logits = False
    """Whether logits of a sharded vocabulary are made whole, on every rank."""
    num_fused_calls = 0
    """How often a training loss was computed without the full logits."""

    @classmethod
    def from_linear(cls, linear: nn.Module) -> LMHead:
        """Take over the weight of `linear`; draws no random numbers.

        Raises:
            ValueError: for a layer that is no plain linear one, or has a bias.
        """
        if type(linear) is not nn.Linear or linear.bias is not None:
            raise ValueError(
                f"the LM head is {linear}: only a plain torch.nn.Linear without bias "
                "can compute its loss without logits"
            )
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        return head

    @overload
    def forward(self, hidden: torch.Tensor) -> torch.Tensor: ...

    @overload
    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor, **call: Any
    ) -> HeadLossOutput: ...

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        head_loss: HeadLoss | LigerHeadLoss | None = None,
        teacher_logits: torch.Tensor | None = None,
        **call: Any,
    ) -> torch.Tensor | HeadLossOutput:
        """
        Args:
            hidden: [B, L, D] hidden states.
            labels: [B, L] labels, or None for logits.
            head_loss: another loss than the head's own.
            teacher_logits: [B, L, V] what a distillation learns from; the head's
                temperature divides them as well.
            call: keyword arguments of `HeadLoss.__call__`, such as `normalizer`.

        Returns:
            [B, L, V] logits without `labels`, else the losses over this rank's tokens.

        Raises:
            RuntimeError: for labels without a `head_loss`.
            ValueError: for what a `head_loss` refuses.
        """
        if labels is None:
            if isinstance(hidden, DTensor):
                hidden = hidden.redistribute(placements=[Replicate()])
            logits = super().forward(hidden)
            if self.gather_logits and isinstance(logits, DTensor):
                logits = logits.full_tensor()
            return logits
        head_loss = head_loss or self.head_loss
        if head_loss is None:
            raise RuntimeError(
                "this LM head has no loss: set liger_kernel."
                "enable_fused_linear_cross_entropy, or assign head.head_loss"
            )
        if torch.is_grad_enabled() and head_loss.impl != "reference":
            self.num_fused_calls += 1
        hidden, weight, shard = _local_inputs(hidden, self.weight, self.tp_mesh)
        if teacher_logits is not None:
            start, vocab_size = (
                (0, len(weight)) if shard is None else (shard.start, shard.vocab_size)
            )
            if teacher_logits.shape[-1] != vocab_size:
                raise ValueError(
                    f"teacher_logits must be over the {vocab_size} token ids of this model, "
                    f"got {list(teacher_logits.shape)}"
                )
            columns = slice(start, start + len(weight))
            call["teacher"] = Teacher(
                logits=teacher_logits[..., columns],
                temperature=head_loss.options.temperature,
            )
        return head_loss(hidden, weight, labels, shard=shard, **call)


def changes_logits(decode: Callable[[], torch.Tensor], head: LMHead) -> bool:
    """Whether `decode`, which calls `head` without labels, gives back something else than the
    logits: what it does to them, it would do to hidden states.
    """
    # Far from zero, on both sides, where no softcap or bound leaves them alone. All passes
    # on every rank, whatever the first one shows.
    changed = [_changes_probe(decode, head, factor) for factor in (1000, -1000)]
    return any(changed)


def _changes_probe(
    decode: Callable[[], torch.Tensor], head: LMHead, factor: float
) -> bool:
    given: list[torch.Tensor] = []

    def replace_logits(_head: nn.Module, _args: Any, logits: torch.Tensor) -> Any:
        probe = (logits + 1) * factor
        given.append(local_tensor(probe).to(torch.float32, copy=True))
        return probe

    handle = head.register_forward_hook(replace_logits)
    try:
        got = local_tensor(decode()).float()  # which a model may well do
    finally:
        handle.remove()
    return [x.shape for x in given] != [got.shape] or not torch.allclose(
        got, given[0], rtol=0, atol=0, equal_nan=True
    )


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_inputs(
    hidden: torch.Tensor, weight: torch.Tensor, tp_mesh: DeviceMesh | None
) -> tuple[torch.Tensor, torch.Tensor, VocabShard | None]:
    """This rank's tensors, and which part of the vocabulary they belong to."""
    if not isinstance(weight, DTensor):
        return hidden, weight, None
    mesh = weight.device_mesh
    if mesh != tp_mesh or weight.placements != (Shard(0),):
        raise ValueError(
            f"the LM head's weight is {weight.placements} on {mesh}, and its vocabulary "
            f"is sharded over {tp_mesh}. A weight that FSDP has not gathered? Give the "
            "head a fully_shard of its own, and call it as a module"
        )
    if not isinstance(hidden, DTensor):
        hidden = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)
    # Every rank needs all tokens; its gradient is its columns' share of a sum.
    hidden = hidden.redistribute(placements=[Replicate()]).to_local(
        grad_placements=[Partial()]
    )
    _, offset = compute_local_shape_and_global_offset(
        weight.shape, mesh, weight.placements
    )
    vocab_size = weight.shape[0]
    shard = VocabShard(
        start=offset[0],
        vocab_size=vocab_size,
        widest=-(-vocab_size // mesh.size()),
        group=mesh.get_group(),
    )
    return hidden, weight.to_local(), shard
