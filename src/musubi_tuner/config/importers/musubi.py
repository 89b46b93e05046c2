"""Option files of musubi-tuner: flat keys, in tables whose names mean nothing.

    [train]                       all keys are options of one script
    architecture = "fd"           or script = "flux_dev_train_network.py"
    dit = "..."

Two tables are ours and keep their names: [accelerate] and [cache]. A missing key means musubi-tuner's default, which is
written where ours differs. A value of another kind is an error, as in a typed file.
"""

import ast
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from musubi_tuner.config.diagnostics import did_you_mean
from musubi_tuner.config.fields import Parameter
from musubi_tuner.config.foreign import REFUSED
from musubi_tuner.config.importers.builder import Builder
from musubi_tuner.config.importers.report import Imported
from musubi_tuner.config.schema import flat_names, parameters
from musubi_tuner.models.registry import MODELS

DEFAULTS: dict[str, Any] = {
    "adapter.rank": 4,
    "adapter.alpha": 1.0,
    "optimizer.lr": 2e-6,
    "scheduler.type": "constant",
    "objective.timestep_sampling": "sigma",
    "objective.discrete_flow_shift": 1.0,
    "objective.timestep_offset": 0.001,
    "objective.guidance_scale": 1.0,
    "objective.weighting_scheme": "none",
    "train.mixed_precision": "no",
    "run.allow_tf32": False,
    "run.cudnn_benchmark": False,
    "ema.warmup": False,
    "save.dtype": "float32",
    "save.every_steps": 0,
    "save.keep_last_steps": 0,
    "save.keep_last_epochs": 0,
    "save.keep_last_states": 0,
    "memory.swap_pinned": False,
    "sample.width": 256,
    "sample.height": 256,
}
"""What musubi-tuner assumes, by our key; written where the family's own default is another."""
GENERAL: dict[str, Any] = {"resolution": [960, 544], "enable_bucket": False}
"""The same for data sets."""
SECRETS = ("huggingface_token", "wandb_api_key")
OTHER_PROGRAM = "belongs to another architecture of musubi-tuner"
HARMLESS: dict[str, str] = {
    "persistent_data_loader_workers": "workers are started for every epoch",
    "logging_dir": "logs go to logs/ below output_dir",
    "log_prefix": "logs go to logs/ below output_dir",
    "log_tracker_name": "logs go to logs/ below output_dir",
    "log_config": "the resolved config is always written",
    "async_upload": "uploads never block the training",
    "sdpa": "it is the default",
    "split_attn": "the samples of a batch are equally long here, so nothing is gained",
    "ddp_gradient_as_bucket_view": "always on",
    "verbose": "the plan says what is trained",
    "training_finished_at": "written by the trainer",
    "block_swap_h2d_only": "frozen blocks are always streamed one way",
    "disable_numpy_memmap": "weights are copied out of the mapped file one by one",
}
"""Options without a counterpart that change no number."""
NOT_BUILT = ("fsdp", "fsdp2", "deepspeed", "zero_stage", "fused_backward_pass", "full_bf16", "full_fp16")
OFF_ONLY: dict[str, str] = {
    "flash3": "is not built; set flash_attn = true or sdpa = true instead",
    "sage_attn": "cannot train; set sdpa = true instead",
    "compile_fullgraph": "is not built: what cannot be compiled runs as it is",
    "img_in_txt_in_offloading": OTHER_PROGRAM,
    "no_metadata": "is not built: files always say how they were made",
    **{name: REFUSED[name] for name in NOT_BUILT},
    "resume_from_huggingface": "is not built: give a local state folder as resume",
    "conv_dim": "has nothing to act on: the blocks have no convolutions",
    "conv_alpha": "has nothing to act on: the blocks have no convolutions",
}
"""Options that may be false, 0 or empty, and are refused otherwise."""
NETWORK_ARGS = {"exclude_patterns": "adapter.exclude", "include_patterns": "adapter.include",
                "rank_dropout": "adapter.rank_dropout", "module_dropout": "adapter.module_dropout",
                "loraplus_lr_ratio": "adapter.loraplus_lr_ratio"}  # fmt: skip
