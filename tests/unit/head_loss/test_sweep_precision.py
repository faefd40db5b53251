"""What the passes leave of logits that are hard on the arithmetic."""

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
    sums_in_one_trip,
    sums_of,
)
from torchtitan_liger.head_loss import sweeps, triton_sweeps
from torchtitan_liger.head_loss.statistics import (
    Coefficients,
    Partials,
    sums_for,
    unpack,
)
from torchtitan_liger.head_loss.sweeps import Logits, Transform

# Of what a mask leaves, and of what is then left of that.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e4, -1e4])
def test_float32_sums_are_as_exact_beside_large_logits(impl, offset):
    """A softmax does not know of what all logits have in common; nor should its error."""
    z, v, label, candidates = draw(torch.float32)
    z, v = (64 * z).round() / 64, (64 * v).round() / 64  # so that the sum is exact
    z[:, 0] = 40  # a confident row: nearly all of the sum is one number
    exact = sums_of(sweeps, z.double(), v.double(), label, candidates)
    sums = sums_of(impl, z + offset, v - offset, label, candidates)
    in_one_trip = sums_in_one_trip(impl, z + offset, label)
    for got in (sums["sumexp"], in_one_trip["sumexp"]):
        torch.testing.assert_close(got, exact["sumexp"].float(), rtol=5e-7, atol=0)
    for name in ("student_gap", "teacher_gap", "shifted_sum", "teacher_sumexp"):
        torch.testing.assert_close(
            sums[name], exact[name].float(), rtol=1e-6, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("offset", [1e4, 1e6, -1e7])
def test_float64_sums_are_as_exact_beside_large_logits(impl, offset):
    z, v, label, candidates = draw()
    z, v = (64 * z).round() / 64, (64 * v).round() / 64  # so that the sum is exact
    exact = sums_of(sweeps, z, v, label, candidates)
    sums = sums_of(impl, z + offset, v - offset, label, candidates)
    for name in ("sumexp", "shifted_sum", "square_sum", "student_gap", "teacher_gap"):
        torch.testing.assert_close(
            sums[name], exact[name], rtol=1e-12, atol=1e-12, msg=name
        )


def test_what_underflows_has_no_share_in_a_gap_even_if_the_teacher_is_masked(impl):
    z, v, _, _ = draw(torch.float32)
    z[:, : V - 600], v[:, : V - 600] = -200, -torch.inf
    sums = sums_of(impl, z, v, *NOTHING)
    exact = sums_of(sweeps, z[:, -600:], v[:, -600:], *NOTHING)
    torch.testing.assert_close(sums["student_gap"], exact["student_gap"])


@pytest.mark.parametrize("of_teacher", [(), ("kl_fwd",), ("kl_rev",)])
@pytest.mark.parametrize("smoothed", [True, False])
@pytest.mark.parametrize("num_columns", [1, 40, V])
def test_one_trip_over_logits_in_16_bits(impl, smoothed, of_teacher, num_columns):
    """Where a row's first logits say nothing of the others, or are not there."""
    g = torch.Generator().manual_seed(0)
    z, v = (3 * torch.randn(2, C, num_columns, generator=g)).bfloat16()
    late = max(0, num_columns - 600)
    # A teacher may be wider, and its rows further apart.
    v = torch.cat((v.float(), torch.full((C, 3), 1e9)), dim=1)[:, :num_columns]
    for x in (z, v):
        x[3, late:] += 40
        x[4, late:] += 1e4
        x[5] -= 1e4
        x[5, late:] = 10
        x[6, :late] = -torch.inf
        x[7] = -1e4
    z[8, 0] = torch.nan
    label = torch.randint(num_columns, (C,), generator=g)
    label[2] = -1  # ignored
    learned = "logp", "lse", *["uniform_ce"][:smoothed], *of_teacher
    drawn = torch.randn(len(learned), C, generator=g)
    names = sums_for({n for n in learned if n not in ("logp", "lse")})
    results = []
    for run, dtype in ((impl, torch.float32), (sweeps, torch.float64)):
        exact = dtype == torch.float64
        u, t = (z.double(), v.double()) if exact else (z.clone(), v)
        sums = unpack(names, torch.empty(len(names), C, dtype=dtype))
        partials = Partials(**dict(zip(learned, drawn.to(dtype), strict=True)))
        teacher = Logits(t, PLAIN) if of_teacher else None
        run.one_trip_sweep(u, label, PLAIN, sums, partials, teacher=teacher)
        results.append((u, sums))
    (got, got_sums), (expected, expected_sums) = results
    for name in names:
        # A gap is a sum over columns of what may be nothing at all.
        atol = 2e-7 * num_columns if name.endswith("gap") else 1e-6
        torch.testing.assert_close(
            got_sums[name][:8].double(), expected_sums[name][:8],
            rtol=5e-7, atol=atol, msg=name,
        )  # fmt: skip
    assert got_sums["sumexp"][8].isnan()
    # The interpreter cuts off what a GPU rounds.
    torch.testing.assert_close(
        got.double(), expected, rtol=2**-7, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e10, -1e20, None])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_masked_columns_have_no_share(impl, dtype, mask):
    """Whatever number a mask is made of; None for the dtype's lowest."""
    z, v, label, candidates = draw(dtype)
    lowest = torch.finfo(dtype).min
    mask = lowest if mask is None else max(mask, lowest)
    masked = torch.arange(V) < V - 600  # all that some threads see
    masked |= torch.arange(V) % 3 == 0
    z[4:], v[4:] = z[4:].masked_fill(masked, mask), v[4:].masked_fill(masked, mask)
    label[4:] = candidates[4:] = -1
    exact = sums_of(sweeps, z.double(), v.double(), label, candidates)
    sums = sums_of(impl, z, v, label, candidates)
    in_one_trip = sums_in_one_trip(impl, z, label)
    rtol = 1e-6 if sums["max"].dtype == torch.float32 else 1e-12
    for name in sums.keys() - {"logit_sum"}:  # what the mask is, that is
        torch.testing.assert_close(
            sums[name].double(), exact[name], rtol=rtol, atol=rtol, msg=name
        )
    for name, got in in_one_trip.items():
        torch.testing.assert_close(
            got.double(), exact[name], rtol=rtol, atol=rtol, msg=name
        )


