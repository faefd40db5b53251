"""A row's parts, which run side by side and wait for each other on a GPU only."""

from __future__ import annotations

import pytest
import torch

from torchtitan_liger.head_loss import sweeps, triton_sweeps
from torchtitan_liger.head_loss.statistics import (
    SUMS,
    WITHOUT_GRADIENT,
    Coefficients,
    Partials,
    sums_for,
    unpack,
)
from torchtitan_liger.head_loss.sweeps import Logits, Transform

pytestmark = pytest.mark.gpu

C, V = 3000, 9003


@pytest.mark.parametrize("gap", [2.0, 10.0, 16.0])
@pytest.mark.parametrize("num_parts", [2, 9, 33])
def test_sure_tokens_keep_their_gradient(monkeypatch, num_parts, gap):
    """What is left beside a label that has most of the sum: 1 - p, to a few roundings."""
    monkeypatch.setattr(triton_sweeps, "TRIP_COLUMNS", -(-V // num_parts))
    g = torch.Generator("cuda").manual_seed(0)
    z = torch.randn(C, V, generator=g, device="cuda").bfloat16()
    label = torch.randint(V, (C,), generator=g, device="cuda")
    # The label's logit is `gap` above the others' sum.
    z.scatter_(1, label[:, None], (z.float().logsumexp(1) + gap).bfloat16()[:, None])
    exact = z.double().softmax(1)
    at_label = torch.arange(C, device="cuda"), label
    others = exact.clone()
    others[at_label] = 0.0
    exact[at_label] = -others.sum(1)  # p - 1, without its cancellation

    sums = unpack(("max", "sumexp", "label_logit"), torch.empty(3, C, device="cuda"))
    ones = torch.ones(C, device="cuda")
    triton_sweeps.one_trip_sweep(z, label, Transform(), sums, Partials(logp=-ones))
    # float32 has 1 - p to 6e-8 of 1, however small it is.
    torch.testing.assert_close(z.double(), exact, rtol=2**-7, atol=2.5e-7)


@pytest.mark.parametrize(
    "needs",
    [
        (),
        ("uniform_ce",),
        ("kl_fwd",),
        ("kl_rev",),
        ("kl_fwd", "teacher_entropy"),
        ("uniform_ce", "kl_fwd", "kl_rev", "teacher_entropy"),
    ],
    ids=str,
)
@pytest.mark.parametrize("transform", [Transform(), Transform(30.0, 0.7)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("num_parts", [2, 9, 33])
def test_a_row_in_parts_is_a_row(monkeypatch, dtype, transform, needs, num_parts):
    monkeypatch.setattr(triton_sweeps, "TRIP_COLUMNS", -(-V // num_parts))
    g = torch.Generator("cuda").manual_seed(0)
    z, v = (3 * torch.randn(2, C, V, generator=g, device="cuda")).to(dtype)
    for x in (z, v):
        x[4::50, V - 600 :] += 1e3
        x[5::50] -= 1e3
        x[6::50, : V - 600] = -torch.inf  # whole parts without a share
    v[8::50] += 1e3
    z[7::50, 0] = torch.nan
    finite = (torch.arange(C, device="cuda") % 50) != 7
    label = torch.randint(V, (C,), generator=g, device="cuda")
    label[2::50] = -1  # ignored
    names = sums_for(needs)
    learned = "logp", "lse", *(n for n in needs if n not in WITHOUT_GRADIENT)
    drawn = torch.randn(len(learned), C, generator=g, device="cuda")

    def both(run, wide):
        exact = wide == torch.float64
        u, t = (z.to(wide, copy=True), v.double()) if exact else (z.clone(), v)
        sums = unpack(names, torch.empty(len(names), C, dtype=wide, device="cuda"))
        by = dict(zip(learned, drawn.to(wide), strict=True))
        teacher = Logits(t, transform) if "teacher_max" in sums else None
        run.one_trip_sweep(u, label, transform, sums, Partials(**by), teacher=teacher)
        return u, sums

    # Words have no room for sums in float64: there a row has one part.
    wide = torch.promote_types(dtype, torch.float32)
    got, sums = both(triton_sweeps, wide)
    expected, exact = both(sweeps, torch.float64)
    for name in names:
        # Numbers of both signs nearly cancel.
        atol = {"logit_sum": 1e-2, "teacher_shifted_sum": 1e-6 * V}.get(name, 1e-5)
        torch.testing.assert_close(
            sums[name][finite].double(), exact[name][finite], rtol=1e-5, atol=atol
        )
    bound = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        got.double(), expected, rtol=bound, atol=1e-5, equal_nan=True
    )
    for _ in range(5):  # whichever part is first
        again, same = both(triton_sweeps, wide)
        assert torch.equal(again[finite], got[finite])
        assert all(torch.equal(same[n][finite], sums[n][finite]) for n in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sums_do_not_depend_on_where_the_large_logits_are(dtype):
    g = torch.Generator("cuda").manual_seed(0)
    z, v = (3 * torch.randn(2, C, V, generator=g, device="cuda")).to(dtype)
    masked = torch.arange(V, device="cuda") < V - 600
    for row, mask in enumerate((-1e4, -1e9, -1e10, torch.finfo(dtype).min, -torch.inf)):
        z[row::50] = z[row::50].masked_fill(masked, mask)
        v[row::50] = v[row::50].masked_fill(masked, mask)
    for row, peak in enumerate((10, 40, 1000), start=5):
        z[row::50, -1] = v[row::50, V // 2] = peak
    z[8::50, 0] = torch.nan
    z[8::50, -1] = 1000.0
    finite = (torch.arange(C, device="cuda") % 50) != 8
    label = torch.full((C,), -1, device="cuda")
    results = []
    for run, wide in ((triton_sweeps, torch.float32), (sweeps, torch.float64)):
        u, t = (z, v) if wide == torch.float32 else (z.double(), v.double())
        names = [n for n in SUMS if n not in ("logit_sum", "candidate_logits")]
        sums = unpack(names, torch.empty(len(names), C, dtype=wide, device="cuda"))
        teacher = Logits(t, Transform())
        run.statistics_sweep(u, label, Transform(), sums, teacher=teacher)
        results.append(sums)
    got, exact = results
    for name in got:
        torch.testing.assert_close(
            got[name][finite].double(),
            exact[name][finite],
            rtol=2e-6,
            atol=2e-6,
            msg=name,
        )
    assert got["sumexp"][~finite].isnan().all()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distance", [0.0, 0.03, 3.0, 300.0])
@pytest.mark.parametrize(
    ("num_columns", "most"),
    [(3000, 4096), (V, 4096), (V - 1, 4096), (V, 1024), (V, 256)],
)
def test_a_fast_mixture_is_as_good_as_its_logits(
    monkeypatch, num_columns, most, distance, dtype, beta
):
    monkeypatch.setattr(triton_sweeps, "MIXTURE_COLUMNS", most)
    g = torch.Generator("cuda").manual_seed(0)
    z, noise = 3 * torch.randn(2, C, num_columns, generator=g, device="cuda")
    v = z + distance * noise
    z[1::50, 0] += 30  # a sure token
    z[2::50, :40] = -torch.inf
    v[2::50, 20:60] = -torch.inf
    z[3::50, 7] = torch.nan
    z, v = z.to(dtype), v.to(dtype)
    label = torch.randint(num_columns, (C,), generator=g, device="cuda")
    names = ("max", "sumexp", "label_logit", "teacher_max", "teacher_sumexp")
    sums = unpack(names, torch.empty(5, C, device="cuda"))
    narrow, wide = (Logits(x, Transform()) for x in (v, v.double()))
    triton_sweeps.statistics_sweep(z, label, Transform(), sums, teacher=narrow)
    exact = {name: x.double() for name, x in sums.items()}
    softmax, label_share = torch.randn(2, C, generator=g, device="cuda")

    def mixed(run, u, of, teacher, *, one_trip):
        by = Coefficients(
            of["max"],
            of["sumexp"],
            softmax=softmax.to(of["max"].dtype),
            label=label_share.to(of["max"].dtype),
            teacher_max=of["teacher_max"],
            teacher_sumexp=of["teacher_sumexp"],
            mixture=torch.ones_like(of["max"]),
        )
        more = {"teacher": teacher, "jsd_beta": beta}
        plain = Transform()
        if one_trip:
            shares = run.mixture_gradient_sweep(u, label, plain, by, of, **more)
        else:
            shares = run.mixture_sweep(u, plain, teacher, of, beta)
            run.gradient_sweep(u, label, plain, by.with_mixture(shares[0]), **more)
        return shares.double(), u.double()

    exact_shares, truth = mixed(sweeps, z.double(), exact, wide, one_trip=False)
    # A logit of 3 is off by 1e-3 already; the logarithm of a small p in float32 by 1e-6.
    bound = torch.finfo(dtype).eps * truth.abs() + 1e-5 * z.double().softmax(1)
    bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    unknown = truth.isnan()
    known = ~exact_shares.isnan().any(0)
    # Where only one of them has a chance, two exponents of up to 128 bits are subtracted.
    p, q = z.double().softmax(1), v.double().softmax(1)
    alone = torch.stack([(a * (b < 2**-100)).sum(1) for a, b in ((p, q), (q, p))])
    shares_bound = 1e-5 * exact_shares.abs() + 1e-6 + 6e-6 * alone
    for one_trip in (True, False, True):
        shares, grad = mixed(triton_sweeps, z.clone(), sums, narrow, one_trip=one_trip)
        assert ((shares - exact_shares).abs() <= shares_bound)[:, known].all()
        assert shares[:, ~known].isnan().all()
        assert torch.equal(grad.isnan(), unknown)
        assert (((grad - truth).abs() <= bound) | unknown).all()
    # On two ranks each has a share.
    half = num_columns // 2
    pieces = (z[:, :half], v[:, :half]), (z[:, half:], v[:, half:])
    plain = Transform()
    shares = sum(
        triton_sweeps.mixture_sweep(x, plain, Logits(y, plain), sums, beta)
        for x, y in pieces
    )
    assert ((shares.double() - exact_shares).abs() <= shares_bound)[:, known].all()
    assert shares[:, ~known].isnan().all()
