"""Folders of finished runs whose curves are known."""

import csv
import json

import yaml


def leave_run(
    folder,
    variant,
    losses,
    *,
    each=100,
    pace=0.1,
    seed=0,
    size=100,
    every=1,
    reason="BUDGET",
    val=(),
    **more,
):
    """A run's folder with known curves: row i after (i + 1)·every updates of `each` examples."""
    folder.mkdir(parents=True)
    config = {"variant": variant, "seed": seed, "data": {"name": "known", "seed": seed}}
    config |= more.get("settings", {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    updates = len(losses) * every
    summary = {
        "variant": variant,
        "updates": updates,
        "examples_seen": updates * each,
        "epochs": updates * each / size,
        "fit_seconds": updates * pace,
        "stop_reason": reason,
        "stop_message": "Words.",
        "metrics": more.get("metrics", {"loss/train": losses[-1] if len(losses) else None}),
        "seed": seed,
        "batch_size": each,
        "data": {"train": size, "val": 0, "test": 0},
        "versions": {"gdtrain": "0"},
        **more.get("summary", {}),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["examples", "loss/train", "loss/val", "seconds", "step"])
        for i, loss in enumerate(losses):
            done = (i + 1) * every
            writer.writerow([done * each, loss, "", round(done * pace, 4), done])
            if i < len(val):
                writer.writerow([done * each, "", val[i], round(done * pace, 4), done])
    return folder


def falling(factor, count):
    return [factor / (i + 1) for i in range(count)]
