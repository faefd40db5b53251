from __future__ import annotations

import pytest
import torch

from torchtitan_liger.head_loss import (
    CrossEntropy,
    Distillation,
    HeadLossOptions,
    PolicyGradient,
    Preference,
    ReferenceKL,
    SequencePolicyGradient,
    SequenceTerm,
    Unlikelihood,
    UnpairedPreference,
    ZLoss,
)
from torchtitan_liger.head_loss_plan import FOR_TERMS, HeadLossPlan, inputs_of

TOKENS = torch.zeros(2, 8, dtype=torch.long)
ROWS = torch.zeros(2, 8)
PLAIN = HeadLossPlan("chunked", HeadLossOptions())
PPO = HeadLossPlan(
    "chunked", HeadLossOptions(), (CrossEntropy(weight=0.0), PolicyGradient())
)


def test_the_decoder_gets_what_is_for_no_term():
    batch = dict.fromkeys(("old_logp", "advantages", "token_weights"), ROWS)
    rows, rest = PPO.split_batch({"input": TOKENS, "positions": TOKENS, **batch})
    assert rows.keys() == batch.keys()
    assert list(rest) == ["input", "positions"]
    assert PPO.check_batch({"input": TOKENS, **batch}) == []
    rows, rest = PLAIN.split_batch({"input": TOKENS, "mine": TOKENS, **batch})
    assert list(rows) == ["token_weights"]
    assert list(rest) == ["input", "mine"]


def test_what_is_for_terms_is_what_any_term_may_read():
    terms = [PolicyGradient(importance_cap=2.0), Distillation(), Unlikelihood()]
    terms += [ReferenceKL(1.0), SequencePolicyGradient(), Preference()]
    terms += [UnpairedPreference()]
    read = set[str]().union(*map(inputs_of, terms))
    assert read | {"token_weights"} == FOR_TERMS


def test_a_missing_tensor_is_named_with_its_reader_and_what_is_there():
    with pytest.raises(
        ValueError,
        match="the batch has no old_logp, which head_loss.policy_gradient reads; "
        "it has advantages, input, ref_logp. .* or leave head_loss.policy_gradient out",
    ):
        PPO.check_batch({"advantages": ROWS, "ref_logp": ROWS, "input": TOKENS})


def test_a_forgotten_term_is_noticed():
    batch = dict.fromkeys(("old_logp", "advantages", "ref_logp"), ROWS)
    with pytest.raises(ValueError, match="has advantages, old_logp, ref_logp, but no"):
        PLAIN.check_batch({"input": TOKENS, **batch})
    PLAIN.check_batch({"input": TOKENS, "token_weights": ROWS, "mine": ROWS})
    # Which may do without a reference.
    assert PPO.check_batch({"input": TOKENS, **batch}) == ["ref_logp"]


def test_liger_knows_no_token_weights():
    plan = HeadLossPlan("liger", HeadLossOptions())
    plan.check_batch({"input": TOKENS})
    with pytest.raises(ValueError, match="--liger_kernel.impl chunked"):
        plan.check_batch({"token_weights": ROWS, "input": TOKENS})


def test_validation_is_by_cross_entropy_alone():
    options = HeadLossOptions(logit_softcap=30.0)
    terms = (CrossEntropy(0.1), ZLoss(1e-4))
    loss = HeadLossPlan("liger", options, terms).plain_cross_entropy()
    assert loss.terms == (CrossEntropy(),)
    assert loss.options == options
    assert PPO.plain_cross_entropy().terms == (CrossEntropy(),)


@pytest.mark.parametrize("term", [CrossEntropy(), SequencePolicyGradient()])
def test_labels_are_counted_as_the_terms_need_them(term):
    labels_BL = torch.tensor([[1, -100, 2], [-100, -100, -100]])
    plan = HeadLossPlan("chunked", HeadLossOptions(), (term,))
    counted = plan.count_labels(labels_BL)
    assert counted == ([2, 0] if isinstance(term, SequenceTerm) else 2)
