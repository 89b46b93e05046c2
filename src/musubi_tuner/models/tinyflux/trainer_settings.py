"""Settings of the published TinyFlux trainer, a flat JSON object, as a run file. Torch-free.

A field that the file leaves out has that trainer's default. What the trainer does without a setting for it (one group for
weight decay, one coin per batch for the teachers) is written into the run file too, so that training goes on in the same
way. Only zeros for missing teachers are left to the person: the file does not say what data sets there are. Its gaps are not
copied: a number of kept files below 1 keeps all of them here, and deletes even the newest there.
"""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from musubi_tuner.config.diagnostics import did_you_mean
from musubi_tuner.config.importers.builder import Builder
from musubi_tuner.config.importers.report import Imported
from musubi_tuner.models.tinyflux.options import SPEC
from musubi_tuner.models.tinyflux.settings import objective_of, resolve_experts

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig

FIELDS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "betas": [0.9, 0.95],
    "grad_clip": 1.0,
    "optimizer": "adamw",
    "warmup_steps": 1000,
    "total_steps": 100000,
    "max_epochs": None,
    "lr_scheduler": "cosine",
    "min_lr": 0.0,
    "warmup_type": "linear",
    "gradient_accumulation": 1,
    "gradient_checkpointing": False,
    "compile_mode": None,
    "ema_decay": 0.9999,
    "shift": 3.0,
    "use_snr_weighting": True,
    "snr_gamma": 5.0,
    "use_huber_loss": False,
    "huber_delta": 0.1,
    "logit_normal_sampling": True,
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "enable_lune": True,
    "lune_weight": 0.1,
    "lune_warmup_steps": 1000,
    "lune_dropout": 0.1,
    "lune_mode": "cosine",
    "enable_sol": True,
    "sol_weight": 0.05,
    "sol_warmup_steps": 2000,
    "sol_dropout": 0.1,
    "use_spatial_weighting": False,
    "text_dropout": 0.0,
    "checkpoint_dir": "checkpoints",
    "save_every_steps": 5000,
    "keep_last_n_steps": 3,
    "save_every_epochs": 1,
    "keep_last_n_epochs": 3,
    "log_every": 100,
    "tensorboard_dir": None,
    "sample_every": 2000,
    "sample_prompts": None,
    "sample_dir": "samples",
    "dtype": "torch.bfloat16",
    "hf_repo_id": None,
    "hf_run_name": None,
    "upload_every_steps": 0,
    "upload_every_epochs": 0,
}
"""The published fields and their defaults."""
LATER_FIELDS = (
    "fg_loss_weight", "bg_loss_weight", "use_masked_loss", "timestep_stratified", "teacher_dropout_mode",
    "distill_on_dropped", "guidance_embeds", "guidance_dropout", "guidance_min", "guidance_max", "allow_tf32",
    "cudnn_benchmark", "matmul_precision", "seed", "ema_warmup", "rope_freqs", "sol_spatial_norm", "expert_input",
    "expert_time", "upload_logs", "upload_samples", "snr_mode",
)  # fmt: skip
"""Fields of later versions of the same file; without them their part is as published."""
PLAIN = {
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "betas": "optimizer.betas",
    "grad_clip": "train.max_grad_norm",
    "warmup_steps": "scheduler.warmup_steps",
    "total_steps": "train.max_steps",
    "max_epochs": "train.max_epochs",
    "lr_scheduler": "scheduler.type",
    "min_lr": "scheduler.min_lr",
    "warmup_type": "scheduler.warmup_type",
    "gradient_accumulation": "train.grad_accum_steps",
    "gradient_checkpointing": "memory.gradient_checkpointing",
    "ema_decay": "ema.decay",
    "ema_warmup": "ema.warmup",
    "shift": "objective.shift",
    "snr_gamma": "objective.min_snr_gamma",
    "huber_delta": "objective.huber_delta",
    "logit_mean": "objective.logit_mean",
    "logit_std": "objective.logit_std",
    "timestep_stratified": "objective.timestep_stratified",
    "enable_lune": "experts.enable_lune",
    "lune_weight": "objective.lune_weight",
    "lune_warmup_steps": "objective.lune_warmup_steps",
    "lune_dropout": "objective.lune_teacher_dropout",
    "enable_sol": "experts.enable_sol",
    "sol_weight": "objective.sol_weight",
    "sol_warmup_steps": "objective.sol_warmup_steps",
    "sol_dropout": "objective.sol_teacher_dropout",
    "use_spatial_weighting": "objective.spatial_weighting",
    "teacher_dropout_mode": "objective.teacher_dropout_mode",
    "distill_on_dropped": "objective.distill_on_dropped",
    "expert_input": "experts.expert_input",
    "expert_time": "experts.expert_time",
    "sol_spatial_norm": "experts.sol_spatial_norm",
    "text_dropout": "objective.text_dropout",
    "guidance_dropout": "objective.guidance_dropout",
    "guidance_min": "objective.guidance_min",
    "guidance_max": "objective.guidance_max",
    "use_masked_loss": "train.masked_loss",
    "fg_loss_weight": "train.mask_foreground",
    "bg_loss_weight": "train.mask_background",
    "save_every_steps": "save.every_steps",
    "keep_last_n_steps": "save.keep_last_steps",
    "save_every_epochs": "save.every_epochs",
    "keep_last_n_epochs": "save.keep_last_epochs",
    "log_every": "log.every_steps",
    "sample_every": "sample.every_steps",
    "sample_prompts": "sample.prompts",
    "hf_repo_id": "hub.repo_id",
    "hf_run_name": "hub.run_name",
    "upload_every_steps": "hub.every_steps",
    "upload_every_epochs": "hub.every_epochs",
    "upload_logs": "hub.upload_logs",
    "upload_samples": "hub.upload_samples",
    "allow_tf32": "run.allow_tf32",
    "cudnn_benchmark": "run.cudnn_benchmark",
    "seed": "run.seed",
    "rope_freqs": "model.rope_freqs",
}
"""Field -> our key, where the value stays."""
WORDS: dict[str, tuple[str, dict[Any, Any]]] = {
    "optimizer": (
        "optimizer.type",
        {"adamw": "AdamW", "adamw_8bit": "AdamW8bit", "adafactor": "Adafactor"},
    ),
    "dtype": (
        "train.mixed_precision",
        {f"{prefix}{name}": word for prefix in ("torch.", "")
         for name, word in (("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "no"))},
    ),
    "snr_mode": ("objective.min_snr_form", {"reference": "published", "velocity": "vpred", "none": "none"}),
    "use_snr_weighting": ("objective.min_snr_form", {True: "published", False: "none"}),
    "use_huber_loss": ("objective.loss", {True: "huber", False: "l2"}),
    "logit_normal_sampling": ("objective.timestep_sampling", {True: "logit_normal", False: "uniform"}),
    "compile_mode": (
        "memory.compile_mode",
        {"default": "default", "reduce-overhead": "default",
         **dict.fromkeys(("max-autotune", "max-autotune-no-cudagraphs"), "max-autotune-no-cudagraphs")},
    ),
}  # fmt: skip
"""Field -> our key, and what its values are called there."""
NO_GRAPHS = "without CUDA graphs, whose memory the next compiled block would use again"
RULES = {
    (
        "train.mixed_precision",
        "bf16",
    ): 'of the computation; objective.precision = "bfloat16" rounds times, noise and losses too',
    ("memory.compile_mode", "default"): NO_GRAPHS,
    ("memory.compile_mode", "max-autotune-no-cudagraphs"): NO_GRAPHS,
}
"""What else is to be said of such a value."""
LUNE_DELTA = 0.1
LUNE_MODES = ("cosine", "huber", "soft", "hard", "mse")
UNSET = {
    "run.name": SPEC.full_name,
    "model.arch": SPEC.code,
    "model.path": "hub",
    "model.vae_path": "black-forest-labs/FLUX.1-schnell:vae",
    "model.clip_path": SPEC.clip_tokenizer,
    "model.t5_path": SPEC.t5_tokenizer,
}
"""Ours without a field there: which model is trained, and the encoders it was published with."""
OVERLAYS = {
    "lune": "AbstractPhil/tinyflux-experts:sd15-flow-lune-unet.safetensors",
    "sol": "AbstractPhil/tinyflux-experts:sd15-flow-sol-unet.safetensors",
}
TEACHERS = {
    "experts.unet": "stable-diffusion-v1-5/stable-diffusion-v1-5:unet",
    "experts.expert_input": "random",
    "experts.expert_time": "reference",
    "experts.sol_spatial_norm": "sum",
    "objective.teacher_dropout_mode": "batch",
    "objective.distill_on_dropped": False,
    "objective.drop_experts_with_text": False,
}
WAYS = {"optimizer.decay_all": True, "ema.warmup": False, "save.best": True}
"""What that trainer does without a field for it; ``TEACHERS`` only where it has one."""


def read_settings(document: dict[str, Any]) -> Imported | None:
    """Translate the settings of the published trainer; None if most keys of the document are not its own."""
    known = sum(key in FIELDS or key in LATER_FIELDS for key in document)
    return _Reader(document).run() if 2 * known > len(document) else None


def write_settings(config: "RunConfig") -> dict[str, Any]:
    """The settings of a run as fields of the published trainer; those that it has no value for are left out."""
    ours: dict[str, Any] = {f"experts.{name}": value for name, value in resolve_experts(config).items()}
    found: dict[str, Any] = {}
    for field, key in PLAIN.items():
        value = ours.get(key, config.get(key))
        if value is not None:
            found[field] = list(value) if isinstance(value, tuple) else value
    for field, (key, words) in WORDS.items():
        theirs = next((word for word, value in words.items() if value == config.get(key)), None)
        if theirs is not None and (field != "compile_mode" or config.memory.compile):
            found[field] = theirs
    found["warmup_steps"] = config.scheduler.warmup_updates(config.scheduler.total_steps or config.train.max_steps or 0)
    found["lune_mode"] = objective_of(config).lune_mode
    return found


class _Reader(Builder):
    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__()
        self.report.ignores_unknown = True
        self.written = set(document)
        self.options = {**FIELDS, **document}

    def run(self) -> Imported:
        for key in [key for key in self.options if key not in FIELDS and key not in LATER_FIELDS]:
            self.options.pop(key)
            self.report.unknown.append((key, did_you_mean(key, [*FIELDS, *LATER_FIELDS])))
        unused = list(self._unused())
        for keys, reason in unused:
            for key in keys:
                self._drop(key, reason)
        self._folders()
        self._precision()
        self._quirks()
        for key in [key for key in WORDS if key in self.options]:
            self._word(key, *WORDS[key])
        for key in list(self.options):
            self._plain(key)
        self._leave_defaults()
        self._complete()
        return Imported(self._nested(), {}, self.report, self.names)

    def _carry(self, source: str, key: str, value: Any) -> None:
        """As for every reader; fields that the file leaves out are in no list of source keys."""
        if source in self.written:
            super()._carry(source, key, value)
        else:
            self._store(source, key, value)

    def _convert(self, source: str, old: Any, key: str, value: Any, rule: str) -> None:
        if source in self.written:
            super()._convert(source, old, key, value, rule)
        else:
            self._store(source, key, value)

    def _drop(self, source: str, reason: str) -> None:
        """Leave out a field that changes nothing."""
        if source in self.options:
            self.options.pop(source)
            if source in self.written:
                self.report.dropped_harmless.append((source, reason))

    def _lose(self, source: str, reason: str) -> None:
        """Leave out a field that would have changed something."""
        self.options.pop(source)
        self.report.dropped_changes_result.append((source, reason))

    def _unused(self) -> Iterator[tuple[Iterable[str], str]]:
        """Fields that do nothing beside the others."""
        given = self.options.get
        lune = ("lune_weight", "lune_warmup_steps", "lune_dropout", "lune_mode")
        sol = ("sol_weight", "sol_warmup_steps", "sol_dropout", "use_spatial_weighting", "sol_spatial_norm")
        if given("enable_lune") is False:
            yield lune, "enable_lune is false"
        if given("enable_sol") is False:
            yield sol, "enable_sol is false"
        if not self._teaches:
            both = ("teacher_dropout_mode", "distill_on_dropped", "expert_input", "expert_time")
            yield both, "both teachers are off"
        if given("use_snr_weighting") is False:
            yield ("snr_gamma", "snr_mode"), "use_snr_weighting is false"
        elif "snr_mode" in self.options:
            yield ("use_snr_weighting",), "snr_mode says which"
        if given("snr_mode") == "none":
            yield ("snr_gamma",), 'snr_mode is "none"'
        if given("use_huber_loss") is False and not (given("enable_lune") and given("lune_mode") == "huber"):
            yield ("huber_delta",), "no loss is huber"
        if given("logit_normal_sampling") is False:
            yield ("logit_mean", "logit_std"), "times are uniform"
        if given("lr_scheduler") == "constant":
            yield ("min_lr",), "a constant rate has no end"
        if given("optimizer") == "adafactor":
            yield ("betas",), "Adafactor has none"
        if given("warmup_steps") == 0:
            yield ("warmup_type",), "there is no warm-up"
        if not given("use_masked_loss"):
            yield ("fg_loss_weight", "bg_loss_weight"), "masks are not used"
        if not given("guidance_embeds"):
            yield ("guidance_dropout", "guidance_min", "guidance_max"), "no guidance is embedded"
        yield ("guidance_embeds",), "the model's config.json says it"
        if not given("sample_prompts"):
            yield ("sample_prompts", "sample_every"), "nothing is drawn"
        yield ("sample_dir",), "samples go to sample/ below run.output_dir"
        uploads = ("hf_run_name", "upload_every_steps", "upload_every_epochs", "upload_logs", "upload_samples")
        if given("hf_repo_id") is None:
            yield uploads, "nothing is uploaded without hf_repo_id"
        elif not (given("upload_every_steps") or given("upload_every_epochs")):
            # Here, a repository without intervals gets every checkpoint.
            yield ("hf_repo_id", *uploads), "nothing is uploaded while both intervals are 0; hub.repo_id uploads all"
        yield [key for key in ("max_epochs", "compile_mode", "hf_repo_id", "hf_run_name") if given(key) is None], "off"

    @property
    def _teaches(self) -> bool:
        return self.options["enable_lune"] is not False or self.options["enable_sol"] is not False

    def _folders(self) -> None:
        """Files of ours do not go among those of the other trainer, whose best and config.json they would replace."""
        folder = self.options.pop("checkpoint_dir")
        if isinstance(folder, str):
            rule = "a folder of its own, so that the files there stay"
            self._convert("checkpoint_dir", folder, "run.output_dir", f"{folder.rstrip('/')}/{SPEC.full_name}", rule)
        else:
            self._refuse("checkpoint_dir", f"is {folder!r}, expected a text")
        events = self.options.pop("tensorboard_dir")
        self._convert(
            "tensorboard_dir", events, "log.tensorboard", events is not None, "events go to logs/ below run.output_dir"
        )

    def _precision(self) -> None:
        """A word for products of float32 matrices, where we have a switch."""
        if "matmul_precision" not in self.options:
            return
        word = self.options["matmul_precision"]
        if word == "high":
            self._drop("matmul_precision", "run.allow_tf32 says it")
        elif word == "highest":
            self._drop("allow_tf32", "matmul_precision says it")
            self._convert("matmul_precision", self.options.pop("matmul_precision"), "run.allow_tf32", False, "no TF32")
        else:
            self._lose("matmul_precision", f"{word!r} is not supported; run.allow_tf32 is used instead")

    def _quirks(self) -> None:
        """Values that mean something else there."""
        options = self.options
        for key in ("keep_last_n_steps", "keep_last_n_epochs"):
            if options[key] is None or (isinstance(options[key], int) and options[key] < 1):
                rule = "all are kept; that trainer deletes even the newest"
                self._convert(key, options.pop(key), PLAIN[key], 0, rule)
        if options.get("warmup_type") == "cosine" and options["lr_scheduler"] != "cosine":
            rule = "that trainer warms up linearly unless lr_scheduler is cosine"
            self._convert("warmup_type", options.pop("warmup_type"), "scheduler.warmup_type", "linear", rule)
        mode = options.pop("lune_mode", None)
        if mode in LUNE_MODES:
            self._carry("lune_mode", "objective.lune_mode", mode)
        elif mode is not None:
            self._convert("lune_mode", mode, "objective.lune_mode", "hard", "what that trainer makes of unknown words")
        if mode == "huber" and options.get("huber_delta", LUNE_DELTA) != LUNE_DELTA:
            delta, key = options.pop("huber_delta"), PLAIN["huber_delta"]
            if options["use_huber_loss"] is True:
                rule = f"of both losses here; there, Lune's is always {LUNE_DELTA}"
                self._convert("huber_delta", delta, key, delta, rule)
            else:
                self._convert("huber_delta", delta, key, LUNE_DELTA, "what Lune's loss always has there")
        if "compile_mode" in options:
            self.values["memory.compile"] = True

    def _word(self, source: str, key: str, table: dict[Any, Any]) -> None:
        old = self.options.pop(source)
        known = next((ours for theirs, ours in table.items() if theirs == old and type(theirs) is type(old)), None)
        if known is None:
            expected = ", ".join(str(word).lower() if isinstance(word, bool) else word for word in table)
            self._refuse(source, f"is {old!r}, expected one of {expected}")
        elif known == old:
            self._carry(source, key, old)
        else:
            self._convert(source, old, key, known, RULES.get((key, known), "renamed"))

    def _plain(self, source: str) -> None:
        key, value = PLAIN[source], self.options[source]
        if value is None or (isinstance(value, list) and None in value):
            self._refuse(source, f"is {json.dumps(value)}, and a run file has no null; give a value")
            return
        kind = self.known[key].type_name
        if kind == "float" and type(value) is int:
            value = float(value)
        elif kind == "list of float" and isinstance(value, list):
            value = [float(part) if type(part) is int else part for part in value]
        self._carry(source, key, value)

    def _leave_defaults(self) -> None:
        """Of the fields that the file leaves out, list those whose value here would be another."""
        for key, source in list(self.names.items()):
            if source in self.written:
                continue
            if self.values[key] == SPEC.defaults.get(key, self.known[key].field.get_default()):
                del self.values[key]
            else:
                self.report.defaulted.append((key, self.values[key]))
            del self.names[key]

    def _complete(self) -> None:
        """Write what a run file needs and what that trainer does anyway, where no field says it."""
        more = {**UNSET, **WAYS, **(TEACHERS if self._teaches else {})}
        more |= {
            f"experts.{name}": file for name, file in OVERLAYS.items() if self.options[f"enable_{name}"] is not False
        }
        if isinstance(self.options.get("max_epochs"), int) and self.options["lr_scheduler"] != "constant":
            # There the rate falls over total_steps, whatever ends the run.
            more["scheduler.total_steps"] = self.options["total_steps"]
        for key, value in more.items():
            if key not in self.values:
                self.values[key] = value
                self.report.defaulted.append((key, value))
        self.values = {key: self.values[key] for key in sorted(self.values, key=list(self.known).index)}
