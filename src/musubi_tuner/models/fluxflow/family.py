"""What the trainer asks of the FluxFlow family."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from musubi_tuner.config import RunConfig
from musubi_tuner.errors import ConfigError, TrainingError
from musubi_tuner.flow import MaskSettings
from musubi_tuner.memory.storage import Storing
from musubi_tuner.models.family import First, ModelOutline, TaskOutline, Trainee
from musubi_tuner.models.fluxflow.calibration import LEAST_SPREAD, calibrate, check
from musubi_tuner.models.fluxflow.checkpoint import geometry_of, load_checkpoint, make_part, open_system
from musubi_tuner.models.fluxflow.encoding import BertTokens
from musubi_tuner.models.fluxflow.geometry import FluxFlowConfig
from musubi_tuner.models.fluxflow.lpips import Lpips, load_lpips
from musubi_tuner.models.fluxflow.process import TEXTS, FluxFlowProcess
from musubi_tuner.models.fluxflow.settings import model_of, objective_of, trains_language
from musubi_tuner.models.fluxflow.state_dict import OUR_PREFIX, PARTS, System, build_part, read_system
from musubi_tuner.models.fluxflow.system import VAE_PARTS, FluxFlowSystem, build_system, freeze_all_but_flow, no_text
from musubi_tuner.models.fluxflow.task import FluxFlowTask
from musubi_tuner.weights.checkpoints import WeightFile, copy_weights, sample_identity

if TYPE_CHECKING:
    from musubi_tuner.training.role import Role

__all__ = [
    "check_caches",
    "checkpoint_options",
    "concatenate",
    "diffusers_modules",
    "load_checkpoint",
    "load_for_run",
    "load_for_training",
    "load_to_merge",
    "make_process",
    "make_task",
    "make_tokenizer",
    "null_inputs",
    "open_base",
    "options_of",
    "outline_model",
    "outline_task",
    "text_inputs",
]

PREPARED_ON = 32
"""Pictures on which a new autoencoder is calibrated."""
MEASURED = 512
"""Items by which latents are normalised."""
NAMES = {"flow": "flow_processor", "discriminator": "D_img"}
"""What the published program calls a part."""


def load_for_training(config: RunConfig, storing: Storing) -> Trainee:
    """The parts that a run trains or needs, from its checkpoint or new; see `Family`."""
    system, file = open_system(config)
    geometry = system.geometry or geometry_of(config)
    facts = config.spec.task(config)
    wanted = ("compressor", "expander", "flow", "text_encoder") if facts.denoises else _parts_of(facts.roles)
    # A denoiser is one module and keeps all parts in it; elsewhere those without a role are carried along.
    used = [part for part in PARTS if part in wanted or (facts.denoises and part in system.parts)]
    parts = {part: make_part(part, system, config, geometry) for part in used}
    made = [part for part in used if part not in system.parts]
    notes = []
    if system.parts:
        notes = [f"warning: Auto-created {NAMES.get(part, part)} with {_size(part, geometry)}" for part in made]
    if facts.denoises:
        return _denoiser(config, system, file, geometry, parts, notes)
    model = FluxFlowSystem(geometry, parts)
    if config.memory.checkpoints:
        model.recompute()
    vae: Any = getattr(model, "vae", None)
    calibrates = {"compressor", "expander"} <= set(made) and model_of(config).calibrate
    objective = objective_of(config)
    use_context = objective.train_spade
    if "text_encoder" in parts and not trains_language(config):
        parts["text_encoder"].language_model.requires_grad_(False)  # type: ignore[operator]
    roles = {part: "vae" if part in VAE_PARTS else part for part in used}
    notes += [f"Freezing {NAMES.get(part, part)}" for part, role in roles.items() if role not in facts.roles]
    for part, role in roles.items():
        if role not in facts.roles:
            parts[part].requires_grad_(False)
    options = {**system.options, **({"spade": use_context} if objective.train_vae else {})}
    carried = {
        f"{OUR_PREFIX[part]}{key}": tensor
        for part, tensors in system.parts.items()
        if roles.get(part) not in facts.roles
        for key, tensor in tensors.items()
    }
    carried |= {
        f"{OUR_PREFIX[part]}{key}": tensor
        for part in made
        if roles[part] not in facts.roles
        for key, tensor in parts[part].state_dict().items()
    }

    def prepare(first: First, begins: bool) -> list[str]:
        if not objective.train_vae:
            return _measure(geometry, options, first)
        if not begins:
            return []
        pixels = torch.stack(first(PREPARED_ON)).to(next(model.parameters()).device)
        return _start(vae, pixels, calibrates, geometry.down_shortcut, use_context)

    return Trainee(model, geometry, options, notes, prepare=prepare, carried=carried)


def _parts_of(roles: Sequence[str]) -> tuple[str, ...]:
    """Parts that a task computes with: those of its roles, and the text encoder below a flow."""
    text = ("text_encoder",) if "flow" in roles else ()
    return (*(part for role in roles for part in (VAE_PARTS if role == "vae" else (role,))), *text)


def _measure(geometry: FluxFlowConfig, options: dict[str, Any], first: First) -> list[str]:
    """Normalise latents by their own statistics, unless the checkpoint records some."""
    if geometry.latent_space != "mu" or "latent_mean" in options:
        return []
    mean, spread = statistics(first(MEASURED))
    options["latent_mean"], options["latent_spread"] = mean.tolist(), spread.tolist()
    return [
        f"latents: {len(mean)} channels, of spread {spread.min():.3g} to {spread.max():.3g}; normalised per channel"
    ]


def _denoiser(
    config: RunConfig,
    system: System,
    file: WeightFile | None,
    geometry: FluxFlowConfig,
    parts: dict[str, nn.Module],
    notes: list[str],
) -> Trainee:
    """The flow processor with the frozen parts around it."""
    model = FluxFlowSystem(geometry, parts)
    freeze_all_but_flow(model)
    options = dict(system.options)
    notes += [f"Freezing {NAMES.get(part, part)}" for part in parts if part != "flow"]

    def prepare(first: First, begins: bool) -> list[str]:
        return _measure(geometry, options, first)

    base = sample_identity(file) if file is not None else None
    return Trainee(model, geometry, options, notes, base, prepare=prepare)


MEASURED = 512
"""Items by which the latents are normalised."""


def statistics(latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel of latents [D, h, w]."""
    values = torch.stack(list(latents)).double().transpose(0, 1).flatten(1)
    return values.mean(dim=1).float(), values.std(dim=1).clamp(min=1e-4).float()


