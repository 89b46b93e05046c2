"""Static rules between settings. Torch-free; rules about devices and files are labelled passes of their own."""

import os
import re
from dataclasses import replace
from pathlib import Path

from musubi_tuner.config.diagnostics import Diagnostic, did_you_mean
from musubi_tuner.config.paths import exists, is_checkpoint_name, is_hub_id, is_published, is_repository
from musubi_tuner.config.patterns import compile_pattern
from musubi_tuner.config.pipeline import unfinished_step
from musubi_tuner.config.prompts import Prompt, sample_prompts
from musubi_tuner.config.run_config import RunConfig
from musubi_tuner.config.schema import parameters
from musubi_tuner.errors import ConfigError, describe_unwritable
from musubi_tuner.models.spec import ModelSpec


def validate(config: RunConfig) -> list[Diagnostic]:
    """Everything that can be known about a config without torch: rules, then files."""
    return [
        *_needs(config),
        *_adapter(config),
        *_memory(config),
        *_no_effect(config),
        *_family(config),
        *_files(config),
        *_until(config),
        *_roles(config),
    ]


def _error(key: str, message: str) -> Diagnostic:
    return Diagnostic("error", key, message)


def _movement(config: RunConfig, written: set[str]) -> list[Diagnostic]:
    """Rules of how the weights of one role move.

    Args:
        written: keys that a person set, for the run or for the role.
    """
    found: list[Diagnostic] = []
    if config.train.max_steps is not None and config.scheduler.warmup_steps > config.train.max_steps:
        found.append(
            _error(
                "scheduler.warmup_steps",
                f"is {config.scheduler.warmup_steps}, longer than train.max_steps = {config.train.max_steps}; "
                "the learning rate would never be reached",
            )
        )
    length = config.scheduler.total_steps
    if length is not None and config.scheduler.type != "constant" and length <= config.scheduler.warmup_steps:
        found.append(
            _error(
                "scheduler.total_steps",
                f"is {length}, and warm-up alone takes scheduler.warmup_steps = {config.scheduler.warmup_steps}; make it longer",
            )
        )
    if config.scheduler.min_lr > config.optimizer.lr:
        found.append(
            _error("scheduler.min_lr", f"is {config.scheduler.min_lr}, above optimizer.lr = {config.optimizer.lr}")
        )
    for index, beta in enumerate(config.optimizer.betas):
        if not 0 <= beta < 1:
            found.append(_error("optimizer.betas", f"value {index} is {beta}, expected at least 0 and below 1"))
    if config.ema.enabled and config.ema.init == "checkpoint":
        if config.model.init == "scratch":
            found.append(_error("ema.init", 'is "checkpoint", but model.init is "scratch"; write ema.init = "model"'))
        if config.adapter.type != "none":
            found.append(
                _error(
                    "ema.init",
                    'is "checkpoint", but the average of an adapter starts with it; write ema.init = "model"',
                )
            )
        if config.ema.warmup is True:
            found.append(
                _error(
                    "ema.warmup",
                    'would forget the average of ema.init = "checkpoint" at once; write ema.warmup = false',
                )
            )
    silent: list[tuple[bool, tuple[str, ...], str]] = [
        (not config.ema.enabled, ("ema.decay", "ema.warmup", "ema.init", "ema.on_cpu"), "ema.enabled is false"),
        (config.scheduler.warmup_steps == 0, ("scheduler.warmup_type",), "scheduler.warmup_steps is 0"),
        (
            config.scheduler.type == "constant",
            ("scheduler.min_lr", "scheduler.total_steps"),
            'scheduler.type is "constant"',
        ),
        (config.optimizer.type == "Adafactor", ("optimizer.betas", "optimizer.eps"), "Adafactor has its own"),
    ]
    return found + _without_effect(silent, written)


def _without_effect(silent: list[tuple[bool, tuple[str, ...], str]], written: set[str]) -> list[Diagnostic]:
    """Warnings of keys that do nothing.

    Args:
        silent: condition, keys, and the reason. written: keys that a person set.
    """
    return [
        Diagnostic("warning", key, f"has no effect because {reason}")
        for condition, keys, reason in silent
        if condition
        for key in keys
        if key in written
    ]


