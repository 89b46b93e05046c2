"""What the framework knows of a model family. Torch-free; heavy parts are dotted names resolved on use."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from musubi_tuner.config import RunConfig
    from musubi_tuner.config.diagnostics import Diagnostic


def resolve(dotted: str) -> Any:
    """Import ``package.module:name`` and return the object."""
    module, name = dotted.split(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class AdapterTargets:
    """Where adapters go in a family.

    Attributes:
        layers: block list -> names of the Linear layers in one of its blocks, in file order.
        exclude: regular expressions of whole module paths that get an adapter only when asked for.
        kinds: name -> pattern (config/patterns.py) of the layers that adapter.kinds calls so; none = all are of one kind.
        usual: kinds that are adapted unless adapter.kinds says otherwise.
        presets: name -> key of [adapter] -> value.
        network_module: what musubi-tuner would call the module, for metadata.
    """

    layers: Mapping[str, tuple[str, ...]]
    exclude: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    usual: tuple[str, ...] = ()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    network_module: str


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All the trainer knows about one model family.

    Attributes:
        code: short name in cache file names; full_name: in cache metadata and configs.
        pixel_step: image sides are multiples of this. vae_factor: pixels per latent cell.
        latent_channels: of the autoencoder. latent_shift: whether the autoencoder's shift is subtracted.
        hub_id: published repository of the family, for which ``hub`` stands; None if it has none.
        sample_size: default side of a drawn picture in pixels.
        t5_preset: published T5 that a single file without config is taken for; t5_attention_mask: whether T5 sees it.
        guidance_embedded: the model takes a guidance number; classifier-free guidance is then separate.
        expert_keys: names of the teacher tensors in an experts cache, each begun by the name of its teacher; empty = no such
            job.
        defaults: dotted config key -> value where the family differs from the schema.
        dataset_defaults: shared dataset key -> value.
        choices: dotted config key -> the values that this family knows, where it does not know all.
        not_applicable: dotted config key or pattern -> why setting it is an error, or a function of the value that says so.
        foreign_keys: unknown key of other trainers -> what to write instead.
        check: static rules of the family, torch-free: config -> findings.
        geometry: dotted name of the torch-free dataclass that [model.geometry] and config.json describe.
        module: package from which `load` takes, by name: ``load_for_training``, ``make_process``, ``check_caches`` and
            ``checkpoint_options`` for a run; ``load_checkpoint``, ``load_for_run`` and ``options_of`` for drawing;
            ``open_base`` for a run with adapters; ``plan_model`` for the
            memory estimate; ``load_to_merge`` and ``diffusers_modules`` for tools; ``read_published_lora`` and
            ``write_published_lora`` where the published trainer has LoRA files of its own, ``read_published_settings``
            and ``read_published_state`` where it has settings (torch-free) and checkpoints, ``open_published_caches`` where
            it has cache files;
            ``text_inputs``, ``null_inputs`` and ``concatenate`` for the conditioning.
        block_lists: attribute names of homogeneous block lists, in call order.
        adapters: which layers adapters attach to.
        quantizable: regular expression of the Linear layers that may be quantised; modulation: of those that only
            memory.fp8_modulation adds.
    """

    code: str
    full_name: str
    title: str
    modelspec_architecture: str
    modelspec_implementation: str = ""
    pixel_step: int
    vae_factor: int
    latent_channels: int
    latent_shift: bool
    sample_size: int
    t5_tokenizer: str
    clip_tokenizer: str
    hub_id: str | None = None
    t5_preset: str = "base"
    t5_attention_mask: bool = True
    guidance_embedded: bool = False
    expert_keys: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    dataset_defaults: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    not_applicable: Mapping[str, str | Callable[[Any], str]] = field(default_factory=dict)
    foreign_keys: Mapping[str, Callable[[Any], str]] = field(default_factory=dict)
    check: "Callable[[RunConfig], list[Diagnostic]] | None" = None
    geometry: str
    module: str
    block_lists: tuple[str, ...]
    adapters: AdapterTargets
    quantizable: str = r"(?!)"
    modulation: str = r"(?!)"

    def load(self, name: str) -> Any:
        """An object of the family's package; imports torch."""
        return getattr(importlib.import_module(self.module), name)

    def why_not(self, key: str) -> "str | Callable[[Any], str] | None":
        """Why a dotted key does not apply to this family; None if it does."""
        return next((reason for pattern, reason in self.not_applicable.items() if fnmatchcase(key, pattern)), None)

    def geometry_class(self) -> Any:
        """The torch-free geometry dataclass."""
        return resolve(self.geometry)


