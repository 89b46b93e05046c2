"""The contract between a model family and the framework, typed: whoever adds a family writes these functions.

A family's package has a module ``family`` with the functions of `Family`, found through `ModelSpec.family`, and its processes
follow `Process`. Where the family has a published trainer whose files people bring along, the module ``published`` has those of
`PublishedTrainer`. docs/extending.md walks through an example.

Shape letters: B batch, C latent channels, H/W latent height and width; latents of other families may be tokens [B, N, D].
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from torch import Tensor, nn

    from musubi_tuner.config import RunConfig
    from musubi_tuner.config.importers.report import Imported
    from musubi_tuner.data.batch import Batch
    from musubi_tuner.encoders.locate import Source
    from musubi_tuner.encoders.tokens import TokenLimit
    from musubi_tuner.memory.storage import Storing
    from musubi_tuner.models.foreign_caches import ForeignCaches
    from musubi_tuner.training.role import Role
    from musubi_tuner.training.task import Task
    from musubi_tuner.weights.checkpoints import WeightFile


First = Callable[[int], "list[Tensor]"]
"""Gives up to so many pictures [3, H, W] or latents [C, h, w] of the data, of one size, always the same."""


class Geometry(Protocol):
    """Shape of a model, the content of config.json."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""

    def to_json(self) -> str:
        """Text of config.json."""


@dataclass
class Trainee:
    """A model ready to be trained.

    Attributes:
        model: with storage of its own where it trains. geometry: its config record. options: recorded with its weights.
        notes: lines for the person, about what was merged into it.
        base: identity of the weights that stay frozen; a run that continues must find the same.
        average: weights that the moving average begins with, where it does not begin with the model.
        carried: tensors of a checkpoint that take no part in the task, saved with its weights.
        prepare: called at every start of a run, on the device, before anything is made of the model or its options; gets what
            gives up to so many pictures or latents of the data, and whether the run begins. Lines for the person.
    """

    model: "nn.Module"
    geometry: Geometry
    options: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    base: str | None = None
    average: "dict[str, Tensor] | None" = None
    carried: "dict[str, Tensor]" = field(default_factory=dict)
    prepare: "Callable[[First, bool], list[str]] | None" = None


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
class ModelOutline:
    """A run's model without storage, and what a step with it needs to know.

    Attributes:
        model: on the meta device; built again from its ``config``. dtype: of its weights.
        shapes: of the cached tensors of one sample, latents left out. options: of the process.
    """

    model: "nn.Module"
    dtype: "torch.dtype"
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any]


@dataclass
class TaskOutline:
    """A task on the meta device.

    Attributes:
        task: its roles have the modules that move. modules: all that compute, frozen ones too.
        batch: (width and height, pictures) -> what a micro-batch holds. step: of an update in which all losses act.
    """

    task: "Task"
    modules: "list[nn.Module]"
    batch: "Callable[[tuple[int, int], int], dict[str, Tensor]]"
    step: int = 0


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

    @property
    def uniforms(self) -> tuple[str, ...]:
        """Names of the uniform draws that it wants."""

    @property
    def time_draw(self) -> str:
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

    def conditioning(self, batch: "Batch", time_B: "Tensor", uniforms: "dict[str, Tensor]") -> "dict[str, Any]":
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

    def solve(
        self, name: str, predict: "Callable[[Tensor, float], Tensor]", noise: "Tensor", times: Sequence[float]
    ) -> "Tensor":
        """Latents from noise, by the solver of that name.

        Args:
            predict: the model's prediction at a time. times: of `sampling_times`.
        """

    def sampling_times(self, steps: int, size: tuple[int, ...], shift: float | None = None) -> list[float]:
        """Times from noise to image, steps + 1 values in the family's direction.

        Raises:
            ConfigError: if a shift is asked for that the family does not know.
        """


