"""Every term of the engine, and the same loss on full logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tests.helpers import Problem
from torchtitan_liger.head_loss import (
    Collision,
    CrossEntropy,
    Distillation,
    EntropyBonus,
    Focal,
    HeadLossOptions,
    PolicyGradient,
    ReferenceKL,
    SelfWeighted,
    Teacher,
    Term,
    Unlikelihood,
    ZLoss,
)


@dataclass(frozen=True)
class Squared(Term):
    """A term as a user writes it."""

    weight: float
    name: str = "squared"
    needs = frozenset({"entropy", "uniform_ce"})

    def loss(self, stats, rows):
        return stats.logp.square() + stats.entropy * stats.uniform_ce


@dataclass(frozen=True)
class SquaredJSD(Term):
    """One whose gradient needs the divergence itself."""

    weight: float = 1.0
    name: str = "squared_jsd"
    needs = frozenset({"jsd"})

    def loss(self, stats, rows):
        return stats.jsd.square()


# Each term with its definition on full logits: f(z, logp, y, rows) per token.
TERMS = {
    "cross entropy": (
        CrossEntropy(),
        lambda z, lp, y, r: F.cross_entropy(z, y, reduction="none"),
    ),
    "smoothed": (
        CrossEntropy(0.1),
        lambda z, lp, y, r: F.cross_entropy(
            z, y, label_smoothing=0.1, reduction="none"
        ),
    ),
    "z-loss": (ZLoss(0.3), lambda z, lp, y, r: 0.3 * z.logsumexp(1) ** 2),
    "focal": (Focal(2.0), lambda z, lp, y, r: (1 - lp.exp()) ** 2 * -lp),
    "focal, half": (
        Focal(0.5, 0.7),
        lambda z, lp, y, r: 0.7 * (1 - lp.exp()) ** 0.5 * -lp,
    ),
    "entropy": (
        EntropyBonus(0.2),
        lambda z, lp, y, r: -0.2 * torch.distributions.Categorical(logits=z).entropy(),
    ),
    "self-weighted": (SelfWeighted(), lambda z, lp, y, r: -lp.exp().detach() * lp),
    "ppo": (
        PolicyGradient("ppo", 0.2, 0.28),
        lambda z, lp, y, r: (
            -torch.minimum(
                (lp - r["old_logp"]).exp() * r["advantages"],
                (lp - r["old_logp"]).exp().clamp(0.8, 1.28) * r["advantages"],
            )
        ),
    ),
    "dual clip": (
        PolicyGradient("ppo", 0.2, 0.2, dual_clip=3.0),
        lambda z, lp, y, r: dual_clip(lp, r),
    ),
    "cispo": (
        PolicyGradient("cispo"),
        lambda z, lp, y, r: (
            -(lp - r["old_logp"]).exp().clamp(0.8, 1.2).detach() * r["advantages"] * lp
        ),
    ),
    "reinforce": (
        PolicyGradient("reinforce"),
        lambda z, lp, y, r: -r["advantages"] * lp,
    ),
    "k1": (ReferenceKL(0.1, "k1"), lambda z, lp, y, r: 0.1 * (lp - r["ref_logp"])),
    "k2": (
        ReferenceKL(0.1, "k2"),
        lambda z, lp, y, r: 0.05 * (lp - r["ref_logp"]) ** 2,
    ),
    "k3": (
        ReferenceKL(0.1),
        lambda z, lp, y, r: (
            0.1 * ((r["ref_logp"] - lp).exp() - 1 - (r["ref_logp"] - lp))
        ),
    ),
    "importance": (
        PolicyGradient("ppo", importance_cap=1.5),
        lambda z, lp, y, r: (
            (r["old_logp"] - r["generation_logp"]).exp().clamp(max=1.5)
            * -torch.minimum(
                (lp - r["old_logp"]).exp() * r["advantages"],
                (lp - r["old_logp"]).exp().clamp(0.8, 1.2) * r["advantages"],
            )
        ),
    ),
    "smoothed over others": (
        CrossEntropy(0.1, smooth_over="others"),
        lambda z, lp, y, r: (
            -0.9 * lp - 0.1 / (z.shape[1] - 1) * (z.log_softmax(1).sum(1) - lp)
        ),
    ),
    "collision": (
        Collision(0.7),
        lambda z, lp, y, r: 0.7 * z.softmax(1).square().sum(1),
    ),
    "unlikelihood": (
        Unlikelihood(0.6),
        lambda z, lp, y, r: (
            -0.6
            * torch.where(
                r["candidates"] >= 0,
                (1 - z.softmax(1).gather(1, r["candidates"].clamp(min=0))).log(),
                0.0,
            ).sum(1)
        ),
    ),
    "forward kl": (
        Distillation("forward_kl", weight=0.8),
        lambda z, lp, y, r: 0.8 * kl(r["teacher"], z),
    ),
    "reverse kl": (
        Distillation("reverse_kl"),
        lambda z, lp, y, r: kl(z, r["teacher"]),
    ),
    "jsd": (
        Distillation("jsd", beta=0.3),
        lambda z, lp, y, r: jsd(z, r["teacher"], 0.3),
    ),
    "jsd, 0": (
        Distillation("jsd", beta=0.0),
        lambda z, lp, y, r: kl(r["teacher"], z),
    ),
    "jsd, squared": (
        SquaredJSD(),
        lambda z, lp, y, r: jsd(z, r["teacher"], 0.5) ** 2,
    ),
    "soft cross entropy": (
        Distillation("soft_cross_entropy"),
        lambda z, lp, y, r: F.cross_entropy(
            z, r["teacher"].softmax(1), reduction="none"
        ),
    ),
    "a user's": (
        Squared(0.5),
        lambda z, lp, y, r: (
            0.5
            * (
                lp**2
                + torch.distributions.Categorical(logits=z).entropy()
                * -z.log_softmax(1).mean(1)
            )
        ),
    ),
}
MIXTURE = ("smoothed", "z-loss", "focal", "entropy", "ppo", "k3", "a user's")
EVERYTHING = (
    "cross entropy",
    "z-loss",
    "collision",
    "unlikelihood",
    "ppo",
    "jsd",
    "a user's",
)
SETS = [
    *((n,) for n in TERMS),
    ("entropy", "reverse kl"),
    ("smoothed", "entropy", "jsd"),
    MIXTURE,
    EVERYTHING,
]


def kl(of, to):
    """KL(softmax(of) | softmax(to)) of each row."""
    return F.kl_div(
        to.log_softmax(1), of.log_softmax(1), log_target=True, reduction="none"
    ).sum(1)


def jsd(z, teacher, beta):
    mixture = (beta * teacher.softmax(1) + (1 - beta) * z.softmax(1)).log()
    return beta * kl(teacher, mixture) + (1 - beta) * kl(z, mixture)


def dual_clip(lp, r):
    ratio = (lp - r["old_logp"]).exp()
    a = r["advantages"]
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    return torch.where(a < 0, torch.minimum(loss, -3.0 * a), loss)


def row_inputs(problem: Problem) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    logp = (problem.hidden @ problem.weight.T).log_softmax(1)
    logp = logp.gather(1, problem.labels.clamp(min=0)[:, None]).squeeze(1)
    noise = torch.randn(4, problem.T, generator=g, dtype=torch.float64)
    rows = {
        "advantages": noise[0],
        "old_logp": logp + 0.5 * noise[1],
        "ref_logp": logp + 0.5 * noise[2],
        "generation_logp": logp + 0.5 * noise[3],
        "teacher": torch.randn(problem.T, problem.V, generator=g, dtype=torch.float64),
    }
    for values in rows.values():  # what is not used may hold anything
        values[problem.labels == -100] = torch.nan
    # Some are missing, some come twice, and some are the label.
    candidates = torch.randint(-1, problem.V, (problem.T, 4), generator=g)
    candidates[:, 3] = candidates[:, 2]
    candidates[::5, 0] = problem.labels[::5].clamp(min=-1)
    return rows | {"candidates": candidates}


def inputs_of(names, rows):
    """What the call gets: only what the terms read, and a teacher is no number."""
    terms = [TERMS[name][0] for name in names]
    wanted = frozenset().union(*(term.inputs for term in terms))
    given = {name: rows[name] for name in rows if name in wanted}
    if any(isinstance(term, Distillation | SquaredJSD) for term in terms):
        given["teacher"] = Teacher(logits=rows["teacher"])
    return given


def truth_of(names, problem, rows, options, dtype=torch.float64, device="cpu"):
    rows = {name: values.to(device) for name, values in rows.items()}

    def loss_of(hidden, weight, labels):
        z = (hidden @ weight.T).to(torch.promote_types(dtype, torch.float32))
        if options.logit_softcap:
            z = options.logit_softcap * torch.tanh(z / options.logit_softcap)
        z = z / options.temperature
        valid = labels != -100
        z, y = z[valid], labels[valid]
        logp = z.log_softmax(1).gather(1, y[:, None]).squeeze(1)
        used = {name: values[valid] for name, values in rows.items()}
        return sum(TERMS[name][1](z, logp, y, used).sum() for name in names) / 7

    return problem.run(loss_of, dtype, device)


OPTIONS = [
    HeadLossOptions(),
    HeadLossOptions(temperature=0.7),
    HeadLossOptions(logit_softcap=2.0, temperature=1.5),
]