OPTIMIZER_ARGS = {"betas": "optimizer.betas", "weight_decay": "optimizer.weight_decay", "eps": "optimizer.eps"}
OPTIMIZERS = {"adamw": "AdamW", "adamw8bit": "AdamW8bit", "adafactor": "Adafactor", "": "AdamW"}
SCHEDULERS = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear"}
DTYPES = {"float": "float32", "fp32": "float32", "float32": "float32", "fp16": "float16", "float16": "float16",
          "bf16": "bfloat16", "bfloat16": "bfloat16"}  # fmt: skip
PLAIN = {"architecture": "model.arch", "dataset_config": "dataset_config", "max_data_loader_n_workers": "train.loader_workers",
         "vae": "model.vae_path", "ddp_timeout": "distributed.timeout_minutes", "seed": "run.seed",
         "use_pinned_memory_for_block_swap": "memory.swap_pinned", "block_swap_ring_size": "memory.swap_ring"}  # fmt: skip
"""Source key -> ours, beside the flat names of the schema."""
ACCELERATE = {"num_processes": "distributed.num_processes", "num_cpu_threads_per_process": "run.threads",
              "main_process_port": "distributed.main_process_port"}  # fmt: skip


def looks_flat(document: dict[str, Any]) -> str | None:
    """Whose option file a document without typed tables looks like: musubi, kohya, or None."""
    keys = set(document) | {key for table in document.values() if isinstance(table, dict) for key in table}
    if {"pretrained_model_name_or_path", "train_data_dir"} & keys:
        return "kohya"
    return "musubi" if {"dit", "architecture", "script", "network_module", "dataset_config"} & keys else None


def import_musubi(document: dict[str, Any], locate: Callable[[str], Path]) -> Imported:
    """Translate an option file.

    Args:
        locate: where a path of the file is; needed for encoders that only their content tells apart.
    """
    return _Importer(locate).run(document)


