"""Job files of ai-toolkit (YAML): one process of type sd_trainer becomes a run. Torch-free.

Every key of the file is in one list of the report, under its path in the process (``train.lr``).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from musubi_tuner.adapter_types import BY_NAME as ADAPTERS
from musubi_tuner.config.foreign import DTYPES
from musubi_tuner.config.importers.builder import Builder, of_items
from musubi_tuner.config.importers.options import VARIANTS
from musubi_tuner.config.importers.report import Imported
from musubi_tuner.config.schema import parameters
from musubi_tuner.config.when import describe, is_on
from musubi_tuner.models.registry import MODELS, called, trained_elsewhere
from musubi_tuner.optimizers import BY_NAME as OPTIMIZERS
from musubi_tuner.optimizers import OPTIMIZERS as RECORDS
from musubi_tuner.schedules import BY_NAME

SAME: dict[str, str] = {
    "network.dropout": "adapter.dropout",
    "network.lokr_factor": "adapter.lokr_factor",
    "network.lokr_full_rank": "adapter.lokr_full",
    "network.pretrained_lora_path": "adapter.init_from",
    "train.steps": "train.max_steps",
    "train.lr": "optimizer.lr",
    "train.unet_lr": "optimizer.lr",
    "train.gradient_accumulation": "train.grad_accum_steps",
    "train.cfg_scale": "objective.guidance_scale",
    "train.gradient_checkpointing": "memory.gradient_checkpointing",
    "train.max_grad_norm": "train.max_grad_norm",
    "train.min_snr_gamma": "objective.min_snr_gamma",
    "train.snr_gamma": "objective.min_snr_gamma",
    "train.noise_offset": "objective.noise_offset",
    "train.reg_weight": "train.prior_loss_weight",
    "train.force_first_sample": "sample.at_first",
    "train.batch_size": "general.batch_size",
    "train.ema_config.use_ema": "ema.enabled",
    "train.ema_config.ema_decay": "ema.decay",
    "save.save_every": "save.every_steps",
    "save.max_step_saves_to_keep": "save.keep_last_steps",
    "save.hf_repo_id": "hub.repo_id",
    "save.hf_private": "hub.private",
    "sample.sample_every": "sample.every_steps",
    "sample.width": "sample.width",
    "sample.height": "sample.height",
    "sample.seed": "sample.seed",
    "sample.guidance_scale": "sample.guidance",
    "sample.sample_steps": "sample.steps",
    "logging.log_every": "log.every_steps",
    "model.vae_path": "model.vae_path",
    "model.compile": "memory.compile",
    "model.block_compile": "memory.compile",
    "trigger_word": "general.trigger_word",
    "logging.use_wandb": "log.wandb",
    "logging.project_name": "log.project",
    "logging.run_name": "log.wandb_run",
}
"""Path there -> our key; the value is the same."""
ITEMS: dict[str, str] = {
    "folder_path": "image_directory", "dataset_path": "image_jsonl_file", "default_caption": "class_tokens",
    "trigger_word": "trigger_word", "caption_dropout_rate": "caption_dropout_rate", "num_repeats": "num_repeats",
    "shuffle_tokens": "shuffle_caption", "token_dropout_rate": "caption_tag_dropout_rate", "keep_tokens": "keep_tokens",
    "is_reg": "is_reg", "flip_x": "flip_aug", "random_crop": "random_crop", "prior_reg": "is_reg", "mask_path": "mask_directory", "alpha_mask": "alpha_mask",
    "buckets": "enable_bucket", "bucket_tolerance": "bucket_reso_steps",
}  # fmt: skip
"""Key of a data set there -> ours."""
PRECISIONS = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "fp32": "no",
    "float32": "no",
    "float": "no",
}
TIMES = {"sigmoid": "sigmoid", "linear": "uniform", "shift": "flux_shift", "flux_shift": "flux_shift"}
LOSSES = {"mse": "l2", "mae": "l1"}
WORDS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "train.dtype": ("train.mixed_precision", PRECISIONS),
    "train.optimizer": ("optimizer.type", OPTIMIZERS),
    "train.timestep_type": ("objective.timestep_sampling", TIMES),
    "train.loss_type": ("objective.loss", LOSSES),
    "save.dtype": ("save.dtype", DTYPES),
    "sample.sampler": ("sample.solver", {"flowmatch": "euler", "euler": "euler", "heun": "heun"}),
    "network.type": ("adapter.type", ADAPTERS),
}
"""Path there -> our key, and their words -> ours."""
DENOISING = {
    "train.min_denoising_steps": "objective.max_timestep",
    "train.max_denoising_steps": "objective.min_timestep",
}
"""First and last step of denoising, from 0 at pure noise to 999 -> our end of the range."""
TRAINERS = ("sd_trainer", "ui_trainer", "diffusion_trainer")
HARMLESS: dict[str, str] = {
    "type": "the process is a trainer", "device": "run.device is used instead", "train.noise_scheduler": "the model family determines it",
    "train.train_unet": "the denoiser is always trained",
    "train.cache_text_embeddings": "encodings are always cached", "train.unload_text_encoder": "encoders are unloaded before training",
    "train.sdp": "it is the default", "train.xformers": "memory.attention selects the kernel", "network.transformer_only": "only the transformer is adapted",
    "save.save_format": "weights are always saved as safetensors",
    "sample.walk_seed": "seeds of pictures are as it says", "sample.format": "pictures are PNG",
    "logging.verbose": "the plan shows what is trained", "logging.use_ui_logger": "metrics.jsonl is always written",

    "model.low_vram": "memory.blocks_to_swap sets what leaves the device", "model.dtype": "train.mixed_precision is used instead",
    "model.is_flux": "model.arch is used instead", "model.qtype": "memory.base_storage is used instead", "model.qtype_te": "model.fp8_t5 is used instead",
    "model.model_kwargs": "the shape is read from the checkpoint", "performance_log_every": "every log line shows the speed",
    "model.extras_name_or_path": "each encoder has its own path", "model.quantize_kwargs": "the model family determines the layers",
    "save.push_to_hub": "hub.repo_id turns uploads on", "train.disable_sampling": "prompts are left out if sampling is disabled",
    "datasets.cache_latents": "latents are always cached", "datasets.cache_latents_to_disk": "latents are always cached",
    "datasets.cache_text_embeddings": "encodings are always cached", "datasets.num_workers": "train.loader_workers is used instead",
    "datasets.prefetch_factor": "micro-batches are read ahead", "datasets.type": "only images are trained", "datasets.num_frames": "only images are trained",
    "datasets.fast_image_size": "sizes are read from headers", "datasets.shrink_video_to_frames": "only images are trained",
}  # fmt: skip
"""Paths that do not change the result here -> why."""
SOURCE_DEFAULTS: dict[str, Any] = {
    "train.max_steps": 1000, "optimizer.lr": 1e-6, "adapter.rank": 4, "adapter.alpha": 1.0, "optimizer.type": "AdamW",
    "scheduler.type": "constant", "objective.timestep_sampling": "sigmoid", "train.mixed_precision": "no", "ema.enabled": False,
    "save.every_steps": 1000, "save.keep_last_steps": 5, "save.dtype": "float16", "memory.gradient_checkpointing": True,
    "log.every_steps": 100, "objective.guidance_scale": 1.0, "adapter.exclude": [], "ema.decay": 0.999, "optimizer.eps": 1e-6,
    "sample.every_steps": 100, "sample.width": 512, "sample.height": 512, "sample.steps": 20, "sample.seed": 0, "sample.guidance": 7.0,
    "sample.at_first": True,
}  # fmt: skip
"""Defaults of ai-toolkit, by our key."""
ITEM_DEFAULTS = {"missing_caption": "empty"}
RESOLUTION = 512
WARMUP = 1000
"""Updates of warm-up of constant_with_warmup."""
COUNTED = ("train.steps", "save.save_every", "sample.sample_every")
"""What is counted in micro-batches beside gradient_accumulation_steps."""


def import_ai_toolkit(document: Mapping[str, Any]) -> Imported:
    """Translate a job file.

    Args:
        document: as read from YAML.
    """
    return _Job().run(document)


class _Job(Builder):
    def __init__(self) -> None:
        super().__init__()
        self.code = trained_elsewhere()
        self.spec = MODELS[self.code]
        self.general: dict[str, Any] = {}
        self.datasets: list[dict[str, Any]] = []
        self.draws, self.walks = True, False

    def run(self, document: Mapping[str, Any]) -> Imported:
        config = document.get("config")
        config = config if isinstance(config, Mapping) else {}
        processes = config.get("process")
        process = (
            processes[0] if isinstance(processes, list) and processes and isinstance(processes[0], Mapping) else {}
        )
        if not process:
            self._refuse("config.process", f"is {processes!r}, expected a list with one process")
        name = str(config.get("name", "run"))
        if "job" in document:
            self.report.dropped_harmless.append(("job", "a run always trains"))
        if "meta" in document:
            self.report.dropped_harmless.append(("meta", "it describes the file"))
        if "name" in config:
            self._carry("config.name", "run.name", name)
        else:
            self.report.needs_you.append(("config.name", "is missing; set run.name"))
        for number in range(1, len(processes) if isinstance(processes, list) else 0):
            self._refuse(f"config.process[{number}]", "is a second process; import it from a separate file")
        for key in sorted({*document} - {"job", "meta", "config"}):
            self.report.unknown.append((key, ""))
        for key in sorted({*config} - {"name", "process"}):
            self.report.unknown.append((f"config.{key}", ""))
        given = dict(_flat(_expanded(process, name, process.get("trigger_word"))))
        self._folders(given, name)
        self._family(given)
        if given.get("train.unet_lr"):
            given.pop("train.lr", None)
            if "lr" in process.get("train", {}):
                self.report.dropped_harmless.append(
                    ("train.lr", "train.unet_lr, the learning rate of the denoiser, is used instead")
                )
        if not given.get("save.push_to_hub"):
            for path in [path for path in given if path.startswith("save.hf_")]:
                del given[path]
                self.report.dropped_harmless.append((path, "save.push_to_hub is off"))
        self.draws, self.walks = not given.get("train.disable_sampling"), bool(given.get("sample.walk_seed"))
        self._accumulation(given)
        self._scheduler(given)
        for path in list(given):
            if path in given:
                self._one(path, given.pop(path))
        if "network" not in process and process:
            self.report.needs_you.append(
                (
                    "network",
                    f"is missing: the job trains the whole model, but {self.spec.title} can only be trained with a LoRA here",
                )
            )
        sets = process.get("datasets") or []
        if not isinstance(sets, list):
            self._refuse("datasets", f"is {sets!r}, expected a list")
            sets = []
        for number, entry in enumerate(sets):
            self._data_set(number, _expanded(entry, name, process.get("trigger_word")))
        self._defaults()
        self._leave_idle()
        return Imported(self._nested(), {**ITEM_DEFAULTS, **self.general}, self.report, self.names, self.datasets)

    def _folders(self, given: dict[str, Any], name: str) -> None:
        if "training_folder" in given:
            folder = str(given.pop("training_folder"))
            self._convert(
                "training_folder", folder, "run.output_dir", f"{folder}/{name}", "each run has its own folder"
            )
        else:
            self.values["run.output_dir"] = f"output/{name}"
            self.report.defaulted.append(("run.output_dir", f"output/{name}"))

    def _family(self, given: dict[str, Any]) -> None:
        arch, path = given.pop("model.arch", None), given.get("model.name_or_path")
        named = isinstance(arch, str) and called(arch) == self.code
        self.values["model.arch"] = self.code
        if arch is not None and not named:
            self._refuse("model.arch", f"is {arch!r}, which is not supported; only {self.spec.title} is")
        elif arch is not None:
            self._convert("model.arch", arch, "model.arch", self.code, "renamed")
        elif others := [
            path for path in given if path.startswith("model.is_") and path != "model.is_flux" and given[path] is True
        ]:
            for key in others:
                given.pop(key)
                self._refuse(
                    key, f"is true: another model, which this program does not train; {self.spec.title} is supported"
                )
        elif not given.get("model.is_flux"):
            self.report.needs_you.append(
                ("model.is_flux", f"is missing; only {self.spec.title} is supported: check that the job is for it")
            )
        if path is None:
            self.report.needs_you.append(("model.name_or_path", f"is missing; set model.path to {self.spec.title}"))
            return
        given.pop("model.name_or_path")
        text = str(path)
        if text.lower().endswith((".safetensors", ".sft")):
            self._carry("model.name_or_path", "model.path", text)
            self.report.needs_you.append(
                ("model.name_or_path", "is a single file; add model.vae_path, clip_path and t5_path")
            )
            return
        if "kontext" in text.lower():
            reason = f"is a Kontext model, whose control images are not supported; it is trained as {self.spec.title}"
            self.report.dropped_changes_result.append(("(model.name_or_path)", reason))
        parts = {"model.vae_path": "vae", "model.clip_path": "text_encoder", "model.t5_path": "text_encoder_2",
                 "model.clip_tokenizer": "tokenizer", "model.t5_tokenizer": "tokenizer_2"}  # fmt: skip
        sign = "/" if text.startswith(("/", ".")) or text.count("/") != 1 else ":"
        self._convert(
            "model.name_or_path", text, "model.path", f"{text}{sign}transformer", "the transformer is trained"
        )
        for key, part in parts.items():
            self.values.setdefault(key, f"{text}{sign}{part}")
        if "schnell" in text.lower():
            self.values["model.allow_schnell"] = True

    def _accumulation(self, given: dict[str, Any]) -> None:
        """The older of two keys, with which every micro-batch counts as a step."""
        path = "train.gradient_accumulation_steps"
        count = given.pop(path, None)
        if count is None:
            return
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            self._refuse(path, f"is {count!r}; set train.grad_accum_steps to the micro-batches of an update")
            return
        self._carry(path, "train.grad_accum_steps", count)
        for other in COUNTED if count > 1 else ():
            steps = given.get(other)
            if isinstance(steps, int) and steps > 0:
                given.pop(other)
                self._convert(other, steps, SAME[other], max(1, steps // count), f"{count} of its steps are an update")

    def _scheduler(self, given: dict[str, Any]) -> None:
        """The schedule, whose arguments are those of torch's classes."""
        name, params = given.pop("train.lr_scheduler", None), given.pop("train.lr_scheduler_params", None)
        params = dict(params) if isinstance(params, Mapping) else {}
        path, word = "train.lr_scheduler", str(name).lower()
        if word == "linear":
            reason = "rises from a third of the learning rate to all of it there; the learning rate is constant here"
            self.report.dropped_changes_result.append((path, reason))
        elif word in BY_NAME:
            self._convert(path, name, "scheduler.type", BY_NAME[word], "renamed")
        elif name is not None:
            self.report.dropped_changes_result.append((path, f"is {name!r}; known: {', '.join(BY_NAME)}"))
        if word == "constant_with_warmup":
            self._convert(path, name, "scheduler.warmup_steps", params.pop("num_warmup_steps", WARMUP), "its warm-up")
        if word.startswith("cosine") and isinstance(least := params.get("eta_min"), int | float):
            self._convert(
                "train.lr_scheduler_params.eta_min", params.pop("eta_min"), "scheduler.min_lr", float(least), "renamed"
            )
        for key in params:
            self.report.dropped_changes_result.append(
                (f"train.lr_scheduler_params.{key}", "there is no such setting here")
            )

    def _one(self, path: str, value: Any) -> None:
        """Translate one key, given by its path."""
        if path == "datasets":
            return
        if path.endswith(("hf_token", "_key")) and value:
            self.report.secrets_removed.append(path)
            return
        if path in WORDS:
            key, words = WORDS[path]
            word = str(value).lower()
            if word not in words:
                known = ", ".join(filter(None, words))
                if path in ("network.type", "train.optimizer", "train.timestep_type", "train.loss_type"):
                    self._refuse(path, f"is {value!r}, which is not supported; known: {known}")
                else:
                    self.report.dropped_changes_result.append((path, f"is {value!r}; known: {known}"))
            else:
                self._convert(path, value, key, words[word], "renamed")
        elif path in ("network.linear", "network.rank"):
            self._set(path, "adapter.rank", value)
        elif path in ("network.linear_alpha", "network.alpha"):
            self._set(path, "adapter.alpha", float(value) if isinstance(value, int | float) else value)
        elif path in ("network.conv", "network.conv_alpha"):
            self.report.dropped_harmless.append((path, "the denoiser has no convolutions"))
        elif path in DENOISING:  # counted from pure noise there
            value = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
            if value is None:
                self.report.dropped_harmless.append((path, "it is off"))
            elif isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1000:
                self._refuse(path, f"is {value!r}, expected a whole number from 0 to 1000")
            else:
                key, level = DENOISING[path], 0 if value == 999 else 1000 - value
                level = max(level, 1) if key == "objective.max_timestep" else min(level, 999)
                self._convert(path, value, key, level, "noise level of that step")
        elif path == "train.content_or_style" and value in (None, "balanced"):
            self.report.dropped_harmless.append((path, "all noise levels are trained equally"))
        elif path == "network.network_kwargs" and isinstance(value, Mapping) and is_on(value):
            said = ", ".join(str(name) for name in value)
            self.report.dropped_changes_result.append(
                (path, f"has {said}; layers are chosen with adapter.include and exclude here")
            )
        elif path == "train.skip_first_sample":
            self._convert(path, value, "sample.at_first", not value, "inverted")
        elif path == "train.optimizer_params" and isinstance(value, Mapping):
            self._optimizer(value)
        elif path in ("sample.prompts", "sample.samples"):
            self._prompts(path, value)
        elif path == "sample.neg":
            self._text(path, "sample.negative_prompt", value)
        elif path == "model.quantize" and value:
            self._convert(path, value, "memory.base_storage", "fp8", "frozen weights in eight bits")
        elif path == "model.quantize_te" and value:
            self._convert(path, value, "model.fp8_t5", True, "T5 in eight bits while encoding")
        elif path == "model.lora_path" and value:
            self._convert(path, value, "adapter.merge", [str(value)], "merged before training")
        elif path == "type" and value not in TRAINERS:
            self._refuse(path, f"is {value!r}, which is not supported; known: {', '.join(TRAINERS)}")
        elif path == "device" and ":" in str(value).removesuffix(":0"):
            self.report.dropped_changes_result.append((path, f"is {value!r}; set CUDA_VISIBLE_DEVICES to choose a GPU"))
        elif path in SAME and SAME[path].startswith("general."):
            self._item(path, SAME[path].removeprefix("general."), value)
        elif path in SAME:
            self._set(path, SAME[path], value)
        elif path in HARMLESS:
            self.report.dropped_harmless.append((path, HARMLESS[path]))
        elif not is_on(value):
            self.report.dropped_harmless.append((path, "it is off"))
        elif path in ("train.train_text_encoder",):
            self._refuse(path, "is true, which trains a text encoder; here only the denoiser is trained")
        else:
            said = "***" if path.endswith(("token", "key")) else describe(value)
            self.report.dropped_changes_result.append((path, f"is {said}, and there is no such setting here"))

    def _set(self, path: str, key: str, value: Any) -> None:
        own = {parameter.key: parameter for parameter in parameters(self.spec)}
        if key not in own:
            self.report.dropped_changes_result.append(
                (path, f"is {describe(value)}, but {self.spec.title} has no {key}")
            )
        elif key in self.names and self.values[key] != value:
            self.report.dropped_harmless.append((path, f"{self.names[key]} is used instead"))
        elif value is None:
            self.report.dropped_harmless.append((path, "it is off"))
        else:
            self._take(path, key, value)

    def _text(self, path: str, key: str, value: Any) -> None:
        if isinstance(value, str) and value:
            self._carry(path, key, value)
        else:
            self.report.dropped_harmless.append((path, "it is empty"))

    def _item(self, path: str, name: str, value: Any) -> None:
        if value is None:
            self.report.dropped_harmless.append((path, "it is off"))
            return
        self.general[name] = of_items(name, value)
        self.report.carried.append((path, f"general.{name}", value))

    def _optimizer(self, table: Mapping[str, Any]) -> None:
        for name, value in table.items():
            record = RECORDS.get(self.values.get("optimizer.type", "AdamW"))
            if record is not None and name in record.arguments:
                self.values.setdefault("optimizer.args", {})[name] = value
                self.report.converted.append(
                    (f"train.optimizer_params.{name}", value, "optimizer.args", {name: value}, "an argument")
                )
                continue
            key = f"optimizer.{name}"
            if key in self.known and name != "type":
                self._set(
                    f"train.optimizer_params.{name}", key, list(value) if isinstance(value, list | tuple) else value
                )
            else:
                self.report.dropped_changes_result.append(
                    (f"train.optimizer_params.{name}", "is not a setting of [optimizer]")
                )

    def _prompts(self, path: str, value: Any) -> None:
        """Prompts, with their options written as in a prompt file."""
        options = {"width": "w", "height": "h", "seed": "d", "sample_steps": "s", "guidance_scale": "g", "neg": "n"}
        if not isinstance(value or [], list):
            self._refuse(path, f"is {value!r}, expected a list")
            return
        lines = list(self.values.get("sample.prompts", []))
        for entry in value or []:
            if isinstance(entry, Mapping):
                said = {
                    name: text for name, text in entry.items() if text is not None and text is not False and text != ""
                }
                own = [f"--{options[name]} {said[name]}" for name in options if name in said]
                lines.append(" ".join([str(entry.get("prompt", "")), *own]))
                others = [str(name) for name in said if name not in options and name != "prompt"]
                if others:
                    reason = f"has {', '.join(others)}, which prompts do not support here"
                    self.report.dropped_changes_result.append((f"({path})", reason))
            else:
                lines.append(self._options_of(path, str(entry)))
        if not self.draws or not lines:
            self.report.dropped_harmless.append((path, "no samples are drawn"))
        else:
            self._convert(path, f"prompts: {len(lines)}", "sample.prompts", lines, "one prompt per line")

    def _options_of(self, path: str, text: str) -> str:
        """A prompt with its options under our letters."""
        for theirs, ours in (("seed", "d"), ("cfg", "g"), ("l", "g"), ("steps", "s")):
            text = re.sub(rf"(?<=\s)--{theirs}(?=\s)", f"--{ours}", text)
        for option in re.findall(r"(?<=\s)--(ctrl_img\w*|ctrl_idx|gr|p2|fps|num_frames)\s+\S+", text):
            self.report.dropped_changes_result.append(
                (f"({path})", f"has --{option}, and prompts have no such option here")
            )
            text = re.sub(rf"\s--{option}\s+\S+", "", text)
        return text

    def _data_set(self, number: int, entry: Any) -> None:
        """Translate a data set: into one for each of its resolutions."""
        where = f"datasets[{number}]"
        if not isinstance(entry, Mapping):
            self._refuse(where, f"is {entry!r}, expected a table")
            return
        made: dict[str, Any] = {}
        sides = entry.get("resolution", RESOLUTION)
        sides = sides if isinstance(sides, list) else [sides]
        for name, value in entry.items():
            path = f"{where}.{name}"
            if name == "resolution":
                self.report.converted.append(
                    (path, value, "datasets.resolution", sides, "a data set for each resolution")
                )
            elif name == "caption_ext":
                text = "." + str(value).lstrip(".")
                made["caption_extension"] = text
                self.report.converted.append((path, value, "datasets.caption_extension", text, "with a dot"))
            elif name == "mask_min_value" and isinstance(value, int | float) and entry.get("mask_path"):
                self._convert(path, value, "train.mask_background", float(value), "weight of what is masked out")
            elif name in ITEMS and value not in (None, ""):
                made[ITEMS[name]] = of_items(ITEMS[name], value)
                self.report.carried.append((path, f"datasets.{ITEMS[name]}", value))
            elif f"datasets.{name}" in HARMLESS:
                self.report.dropped_harmless.append((path, HARMLESS[f"datasets.{name}"]))
            elif not is_on(value) or (name in ("scale", "network_weight", "loss_multiplier") and value == 1):
                self.report.dropped_harmless.append((path, "it is off"))
            else:
                self.report.dropped_changes_result.append(
                    (path, f"is {describe(value)}, and there is no such setting here")
                )
        if "image_directory" not in made and "image_jsonl_file" not in made:
            self.report.needs_you.append((f"{where}.folder_path", "is missing; set image_directory"))
        for side in sides:
            own = {**made, "resolution": side}
            if len(sides) > 1 and "image_directory" in made:
                own["cache_directory"] = f"{made['image_directory']}/cache_{side}"
            self.datasets.append(own)

    def _defaults(self) -> None:
        """Write ai-toolkit's defaults where ours differ, and cached versions for captions that change at random."""
        own = {parameter.key: parameter for parameter in parameters(self.spec)}
        for key, value in SOURCE_DEFAULTS.items():
            ours = self.spec.defaults.get(key, own[key].field.default)
            if key not in self.values and value != ours:
                self.values[key] = value
                self.report.defaulted.append((key, value))
        if self.values.get("sample.prompts") and not self.walks:
            seed = self.values.get("sample.seed", SOURCE_DEFAULTS["sample.seed"])
            lines = [line if " --d " in line else f"{line} --d {seed}" for line in self.values["sample.prompts"]]
            self.values["sample.prompts"] = lines
        if not self.values.get("sample.prompts"):
            for key in [key for key in self.values if key.startswith("sample.")]:
                self._drop(key, "no samples are drawn")
        if not self.values.get("ema.enabled", False) and "ema.decay" in self.values:
            self._drop("ema.decay", "ema.enabled is false")
        if any(entry.get("mask_directory") or entry.get("alpha_mask") for entry in self.datasets):
            self.values["train.masked_loss"] = True
            self.report.defaulted.append(("train.masked_loss", True))
        changing = ("shuffle_caption", "caption_tag_dropout_rate")
        if any(entry.get(key) for entry in [self.general, *self.datasets] for key in changing):
            self.values["cache.text_variants"] = VARIANTS
            self.report.defaulted.append(("cache.text_variants", VARIANTS))


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and values; lists, prompts and the parameters of an optimizer are not split."""
    for key, value in table.items():
        path = f"{before}{key}"
        if isinstance(value, Mapping) and path not in (
            "train.optimizer_params",
            "train.lr_scheduler_params",
            "network.network_kwargs",
            "model.model_kwargs",
        ):
            yield from _flat(value, f"{path}.")
        elif path != "datasets":
            yield path, value


def _expanded(value: Any, name: str, trigger: Any) -> Any:
    """A value with the placeholders [name] and [trigger] filled in; without a trigger word, [trigger] stays for that of the data set."""
    if isinstance(value, str):
        text = value.replace("[name]", name)
        return re.sub(r"\[trigger\]", lambda _: str(trigger), text) if trigger else text
    if isinstance(value, Mapping):
        return {key: _expanded(item, name, trigger) for key, item in value.items()}
    return [_expanded(item, name, trigger) for item in value] if isinstance(value, list) else value
