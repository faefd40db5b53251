"""What this package adds to torchtitan's job config, in TOML and on the command line.

torchtitan merges these classes into its own when a config says

    [job]
    custom_config_module = "torchtitan_liger.job_config"

Annotations must stay real types (no `from __future__ import annotations`): torchtitan's
merge looks at them.

`HeadLoss` has a table for each term of the loss. Its keys are the arguments of the term
that `head_loss_config.TERMS` names for it.
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
class CrossEntropy:
    weight: float = 1.0
    """Factor in the loss. 0 reports the cross entropy and leaves the gradients alone."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over the whole vocabulary, in [0, 1)."""

    smooth_over: Literal["all", "others"] = "all"
    """Whether that share is for all token ids, as in torch, or for all but the label."""


@dataclass
class ZLoss:
    weight: float | None = None
    """
    Factor of the squared log-sum-exp of the logits (PaLM uses 1e-4). None: the term is
    not there; 0: it is reported and leaves the gradients alone. So for every term below.
    """


@dataclass
class Focal:
    weight: float | None = None
    """Factor of -(1 - p) ** gamma * log p, with the probability p of the label."""

    gamma: float = 2.0
    """How much less tokens count that are right already, at least 0."""


@dataclass
class EntropyBonus:
    weight: float | None = None
    """Factor of minus the entropy: keeps the distribution wide."""


@dataclass
class SelfWeighted:
    weight: float | None = None
    """Factor of -p log p with p as a constant weight: confident tokens count more."""


@dataclass
class PolicyGradient:
    weight: float | None = None
    """
    Factor of the policy gradient. Reads `advantages` from the batch and, but for
    "reinforce" without an `importance_cap`, `old_logp`.
    """

    kind: Literal["ppo", "cispo", "reinforce"] = "ppo"
    """The clipped ratio of PPO, GRPO and DAPO, that of CISPO, or no ratio."""

    clip_low: float = 0.2
    """The ratio is bounded from below by 1 - clip_low."""

    clip_high: float = 0.2
    """The ratio is bounded from above by 1 + clip_high."""

    dual_clip: float | None = None
    """Bound of the loss of a negative advantage, above 1. None: no bound."""

    importance_cap: float | None = None
    """
    Bound of exp(old_logp - generation_logp), by which tokens are weighted where another
    policy generated them. Reads `generation_logp`, too. None: no such weights.
    """


@dataclass
class ReferenceKL:
    weight: float | None = None
    """Factor of the distance from a reference policy. Reads `ref_logp` from the batch."""

    kind: Literal["k1", "k2", "k3"] = "k3"
    """Its estimate, with d = ref_logp - log p: -d, d ** 2 / 2 or exp(d) - 1 - d."""


@dataclass
class Collision:
    weight: float | None = None
    """Factor of the sum of the squared probabilities."""


@dataclass
class Unlikelihood:
    weight: float | None = None
    """
    Factor of -log(1 - p), summed over the token ids in `candidates` [B, L, K] of the batch;
    -1 is none.
    """

    floor: float = 1e-5
    """1 - p is held above this."""


@dataclass
class Distillation:
    weight: float | None = None
    """Factor of the distance from a teacher. Reads `teacher_logits` [B, L, V]."""

    kind: Literal["forward_kl", "reverse_kl", "jsd", "soft_cross_entropy"] = (
        "forward_kl"
    )
    """KL(teacher | student), KL(student | teacher), Jensen-Shannon, or cross entropy."""

    beta: float = 0.5
    """The teacher's share of the mixture in "jsd", in [0, 1]."""


@dataclass
class SequencePolicyGradient:
    weight: float | None = None
    """
    Factor of GSPO's policy gradient: one ratio for each row of the batch. Reads
    `advantages` and `old_logp`.
    """

    clip_low: float = 3e-4
    """The ratio is bounded from below by 1 - clip_low."""

    clip_high: float = 4e-4
    """The ratio is bounded from above by 1 + clip_high."""


@dataclass
class Preference:
    weight: float | None = None
    """
    Factor of the preference of one row of the batch to another, summed over pairs.
    Reads `ref_logp` for "dpo" and "ipo".
    """

    kind: Literal["dpo", "cpo", "ipo", "simpo", "orpo"] = "dpo"
    """Which loss of the family."""

    beta: float = 0.1
    """How much the margin between the two counts."""

    gamma: float = 0.5
    """The margin that "simpo" asks for."""

    layout: Literal["pairs", "halves"] = "pairs"
    """Whether each chosen row is followed by its rejected one, or all chosen by all."""


@dataclass
class UnpairedPreference:
    weight: float | None = None
    """
    Factor of KTO: desirable rows of the batch likelier than a reference, others less, summed
    over rows. Reads `ref_logp`, `desirable` and `reference_point`.
    """

    beta: float = 0.1
    """How much a row's log ratio to the reference counts."""

    desirable_weight: float = 1.0
    """Factor of desirable rows."""

    undesirable_weight: float = 1.0
    """Factor of others."""


@dataclass
class HeadLoss:
    logit_softcap: float = 0.0
    """Bound of the logits by tanh (Gemma 2 uses 30). 0: off."""

    temperature: float = 1.0
    """Divides the logits, after the softcap; a teacher's logits too."""

    cross_entropy: CrossEntropy = field(default_factory=CrossEntropy)
    z_loss: ZLoss = field(default_factory=ZLoss)
    focal: Focal = field(default_factory=Focal)
    entropy_bonus: EntropyBonus = field(default_factory=EntropyBonus)
    self_weighted: SelfWeighted = field(default_factory=SelfWeighted)
    policy_gradient: PolicyGradient = field(default_factory=PolicyGradient)
    reference_kl: ReferenceKL = field(default_factory=ReferenceKL)
    collision: Collision = field(default_factory=Collision)
    unlikelihood: Unlikelihood = field(default_factory=Unlikelihood)
    distillation: Distillation = field(default_factory=Distillation)
    gspo: SequencePolicyGradient = field(default_factory=SequencePolicyGradient)
    preference: Preference = field(default_factory=Preference)
    kto: UnpairedPreference = field(default_factory=UnpairedPreference)


@dataclass
class Training:
    compile: bool = False
    """The older spelling of --compile.enable."""

    text_field: str = "text"
    """The field of a document that holds its text, for the dataset "jsonl"."""


@dataclass
class JobConfig:
    liger_kernel: LigerKernel = field(default_factory=LigerKernel)
    head_loss: HeadLoss = field(default_factory=HeadLoss)
    training: Training = field(default_factory=Training)
