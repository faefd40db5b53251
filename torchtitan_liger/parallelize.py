"""The decoder is parallelized by torchtitan, the LM head by us.

torchtitan's plans expect logits from the head. So the head is taken away while
torchtitan's own function runs, as on a pipeline stage without a head, and then gets its
own layout: vocabulary sharded under tensor parallelism, an FSDP group of its own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard, distribute_tensor
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.infra.parallelize import disable_fsdp_gradient_division
from torchtitan.tools.utils import device_module, device_type

from torchtitan_liger.cli import FLAG_OFF
from torchtitan_liger.config_validator import resolve
from torchtitan_liger.lm_head import LMHead


def check_degrees(job: JobConfig, world_size: int) -> None:
    """
    Raises:
        ValueError: for degrees that leave no whole number of ranks to FSDP, which
            torchtitan only asserts.
    """
    config = job.parallelism
    degrees = {
        name: getattr(config, name)
        for name in (
            "data_parallel_replicate_degree",
            "context_parallel_degree",
            "tensor_parallel_degree",
            "pipeline_parallel_degree",
        )
    }
    product = math.prod(degrees.values())
    if config.data_parallel_shard_degree >= 0 or (
        product and world_size % product == 0
    ):
        return
    named = ", ".join(f"{n} = {d}" for n, d in degrees.items() if d != 1)
    raise ValueError(
        f"there are {world_size} processes (NGPU), which is no multiple of the degrees of "
        f"parallelism: {named}"
    )


def parallelize(
    parallelize_decoder: Callable[..., nn.Module],
    model: nn.Module,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
) -> nn.Module:
    """Parallelize `model`, whose decoder torchtitan shards by `parallelize_decoder`.

    With the fused loss off, this is torchtitan's function alone.

    Raises:
        ValueError: for a job that cannot have the fused loss, or a head that is no plain
            linear layer.
    """
    plan = resolve(job_config)
    if not plan.enabled:
        model = parallelize_decoder(model, parallel_dims, job_config)
    else:
        head = _plain_head(model, job_config)
        model = _parallelize_around_head(
            parallelize_decoder, model, head, parallel_dims, job_config
        )
        head.head_loss = plan.head_loss()
        head.gather_logits = job_config.parallelism.disable_loss_parallel
    if device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gloo has no scaled sum
                module.set_force_sum_reduction_for_comms(True)
    return model


def _plain_head(model: nn.Module, job_config: JobConfig) -> LMHead:
    """
    Raises:
        ValueError: for a head that computes something else, by the model's own code or by
            a converter.
    """
    head = model.output
    if type(head) is LMHead:
        weight = type(head.weight.data)  # a subclass may have products of its own
        if weight not in (torch.Tensor, FakeTensor):
            found = f"one with a weight of {weight.__name__}"
        elif head.bias is not None:
            found = "one with a bias"
        elif "forward" in vars(head):
            found = "one with another forward"
        elif (
            head._forward_pre_hooks
            or head._forward_hooks
            or head._backward_pre_hooks
            or head._backward_hooks
        ):
            found = "one with hooks"
        else:
            return head
    else:
        found = str(head)
    converters, keep = job_config.model.converters, ""
    if converters:
        keep = (
            f"keep model.converters = {converters} away from it (torchtitan's have "
            "filter_fqns = ['output']), or "
        )
    raise ValueError(
        f"the LM head is {found}, and only a plain torch.nn.Linear without bias can compute "
        f"its loss without logits: {keep}turn the fused loss off ({FLAG_OFF})"
    )


def early_gather(model: nn.Module) -> Callable[[], None]:
    """Call before the decoder; call what it gives right before the head.

    A head that is called after the model is a model of its own to FSDP, which would have
    its gather wait for all work before it, as for an optimizer's step: the whole decoder.
    It need wait for no more than the decoder itself did.
    """
    if not isinstance(model, FSDPModule) or device_type == "cpu":
        return lambda: None
    # The head takes it: it must not be there when an optimizer has made a step.
    return partial(
        model.set_post_optim_event, device_module.current_stream().record_event()
    )


def gather_last_norm(model: nn.Module) -> None:
    """Call when a step's batches are there, while the optimizer's kernels still run.

    Without a head, torchtitan leaves the last norm to the FSDP group of the whole model,
    and nothing hides that group's gather at the start of a forward pass. Not before the
    model's first one, in which FSDP finds out what belongs together; nor before a batch is
    fetched, since a data pipeline may change the weights.
    """
    if isinstance(model, FSDPModule):
        model.unshard()


def shard_last_norm(model: nn.Module) -> None:
    """Call after a step that failed; undoes `gather_last_norm`.

    A checkpoint may follow, which has the optimizer's parameters. And the group of the
    whole model is reduced last: what a backward pass that failed has left in the gathered
    norm, where nobody's `zero_grad` finds it, would be part of the next step.
    """
    if isinstance(model, FSDPModule):
        before = list(model.parameters())
        model.reshard()
        sharded = set(model.parameters())
        for parameter in before:
            if parameter not in sharded:
                parameter.grad = None


def _parallelize_around_head(
    parallelize_decoder: Callable[..., nn.Module],
    model: nn.Module,
    head: LMHead,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
) -> nn.Module:
    # An embedding that shares the head's weight must share its FSDP group as well.
    embeddings = model.get_submodule("tok_embeddings")
    tied = head.weight is embeddings.weight
    model.register_module("output", None)
    if tied:
        model.register_module("tok_embeddings", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Parallelize plan key .*output")
        model = parallelize_decoder(model, parallel_dims, job_config)
    if parallel_dims.tp_enabled:
        head.tp_mesh = parallel_dims.get_mesh("tp")
        head.weight = nn.Parameter(
            distribute_tensor(head.weight, head.tp_mesh, [Shard(0)]),
            requires_grad=head.weight.requires_grad,
        )
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        _shard_data_parallel(
            [embeddings, head] if tied else [head], parallel_dims, job_config
        )
        # The head's backward pass is too short to gather the last block meanwhile: its
        # gradients are there already. torchtitan's own has two products.
        *_, last_block = model.get_submodule("layers").children()
        policy = job_config.parallelism.fsdp_reshard_after_forward
        if isinstance(last_block, FSDPModule) and policy == "default":
            last_block.set_reshard_after_forward(False, recurse=False)
    model.register_module("output", head)
    if tied:
        model.register_module("tok_embeddings", embeddings)
    return model


def _shard_data_parallel(
    modules: list[nn.Module], parallel_dims: ParallelDims, job_config: JobConfig
) -> None:
    names = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    training = job_config.training
    fully_shard(
        modules[0] if len(modules) == 1 else modules,
        mesh=parallel_dims.get_mesh([*names, "fsdp"]),
        mp_policy=MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            # The hidden states come in this dtype already; what else a loss takes
            # (a normalizer, weights of tokens) must keep its own.
            cast_forward_inputs=False,
        ),
        offload_policy=(
            CPUOffloadPolicy() if training.enable_cpu_offload else OffloadPolicy()
        ),
        # Backward needs the head's weight right after forward.
        reshard_after_forward=(
            job_config.parallelism.fsdp_reshard_after_forward == "always"
        ),
    )
    for module in modules:
        disable_fsdp_gradient_division(module)