def _roles(config: RunConfig) -> list[Diagnostic]:
    """Rules of [roles], and of how each role moves: under the role's key where it sets it, else under the run's."""
    roles, found = config.spec.task(config).roles, []
    for name in sorted({*type(config.roles).model_fields} - {"freeze", *roles}):
        if config.role_keys(name):
            found.append(_error(f"roles.{name}", f"is not a role of this run, which trains {', '.join(roles)}"))
    for name in config.frozen:
        if name not in roles:
            found.append(_error("roles.freeze", f"{name!r} is not a role of this run, which trains {', '.join(roles)}"))
        found += [
            Diagnostic("warning", f"roles.{name}.{key}", "has no effect because roles.freeze names the role")
            for key in sorted(config.role_keys(name))
        ]
    moving = [name for name in roles if name not in config.frozen]
    if not moving:
        found.append(_error("roles.freeze", "names all roles, and nothing would be trained"))
    of_run: dict[Diagnostic, int] = {}
    for name in moving:
        own = config.role_keys(name)
        for problem in _movement(config.for_role(name), own | set(config.set_keys())):
            if problem.key in own:
                found.append(replace(problem, key=f"roles.{name}.{problem.key}"))
            else:
                of_run[problem] = of_run.get(problem, 0) + 1
    for problem, count in of_run.items():
        # What does nothing for one role may act on another.
        takers = [name for name in moving if problem.key not in config.role_keys(name)]
        if problem.level == "error" or count == len(takers):
            found.append(problem)
    return found


def _needs(config: RunConfig) -> list[Diagnostic]:
    """Settings that require or exclude each other."""
    found: list[Diagnostic] = []
    model, train, objective = config.model, config.train, config.objective
    if model.init == "checkpoint" and model.path is None:
        found.append(_error("model.path", 'is required; or set init = "scratch" to train a new model'))
    if model.init == "scratch" and model.path is not None:
        found.append(_error("model.path", 'is set, but init = "scratch" starts from random weights; remove one'))
    if model.init == "checkpoint" and config.get("model.geometry"):
        found.append(_error("model.geometry", 'is read from the checkpoint; remove the table, or set init = "scratch"'))
    if train.max_steps is None and train.max_epochs is None:
        found.append(_error("train.max_steps", "is missing, and max_epochs too; give one of them"))
    if objective.ip_noise_gamma is not None and objective.ip_noise_gamma > 0.5:
        found.append(
            Diagnostic("warning", "objective.ip_noise_gamma", f"is {objective.ip_noise_gamma}; 0.1 to 0.3 is usual")
        )
    if train.mixed_precision == "fp16" and config.run.device == "cpu":
        found.append(_error("train.mixed_precision", '"fp16" needs a GPU; use "bf16" or "no" on a CPU'))
    if config.cache.dtype == "float16" and config.train.mixed_precision == "no":
        found.append(Diagnostic("warning", "cache.dtype", "float16 caches lose precision that a float32 run could use"))
    if config.distributed.num_processes > 1 and config.run.device == "mps":
        found.append(_error("distributed.num_processes", "several processes need CUDA or a CPU, not mps"))
    if config.sample.prompts is not None:
        if not (config.sample.every_steps or config.sample.every_epochs or config.sample.at_first):
            found.append(
                Diagnostic(
                    "warning", "sample.prompts", "are given, but no sample.every_steps, every_epochs or at_first"
                )
            )
        for name in ("width", "height"):
            value, step = getattr(config.sample, name), config.spec.pixel_step
            if value and value % step:
                found.append(
                    _error(
                        f"sample.{name}",
                        f"is {value}, expected a multiple of {step}: {value - value % step} or "
                        f"{value - value % step + step}",
                    )
                )
    if train.masked_loss and train.mask_foreground == train.mask_background == 0:
        found.append(
            _error("train.mask_foreground", "and mask_background are 0: no masked image could be learned from")
        )
    if config.hub.repo_id is not None and not is_repository(config.hub.repo_id):
        found.append(_error("hub.repo_id", f"is {config.hub.repo_id!r}, expected owner/name"))
    if config.hub.repo_id is not None and config.hub.release == "best" and not config.keeps_best:
        found.append(
            _error("hub.release", 'is "best", but no best is kept; write save.best = true, or set validation.split')
        )
    return found


