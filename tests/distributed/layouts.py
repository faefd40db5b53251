"""The layouts that are checked: on how many ranks, and with which options."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """A layout and what is special about it."""

    name: str
    ranks: int
    options: str = ""
    """torchtitan's options, without `--`, separated by spaces."""
    model: str = "llama3.tiny"
    micro_batches: int = 2
    silent_rank: bool = False
    """The last data-parallel rank has no label in any micro-batch."""
    dtype: str = "float32"
    stock: bool = True
    """Whether stock torchtitan trains this layout at all."""
    gradient_factor: str = "1"
    """Stock's gradient / the true one. Its DDP averages sums over ranks."""
    gpu: bool = False
    """Needs GPUs: offloading, context and expert parallelism do in torchtitan 0.2.2."""


TP, FSDP = (
    "parallelism.tensor_parallel_degree",
    "parallelism.data_parallel_shard_degree",
)
REPLICATE = "parallelism.data_parallel_replicate_degree"
RESHARD = "parallelism.fsdp_reshard_after_forward"
CP, EP = "parallelism.context_parallel_degree", "parallelism.expert_parallel_degree"
AC = "activation_checkpoint.mode"
LIGER, IMPL = "liger_kernel.impl=liger", "liger_kernel.impl"
BF16 = "bfloat16"
BLOCKS_NEED_A_GPU = ("llama4", "deepseek_v3", "gpt_oss")
"""Their experts and their flex attention do in torchtitan 0.2.2. Elsewhere a block passes on
what it gets, and what is around the blocks is tested."""

CASES = (
    Case("one process", 1, stock=True),
    Case("one process, bf16 (AMP)", 1, dtype=BF16),
    Case("one process, bf16 parameters", 1, "training.dtype=bfloat16", dtype=BF16),
    Case("one process, Liger", 1, LIGER),
    Case("FSDP2", 2),
    Case("FSDP2, one micro-batch", 2, micro_batches=1),
    Case("FSDP2, a rank without labels", 2, silent_rank=True),
    Case("FSDP2, bf16", 2, dtype=BF16),
    Case("FSDP2, reshard always", 2, f"{RESHARD}=always"),
    Case("FSDP2, reshard never", 2, f"{RESHARD}=never"),
    Case("FSDP2, CPU offload", 2, "training.enable_cpu_offload", gpu=True),
    Case("FSDP2, full checkpointing", 2, f"{AC}=full"),
    Case(
        "FSDP2, selective checkpointing",
        2,
        f"{AC}=selective activation_checkpoint.selective_ac_option=op",
    ),
    Case("FSDP2, compiled", 2, "compile.enable"),
    Case("FSDP2, Liger", 2, LIGER),
    Case("FSDP2, reference", 2, f"{IMPL}=reference"),
    Case("FSDP2, Qwen 3", 2, model="qwen3.tiny"),
    Case("FSDP2, Llama 4", 2, model="llama4.tiny", dtype=BF16),
    Case("FSDP2, DeepSeek V3", 2, model="deepseek_v3.tiny", dtype=BF16),
    Case("FSDP2, GPT-OSS", 2, model="gpt_oss.tiny", dtype=BF16),
    Case("FSDP2, tied", 2, model="qwen3.tiny_tied", stock=False),
    Case("FSDP2, tied, bf16", 2, model="qwen3.tiny_tied", stock=False, dtype=BF16),
    Case("one process, tied", 1, model="qwen3.tiny_tied"),
    Case("DDP", 2, f"{REPLICATE}=2 {FSDP}=1", gradient_factor="1/2"),
    Case("DDP, Liger", 2, f"{REPLICATE}=2 {FSDP}=1 {LIGER}", gradient_factor="1/2"),
    Case(
        "DDP, bf16 (AMP)",
        2,
        f"{REPLICATE}=2 {FSDP}=1",
        dtype=BF16,
        gradient_factor="1/2",
    ),
    Case("TP", 2, f"{TP}=2"),
    Case("TP, no loss parallel", 2, f"{TP}=2 parallelism.disable_loss_parallel"),
    Case("HSDP", 4, f"{REPLICATE}=2 {FSDP}=2"),
    Case("HSDP, reshard always", 4, f"{REPLICATE}=2 {FSDP}=2 {RESHARD}=always"),
    Case("FSDP2 on 4", 4, silent_rank=True),
    Case("TP 4", 4, f"{TP}=4"),
    Case("FSDP2 x TP", 4, f"{TP}=2"),
    Case("FSDP2 x TP, bf16", 4, f"{TP}=2", dtype=BF16),
    Case("FSDP2 x TP, reshard always", 4, f"{TP}=2 {RESHARD}=always"),
    Case("FSDP2 x TP, a rank without labels", 4, f"{TP}=2", silent_rank=True),
    Case(
        "HSDP, tied", 4, f"{REPLICATE}=2 {FSDP}=2", model="qwen3.tiny_tied", stock=False
    ),
    Case("CP", 2, f"{CP}=2", dtype=BF16, gpu=True),
    Case("CP, Liger", 2, f"{CP}=2 {LIGER}", dtype=BF16, gpu=True),
    Case("FSDP2 x CP", 4, f"{CP}=2", dtype=BF16, gpu=True),
    Case("TP x CP", 4, f"{CP}=2 {TP}=2", dtype=BF16, gpu=True),
    Case("FSDP2 x EP", 2, f"{EP}=2", "deepseek_v3.debugmodel", dtype=BF16, gpu=True),
    Case(
        "FSDP2 x EP on 4", 4, f"{EP}=2", "deepseek_v3.debugmodel", dtype=BF16, gpu=True
    ),
)

# Terms whose inputs are in the batch.
RL = (
    "head_loss.policy_gradient.weight=0.5 head_loss.reference_kl.weight=0.1 "
    "head_loss.gspo.weight=0.2 head_loss.preference.weight=0.3 head_loss.kto.weight=0.4"
)

LAYOUTS = {  # of the checks beside the matrix
    "FSDP2": Case("FSDP2", 2),
    "FSDP2, bf16": Case("FSDP2, bf16", 2, dtype="bfloat16"),
    "FSDP2, bf16, reshard always": Case(
        "FSDP2, bf16, reshard always", 2, f"{RESHARD}=always", dtype="bfloat16"
    ),
    "FSDP2, bf16 parameters": Case(
        "FSDP2, bf16 parameters", 2, "training.dtype=bfloat16"
    ),
    "FSDP2, tied": Case("FSDP2, tied", 2, model="qwen3.tiny_tied", stock=False),
    "TP": Case("TP", 2, f"{TP}=2"),
    "DDP": Case("DDP", 2, f"{REPLICATE}=2 {FSDP}=1"),
    "TP, terms of the batch": Case("TP, terms of the batch", 2, f"{TP}=2 {RL}"),
}
