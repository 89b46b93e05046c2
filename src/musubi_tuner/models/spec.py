"""What the framework knows of a model family. Torch-free; heavy parts are dotted names resolved on use."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig
    from musubi_tuner.config.fields import Section
    from musubi_tuner.config.rules.rule import Rules
    from musubi_tuner.models.family import Family, FrozenNetworks, PublishedTrainer, TaskFamily


def resolve(dotted: str) -> Any:
    """Import ``package.module:name`` and return the object."""
    module, name = dotted.split(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class AdapterTargets:
    """Where adapters go in a family.

    Attributes:
        layers: block list -> names of the Linear layers in one of its blocks, in file order.
        blocks: block list -> number of blocks of the published model.
        norms: block list -> names of the norms in one of its blocks whose scales adapter.train_norm changes.
        convolutions: block list -> names of the convolutions in one of its blocks, which adapter.conv_rank adapts.
        outside: paths of Linear layers outside of the block lists, which get one only when asked for.
        exclude: regular expressions of whole module paths that get an adapter only when asked for.
        on_input: regular expression of the layers whose inputs (IA)^3 scales, and not their outputs.
        kinds: name -> pattern (config/patterns.py) of the layers that adapter.kinds calls so; none = all are of one kind.
        usual: kinds that are adapted unless adapter.kinds says otherwise.
        presets: name -> key of [adapter] -> value.
        network_module: what musubi-tuner would call the module, for metadata.
    """

    layers: Mapping[str, tuple[str, ...]]
    blocks: Mapping[str, int] = field(default_factory=dict)
    norms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    convolutions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outside: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    on_input: str = r"(?!)"
    kinds: Mapping[str, str] = field(default_factory=dict)
    usual: tuple[str, ...] = ()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    network_module: str


@dataclass(frozen=True)
class Latents:
    """Size of a run's latents.

    Attributes:
        channels: of one. factor: pixels per latent cell and axis.
    """

    channels: int
    factor: int

    def shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Of a picture."""
        return self.channels, height // self.factor, width // self.factor


OF_DENOISERS = ("objective.*", "experts.*", "adapter.*", "memory.*", "validation.*", "sample.*", "train.masked_loss",
                "train.prior_loss_weight")  # fmt: skip