def _adapter(config: RunConfig) -> list[Diagnostic]:
    """Rules of [adapter]."""
    adapter, found = config.adapter, []
    if adapter.type == "none":
        return [
            Diagnostic("warning", key, 'has no effect because adapter.type is "none"')
            for key in config.set_keys()
            if key.startswith("adapter.") and key != "adapter.type"
        ]
    if adapter.rank_from_weights and adapter.init_from is None:
        found.append(_error("adapter.rank_from_weights", "needs adapter.init_from, the file whose ranks are taken"))
    if adapter.rank_from_weights:
        sizes = ("preset", "kinds", "rank", "alpha", "depth", "rank_patterns", "alpha_patterns")
        for key in (f"adapter.{name}" for name in sizes):
            if key in config.set_keys():
                found.append(Diagnostic("warning", key, "has no effect because adapter.rank_from_weights is true"))
        for index, target in enumerate(adapter.targets if "adapter.targets" in config.set_keys() else []):
            found += [
                Diagnostic("warning", f"adapter.targets[{index}].{name}", "has no effect because adapter.rank_from_weights is true")
                for name in ("rank", "alpha", "depth", "enabled") if name in target.fields()
            ]  # fmt: skip
    given = [f"adapter.{name}" for name in config.spec.adapters.presets.get(adapter.preset or "", {})]
    if given and not adapter.rank_from_weights and set(given) <= set(config.set_keys()):
        found.append(
            Diagnostic(
                "warning", "adapter.preset", f"has no effect because all that it sets is written: {', '.join(given)}"
            )
        )
    if adapter.merge_multipliers and len(adapter.merge_multipliers) != len(adapter.merge):
        found.append(
            _error(
                "adapter.merge_multipliers",
                f"has {len(adapter.merge_multipliers)} numbers for {len(adapter.merge)} files in adapter.merge",
            )
        )
    if adapter.keep_default_excludes and adapter.exclude is None:
        found.append(
            Diagnostic("warning", "adapter.keep_default_excludes", "has no effect because adapter.exclude is absent")
        )
    found += _layers(config)
    expressions = {
        "include": adapter.include,
        "exclude": adapter.exclude or [],
        "only": adapter.only,
        "rank_patterns": list(adapter.rank_patterns),
        "alpha_patterns": list(adapter.alpha_patterns),
    }
    for name, patterns in expressions.items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                found.append(_error(f"adapter.{name}", f"{pattern!r} is not a regular expression ({error})"))
    for pattern, rank in adapter.rank_patterns.items():
        if not 0 <= rank <= 1024:
            found.append(_error("adapter.rank_patterns", f"{pattern!r} has rank {rank}, expected 0 (none) to 1024"))
    return found


def _layers(config: RunConfig) -> list[Diagnostic]:
    """Names of presets and kinds, and patterns of targets."""
    adapter, targets, found = config.adapter, config.spec.adapters, []
    named = [("preset", adapter.preset, targets.presets)] if adapter.preset is not None else []
    for key, name, known in [*named, *(("kinds", kind, targets.kinds) for kind in adapter.kinds or [])]:
        if not known:
            found.append(_error(f"adapter.{key}", f"does not apply to {config.spec.title}, which has none"))
        elif name not in known:
            hint = did_you_mean(name, known)
            found.append(_error(f"adapter.{key}", f"has '{name}', expected one of {', '.join(known)}.{hint}"))
    if adapter.kinds == [] and not (adapter.include or any(target.enabled for target in adapter.targets)):
        found.append(_error("adapter.kinds", "is empty, so no layer would be adapted"))
    for index, target in enumerate(adapter.targets):
        try:
            compile_pattern(target.pattern)
        except ConfigError as error:
            found.append(_error(f"adapter.targets[{index}].pattern", str(error)))
        if not target.fields():
            found.append(
                _error(f"adapter.targets[{index}]", f"sets nothing for {target.pattern!r}; give rank, for example")
            )
    return found


