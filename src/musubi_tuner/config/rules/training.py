"""Rules of what is trained, for how long and in which precision, and of sampling, saving and uploading."""

import importlib.util
import netrc
import os
from collections.abc import Iterator

from musubi_tuner.config.diagnostics import Diagnostic, did_you_mean, error, info, warning
from musubi_tuner.config.paths import is_repository
from musubi_tuner.config.rules.rule import Rules
from musubi_tuner.config.run_config import RunConfig
from musubi_tuner.config.schema import parameters
from musubi_tuner.config.schema.resume import is_changeable

TRAINING = Rules()
rule = TRAINING.rule


@rule("U07", "model.init model.path")
def _checkpoint(config: RunConfig) -> Iterator[Diagnostic]:
    model = config.model
    if model.init == "checkpoint" and model.path is None:
        yield error("U07", "model.path", 'is required; or set init = "scratch" to train a new model', "model.init")
    if model.init == "scratch" and model.path is not None:
        yield error(
            "U07", "model.path", 'is set, but init = "scratch" starts from random weights; remove one', "model.init"
        )
    if model.init == "checkpoint" and config.get("model.geometry"):
        text = 'is read from the checkpoint; remove the table, or set init = "scratch"'
        yield error("U07", "model.geometry", text, "model.init")


@rule("U07", "train.max_steps train.max_epochs")
def _length(config: RunConfig) -> Iterator[Diagnostic]:
    if config.train.max_steps is None and config.train.max_epochs is None:
        yield error("U07", "train.max_steps", "is missing, and so is max_epochs; set one of them", "train.max_epochs")


@rule("U01 U04", "resume.allow")
def _allowed(config: RunConfig) -> Iterator[Diagnostic]:
    own = {parameter.key for parameter in parameters(config.spec)}
    for key in config.resume.allow:
        of_run = ".".join(key.split(".")[2:]) if key.startswith("roles.") else key
        if of_run not in own and not key.endswith(".max_grad_norm"):
            yield error("U01", "resume.allow", f"{key!r} is no setting.{did_you_mean(key, filter(is_changeable, own))}")
        elif not is_changeable(key):
            text = f"{key!r} cannot change within a run; optimizer.lr, weight_decay, betas and eps, [scheduler], [objective], ema.decay, "
            yield error(
                "U04",
                "resume.allow",
                f"{text}train.max_grad_norm, train.prior_loss_weight and dropouts of adapters can",
            )


@rule("V61 V62", "log.wandb log.config")
def _wandb(config: RunConfig) -> Iterator[Diagnostic]:
    if not config.log.wandb:
        return
    if importlib.util.find_spec("wandb") is None:
        yield error("V61", "log.wandb", "is true, and the package is not installed: pip install wandb")
    if not _is_offline() and not (config.log.wandb_api_key or os.environ.get("WANDB_API_KEY") or _has_login()):
        text = "is true, and W&B has no key: run `wandb login`, put it into WANDB_API_KEY, or set WANDB_MODE=offline"
        yield error("V61", "log.wandb", text, "log.wandb_api_key")
    if config.log.config:
        yield info("V62", "log.config", "settings are shown on W&B without secrets and paths")


def _is_offline() -> bool:
    return os.environ.get("WANDB_MODE", "online").lower() in ("offline", "disabled", "dryrun")


def _has_login() -> bool:
    """Whether `wandb login` has left a key, for whatever server."""
    try:
        return any("wandb" in host for host in netrc.netrc(os.environ.get("NETRC")).hosts)
    except (OSError, netrc.NetrcParseError):
        return False


@rule("V82", "objective.ip_noise_gamma")
def _strong_noise(config: RunConfig) -> Iterator[Diagnostic]:
    gamma = config.objective.ip_noise_gamma
    if gamma is not None and gamma > 0.5:
        yield warning("V82", "objective.ip_noise_gamma", f"is {gamma}; 0.1 to 0.3 is usual")


@rule("P07", "train.mixed_precision run.device")
def _half_precision(config: RunConfig) -> Iterator[Diagnostic]:
    if config.train.mixed_precision == "fp16" and config.run.device == "cpu":
        text = '"fp16" needs a GPU; use "bf16" or "no" on a CPU'
        yield error("P07", "train.mixed_precision", text, "run.device", fix=[("train.mixed_precision", "bf16")])


@rule("V83", "cache.dtype train.mixed_precision")
def _half_precision_caches(config: RunConfig) -> Iterator[Diagnostic]:
    if config.cache.dtype == "float16" and config.train.mixed_precision == "no":
        text = 'is "float16", which loses precision in a float32 run; write "auto"'
        yield warning("V83", "cache.dtype", text, "train.mixed_precision", fix=[("cache.dtype", "auto")])


@rule("P07", "distributed.num_processes run.device")
def _processes(config: RunConfig) -> Iterator[Diagnostic]:
    if config.distributed.num_processes > 1 and config.run.device == "mps":
        yield error(
            "P07", "distributed.num_processes", "several processes are not supported on mps; set it to 1", "run.device"
        )


@rule("V63", "sample.prompts sample.every_steps sample.every_epochs sample.at_first sample.width sample.height")
def _drawn(config: RunConfig) -> Iterator[Diagnostic]:
    sample = config.sample
    if sample.prompts is None:
        return
    if not (sample.every_steps or sample.every_epochs or sample.at_first):
        text = "are set, but no sampling interval is; set sample.every_steps, every_epochs or at_first"
        yield warning("V63", "sample.prompts", text, "sample.every_steps", "sample.every_epochs", "sample.at_first")
    for name in ("width", "height"):
        value, step = getattr(sample, name), config.spec.pixel_step
        if value and value % step:
            below = value - value % step
            text = f"is {value}, expected a multiple of {step}: {below} or {below + step}"
            yield error("V55", f"sample.{name}", text, fix=[(f"sample.{name}", below or step)])


