"""Training curves: read from TensorBoard, per tag and step."""

from __future__ import annotations

from pathlib import Path

LOSS = "loss_metrics/global_avg_loss"
GRAD_NORM = "grad_norm"
TOKENS_PER_SECOND = "throughput(tps)"
PEAK_MEMORY_GIB = "memory/max_reserved(GiB)"

Curves = dict[str, dict[int, float]]
"""Tag -> step -> value."""


def read_tensorboard(folder: str | Path) -> Curves:
    """All scalars under `folder`, of any depth.

    Where several event files hold a step (a restart), the last one written counts.

    Raises:
        FileNotFoundError: when there is no event file.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(
        Path(folder).rglob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime
    )
    if not files:
        raise FileNotFoundError(
            f"no TensorBoard events under {folder}; was the run started with "
            "--metrics.enable_tensorboard?"
        )
    curves: Curves = {}
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            curve = curves.setdefault(tag, {})
            curve.update({event.step: event.value for event in events.Scalars(tag)})
    return curves
