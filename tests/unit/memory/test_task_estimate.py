"""The estimate of a task of several roles is what the task takes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from musubi_tuner.config import load_document
from musubi_tuner.data.batch import Batch
from musubi_tuner.models.fluxflow import family
from musubi_tuner.models.fluxflow.geometry import V2, FluxFlowConfig
from musubi_tuner.models.fluxflow.lpips import Lpips
from musubi_tuner.models.fluxflow.process import FluxFlowProcess
from musubi_tuner.models.fluxflow.settings import objective_of
from musubi_tuner.models.fluxflow.state_dict import PARTS, build_part
from musubi_tuner.models.fluxflow.system import FluxFlowSystem
from musubi_tuner.models.fluxflow.task import FluxFlowTask
from musubi_tuner.planning.estimate import Estimate
from musubi_tuner.planning.fake_step import Alive
from musubi_tuner.planning.report import task_lines
from musubi_tuner.planning.task_estimate import estimate_task
from musubi_tuner.training.task import Position, weighted_sum

SHAPE: dict[str, Any] = {
    "vae_dim": 8, "downscales": 2, "attn_layers": 1, "attn_heads": 4, "down_kernel": 4, "up_kernel": 4, "mix_kernel": 3,
    "head_widths": [16, 8], "feature_maps_dim": 16, "flow_layers": 2, "flow_heads": 2, "text_embedding_dim": 12,
    "feature_maps_dim_disc": 4, "disc_depth": 1, "text_width": 16, "text_layers": 1, "text_heads": 2, "text_ff": 16,
    "text_vocab": 40, "text_positions": 8,
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "vae": {"train_vae": True},
    "gan": {"train_vae": True, "gan_training": True, "train_spade": True},
    "lpips": {"train_vae": True, "use_lpips": True},
    "gan alone": {"train_vae": True, "gan_training": True, "train_reconstruction": False},
    "flow": {"train_diff_full": True},
    "all": {"train_vae": True, "gan_training": True, "train_diff_full": True, "train_language": True},
}


def config_of(name: str, tmp_path: Path, recomputes: bool = False, **objective: Any) -> Any:
    (tmp_path / "vae.safetensors").touch()
    tables = {
        "schema_version": 1,
        "run": {"name": "a", "output_dir": str(tmp_path / "out"), "device": "cpu"},
        "model": {"arch": "ff", "init": "scratch", "geometry": SHAPE, "bert_tokenizer": str(tmp_path), "text_max_tokens": 8,
                  "vgg_path": str(tmp_path / "vae.safetensors")},
        "objective": {**TASKS[name], **objective},
        "general": {"resolution": 64, "batch_size": 2},
        "datasets": [{"image_directory": str(tmp_path)}],
        "train": {"max_steps": 1, "mixed_precision": "no"},
        "memory": {"gradient_checkpointing": recomputes},
    }  # fmt: skip
    if name != "lpips":
        tables["model"].pop("vgg_path")  # type: ignore[attr-defined]
    if name == "flow":
        tables["model"]["vae_path"] = str(tmp_path / "vae.safetensors")  # type: ignore[index]
    return load_document(tables)


def measured(config: Any) -> tuple[int, int]:
    """The most bytes that are alive at once in a phase, its gradients included; and the number of trained values."""
    geometry = FluxFlowConfig(**{**V2, **SHAPE})
    objective, roles = objective_of(config), config.spec.task(config).roles
    parts = {part: build_part(part, geometry) for part in PARTS}
    parts["text_encoder"].language_model.requires_grad_(objective.train_language)  # type: ignore[operator]
    model: Any = FluxFlowSystem(geometry, parts)
    if config.memory.checkpoints:
        model.recompute()
    lpips = Lpips() if objective.use_lpips else None
    make_role: Any = lambda name, module: SimpleNamespace(name=name, module=module)  # noqa: E731
    task = FluxFlowTask(model, roles, make_role, objective, FluxFlowProcess(objective), 7, lpips)
    tensors = {"pixels": torch.zeros(2, 3, 64, 64), "latents": torch.zeros(2, 8, 16, 16), "bert_ids": torch.zeros(2, 8, dtype=torch.int64),
               "bert_mask": torch.ones(2, 8, dtype=torch.bool), "bert_states": torch.zeros(2, 8, 16)}  # fmt: skip
    tensors.pop("latents" if objective.train_vae else "pixels")
    tensors.pop("bert_states" if objective.train_language else "bert_ids")
    batch = Batch(tensors, {}, ["", ""], (0, 1), torch.zeros(2, dtype=torch.int64))
    trained = {name: [p for p in role.module.parameters() if p.requires_grad] for name, role in task.roles.items()}
    for part in parts.values():
        part.requires_grad_(False)
    found = []
    for phase in task.phases:
        for name, weights in trained.items():
            for weight in weights:
                weight.requires_grad_(name in phase.roles)
        update: Any = SimpleNamespace(micro_batches=[SimpleNamespace(presentations=(0, 1))])
        draws = task.draws(batch, update, 0, Position())
        alive = Alive()
        with alive:
            weighted_sum(phase.losses(batch, draws, Position())).backward()
        model.zero_grad(set_to_none=True)
        found.append(alive.peak)
    return max(found), sum(p.numel() for weights in trained.values() for p in weights)


@pytest.mark.parametrize(("name", "recomputes"), [*((name, False) for name in TASKS), ("gan", True), ("all", True)])
def test_the_largest_phase_is_estimated_within_2_percent(name: str, recomputes: bool, tmp_path: Path) -> None:
    config = config_of(name, tmp_path, recomputes)
    found = estimate_task(config, (64, 64), 2) if name != "flow" else estimate_of_flow(config)
    most, values = measured(config)
    assert found.activations + found.gradients == pytest.approx(most, rel=0.02) and found.values == values
    assert found.optimizer >= 8 * values and found.average == 4 * values


def estimate_of_flow(config: Any) -> Estimate:
    """Of a flow, whose geometry is that of a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "geometry_of", lambda config: FluxFlowConfig(**{**V2, **SHAPE}))
        return estimate_task(config, (64, 64), 2)


def test_the_plan_warns_in_the_words_of_the_family(tmp_path: Path) -> None:
    config = config_of("gan", tmp_path)
    item: Any = SimpleNamespace(bucket=(64, 64), batch_size=2)
    (first, warning) = task_lines(config, [item], free=1000)
    assert first.startswith("  memory   about ") and "activations" in first
    order = [
        "batch_size = 1",
        "lower the resolution",
        "train_reconstruction = false",
        "train_spade = false",
        "vae_dim = 64",
        "bf16",
        "gradient_checkpointing",
    ]
    places = [warning.index(word) for word in order]
    assert places == sorted(places)


def test_losses_that_begin_later_are_estimated_from_the_start(tmp_path: Path) -> None:
    config, later = config_of("gan", tmp_path), config_of("gan", tmp_path, gan_start=5)
    assert objective_of(later).gan_start == 5
    assert estimate_task(later, (64, 64), 2) == estimate_task(config, (64, 64), 2)


@pytest.mark.parametrize("name", ["gan", "all"])
def test_recomputation_saves_memory(name: str, tmp_path: Path) -> None:
    assert measured(config_of(name, tmp_path, True))[0] < 0.9 * measured(config_of(name, tmp_path))[0]