@dataclass
class Trainee:
    """A model ready to be trained.

    Attributes:
        model: with storage of its own where it trains. geometry: its config record. options: recorded with its weights.
        notes: lines for the person, about what was merged into it.
        base: identity of the weights that stay frozen; a run that continues must find the same.
        average: weights that the moving average begins with, where it does not begin with the model.
    """

    model: "nn.Module"
    geometry: Any
    options: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    base: str | None = None
    average: "dict[str, Tensor] | None" = None


@dataclass
class PublishedState:
    """A checkpoint of a family's own trainer, under the names of the run that goes on from it.

    Attributes:
        model: state dict of the run's model, float32. ema: of its average; None if the file has none.
        optimizer: tensors by ``parameter/entry``. scalars: plain values by parameter and entry; see `training.optimizers`.
        step, epoch: updates and epochs done. best: lowest mean training loss of an epoch; None if unknown.
        rate: learning rate of the next update there; None if unknown.
        notes: lines for the person.
    """

    model: "dict[str, Tensor]"
    ema: "dict[str, Tensor] | None"
    optimizer: "dict[str, Tensor]"
    scalars: dict[str, dict[str, Any]]
    step: int
    epoch: int
    best: float | None = None
    rate: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class ModelPlan:
    """A run's model without storage, and what a step with it needs to know.

    Attributes:
        model: on the meta device; built again from its ``config``. dtype: of its weights.
        shapes: of the cached tensors of one sample, latents left out. options: of the process.
    """

    model: "nn.Module"
    dtype: Any
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any]


@dataclass
class LossTerm:
    """One named part of the loss.

    Attributes:
        per_sample_B: float32 [B]; samples without this term hold 0.
        weight: factor in the total.
        sigma_B: noise level of every sample, [B] in [0, 1], for the statistics by noise level; None = it has none.
    """

    per_sample_B: "Tensor"
    weight: float
    sigma_B: "Tensor | None" = None


class Process(Protocol):
    """How a family adds noise, what it predicts, and in which direction its time runs.

    ``time`` is the family's own time in [0, 1], float32. Draws are keyed random numbers made by the trainer, one row
    per sample: `uniforms` names the uniform draws that the family wants beside noise and time.
    """

    uniforms: tuple[str, ...]
    time_draw: str
    """``normal`` or ``uniform``: what `time` expects."""

    def size(self, x0: "Tensor") -> tuple[int, ...]:
        """What the family's times depend on of latents [B, ...], if anything: rows and columns, or a number of tokens."""

    def time(self, draws_B: "Tensor", size: tuple[int, ...], uniforms: "dict[str, Tensor]") -> "Tensor":
        """Training times from random draws, [B].

        Args:
            size: see `size`.
        """

    def sigma(self, time_B: "Tensor") -> "Tensor":
        """Noise fraction at a time: the unit of logs and loss statistics."""

    def add_noise(self, x0: "Tensor", noise: "Tensor", time_B: "Tensor") -> "Tensor":
        """Noisy latents, float32."""

    def target(self, x0: "Tensor", noise: "Tensor", time_B: "Tensor") -> "Tensor":
        """What the model should predict at a time, in the layout of the latents."""

    def conditioning(self, batch: Any, time_B: "Tensor", uniforms: "dict[str, Tensor]") -> "dict[str, Any]":
        """Model inputs of one micro-batch after dropout and teacher lookup."""

    def predict(
        self, model: "nn.Module", noisy: "Tensor", time_B: "Tensor", inputs: "dict[str, Any]"
    ) -> "tuple[Tensor, dict[str, Any]]":
        """One model call: prediction in the layout of the latents, and what else the losses need."""

    def losses(
        self,
        prediction: "Tensor",
        target: "Tensor",
        time_B: "Tensor",
        inputs: "dict[str, Any]",
        extra: "dict[str, Any]",
        update: int,
    ) -> "dict[str, LossTerm]":
        """Named loss terms; ``main`` is always among them."""

    def sampling_times(self, steps: int, size: tuple[int, ...], shift: float | None = None) -> list[float]:
        """Times from noise to image, steps + 1 values in the family's direction.

        Raises:
            ConfigError: if a shift is asked for that the family does not know.
        """
