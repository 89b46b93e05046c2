"""What makes a run the same run: its fixed settings, its data, the weights below its adapters; and what its last bits depend on.

A state records all of them. A run that continues from it must have the same settings, data and base. A changed environment is a
warning, or an error under `run.strict`.
"""

import contextlib
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from musubi_tuner.config import RunConfig
from musubi_tuner.config.datasets import KEPT, WHITE
from musubi_tuner.config.fields import Parameter
from musubi_tuner.config.run_config import ROLE_TABLES
from musubi_tuner.config.schema import parameters
from musubi_tuner.config.schema.resume import is_changeable
from musubi_tuner.data.item import Item
from musubi_tuner.data.item_table import rows_of
from musubi_tuner.errors import ConfigError
from musubi_tuner.models.spec import ModelSpec


def fixed_settings(config: RunConfig, processes: int) -> dict[str, Any]:
    """Settings that a run which continues must keep, as plain JSON values.

    Processes and accumulation may change as long as their product, the micro-batches of an update, stays.
    """
    found = {
        p.key: value
        for p in _single(config.spec)
        if p.extra("resume") == "fixed" and (value := config.get(p.key)) is not None
    }
    found["ema.warmup"] = config.warms_average
    roles = config.spec.task(config).roles
    for role in filter(config.role_section, roles):
        own = config.for_role(role)
        moves = {key: own.get(key) for key in found if key.partition(".")[0] in ROLE_TABLES}
        moves |= {"ema.warmup": own.warms_average, "train.max_grad_norm": own.train.max_grad_norm}
        found |= {f"roles.{role}.{key}": value for key, value in moves.items()}
    found["micro-batches per update"] = processes * config.train.grad_accum_steps
    return json.loads(json.dumps(found, default=lambda table: table.model_dump(exclude_none=True)))


def _single(spec: ModelSpec) -> list[Parameter]:
    """The settings of a family, without the tables of roles, of which the results are compared."""
    return [p for p in parameters(spec) if p.section != "roles" or p.name == "freeze"]


def default_settings(spec: ModelSpec) -> dict[str, Any]:
    """What a setting of a family was before it existed."""
    found = {p.key: p.field.get_default() for p in _single(spec) if not p.field.is_required()}
    return json.loads(json.dumps({**found, "ema.warmup": False}))


def as_begun(config: RunConfig, began: Mapping[str, Any] | None) -> RunConfig:
    """The config with ``ema.warmup = "auto"`` replaced by what the run began with.

    Args:
        began: fixed settings of the state that the run goes on from; None = it begins now.
    """
    if config.ema.warmup != "auto":
        return config
    warmup = config.warms_average if began is None else began.get("ema.warmup", False)
    return config.model_copy(update={"ema": config.ema.model_copy(update={"warmup": warmup})})


