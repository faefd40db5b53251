"""A head that computes something else is refused before anything is sharded."""

from __future__ import annotations

from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchtitan.config import ConfigManager, JobConfig

from torchtitan_liger import models, parallelize
from torchtitan_liger.cli import FLAG_OFF, FLAG_ON
from torchtitan_liger.lm_head import LMHead
from torchtitan_liger.parallelize import check_degrees


class Quantized(torch.Tensor):
    """Such as torchao's, whose products are others."""


def quantize(head):
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Quantized))


def add_bias(head):
    head.bias = nn.Parameter(torch.zeros(head.out_features))


def replace_forward(head):
    head.forward = MethodType(lambda self, hidden: hidden @ self.weight.t() / 2, head)


def add_hook(head):
    head.register_forward_pre_hook(lambda _, args: (args[0] / 2, *args[1:]))


def unlike_the_model(head):
    return nn.Linear(head.in_features, head.out_features)


def add_forward_hook(head):
    head.register_forward_hook(lambda _head, _args, logits: logits / 2)


def add_backward_hook(head):
    head.register_full_backward_hook(lambda _head, d_inputs, _d_logits: d_inputs)


def add_backward_pre_hook(head):
    head.register_full_backward_pre_hook(lambda _head, d_logits: d_logits)


@pytest.mark.parametrize(
    ("convert", "found"),
    [
        (quantize, "one with a weight of Quantized"),
        (add_bias, "one with a bias"),
        (replace_forward, "one with another forward"),
        (add_hook, "one with hooks"),
        (add_forward_hook, "one with hooks"),
        (add_backward_hook, "one with hooks"),
        (add_backward_pre_hook, "one with hooks"),
        (weight_norm, r"ParametrizedLMHead\("),
        (unlike_the_model, r"Linear\(.*bias=True\)"),
    ],
)
def test_a_head_that_computes_something_else_is_refused(convert, found):
    models.register("llama3")
    job = ConfigManager().parse_args(
        [
            "--job.custom_config_module=torchtitan_liger.job_config",
            "--model.name=llama3",
            "--model.flavor=debugmodel",
            "--model.converters=mine",
            FLAG_ON,
            "--liger_kernel.impl=chunked",
        ]
    )
    model = nn.Module()
    model.output = LMHead.from_linear(nn.Linear(8, 16, bias=False))

    def shard_decoder(*_):
        raise AssertionError("sharded before it was looked at")

    with pytest.raises(AssertionError, match="before it was looked at"):
        parallelize_with(shard_decoder, model, job)
    model.output = LMHead.from_linear(nn.Linear(8, 16, bias=False))
    model.output = convert(model.output) or model.output
    with pytest.raises(ValueError, match=rf"(?s)is {found}.*\['mine'\].*{FLAG_OFF}"):
        parallelize_with(shard_decoder, model, job)


def parallelize_with(shard_decoder, model, job):
    model.tok_embeddings = nn.Embedding(16, 8)
    dims = SimpleNamespace(tp_enabled=False)
    parallelize.parallelize(shard_decoder, model, dims, job)


@pytest.mark.parametrize(
    ("degrees", "world_size", "message"),
    [
        ({"tensor": 2, "context": 2}, 4, None),
        ({"tensor": 2}, 8, None),
        ({"data_parallel_shard": 3}, 2, None),  # torchtitan says what is wrong
        ({"tensor": 3}, 2, "2 processes .* tensor_parallel_degree = 3$"),
        (
            {"tensor": 2, "data_parallel_replicate": 2},
            6,
            "6 processes .*replicate_degree = 2, tensor_parallel_degree = 2",
        ),
        ({"tensor": 0}, 2, "tensor_parallel_degree = 0"),
    ],
)
def test_degrees_that_leave_no_whole_number_of_ranks_are_named(
    degrees, world_size, message
):
    job = JobConfig()
    for name, degree in degrees.items():
        key = f"{name}_degree" if "data" in name else f"{name}_parallel_degree"
        setattr(job.parallelism, key, degree)
    if message is None:
        check_degrees(job, world_size)
        return
    with pytest.raises(ValueError, match=message):
        check_degrees(job, world_size)