@pytest.mark.parametrize("largest", [-1e20, -1e10, -8.75e8, 7.9e8, 1e10, 1e12])
def test_what_has_no_digits_for_a_softmax_is_right_or_not_a_number(largest):
    z = torch.full((1, V), largest)
    z[0, ::3] -= 1e-6 * abs(largest)
    label, candidates = torch.tensor([1]), torch.zeros(1, K).long()
    exact = sums_of(sweeps, z.double(), z.double(), label, candidates)
    everything = sums_of(triton_sweeps, z, z.clone(), label, candidates)
    in_one_trip = sums_in_one_trip(triton_sweeps, z, label)
    for sums in (everything, in_one_trip):
        sumexp = sums["sumexp"].double()
        if sumexp.isfinite():
            torch.testing.assert_close(sumexp, exact["sumexp"], rtol=1e-6, atol=0)
    p2 = everything["square_sum"] / everything["sumexp"] ** 2
    if p2.isfinite():
        of = exact["square_sum"] / exact["sumexp"] ** 2
        torch.testing.assert_close(p2.double(), of, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_logit_that_is_not_a_number_stays_one_beside_a_large_one(impl, dtype):
    z, v, label, _ = draw(dtype)
    z[3, 7] = v[5, 7] = torch.nan
    z[3, 3000] = v[5, 3000] = 1000.0
    sums = sums_of(impl, z, v, label, torch.full((C, K), -1))
    assert sums["sumexp"].isnan().nonzero().flatten().tolist() == [3]
    assert sums["teacher_sumexp"].isnan().nonzero().flatten().tolist() == [5]
    sums = sums_in_one_trip(impl, z, label)
    assert sums["sumexp"].isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("peak", range(10, 41, 3))
def test_what_a_sure_row_leaves_to_the_others_is_exact(impl, peak):
    """In 16 bits as well: 1 - p is all that such a token's gradient is."""
    z = torch.zeros(1, V, dtype=torch.bfloat16)
    z[0, 3000] = peak  # not among the first logits
    exact = (z.double() - peak).exp().sum(1)
    sums = sums_in_one_trip(impl, z, torch.tensor([3000]))
    torch.testing.assert_close(sums["sumexp"].double(), exact, rtol=5e-7, atol=0)


@pytest.mark.parametrize("in_one_trip", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_is_never_negative(impl, dtype, in_one_trip):
    """Whatever is lost of the label's own exponential; nor is a divergence."""
    num_rows, num_columns = 400, 64
    z = torch.full((num_rows, num_columns), -60.0)
    label = torch.arange(num_rows) % num_columns
    z.scatter_(1, label[:, None], 20 * torch.rand(num_rows, 1))
    z[7] = -torch.inf
    z = z.to(dtype)
    names = sums_for({"kl_fwd"})
    sums, teacher = unpack(names, torch.empty(len(names), num_rows)), Logits(z, PLAIN)
    if in_one_trip:
        none = Partials(logp=torch.zeros(num_rows))
        impl.one_trip_sweep(z.clone(), label, PLAIN, sums, none, teacher=teacher)
    else:
        impl.statistics_sweep(z, label, PLAIN, sums, teacher=teacher)
    for name in ("sumexp", "teacher_sumexp"):
        assert sums[name][7] == 0  # of nothing
        others = torch.arange(num_rows) != 7
        assert sums[name][others].min() >= 1
        assert sums[name].max() < 1 + 5e-7


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered")
@pytest.mark.parametrize("learned", [(), ("kl_fwd",), ("kl_rev",)])
def test_a_row_without_a_softmax_has_no_gradient_either(impl, learned):
    """A step that is skipped where gradients are NaN is skipped here."""
    z, v, label, _ = draw(torch.float32)
    z[4] = -torch.inf
    names = sums_for(set(learned))
    sums = unpack(names, torch.empty(len(names), C))
    partials = Partials(**dict.fromkeys(("logp", *learned), torch.ones(C)))
    teacher = Logits(v, PLAIN) if learned else None
    impl.one_trip_sweep(z, label, PLAIN, sums, partials, teacher=teacher)
    assert z[4].isnan().all()
    assert z[[0, 1, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("softcap", [2.0, 30.0, 1000.0])
def test_a_softcap_in_float32_is_exact(impl, softcap):
    u = torch.logspace(-6, 1, V)[None] * torch.tensor([[1.0], [-1.0]])
    label = torch.tensor([V // 2, V // 3])
    transform = Transform(softcap, 1.0)
    gradients = []
    for run, logits in ((impl, u.clone()), (sweeps, u.double())):
        sums = sums_of(run, logits, logits.clone(), label, label[:, None], transform)
        ones = torch.ones_like(sums["max"])
        by = Coefficients(sums["max"], sums["sumexp"], ones, -ones)
        run.gradient_sweep(logits, label, transform, by)
        gradients.append((sums["label_logit"], logits))
    for got, exact in zip(*gradients, strict=True):
        # What is left of a float32 where tanh is close to 1, 1 - tanh^2 has lost.
        torch.testing.assert_close(got.double(), exact, rtol=3e-6, atol=1e-7)
