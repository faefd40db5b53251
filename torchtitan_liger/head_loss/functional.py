"""`linear_cross_entropy`: the engine as one function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist

from torchtitan_liger.head_loss.checks import check_tensors
from torchtitan_liger.head_loss.engine import EngineImpl, HeadLoss
from torchtitan_liger.head_loss.options import HeadLossOptions, check_number
from torchtitan_liger.head_loss.terms import plain_terms
from torchtitan_liger.head_loss.vocab_parallel import replicated, shard_of


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float = 0.0,
    temperature: float = 1.0,
    token_weights: torch.Tensor | None = None,
    impl: EngineImpl = "chunked",
    acc_dtype: torch.dtype = torch.float32,
    logits_memory_mib: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    check_labels: bool = True,
    num_labeled: int | Sequence[int] | None = None,
) -> torch.Tensor:
    """Cross entropy of `hidden @ weight.T` against `labels`, without the logits:

        mean(lse - logits[label] + z_loss * lse**2)    lse = logits.logsumexp(-1)

    Args:
        hidden: [..., D] hidden states, floating point, on any device.
        weight: [V, D] weight of the head, of the same dtype (under autocast of any).
        labels: [...] int64 or int32 labels in [0, V) or `ignore_index`.
        reduction: "mean" divides by the number of tokens with a label (and is 0, where
            torch's is NaN, if there is none); "none" gives one loss per token, and
            computes the logits twice.
        label_smoothing: share of the target spread evenly over the whole vocabulary, in
            [0, 1).
        z_loss: weight of the squared log-sum-exp (PaLM, arXiv:2204.02311, uses 1e-4).
        token_weights: [...] factor of each token's loss, with an exact gradient.
        impl: "chunked", or "reference" for full logits.
        tp_group: the ranks over which the vocabulary is sharded, in this order: `weight`
            is then this rank's [v, D], `hidden` and `labels` are the same on all ranks,
            and so are the loss and the gradient of `hidden`. The first call with a
            weight exchanges the shards' sizes and waits for them; a new tensor, as each
            `to_local()` gives, is another weight.
        check_labels, num_labeled: as of `HeadLoss.__call__`. With `check_labels=False`
            nothing waits for the GPU; then, and under torch.compile, tokens without a
            label are only dropped if `num_labeled` says how many have one.

    The other settings are the fields of `HeadLossOptions`.

    Returns:
        [], or [...] with reduction "none"; float32 (float64 for float64 inputs).

    Raises:
        ValueError: for a value out of range, or for shapes, dtypes or labels that do not
            fit; the message holds what was got.
        RuntimeError: in the backward pass, for `create_graph=True`.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f'reduction must be "mean", "sum" or "none", got {reduction!r}'
        )
    settings: dict[str, Any] = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "logit_softcap": logit_softcap,
        "temperature": temperature,
        "acc_dtype": acc_dtype,
        "logits_memory_mib": logits_memory_mib,
    }
    if torch.compiler.is_compiling():
        # Dynamo makes a number that changes between calls an input of the graph, but leaves
        # a string a constant. So numbers travel as strings, without a rounding.
        encoded = {name: _encode(x) for name, x in settings.items()}
        name, error = _head_name(impl, **encoded)
        if error:
            raise ValueError(error)
        head_loss = getattr(_heads, name)
    else:
        head_loss = _head_loss(impl, **settings)
    check_tensors(hidden, weight, labels)  # before other ranks wait for this one
    shard = None
    if tp_group is not None:
        shard = shard_of(weight, tp_group)
        hidden = replicated(hidden, tp_group)
    return head_loss(
        hidden,
        weight,
        labels,
        normalizer=(labels.long() != ignore_index).sum() if reduction == "mean" else 1,
        token_weights=token_weights,
        reduction="none" if reduction == "none" else "sum",
        shard=shard,
        check_labels=check_labels,
        num_labeled=num_labeled,
    ).loss


@torch.compiler.disable(reason="numbers of numpy would become tensors")
def _head_loss(
    impl: EngineImpl, label_smoothing: float, z_loss: float, **options: Any
) -> HeadLoss:
    # A tensor is no constant of a graph, whatever it compares to.
    wanted = "in [0, 1)"
    check_number("label_smoothing", label_smoothing, wanted, lambda x: 0 <= x < 1)
    wanted = "0 (off) or a positive number"
    check_number("z_loss", z_loss, wanted, lambda x: 0 <= x < math.inf)
    terms = plain_terms(float(label_smoothing), float(z_loss))
    return HeadLoss(terms, HeadLossOptions(**options), impl=impl)


# Heads of calls in graphs, as attributes: of a list, or a dictionary, a graph knows no more
# than what was there when its first call was traced.
_heads = SimpleNamespace()


def _encode(x: Any) -> Any:
    if isinstance(x, float):
        return x.hex()
    if isinstance(x, int) and not isinstance(
        x, bool
    ):  # by halves, since Dynamo traces `hex` of floats only
        return f"{float(x // 2**32).hex()} {float(x % 2**32).hex()}"
    return x


def _decode(encoded: Any) -> Any:
    if not isinstance(encoded, str):
        return encoded
    high, *low = map(float.fromhex, encoded.split())
    return int(high) * 2**32 + int(low[0]) if low else high


@torch.compiler.assume_constant_result  # a graph finds its head ready-made
def _head_name(impl: EngineImpl, **encoded: Any) -> tuple[str, str]:
    """The name in `_heads` of a head with these settings; or what is wrong with them."""
    try:
        wanted = _head_loss(impl, **{name: _decode(x) for name, x in encoded.items()})
    except ValueError as error:  # which a graph would take for one of its own
        return "", str(error)
    for name, head in vars(_heads).items():
        if (head.impl, head.terms, head.options) == (
            wanted.impl,
            wanted.terms,
            wanted.options,
        ):
            return name, ""
    name = f"head_{len(vars(_heads))}"
    setattr(_heads, name, wanted)
    return name, ""
