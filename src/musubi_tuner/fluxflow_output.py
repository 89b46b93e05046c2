"""The output folder of the published FluxFlow trainer, laid out from the files of a run.

    flxflow_final.safetensors, text_encoder.safetensors, D_img.safetensors     weights of the last step
    flxflow_step_<name>_final.safetensors and so on                            of each step
    graph/training_metrics_<name>.jsonl, graph/session_<name>.json             what was logged
    samples/sample_<name>_epoch_<E>_batch_<B>.png                              what was shown
    training_state.json, lr_sav.json                                           how far it is
    training_states.pt                                                         moments and averages, if they are asked for

Without steps there is no <name>. The trainer knows nothing of these names.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.errors import ConfigError, DataError, NoAverageError
from musubi_tuner.files import read_text, replace_file, write_json, write_text
from musubi_tuner.run_record import CONSOLE
from musubi_tuner.runner.steps import CHECKPOINTS, trained_steps
from musubi_tuner.training.metrics import FILE

if TYPE_CHECKING:
    from musubi_tuner.models.fluxflow.state_dict import System

GRAPH, SAMPLES = "graph", "samples"
METRICS = "training_metrics"
TAGS = {
    "vae_loss": "loss/recon", "kl_loss": "loss/kl", "kl_beta": "loss/kl_weight", "lpips_loss": "loss/lpips",
    "discriminator_loss": "loss/disc", "generator_loss": "loss/gen", "color_stats": "loss/color", "hist_loss": "loss/hist",
    "contrast_loss": "loss/contrast", "flow_loss": "loss/flow",
}  # fmt: skip
"""Metric there -> tag here; a flow alone has its loss as loss/main."""
ROLES = ("vae", "flow", "text_encoder", "discriminator")


@dataclass
class Part:
    """One step, or a run without steps.

    Attributes:
        name: of the step; empty without steps. folder: of its files. config: as it was trained. rows: of its metrics, those of training.
        begun: updates of the steps before.
    """

    name: str
    folder: Path
    config: RunConfig
    rows: list[dict[str, Any]]
    begun: int

    def named(self, stem: str, ending: str) -> str:
        """A file name with the step in it."""
        return f"{stem}_{self.name}{ending}" if self.name else f"{stem}{ending}"


def parts_of(run: Path) -> list[Part]:
    """The trained steps of a run folder, or the run itself.

    Raises:
        ConfigError: if it is no folder of FluxFlow. DataError: if a metrics file cannot be read.
    """
    from musubi_tuner.training.curves import read_rows

    found: list[Part] = []
    for name, folder in trained_steps(run) or [("", run)]:
        configs = sorted(folder.glob("*.config.toml"))
        if not configs:
            continue
        config = load_config(configs[0])
        if config.spec.code != "ff":
            raise ConfigError(f"{folder}: is a run of {config.spec.title}, not of FluxFlow")
        rows = read_rows(folder / FILE) if (folder / FILE).is_file() else []
        rows = [row for row in rows if "train/epoch" in row]
        found.append(Part(name, folder, config, rows, found[-1].begun + _last(found[-1]) if found else 0))
    if not found:
        raise ConfigError(f"{run}: holds no run that has begun; give the output folder of one")
    return found


def _last(part: Part) -> int:
    return int(part.rows[-1]["step"]) if part.rows else 0


def lay_out(run: Path, output: Path, *, states: bool = False, say: Callable[[str], None] = print) -> None:
    """Write the files.

    Args:
        run: output folder of a run or of a file of steps. output: may be the same. states: write training_states.pt too.

    Raises:
        ConfigError, DataError, CheckpointError: if the run cannot be read.
    """
    parts = parts_of(run)
    (output / GRAPH).mkdir(parents=True, exist_ok=True)
    (output / SAMPLES).mkdir(exist_ok=True)
    resumed = _resumed(run, parts)
    for part in parts:
        system = _system(part)
        if system is not None:
            if part.name:
                write_weights(system, output, partial(_of_step, part.name))
            if part is parts[-1]:
                write_weights(system, output)
        _write_metrics(part, output / GRAPH, resumed.get(part.name, 0))
        _copy_samples(part, output / SAMPLES)
    _write_progress(run, parts, output)
    if states:
        _write_states(parts[-1], output)
    say(
        f"{output}: files of the published trainer, of {', '.join(part.name for part in parts if part.name) or 'the run'}"
    )


def _system(part: Part) -> "System | None":
    """Weights of a step, averaged if there is an average; None before the first checkpoint."""
    from musubi_tuner.models.fluxflow.checkpoint import load_checkpoint
    from musubi_tuner.models.fluxflow.state_dict import read_system

    if not (part.folder / CHECKPOINTS).is_file():
        return None
    try:
        return read_system(load_checkpoint(str(part.folder), ema=True))
    except NoAverageError:
        return read_system(load_checkpoint(str(part.folder)))


def _of_step(step: str, name: str) -> str:
    """Name of a weight file of a step."""
    return f"{name.removesuffix('.safetensors').removesuffix('_final')}_step_{step}_final.safetensors"


def write_weights(system: "System", folder: Path, named: Callable[[str], str] = str) -> dict[str, int]:
    """Write the published weight files.

    Args:
        named: changes their names.

    Returns:
        Number of tensors by file.
    """
    from musubi_tuner.models.fluxflow.state_dict import published_tensors
    from musubi_tuner.tensors import save_tensors

    assert system.geometry is not None
    header = {
        "format": "pt",
        "modelspec.architecture": "fluxflow",
        "ff.compat": system.geometry.compat,
        "config_json": json.dumps(system.geometry.to_dict()),
        "options_json": json.dumps(system.options),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, tensors in published_tensors(system.parts).items():
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        replace_file(folder / named(name), partial(save_tensors, whole, metadata=header))
        written[named(name)] = len(tensors)
    return written


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def published_row(row: Mapping[str, Any], part: Part, session: str) -> dict[str, Any]:
    """One line of metrics as the published trainer writes it; what is not finite is null."""
    clock, epoch, step = row.get("clock", {}), row.get("train/epoch", 0.0), row["step"]
    per_epoch = step / epoch if epoch else 1
    metrics = {name: _finite(row.get(tag)) for name, tag in TAGS.items()}
    if metrics["flow_loss"] is None:
        metrics["flow_loss"] = _finite(row.get("loss/main"))
    metrics["recon_loss"] = metrics["vae_loss"]
    for tag, value in row.items():
        if tag.startswith("train/grad_norm"):
            role = tag.removeprefix("train/grad_norm").strip("_") or _only(part)
            metrics[f"grad_norm_{role}"] = _finite(value)
        elif tag.endswith("_weight") and tag != "loss/kl_weight":
            metrics[f"weight_{tag.removeprefix('loss/').removesuffix('_weight')}"] = _finite(value)
    return {
        "timestamp": _time(clock.get("wall", 0.0)),
        "session_id": session,
        "epoch": max(1, math.ceil(epoch - 1e-9)),
        "batch": round((epoch - math.floor(epoch)) * per_epoch) or round(per_epoch),
        "global_step": part.begun + step,
        "metrics": metrics,
        "learning_rates": {f"{role}_lr": value for role, value in _rates(row, part).items()},
        "extras": {"batch_time": _finite(clock.get("step_seconds")), "eta_seconds": _finite(clock.get("seconds_left"))},
    }


def _only(part: Part) -> str:
    """The role of a run that has one."""
    roles = part.config.spec.task(part.config).roles
    return "flow" if roles == ("model",) else roles[0]


def _rates(row: Mapping[str, Any], part: Part) -> dict[str, float]:
    """Learning rates of a line by role."""
    found = {role: float(row[f"train/lr_{role}"]) for role in ROLES if f"train/lr_{role}" in row}
    return found or ({_only(part): float(row["train/lr"])} if "train/lr" in row else {})


def _time(wall: float) -> str:
    return datetime.fromtimestamp(wall).isoformat(timespec="seconds")


def _write_metrics(part: Part, folder: Path, resumed: int) -> None:
    """Metrics and session of a step."""
    if not part.rows:
        return
    walls = [row.get("clock", {}).get("wall", 0.0) for row in part.rows]
    session = datetime.fromtimestamp(walls[0]).strftime("%Y%m%d_%H%M%S")
    lines = [json.dumps(published_row(row, part, session)) for row in part.rows]
    write_text(folder / part.named(METRICS, ".jsonl"), "\n".join(lines) + "\n")
    write_json(
        folder / part.named("session", ".json"),
        {"session_id": session, "created_at": _time(walls[0]), "resumed_count": resumed, "last_update": _time(walls[-1]),
         "last_resume_at": None},
    )  # fmt: skip


def _resumed(run: Path, parts: list[Part]) -> dict[str, int]:
    """How often each step went on from a state, as the console tells."""
    found: dict[str, int] = {}
    try:
        lines = read_text(run / CONSOLE, DataError).splitlines()
    except (OSError, DataError):
        return found
    name = "" if not parts[0].name else parts[0].name
    for line in lines:
        begun = re.fullmatch(r"step \d+ of \d+: (.+)", line)
        name = begun[1] if begun else name
        found[name] = found.get(name, 0) + line.startswith("continuing from ")
    return found


def _copy_samples(part: Part, folder: Path) -> None:
    """Sheets and drawings of a step, under names that say when."""
    at = {row["step"]: row.get("train/epoch", 0.0) for row in part.rows}
    for path in sorted((part.folder / "sample").glob("*.png")):
        sheet = re.fullmatch(r"samples_step_(\d+)\.png", path.name)
        single = re.fullmatch(r".+_(\d{8})_(\d+)\.png", path.name)
        found = sheet or single
        if not found:
            continue
        step = int(found[1])
        known = [epoch * step / other for other, epoch in at.items() if other and epoch]
        epoch = at.get(step, known[-1] if known else 0.0)
        per_epoch = step / epoch if epoch else max(1, step)
        batch = round((epoch - math.floor(epoch)) * per_epoch) or (round(per_epoch) if step else 0)
        variant = f"_caption_{int(single[2])}" if single else ""
        name = f"_epoch_{max(1, math.ceil(epoch - 1e-9)) if step else 0}_batch_{batch}{variant}.png"
        shutil.copyfile(path, folder / part.named("sample", name))


def _write_progress(run: Path, parts: list[Part], output: Path) -> None:
    """How far the run is, and its learning rates."""
    part = parts[-1]
    row = part.rows[-1] if part.rows else {"step": 0}
    made = published_row(row, part, "")
    rates = _rates(row, part)
    has_kl = part.config.get("objective.train_vae")
    length, most = (part.config.get(f"objective.{key}") if has_kl else 0 for key in ("kl_warmup_steps", "kl_beta"))
    beta = made["metrics"]["kl_beta"] or 0.0
    warmed = min(100.0, 100.0 * row["step"] / length) if length else 100.0
    values: dict[str, Any] = {
        "version": "2.0" if part.name else "1.0",
        "mode": "pipeline" if part.name else "legacy",
        "timestamp": made["timestamp"],
        "epoch": made["epoch"],
        "batch_idx": made["batch"],
        "global_step": made["global_step"],
        "kl_warmup": {"current_beta": beta, "warmup_steps": length, "max_beta": most, "progress_pct": warmed},
        "learning_rates": rates,
    }
    if part.name:
        values["pipeline"] = {
            "current_step_index": len(parts) - 1,
            "current_step_name": part.name,
            "current_step_epoch": made["epoch"],
            "current_batch_idx": made["batch"],
            "total_steps": len(trained_steps(run)),
            "steps_completed": [done.name for done in parts[:-1]],
        }
    write_json(output / "training_state.json", values)
    write_json(output / "lr_sav.json", rates)


def _write_states(part: Part, output: Path) -> None:
    """training_states.pt from the newest state; one that is there is kept as .pt.bck."""
    import torch

    from musubi_tuner.models.fluxflow.checkpoint import geometry_of
    from musubi_tuner.models.fluxflow.trainer_state import TENSORS, published_state
    from musubi_tuner.training.checkpoint import newest_good_state, read_tensors

    found = newest_good_state(part.folder, part.config.run.name)
    if found is None:
        raise DataError(f"{part.folder}: holds no state, of which {TENSORS} is made; see [save] state")
    folder, values = found
    row = part.rows[-1] if part.rows else {"step": 0}
    content = published_state(
        geometry_of(part.config), _groups(_rates(row, part), part), read_tensors(folder, "optimizer"), values["optimizer"],
        read_tensors(folder, "ema"), _decay(part), int(values["step"]),
    )  # fmt: skip
    path = output / TENSORS
    if path.exists():
        replace_file(output / f"{TENSORS}.bck", lambda target: shutil.copyfile(path, target))
    replace_file(path, lambda target: torch.save(content, target))


def _own(part: Part, role: str) -> RunConfig:
    """The settings of a role; a flow alone has those of the run."""
    return part.config.for_role(role) if role in part.config.spec.task(part.config).roles else part.config


def _decay(part: Part) -> float:
    """Of the average of the autoencoder."""
    return _own(part, "vae").ema.decay


def _groups(rates: Mapping[str, float], part: Part) -> dict[str, dict[str, Any]]:
    """What the optimizer of every role is called with: its learning rate now, betas and so on."""
    import torch

    from musubi_tuner.training.optimizers import build_optimizer

    found = {}
    for role, rate in rates.items():
        settings = _own(part, role).optimizer
        (group, *_) = build_optimizer([("weight", torch.nn.Parameter(torch.zeros(1, 1)))], settings).param_groups
        plain = {key: value for key, value in group.items() if value is None or isinstance(value, int | float | tuple)}
        found[role] = {**plain, "lr": rate}
    return found
