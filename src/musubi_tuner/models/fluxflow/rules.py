"""Static rules of the FluxFlow family. Torch-free."""

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from musubi_tuner.config.diagnostics import Diagnostic, did_you_mean, error, warning
from musubi_tuner.config.rules.rule import Rules
from musubi_tuner.config.when import describe
from musubi_tuner.models.fluxflow.geometry import LAYOUTS, FluxFlowConfig
from musubi_tuner.models.fluxflow.settings import model_of, objective_of

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig

FLUXFLOW = Rules()
rule = FLUXFLOW.rule


@rule("F01", "objective.train_vae objective.train_diff objective.train_diff_full")
def _mode(config: "RunConfig") -> Iterator[Diagnostic]:
    objective = objective_of(config)
    if not (objective.train_vae or objective.train_diff or objective.train_diff_full):
        text = (
            "is false and so are objective.train_diff and train_diff_full, so nothing would be trained; set one of them"
        )
        yield error("F01", "objective.train_vae", text, "objective.train_diff")


@rule("F11 U01 NA03", "model.init model.geometry model.layout model.text_max_tokens")
def _shape_of_a_new_model(config: "RunConfig") -> Iterator[Diagnostic]:
    model, step = model_of(config), config.step
    if model.init != "scratch":
        if model.geometry and (step is None or "geometry" in (step.own.get("model") or {})):
            text = 'has no effect because model.init is "checkpoint", whose shape is that of its file'
            yield warning("NA03", "model.geometry", text, "model.init")
        return
    known = [field.name for field in fields(FluxFlowConfig)]
    unknown = [key for key in model.geometry if key not in known]
    for key in unknown:
        yield error("U01", f"model.geometry.{key}", f"unknown key.{did_you_mean(key, known)}")
    if unknown:
        return
    try:
        geometry = FluxFlowConfig(**{**LAYOUTS[model.layout], **model.geometry})
    except (TypeError, ValueError) as problem:
        yield error("F11", "model.geometry", str(problem))
        return
    trains_text = objective_of(config).train_diff or objective_of(config).train_diff_full
    if trains_text and model.bert_path is None and model.text_max_tokens > geometry.text_positions:
        text = f"is {model.text_max_tokens}, but the text encoder has {geometry.text_positions} positions; lower it"
        yield error("F11", "model.text_max_tokens", text, "model.geometry")


@rule("F04", "objective.train_vae objective.train_diff objective.train_diff_full model.init model.path model.vae_path")
def _autoencoder(config: "RunConfig") -> Iterator[Diagnostic]:
    if not objective_of(config).train_vae and config.model.path is None and config.model.vae_path is None:
        yield error(
            "F04", "model.path", "is absent, but a flow is trained on latents of an autoencoder; name its checkpoint"
        )


@rule("F05", "objective.train_vae objective.use_lpips model.vgg_path")
def _lpips(config: "RunConfig") -> Iterator[Diagnostic]:
    objective = objective_of(config)
    if (
        objective.train_vae
        and objective.use_lpips
        and objective.train_reconstruction
        and model_of(config).vgg_path is None
    ):
        text = "is needed for objective.use_lpips; give VGG16 weights: a file, a folder, or a hub id such as timm/vgg16.tv_in1k"
        yield error("F05", "model.vgg_path", text, "objective.use_lpips")


@rule("F09", "sample.prompts objective.train_vae")
def _drawings(config: "RunConfig") -> Iterator[Diagnostic]:
    if objective_of(config).train_vae and config.sample.prompts is not None and "sample.prompts" in config.set_keys():
        step = config.step
        if step is None or "prompts" in (step.own.get("sample") or {}):
            text = "needs an autoencoder that is finished; while it trains its reconstructions are shown; remove it"
            yield error("F09", "sample.prompts", text, "objective.train_vae")


@rule("V16b", "objective.train_diff objective.train_diff_full objective.zero_terminal_snr objective.timestep_sampling")
def _last_times(config: "RunConfig") -> Iterator[Diagnostic]:
    objective = objective_of(config)
    if (
        (objective.train_diff or objective.train_diff_full)
        and objective.zero_terminal_snr
        and objective.timestep_sampling == "cosine_weighted"
    ):
        text = 'is "cosine_weighted", which hardly ever draws the last times, from which drawing starts; use "uniform"'
        yield warning("V16b", "objective.timestep_sampling", text, "objective.zero_terminal_snr")


@rule("F06", "objective.beta_start objective.beta_end")
def _betas(config: "RunConfig") -> Iterator[Diagnostic]:
    objective = objective_of(config)
    if objective.beta_end <= objective.beta_start:
        yield error(
            "F06",
            "objective.beta_end",
            f"is {objective.beta_end:g}, it must be above objective.beta_start = {objective.beta_start:g}",
            "objective.beta_start",
        )


@rule("F02", "objective.train_vae objective.train_reconstruction objective.gan_training")
def _aim(config: "RunConfig") -> Iterator[Diagnostic]:
    objective = objective_of(config)
    if objective.train_vae and not (objective.train_reconstruction or objective.gan_training):
        text = (
            "is false without objective.gan_training, so the autoencoder would learn its KL term alone; set one of them"
        )
        yield error("F02", "objective.train_reconstruction", text, "objective.gan_training")


@rule("F03", "adapter.type")
def _adapters(config: "RunConfig") -> Iterator[Diagnostic]:
    if config.adapter.type != "none":
        text = f'is "{config.adapter.type}", but FluxFlow has no adapters here: its flow processor is small and trains itself; set "none"'
        yield error("F03", "adapter.type", text, fix=[("adapter.type", "none")])


IDLE = ("blocks_to_swap", "base_storage", "gradient_checkpointing", "checkpoint_every", "checkpoint_offload", "compile")
"""Keys of [memory] that act on lists of blocks, which FluxFlow does not have; tasks of several roles recompute their convolutions."""


@rule("F07", " ".join(f"memory.{name}" for name in IDLE))
def _blocks(config: "RunConfig") -> Iterator[Diagnostic]:
    several = not config.spec.task(config).denoises
    for name in IDLE:
        off = type(config.memory).model_fields[name].default
        if name == "gradient_checkpointing" and several:
            continue
        if config.get(f"memory.{name}") not in (off, 0, "auto", "none", False):
            text = f"does nothing for FluxFlow, whose blocks are not streamed; leave it at {describe(off)}"
            yield error("F07", f"memory.{name}", text, fix=[(f"memory.{name}", off)])


@rule("F08", "cache.vae_tiling")
def _tiling(config: "RunConfig") -> Iterator[Diagnostic]:
    if config.cache.vae_tiling:
        text = "is true, but FluxFlow's autoencoder works on whole pictures; set it to false"
        yield error("F08", "cache.vae_tiling", text, fix=[("cache.vae_tiling", False)])


@rule("F10", "ema.init")
def _average(config: "RunConfig") -> Iterator[Diagnostic]:
    if config.ema.init == "checkpoint":
        text = 'is "checkpoint", but the average of FluxFlow begins with the weights that train; set "model", and model.weights = "ema" to start from the average'
        yield error("F10", "ema.init", text, "model.weights", fix=[("ema.init", "model")])
