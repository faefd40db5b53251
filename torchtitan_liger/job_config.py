"""What this package adds to torchtitan's job config, in TOML and on the command line.

torchtitan merges these classes into its own when a config says

    [job]
    custom_config_module = "torchtitan_liger.job_config"

Annotations must stay real types (no `from __future__ import annotations`): torchtitan's
merge looks at them.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class LigerKernel:
    enable_fused_linear_cross_entropy: bool = False
    """
    Compute the training loss from hidden states and the LM head's weight, without the
    [tokens, vocabulary] logits. When this is off, torchtitan's own loss runs, untouched.
    """

    impl: Literal["auto", "liger", "chunked", "reference"] = "auto"
    """
    What computes it:
    - "liger": Liger-Kernel's fused linear cross entropy (needs liger-kernel and a GPU).
    - "chunked": this package's engine, on any device and under tensor parallelism.
    - "reference": full logits in one piece, for debugging; saves no memory.
    - "auto": "liger" where it can run, else "chunked"; the log says which and why.
    """

    fallback: Literal["warn", "error"] = "warn"
    """
    What happens when Liger-Kernel is wanted ("auto" or "liger") but cannot be used here:
    "warn" trains with "chunked", "error" stops before the model is built.
    """

    logits_memory_mib: int = 0
    """
    The most memory, in MiB, for the logits that exist at one time. Fewer logits mean less
    memory and smaller matrix products. 0 picks the smallest size that costs no speed.
    """

    acc_dtype: Literal["float32", "bfloat16"] = "float32"
    """
    dtype in which the gradient of the head's weight is summed over the chunks. "bfloat16"
    saves 2 bytes for each element of the weight and loses precision with every chunk.
    """

    validation: bool = True
    """
    Validate without logits too, as a mean over all tokens with a label. When this is off,
    torchtitan's own validation runs: full logits, and a mean of the batches' means.
    """

    preflight: bool = True
    """
    Before the first step, compare loss and gradients of a few tokens with full logits in
    float64, on the real mesh, and stop if they differ.
    """


@dataclass
class Training:
    compile: bool = False
    """The older spelling of --compile.enable."""

    text_field: str = "text"
    """The field of a document that holds its text, for the dataset "jsonl"."""


@dataclass
class JobConfig:
    liger_kernel: LigerKernel = field(default_factory=LigerKernel)
    training: Training = field(default_factory=Training)
