"""The passes over logits, torch and Triton, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from torchtitan_liger.head_loss import sweeps, triton_sweeps
from torchtitan_liger.head_loss.statistics import SUMS, Coefficients, unpack
from torchtitan_liger.head_loss.sweeps import TeacherLogits, Transform

C, V, K = 9, 5003, 3  # more columns than one block of the kernels has
PLAIN = Transform()
# Of what a mask leaves, and of what is then left of that.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
NOTHING = torch.full((C,), -1), torch.full((C, K), -1)  # of what is on another rank


@pytest.fixture(params=[sweeps, triton_sweeps], ids=["torch", "triton"])
def impl(request):
    return request.param


def draw(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(C, V, generator=g)).to(dtype)
    teacher = (3 * torch.randn(C, V, generator=g)).to(dtype)
    label = torch.randint(V, (C,), generator=g)
    label[2] = -1  # on another rank
    candidates = torch.randint(-1, V, (C, K), generator=g)
    return logits, teacher, label, candidates


def sums_of(impl, logits, teacher, label, candidates, transform=PLAIN):
    wide = torch.promote_types(logits.dtype, torch.float32)
    packed = torch.full((len(SUMS) - 1 + K, len(logits)), torch.nan, dtype=wide)
    sums = unpack(SUMS, packed)
    impl.statistics_sweep(
        logits,
        label,
        transform,
        sums,
        candidates_CK=candidates,
        teacher=TeacherLogits(teacher, transform),
    )
    return sums


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


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e4, -1e4])
def test_float32_sums_are_as_exact_beside_large_logits(impl, offset):
    """A softmax does not know of what all logits have in common; nor should its error."""
    z, v, label, candidates = draw(torch.float32)
    z, v = (64 * z).round() / 64, (64 * v).round() / 64  # so that the sum is exact
    z[:, 0] = 40  # a confident row: nearly all of the sum is one number
    exact = sums_of(sweeps, z.double(), v.double(), label, candidates)
    sums = sums_of(impl, z + offset, v - offset, label, candidates)
    at_once = unpack(("max", "sumexp", "label_logit"), torch.empty(3, C))
    by = Coefficients(at_once["max"], at_once["sumexp"], *torch.zeros(2, C))
    impl.both_sweeps(z + offset, label, PLAIN, at_once, by)
    for got in (sums["sumexp"], at_once["sumexp"]):
        torch.testing.assert_close(got, exact["sumexp"].float(), rtol=5e-7, atol=0)
    for name in ("student_gap", "teacher_gap", "shifted_sum", "teacher_sumexp"):
        torch.testing.assert_close(
            sums[name], exact[name].float(), rtol=1e-6, atol=1e-6, msg=name
        )


def test_a_teacher_may_be_narrower_than_the_student(impl):
    z, v, label, candidates = draw()
    v = v.float()
    sums = sums_of(impl, z, v, label, candidates)
    exact = sums_of(sweeps, z, v.double(), label, candidates)
    for name, value in exact.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-12, atol=1e-12, msg=name)


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
        u, teacher = z.clone(), TeacherLogits(v.to(dtype), PLAIN)
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
        teacher = TeacherLogits(v.to(dtype), PLAIN)
        sums = sums_of(run, z.to(dtype), teacher.logits_Cv, *NOTHING)
        shares.append(run.mixture_sweep(z.to(dtype), PLAIN, teacher, sums, beta))
    torch.testing.assert_close(shares[0].double(), shares[1], rtol=1e-6, atol=1e-6)


def test_what_underflows_has_no_share_in_a_gap_even_if_the_teacher_is_masked(impl):
    z, v, _, _ = draw(torch.float32)
    z[:, : V - 600], v[:, : V - 600] = -200, -torch.inf
    sums = sums_of(impl, z, v, *NOTHING)
    exact = sums_of(sweeps, z[:, -600:], v[:, -600:], *NOTHING)
    torch.testing.assert_close(sums["student_gap"], exact["student_gap"])


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
            teacher = TeacherLogits(v, PLAIN)
            shares.append(run.mixture_sweep(z, PLAIN, teacher, sums, beta))
        # Each is a sum of numbers that nearly cancel where student and teacher agree.
        torch.testing.assert_close(shares[0].double(), shares[1], rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("of_teacher", [True, False])
def test_a_mixture_of_nothing_known_is_unknown(impl, of_teacher):
    z, v, _, _ = draw()
    (v if of_teacher else z)[3, 7] = torch.nan
    sums = sums_of(impl, z, v, *NOTHING)
    shares = impl.mixture_sweep(z, PLAIN, TeacherLogits(v, PLAIN), sums, 0.5)
    assert shares[:, 3].isnan().all()
    assert shares.isnan().sum() == 2


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
        teacher=TeacherLogits(v, transform),
        jsd_beta=0.3,
    )
    torch.testing.assert_close(u, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smoothed", [True, False])
@pytest.mark.parametrize("transform", [PLAIN, Transform(2.0, 0.7)], ids=str)
@pytest.mark.parametrize("num_columns", [1, 40, V, 33_001])
def test_both_sweeps_at_once_are_one_after_the_other(
    impl, transform, smoothed, num_columns
):
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(C, num_columns, generator=g, dtype=torch.float64)
    z[4] += 1e4
    z[5] -= 1e4
    z[6, : num_columns - 600] = -torch.inf  # what has a share comes last
    label = torch.randint(num_columns, (C,), generator=g)
    label[2] = -1  # ignored
    names = ("max", "sumexp", "label_logit", "logit_sum")[: 3 + smoothed]
    results = []
    for at_once in (True, False):
        u, sums = z.clone(), unpack(names, torch.empty(len(names), C).double())
        g.manual_seed(1)
        softmax, by_label, constant = torch.randn(3, C, generator=g).double()
        by = Coefficients(sums["max"], sums["sumexp"], softmax, by_label)
        if smoothed:
            by = by._replace(constant=constant)
        if at_once:
            impl.both_sweeps(u, label, transform, sums, by)
        else:
            sweeps.statistics_sweep(u, label, transform, sums)
            sweeps.gradient_sweep(u, label, transform, by)
        results.append([u, *sums.values()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smoothed", [True, False])
@pytest.mark.parametrize("num_columns", [1, 40, V, 33_001])
def test_both_sweeps_of_logits_in_16_bits(impl, smoothed, num_columns):
    """Where a row's first logits say nothing of the others, or are not there."""
    g = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(C, num_columns, generator=g)).bfloat16()
    late = max(0, num_columns - 600)
    z[3, late:] += 40
    z[4, late:] += 1e4
    z[5] -= 1e4
    z[5, late:] = 10
    z[6, :late] = -torch.inf
    z[7] = -1e4
    z[8, 0] = torch.nan
    label = torch.randint(num_columns, (C,), generator=g)
    label[2] = -1  # ignored
    names = ("max", "sumexp", "label_logit", "logit_sum")[: 3 + smoothed]
    softmax, by_label, constant = torch.randn(3, C, generator=g)
    results = []
    for run, dtype in ((impl, torch.float32), (sweeps, torch.float64)):
        u = z.clone() if dtype == torch.float32 else z.double()
        sums = unpack(names, torch.empty(len(names), C, dtype=dtype))
        by = Coefficients(
            sums["max"], sums["sumexp"], softmax.to(dtype), by_label.to(dtype)
        )
        if smoothed:
            by = by._replace(constant=constant.to(dtype))
        run.both_sweeps(u, label, PLAIN, sums, by)
        results.append((u, sums))
    (got, got_sums), (expected, expected_sums) = results
    for name in names:
        torch.testing.assert_close(
            got_sums[name][:8].double(), expected_sums[name][:8],
            rtol=5e-7, atol=1e-6, msg=name,
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
    at_once = unpack(
        ("max", "sumexp", "label_logit"), torch.empty(3, C).to(sums["max"])
    )
    by = Coefficients(
        at_once["max"], at_once["sumexp"], *torch.zeros(2, C).to(at_once["max"])
    )
    impl.both_sweeps(z, label, PLAIN, at_once, by)
    rtol = 1e-6 if sums["max"].dtype == torch.float32 else 1e-12
    for name in sums.keys() - {"logit_sum"}:  # what the mask is, that is
        torch.testing.assert_close(
            sums[name].double(), exact[name], rtol=rtol, atol=rtol, msg=name
        )
    for name, got in at_once.items():
        torch.testing.assert_close(
            got.double(), exact[name], rtol=rtol, atol=rtol, msg=name
        )


@pytest.mark.parametrize("largest", [-1e20, -1e10, -8.75e8, 7.9e8, 1e10, 1e12])
def test_what_has_no_digits_for_a_softmax_is_right_or_not_a_number(largest):
    z = torch.full((1, V), largest)
    z[0, ::3] *= 1 - math.copysign(1e-6, largest)
    everything = sums_of(
        triton_sweeps, z, z.clone(), torch.tensor([1]), torch.zeros(1, K).long()
    )
    at_once = unpack(("max", "sumexp", "label_logit"), torch.empty(3, 1))
    by = Coefficients(at_once["max"], at_once["sumexp"], *torch.zeros(2, 1))
    exact = sums_of(
        sweeps, z.double(), z.double(), torch.tensor([1]), torch.zeros(1, K).long()
    )
    triton_sweeps.both_sweeps(z, torch.tensor([1]), PLAIN, at_once, by)
    for sums in (everything, at_once):
        sumexp = sums["sumexp"].double()
        if sumexp.isfinite():
            torch.testing.assert_close(sumexp, exact["sumexp"], rtol=1e-6, atol=0)
    p2 = everything["square_sum"] / everything["sumexp"] ** 2
    if p2.isfinite():
        of = exact["square_sum"] / exact["sumexp"] ** 2
        torch.testing.assert_close(p2.double(), of, rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_logit_that_is_not_a_number_stays_one_beside_a_large_one(impl, dtype):
    z, v, label, _ = draw(dtype)
    z[3, 7] = v[5, 7] = torch.nan
    z[3, 3000] = v[5, 3000] = 1000.0
    sums = sums_of(impl, z, v, label, torch.full((C, K), -1))
    assert sums["sumexp"].isnan().nonzero().flatten().tolist() == [3]
    assert sums["teacher_sumexp"].isnan().nonzero().flatten().tolist() == [5]
    sums = unpack(("max", "sumexp", "label_logit"), torch.empty(3, C))
    by = Coefficients(sums["max"], sums["sumexp"], *torch.zeros(2, C))
    impl.both_sweeps(z, label, PLAIN, sums, by)
    assert sums["sumexp"].isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("peak", range(10, 41, 3))
def test_what_a_sure_row_leaves_to_the_others_is_exact(impl, peak):
    """In 16 bits as well: 1 - p is all that such a token's gradient is."""
    z = torch.zeros(1, V, dtype=torch.bfloat16)
    z[0, 3000] = peak  # not among the first logits
    sums = unpack(("max", "sumexp", "label_logit"), torch.empty(3, 1))
    by = Coefficients(sums["max"], sums["sumexp"], *torch.zeros(2, 1))
    exact = (z.double() - peak).exp().sum(1)
    impl.both_sweeps(z, torch.tensor([3000]), PLAIN, sums, by)
    torch.testing.assert_close(sums["sumexp"].double(), exact, rtol=5e-7, atol=0)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_is_never_negative(impl, dtype, at_once):
    """Whatever is lost of the label's own exponential."""
    num_rows, num_columns = 400, 64
    z = torch.full((num_rows, num_columns), -60.0)
    label = torch.arange(num_rows) % num_columns
    z.scatter_(1, label[:, None], 20 * torch.rand(num_rows, 1))
    z[7] = -torch.inf
    z, sums = (
        z.to(dtype),
        unpack(("max", "sumexp", "label_logit"), torch.empty(3, num_rows)),
    )
    if at_once:
        zeros = torch.zeros(num_rows)
        by = Coefficients(sums["max"], sums["sumexp"], zeros, zeros)
        impl.both_sweeps(z, label, PLAIN, sums, by)
    else:
        impl.statistics_sweep(z, label, PLAIN, sums)
    assert sums["sumexp"][7] == 0  # of nothing
    others = torch.arange(num_rows) != 7
    assert sums["sumexp"][others].min() >= 1
    assert sums["sumexp"].max() < 1 + 5e-7


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