def _size(part: str, geometry: FluxFlowConfig) -> str:
    sizes = {
        "flow": f"feature_maps_dim={geometry.feature_maps_dim}",
        "text_encoder": f"text_embedding_dim={geometry.text_embedding_dim}",
        "discriminator": f"feature_maps_dim_disc={geometry.feature_maps_dim_disc}",
    }
    return sizes.get(part, f"vae_dim={geometry.vae_dim}")


def _start(vae: Any, pixels: Tensor, calibrates: bool, per_channel: bool, use_context: bool) -> list[str]:
    """Calibrate a new autoencoder, and check that it can learn; lines for the person.

    Raises:
        TrainingError: if its latents do not answer to the pictures.
    """
    lines = []
    if calibrates:
        count = calibrate(vae["compressor"], vae["expander"], pixels, per_channel)
        lines.append(f"calibrated {count} layers of the autoencoder on {len(pixels)} pictures")
    health = check(vae["compressor"], vae["expander"], pixels[:8], use_context)
    varies = f"mu varies by {health.spread:.3g} between pictures" if len(pixels) > 1 else "there is one picture"
    lines.append(f"start: {varies}, the first layer's gradient is up to {health.gradient:.3g}")
    if len(pixels) > 1 and health.spread < LEAST_SPREAD:
        advice = "set model.calibrate = true" if not calibrates else "check that the pictures differ"
        lines.append(
            f"warning: the latents hardly depend on the pictures (below {LEAST_SPREAD:g}), so the reconstruction will not use them; {advice}"
        )
    if not health.gradient < float("inf"):
        raise TrainingError("the gradient of the autoencoder is not finite at the start; set model.calibrate = true")
    return lines


def make_task(config: RunConfig, trainee: Trainee, make_role: "Callable[[str, nn.Module], Role]") -> FluxFlowTask:
    """The task of a run; see `TaskFamily`."""
    model: Any = trainee.model
    device = next(model.parameters()).device
    return FluxFlowTask(
        model,
        config.spec.task(config).roles,
        make_role,
        objective_of(config),
        make_process(config, trainee.options),
        config.run.seed,
        load_lpips(config, device) if _perceives(config) else None,
    )


