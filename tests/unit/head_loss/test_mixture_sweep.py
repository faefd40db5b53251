"""The pass that finds how far two softmaxes are from their mixture."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from tests.unit.head_loss.sweep_cases import (
    NOTHING,
    PLAIN,
    C,
    V,
    draw,
    sums_of,
)
from torchtitan_liger.head_loss import sweeps, triton_blocks, triton_sweeps
from torchtitan_liger.head_loss.statistics import Coefficients
from torchtitan_liger.head_loss.sweeps import Logits, Transform
from torchtitan_liger.head_loss.triton_mixture import mixture_kernel


def test_a_mixture_with_a_narrower_teacher_is_as_exact(impl):
    z, v, _, _ = draw()
    v = v.float()
    sums = sums_of(impl, z, v, *NOTHING)
    zeros, ones = torch.zeros(C).double(), torch.ones(C).double()
    by = Coefficients(
        sums["max"],
        sums["sumexp"],
        softmax=zeros,
        label=zeros,
        teacher_max=sums["teacher_max"],
        teacher_sumexp=sums["teacher_sumexp"],
        mixture=ones,
    )
    results = []
    for run, dtype in ((impl, torch.float32), (sweeps, torch.float64)):
        u, teacher = z.clone(), Logits(v.to(dtype), PLAIN)
        shares = run.mixture_sweep(u, PLAIN, teacher, sums, 0.3)
        run.gradient_sweep(
            u, torch.full((C,), -1), PLAIN, by, teacher=teacher, jsd_beta=0.3
        )
        results.append((shares, u))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", [1e-6, 0.001, 0.999, 0.999999])
def test_a_mixture_that_is_nearly_one_of_the_two_is_exact(impl, beta):
    g = torch.Generator().manual_seed(0)
    z, v = 6 * torch.randn(2, C, V, generator=g)
    shares = []
    for run, dtype in ((impl, torch.float32), (sweeps, torch.float64)):
        teacher = Logits(v.to(dtype), PLAIN)
        sums = sums_of(run, z.to(dtype), teacher.logits_Cv, *NOTHING)
        shares.append(run.mixture_sweep(z.to(dtype), PLAIN, teacher, sums, beta))
    torch.testing.assert_close(shares[0].double(), shares[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_mixture_of_unlikely_words_is_finite_and_of_likely_ones_is_exact(
    impl, beta
):
    g = torch.Generator().manual_seed(0)
    wide = (40 * torch.randn(C, V, generator=g), 40 * torch.randn(C, V, generator=g))
    near = torch.randn(C, V, generator=g)
    near[:, 0] = 20
    for z, v in (wide, (near, near + 1e-3 * torch.randn(C, V, generator=g))):
        shares = []
        for run, dtype in ((impl, torch.float32), (sweeps, torch.float64)):
            z, v = z.to(dtype), v.to(dtype)
            sums = sums_of(run, z, v, *NOTHING)
            teacher = Logits(v, PLAIN)
            shares.append(run.mixture_sweep(z, PLAIN, teacher, sums, beta))
        # Each is a sum of numbers that nearly cancel where student and teacher agree.
        torch.testing.assert_close(shares[0].double(), shares[1], rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("of_teacher", [True, False])
def test_a_mixture_of_nothing_known_is_unknown(impl, of_teacher):
    z, v, _, _ = draw()
    (v if of_teacher else z)[3, 7] = torch.nan
    sums = sums_of(impl, z, v, *NOTHING)
    shares = impl.mixture_sweep(z, PLAIN, Logits(v, PLAIN), sums, 0.5)
    assert shares[:, 3].isnan().all()
    assert shares.isnan().sum() == 2


SOME = ("softmax", "label", "mixture")
OTHERS = ("log_softmax", "constant")
FOR_TWO_SWEEPS = ("square", "teacher", "log_teacher", "candidates")


@pytest.mark.parametrize(
    "given",
    [SOME, (*SOME, *OTHERS), (*SOME, *OTHERS, *FOR_TWO_SWEEPS), SOME[:2]],
    ids=lambda names: str(len(names)),
)
@pytest.mark.parametrize("transform", [PLAIN, Transform(2.0, 0.7)], ids=str)
@pytest.mark.parametrize("num_columns", [1, 40, V])
def test_mixture_and_gradient_in_one_trip_are_one_sweep_after_the_other(
    impl, given, transform, num_columns, monkeypatch
):
    z, v, label, candidates = (x[:, :num_columns] if x.ndim == 2 else x for x in draw())
    label, candidates = label % num_columns, candidates % num_columns
    label[2] = -1
    z[4] += 1e3
    v[5] -= 1e3
    z[6, : num_columns // 2] = -torch.inf
    v[7, num_columns // 2 + 1 :] = -torch.inf
    sums = sums_of(sweeps, z, v, label, candidates, transform)
    g = torch.Generator().manual_seed(1)
    drawn = {n: torch.randn(C, generator=g, dtype=torch.float64) for n in given}
    if "candidates" in drawn:
        drawn["candidates"] = torch.randn(candidates.shape, generator=g).double()
    of_softmaxes = ("max", "sumexp", "teacher_max", "teacher_sumexp")
    by = Coefficients(**{name: sums[name] for name in of_softmaxes}, **drawn)
    teacher = Logits(v, Transform(3.0, 1.3))
    teacher_sums = sums_of(sweeps, v, v, label, candidates, teacher.transform)
    for name in ("max", "sumexp"):
        sums[f"teacher_{name}"].copy_(teacher_sums[name])

    expected = z.clone()
    shares = sweeps.mixture_sweep(expected, transform, teacher, sums, 0.3)
    more = {"candidates_CK": candidates, "teacher": teacher, "jsd_beta": 0.3}
    complete = by.with_mixture(shares[0])
    sweeps.gradient_sweep(expected, label, transform, complete, **more)

    monkeypatch.setattr(sweeps, "CPU_BLOCK_ELEMENTS", 2 * num_columns)
    found = impl.mixture_gradient_sweep(z, label, transform, by, sums, **more)
    torch.testing.assert_close(found, shares, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-12)


def test_a_masked_column_beside_a_mixture_has_no_gradient(impl):
    z, v, label, _ = draw(torch.float32)
    z[:, 100:200] = -torch.inf
    label[:] = 0
    sums = sums_of(impl, z, v, label, NOTHING[1])
    ones = torch.ones(C)
    of_softmaxes = ("max", "sumexp", "teacher_max", "teacher_sumexp")
    by = Coefficients(
        **{name: sums[name] for name in of_softmaxes},
        softmax=1e30 * ones,
        label=-ones,
        log_softmax=1e30 * ones,
        mixture=1e30 * ones,
    )
    teacher = Logits(v, PLAIN)
    impl.mixture_gradient_sweep(
        z, label, PLAIN, by, sums, teacher=teacher, jsd_beta=0.5
    )
    assert not z[:, 100:200].any()
    assert z[:, 200:].all()


@triton.jit
def log2(x):
    return tl.log2(x)


class WithWords:
    """`mixture_kernel` where programs run one after the other: the words for which a row's
    parts wait are there before."""

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            given = dict(zip(mixture_kernel.arg_names, args, strict=False))
            words_CP = given["words"]
            if words_CP is not None:
                of_gradient = [x for x in given if x.startswith("by_")]
                alone = given | dict.fromkeys(["words", *of_gradient])
                mixture_kernel[grid](*alone.values(), **kwargs)
                kl_CP = (given["shares"][0].T / math.log(2)).contiguous()
                words_CP.copy_(kl_CP.view(torch.int32).long() & 0xFFFFFFFF | 1 << 32)
            mixture_kernel[grid](*args, **kwargs)

        return run


@pytest.mark.parametrize(
    ("num_columns", "most", "can_wait"),
    [
        (4000, 4096, False),  # in one trip, in pairs
        (4003, 4096, False),
        (5000, 4096, False),  # in two
        (5000, 1024, True),
        (5003, 512, True),
    ],
)
@pytest.mark.parametrize("distance", [0.0, 0.03, 3.0, 100.0])
def test_a_fast_mixture_is_as_good_as_its_logits(
    monkeypatch, distance, num_columns, most, can_wait
):
    monkeypatch.setattr(triton_sweeps, "MIXTURE_COLUMNS", most)
    monkeypatch.setattr(triton_sweeps, "_can_wait", lambda *_: can_wait)
    monkeypatch.setattr(triton_sweeps, "mixture_kernel", WithWords())
    # The interpreter has no logarithm of NVIDIA's.
    monkeypatch.setattr(triton_blocks, "libdevice", SimpleNamespace(fast_log2f=log2))
    monkeypatch.setattr(triton_sweeps, "_is_fast", lambda _: True)
    g = torch.Generator().manual_seed(0)
    z, noise = 3 * torch.randn(2, C, num_columns, generator=g)
    v = z + distance * noise
    z[1, 0] += 30  # a sure token
    z[2, :40] = -torch.inf
    v[2, 20:60] = -torch.inf
    z[3] += 1e4
    v[4] -= 1e4
    z, v = z.bfloat16(), v.bfloat16()
    label = torch.randint(num_columns, (C,), generator=g)
    exact = sums_of(sweeps, z.double(), v.double(), label, NOTHING[1])
    sums = {name: x.float() for name, x in exact.items()}

    def by(of):
        drawn = torch.randn(3, C, generator=torch.Generator().manual_seed(1))
        softmax, label_share, log_softmax = drawn.to(of["max"].dtype)
        of_softmaxes = ("max", "sumexp", "teacher_max", "teacher_sumexp")
        return Coefficients(
            **{name: of[name] for name in of_softmaxes},
            softmax=softmax,
            label=label_share,
            log_softmax=log_softmax,
            mixture=torch.ones_like(softmax),
        )

    truth, teacher = z.double(), Logits(v.double(), PLAIN)
    shares = sweeps.mixture_gradient_sweep(
        truth, label, PLAIN, by(exact), exact, teacher=teacher, jsd_beta=0.3
    )
    # On two ranks each has a share.
    pieces = [(x[:, :2000], x[:, 2000:]) for x in (z, v)]
    of_ranks = [
        triton_sweeps.mixture_sweep(x, PLAIN, Logits(y, PLAIN), sums, 0.3)
        for x, y in zip(*pieces, strict=True)
    ]
    teacher = Logits(v, PLAIN)
    found = triton_sweeps.mixture_gradient_sweep(
        z, label, PLAIN, by(sums), sums, teacher=teacher, jsd_beta=0.3
    )
    for of_all in (found, sum(of_ranks)):
        torch.testing.assert_close(of_all.double(), shares, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.double(), truth, rtol=2**-7, atol=1e-8)
