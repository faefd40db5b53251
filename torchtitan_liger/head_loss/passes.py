"""The passes over the logits of one chunk of tokens, and the gradients that they add up.

    logits_Cv = hidden_CD @ weight_vD.T       product 1
    sums of each row                          sweep 1 (and one collective, if sharded)
    of a JSD, how far it is to the mixture    one more sweep and collective, or in sweep 2
    terms: loss, d loss / d statistics        a few numbers per row, not here
    logits_Cv -> d loss / d logits, in place  sweep 2
    d_hidden_CD = d_logits @ weight           product 2
    d_weight_vD += d_logits.T @ hidden        product 3

Nothing here waits for a GPU.

`N` tokens that count, of `T`; `C` tokens of a chunk, `D` width, `E` the teacher's width,
`v` this rank's columns of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch

import torchtitan_liger.head_loss.sweeps as torch_sweeps
from torchtitan_liger.head_loss.calls import masked
from torchtitan_liger.head_loss.distillation import Teacher
from torchtitan_liger.head_loss.evaluate import Metrics, TermInputs
from torchtitan_liger.head_loss.options import HeadLossOptions
from torchtitan_liger.head_loss.products import (
    WeightGradient,
    hidden_gradient,
    matrix,
    weight_sum_dtype,
)
from torchtitan_liger.head_loss.sequences import Sequences
from torchtitan_liger.head_loss.statistics import (
    MIXTURE_SUMS,
    OF_TEACHER,
    Coefficients,
    Partials,
    Statistics,
    Sums,
    coefficients_of,
    statistics_of,
    sums_for,
    unpack,
)
from torchtitan_liger.head_loss.sweeps import Logits, Transform
from torchtitan_liger.head_loss.terms import (
    Rows,
    SequenceTerm,
    Term,
    jsd_beta_of,
    needs_of,
)
from torchtitan_liger.head_loss.vocab_parallel import VocabShard, add_up, exchange


class HeadCall(NamedTuple):
    """Everything about a call that is not a differentiable tensor."""

    terms: Sequence[Term]
    metrics: Metrics
    options: HeadLossOptions
    labels_N: torch.Tensor
    rows: Rows  # each [N] or [N, K]
    kept_N: torch.Tensor | None  # positions of the N tokens among T; None for all
    all_labeled: bool  # whether all N are known to have a label
    teacher: Teacher | None  # [T, ...]
    sequences: Sequences | None
    scale: torch.Tensor  # [] factor of the loss; its dtype is that of all sums
    products_dtype: torch.dtype
    tokens_per_chunk: int  # of the longest chunk
    shard: VocabShard | None
    with_grad: bool
    by_token: bool = False  # one loss for each token instead of their sum
    needs: frozenset[str] = frozenset()
    jsd_beta: float = 0.5

    def of_this_moment(self) -> HeadCall:
        """With what the terms ask for now: they may change before a backward pass."""
        needs, jsd_beta = needs_of(self.terms), jsd_beta_of(self.terms)
        return self._replace(needs=needs, jsd_beta=jsd_beta)

    @property
    def two_phase(self) -> bool:
        """Whether all statistics come before any gradient: chunks that hold no whole sequences
        know too little for one."""
        cut_anywhere = self.sequences is not None and self.sequences.cuts is None
        learns = any(isinstance(t, SequenceTerm) and t.weight for t in self.terms)
        return cut_anywhere and learns and len(self.chunks()) > 1

    def chunks(self) -> list[slice]:
        """At least one, which may be empty."""
        if self.sequences is not None and self.sequences.cuts is not None:
            tokens = [token for token, _ in self.sequences.cuts]
            return [slice(a, b) for a, b in pairwise(tokens)]
        step, num_tokens = self.tokens_per_chunk, len(self.labels_N)
        return [slice(i, i + step) for i in range(0, max(1, num_tokens), step)]

    def read_again(self) -> list[torch.Tensor]:
        """What a second phase reads; some of the rows are the caller's own tensors."""
        teacher = self.teacher
        of_teacher = (
            () if teacher is None else (teacher.logits, teacher.hidden, teacher.weight)
        )
        tensors = *of_teacher, *self.rows.values()
        return [x for x in tensors if x is not None]

    def reading(self, again: Sequence[torch.Tensor]) -> HeadCall:
        """The same with other tensors in the place of those of `read_again`."""
        left, teacher = iter(again), self.teacher
        if teacher is not None:
            teacher = replace(
                teacher,
                logits=None if teacher.logits is None else next(left),
                hidden=None if teacher.hidden is None else next(left),
                weight=None if teacher.weight is None else next(left),
            )
        return self._replace(
            teacher=teacher, rows=dict(zip(self.rows, left, strict=True))
        )


class Chunk(NamedTuple):
    """A chunk whose logits are in one of the buffers."""

    tokens: slice
    logits_Cv: torch.Tensor
    hidden_CD: torch.Tensor
    teacher: Logits | None


