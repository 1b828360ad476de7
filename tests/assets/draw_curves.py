"""Draw a run's TensorBoard curves, as the README shows them: python draw_curves.py RUN PICTURE."""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tst_ray.curves import curves_folder
from tst_ray.storage import Storage

CURVES = (
    ("loss/train", "training loss, nats"),
    ("loss/validation", "validation loss, nats"),
    ("tokens/data", "data tokens, cumulative"),
    ("run/world_size", "workers"),
)


def main(run: str, picture: str) -> None:
    board = EventAccumulator(curves_folder(Storage(run)).path, size_guidance={"scalars": 0})
    board.Reload()
    switch = next((point.step for point in board.Scalars("run/phase") if point.value > 1), None)
    figure, axes = plt.subplots(1, len(CURVES), figsize=(15, 3.4), layout="constrained")
    for axis, (tag, title) in zip(axes, CURVES, strict=True):
        points = board.Scalars(tag)
        axis.plot([p.step for p in points], [p.value for p in points], color="#ff7043", lw=1)
        if switch is not None:
            axis.axvline(switch, color="#9e9e9e", ls="--", lw=0.8)
        axis.set_title(f"{tag}: {title}", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