def _memory(config: RunConfig) -> list[Diagnostic]:
    """Rules of [memory]."""
    memory, found = config.memory, []
    frozen = config.adapter.type != "none"
    if memory.base_storage != "none" and not frozen:
        found.append(
            _error("memory.base_storage", f'"{memory.base_storage}" is for frozen models, and this run trains the model itself; '
                   'set it to "none", or train an adapter')
        )  # fmt: skip
    if isinstance(memory.blocks_to_swap, int) and memory.blocks_to_swap < 0:
        found.append(_error("memory.blocks_to_swap", f'is {memory.blocks_to_swap}, expected 0 or more, or "auto"'))
    written = config.set_keys()
    found += [*_products(config), *_kernels(config)]
    if not memory.checkpoints and "memory.checkpoint_every" in written:
        found.append(
            Diagnostic(
                "warning", "memory.checkpoint_every", "has no effect because memory.gradient_checkpointing is false"
            )
        )
    if memory.checkpoint_offload and "memory.gradient_checkpointing" in written and not memory.gradient_checkpointing:
        found.append(
            _error(
                "memory.checkpoint_offload", "recomputes blocks, and memory.gradient_checkpointing is false; remove one"
            )
        )
    if memory.checkpoint_offload and memory.blocks_to_swap and not frozen:
        found.append(
            _error("memory.checkpoint_offload", "cannot be combined with memory.blocks_to_swap while the model itself trains: "
                   "choose one way of leaving the device")
        )  # fmt: skip
    if memory.checkpoint_offload and config.run.device == "mps":
        found.append(
            _error("memory.checkpoint_offload", "nothing can be moved between mps and main memory; turn it off")
        )
    if memory.blocks_to_swap and not frozen and config.optimizer.type == "AdamW8bit":
        found.append(
            _error("optimizer.type", '"AdamW8bit" steps on the device only, and memory.blocks_to_swap keeps trained blocks and '
                   'their optimizer state in main memory; use "AdamW"')
        )  # fmt: skip
    if memory.blocks_to_swap and not frozen and config.train.mixed_precision == "fp16":
        found.append(
            _error("train.mixed_precision", '"fp16" cannot be used while trained blocks live in main memory: its loss scale is '
                   'applied on the device; use "bf16"')
        )  # fmt: skip
    if memory.blocks_to_swap and config.run.device == "mps":
        found.append(_error("memory.blocks_to_swap", "blocks cannot be swapped on mps; set it to 0"))
    if memory.base_storage == "none" and "memory.fp8_modulation" in config.set_keys():
        found.append(
            Diagnostic("warning", "memory.fp8_modulation", 'has no effect because memory.base_storage is "none"')
        )
    if memory.base_storage != "fp8_scaled" and "memory.fp8_scale" in config.set_keys():
        found.append(
            Diagnostic("warning", "memory.fp8_scale", 'has no effect because memory.base_storage is not "fp8_scaled"')
        )
    if not memory.blocks_to_swap:
        found += [
            Diagnostic("warning", key, "has no effect because memory.blocks_to_swap is 0")
            for key in ("memory.swap_policy", "memory.swap_ring", "memory.swap_pinned")
            if key in config.set_keys()
        ]
    return found


def _products(config: RunConfig) -> list[Diagnostic]:
    """Rules of products in fp8."""
    memory, written, found = config.memory, config.set_keys(), []
    if not memory.fp8_compute:
        if "memory.fp8_compute_backward" in written:
            found.append(
                Diagnostic(
                    "warning", "memory.fp8_compute_backward", "has no effect because memory.fp8_compute is false"
                )
            )
        return found
    if memory.base_storage not in ("fp8", "fp8_scaled"):
        found.append(
            _error("memory.fp8_compute", f'needs memory.base_storage = "fp8_scaled" or "fp8", and it is "{memory.base_storage}"')
        )  # fmt: skip
    if config.train.mixed_precision not in ("bf16", "auto"):
        found.append(
            _error("memory.fp8_compute", f'gives bf16 numbers, and train.mixed_precision is "{config.train.mixed_precision}"; '
                   'set it to "bf16"')
        )  # fmt: skip
    if config.run.device in ("cpu", "mps"):
        found.append(
            _error("memory.fp8_compute", f"needs a GPU that multiplies float8 numbers, and run.device is \"{config.run.device}\"; "
                   "set it to false: storage in fp8 works on every device")
        )  # fmt: skip
    if memory.fp8_scale == "block" and "memory.fp8_scale" in written:
        found.append(
            Diagnostic(
                "warning",
                "memory.fp8_scale",
                'is "block", which cannot be multiplied in fp8; rows share a scale instead',
            )
        )
    return found


