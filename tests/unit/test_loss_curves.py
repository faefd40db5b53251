from __future__ import annotations

import math

import pytest
from torch.utils.tensorboard import SummaryWriter

from torchtitan_liger.loss_curves import (
    GRAD_NORM,
    LOSS,
    PEAK_MEMORY_GIB,
    TOKENS_PER_SECOND,
    VALIDATION_LOSS,
    Run,
    Runs,
    align,
    parse_log,
    read_run,
    read_tensorboard,
    spread,
    write_tensorboard,
)

COLORS = {
    "step": "\x1b[31m",
    "loss": "\x1b[32m",
    "grad_norm": "\x1b[38;2;180;60;0m",
    "memory": "\x1b[38;2;54;234;195m",
}


def titan_log(
    losses,
    norms=None,
    *,
    first_step=1,
    calls=0,
    impl="stock",
    accumulation=1,
    steps=None,
    color=False,
    rank="[rank0]:",
    end=("Training completed",),
):
    """What torchtitan prints for a run with these losses, one per step."""

    def paint(key, text):
        return COLORS[key] + text if color else text

    last_step = steps or first_step + len(losses) - 1
    lines = [
        "Trainer is initialized with local batch size 8, global batch size "
        f"{8 * accumulation}, gradient accumulation steps {accumulation}, sequence "
        f"length 64, total steps {last_step} (warmup 10)",
        f"Training starts at step {first_step}",
    ]
    norms = norms or [1.0] * len(losses)
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), first_step):
        lines.append(
            f"{paint('step', f'step: {step:2}')}  {paint('loss', f'loss: {loss:8.5f}')}  "
            f"{paint('grad_norm', f'grad_norm: {norm:7.4f}')}  "
            f"{paint('memory', 'memory:  0.87GiB(3.69%)')}  tps: 2,345  tflops: 0.11  "
            "mfu: 0.03%" + ("\x1b[39m" if color else "")
        )
    lines += end
    if "Training completed" in end:
        lines.append(f"The LM head computed {calls} losses without logits ({impl})")
    stamp = f"{rank}[titan] 2026-11-20 16:01:55,387 - root - INFO - "
    return "".join(
        f"{rank}{line}\n" if line.startswith(("Traceback", " ")) else f"{stamp}{line}\n"
        for line in lines
    )


def write(folder, values, first_step=1):
    with SummaryWriter(folder) as writer:
        for step, value in enumerate(values, first_step):
            writer.add_scalar("loss", value, step)


# --- TensorBoard ---------------------------------------------------------------------


def test_scalars_by_tag_and_step(tmp_path):
    write(tmp_path / "tb" / "a", [3.0, 2.0, 1.5])
    assert read_tensorboard(tmp_path) == {"loss": {1: 3.0, 2: 2.0, 3: 1.5}}


def test_a_restart_replaces_the_steps_it_repeats(tmp_path):
    write(tmp_path / "a", [3.0, 2.0, 9.0])
    write(tmp_path / "b", [1.5, 1.0], first_step=3)
    assert read_tensorboard(tmp_path)["loss"] == {1: 3.0, 2: 2.0, 3: 1.5, 4: 1.0}


def test_a_restart_voids_all_later_steps(tmp_path):
    write(tmp_path / "b", [3.0, 2.0, 9.0, 9.0, 9.0])
    write(tmp_path / "a", [1.5], first_step=3)  # by time, not by name
    assert read_tensorboard(tmp_path)["loss"] == {1: 3.0, 2: 2.0, 3: 1.5}


def test_no_events_say_what_to_switch_on(tmp_path):
    with pytest.raises(FileNotFoundError, match="--metrics.enable_tensorboard"):
        read_tensorboard(tmp_path)


def test_of_several_ranks_the_first_counts(tmp_path):
    for rank in (1, 0, 10):
        write_tensorboard(tmp_path / f"rank_{rank}", {LOSS: {1: float(rank)}})
    run = read_run(tmp_path)
    assert run.curves == {LOSS: {1: 0.0}}
    assert run.restarts == ()


def test_what_is_written_is_read_again(tmp_path):
    curves = {LOSS: {1: 2.5, 7: math.inf}, GRAD_NORM: {3: 0.125}}
    write_tensorboard(tmp_path / "run", curves)
    assert read_tensorboard(tmp_path) == curves


# --- Logs ----------------------------------------------------------------------------


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("rank", ["", "[rank0]:", "[default0]:"])
def test_a_log_has_the_curves_of_tensorboard(color, rank):
    run = parse_log(titan_log([10.25, 9.5], [1.5, 0.75], color=color, rank=rank))
    assert run.curves == {
        LOSS: {1: 10.25, 2: 9.5},
        GRAD_NORM: {1: 1.5, 2: 0.75},
        PEAK_MEMORY_GIB: {1: 0.87, 2: 0.87},
        TOKENS_PER_SECOND: {1: 2345.0, 2: 2345.0},
        "tflops": {1: 0.11, 2: 0.11},
        "mfu(%)": {1: 0.03, 2: 0.03},
    }


