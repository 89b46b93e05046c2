"""Static rules of the FLUX.1-dev family. Torch-free."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from musubi_tuner.config.diagnostics import Diagnostic, error, warning
from musubi_tuner.config.rules.rule import Rules
from musubi_tuner.config.swap import check_swap
from musubi_tuner.models.flux_dev.settings import objective_of

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig

FLUX_DEV = Rules()
rule = FLUX_DEV.rule
PUBLISHED_BLOCKS = {"double_blocks": 19, "single_blocks": 38}


@rule("D01", "model.init")
def _new_model(config: "RunConfig") -> Iterator[Diagnostic]:
    if config.model.init == "scratch":
        text = 'is "scratch", but FLUX.1 is trained with an adapter on a checkpoint; set init = "checkpoint" and model.path'
        yield error("D01", "model.init", text, fix=[("model.init", "checkpoint")])


@rule("D02", "adapter.type")
def _full_training(config: "RunConfig") -> Iterator[Diagnostic]:
    if config.adapter.type == "none":
        text = (
            'is "none"; full training of FLUX.1 is not supported (11.9 B parameters with optimizer state); write "lora"'
        )
        yield error("D02", "adapter.type", text, fix=[("adapter.type", "lora")])


@rule("V23", "memory.blocks_to_swap memory.swap_policy")
def _blocks(config: "RunConfig") -> Iterator[Diagnostic]:
    yield from check_swap(config.memory, PUBLISHED_BLOCKS)


@rule("V18", "objective.weighting_scheme objective.timestep_sampling")
def _weights_that_shape(config: "RunConfig") -> Iterator[Diagnostic]:
    objective = objective_of(config)
    shapes = objective.weighting_scheme in ("logit_normal", "mode") and objective.timestep_sampling != "sigma"
    if shapes and "objective.weighting_scheme" in config.set_keys():
        text = f'is "{objective.weighting_scheme}", which has no effect without timestep_sampling = "sigma"'
        yield warning("V18", "objective.weighting_scheme", text, "objective.timestep_sampling")


@rule("D03", "objective.preserve_distribution_shape objective.timestep_sampling")
def _shape_of_the_density(config: "RunConfig") -> Iterator[Diagnostic]:
    objective = objective_of(config)
    if objective.preserve_distribution_shape and objective.timestep_sampling in ("uniform", "sigma"):
        text = f'does not apply to timestep_sampling = "{objective.timestep_sampling}"; set it to false'
        yield error("D03", "objective.preserve_distribution_shape", text, "objective.timestep_sampling")


@rule("V16", "objective.min_snr_gamma objective.min_snr_form")
def _form_of_min_snr(config: "RunConfig") -> Iterator[Diagnostic]:
    objective = objective_of(config)
    if objective.min_snr_gamma and objective.min_snr_form == "published":
        text = 'is "published", the form for noise prediction; for a velocity loss write "x0"'
        fix = [("objective.min_snr_form", "x0")]
        yield warning("V16", "objective.min_snr_form", text, "objective.min_snr_gamma", fix=fix)