def _kernels(config: RunConfig) -> list[Diagnostic]:
    """Rules of attention and compilation."""
    memory, found = config.memory, []
    if memory.attention != "sdpa":
        if config.run.device in ("cpu", "mps"):
            found.append(
                _error("memory.attention", f'"{memory.attention}" computes on GPUs only, and run.device is "{config.run.device}"; '
                       'use "sdpa"')
            )  # fmt: skip
        if config.get("model.t5_attn_mask"):
            found.append(
                _error(
                    "memory.attention",
                    f'"{memory.attention}" takes no mask, and model.t5_attn_mask is true; use "sdpa"',
                )
            )
        if memory.attention == "flash" and config.train.mixed_precision == "no":
            found.append(
                _error(
                    "memory.attention",
                    '"flash" computes in bf16 or fp16, and train.mixed_precision is "no"; change that, or use "sdpa"',
                )
            )
    if not memory.compile:
        return found + [
            Diagnostic("warning", key, "has no effect because memory.compile is false")
            for key in config.set_keys()
            if key.startswith("memory.compile_")
        ]
    if memory.blocks_to_swap and config.adapter.type == "none":
        found.append(
            _error("memory.compile", "cannot be combined with memory.blocks_to_swap while the model itself trains: compiled code "
                   "cannot stream weights that change; turn one of them off")
        )  # fmt: skip
    elif memory.blocks_to_swap and not memory.checkpoints:
        found.append(
            _error("memory.compile", "with memory.blocks_to_swap needs memory.gradient_checkpointing = true: compiled code keeps the "
                   "weights of a block until its backward pass")
        )  # fmt: skip
    elif memory.blocks_to_swap and memory.checkpoint_every > 1:
        found.append(
            _error("memory.compile", "with memory.blocks_to_swap needs memory.checkpoint_every = 1, and it is "
                   f"{memory.checkpoint_every}: compiled code keeps the weights of a block that is not recomputed until its backward "
                   "pass; set it to 1, or one of the others off")
        )  # fmt: skip
    if memory.compile_mode != "default" and memory.compile_backend != "inductor":
        found.append(
            _error(
                "memory.compile_mode",
                f'is for compile_backend = "inductor", and it is "{memory.compile_backend}"; remove one of them',
            )
        )
    return found