def test_a_log_knows_how_finely_it_is_printed():
    run = parse_log(titan_log([10.25]))
    assert run.resolution[LOSS] == pytest.approx(1e-5)
    assert run.resolution[GRAD_NORM] == pytest.approx(1e-4)
    assert run.resolution[TOKENS_PER_SECOND] == 1


def test_a_line_that_was_cut_off_makes_no_curve_coarse():
    whole = titan_log([5.1, 5.2, 5.3])
    cut = whole[: whole.rindex("step:  3")]
    assert parse_log(cut + "step:  3  loss:  5").curves[LOSS] == {1: 5.1, 2: 5.2}
    resumed = titan_log([5.3], first_step=3)
    run = parse_log(cut + "step:  3  loss:  5\n" + resumed)
    assert run.curves[LOSS] == {1: 5.1, 2: 5.2, 3: 5.3}
    assert run.resolution[LOSS] == pytest.approx(1e-5)
    unfinished = titan_log([5.1]).removesuffix("\n")  # as a text editor saves it
    assert parse_log(unfinished).log.fused_calls == 0


def test_a_log_says_what_ran():
    log = parse_log(titan_log([5.0] * 3, calls=12, impl="liger", accumulation=4)).log
    assert (log.fused_calls, log.impl, log.finished) == (12, "liger", True)
    assert (log.local_batch_size, log.global_batch_size) == (8, 32)
    assert log.expected_calls == 12


def test_a_log_without_torchtitans_lines_expects_nothing():
    assert parse_log("hello\n").log.expected_calls is None


def test_validation_is_no_training_step():
    line = "[rank0]:validate step:  2  loss:  7.1234  memory:  0.87GiB(3.69%)  tps: 1,000\n"
    run = parse_log(titan_log([5.0, 4.0]) + line)
    assert run.curves[LOSS] == {1: 5.0, 2: 4.0}
    assert run.curves[VALIDATION_LOSS] == {2: 7.1234}
    assert run.restarts == ()


def test_nan_and_infinite_values_are_values():
    run = parse_log(titan_log([5.0, math.nan, math.inf], [1.0, -math.inf, 1.0]))
    assert math.isnan(run.curves[LOSS][2])
    assert run.curves[LOSS][3] == math.inf
    assert run.curves[GRAD_NORM][2] == -math.inf
    assert run.resolution[LOSS] == pytest.approx(1e-5)


def test_of_several_ranks_the_first_is_listened_to():
    a = titan_log([5.0, 4.0]).splitlines()
    b = titan_log([6.0, 7.0], rank="[rank1]:").splitlines()
    mixed = "\n".join(line for pair in zip(a, b, strict=True) for line in pair)
    run = parse_log(mixed)
    assert run.curves[LOSS] == {1: 5.0, 2: 4.0}
    assert run.restarts == ()


def test_a_restarted_log_counts_from_where_it_was_taken_up():
    killed = titan_log([5.0, 4.0, 9.0, 9.0], calls=9, steps=6, end=())
    error = "[rank0]:RuntimeError: NCCL\n"
    run = parse_log(killed + error + titan_log([3.0] * 4, first_step=3, calls=4))
    assert run.curves[LOSS] == {1: 5.0, 2: 4.0, 3: 3.0, 4: 3.0, 5: 3.0, 6: 3.0}
    assert run.restarts == (3,)
    assert run.crash == ""
    assert run.log.expected_calls == run.log.fused_calls == 4


def test_a_log_may_repeat_its_last_step_alone():
    killed = titan_log([5.0, 4.0], steps=3, end=())
    run = parse_log(killed + titan_log([3.5, 3.0], first_step=2))
    assert run.curves[LOSS] == {1: 5.0, 2: 3.5, 3: 3.0}
    assert run.restarts == (2,)


def test_a_crash_is_named_by_its_cause():
    traceback = (
        "Traceback (most recent call last):",
        "  torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 15.66 GiB.",
    )
    after = (
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
        "  traceback : Signal 9 (SIGKILL) received by PID 20485\n"
    )
    run = parse_log(titan_log([5.0], end=traceback) + after)
    assert run.crash.startswith("torch.OutOfMemoryError: CUDA out of memory. Tried")
    killed = parse_log(titan_log([5.0], end=()) + after)
    assert killed.crash == "Signal 9 (SIGKILL) received by PID 20485"


def test_an_option_that_does_not_exist_is_the_crash():
    log = (
        "[rank0]: ValueError: Unrecognized options: --trainin.seq_len, 64\n[rank0]: Per"
    )
    crash = "ValueError: Unrecognized options: --trainin.seq_len, 64"
    assert parse_log(log).crash == crash


def test_an_error_of_a_run_that_finished_is_no_crash():
    log = "ImportError: wandb\n" + titan_log([5.0])
    assert parse_log(log).crash == ""