class Passes:
    """One call's buffers and gradients. Call under `no_grad` and without autocast."""

    def __init__(
        self,
        hidden_TD: torch.Tensor,
        weight_vD: torch.Tensor,
        call: HeadCall,
        *,
        need_d_hidden: bool,
        need_d_weight: bool,
    ) -> None:
        options, shard = call.options, call.shard
        self.call = call
        self._hidden_TD = hidden_TD.to(call.products_dtype)
        self._weight_vD = weight_vD.to(call.products_dtype)
        self._sweeps = sweeps_for(hidden_TD.device.type)
        self._transform = Transform(options.logit_softcap, options.temperature)
        num_columns = weight_vD.shape[0]
        self._vocab_size = num_columns if shard is None else shard.vocab_size
        first = 0 if shard is None else shard.start

        def local(token_ids: torch.Tensor) -> torch.Tensor:
            """The column of each among this rank's; -1 for any other number."""
            here = (token_ids >= first) & (token_ids < first + num_columns)
            return torch.where(here, token_ids - first, -1)

        valid_N = call.labels_N != options.ignore_index
        self.inputs = TermInputs(call.rows, valid_N, call.sequences)
        self._column_N = torch.where(valid_N, call.labels_N, -1)
        if shard is not None:
            self._column_N = local(self._column_N)
        self._candidates_NK: torch.Tensor | None = None
        if "logp_k" in call.needs:
            self._candidates_NK = local(call.rows["candidates"]).contiguous()
        self._names = sums_for(call.needs)
        self._has_teacher = bool(OF_TEACHER.intersection(call.needs))

        # While a chunk's sums travel, the next one's logits are computed.
        num_chunks = len(call.chunks())
        num_buffers = 2 if shard is not None and num_chunks > 1 else 1
        size = min(call.tokens_per_chunk, len(call.labels_N)), num_columns
        self._buffers = [matrix(size, self._hidden_TD) for _ in range(num_buffers)]
        self._teacher_buffers = []
        if call.teacher is not None and call.teacher.weight is not None:
            like = call.teacher.weight
            self._teacher_buffers = [matrix(size, like) for _ in range(num_buffers)]
        self._turn = 0

        self._d_hidden_TD: torch.Tensor | None = None
        if need_d_hidden:
            make = torch.empty_like if call.kept_N is None else torch.zeros_like
            self._d_hidden_TD = make(self._hidden_TD)
        self._d_weight: WeightGradient | None = None
        if need_d_weight:
            sum_dtype = weight_sum_dtype(
                call.products_dtype,
                weight_vD.dtype,
                options.acc_dtype,
                single_chunk=num_chunks == 1,
            )
            self._d_weight = WeightGradient(self._weight_vD, sum_dtype)

    def logits(self, tokens: slice) -> Chunk:
        """Product 1."""
        kept_N = self.call.kept_N
        if kept_N is not None:
            hidden_CD = self._hidden_TD.index_select(0, kept_N[tokens])
        elif self.call.all_labeled:
            hidden_CD = self._hidden_TD[tokens]
        else:
            # A row without a label must not reach the gradients, whatever it holds:
            # 0 * NaN would.
            hidden_CD = masked(self._hidden_TD[tokens], self.inputs.valid[tokens])
        buffer_Cv = self._buffers[self._turn][: len(hidden_CD)]
        logits_Cv = torch.mm(hidden_CD, self._weight_vD.t(), out=buffer_Cv)
        teacher = self._teacher_logits(tokens) if self._has_teacher else None
        self._turn = (self._turn + 1) % len(self._buffers)
        return Chunk(tokens, logits_Cv, hidden_CD, teacher)

    def _teacher_logits(self, tokens: slice) -> Logits:
        teacher, kept_N = self.call.teacher, self.call.kept_N
        assert teacher is not None
        given = teacher.hidden if teacher.logits is None else teacher.logits
        assert given is not None
        if kept_N is not None:
            part = given.index_select(0, kept_N[tokens])
        elif self.call.all_labeled:
            part = given[tokens]
        else:
            part = masked(given[tokens], self.inputs.valid[tokens])
        if teacher.weight is not None:
            buffer_Cv = self._teacher_buffers[self._turn][: len(part)]
            part = torch.mm(part, teacher.weight.t(), out=buffer_Cv)
        if part.dtype == torch.float64:  # may be beside a narrower student
            part = part.to(self.call.scale.dtype)
        if part.stride(1) != 1:
            part = part.contiguous()
        return Logits(part, Transform(teacher.logit_softcap, teacher.temperature))

    def start(self, chunk: Chunk) -> Callable[[], Sums]:
        """Sweep 1; gives a function that waits for the other ranks' sums."""
        packed_kC = self._empty_sums(chunk)
        self._sweeps.statistics_sweep(
            chunk.logits_Cv,
            self._column_N[chunk.tokens],
            self._transform,
            unpack(self._names, packed_kC),
            candidates_CK=self._candidates(chunk),
            teacher=chunk.teacher,
        )
        return exchange(self._names, packed_kC, self.call.shard)

    def gradients_in_one_trip(self, chunk: Chunk, partials: Partials) -> Sums:
        """All that `start`, `finish` and `gradients` do, in one trip through the logits: for
        constant partials by statistics in `IN_ONE_TRIP`, without columns on other ranks."""
        sums = unpack(self._names, self._empty_sums(chunk))
        self._sweeps.one_trip_sweep(
            chunk.logits_Cv,
            self._column_N[chunk.tokens],
            self._transform,
            sums,
            partials,
            teacher=chunk.teacher,
        )
        self._products(chunk)
        return sums

    def _candidates(self, chunk: Chunk) -> torch.Tensor | None:
        return (
            None if self._candidates_NK is None else self._candidates_NK[chunk.tokens]
        )

    def _empty_sums(self, chunk: Chunk) -> torch.Tensor:
        """[k, C] memory for the sums, one after the other."""
        count = len(self._names)
        if self._candidates_NK is not None:
            count += self._candidates_NK.shape[1] - 1
        return self.call.scale.new_empty(count, len(chunk.hidden_CD))

    def finish(
        self, chunk: Chunk, wait: Callable[[], Sums], *, with_mixture: bool = True
    ) -> Sums:
        """The sums over all columns; those of a JSD's mixture can come with the gradient."""
        sums = wait()
        if "jsd" in self.call.needs and with_mixture:
            assert chunk.teacher is not None
            shares_2C = self._sweeps.mixture_sweep(
                chunk.logits_Cv,
                self._transform,
                chunk.teacher,
                sums,
                self.call.jsd_beta,
            )
            kls_2C = add_up(shares_2C, self.call.shard)
            sums.update(zip(MIXTURE_SUMS, kls_2C, strict=True))
        return sums

    def statistics(self, sums: Sums) -> Statistics:
        return statistics_of(
            sums, self.call.needs, self._vocab_size, self.call.jsd_beta
        )

    def coefficients(
        self, partials: Partials, sums: Sums, statistics: Statistics | None
    ) -> Coefficients:
        """
        Args:
            statistics: those of `sums`, if they have been computed already.
        """
        if statistics is None and partials.need_values:
            statistics = self.statistics(sums)
        return coefficients_of(
            partials, statistics, sums, self._vocab_size, self.call.jsd_beta
        )

    def gradients(
        self, chunk: Chunk, coefficients: Coefficients, sums: Sums | None = None
    ) -> None:
        """Sweep 2, products 2 and 3. Overwrites the chunk's logits.

        Args:
            sums: get those of the mixture, if `finish` has left them out.
        """
        of_chunk = chunk.logits_Cv, self._column_N[chunk.tokens], self._transform
        candidates_CK, beta = self._candidates(chunk), self.call.jsd_beta
        if sums is None:
            self._sweeps.gradient_sweep(
                *of_chunk,
                coefficients,
                candidates_CK=candidates_CK,
                teacher=chunk.teacher,
                jsd_beta=beta,
            )
        else:
            kls_2C = self._sweeps.mixture_gradient_sweep(
                *of_chunk,
                coefficients,
                sums,
                candidates_CK=candidates_CK,
                teacher=chunk.teacher,
                jsd_beta=beta,
            )
            sums.update(zip(MIXTURE_SUMS, kls_2C, strict=True))
        self._products(chunk)

    def _products(self, chunk: Chunk) -> None:
        """Products 2 and 3, of what the logits have become."""
        tokens, d_logits_Cv = chunk.tokens, chunk.logits_Cv
        if self._d_hidden_TD is not None:
            kept_N = self.call.kept_N
            d_hidden_CD = (
                self._d_hidden_TD[tokens]
                if kept_N is None
                else torch.empty_like(chunk.hidden_CD)
            )
            hidden_gradient(d_logits_Cv, self._weight_vD, d_hidden_CD)
            if kept_N is not None:
                self._d_hidden_TD.index_copy_(0, kept_N[tokens], d_hidden_CD)
        if self._d_weight is not None:
            self._d_weight.add(d_logits_Cv, chunk.hidden_CD)

    def totals(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradients of hidden states and weight, in the dtypes of their sums."""
        d_weight = self._d_weight
        return self._d_hidden_TD, None if d_weight is None else d_weight.total()


@lru_cache
def sweeps_for(device_type: str) -> ModuleType:
    """Triton's kernels where there are any for this device, plain torch elsewhere."""
    if device_type != "cuda":
        return torch_sweeps
    try:
        import torchtitan_liger.head_loss.triton_sweeps as triton_sweeps
    except ImportError as error:
        if error.name != "triton":  # a torch without it
            raise
        return torch_sweeps
    return triton_sweeps