def _no_effect(config: RunConfig) -> list[Diagnostic]:
    """Settings that a person wrote and that have no effect."""
    distils = "lune" in config.experts.teachers and config.adapter.type == "none"
    huber = config.get("objective.loss") == "huber" or (config.get("objective.lune_mode") == "huber" and distils)
    snr_gamma, snr_form = config.get("objective.min_snr_gamma"), config.get("objective.min_snr_form")
    nothing = "nothing is saved on the way"
    no_steps = "save.every_steps is off" if config.save.every_epochs else nothing
    no_epochs = "save.every_epochs is off" if config.save.every_steps else nothing
    uniform = config.get("objective.timestep_sampling") == "uniform"
    fast = ("run.allow_tf32", "run.cudnn_benchmark")
    silent: list[tuple[bool, tuple[str, ...], str]] = [
        (uniform, ("objective.logit_mean", "objective.logit_std"), 'objective.timestep_sampling is "uniform"'),
        (config.run.device in ("cpu", "mps"), fast, f'run.device is "{config.run.device}"'),
        (config.run.deterministic, fast, "run.deterministic is true"),
        (not huber, ("objective.huber_delta",), "no loss is huber"),
        (
            not snr_gamma or snr_form == "none",
            ("objective.min_snr_form", "objective.min_snr_gamma"),
            "the min-SNR weight is off",
        ),
        (config.model.init == "checkpoint", ("model.init_scheme",), 'model.init is "checkpoint"'),
        (
            config.model.init == "scratch",
            ("model.rope_freqs", "model.weights", "model.revision", "model.ema_file", "model.upgrade_neutral"),
            'model.init is "scratch"',
        ),
        (
            config.get("model.ema_file") is not None and config.ema.init == "model",
            ("model.weights",),
            "model.ema_file names the weights",
        ),
        (
            config.train.on_nonfinite == "stop" and config.train.mixed_precision != "fp16",
            ("train.max_skipped_updates",),
            'train.on_nonfinite is "stop"',
        ),
        (not config.ema.enabled, ("sample.use_ema",), "ema.enabled is false"),
        (
            not config.validation.split,
            tuple(p.key for p in parameters() if p.section == "validation" and p.name != "split"),
            "validation.split is 0",
        ),
        (
            bool(config.validation.split) and config.validation.weights == "ema" and not config.ema.enabled,
            ("validation.weights",),
            "ema.enabled is false; the trained weights are measured",
        ),
        (
            not config.train.masked_loss,
            ("train.mask_foreground", "train.mask_background", "train.mask_normalize"),
            "train.masked_loss is false",
        ),
        (config.cache.skip_existing == "name", ("cache.verify",), 'cache.skip_existing is "name"'),
        (not config.save.every_steps, ("save.keep_last_steps",), no_steps),
        (not config.save.every_epochs, ("save.keep_last_epochs",), no_epochs),
        (not config.save.state, ("save.keep_last_states",), "save.state is false"),
        (config.adapter.type == "none", ("save.comment",), "only adapter files carry it"),
        (
            not config.objective.ip_noise_gamma,
            ("objective.ip_noise_gamma_random_strength", "objective.ip_noise_per_sample"),
            "objective.ip_noise_gamma is off",
        ),
        (
            not config.objective.ip_noise_gamma_random_strength,
            ("objective.ip_noise_per_sample",),
            "the strength is not random",
        ),
        (
            config.get("sample.cfg_scale") == 1,
            ("sample.negative_prompt",) if config.spec.guidance_embedded else (),
            "sample.cfg_scale is 1",
        ),
        (
            config.sample.prompts is None,
            tuple(p.key for p in parameters() if p.section == "sample" and p.name != "prompts"),
            "sample.prompts is absent",
        ),
        (
            config.hub.repo_id is None,
            tuple(p.key for p in parameters() if p.section == "hub" and p.name != "repo_id"),
            "hub.repo_id is absent",
        ),
        (
            config.hub.repo_id is not None and config.hub.upload_samples and config.sample.prompts is None,
            ("hub.upload_samples",),
            "sample.prompts is absent",
        ),
        (
            config.hub.repo_id is not None and not (config.save.every_steps or config.save.every_epochs),
            tuple(key for key in ("hub.every_steps", "hub.every_epochs") if config.get(key)),
            nothing,
        ),
        (
            config.distributed.num_processes == 1,
            ("distributed.main_process_port",),
            "distributed.num_processes is 1",
        ),
    ]
    written = set(config.set_keys())
    off = {"objective.min_snr_gamma"} if snr_gamma in (0, None) else set()
    if snr_form == "none":
        off.add("objective.min_snr_form")
    return _without_effect(silent, written - off)


def _family(config: RunConfig) -> list[Diagnostic]:
    """What a family does not know, and its own rules."""
    spec, found = config.spec, []
    facts = spec.task(config)
    for key in config.set_keys():
        if not facts.has(key):
            found.append(_error(key, f"acts on a denoiser, and this run of {spec.title} trains none"))
    return found + (spec.check(config) if spec.check else [])


def _until(config: RunConfig) -> list[Diagnostic]:
    until = config.step.until if config.step else None
    if until and until.metric.startswith("loss/val") and not config.validation.split:
        return [_error("until.metric", f"is {until.metric!r}, and nothing is validated (validation.split is 0)")]
    return []


_RUN_NAMES = {
    "none": 'a new model is model.init = "scratch"',
    "latest": 'an interrupted run continues by itself (resume.from = "auto"); for another run write folder:latest',
}
"""Load targets of other trainers -> what says the same here."""


def _name_of_output(config: RunConfig) -> list[Diagnostic]:
    """Libraries that read weights and states take paths in UTF-8 only: what is written under another name is lost."""
    folder = str(config.output_dir)
    try:
        os.fsencode(folder).decode("utf-8")
    except UnicodeEncodeError as error:
        return [_error("run.output_dir", f"is {folder!r}: {describe_unwritable(error)}")]
    except UnicodeDecodeError:
        return [_error("run.output_dir", f"is {folder!r}, a name that is no UTF-8; choose another")]
    return []