class _Importer(Builder):
    def __init__(self, locate: Callable[[str], Path]) -> None:
        super().__init__()
        self.locate = locate
        self.flat = flat_names()
        self.options: dict[str, Any] = {}

    def run(self, document: dict[str, Any]) -> Imported:
        tables = {key: value for key, value in document.items() if isinstance(value, dict)}
        own = {name: tables.pop(name) for name in ("accelerate", "cache") if name in tables}
        options: dict[str, Any] = {key: value for key, value in document.items() if not isinstance(value, dict)}
        for table in tables.values():
            for key, value in table.items():
                if key in options and options[key] != value:
                    self.report.needs_you.append((key, f"is set twice, to {options[key]!r} and {value!r}; keep one"))
                options[key] = value
        for key in {key for key, _ in self.report.needs_you}:
            options.pop(key)
        self.options = options
        self._accelerate(own.get("accelerate", {}))
        self._cache(own.get("cache", {}))
        self._family(options)
        self._special(options)
        for key, value in options.items():
            self._plain(key, value)
        self._defaults()
        return Imported(self._nested(), dict(GENERAL), self.report, self.names)

    # -- tables of ours ----------------------------------------------------------------------------------------------

    def _accelerate(self, table: dict[str, Any]) -> None:
        for key, value in table.items():
            source = f"accelerate.{key}"
            if key in ACCELERATE:
                self._carry(source, ACCELERATE[key], value)
            elif key == "mixed_precision" and "mixed_precision" not in self.options:
                self._carry(source, "train.mixed_precision", value)
            elif key in ("mixed_precision", "dynamo_backend", "num_machines"):
                self.report.dropped_harmless.append((source, "the run's own settings decide"))
            else:
                self.report.unknown.append((source, did_you_mean(key, ACCELERATE)))

    def _cache(self, table: dict[str, Any]) -> None:
        for key, value in table.items():
            source = f"cache.{key}"
            if key == "skip_existing" and isinstance(value, bool):
                if value:
                    self._convert(
                        source, value, "cache.skip_existing", "fingerprint", "files that are up to date are skipped"
                    )
                elif "run" in table:
                    self._refuse(
                        source, 'is false: leave it out and set cache.run = "always" to encode everything again'
                    )
                else:
                    self._convert(source, value, "cache.run", "always", "everything is encoded again")
            elif key == "batch_size":
                self._convert(source, value, "cache.text_batch_size", value, "captions encoded together")
            elif key == "num_workers":
                self._convert(source, value, "cache.workers", value, "threads that read images")
            elif f"cache.{key}" in self.known:
                self._carry(source, f"cache.{key}", value)
            else:
                names = [name.removeprefix("cache.") for name in self.known if name.startswith("cache.")]
                self.report.unknown.append((source, did_you_mean(key, names)))

    # -- options that need thought -------------------------------------------------------------------------------------

    def _family(self, options: dict[str, Any]) -> None:
        """The family: as said, else by the script, else by the network module."""
        scripts = {MODELS[code].full_name: code for code in MODELS}
        networks = {MODELS[code].adapters.network_module: code for code in MODELS}
        if "script" in options:
            name = str(options.pop("script"))
            family = next((code for start, code in scripts.items() if Path(name).name.startswith(start)), None)
            if family is None:
                self._refuse("script", f"{name}: is not a script of a supported family; known: {', '.join(scripts)}")
            elif "architecture" in options:
                self.report.dropped_harmless.append(("script", "architecture says it"))
            else:
                self._convert("script", name, "model.arch", family, "the script's family")
        if "network_module" in options:
            name = str(options.pop("network_module"))
            family = networks.get(name)
            if family is None:
                self._refuse("network_module", f"{name}: is not built; known: {', '.join(networks)}")
            else:
                self._convert("network_module", name, "adapter.type", "lora", "its kind of adapter")
                if "architecture" not in options and "model.arch" not in self.values:
                    self.values["model.arch"] = family
        elif "architecture" in options or "model.arch" in self.values:
            self.values["adapter.type"] = "none"

    def _special(self, options: dict[str, Any]) -> None:
        for key in SECRETS:
            if key in options:
                options.pop(key)
                self.report.secrets_removed.append(key)
        for key, reason in HARMLESS.items():
            if key in options:
                options.pop(key)
                self.report.dropped_harmless.append((key, reason))
        for key, reason in OFF_ONLY.items():
            if key in options:
                value = options.pop(key)
                if value in (False, 0, None, ""):
                    self.report.dropped_harmless.append((key, "it is off"))
                else:
                    self._refuse(key, f"is {value!r}, which {reason}")
        for key in [key for key in options if key.startswith("dynamo_")]:
            self._refuse(
                key, f"is {options.pop(key)!r}; use compile and compile_backend, compile_mode, compile_dynamic instead"
            )
        if not options.get("compile"):
            for key in [key for key in options if key.startswith("compile_")]:
                options.pop(key)
                self.report.dropped_harmless.append((key, "nothing is compiled"))
        for key in [key for key in options if key.startswith("metadata_")]:
            options.pop(key)
            self.report.dropped_changes_result.append((key, "the header of the file will not have it"))
        for key, kernel in (("flash_attn", "flash"), ("xformers", "xformers")):
            if key in options:
                if options.pop(key):
                    self._convert(key, True, "memory.attention", kernel, "kernel of attention")
                else:
                    self.report.dropped_harmless.append((key, "it is off"))
        if isinstance(options.get("compile_dynamic"), bool):
            options["compile_dynamic"] = str(options["compile_dynamic"]).lower()
        self._storage(options)
        self._steps(options)
        self._choice(options, "optimizer_type", "optimizer.type", OPTIMIZERS, lower=True)
        self._choice(options, "lr_scheduler", "scheduler.type", SCHEDULERS, lower=True)
        self._choice(options, "save_precision", "save.dtype", DTYPES)
        self._choice(options, "vae_dtype", "model.vae_dtype", DTYPES)
        self._arguments(options, "optimizer_args", OPTIMIZER_ARGS)
        self._arguments(options, "network_args", NETWORK_ARGS)
        self._encoder1(options)
        for key in ("base_weights", "base_weights_multiplier"):
            if key in options and not isinstance(options[key], list):
                target = self.flat[key].key
                self._convert(key, options[key], target, [options.pop(key)], "a list of one")
        if "num_timestep_buckets" in options:
            value = options.pop("num_timestep_buckets")
            rule = "the noise levels of every update are spread evenly, instead of those of an epoch over N slices"
            self._convert(
                "num_timestep_buckets", value, "objective.timestep_stratified", bool(value and value >= 2), rule
            )
        if "log_with" in options:
            value = options.pop("log_with")
            if value == "tensorboard":
                self._convert("log_with", value, "log.tensorboard", True, "events in logs/")
            else:
                self._refuse("log_with", f"is {value!r}; only tensorboard is built")

    def _storage(self, options: dict[str, Any]) -> None:
        """Two switches there, one choice here; fp8_scaled means fp8_base."""
        scaled, base = options.pop("fp8_scaled", None), options.pop("fp8_base", None)
        for key, value, on in (
            ("fp8_scaled", scaled, "fp8_scaled"),
            ("fp8_base", base, "fp8_scaled" if scaled else "fp8"),
        ):
            if value is None:
                continue
            if not isinstance(value, bool):
                self._refuse(key, f"is {value!r}, expected true or false")
            elif value:
                self._convert(key, value, "memory.base_storage", on, "how the frozen weights are stored")
            else:
                self.report.dropped_harmless.append((key, "it is off"))

    def _steps(self, options: dict[str, Any]) -> None:
        """Lengths: epochs win over steps; warm-up as a share; newest steps kept are counted in steps there."""
        if "max_train_epochs" in options and "max_train_steps" in options:
            options.pop("max_train_steps")
            self.report.dropped_harmless.append(("max_train_steps", "max_train_epochs decides"))
        if "max_train_epochs" not in options and "max_train_steps" not in options:
            self.values["train.max_steps"] = 1600
            self.report.defaulted.append(("train.max_steps", 1600))
        warmup = options.get("lr_warmup_steps")
        if isinstance(warmup, str) and warmup.endswith("%"):
            warmup = float(warmup[:-1]) / 100 if warmup[:-1].replace(".", "", 1).isdigit() else warmup
        if isinstance(warmup, float) and 0 < warmup < 1:
            old, steps = (
                options.pop("lr_warmup_steps"),
                options.get("max_train_steps", self.values.get("train.max_steps")),
            )
            if isinstance(steps, int):
                self._convert(
                    "lr_warmup_steps", old, "scheduler.warmup_steps", int(warmup * steps), "share of max_train_steps"
                )
            else:
                self.report.needs_you.append(("lr_warmup_steps", f"is {old!r}, a share of steps that are not known here; "
                                              "give a whole number of updates"))  # fmt: skip
        for key, ours in (
            ("save_last_n_steps", "save.keep_last_steps"),
            ("save_last_n_epochs", "save.keep_last_epochs"),
            ("save_last_n_steps_state", "save.keep_last_states"),
            ("save_last_n_epochs_state", "save.keep_last_states"),
        ):
            if key not in options:
                continue
            value, every = options.pop(key), options.get("save_every_n_steps")
            before = self.values.get(ours)
            if isinstance(value, int) and isinstance(before, int):
                self._convert(key, value, ours, max(value, before), "one number for both: the larger")
            elif isinstance(value, int) and isinstance(every, int) and every > 0 and "steps" in key:
                self._convert(key, value, ours, value // every + 1, "files instead of steps")
            else:
                self._carry(key, ours, value)
        if "save_state_on_train_end" in options:
            options.pop("save_state_on_train_end")
            self.report.dropped_harmless.append(("save_state_on_train_end", "the last state is always written"))

    def _choice(
        self, options: dict[str, Any], source: str, key: str, table: dict[str, str], *, lower: bool = False
    ) -> None:
        """A word of theirs into one of ours."""
        if source not in options:
            return
        old = options.pop(source)
        if not isinstance(old, str):
            self._refuse(source, f"is {old!r}, expected a text")
            return
        word = old.lower() if lower else old
        if word not in table:
            known = ", ".join(name for name in table if name)
            self._refuse(source, f"is {old!r}, which is not built; known: {known}.{did_you_mean(str(word), table)}")
        elif table[word] == old:
            self._carry(source, key, old)
        else:
            self._convert(source, old, key, table[word], "our name of it")

    def _arguments(self, options: dict[str, Any], source: str, table: dict[str, str]) -> None:
        """A list of ``key=value`` texts."""
        if source not in options:
            return
        entries = options.pop(source)
        texts = [entries] if isinstance(entries, str) else entries
        found, problem = {}, None
        for text in texts if isinstance(texts, list) else [texts]:
            name, sign, value = str(text).partition("=")
            name = name.strip()
            fixed = ("relative_step", "scale_parameter", "warmup_init")
            adafactor = source == "optimizer_args" and self.values.get("optimizer.type") == "Adafactor"
            if adafactor and name in fixed and value.strip() == "False":
                self.report.dropped_harmless.append((f"optimizer_args {name}", "Adafactor is built so here"))
                continue
            if not sign:
                problem = f"{text!r} is not of the form key=value"
            elif name == "verbose" or (name in OFF_ONLY and value.strip() in ("0", "None", "False")):
                continue
            elif name not in table:
                problem = f"{name} is not built; known: {', '.join(table)}.{did_you_mean(name, table)}"
            else:
                found[table[name]] = self._typed(self.known[table[name]], value.strip())
        if problem:
            self._refuse(source, problem)
            return
        for key, value in found.items():
            self._store(source, key, value)
        shown = ", ".join(f"{key} = {value!r}" for key, value in found.items()) or "nothing"
        self.report.converted.append((source, entries, ", ".join(found) or "-", shown, "one key each"))

    def _typed(self, parameter: Parameter, text: str) -> Any:
        """A Python literal as the type of a setting."""
        try:
            value = ast.literal_eval(text.removeprefix("r"))
        except (ValueError, SyntaxError):
            try:
                # Lists of raw strings, as the patterns are usually written.
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                return text
        if isinstance(value, tuple):
            value = list(value)
        if parameter.type_name.startswith("float") and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        return value

    def _encoder1(self, options: dict[str, Any]) -> None:
        """``text_encoder1`` is Kontext's spelling of T5; here ``text_encoder`` is CLIP and ``text_encoder2`` T5."""
        if "text_encoder1" not in options:
            return
        first = options.pop("text_encoder1")
        if not self._is_t5(first):
            self.report.needs_you.append(("text_encoder1", f"{first}: is not a T5 file, which this name means; write CLIP-L as "
                                          "text_encoder and T5 as text_encoder2"))  # fmt: skip
            return
        self._convert("text_encoder1", first, "model.t5_path", first, "its content is T5")
        second = options.get("text_encoder2")
        if second is not None and "text_encoder" not in options and not self._is_t5(second):
            options.pop("text_encoder2")
            self._convert("text_encoder2", second, "model.clip_path", second, "its content is CLIP")

    def _is_t5(self, text: Any) -> bool:
        from safetensors import SafetensorError, safe_open

        path = self.locate(str(text))
        try:
            with safe_open(str(path), "np") as file:
                return any(".SelfAttention." in key for key in file.keys())  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError):
            return False

    # -- the rest ------------------------------------------------------------------------------------------------------

    def _plain(self, key: str, value: Any) -> None:
        """Options that mean here what they mean there."""
        target = PLAIN.get(key) or (self.flat[key].key if key in self.flat else None)
        if target is None or key not in self._source_names():
            self.report.unknown.append((key, did_you_mean(key, self._source_names())))
            return
        parameter = self.known[target]
        if isinstance(value, str) and parameter.type_name in ("int", "float") and _is_number(value):
            number: float = float(value)
            whole = parameter.type_name == "int" and number.is_integer()
            self._convert(key, value, target, int(number) if whole else number, "a number in quotes")
        elif parameter.type_name == "float" and isinstance(value, int) and not isinstance(value, bool):
            self._carry(key, target, float(value))
        else:
            self._carry(key, target, value)

    def _source_names(self) -> Iterable[str]:
        """Names that an option file may use."""
        return {*self.flat, *PLAIN, *HARMLESS, *OFF_ONLY, *SECRETS, "flash_attn", "optimizer_args", "network_args"}

    def _defaults(self) -> None:
        """Write musubi-tuner's defaults where the family's differ."""
        spec = MODELS.get(str(self.values.get("model.arch")))
        if spec is None:
            return
        if "run.seed" not in self.values:
            self.report.defaulted.append(("run.seed", 42))
        samples, own = "sample.prompts" in self.values, {parameter.key: parameter for parameter in parameters(spec)}
        for key, value in DEFAULTS.items():
            section = key.partition(".")[0]
            if key in self.values or (section == "sample" and not samples):
                continue
            if section == "adapter" and self.values.get("adapter.type") != "lora":
                continue
            if section == "ema" and not spec.defaults.get("ema.enabled", self.known["ema.enabled"].field.default):
                continue
            if key == "memory.swap_pinned" and not self.values.get("memory.blocks_to_swap"):
                continue
            if key == "save.keep_last_states" and self.values.get("save.state") is False:
                continue
            every = key.replace("keep_last_", "every_").replace("every_states", "keep_last_states")
            if every != key and not self.values.get(every):
                continue
            if key not in own:
                continue
            ours = spec.defaults.get(key, own[key].field.default)
            kind = own[key].field.annotation
            if value != ours and (get_origin(kind) is not Literal or value in get_args(kind)):
                self.values[key] = value
                self.report.defaulted.append((key, value))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
