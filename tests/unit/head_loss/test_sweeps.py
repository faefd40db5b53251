"""The passes over logits, torch and Triton, against their definitions."""

from __future__ import annotations

import pytest
import torch

from tests.unit.head_loss.sweep_cases import (
    NOTHING,
    PLAIN,
    C,
    K,
    V,
    draw,
    sums_of,
)
from torchtitan_liger.head_loss import sweeps, triton_sweeps
from torchtitan_liger.head_loss.statistics import (
    WITHOUT_GRADIENT,
    Coefficients,
    Partials,
    coefficients_of,
    statistics_of,
    sums_for,
    unpack,
)
from torchtitan_liger.head_loss.sweeps import Logits, Transform


def product(weights, values):
    return torch.where(weights > 0, weights * values, 0.0).sum(1)


def test_sums_are_what_they_are_called(impl):
    z, v, label, candidates = draw()
    z[:, ::7] = -torch.inf  # padding
    v[:, ::7] = -torch.inf
    z[4] += 1e4
    z[5] -= 1e4
    z[6, : V - 600] = -torch.inf  # what has a share comes last
    sums = sums_of(impl, z, v, label, candidates)
    z_shifted, v_shifted = z - z.amax(1, keepdim=True), v - v.amax(1, keepdim=True)
    e, f = z_shifted.exp(), v_shifted.exp()

    def pick(columns):
        return torch.where(columns < 0, 0.0, z.gather(1, columns.clamp(min=0)))

    expected = {
        "max": z.amax(1),
        "sumexp": e.sum(1),
        "label_logit": pick(label[:, None])[:, 0],
        "logit_sum": z.sum(1),
        "shifted_sum": product(e, z_shifted),
        "square_sum": e.square().sum(1),
        "teacher_max": v.amax(1),
        "teacher_sumexp": f.sum(1),
        "teacher_shifted_sum": product(f, v_shifted),
        "student_gap": product(e, z_shifted - v_shifted),
        "teacher_gap": product(f, v_shifted - z_shifted),
        "candidate_logits": pick(candidates).t(),
    }
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_a_teacher_may_be_narrower_than_the_student(impl):
    z, v, label, candidates = draw()
    v = v.float()
    sums = sums_of(impl, z, v, label, candidates)
    exact = sums_of(sweeps, z, v.double(), label, candidates)
    for name, value in exact.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_a_shard_may_have_no_likely_column_or_none_at_all(impl):
    _, v, _, _ = draw()
    for width in (0, 40):
        empty = torch.full((C, width), -torch.inf, dtype=torch.float64)
        sums = sums_of(impl, empty, v[:, :width], *NOTHING)
        assert sums["max"].isneginf().all()
        for name in ("sumexp", "label_logit", "shifted_sum", "square_sum"):
            assert not sums[name].any(), name


