"""What a run file comes to before it is started: its length, its buckets, its learning rate, captions as they are drawn. Torch-free."""

from collections.abc import Sequence
from typing import Any

from musubi_tuner.config import RunConfig, Steps, load_documents, sentence
from musubi_tuner.data.caption_variants import variants
from musubi_tuner.data.item import Item
from musubi_tuner.data.length import sources_of, steps_on
from musubi_tuner.data.remarks import enlargement, kept_share
from musubi_tuner.data.sources import scan
from musubi_tuner.training.schedulers import schedule_length, schedule_of
from musubi_tuner.ui.answers import BucketRow, Preview, Rate

POINTS = 400
"""Of a curve."""
DRAWN = 10
"""Captions that are shown."""


NOTHING: Preview = {
    "number": 0, "problem": "", "images": 0, "total": 0, "per_epoch": 0, "epochs": 0, "about": False, "sentence": "", "besides": "", "buckets": [],
    "notes": [], "rates": [], "captions": [],
}  # fmt: skip


def preview(document: dict[str, Any], number: int = 0, step: int = 0) -> Preview:
    """What the data and the budget of a run file, or of one of its steps, come to.

    Raises:
        InvalidConfig: for a run file with errors. DataError: if its pictures cannot be read.
    """
    config = load_documents(document)[step]
    found = scan(config.datasets, config.spec.code)
    steps = steps_on(config, found.items, config.distributed.num_processes)
    return {
        "number": number,
        "problem": "",
        "images": len(found.items),
        "total": steps.total_updates,
        "per_epoch": steps.updates_per_epoch,
        "epochs": steps.epochs,
        # Held-out images, and pictures of shards, are found when it starts.
        "about": config.validation.split > 0 or any(item.is_unread for item in found.items),
        "sentence": sentence(steps, sources_of(found.items)),
        "besides": besides(config, steps),
        "buckets": buckets(found.items),
        "notes": found.notes,
        "rates": rates(config, steps.total_updates),
        "captions": captions(config, found.items),
    }


def besides(config: RunConfig, steps: Steps) -> str:
    """What happens during the updates: warm-up, checkpoints, samples."""
    total, facts = steps.total_updates, config.spec.task(config)
    warm_up = config.scheduler.warmup_updates(schedule_length(config, total))
    save, sample = config.save, config.sample
    checkpoints = 1 + (max(0, total - 1) // save.every_steps if save.every_steps else 0)
    checkpoints += max(0, steps.epochs - 1) // save.every_epochs if save.every_epochs else 0
    drawn = 0
    if facts.has("sample.prompts") and sample.prompts is not None:
        drawn = (total // sample.every_steps if sample.every_steps else 0) + (
            steps.epochs // sample.every_epochs if sample.every_epochs else 0
        )
    return f"{warm_up:,} updates of warm-up; {checkpoints:,} checkpoints with the last one; samples {drawn:,} times"


def buckets(items: Sequence[Item]) -> list[BucketRow]:
    """One row per bucket and batch size, with what becomes of its pictures."""
    inside: dict[tuple[Any, int], list[Item]] = {}
    for item in items:
        inside.setdefault((item.bucket, item.batch_size), []).append(item)
    found: list[BucketRow] = []
    for ((width, height), size), own in sorted(inside.items()):
        presentations = sum(item.num_repeats for item in own)
        found.append(
            {
                "width": width,
                "height": height,
                "images": len(own),
                "presentations": presentations,
                "batches": -(-presentations // size),
                "last_batch": presentations % size or size,
                "cropped": 1 - sum(kept_share(item) for item in own) / len(own),
                "enlarged": max(enlargement(item) for item in own),
            }
        )
    return found


def rates(config: RunConfig, total: int) -> list[Rate]:
    """The learning rate of every role over the updates; roles that move alike share a curve."""
    curves: dict[str, tuple[list[str], Rate]] = {}
    for role in config.spec.task(config).roles:
        own = config.for_role(role)
        schedule, count = schedule_of(own, total), min(total, POINTS)
        steps = sorted({round(number * (total - 1) / max(1, count - 1)) for number in range(count)})
        values = [own.optimizer.lr * schedule(step) for step in steps]
        key = f"{own.optimizer.lr} {own.scheduler.model_dump_json()}"
        alike = curves.setdefault(key, ([], {"label": "", "steps": [step + 1 for step in steps], "values": values}))[0]
        alike.append(role)
    return [{**rate, "label": ", ".join(roles)} for roles, rate in curves.values()]


def captions(config: RunConfig, items: Sequence[Item]) -> list[str]:
    """Versions of the caption of the first picture that has one, as they are trained."""
    item = next((item for item in items if item.caption), None)
    if item is None:
        return []
    text = config.datasets[item.dataset].text
    if not text.dynamic:
        return list(item.captions[:DRAWN])
    return list(variants((item.caption,), text, item.id)[:DRAWN]) or [item.caption]
