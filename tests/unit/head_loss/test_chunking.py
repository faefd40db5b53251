"""The plan is integer arithmetic, and its budget is a ceiling."""

from __future__ import annotations

import pytest

from torchtitan_liger.head_loss.chunking import MIB, budget_bytes, plan_chunks

SHAPES = [(16384, 128256), (1, 1), (257, 517), (4097, 32768), (131072, 262144)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("budget_mib", [1, 16, 256, 1024, 10**6])
def test_logits_stay_within_the_budget_and_every_token_is_in_a_chunk(shape, budget_mib):
    num_tokens, vocab_size = shape
    plan = plan_chunks(*shape, bytes_per_logit=6, budget=budget_mib * MIB)
    assert plan.tokens_per_chunk * plan.num_chunks >= num_tokens
    assert plan.tokens_per_chunk * (plan.num_chunks - 1) < num_tokens
    one_row = vocab_size * 6
    assert plan.logits_bytes <= max(budget_mib * MIB, one_row)
    assert plan.full_logits_bytes == num_tokens * vocab_size * 6


def test_fewer_tokens_take_no_more_than_the_plan_says_at_most():
    """They may be in fewer and larger chunks."""
    sizes = {"bytes_per_logit": 4, "budget": 1000 * 4 * 16}
    most = plan_chunks(30, 1000, **sizes).most_bytes
    fewer = [plan_chunks(n, 1000, **sizes).logits_bytes for n in range(1, 31)]
    assert max(fewer) == most > fewer[-1]
    assert "at most 0.1 MiB" in str(plan_chunks(30, 1000, **sizes))


def test_two_buffers_share_the_budget():
    plan = plan_chunks(16384, 32768, bytes_per_logit=2, budget=256 * MIB, num_buffers=2)
    assert (plan.tokens_per_chunk, plan.num_chunks) == (2048, 8)
    assert plan.logits_bytes == 256 * MIB
    assert plan.full_logits_bytes == 1024 * MIB


def test_a_budget_below_one_row_still_gives_one_row():
    plan = plan_chunks(8, 10**6, bytes_per_logit=4, budget=1)
    assert (plan.tokens_per_chunk, plan.num_chunks) == (1, 8)


def test_no_tokens():
    plan = plan_chunks(0, 100, bytes_per_logit=4, budget=MIB)
    assert plan.num_chunks == 0
    assert plan.tokens_per_chunk >= 1


def test_zero_is_the_default_of_the_device_and_a_number_is_itself():
    assert budget_bytes(7, "cuda", 10**6) == 7 * MIB
    assert budget_bytes(0, "cuda", 2 * 128256) == 8192 * 2 * 128256
    assert budget_bytes(0, "cuda", 10**6) == 2048 * MIB
    assert budget_bytes(0, "cpu", 4 * 32768) == 128 * MIB


def test_the_plan_reads_as_a_sentence():
    plan = plan_chunks(16384, 128256, bytes_per_logit=2, budget=1024 * MIB)
    assert str(plan) == (
        "at most 1023.8 MiB for logits (4 x 4096 tokens) where all logits would take "
        "3.91 GiB"
    )