def outline_task(config: RunConfig, make_role: "Callable[[str, nn.Module], Any]") -> TaskOutline:
    """See `TaskFamily`."""
    geometry, facts = geometry_of(config), config.spec.task(config)
    with torch.device("meta"):
        parts = {part: build_part(part, geometry) for part in _parts_of(facts.roles)}
        perceptual = Lpips() if _perceives(config) else None
    for part, module in parts.items():
        module.requires_grad_(("vae" if part in VAE_PARTS else part) in facts.roles)
    if "text_encoder" in parts and not trains_language(config):
        parts["text_encoder"].language_model.requires_grad_(False)  # type: ignore[operator]
    model: Any = FluxFlowSystem(geometry, parts)
    if config.memory.checkpoints:
        model.recompute()
    task = FluxFlowTask(
        model, facts.roles, make_role, objective_of(config), make_process(config, {}), config.run.seed, perceptual
    )
    limit, sequence = model_of(config).text_max_tokens, geometry.text_mode == "sequence"

    def batch(bucket: tuple[int, int], count: int) -> dict[str, Tensor]:
        width, height = bucket
        found: dict[str, Tensor] = {}
        if facts.pixels:
            found["pixels"] = torch.zeros(count, 3, height, width)
        else:
            found["latents"] = torch.zeros(count, geometry.vae_dim, height // geometry.factor, width // geometry.factor)
        if "flow" not in facts.roles:
            return found
        if facts.pixels or trains_language(config):
            found["bert_ids"] = torch.zeros(count, limit, dtype=torch.int64)
        elif sequence:
            found["bert_states"] = torch.zeros(count, limit, geometry.text_width)
        else:
            found["bert_mean"] = torch.zeros(count, geometry.text_width)
        if facts.pixels or trains_language(config) or sequence:
            found["bert_mask"] = torch.ones(count, limit, dtype=torch.bool)
        return found

    start, interval = objective_of(config).gan_start, objective_of(config).r1_interval
    step = -(-start // interval) * interval  # the discriminator's gradient penalty is not part of every update
    return TaskOutline(task, [model, *([perceptual] if perceptual else [])], batch, step)


def _perceives(config: RunConfig) -> bool:
    objective = objective_of(config)
    return objective.use_lpips and objective.train_reconstruction


def make_tokenizer(config: RunConfig) -> BertTokens | None:
    """Captions as tokens where a flow trains on live pictures; the autoencoder alone uses none."""
    return BertTokens(config) if "flow" in config.spec.task(config).roles else None


def checkpoint_options(config: RunConfig) -> dict[str, Any]:
    """Options that training records and caching obeys: none."""
    return {}


def check_caches(config: RunConfig, geometry: FluxFlowConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare cached tensors with what the model takes.

    Raises:
        ConfigError: naming the encoder and the field of the geometry.
    """
    name = "bert_states" if geometry.text_mode == "sequence" else "bert_mean"
    if "latents" in shapes and shapes["latents"][0] != geometry.vae_dim:
        raise ConfigError(f"latents have {shapes['latents'][0]} channels, the model takes vae_dim = {geometry.vae_dim}")
    if trains_language(config):
        return
    if name not in shapes:
        raise ConfigError(
            f'the text cache holds no {name}, which text_mode = "{geometry.text_mode}" needs; run the text job again'
        )
    if shapes[name][-1] != geometry.text_width:
        raise ConfigError(f"{name} is {shapes[name][-1]} wide, the model takes text_width = {geometry.text_width}")


def make_process(config: RunConfig, options: dict[str, Any]) -> FluxFlowProcess:
    """The process of a run; latents are normalised as the options say."""
    train = config.train
    masks = MaskSettings(train.mask_foreground, train.mask_background, train.mask_normalize)
    mean, spread = options.get("latent_mean"), options.get("latent_spread")
    return FluxFlowProcess(objective_of(config), mean, spread, masks if train.masked_loss else None)


def options_of(file: WeightFile) -> dict[str, Any]:
    """What a checkpoint records: whether the expander is modulated, and the statistics of its latents."""
    return dict(file.options)


def open_base(config: RunConfig) -> WeightFile:
    """The checkpoint that a run starts from."""
    assert config.model.path is not None
    return load_checkpoint(str(config.locate(config.model.path)), revision=config.model.revision)


def load_for_run(file: WeightFile, config: RunConfig, storing: Storing) -> FluxFlowSystem:
    """A checkpoint for drawing: the flow processor and the text head."""
    system = read_system(file)
    assert system.geometry is not None
    missing = [NAMES.get(part, part) for part in ("flow", "text_encoder") if part not in system.parts]
    if missing:
        raise ConfigError(
            f"{file.path}: holds no {' and no '.join(missing)}, so nothing can be drawn from texts; train a flow first"
        )
    model = build_system(system.geometry, ("flow", "text_encoder"))
    for part in ("flow", "text_encoder"):
        module: nn.Module = getattr(model, part)
        copy_weights(module, system.parts[part], f"{file.path}: {part}")
    return model


def load_to_merge(file: WeightFile) -> nn.Module:
    """Adapters are not supported, so nothing is merged."""
    raise ConfigError("FluxFlow has no adapters here: train its flow processor itself")


def diffusers_modules(depth: int, depth_single: int) -> Mapping[str, tuple[str, ...]]:
    """diffusers does not know the model."""
    return {}


def outline_model(config: RunConfig) -> ModelOutline:
    """The model of a run without storage."""
    geometry = geometry_of(config)
    with torch.device("meta"):
        model = build_system(geometry, ("compressor", "expander", "flow", "text_encoder"))
    freeze_all_but_flow(model)
    limit = model_of(config).text_max_tokens
    shapes: dict[str, tuple[int, ...]] = {"bert_mean": (geometry.text_width,)}
    if geometry.text_mode == "sequence":
        shapes = {"bert_states": (limit, geometry.text_width), "bert_mask": (limit,)}
    return ModelOutline(model, torch.float32, shapes, {})


def text_inputs(encoded: dict[str, Tensor], use_mask: bool) -> dict[str, Tensor]:
    """Model inputs from encoded texts."""
    found = {name: encoded[name] for name in TEXTS if name in encoded}
    some = next(iter(found.values()))
    return {**found, "keep": torch.ones(len(some), dtype=torch.bool, device=some.device)}


def null_inputs(like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs without text, as training drops it."""
    return no_text(like)


def concatenate(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Inputs of two branches in one batch."""
    return {name: torch.cat((first[name], second[name])) for name in first}