def test_data_that_ends_ends_what_is_expected():
    end = ("Ran out of data; last step was canceled.", "Training completed")
    log = parse_log(titan_log([5.0] * 3, calls=3, steps=10, end=end)).log
    assert log.expected_calls == 3


# --- A run from a path ---------------------------------------------------------------


def test_a_folder_gives_events_and_log(tmp_path):
    write_tensorboard(tmp_path / "tb", {LOSS: {1: 10.123456789}})
    (tmp_path / "run.log").write_text(titan_log([10.12346, 9.5], calls=2, impl="liger"))
    (tmp_path / "other.log").write_text("")
    run = read_run(tmp_path, "on")
    assert run.name == "on"
    assert run.curves[LOSS][1] == pytest.approx(10.123456789, abs=1e-6)
    assert run.log.fused_calls == 2
    # A process that was killed had not written this one yet.
    assert run.curves[LOSS][2] == 9.5
    assert run.resolution[LOSS] == pytest.approx(1e-5)


def test_events_that_are_complete_are_not_rounded(tmp_path):
    write_tensorboard(tmp_path / "tb", {LOSS: {1: 10.123456789}})
    (tmp_path / "job.log").write_text(titan_log([10.12346]))
    assert LOSS not in read_run(tmp_path).resolution


def test_a_log_alone_an_event_file_alone(tmp_path):
    (tmp_path / "a.txt").write_text(titan_log([3.0]))
    assert read_run(tmp_path / "a.txt").curves[LOSS] == {1: 3.0}
    write_tensorboard(tmp_path / "tb", {LOSS: {1: 3.0}})
    (events,) = (tmp_path / "tb").iterdir()
    run = read_run(events)
    assert run.curves == {LOSS: {1: 3.0}}
    assert run.log is None


def test_restarts_are_found_in_events(tmp_path):
    write_tensorboard(tmp_path / "a", {LOSS: {1: 3.0, 2: 2.0, 3: 1.0}})
    write_tensorboard(tmp_path / "b", {LOSS: {3: 1.5}})
    assert read_run(tmp_path).restarts == (3,)


def test_what_cannot_be_read_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run at .*nowhere"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither TensorBoard events"):
        read_run(tmp_path)
    (tmp_path / "run.log").write_text("hello\n")
    with pytest.raises(ValueError, match="no line such as 'step:  1"):
        read_run(tmp_path)


def test_a_run_that_crashed_before_its_first_step_can_be_read(tmp_path):
    (tmp_path / "run.log").write_text("ValueError: no such flavor\n")
    assert read_run(tmp_path).crash == "ValueError: no such flavor"


# --- Aligning ------------------------------------------------------------------------


def make_run(name, values, first_step=1):
    return Run(name, {LOSS: dict(enumerate(values, first_step))})


def test_two_runs_are_aligned_at_common_steps():
    off = Run("off", {LOSS: {1: 5.0, 5: 4.0, 10: 3.0}})
    on = Run("on", {LOSS: {1: 5.0, 10: 3.5, 15: 2.0}})
    aligned = align(LOSS, Runs(off, on))
    assert aligned.steps == (1, 10)
    assert aligned.differences == (0.0, 0.5)
    assert all(map(math.isnan, aligned.noise))


def test_equal_infinities_and_nans_do_not_differ():
    values = [math.inf, math.nan, 1.0]
    aligned = align(LOSS, Runs(make_run("off", values), make_run("on", values)))
    assert aligned.differences == (0.0, 0.0, 0.0)


def test_the_noise_floor_never_falls_and_looks_two_steps_ahead():
    off, on = make_run("off", [1.0] * 8), make_run("on", [1.0] * 8)
    again = make_run("again", [1.0, 1.25, 1.0, 1.0, 1.0, 1.0, 1.5, 1.0])
    noise = align(LOSS, Runs(off, on, (again,))).noise
    assert noise == (0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5)


def test_the_noise_floor_is_the_larger_of_all_pairs():
    off, on = make_run("off", [1.0] * 3), make_run("on", [2.0] * 3)
    again, on_again = make_run("again", [1.25] * 3), make_run("on_again", [2.5] * 3)
    assert align(LOSS, Runs(off, on, (again,), (on_again,))).noise == (0.5, 0.5, 0.5)


def test_the_noise_floor_is_not_known_beyond_the_repetition():
    off, on = make_run("off", [1.0] * 4), make_run("on", [1.0] * 4)
    again = make_run("again", [1.25, 1.25], first_step=2)
    first, *known, last = align(LOSS, Runs(off, on, (again,))).noise
    assert math.isnan(first)
    assert known == [0.25, 0.25]
    assert math.isnan(last)


def test_a_repetition_that_is_not_finite_has_infinite_spread():
    values = spread(LOSS, make_run("a", [1.0, 2.0]), make_run("b", [1.5, math.nan]))
    assert values == {1: 0.5, 2: math.inf}
    assert spread(LOSS, make_run("a", [math.nan]), make_run("b", [1.0])) == {}