class Family(Protocol):
    """What a family does for training, caching, drawing and the tools."""

    def load_for_training(self, config: "RunConfig", storing: "Storing") -> Trainee:
        """Load or create the model of a run, in main memory.

        Args:
            storing: how its weights are converted as they are read.

        Raises:
            CheckpointError: if the checkpoint holds another model.
            ConfigError: if the run asks for what the model does not have.
        """

    def make_process(self, config: "RunConfig", options: dict[str, Any]) -> Process:
        """The process of a run.

        Args:
            options: of the model; see `Trainee`.
        """

    def outline_model(self, config: "RunConfig") -> ModelOutline:
        """The model of a run without storage, for the estimate of memory."""

    def check_caches(self, config: "RunConfig", geometry: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compare cached tensors with what the model takes.

        Args:
            shapes: of one item, by plain name.

        Raises:
            ConfigError: naming the key of the encoder and the field of the geometry.
        """

    def checkpoint_options(self, config: "RunConfig") -> dict[str, Any]:
        """Options that training records and caching obeys, before the model is loaded."""

    def load_checkpoint(self, source: str | Path, *, ema: bool = False) -> "WeightFile":
        """A checkpoint under the family's names: a file, a folder or a hub id.

        Args:
            ema: its averaged weights.

        Raises:
            CheckpointError: if there is none, or it is of another family.
        """

    def load_for_run(self, file: "WeightFile", config: "RunConfig", storing: "Storing") -> "nn.Module":
        """A checkpoint as a run computes with it, what it merges included."""

    def open_base(self, config: "RunConfig") -> "WeightFile":
        """The checkpoint below the adapters of a run.

        Raises:
            ConfigError: if the run starts from random weights.
        """

    def options_of(self, file: "WeightFile") -> dict[str, Any]:
        """Options that a checkpoint records."""

    def load_to_merge(self, file: "WeightFile") -> "nn.Module":
        """A model in the dtype of its file, to have adapters merged into it."""

    def diffusers_modules(self, depth: int, depth_single: int) -> Mapping[str, tuple[str, ...]]:
        """Path of our module -> the modules of diffusers that make it up, in row order; empty where the names are the same."""

    def text_inputs(self, encoded: "dict[str, Tensor]", use_mask: bool) -> "dict[str, Tensor]":
        """Model inputs from encoded texts, one row per text.

        Args:
            use_mask: hide padding.
        """

    def null_inputs(self, like: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Inputs of the unconditional branch, in the shapes of others."""

    def concatenate(self, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        """Inputs of two branches in one batch."""


class TextNetworks(Protocol):
    """Text encoders that are open.

    Attributes:
        title: for messages. dtype: of their weights.
    """

    title: str
    dtype: "torch.dtype"

    def encode(self, texts: list[str]) -> "dict[str, Tensor]":
        """One row per text; floating point tensors are stored in the precision of the cache, others as they are."""


class AutoencoderNetwork(Protocol):
    """An autoencoder that is open.

    Attributes:
        channels: of its latents. factor: pixels per latent cell and axis.
    """

    channels: int
    factor: int

    @property
    def device(self) -> "torch.device":
        """Where its weights are."""

    @property
    def dtype(self) -> "torch.dtype":
        """Of its weights."""

    def on(self, device: "torch.device") -> "AbstractContextManager[None]":
        """Its weights on a device inside the block."""

    @property
    def module(self) -> "nn.Module":
        """All of its weights."""

    def encode(self, pixels: "Tensor", noise: "Tensor | None", use_shift: bool) -> "Tensor":
        """Latents [B, C, h, w] float32 of pixels [B, 3, H, W] in [-1, 1]; ``noise`` samples them, None takes their mean."""

    def decode(self, latents: "Tensor", use_shift: bool) -> "Tensor":
        """Pixels in [-1, 1] of latents."""


class FrozenNetworks(Protocol):
    """The networks around a family's model, which cache jobs and drawing use."""

    of_checkpoint: tuple[str, ...]
    """Kinds of cache that are made by networks in the checkpoint that is trained."""

    def needed(self, config: "RunConfig") -> dict[str, tuple[str, ...]]:
        """Kind of cache -> keys that must be set to make it."""

    def sources(self, config: "RunConfig", kind: str) -> "dict[str, Source]":
        """Where the files of a kind's networks are, by role."""

    def settings(self, config: "RunConfig", kind: str) -> dict[str, Any]:
        """What else decides what they compute: part of the fingerprint."""

    def identities(self, config: "RunConfig", kind: str, paths: Mapping[str, Path], full: bool) -> dict[str, str]:
        """What changes when weights do, by role, for the fingerprint.

        Args:
            paths: of `sources`, those that are here. full: read the files, even where their hashes are remembered.
        """

    def tokenizers(self, config: "RunConfig") -> dict[str, str]:
        """Role of a text encoder -> hub id of its published tokenizer."""

    def token_limit(self, config: "RunConfig", role: str, encoder: Path | None, tokenizer: Any) -> "TokenLimit":
        """What a text encoder takes of a text."""

    def open_text(self, config: "RunConfig", device: "torch.device") -> TextNetworks:
        """The text encoders."""

    def open_autoencoder(
        self, config: "RunConfig", device: "torch.device", storage_device: "torch.device | None" = None
    ) -> AutoencoderNetwork:
        """The autoencoder.

        Args:
            device: where it computes. storage_device: where its weights lie; None = there too.
        """

    def outline_autoencoder(self, config: "RunConfig") -> "Callable[[], AutoencoderNetwork] | None":
        """What builds the autoencoder without its weights, to be measured; None if it is not here."""


class TaskFamily(Family, Protocol):
    """A family some of whose tasks are no denoiser: several roles, or live pictures."""

    def make_task(self, config: "RunConfig", trainee: Trainee, make_role: "Callable[[str, nn.Module], Role]") -> "Task":
        """The task of a run, on the model of `load_for_training`.

        Args:
            make_role: gives a role for its name and its modules; call it once for every role.
        """

    def outline_task(self, config: "RunConfig", make_role: "Callable[[str, nn.Module], Any]") -> TaskOutline:
        """The task of a run for an estimate, with its modules on the meta device.

        Args:
            make_role: gives what stands for a role.
        """

    def make_tokenizer(self, config: "RunConfig") -> "Callable[[list[str]], dict[str, Tensor]] | None":
        """What a task that reads live pictures makes of their captions; None = nothing. Picklable, for loader workers."""


class PublishedTrainer(Protocol):
    """Files of a family's own trainer."""

    def read_settings(self, document: dict[str, Any]) -> "Imported | None":
        """Translate its settings; None if the document is something else. Torch-free."""

    def read_state(self, path: Path, config: "RunConfig", *, moments: bool = True) -> PublishedState:
        """Read a checkpoint for the run that goes on from it.

        Args:
            moments: take over those of the optimizer.

        Raises:
            CheckpointError: if it does not belong to the run's model and optimizer.
        """

    def write_state(self, state: PublishedState, config: "RunConfig") -> tuple[dict[str, Any], list[str]]:
        """A state of a run as the content of one of its checkpoints, and lines on what that trainer does otherwise.

        Raises:
            CheckpointError: for a model or an optimizer that it does not have.
        """

    def open_caches(self, config: "RunConfig", sources: Sequence[Path], kinds: Collection[str]) -> "ForeignCaches":
        """Open the caches of one data set.

        Raises:
            CacheError: if they are of no known form, or incomplete.
            ConfigError: if the run needs what they do not hold.
        """

    def read_lora(self, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> "dict[str, Tensor]":
        """A LoRA file of it under our names; unknown names are passed on.

        Raises:
            CheckpointError: for what cannot be translated.
        """

    def write_lora(self, tensors: "Mapping[str, Tensor]") -> "tuple[dict[str, Tensor], dict[str, str]]":
        """A LoRA under our names as it stores it: tensors and header.

        Raises:
            CheckpointError: naming layers that it cannot adapt.
        """