"""Patterns of keys that only act on denoisers."""


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What is known of a run's task without torch.

    Attributes:
        roles: names of the modules that move on their own; that of a denoiser is ``model``.
        caches: kinds of cache that it reads, as far as the data sets want them.
        pixels: it reads the pictures themselves.
        own: patterns of keys that act on it although they usually belong to denoisers.
    """

    roles: tuple[str, ...] = ("model",)
    caches: tuple[str, ...] = ("latents", "text", "experts")
    pixels: bool = False
    own: tuple[str, ...] = ()

    @property
    def denoises(self) -> bool:
        """Whether it is the task of a denoiser on cached latents, which the framework makes itself."""
        return self.roles == ("model",) and not self.pixels

    def has(self, key: str) -> bool:
        """Whether a dotted key of a run file has an effect on this task."""
        if self.denoises or any(fnmatchcase(key, pattern) for pattern in self.own):
            return True
        return not any(fnmatchcase(key, pattern) for pattern in OF_DENOISERS)


def _denoiser(config: "RunConfig") -> TaskFacts:
    return TaskFacts()


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All the trainer knows about one model family.

    Attributes:
        code: short name in cache file names; full_name: in cache metadata and configs.
        pixel_step: image sides are multiples of this; finest_step: or of this, where a data set asks for it; None = the same. vae_factor: pixels per latent cell.
        latent_channels: of the autoencoder; where runs differ in it or in vae_factor, ``latents`` says so. latent_shift: whether the autoencoder's shift is subtracted.
        other_names: words by which other trainers name it; a family with some is trained by them too.
        scripts: beginning of the name of another trainer's script -> what it trains, if that is another model; "" = this one.
        hub_id: published repository of the family, for which ``hub`` stands; None if it has none.
        sample_size: default side of a drawn picture in pixels.
        t5_preset: published T5 that a single file without config is taken for; t5_attention_mask: whether T5 sees it.
        drops_text: it trains without text by leaving encodings out (objective.text_dropout); else an empty caption stands for none.
        guidance_embedded: the model takes a guidance number; classifier-free guidance is then separate.
        expert_keys: names of the teacher tensors in an experts cache, each begun by the name of its teacher; empty = no such
            job.
        defaults: dotted config key -> value where the family differs from the schema.
        dataset_defaults: shared dataset key -> value.
        sections: TOML table -> its class in this family, where it is not the shared one.
        foreign_keys: key that the family does not have (dotted, or its last part, or its table) -> why, or what to write
            instead; a function gets the value.
        rules: static rules of the family, torch-free.
        geometry: dotted name of the torch-free dataclass that [model.geometry] and config.json describe.
        task: facts of the task of a run. Where they are not those of a denoiser, the family makes it (see `TaskFamily`).
        package: with a module ``family`` (see `Family`) and, where ``has_published_trainer``, a module ``published`` (see
            `PublishedTrainer`).
        frozen_networks: module with what `FrozenNetworks` names.
        ways_to_save: what a run that does not fit into memory may still do, in the family's order; None = the usual ways.
        log_line: what users of the family's own trainer look for in its log, from the logged values by tag.
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
    finest_step: int | None = None
    vae_factor: int
    latent_channels: int
    latent_shift: bool
    latents: "Callable[[RunConfig], Latents] | None" = None
    sample_size: int
    t5_tokenizer: str = ""
    clip_tokenizer: str = ""
    hub_id: str | None = None
    other_names: tuple[str, ...] = ()
    scripts: Mapping[str, str] = field(default_factory=dict)
    t5_preset: str = "base"
    t5_attention_mask: bool = True
    guidance_embedded: bool = False
    drops_text: bool = False
    expert_keys: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    dataset_defaults: Mapping[str, Any] = field(default_factory=dict)
    sections: "Mapping[str, type[Section]]" = field(default_factory=dict)
    foreign_keys: Mapping[str, str | Callable[[Any], str]] = field(default_factory=dict)
    rules: "Rules | None" = None
    geometry: str
    task: "Callable[[RunConfig], TaskFacts]" = _denoiser
    package: str
    has_published_trainer: bool = False
    log_line: "Callable[[Mapping[str, float]], str] | None" = None
    ways_to_save: "Callable[[RunConfig], list[str]] | None" = None
    frozen_networks: str = "musubi_tuner.encoders.clip_and_t5"
    block_lists: tuple[str, ...]
    adapters: AdapterTargets
    quantizable: str = r"(?!)"
    modulation: str = r"(?!)"

    @property
    def family(self) -> "Family":
        """What the family does; imports torch."""
        return cast("Family", importlib.import_module(f"{self.package}.family"))

    @property
    def task_family(self) -> "TaskFamily":
        """The same for a family that makes tasks of its own."""
        return cast("TaskFamily", self.family)

    @property
    def encoders(self) -> "FrozenNetworks":
        """The networks around the model. Torch-free until one is opened."""
        return cast("FrozenNetworks", importlib.import_module(self.frozen_networks))

    @property
    def published(self) -> "PublishedTrainer | None":
        """What is known of files of the family's own trainer; None if it has none. Torch-free until it is used."""
        if not self.has_published_trainer:
            return None
        return cast("PublishedTrainer", importlib.import_module(f"{self.package}.published"))

    def why_not(self, key: str, value: Any) -> str | None:
        """Why this family has no such key, or what to write instead; None if nothing is known of it."""
        names = (key, key.rpartition(".")[2], key.partition(".")[0])
        found = next((self.foreign_keys[name] for name in names if name in self.foreign_keys), None)
        return found(value) if callable(found) else found

    def geometry_class(self) -> Any:
        """The torch-free geometry dataclass."""
        return resolve(self.geometry)