def _files(config: RunConfig) -> list[Diagnostic]:
    """Files that must exist, and a place to write to."""
    found = _name_of_output(config)
    # The demo makes its own files before anything reads them.
    inputs = [] if config.demo else ["model.path", "model.vae_path", "model.clip_path", "model.t5_path",
                                     "model.clip_tokenizer", "model.t5_tokenizer", "experts.unet", "experts.vae",
                                     "experts.lune", "experts.sol", "adapter.init_from"]  # fmt: skip
    texts = [(key, config.get(key)) for key in inputs] + [("adapter.merge", text) for text in config.adapter.merge]
    for dataset in config.datasets:
        own = [name for name in dataset.experts if f"experts.{name}" in inputs]
        texts += [(f"{dataset.name}.experts.{name}", dataset.experts[name]) for name in own]
    for key, text in texts:
        if text is None or is_hub_id(text) or exists(config.locate(text)):
            continue
        if key in ("model.path", "adapter.init_from") and unfinished_step(
            config.step, config.output_dir.parent, [text]
        ):
            continue
        if key == "model.path" and is_published(text):
            if not config.spec.hub_id:
                found.append(_error(key, f"{text}: {config.spec.title} has no published repository; write owner/name"))
        elif key == "model.path" and (text == "none" or is_checkpoint_name(text)):
            found.append(_error(key, f"{text}: {_RUN_NAMES.get(text, f'write the folder too, as in folder:{text}')}"))
        else:
            found.append(_error(key, f"{text}: no such file or folder (looked in {Path.cwd()} and the project)"))
    caches = config.spec.task(config).caches
    needed = [
        ("latents", "model.vae_path", "images"),
        ("text", "model.clip_path", "captions"),
        ("text", "model.t5_path", "captions"),
    ]
    for kind, key, what in needed:
        if kind in caches and config.get(key) is None and config.cache.run != "never":
            found.append(_error(key, f"is needed to encode {what}"))
    prompts = config.sample.prompts
    if isinstance(prompts, str) and not config.locate(prompts).is_file():
        found.append(_error("sample.prompts", f"{prompts}: no such file; give a prompt file, or a list of prompts"))
    elif prompts is not None:
        try:
            parsed = sample_prompts(config)
        except ConfigError as error:
            found.append(_error("sample.prompts", str(error)))
        else:
            found += [
                _error("sample.prompts", problem)
                for prompt in parsed
                for problem in prompt_problems(prompt, config.spec, config.adapter.type != "none")
            ]
    for dataset in config.datasets:
        if config.demo or config.cache.run == "never":
            break
        folder, listing = dataset.image_directory, dataset.image_jsonl_file
        if folder is not None and not folder.is_dir():
            found.append(_error(f"{dataset.name}.image_directory", f"{folder}: no such folder"))
        if listing is not None and not listing.is_file():
            found.append(_error(f"{dataset.name}.image_jsonl_file", f"{listing}: no such file"))
        if dataset.mask_directory is not None and not dataset.mask_directory.is_dir():
            found.append(_error(f"{dataset.name}.mask_directory", f"{dataset.mask_directory}: no such folder"))
    problem = unwritable(config.output_dir)
    if problem:
        found.append(_error("run.output_dir", problem))
    return found


def prompt_problems(prompt: Prompt, spec: ModelSpec, adapters: bool) -> list[str]:
    """Options of a prompt that a family cannot follow, with or without adapters."""
    found = []
    own = {parameter.key for parameter in parameters(spec)}
    for option, name in (("l", "cfg_scale"), ("fs", "shift")):
        key, value = f"sample.{name}", getattr(prompt, name)
        if value is not None and key not in own:
            reason = spec.why_not(key, value) or f"{spec.title} has no {key}"
            found.append(f"'{prompt.text}': --{option} has no effect: {reason}")
    if prompt.multiplier is not None and not adapters:
        found.append(f"'{prompt.text}': --m sets the strength of an adapter, and there is none")
    return found


def unwritable(folder: Path) -> str | None:
    """Why files cannot be written below ``folder`` (which need not exist yet), or None."""
    for place in (folder, *folder.absolute().parents):
        if place.exists():
            if not place.is_dir():
                return f"{place} is a file, expected a folder"
            if not os.access(place, os.W_OK | os.X_OK):
                return f"{place}: no permission to write; choose another folder"
            return None
    return None