@rule("V84", "train.masked_loss train.mask_foreground train.mask_background")
def _masks(config: RunConfig) -> Iterator[Diagnostic]:
    train = config.train
    if train.masked_loss and train.mask_foreground == train.mask_background == 0:
        text = "and mask_background are both 0, so masked images would not be trained; set one of them"
        yield error("V84", "train.mask_foreground", text, "train.mask_background")


@rule("V85", "hub.repo_id hub.release save.best validation.split")
def _uploads(config: RunConfig) -> Iterator[Diagnostic]:
    hub = config.hub
    if hub.repo_id is not None and not is_repository(hub.repo_id):
        yield error("V85", "hub.repo_id", f"is {hub.repo_id!r}, expected owner/name")
    if hub.repo_id is not None and hub.release == "best" and not config.keeps_best:
        text = 'is "best", but no best checkpoint is kept; set save.best = true or validation.split'
        yield error("V85", "hub.release", text, "save.best", "validation.split", fix=[("save.best", True)])


@rule("V65", "save.every_steps save.every_epochs save.state train.max_steps")
def _nothing_saved(config: RunConfig) -> Iterator[Diagnostic]:
    save, written = config.save, config.set_keys()
    if save.every_steps or save.every_epochs or not {"save.every_steps", "save.every_epochs"} & set(written):
        return
    steps = config.train.max_steps
    if steps is None or steps >= LONG_WITHOUT_SAVING:
        yield warning(
            "V65",
            "save.every_steps",
            "and save.every_epochs are off: nothing is saved before the end unless you stop the run, so a crash loses everything",
            "save.every_epochs",
            fix=[("save.every_steps", 500)],
        )


LONG_WITHOUT_SAVING = 1000
"""Length of a run in updates from which missing checkpoints give a warning."""


@rule("V66", "resume.from adapter.init_from adapter.type")
def _two_starts(config: RunConfig) -> Iterator[Diagnostic]:
    if config.resume.from_ not in ("auto", "none") and config.adapter.init_from is not None and config.step is None:
        text = f"is {config.resume.from_!r}, a state with its own weights, but adapter.init_from names others; keep one"
        yield error("V66", "resume.from", text, "adapter.init_from")


@rule("V59", "objective.text_dropout")
def _text_is_read(config: RunConfig) -> Iterator[Diagnostic]:
    if config.get("objective.text_dropout") == 1:
        text = "is 1: the model never sees a caption; 0.1 is usual"
        yield warning("V59", "objective.text_dropout", text, fix=[("objective.text_dropout", 0.1)])


@rule("V56", "train.max_steps train.max_epochs")
def _two_lengths(config: RunConfig) -> Iterator[Diagnostic]:
    train = config.train
    if (
        train.max_steps is not None
        and train.max_epochs is not None
        and config.origins.get("train.max_steps") != "default"
    ):
        text = f"is {train.max_epochs}, and train.max_steps = {train.max_steps}; the run ends at whichever comes first, as the plan shows"
        yield Diagnostic("V56", "info", ("train.max_epochs", "train.max_steps"), text)


@rule("V17", "objective.min_timestep objective.max_timestep")
def _noise_levels(config: RunConfig) -> Iterator[Diagnostic]:
    low, high = config.get("objective.min_timestep"), config.get("objective.max_timestep")
    if low is not None and low >= high:
        yield error(
            "V17",
            "objective.min_timestep",
            f"is {low}, expected a value below max_timestep = {high}",
            "objective.max_timestep",
        )


@rule("V15", "objective.min_snr_gamma objective.min_snr_form objective.weighting_scheme")
def _two_weights(config: RunConfig) -> Iterator[Diagnostic]:
    gamma, scheme = config.get("objective.min_snr_gamma"), config.get("objective.weighting_scheme")
    if gamma and config.get("objective.min_snr_form") != "none" and scheme in ("sigma_sqrt", "cosmap"):
        text = (
            f'is {gamma:g}, and weighting_scheme is "{scheme}": both weights are multiplied; usually only one is used'
        )
        yield warning(
            "V15", "objective.min_snr_gamma", text, "objective.weighting_scheme", fix=[("objective.min_snr_gamma", 0.0)]
        )


@rule("V07", "objective.adaptive_noise_scale objective.noise_offset")
def _adaptive_offset(config: RunConfig) -> Iterator[Diagnostic]:
    scale = config.get("objective.adaptive_noise_scale")
    if scale and not config.get("objective.noise_offset"):
        text = f"is {scale}, but objective.noise_offset, which it adjusts, is off; set that to 0.05, for example"
        yield error(
            "V07",
            "objective.adaptive_noise_scale",
            text,
            "objective.noise_offset",
            fix=[("objective.noise_offset", 0.05)],
        )


@rule("V09", "objective.noise_offset objective.multires_noise_iterations")
def _two_recipes(config: RunConfig) -> Iterator[Diagnostic]:
    if config.get("objective.noise_offset") and config.get("objective.multires_noise_iterations"):
        text = "and objective.multires_noise_iterations both change the low frequencies of the noise; usually only one is used"
        yield warning("V09", "objective.noise_offset", text, "objective.multires_noise_iterations")


@rule("V12", "objective.noise_offset objective.multires_noise_iterations")
def _other_noise(config: RunConfig) -> Iterator[Diagnostic]:
    for key in ("objective.noise_offset", "objective.multires_noise_iterations"):
        if config.get(key):
            text = "changes the training noise, but sampling starts from plain Gaussian noise; brightness may differ"
            yield warning("V12", key, text)
