"""Option files of musubi-tuner and sd-scripts, and JSON training plans: flat keys, in tables whose names are not used.

    [train]                       all keys are options of one script
    architecture = "fd"           or script = "flux_dev_train_network.py"
    dit = "..."

Two tables of these files have a meaning here: [accelerate] and [cache]. A missing key means the other program's default,
which is written where ours differs. A value of the wrong type is an error, as in a run file.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from musubi_tuner.config.datasets import SHARED_KEYS
from musubi_tuner.config.diagnostics import did_you_mean
from musubi_tuner.config.fields import Parameter
from musubi_tuner.config.foreign import FOREIGN, wins
from musubi_tuner.config.importers.builder import Builder
from musubi_tuner.config.importers.option_names import (
    ACCELERATE,
    ADAPTER_WORDS,
    DIMS,
    IGNORED_THERE,
    LAUNCHER,
    LAYERS,
    LEFT_TO_PEOPLE,
    NETWORK_ARGS,
    OPTIMIZER_ARGS,
    OWN_TABLES,
    PLAIN,
)
from musubi_tuner.config.importers.report import Imported
from musubi_tuner.config.importers.tools import DEFAULTS, GENERAL
from musubi_tuner.config.names import answer
from musubi_tuner.config.schema import flat_names, parameters
from musubi_tuner.config.when import describe, is_on
from musubi_tuner.models.registry import MODELS, called, foreign_family, trained_elsewhere
from musubi_tuner.optimizers import OPTIMIZERS, Argument

SECRETS = ("huggingface_token", "wandb_api_key", "wandb_key", "hub_token")


def import_options(document: dict[str, Any], locate: Callable[[str], Path], tool: str = "musubi") -> Imported:
    """Translate an option file.

    Args:
        locate: resolves a path of the file; needed for encoders that only their content tells apart.
        tool: musubi, kohya or plan; see `tools.recognise`.
    """
    return _Importer(locate, tool).run(document)


CHANGING = {
    "cache.text_variants": ("shuffle_caption", "enable_wildcard", "caption_tag_dropout_rate", "token_warmup_step"),
    "cache.latent_variants": ("random_crop", "color_aug"),
}
"""Number of cached versions -> what changes at random and needs them."""
VARIANTS = 8
"""Number of cached versions where captions or images change at random; other trainers make a new version each time."""
FOLDERS = ("train_data_dir", "dataset_dir", "image_directory", "image_dir")
"""Options that name a folder of images."""
_KOHYA_FOLDER = re.compile(r"(\d+)_(.+)")


def _data_sets(text: str, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """[[datasets]] of a folder: one for every sub-folder N_name of it, if there are any; and the sub-folders that are left out."""
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    named = [match for name in inside if (match := _KOHYA_FOLDER.fullmatch(name)) and int(match[1])]
    if not named:
        return [{"image_directory": text}], []
    used = [
        {"image_directory": f"{text}/{match[0]}", "num_repeats": int(match[1]), "class_tokens": match[2]}
        for match in named
    ]
    return used, [name for name in inside if name not in {match[0] for match in named}]


class _Importer(Builder):
    def __init__(self, locate: Callable[[str], Path], tool: str) -> None:
        super().__init__()
        self.locate, self.tool = locate, tool
        self.general: dict[str, Any] = {}
        self.datasets: list[dict[str, Any]] = []
        self.flat = flat_names()
        self.options: dict[str, Any] = {}
        self.options_given: set[str] = set()

    def run(self, document: dict[str, Any]) -> Imported:
        tables = {key: value for key, value in document.items() if isinstance(value, dict)}
        own = {
            name: tables.pop(name)
            for name in OWN_TABLES
            if name in tables and (name == "accelerate" or self.tool == "musubi")
        }
        items = {name: tables.pop(name) for name in ("general",) if name in tables and "datasets" in document}
        options: dict[str, Any] = {
            key: value for key, value in document.items() if not isinstance(value, dict) and key != "datasets"
        }
        for table in tables.values():
            for key, value in table.items():
                if key in options and options[key] != value:
                    self.report.needs_you.append((key, f"is set twice, to {options[key]!r} and {value!r}; keep one"))
                options[key] = value
        for key in {key for key, _ in self.report.needs_you}:
            options.pop(key)
        self.options, self.options_given = options, set(options)
        self._accelerate(own.get("accelerate", {}))
        self._cache(own.get("cache", {}))
        self._family(options)
        self.spec = MODELS.get(str(self.values.get("model.arch")))
        self._special(options)
        self._folders(options)
        for key, value in sorted(options.items(), key=lambda pair: not wins(pair[0])):
            self._plain(key, value)
        self._captions()
        self._defaults()
        self._leave_idle()
        general = {**GENERAL[self.tool], **self.general}
        if "dataset_config" in self.values:
            self.datasets = []
            self.report.leave_out("datasets", "the data sets are those of dataset_config, there too")
        datasets = document.get("datasets", self.datasets)
        if not isinstance(datasets, list) or not all(isinstance(entry, dict) for entry in datasets):
            self._refuse("datasets", f"is {describe(datasets)}, expected [[datasets]]")
            datasets = self.datasets
        return Imported(self._nested(), {**general, **items.get("general", {})}, self.report, self.names, datasets)

    # -- tables of ours ----------------------------------------------------------------------------------------------

    def _accelerate(self, table: dict[str, Any]) -> None:
        for key, value in table.items():
            source = f"accelerate.{key}"
            if key in ACCELERATE:
                self._carry(source, ACCELERATE[key], value)
            elif key == "mixed_precision" and "mixed_precision" not in self.options:
                self._carry(source, "train.mixed_precision", value)
            elif key in ("mixed_precision", "dynamo_backend", "num_machines", "multi_gpu"):
                self.report.dropped_harmless.append((source, "the settings of the run are used instead"))
            elif key in LAUNCHER:
                self.report.dropped_changes_result.append((source, "processes are started by [distributed] here"))
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
                    self._refuse(source, 'is false; remove it and set cache.run = "always" to encode everything again')
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
        """The family: as named, else from the script, else from the network module; and whether an adapter is trained."""
        for key in ("architecture", "model_type", "arch"):
            if key in options and "model.arch" not in self.values:
                name = str(options.pop(key))
                code = called(name)
                if code == name:
                    self._carry(key, "model.arch", name)
                elif code is not None:
                    self._convert(key, name, "model.arch", code, "renamed")
                else:
                    self._refuse(key, f"is {name!r}, which {foreign_family(name) or 'is not a model family here.'}")
        if "script" in options:
            self._script(str(options.pop("script")))
        kind = self._network(options)
        if "lora_type" in options:
            name = str(options.pop("lora_type"))
            kind = ADAPTER_WORDS.get(name.lower())
            if kind is None:
                self._refuse("lora_type", f"is {name!r}, which is not supported; known: {', '.join(ADAPTER_WORDS)}")
            else:
                self._convert("lora_type", name, "adapter.type", kind, "type of adapter")
        if "model.arch" not in self.values and self.tool != "musubi" and not self.report.refused:
            self.values["model.arch"] = trained_elsewhere()
            self.report.defaulted.append(("model.arch", trained_elsewhere()))
        if kind is None and "model.arch" in self.values and "adapter.type" not in self.values:
            self.values["adapter.type"] = "none"

    def _script(self, name: str) -> None:
        """The family of a script."""
        scripts = {MODELS[code].full_name: (code, "") for code in MODELS}
        scripts |= {start: (code, other) for code in MODELS for start, other in MODELS[code].scripts.items()}
        base = re.split(r"[\\/]", name)[-1]
        family, other = next((found for start, found in scripts.items() if base.startswith(start)), (None, ""))
        if family is None:
            self._refuse(
                "script",
                f"{name}: is not a script of a supported model family; known: {', '.join(name for name, (_, other) in scripts.items() if not other)}",
            )
        elif other:
            self.report.dropped_changes_result.append(("script", f"{name}: trains {other}"))
        elif "model.arch" in self.values:
            self.report.dropped_harmless.append(("script", "architecture is used instead"))
        else:
            self._convert("script", name, "model.arch", family, "the script's family")
        if family is not None:
            self.values.setdefault("model.arch", family)

    def _network(self, options: dict[str, Any]) -> str | None:
        """The type of adapter of a network module; None if there is none."""
        if "network_module" not in options:
            return None
        networks = {MODELS[code].adapters.network_module: code for code in MODELS}
        name = str(options.pop("network_module"))
        family = networks.get(name)
        if name == "lycoris.kohya":
            algorithm = self._lycoris(options)
            if algorithm not in ADAPTER_WORDS:
                known = ", ".join(ADAPTER_WORDS)
                self._refuse("network_module", f"{name} with algo={algorithm}: is not supported; known: {known}")
                return None
            kind = ADAPTER_WORDS[algorithm] if algorithm != "full" else "native"
            if kind in ("lora", "locon") and self._takes(options, "dora_wd"):
                kind = "dora"
            self._convert("network_module", name, "adapter.type", kind, "type of adapter")
            return kind
        elif family is None:
            self._refuse("network_module", f"{name}: is not supported; known: {', '.join(networks)}, lycoris.kohya")
            return None
        self._convert("network_module", name, "adapter.type", "lora", "type of adapter")
        if family is not None and not {"model.arch"} & set(self.values):
            self.values["model.arch"] = family
        return "lora"

    def _takes(self, options: dict[str, Any], name: str) -> bool:
        """Take a switch out of the network arguments, and say whether it is on."""
        entries = options.get("network_args", [])
        texts = entries if isinstance(entries, list) else [entries]
        found = [text for text in texts if str(text).partition("=")[0].strip() == name]
        if found:
            options["network_args"] = [text for text in texts if text not in found]
        return any(str(text).partition("=")[2].strip().lower() in ("true", "1") for text in found)

    def _lycoris(self, options: dict[str, Any]) -> str:
        """Take the algorithm out of the network arguments."""
        entries = options.get("network_args", [])
        texts = entries if isinstance(entries, list) else [entries]
        for text in texts:
            name, _, value = str(text).partition("=")
            if name.strip() == "algo":
                options["network_args"] = [other for other in texts if other is not text]
                return value.strip().lower()
        return "lora"

    def _special(self, options: dict[str, Any]) -> None:
        for key in SECRETS:
            if key in options and options.pop(key):
                self.report.secrets_removed.append(key)
            elif key in self.options_given:
                self.report.dropped_harmless.append((key, "it is empty"))
        off = [
            key
            for key in options
            if key.startswith("dynamo_") and (not options[key] or str(options[key]).lower() == "no")
        ]
        off += [
            key for key in ("vae_batch_size", "optimizer_args", "network_args") if key in options and not options[key]
        ]
        for key in off:
            options.pop(key)
            self.report.dropped_harmless.append((key, "it is off"))
        for key in [key for key in options if key.startswith("dynamo_")]:
            self._refuse(
                key, f"is {options.pop(key)!r}; use compile and compile_backend, compile_mode, compile_dynamic instead"
            )
        if not options.get("compile"):
            for key in [key for key in options if key.startswith("compile_")]:
                options.pop(key)
                self.report.dropped_harmless.append((key, "nothing is compiled"))
        for key in [key for key in options if key.startswith("metadata_") and key not in self.flat]:
            options.pop(key)
            self.report.dropped_changes_result.append((key, "it is not stored in the metadata"))
        if isinstance(options.get("compile_dynamic"), bool):
            options["compile_dynamic"] = str(options["compile_dynamic"]).lower()
        self._storage(options)
        self._steps(options)
        if "optimizer_type" in options:
            self._plain("optimizer_type", options.pop("optimizer_type"))
        self._arguments(options, "optimizer_args", OPTIMIZER_ARGS)
        self._relative_step(options)
        for key in ("block_dims", "block_alphas"):
            if isinstance(options.get(key), str) and options[key].strip():
                numbers = _literal(f"[{options[key].strip().strip('[]')}]")
                options[key] = (
                    [float(each) if key == "block_alphas" else each for each in numbers]
                    if isinstance(numbers, list)
                    else numbers
                )
        record = OPTIMIZERS.get(self.values.get("optimizer.type", "AdamW"))
        if options.get("full_bf16") and record is not None and not record.alone:
            self.values["train.stochastic_rounding"] = False
            self.report.defaulted.append(("train.stochastic_rounding", False))
        if options.get("fused_backward_pass") and record is not None and record.alone:
            note = "clips each gradient by itself there; here train.max_grad_norm is 0 with it"
            self.report.dropped_changes_result.append(("fused_backward_pass", note))
            self.values["train.max_grad_norm"] = 0.0
            options.pop("max_grad_norm", None)
        self._arguments(options, "network_args", NETWORK_ARGS)
        self._encoder1(options)
        for key in ("base_weights", "base_weights_multiplier"):
            if key in options and not isinstance(options[key], list):
                target = self.flat[key].key
                self._convert(key, options[key], target, [options.pop(key)], "a list of one")
        if not options.get("lr_warmup_steps") and options.get("lr_warmup_ratio") and "lr_warmup_steps" in options:
            options.pop("lr_warmup_steps")
            self.report.dropped_harmless.append(("lr_warmup_steps", "lr_warmup_ratio is used instead"))
        rates = [options.get(name) for name in ("learning_rate", "unet_lr")]
        if all(isinstance(rate, int | float) and rate for rate in rates):
            options.pop("learning_rate")
            self.report.dropped_harmless.append(
                ("learning_rate", "unet_lr, the learning rate of the denoiser, is used instead")
            )
        if self.tool == "kohya":
            self._kohya(options)

    def _relative_step(self, options: dict[str, Any]) -> None:
        """Adafactor has a rate of its own there, unless an argument turns that off, and no other schedule beside it."""
        if self.values.get("optimizer.type") != "Adafactor" or self.tool not in ("musubi", "kohya"):
            return
        args = self.values.get("optimizer.args", {})
        there = {name: True for name in ("relative_step", "scale_parameter") if name not in args}
        if there:
            self.report.defaulted.append(("optimizer.args", there))
        wanted = {**there, **args}
        if wanted.get("warmup_init"):
            wanted["relative_step"] = True  # as there
        self.values["optimizer.args"] = {name: value for name, value in wanted.items() if value is not False}
        if wanted["relative_step"]:
            for name in ("lr_scheduler", "lr_warmup_steps", "lr_warmup_ratio", "learning_rate", "unet_lr"):
                if name in options and options.pop(name):
                    self.report.dropped_harmless.append(
                        (name, "Adafactor with relative_step has a rate of its own there too")
                    )
            self.values["scheduler.type"] = "adafactor"

    def _kohya(self, options: dict[str, Any]) -> None:
        """Options whose meaning in sd-scripts differs from ours."""
        words = {"huber": "pseudo_huber", "smooth_l1": "pseudo_smooth_l1"}
        if isinstance(options.get("loss_type"), str) and options["loss_type"] in words:
            old = options.pop("loss_type")
            self._convert("loss_type", old, "objective.loss", words[old], "the same loss under our name")
            if "huber_schedule" not in options:
                self.values["objective.huber_schedule"] = "snr"
                self.report.defaulted.append(("objective.huber_schedule", "snr"))
        if options.get("model_prediction_type") not in (None, "raw"):
            old = options.pop("model_prediction_type")
            self.report.dropped_changes_result.append(
                (
                    "model_prediction_type",
                    f"is {old!r}, another loss weight; the velocity is predicted without it (raw)",
                )
            )
        ignored = "sd-scripts does not use it for this model; to use it here, set {} in the run file"
        for name, key in IGNORED_THERE.items():
            if is_on(options.get(name)):
                self.report.dropped_changes_result.append((name, ignored.format(key)))
                options.pop(name)
        if "model_prediction_type" not in options:
            note = "is missing, which means sigma_scaled there, another loss weight; the velocity is predicted without it (raw)"
            self.report.dropped_changes_result.append(("(model_prediction_type)", note))
        if not options.get("network_train_unet_only") and "network_module" in self.options_given:
            note = "is missing: there CLIP-L is trained too; here only the denoiser is trained"
            self.report.dropped_changes_result.append(("(network_train_unet_only)", note))
        if options.get("weighting_scheme") == "uniform":
            options.pop("weighting_scheme")
            self.report.dropped_harmless.append(("weighting_scheme", "uniform means no weighting"))
        if isinstance(options.get("resolution"), str):
            sides = [part.strip() for part in str(options["resolution"]).split(",")]
            if all(side.isdigit() for side in sides) and 1 <= len(sides) <= 2:
                options["resolution"] = [int(side) for side in sides] if len(sides) == 2 else int(sides[0])

    def _folders(self, options: dict[str, Any]) -> None:
        """Folders of images; with kohya's layout, each folder N_name becomes a data set."""
        for key in (*FOLDERS, "reg_data_dir"):
            if key not in options:
                continue
            text, is_reg = str(options.pop(key) or ""), key == "reg_data_dir"
            if not text:
                self.report.dropped_harmless.append((key, "it is empty"))
                continue
            found, skipped = _data_sets(text, self.locate(text))
            made = [{**entry, "is_reg": True} if is_reg else entry for entry in found]
            self.datasets += made
            if skipped:
                reason = f"folders that are not named N_name, with N above 0, are left out, as in sd-scripts: {', '.join(skipped)}"
                self.report.dropped_harmless.append((f"(folders of {key})", reason))
            shown = ", ".join(str(entry["image_directory"]) for entry in made)
            rule = "a data set for each folder N_name, repeated N times" if "num_repeats" in made[0] else "a data set"
            self.report.converted.append((key, text, "datasets", shown, rule))

    def _captions(self) -> None:
        """Captions and images that change at random need cached versions, which other trainers do not have."""
        for setting, keys in CHANGING.items():
            if any(self.general.get(key) for key in keys) and setting not in self.values:
                self.values[setting] = VARIANTS
                self.report.defaulted.append((setting, VARIANTS))

    def _storage(self, options: dict[str, Any]) -> None:
        """Two switches there, one choice here; fp8_scaled implies fp8_base."""
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
        """Lengths: epochs take precedence over steps; there, kept checkpoints are counted in steps."""
        for key in ("max_train_steps", "max_train_epochs", "epochs"):
            if options.get(key) in (0, None) and key in options:
                options.pop(key)
                self.report.dropped_harmless.append((key, "it is off"))
        if "max_train_epochs" in options and "max_train_steps" in options:
            options.pop("max_train_steps")
            self.report.dropped_harmless.append(("max_train_steps", "max_train_epochs is used instead"))
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
                self._convert(key, value, ours, max(value, before), "one setting for both: the larger value")
            elif isinstance(value, int) and isinstance(every, int) and every > 0 and "steps" in key:
                self._convert(key, value, ours, value // every + 1, "checkpoints instead of steps")
            else:
                self._carry(key, ours, value)
        if "save_state_on_train_end" in options:
            wanted, off = options.pop("save_state_on_train_end"), options.get("save_state") is False
            reason = "with save.state, a state is written at the end too"
            left_out = self.report.dropped_changes_result if wanted and off else self.report.dropped_harmless
            left_out.append(("save_state_on_train_end", reason))

    def _arguments(self, options: dict[str, Any], source: str, table: dict[str, str]) -> None:
        """A list of ``key=value`` texts."""
        if source not in options:
            return
        entries = options.pop(source)
        if isinstance(entries, str) and entries.strip().startswith("{"):  # a JSON object, as JSON plans have it
            try:
                entries = [f"{name}={value}" for name, value in json.loads(entries).items()]
            except (ValueError, AttributeError):
                self._refuse(source, f"is {entries!r}, expected a JSON object")
                return
        texts = [entries] if isinstance(entries, str) else entries
        found, problems = dict[str, Any](), list[str]()
        for text in texts if isinstance(texts, list) else [texts]:
            name, sign, value = str(text).partition("=")
            name = name.strip()
            own = self._own_arguments() if source == "optimizer_args" else {}
            if not sign:
                problems.append(f"{text!r} is not of the form key=value")
            elif source == "network_args" and name in DIMS and value.strip().isdecimal():
                if int(value):
                    found.setdefault("adapter.rank_patterns", {})[DIMS[name]] = int(value)
                else:
                    found.setdefault("adapter.exclude", []).append(DIMS[name])
            elif source == "network_args" and name == "train_blocks" and value.strip() in ("single", "double"):
                found["adapter.only"] = [rf"{value.strip()}_blocks\..*"]
            elif name in own:
                found.setdefault("optimizer.args", {})[name] = _literal(value.strip())
            elif name == "verbose" or (source == "network_args" and value.strip() in ("0", "None", "False")):
                continue
            elif name not in table and source == "network_args" and name in LAYERS:
                self.report.dropped_changes_result.append(
                    (f"{source} {name}", "layers are chosen with adapter.include, exclude and targets here")
                )
            elif name not in table and (entry := FOREIGN.get(name)) and entry.is_neutral(value.strip()):
                continue
            elif name not in table:
                known = [*table, *own]
                problems.append(f"{name} is not supported; known: {', '.join(known)}.{did_you_mean(name, known)}")
            else:
                found[table[name]] = self._typed(self.known[table[name]], value.strip())
        for key, value in found.items():
            self._store(source, key, value)
        if problems:
            self._refuse(source, "; ".join(problems))
            return
        shown = ", ".join(f"{key} = {value!r}" for key, value in found.items()) or "nothing"
        self.report.converted.append((source, entries, ", ".join(found) or "-", shown, "one key each"))

    def _own_arguments(self) -> Mapping[str, Argument]:
        """Arguments of the optimizer that the file names."""
        name = self.values.get("optimizer.type", "AdamW")
        return OPTIMIZERS[name].arguments if name in OPTIMIZERS else {}

    def _typed(self, parameter: Parameter, text: str) -> Any:
        """A Python literal as the type of a setting."""
        value = _literal(text)
        if parameter.type_name.startswith("float") and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        return value

    def _encoder1(self, options: dict[str, Any]) -> None:
        """``text_encoder1`` is T5 in Kontext scripts; here ``text_encoder`` is CLIP and ``text_encoder2`` is T5."""
        if "text_encoder1" not in options:
            return
        first = options.pop("text_encoder1")
        if not self._is_t5(first):
            self.report.needs_you.append(("text_encoder1", f"{first}: is not a T5 file, which this option expects; write CLIP-L as "
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
        """Options that are converted by the table of foreign names alone."""
        target = PLAIN.get(key)
        if value in ("", None):
            known = target or key in SHARED_KEYS or answer(key, value, self.spec) is not None
            if known:
                self.report.dropped_harmless.append((key, "it is empty"))
                return
        if target is not None and (self.spec is None or target in self._own()):
            if target in self.values:
                self._again(key, target, value)
            else:
                self._take(key, target, value)
        elif key in SHARED_KEYS:
            self._of_items(key, key, value)
        elif (found := answer(key, value, self.spec)) is None:
            self.report.unknown.append((key, did_you_mean(key, self._source_names())))
        elif found.refused and key in LEFT_TO_PEOPLE:
            self.report.dropped_changes_result.append((key, found.refused))
        elif found.refused:
            self._refuse(key, found.refused)
        elif found.harmless:
            self.report.dropped_harmless.append((key, found.harmless))
        elif found.key.startswith("general."):
            self._of_items(key, found.key.removeprefix("general."), found.value)
        elif found.key in self.values:
            self._again(key, found.key, found.value)
        elif found.rule or found.value != value:
            self._convert(key, value, found.key, found.value, found.rule or "renamed")
        else:
            self._take(key, found.key, value)

    def _again(self, source: str, key: str, value: Any) -> None:
        """A setting that another key has set already: harmless if both agree, or if that one takes precedence."""
        first = self.names.get(key, "")
        if self.values[key] == value or wins(first) or first == "" or (key == "optimizer.type" and value is None):
            self.report.dropped_harmless.append((source, f"{first or key} is used instead"))
        else:
            reason = (
                f"is {describe(value)}, but {first}, another name of {key}, is {describe(self.values[key])}; keep one"
            )
            self.report.needs_you.append((source, reason))

    def _of_items(self, source: str, name: str, value: Any) -> None:
        """A setting of [general]; one that is off, and off by default here, is left out."""
        usual = self.spec.dataset_defaults.get(name) if self.spec is not None else None
        if not is_on(value) and not is_on(usual) and name not in GENERAL[self.tool]:
            self.report.dropped_harmless.append((source, "it is off"))
            return
        self.general[name] = value
        self.report.carried.append((source, f"general.{name}", value))

    def _own(self) -> set[str]:
        return {parameter.key for parameter in parameters(self.spec)}

    def _source_names(self) -> Iterable[str]:
        """Names that an option file may use."""
        plain = {name for name in FOREIGN if "." not in name}
        return {*self.flat, *PLAIN, *plain, *SECRETS, *SHARED_KEYS, "optimizer_args", "network_args"}

    def _defaults(self) -> None:
        """Write the source tool's defaults where the family's differ."""
        spec = MODELS.get(str(self.values.get("model.arch")))
        if spec is None:
            return
        if "run.seed" not in self.values and self.tool != "plan":
            self.report.defaulted.append(("run.seed", 42))
        if not {"train.max_steps", "train.max_epochs"} & set(self.values):
            self.values["train.max_steps"] = 1600
            self.report.defaulted.append(("train.max_steps", 1600))
        samples, own = "sample.prompts" in self.values, {parameter.key: parameter for parameter in parameters(spec)}
        for key, value in DEFAULTS[self.tool].items():
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


def _literal(text: str) -> Any:
    """A Python literal; a list for a tuple, the text itself for anything else."""
    for form in (text.removeprefix("r"), text):  # lists of raw strings, as patterns are usually written
        try:
            value = ast.literal_eval(form)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return list(value) if isinstance(value, tuple) else value
    return text
