"""Static rules of the TinyFlux family. Torch-free."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from musubi_tuner.config.diagnostics import Diagnostic, did_you_mean, error, warning
from musubi_tuner.config.rules.rule import Rules
from musubi_tuner.config.schema.experts import Sd15Teachers
from musubi_tuner.config.swap import check_swap
from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig
from musubi_tuner.models.tinyflux.settings import (
    model_of,
    objective_of,
    resolve_experts,
    teachers_of,
)

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig


TINYFLUX = Rules()
rule = TINYFLUX.rule


def _every(config: "RunConfig") -> list[Sd15Teachers]:
    """The teachers of each data set; those of the run where it has none."""
    return [teachers_of(config, dataset) for dataset in config.datasets] or [config.sd15]


@rule("T02", "objective.guidance_min objective.guidance_max")
def _embedded_range(config: "RunConfig") -> Iterator[Diagnostic]:
    objective = objective_of(config)
    if objective.guidance_min > objective.guidance_max:
        text = f"is {objective.guidance_min}, above guidance_max = {objective.guidance_max}"
        yield error("T02", "objective.guidance_min", text, "objective.guidance_max")


@rule("T03", "sample.guidance")
def _guidance(config: "RunConfig") -> Iterator[Diagnostic]:
    if config.sample.guidance < 1:
        text = f"is {config.sample.guidance}, expected at least 1; 1 = off"
        yield error("T03", "sample.guidance", text, fix=[("sample.guidance", 1.0)])


@rule("T04", "experts.unet experts.enable_lune experts.enable_sol experts.sol_source cache.run")
def _teacher_files(config: "RunConfig") -> Iterator[Diagnostic]:
    if (
        any(own.extracted and own.unet is None for own in _every(config))
        and config.cache.run != "never"
        and not config.is_precached
    ):
        text = (
            "is required to cache teacher features; name the SD1.5 U-Net, or set enable_lune = false and enable_sol = false to train "
            "without teachers"
        )
        yield error("T04", "experts.unet", text, "experts.enable_lune", "experts.enable_sol")


@rule("T04", "experts.vae experts.expert_input experts.enable_lune experts.enable_sol experts.sol_source model.init")
def _teacher_autoencoder(config: "RunConfig") -> Iterator[Diagnostic]:
    noised = resolve_experts(config)["expert_input"] == "noised_image"
    if noised and any(own.extracted and own.vae is None for own in _every(config)) and not config.is_precached:
        text = (
            'is required by expert_input = "noised_image" (the default for a new model); name the SD1.5 autoencoder, or set '
            'expert_input = "random"'
        )
        yield error("T04", "experts.vae", text, "experts.expert_input", "model.init")


@rule("T10", "experts.expert_input experts.enable_lune experts.enable_sol experts.sol_source model.init")
def _teachers_see_the_picture(config: "RunConfig") -> Iterator[Diagnostic]:
    if resolve_experts(config)["expert_input"] != "noised_image":
        return
    for dataset in config.datasets:
        moved = [key for key in ("flip_aug", "random_crop") if getattr(dataset.views, key)]
        if moved and teachers_of(config, dataset).extracted:
            text = (
                f'{moved[0]} moves the picture, and features of teachers that see it (expert_input = "noised_image") are made once, from '
                "the original picture; turn one off, or set experts = false for this data set"
            )
            yield error("T10", f"{dataset.name}.{moved[0]}", text, "experts.expert_input")


@rule("T05", "model.init adapter.type")
def _adapter_of_random_weights(config: "RunConfig") -> Iterator[Diagnostic]:
    if config.model.init == "scratch" and config.adapter.type != "none":
        text = (
            f'is "scratch", but with adapter.type = "{config.adapter.type}" the model is frozen and would stay random; set '
            "model.path"
        )
        yield error("T05", "model.init", text, "adapter.type")


@rule("T06 V23 U01 NA03", "model.init model.geometry model.temperature_per_head memory.blocks_to_swap memory.swap_policy "
      "experts.enable_lune experts.enable_sol")  # fmt: skip
def _shape_of_a_new_model(config: "RunConfig") -> Iterator[Diagnostic]:
    model, experts = model_of(config), config.sd15
    if model.init != "scratch":
        return
    known = TinyFluxConfig.shape_fields()
    unknown = [key for key in model.geometry if key not in known]
    for key in unknown:
        yield error("U01", f"model.geometry.{key}", f"unknown key.{did_you_mean(key, known)}")
    if unknown:
        return
    try:
        geometry = TinyFluxConfig.from_dict(model.geometry)
    except (TypeError, ValueError) as problem:
        yield error("T06", "model.geometry", str(problem))
        return
    blocks = {"double_blocks": geometry.num_double_layers, "single_blocks": geometry.num_single_layers}
    yield from check_swap(config.memory, blocks)
    if model.temperature_per_head is not None and not geometry.use_sol_prior:
        text = "has no effect because model.geometry.use_sol_prior is false"
        yield warning("NA03", "model.temperature_per_head", text, "model.geometry")
    for enabled, built, name, switch in (
        (experts.enable_lune, geometry.use_lune_expert, "lune", "use_lune_expert"),
        (experts.enable_sol, geometry.use_sol_prior, "sol", "use_sol_prior"),
    ):
        if enabled and not built:
            text = f"is true, but model.geometry.{switch} is false, so the model cannot use the features; change one"
            fix = [(f"experts.enable_{name}", False)]
            yield error("T06", f"experts.enable_{name}", text, "model.geometry", fix=fix)


@rule("T07", "objective.spatial_weighting experts.enable_sol")
def _map_of_sol(config: "RunConfig") -> Iterator[Diagnostic]:
    if objective_of(config).spatial_weighting and not config.sd15.enable_sol:
        text = "needs Sol's map, but experts.enable_sol is false; change one"
        yield error("T07", "objective.spatial_weighting", text, "experts.enable_sol")


@rule("NA03", "objective.missing_teacher experts.enable_lune experts.enable_sol")
def _missing_teacher(config: "RunConfig") -> Iterator[Diagnostic]:
    if objective_of(config).missing_teacher == "zeros" and len({own.teachers for own in _every(config)}) < 2:
        text = "has no effect because all data sets have the same teachers"
        yield warning("NA03", "objective.missing_teacher", text)


@rule("T08", "experts.enable_sol experts.sol_source")
def _geometric_sol(config: "RunConfig") -> Iterator[Diagnostic]:
    if config.sd15.enable_sol and config.sd15.sol_source == "geometric":
        text = (
            'is "geometric": Sol is then a formula of the time alone, the same for every picture, which its author calls wrong; '
            'write "extracted" for the teacher\'s attention'
        )
        yield warning("T08", "experts.sol_source", text, fix=[("experts.sol_source", "extracted")])


@rule("T09 NA03", "experts.enable_lune experts.enable_sol experts.times_per_forward experts.expert_input")
def _teachers(config: "RunConfig") -> Iterator[Diagnostic]:
    """Rules between [experts] and the `experts` of data sets."""
    run = config.sd15
    places = {"experts": run} | {
        f"{own.name}.experts": teachers_of(config, own) for own in config.datasets if own.experts
    }
    for place, experts in places.items():
        times = experts.times_per_forward
        if isinstance(times, int) and times < 1:
            yield error("U03", f"{place}.times_per_forward", f'is {times}, expected 1 or more, or "auto"')
    changed = [dataset for dataset in config.datasets if dataset.experts]
    for dataset in changed:
        yield from _own_teachers(f"{dataset.name}.experts", dataset.experts, run, teachers_of(config, dataset))
    users = {name: [d for d in config.datasets if name in teachers_of(config, d).teachers] for name in run.teachers}
    for name in run.teachers if changed else ():
        if not users[name]:
            text = "is true, but every data set turns it off; set it to false, or leave it on in one"
            yield error("T09", f"experts.enable_{name}", text)
    for name in [key.removeprefix("experts.") for key in config.set_keys() if key.startswith("experts.")]:
        others = users.get(name, [dataset for every in users.values() for dataset in every])
        if others and not name.startswith("enable_") and all(name in dataset.experts for dataset in others):
            text = "has no effect because every data set with teachers has its own"
            yield warning("NA03", f"experts.{name}", text)


def _own_teachers(where: str, own: Mapping[str, Any], run: Sd15Teachers, resolved: Sd15Teachers) -> list[Diagnostic]:
    """Rules of the ``experts`` of one data set.

    Args:
        own: as written. run: [experts]. resolved: both together.
    """
    found = [
        error("T09", f"{where}.enable_{name}", f"is true, but experts.enable_{name} is false, and a data set cannot turn on a teacher that "
               f"the run does not use; set experts.enable_{name} = true, and false in the other data sets")
        for name in resolved.teachers if name not in run.teachers
    ]  # fmt: skip
    if not run.teachers:
        return found or [warning("NA03", where, "has no effect because experts.enable_lune and enable_sol are false")]
    silent = {name: f"enable_{name} is false here" for name in ("lune", "sol") if name not in resolved.teachers}
    if not resolved.teachers:
        silent |= {key: "both teachers are off here" for key in own if not key.startswith("enable_")}
    if run.expert_input == "random":
        silent["vae"] = 'experts.expert_input is "random"'
    found += [
        warning("NA03", f"{where}.{key}", f"has no effect because {reason}")
        for key, reason in silent.items()
        if key in own
    ]
    return found
