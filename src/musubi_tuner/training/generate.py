"""Drawing from a finished or half-finished run, or from any checkpoint, outside of training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from musubi_tuner.adapters.attach import attach, make_adapters
from musubi_tuner.adapters.files import load_adapter, placements_of_file, read_adapter
from musubi_tuner.assemble import storing_of
from musubi_tuner.config import RunConfig
from musubi_tuner.config.paths import is_checkpoint_name
from musubi_tuner.config.prompts import Prompt, SampleSettings
from musubi_tuner.config.schema.adapter import AdapterSection
from musubi_tuner.config.swap import most_swapped
from musubi_tuner.device import apply_backend_flags, choose_device, set_threads, with_precision
from musubi_tuner.errors import NoAverageError
from musubi_tuner.memory.compose import block_counts, check_machine, compose_memory, freeze_of
from musubi_tuner.memory.storage import freeze_layers
from musubi_tuner.models.family import AutoencoderNetwork, Process, TextNetworks
from musubi_tuner.models.spec import ModelSpec
from musubi_tuner.precision import COMPUTE_DTYPES
from musubi_tuner.training.sampling import decode_images, draw, encode_prompts, sample_settings
from musubi_tuner.weights.checkpoints import WeightFile

if TYPE_CHECKING:
    from musubi_tuner.adapters.files import AdapterFile


@dataclass
class Generator:
    """A model with what it needs to draw pictures from texts."""

    config: RunConfig
    model: torch.nn.Module
    process: Process
    encoders: TextNetworks
    vae: AutoencoderNetwork
    device: torch.device
    use_mask: bool

    @classmethod
    def from_run(
        cls,
        config: RunConfig,
        checkpoint: str | None = None,
        *,
        ema: bool = True,
        adapters: Sequence[tuple[str, float]] = (),
    ) -> "Generator":
        """Load a checkpoint for drawing with the encoders and the objective of a run file.

        Args:
            checkpoint: file, folder, ``folder:name``, name of a checkpoint of the run, or hub id; absent = the model of the
                run: its output folder, or with an adapter its base.
            ema: take the averaged weights, where there are some and, for the run's own, sample.use_ema is on.
            adapters: adapter files with their strengths, which prompts can multiply.

        Raises:
            CheckpointError: if a file is missing or does not fit.
        """
        set_threads(config.run.threads, 1)
        config = with_precision(config)
        device = choose_device(config.run.device)
        off = {"gradient_checkpointing": False, "checkpoint_offload": False, "compile": False}
        memory = config.memory.model_copy(update=off)
        check_machine(config.model_copy(update={"memory": memory}), device)
        if config.memory.compile:
            print("memory.compile is for training: drawing does not compile")
        apply_backend_flags(config.run, device, sizes=2)  # prompts may ask for any
        spec = config.spec
        if config.adapter.type != "none" and checkpoint is None:
            file = spec.family.open_base(config)
        else:
            file = _find_weights(config, checkpoint, ema)
        print(f"weights: {file.origin or file.path}")
        model = spec.family.load_for_run(file, config, storing_of(config, device))
        swap = config.memory.blocks_to_swap
        if swap == "auto":
            # Drawing keeps nothing for a backward pass; what does not fit for certain is streamed.
            counts = block_counts(model, spec.block_lists)
            swap = most_swapped(counts, config.memory.swap_policy) if device.type == "cuda" else 0
        freeze = freeze_of(config.memory, spec)
        if adapters and config.adapter.type == "none" and swap and freeze is not None:
            freeze_layers(model, freeze)  # the run trained the model itself, so nothing is frozen yet
        used = use_adapters(model, spec, adapters, ema=ema and config.ema.enabled and config.sample.use_ema)
        model.eval().requires_grad_(False)
        compose_memory(model, memory.model_copy(update={"blocks_to_swap": swap}), spec, device)
        hiding = [str(file.path) for file in used if file.hides_padding]
        if hiding and not config.get("model.t5_attn_mask"):
            print(f"note: padding is hidden (model.t5_attn_mask = true), as in the training of {', '.join(hiding)}")
        masked = {"t5_attn_mask": bool(config.get("model.t5_attn_mask") or hiding)}
        options = {"sol_spatial_norm": "sum", **masked, **spec.family.options_of(file)}
        if hiding or (config.adapter.type != "none" and checkpoint is None):
            options |= masked  # as the adapter was trained, whatever the model below it was
        process = spec.family.make_process(config, options)
        encoders, vae = spec.encoders.open_text(config, device), spec.encoders.open_autoencoder(config, device)
        return cls(config, model, process, encoders, vae, device, bool(options["t5_attn_mask"]))

    def settings(self, **changes: Any) -> SampleSettings:
        """[sample] of the run file, with changes."""
        return SampleSettings(**{**vars(sample_settings(self.config)), **changes})

    def draw(
        self,
        prompts: Sequence[str | Prompt],
        settings: SampleSettings,
        *,
        batch_size: int = 8,
        progress: Callable[[int], None] = lambda count: None,
    ) -> list[np.ndarray]:
        """Pictures [H, W, 3] uint8, one per prompt; without a seed of its own, picture i is drawn from seed + i."""
        encoded = encode_prompts(self.encoders.encode, prompts, settings.negative)
        spec = self.config.spec
        latents = draw(
            self.model,
            self.process,
            spec,
            encoded,
            settings,
            size=self.config.latents,
            use_mask=self.use_mask,
            device=self.device,
            compute_dtype=COMPUTE_DTYPES[self.config.train.mixed_precision],
            batch_size=batch_size,
            progress=progress,
        )
        return decode_images(self.vae, latents, spec.latent_shift)


def use_adapters(
    model: torch.nn.Module, spec: ModelSpec, adapters: Sequence[tuple[str, float]], *, ema: bool = False
) -> list["AdapterFile"]:
    """Attach adapter files to a model, later ones on top of earlier ones.

    Args:
        ema: of run folders, take the averaged adapter.
    """
    if not adapters:
        return []
    files = [read_adapter(source, spec, ema=ema and Path(source).is_dir()) for source, _ in adapters]
    sets = []
    for file, (_, strength) in zip(files, adapters, strict=True):
        print(f"{file.path}: at {strength:g}{file.remarks}")
        placements = placements_of_file(file.tensors, model, spec.adapters, str(file.path))
        made = make_adapters(model, placements, AdapterSection(type="lora"))
        load_adapter(made, file.tensors, str(file.path))
        made.strength = strength
        made.set_multiplier(1.0)
        sets.append(made)
    attach(model, *sets)
    return files


def _find_weights(config: RunConfig, checkpoint: str | None, ema: bool) -> WeightFile:
    """Weights of a run that trains the model itself, or of any checkpoint; the model's own, with a note, where there is no average."""
    source, own = checkpoint or str(config.output_dir), checkpoint is None
    if checkpoint and is_checkpoint_name(checkpoint) and not Path(checkpoint).exists():
        source, own = f"{config.output_dir}:{checkpoint}", True
    if own:
        ema = ema and config.ema.enabled and config.sample.use_ema
    load = config.spec.family.load_checkpoint
    if ema:
        try:
            return load(source, ema=True)
        except NoAverageError:
            print(f"note: {source} has no averaged weights; drawing with those of the model")
    return load(source, ema=False)
