"""Training on several processes: every row of the matrix, and the checks beside it.

Each world size is one launch; its results are looked at by many tests.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.fsdp import FSDPModule

from tests.distributed.layouts import CASES, Case
from tests.distributed.matrix import DEVICE
from tests.distributed.preflight_checks import PLANTED
from tests.helpers import ROOT, python_env, run_command

# A sum in float32 in another order, and what a tied model may lose in bfloat16, for which
# stock torchtitan has no figure.
FLOOR = {"float32": 2e-6, "bfloat16": 3e-2}


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Run a module on some processes; what it wrote, and its log."""

    @functools.cache
    def launch(module: str, ranks: int) -> tuple[Any, str]:
        output: Path = tmp_path_factory.mktemp("launch") / "results.json"
        run = run_command(
            sys.executable,
            *("-m", "torch.distributed.run", f"--nproc_per_node={ranks}"),
            *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
            *("-m", module, "--output", output),
            # Liger's own kernels, on the CPU.
            env=python_env(TRITON_INTERPRET="1" if DEVICE == "cpu" else None),
            cwd=ROOT,
        )
        assert output.exists(), run.stdout[-5000:]
        return json.loads(output.read_text()), run.stdout

    return launch


def runs_here(case: Case) -> bool:
    return DEVICE == "cpu" and not case.gpu


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in CASES if runs_here(c)], ids=lambda c: f"{c.ranks}: {c.name}"
)
def test_fused_is_as_exact_as_stock_and_both_as_one_process(case, launch):
    rows, log = launch("tests.distributed.matrix", case.ranks)
    found = [row for row in rows if row["case"] == case.name]
    assert found, log[-3000:]
    (row,) = found
    assert "error" not in row, row
    for name, error in row["fused"].items():
        stock = row["stock"][name] if case.stock else FLOOR[case.dtype]
        assert error <= max(2 * stock, FLOOR["float32"]), (name, row)


@pytest.mark.slow
def test_a_vocabulary_in_uneven_and_empty_shards_is_exact(launch):
    errors = launch("tests.distributed.checks", 2)[0]["sharded_vocabulary"]
    assert len(errors) == 8
    assert max(errors.values()) < 1e-12


@pytest.mark.slow
def test_a_mixture_of_terms_over_uneven_and_empty_shards_is_exact(launch):
    assert launch("tests.distributed.checks", 2)[0]["sharded_terms"] < 1e-12


@pytest.mark.slow
def test_the_function_over_a_group_is_as_on_one_process(launch):
    errors = launch("tests.distributed.checks", 2)[0]["function_over_a_group"]
    assert len(errors) == 12
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.slow
def test_a_weight_of_another_size_is_an_error(launch):
    said = launch("tests.distributed.checks", 2)[0]["resized_weight"]
    assert said.startswith("the weight had 11 rows")


@pytest.mark.slow
def test_a_chunk_has_one_collective_whatever_the_terms_and_a_jsd_one_more(launch):
    counts = launch("tests.distributed.checks", 2)[0]["collectives_of_a_call"]
    assert counts.pop("mixture, JSD") == {"allgather_": 4, "allreduce_": 4}
    assert len(counts) == 5
    assert all(count == {"allgather_": 4} for count in counts.values()), counts


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["FSDP2", "TP"])
def test_terms_that_read_the_batch_are_logged_as_one_process_has_them(layout, launch):
    errors = launch("tests.distributed.checks", 2)[0]["terms_of_the_batch"]
    assert errors[layout] < 1e-5


@pytest.mark.slow
def test_context_parallelism_cuts_tensors_of_the_batch_as_the_labels(launch):
    assert launch("tests.distributed.checks", 2)[0]["context_parallel_rows"]


@pytest.mark.slow
def test_preflight_says_which_terms_it_leaves_out(launch):
    lines = launch("tests.distributed.checks", 2)[0]["preflight_passes"]
    line = lines["TP, terms of the batch"]
    assert line.startswith("Preflight passed: chunked head in")
    assert " without policy_gradient, reference_kl, gspo, preference, kto, " in line


@pytest.mark.slow
def test_uneven_shards_cut_their_tokens_alike(launch):
    error = launch("tests.distributed.checks", 2)[0]["uneven_shards_in_many_chunks"]
    assert error < 1e-12


@pytest.mark.slow
def test_a_weight_that_fsdp_has_not_gathered_is_no_vocabulary_shard(launch):
    said = launch("tests.distributed.checks", 2)[0]["head_that_fsdp_did_not_gather"]
    assert "Give the head a fully_shard of its own" in said


@pytest.mark.slow
def test_a_head_of_dtensors_takes_hidden_states_in_any_layout(launch):
    errors = launch("tests.distributed.checks", 2)[0]["head_of_dtensors"]
    assert len(errors) == 4
    assert max(errors.values()) < 1e-12