def coefficients(sums, g, *, everything):
    names = Coefficients._fields[2:]
    drawn = {name: torch.randn(C, generator=g, dtype=torch.float64) for name in names}
    drawn["candidates"] = torch.randn(C, K, generator=g, dtype=torch.float64)
    drawn |= {name: sums[name] for name in ("max", "sumexp")}
    drawn |= {name: sums[name] for name in ("teacher_max", "teacher_sumexp")}
    if not everything:
        drawn = {n: drawn[n] for n in ("max", "sumexp", "softmax", "label")}
    return Coefficients(**drawn)


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("transform", [PLAIN, Transform(2.0, 0.7)], ids=str)
def test_the_gradient_is_its_formula(impl, everything, transform):
    u, v, label, candidates = draw()
    sums = sums_of(impl, u, v, label, candidates, transform)
    by = coefficients(sums, torch.Generator().manual_seed(1), everything=everything)
    z, t = (sweeps._transformed(x, transform, x.dtype)[0] for x in (u, v))
    log_p, log_q = z.log_softmax(1), t.log_softmax(1)
    log_m = (0.7 * log_p.exp() + 0.3 * log_q.exp()).log()
    inner = by.softmax[:, None].expand(C, V)
    expected = log_p.exp() * inner
    if everything:
        inner = (
            inner + by.log_softmax[:, None] * log_p + by.log_teacher[:, None] * log_q
        )
        inner = inner + by.mixture[:, None] * (log_m - log_p)
        inner = inner + by.square[:, None] * log_p.exp()
        expected = log_p.exp() * inner + by.teacher[:, None] * log_q.exp()
        expected = expected + by.constant[:, None]
        for row in range(C):
            for k in range(K):
                if candidates[row, k] >= 0:
                    expected[row, candidates[row, k]] += by.candidates[row, k]
    for row in range(C):
        if label[row] >= 0:
            expected[row, label[row]] += by.label[row]
    if transform.softcap:
        expected = expected * (1 - (z * transform.temperature / 2.0) ** 2)
    expected = expected / transform.temperature
    impl.gradient_sweep(
        u,
        label,
        transform,
        by,
        candidates_CK=candidates,
        teacher=Logits(v, transform),
        jsd_beta=0.3,
    )
    torch.testing.assert_close(u, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "of_teacher",
    [
        (),
        ("kl_fwd",),
        ("kl_rev",),
        ("kl_fwd", "kl_rev"),
        ("kl_fwd", "teacher_entropy"),
    ],
)
@pytest.mark.parametrize("smoothed", [True, False])
@pytest.mark.parametrize("transform", [PLAIN, Transform(2.0, 0.7)], ids=str)
@pytest.mark.parametrize("num_columns", [1, 40, V])
def test_one_trip_is_one_sweep_after_the_other(
    impl, transform, smoothed, of_teacher, num_columns, monkeypatch
):
    g = torch.Generator().manual_seed(0)
    z, v = 3 * torch.randn(2, C, num_columns, generator=g, dtype=torch.float64)
    late = max(0, num_columns - 600)
    z[4] += 1e4
    z[5] -= 1e4
    z[6, :late] = -torch.inf  # what has a share comes last
    v[6, :late] = -torch.inf
    v[7] += 1e4
    label = torch.randint(num_columns, (C,), generator=g)
    label[2] = -1  # ignored
    needs = {*["uniform_ce"][:smoothed], *of_teacher}
    learned = "logp", "lse", *sorted(needs - WITHOUT_GRADIENT)
    drawn = torch.randn(len(learned), C, generator=g).double()
    partials = Partials(**dict(zip(learned, drawn, strict=True)))
    names = sums_for(needs)
    teacher = Logits(v, Transform(3.0, 1.3)) if of_teacher else None
    results = []
    for in_one_trip in (True, False):
        u, sums = z.clone(), unpack(names, torch.empty(len(names), C).double())
        if in_one_trip:
            monkeypatch.setattr(sweeps, "CPU_BLOCK_ELEMENTS", 2 * num_columns)
            impl.one_trip_sweep(u, label, transform, sums, partials, teacher=teacher)
        else:
            monkeypatch.undo()
            sweeps.statistics_sweep(u, label, transform, sums, teacher=teacher)
            values = statistics_of(sums, of_teacher, num_columns, 0.5)
            by = coefficients_of(partials, values, sums, num_columns, 0.5)
            sweeps.gradient_sweep(u, label, transform, by, teacher=teacher)
        results.append([u, *sums.values()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_round_once_to_the_dtype_of_the_logits(dtype):
    """To the last bit or its neighbour, where float64 says what is right."""
    z, v, label, candidates = draw(dtype)
    wide = z.double()
    sums = sums_of(sweeps, wide.clone(), v.double(), label, candidates)
    by = coefficients(sums, torch.Generator().manual_seed(1), everything=False)
    narrow = Coefficients(*(None if x is None else x.float() for x in by))
    sweeps.gradient_sweep(wide, label, PLAIN, by)
    for impl in (sweeps, triton_sweeps):
        grad = z.clone()
        impl.gradient_sweep(grad, label, PLAIN, narrow)
        bound = 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
        torch.testing.assert_close(grad.double(), wide, rtol=bound, atol=1e-6)


def test_scaling_rounds_once_and_by_one_leaves_the_memory_alone():
    x = torch.randn(5000)
    out = torch.empty(5000, dtype=torch.bfloat16)
    triton_sweeps.scale(x, torch.tensor([0.3]), out)
    # The interpreter cuts off what a GPU rounds.
    torch.testing.assert_close(out, (x * 0.3).bfloat16(), rtol=2**-7, atol=0)
    same = x.clone()
    triton_sweeps.scale(same, torch.tensor([1.0]), same)
    assert torch.equal(same, x)
    triton_sweeps.scale(same, torch.tensor([-2.0]), same)
    assert torch.equal(same, -2 * x)


@pytest.mark.parametrize("num_warps", [1, 2, 4, 8])
def test_no_two_threads_of_a_program_disagree_about_a_word(num_warps):
    """They wait for one another's parts: what one has seen must count for all."""
    for num_parts in range(1, 300):
        most = triton_sweeps._most_parts(num_parts, num_warps)
        assert most >= num_parts
        assert most.bit_count() == 1
        assert most == 32 or most >= 32 * num_warps


@pytest.mark.parametrize("most", [1024, 4096, 6144])
def test_parts_of_a_row_are_aligned_and_cover_it_once(most):
    for num_columns in (*range(1, 9000), 32000, 128256, 151936, 262144, 262145):
        num_parts, part_columns = triton_sweeps._parts(num_columns, most)
        assert (num_parts - 1) * part_columns < num_columns <= num_parts * part_columns
        assert part_columns <= most
        assert part_columns % 64 == 0
