"""Every Triton kernel compiles for a GPU, also where there is none.

The interpreter, by which the other tests run the kernels, takes programs that the compiler
refuses.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import torch

from tests.helpers import ROOT
from torchtitan_liger.head_loss import triton_sweeps
from torchtitan_liger.head_loss.statistics import (
    SUMS,
    WITHOUT_GRADIENT,
    Coefficients,
    Partials,
    sums_for,
    unpack,
)
from torchtitan_liger.head_loss.sweeps import Logits, Transform

C, V, K = 4, 5000, 2
KERNELS = [name for name in vars(triton_sweeps) if "_kernel" in name]
NEEDS = [
    set(),
    {"uniform_ce", "entropy", "p2", "logp_k"},
    {"kl_fwd"},
    {"kl_rev", "teacher_entropy", "entropy"},
    {"jsd"},
]
COEFFICIENTS = [
    set(),
    {"log_softmax", "square", "constant", "candidates"},
    {"teacher"},
    {"log_softmax", "log_teacher"},
    {"mixture"},
    set(Coefficients._fields),
]
IN_ONE_TRIP = [
    set(),
    {"uniform_ce"},
    {"kl_fwd"},
    {"kl_rev"},
    {"kl_fwd", "kl_rev"},
    {"kl_fwd", "teacher_entropy"},
]


def test_every_kernel_compiles():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert counts.keys() == set(KERNELS)


class Compiled:
    """Takes the place of a kernel: compiles it for the arguments that it gets."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(
        self, *args: Any, num_warps: int, maxnreg: int | None = None, **kwargs: Any
    ) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants = {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
            elif parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[(i,)] = value
            else:
                signature[parameter.name] = "i32"
        triton.compile(
            ASTSource(self.kernel, signature, constants, {}),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": num_warps, "maxnreg": maxnreg},
        )
        self.count += 1


POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}


def compile_all() -> None:
    for name in KERNELS:
        setattr(triton_sweeps, name, Compiled(getattr(triton_sweeps, name)))
    label, candidates = torch.zeros(C).long(), torch.zeros(C, K).long()
    transforms = Transform(), Transform(30.0, 0.7)
    dtypes = torch.bfloat16, torch.float64
    for dtype, transform in zip(dtypes, transforms, strict=True):
        logits = torch.zeros(C, V, dtype=dtype)
        teacher = Logits(torch.zeros(C, V, dtype=dtype), transform)
        wide = torch.promote_types(dtype, torch.float32)
        sums = unpack(SUMS, torch.zeros(len(SUMS) - 1 + K, C, dtype=wide))
        for needs in NEEDS:
            some = {name: sums[name] for name in sums_for(needs)}
            triton_sweeps.statistics_sweep(
                logits,
                label,
                transform,
                some,
                candidates_CK=candidates if "logp_k" in needs else None,
                teacher=teacher if "teacher_max" in some else None,
            )
        triton_sweeps._is_fast = lambda logits_Cv: logits_Cv.dtype.itemsize == 2
        row = torch.zeros(C, dtype=wide)
        for given in COEFFICIENTS:
            of_teacher = given & {"teacher", "log_teacher", "mixture"}
            given = {*given, "max", "sumexp", "softmax", "label"}
            given |= {"teacher_max", "teacher_sumexp"} if of_teacher else set()
            by = Coefficients(**dict.fromkeys(given, row))
            triton_sweeps.gradient_sweep(
                logits,
                label,
                transform,
                by,
                candidates_CK=candidates,
                teacher=teacher,
                jsd_beta=0.3,
            )
        triton_sweeps._can_wait = lambda _, dtype, __: dtype == torch.float32
        for part_columns in (V, 1024):
            triton_sweeps.MIXTURE_COLUMNS = part_columns
            triton_sweeps.mixture_sweep(logits, transform, teacher, sums, 0.3)
            of_softmaxes = "max", "sumexp", "teacher_max", "teacher_sumexp"
            for given in ((), ("log_softmax", "constant")):
                names = "softmax", "label", "mixture", *of_softmaxes, *given
                triton_sweeps.mixture_gradient_sweep(
                    logits,
                    label,
                    transform,
                    Coefficients(**dict.fromkeys(names, row)),
                    sums,
                    teacher=teacher,
                    jsd_beta=0.3,
                )
        for needs, part_columns in itertools.product(IN_ONE_TRIP, (V, 1024)):
            if dtype == torch.float64 and part_columns < V:
                continue  # a word has room for two float32
            triton_sweeps.TRIP_COLUMNS = part_columns
            some = {name: sums[name] for name in sums_for(needs)}
            with_teacher = teacher if "teacher_max" in some else None
            learned = dict.fromkeys(needs - WITHOUT_GRADIENT, row)
            for partials in Partials(row), Partials(row, **learned):
                triton_sweeps.one_trip_sweep(
                    logits, label, transform, some, partials, teacher=with_teacher
                )
    for source, target in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        out = torch.zeros(8, dtype=target)
        triton_sweeps.scale(torch.zeros(8, dtype=source), torch.ones(1), out)
    for name in KERNELS:
        print(name, getattr(triton_sweeps, name).count)


if __name__ == "__main__":
    compile_all()