def compare_config(
    stored: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """Settings in which a run that wants to continue differs from what it began as.

    Args:
        defaults: of settings that a state of an earlier version does not know; it ran as they say.
    """
    before = {**(defaults or {}), **stored}
    return [
        f"{key} was {before.get(key)!r}, now {current.get(key)!r}"
        for key in sorted(set(stored) | set(current))
        if before.get(key) != current.get(key)
    ]


def changed_settings(config: RunConfig, began: Mapping[str, Any], processes: int) -> list[str]:
    """In which fixed settings a run differs from the one that a state is of, but for those of ``resume.allow``.

    Args:
        began: fixed settings of the state.
    """
    changes = _changes(config, began, processes)
    return [text for key, text in changes.items() if key not in config.resume.allow]


def allowed_changes(config: RunConfig, began: Mapping[str, Any], processes: int) -> list[str]:
    """In which settings of ``resume.allow`` a run differs from the one that a state is of."""
    changes = _changes(config, began, processes)
    return [text for key, text in changes.items() if key in config.resume.allow]


def _changes(config: RunConfig, began: Mapping[str, Any], processes: int) -> dict[str, str]:
    # States made when all families had the same tables hold settings that only others have.
    foreign = {p.key for p in parameters()} - {p.key for p in parameters(config.spec)}
    own = {key: value for key, value in began.items() if key not in foreign}
    current, defaults = fixed_settings(as_begun(config, began), processes), default_settings(config.spec)
    # A role that the state says nothing of moved as the run.
    of_roles = [key.split(".", 2) for key in current if key.startswith("roles.") and key != "roles.freeze"]
    defaults |= {f"roles.{role}.{key}": own.get(key, defaults.get(key)) for _, role, key in of_roles}
    return {text.partition(" was ")[0]: text for text in compare_config(own, current, defaults)}


def other_teachers(config: RunConfig) -> list[dict[str, Any]]:
    """How [experts] differs in every dataset, and what else it says that no item shows: dropped captions, regularisation."""
    found = []
    for dataset in config.datasets:
        own = {key: value for key, value in dataset.experts.items() if value != config.get(f"experts.{key}")}
        if dataset.text.drops or (dataset.text.caption_dropout_rate is not None and not dataset.text.drop_as_empty):
            own["dropped captions"] = (dataset.text.caption_dropout_rate, dataset.text.caption_dropout_every_n_epochs)
        found.append(own | ({"is_reg": True} if dataset.is_reg else {}))
    return found


def data_digest(
    items: Sequence[Item], masked: bool, held_out: Sequence[Item] = (), teachers: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Changes when images, captions, masks, buckets, repeats or batch sizes of a run change, or which images are held out.

    Args:
        teachers: what `other_teachers` gives.
    """
    digest = hashlib.sha256()
    for key, captions, item in rows_of(items):
        digest.update(repr((key, captions[0], item.bucket, item.num_repeats, item.batch_size)).encode())
        if len(captions) > 1:
            digest.update(repr(tuple(captions[1:])).encode())
        if item.views:
            digest.update(repr(item.views).encode())
        if item.squashed:
            digest.update(b"squashed")
        if item.interpolation is not None:
            digest.update(item.interpolation.encode())
        if item.background not in (KEPT, WHITE):
            digest.update(item.background.encode())
        if masked and item.mask is not None:
            digest.update(repr(item.mask.source).encode())
    for item in held_out:
        digest.update(repr(("held out", item.key, item.caption, item.bucket, item.batch_size)).encode())
    for number, own in enumerate(teachers):
        if own:
            digest.update(repr(("experts", number, sorted(own.items()))).encode())
    return digest.hexdigest()[:16]


def environment(config: RunConfig, threads: int, processes: int, device: torch.device) -> dict[str, Any]:
    """What bit-exact repetition depends on beside the config."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "torch": torch.__version__,
        "device": name,
        "threads": threads,
        "processes": processes,
        "precision": config.train.mixed_precision,
        **({"float32 products": torch.get_float32_matmul_precision()} if device.type == "cuda" else {}),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()


def refuse_changes(
    config: RunConfig, head: str, values: Mapping[str, Any], processes: int, data: str, others: Sequence[str] = ()
) -> None:
    """Refuse a state of another run, as far as that can be told before the model is loaded.

    Args:
        head: begins the message: which state, and that it has another config. values: its plain data. data: what `data_digest`
            gives. others: differences found elsewhere.

    Raises:
        ConfigError: saying what has changed, and the ways on.
    """
    differences = changed_settings(config, values["config"], processes)
    changeable = sorted({key for text in differences if is_changeable(key := text.partition(" was ")[0])})
    if values.get("data") != data:
        differences.append("the data set has other images, captions, masks, buckets, batch sizes or teachers")
    differences += others
    if not differences:
        return
    begin = "model.path" if config.adapter.type == "none" else "adapter.init_from"
    ways = [f'a new run in another folder begins from its weights with {begin} = "{config.output_dir}:latest"']
    ways += [f"resume.allow = {json.dumps(changeable)} goes on with the new value"] if changeable else []
    raise ConfigError(
        f"{head}. Use --fresh to start over in a new folder, or undo the changes; {'; '.join(ways)}:\n  "
        + "\n  ".join(differences)
    )


def check_state(
    config: RunConfig,
    path: Path,
    values: Mapping[str, Any],
    *,
    processes: int,
    data: str,
    base: str | None,
    environment: Mapping[str, Any],
    total: int,
) -> str | None:
    """Compare a state with the run that wants to go on from it.

    Args:
        path, values: folder and plain data of the state. data: what `data_digest` gives. base: weights below an adapter.
        environment: of this start. total: updates of the run.

    Returns:
        A warning about another environment, or None.

    Raises:
        ConfigError: if the state is of another run, or of a later update than the run has.
    """
    below = [] if values.get("base") == base else ["the checkpoint below the adapter holds other weights"]
    refuse_changes(config, f"{path}: was made with another config", values, processes, data, below)
    # An imported state does not know where it was made.
    changed = compare_config(values["environment"], environment) if values["environment"] else []
    text = "this run continues under other conditions, so it may differ in the last bits: " + "; ".join(changed)
    if changed and config.run.strict:
        raise ConfigError(f"run.strict: {text}")
    if values["position"]["step"] > total:
        key = "max_steps" if config.train.max_steps == total else "max_epochs"
        raise ConfigError(
            f"{path}: is at step {values['position']['step']}, but train.{key} is {getattr(config.train, key)}; raise it, "
            "or use --fresh to start over in a new folder"
        )
    return f"warning: {text}" if changed else None
