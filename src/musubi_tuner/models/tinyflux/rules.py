"""Static rules of the TinyFlux family. Torch-free."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from musubi_tuner.config.diagnostics import Diagnostic, did_you_mean
from musubi_tuner.config.model_sections import Sd15Teachers
from musubi_tuner.config.swap import check_swap
from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig
from musubi_tuner.models.tinyflux.settings import (
    model_of,
    no_guidance,
    objective_of,
    resolve_experts,
    teachers_of,
    written_guidance,
)

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig


def _error(key: str, message: str) -> Diagnostic:
    return Diagnostic("error", key, message)


DISTILLING = ("lune_weight", "lune_warmup_steps", "lune_mode", "sol_weight", "sol_stats_weight", "sol_spatial_weight",
              "sol_warmup_steps")  # fmt: skip
"""Settings of [objective] that concern nothing but what the predictors learn from teachers."""


def check(config: "RunConfig") -> list[Diagnostic]:
    """Static rules of this family."""
    found: list[Diagnostic] = []
    experts, model = config.sd15, model_of(config)
    if objective_of(config).timestep_stratified and objective_of(config).timestep_sampling != "uniform":
        found.append(Diagnostic("error", "objective.timestep_stratified", 'needs timestep_sampling = "uniform"'))
    objective = objective_of(config)
    if objective.guidance_min > objective.guidance_max:
        found.append(
            Diagnostic(
                "error",
                "objective.guidance_min",
                f"is {objective.guidance_min}, above guidance_max = {objective.guidance_max}",
            )
        )
    if config.sample.guidance < 1:
        found.append(
            Diagnostic("error", "sample.guidance", f"is {config.sample.guidance}, expected at least 1 (= off)")
        )
    every = [teachers_of(config, dataset) for dataset in config.datasets] or [experts]
    used = [own for own in every if own.extracted]
    if any(own.unet is None for own in used) and config.cache.run != "never":
        found.append(
            Diagnostic(
                "error",
                "experts.unet",
                "is needed to cache teacher features; give the SD1.5 U-Net, or set enable_lune = false and "
                "enable_sol = false to train without teachers",
            )
        )
    if resolve_experts(config)["expert_input"] == "noised_image" and any(own.vae is None for own in used):
        found.append(
            Diagnostic(
                "error",
                "experts.vae",
                'is needed by expert_input = "noised_image" (the default for a new model); give the SD1.5 autoencoder, '
                'or set expert_input = "random"',
            )
        )
    if model.init == "scratch" and config.adapter.type != "none":
        found.append(
            Diagnostic(
                "error",
                "model.init",
                f'is "scratch", but adapter.type = "{config.adapter.type}" trains beside a frozen model, which would stay random; '
                "give model.path",
            )
        )
    if model.init == "scratch":
        known = TinyFluxConfig.shape_fields()
        for key in model.geometry:
            if key not in known:
                found.append(Diagnostic("error", f"model.geometry.{key}", f"unknown key.{did_you_mean(key, known)}"))
        if not any(key not in known for key in model.geometry):
            try:
                geometry = TinyFluxConfig.from_dict(model.geometry)
            except (TypeError, ValueError) as error:
                found.append(Diagnostic("error", "model.geometry", str(error)))
            else:
                found += check_swap(
                    config.memory,
                    {"double_blocks": geometry.num_double_layers, "single_blocks": geometry.num_single_layers},
                )
                if not geometry.guidance_embeds:
                    found += [
                        no_guidance(key, "model.geometry.guidance_embeds is false") for key in written_guidance(config)
                    ]
                if model.temperature_per_head is not None and not geometry.use_sol_prior:
                    reason = "has no effect because model.geometry.use_sol_prior is false"
                    found.append(Diagnostic("warning", "model.temperature_per_head", reason))
                for enabled, built, name in (
                    (experts.enable_lune, geometry.use_lune_expert, "lune"),
                    (experts.enable_sol, geometry.use_sol_prior, "sol"),
                ):
                    if enabled and not built:
                        switch = {"lune": "use_lune_expert", "sol": "use_sol_prior"}[name]
                        found.append(
                            Diagnostic(
                                "error",
                                f"experts.enable_{name}",
                                f"is true, but model.geometry.{switch} is false; the model could not use the features",
                            )
                        )
    if objective_of(config).spatial_weighting and not experts.enable_sol:
        found.append(
            Diagnostic("error", "objective.spatial_weighting", "needs Sol's map, but experts.enable_sol is false")
        )
    for name, enabled in (("lune", experts.enable_lune), ("sol", experts.enable_sol)):
        if not enabled:
            found += [
                Diagnostic("warning", key, f"has no effect because experts.enable_{name} is false")
                for key in config.set_keys()
                if key.startswith(f"objective.{name}_") or key in (f"experts.{name}", f"experts.{name}_source")
            ]
    if config.adapter.type != "none":
        idle = {f"objective.{name}" for name in DISTILLING}
        if not objective_of(config).spatial_weighting:  # which counts for the samples that are distilled
            idle.add("objective.distill_on_dropped")
        reason = "has no effect because the predictors below an adapter are frozen: teachers are fed, not distilled"
        found += [Diagnostic("warning", key, reason) for key in config.set_keys() if key in idle]
    if objective_of(config).missing_teacher == "zeros" and len({own.teachers for own in every}) < 2:
        reason = "has no effect because all data sets have the same teachers"
        found.append(Diagnostic("warning", "objective.missing_teacher", reason))
    return found + _idle(config) + _teachers(config) + _geometric_sol(config)


def _geometric_sol(config: "RunConfig") -> list[Diagnostic]:
    """What `experts.sol_source` = "geometric" means, and what it leaves without effect."""
    experts = config.sd15
    if not experts.enable_sol or experts.sol_source == "extracted":
        return []
    found = [
        Diagnostic(
            "warning",
            "experts.sol_source",
            'is "geometric": Sol is then a formula of the time alone, the same for every picture, which its author calls '
            'wrong; write "extracted" for the teacher\'s attention',
        )
    ]
    idle = ["sol"]
    if not experts.extracted:
        idle += ["unet", "vae", "expert_input", "expert_time", "resolution", "seed", "dtype", "times_per_forward"]
    return found + [
        Diagnostic("warning", key, 'has no effect because experts.sol_source is "geometric"')
        for key in (f"experts.{name}" for name in idle)
        if key in config.set_keys()
    ]


def _idle(config: "RunConfig") -> list[Diagnostic]:
    """Settings of teachers that cannot act."""
    experts = config.sd15
    cached = (
        "expert_input", "expert_time", "sol_spatial_norm", "resolution", "time_buckets", "seed", "dtype", "times_per_forward",
    )  # fmt: skip
    learned = ("teacher_dropout_mode", "distill_on_dropped", "drop_experts_with_text")
    of_teachers = [f"experts.{name}" for name in cached] + [f"objective.{name}" for name in learned]
    silent = [
        (not experts.teachers, [*of_teachers, "cache.experts_batch_size"], "both teachers are off"),
        (experts.expert_input == "random", ["experts.vae"], 'experts.expert_input is "random"'),
    ]
    return [
        Diagnostic("warning", key, f"has no effect because {reason}")
        for condition, keys, reason in silent
        if condition
        for key in keys
        if key in config.set_keys()
    ]


def _teachers(config: "RunConfig") -> list[Diagnostic]:
    """Rules between [experts] and what datasets say of it."""
    found, run = [], config.sd15
    places = {"experts": config.sd15} | {
        f"{own.name}.experts": teachers_of(config, own) for own in config.datasets if own.experts
    }
    for place, experts in places.items():
        times = experts.times_per_forward
        if isinstance(times, int) and times < 1:
            found.append(_error(f"{place}.times_per_forward", f'is {times}, expected 1 or more, or "auto"'))
    changed = [dataset for dataset in config.datasets if dataset.experts]
    for dataset in changed:
        found += _own_teachers(f"{dataset.name}.experts", dataset.experts, run, teachers_of(config, dataset))
    users = {name: [d for d in config.datasets if name in teachers_of(config, d).teachers] for name in run.teachers}
    for name in run.teachers if changed else ():
        if not users[name]:
            found.append(
                _error(f"experts.enable_{name}", "is true, but every dataset turns it off; set it to false, or leave it on in one")
            )  # fmt: skip
    for name in [key.removeprefix("experts.") for key in config.set_keys() if key.startswith("experts.")]:
        others = users.get(name, [dataset for every in users.values() for dataset in every])
        if others and not name.startswith("enable_") and all(name in dataset.experts for dataset in others):
            found.append(
                Diagnostic(
                    "warning", f"experts.{name}", "has no effect because every dataset with teachers has its own"
                )
            )
    return found


def _own_teachers(where: str, own: Mapping[str, Any], run: Sd15Teachers, resolved: Sd15Teachers) -> list[Diagnostic]:
    """Rules of one dataset's ``experts``.

    Args:
        own: as written. run: [experts]. resolved: both together.
    """
    found = [
        _error(f"{where}.enable_{name}", f"is true, but experts.enable_{name} is false, and a dataset cannot turn on what the run "
               f"does not learn from; set experts.enable_{name} = true, and false in the other datasets")
        for name in resolved.teachers if name not in run.teachers
    ]  # fmt: skip
    if not run.teachers:
        return found or [
            Diagnostic("warning", where, "has no effect because experts.enable_lune and enable_sol are false")
        ]
    silent = {name: f"enable_{name} is false here" for name in ("lune", "sol") if name not in resolved.teachers}
    if not resolved.teachers:
        silent |= {key: "both teachers are off here" for key in own if not key.startswith("enable_")}
    if run.expert_input == "random":
        silent["vae"] = 'experts.expert_input is "random"'
    found += [
        Diagnostic("warning", f"{where}.{key}", f"has no effect because {reason}")
        for key, reason in silent.items()
        if key in own
    ]
    return found