@pytest.mark.slow
def test_a_label_that_is_no_word_is_an_error_on_every_shard(launch):
    said = launch("tests.distributed.checks", 2)[0]["bad_labels"]
    assert said.startswith("labels[5] is 101")


@pytest.mark.slow
def test_fsdp_gathers_and_reduces_once_per_group_whatever_the_chunks(launch):
    counts = launch("tests.distributed.checks", 2)[0]["communication"]["FSDP2"]
    assert counts["1"] == counts["4"]
    micro_batches = 2
    # Embedding, two blocks, head, and the rest: each reduced once. Embedding and first
    # block are gathered again for backward; the weights of the others are still there.
    assert counts["1"]["_reduce_scatter_base_"] == 5 * micro_batches
    assert counts["1"]["_allgather_base_"] == (2 * 2 + 3) * micro_batches


@pytest.mark.slow
def test_fsdp_keeps_two_batches_apart_until_their_backward_pass(launch):
    error = launch("tests.distributed.checks", 2)[0][
        "two_batches_and_one_backward_pass"
    ]
    assert error < 1e-6


@pytest.mark.slow
def test_the_last_norm_is_gathered_when_a_data_pipeline_has_changed_it(launch):
    found = launch("tests.distributed.checks", 2)[0][
        "weights_changed_by_a_data_pipeline"
    ]
    assert found["factor"] == [16, 16]  # two steps of two batches
    # Of the second step, by the last batch; the first step's forward pass finds the groups.
    assert found["gathered"] == [False, False, False, True]
    assert found["sharded after a failure"]


@pytest.mark.slow
def test_the_validation_loss_is_that_of_one_process(launch):
    found = launch("tests.distributed.checks", 2)[0]["validation"]
    assert set(found) == {"FSDP2", "TP", "TP, with logits"}
    for name, (loss, truth) in found.items():
        assert loss == pytest.approx(truth, rel=1e-6), name


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"),
    reason="FSDP of this torch cannot go on after a pass that failed",
)
def test_nothing_of_a_backward_pass_that_failed_is_in_the_next_one(launch):
    error = launch("tests.distributed.checks", 2)[0]["a_backward_pass_that_fails"]
    assert error < 1e-6


@pytest.mark.slow
def test_tensor_parallelism_has_one_collective_per_chunk(launch):
    counts = launch("tests.distributed.checks", 2)[0]["communication"]["TP"]
    one, four = counts["1"], counts["4"]
    assert (one.pop("allgather_"), four.pop("allgather_")) == (1 * 2, 4 * 2)
    # The rest does not grow, the reduction of the hidden states' gradient included.
    assert one == four


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["FSDP2", "FSDP2, bf16", "FSDP2, tied", "TP", "DDP"])
def test_preflight_passes_and_leaves_no_trace(layout, launch):
    line = launch("tests.distributed.checks", 2)[0]["preflight_passes"][layout]
    assert line.startswith("Preflight passed: chunked head in")


@pytest.mark.slow
def test_preflight_leaves_compiled_code_alone(launch):
    assert launch("tests.distributed.checks", 2)[0]["preflight_compiles_nothing"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["FSDP2", "TP", "early step"])
def test_preflight_finds_logits_that_one_rank_changes(layout, launch):
    said = launch("tests.distributed.checks", 2)[0]["preflight_of_changed_logits"]
    assert said[layout].startswith("the model changes the logits"), said


@pytest.mark.slow
def test_ranks_with_other_implementations_are_named(launch):
    said = launch("tests.distributed.checks", 2)[0]["ranks_of_two_minds"]
    assert "rank 0 says: Using the chunked" in said
    assert "rank 1: Using the reference" in said


@pytest.mark.slow
def test_preflight_passes_where_parts_are_frozen(launch):
    lines = launch("tests.distributed.checks", 2)[0]["preflight_of_frozen_parts"]
    assert len(lines) == 4
    for options, line in lines.items():
        assert line.startswith("Preflight passed: chunked head in")
        assert ("d_weight" in line) == options.endswith("FrozenDecoder")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "error"), PLANTED, ids=lambda x: getattr(x, "__name__", x)
)
def test_preflight_catches_a_planted_error_and_names_the_layout(layout, error, launch):
    said = launch("tests.distributed.checks", 2)[0]["preflight_catches"]
    line = said[f"{layout}: {error.__name__}"]
    assert line.startswith("caught: Preflight FAILED: chunked head in"), line
    name = {"TP": "tp 2", "DDP": "dp_replicate 2"}.get(layout, "dp_shard 2")
    assert f" on {name}," in line
