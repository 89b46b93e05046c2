"""Settings of the published FluxFlow trainer (YAML files and command lines of 0.4.0 to 0.5.1) as a run file. Torch-free.

Keys may stand in their sections (data, model, training, optimization, output) or alone, as its command line has them. The steps of
training.pipeline become [[steps]]. Every key of the source is in one list of the report.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from musubi_tuner.config.diagnostics import did_you_mean
from musubi_tuner.config.importers.builder import is_number
from musubi_tuner.config.importers.report import Imported, Report
from musubi_tuner.models.fluxflow.trainer_names import (
    ARGUMENTS,
    CHANGING,
    COUNTS,
    CURVES,
    DEFAULTS,
    HARMLESS,
    METRICS,
    MODES,
    OF_VAE,
    OFF,
    OPTIMIZERS,
    PIECES,
    REFUSED,
    ROLE_OF,
    SAME,
    SECRETS,
    SECTIONS,
    SLOW,
    STREAM,
    URL,
    USUAL,
    VGG,
    WHOLE,
)


def read_settings(document: dict[str, Any]) -> Imported | None:
    """Translate the settings of the published trainer; None if the document is something else."""
    training = document.get("training")
    inside = isinstance(training, dict) and any(key in training for key in (*MODES, "pipeline"))
    alone = any(key in document for key in MODES) and any(
        key in document for key in ("data_path", "vae_dim", "output_path", "use_webdataset")
    )
    if "schema_version" in document or not (inside or alone):
        return None
    return _Importer().run(document)


class _Importer:
    """One file.

    Attributes:
        tables: of our run file. lr_min: end of a cosine as a share of the rate. drawings: checkpoints between two drawings.
    """

    def __init__(self) -> None:
        self.report = Report()
        self.tables: dict[str, Any] = {"schema_version": 1, "run": {"name": "fluxflow"}, "model": {"arch": "ff"}}
        self.general: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self.lr_min, self.drawings = 0.1, 1

    def run(self, document: dict[str, Any]) -> Imported:
        flat = dict(_flattened(document))
        self.lr_min = self._taken(flat, "lr_min", 0.1, "scheduler.min_lr")
        self.drawings = self._taken(flat, "samples_per_checkpoint", 1, "sample.every_steps")
        silenced = [key for key in flat if _leaf(key) == "no_samples"]
        silent = True in [flat.pop(key) for key in silenced]
        self.report.dropped_harmless += [
            (key, "no sample.every_steps is set" if silent else "is off") for key in silenced
        ]
        pipeline = flat.pop("training.pipeline", None)
        components = self._components(flat)
        data = {
            name: flat.pop(key)
            for key in list(flat)
            if (name := _leaf(key))
            in ("data_path", "captions_file", "fixed_prompt_prefix", "use_webdataset", "use_tt2m", *STREAM)
        }
        rate = self._taken(flat, "lr", 5e-7, "optimizer.lr")
        whole = pipeline is None
        for key, value in flat.items():
            if not whole and _leaf(key) in (*MODES, "train_flow", "train_reconstruction", "n_epochs"):
                self.report.dropped_harmless.append((key, "the steps of the pipeline say what is trained"))
            else:
                self._key(key, _leaf(key), value, self.tables)
        self._model(document)
        datasets = self._data(data)
        self._defaults(whole)
        if silent and self.tables.get("sample", {}).pop("prompts", None) is not None:
            self.report.leave_out("sample.prompts", "no_samples is set")
        if whole:
            self._roles("", self.tables, components, rate, given=bool(components))
            self._drawings(self.tables)
        else:
            datasets = self._pipeline(pipeline, rate, components, datasets)
        self._memory()
        if any(table.get("objective", {}).get("use_lpips") for table in (self.tables, *self.tables.get("steps", []))):
            self.tables["model"]["vgg_path"] = VGG
            self.report.defaulted.append(("model.vgg_path", VGG))
        self.tables["run"].setdefault("output_dir", "outputs")
        every = self.tables.get("save", {}).get("every_steps")
        if not silent and isinstance(every, int):
            self.tables.setdefault("sample", {})["every_steps"] = every * max(1, int(self.drawings))
            self.report.defaulted.append(("sample.every_steps", every * max(1, int(self.drawings))))
        return Imported(self.tables, self.general, self.report, self.names, datasets)

    def _taken(self, flat: dict[str, Any], name: str, otherwise: Any, ours: str) -> Any:
        """Take a number out of the keys."""
        for key in [key for key in flat if _leaf(key) == name]:
            value = flat.pop(key)
            self.report.carried.append((key, ours, value))
            return self._number(key, value, otherwise)
        return otherwise

    def _key(self, source: str, name: str, value: Any, tables: dict[str, Any], step: bool = False) -> None:
        """One key that stands for itself."""
        report = self.report
        if name in SAME:
            ours = SAME[name]
            if step and ours in ("general.batch_size", "general.resolution"):
                tables.setdefault("general", {})[ours.partition(".")[2]] = number(value)
                report.carried.append((source, ours, number(value)))
            elif step and ours.startswith(("general.", "run.", "model.")):
                report.needs_you.append(
                    (source, f"is a setting of the whole file or of a data set here ({ours}), not of a step")
                )
            elif value is None:
                report.dropped_harmless.append((source, "holds nothing"))
            else:
                self._set(source, ours, number(value), tables)
        elif name in ("pretrained_bert_model", "tokenizer_name"):
            if value in (None, "none"):
                report.dropped_harmless.append((source, "names nothing"))
            else:
                # The hub knows models of the first days by names without an owner too.
                text = f"distilbert/{value}" if str(value).startswith("distilbert-") else value
                ours = "model.bert_path" if name == "pretrained_bert_model" else "model.bert_tokenizer"
                self._set(source, ours, text, self.tables, value)
        elif name == "use_fp16":
            self._set(source, "train.mixed_precision", "fp16" if value else "no", tables, value)
        elif name == "sample_sizes":
            sizes = value if isinstance(value, list) else [value]
            width, _, height = str(sizes[0]).partition("x") if sizes and sizes[0] is not None else ("", "", "")
            if width.isdigit():
                self._set(source, "sample.width", int(width), tables, value)
                self._set(source, "sample.height", int(height or width), tables, value)
            if len(sizes) > 1:
                report.dropped_changes_result.append(
                    (f"({source})", "only the first size is drawn; write --w and --h behind prompts")
                )
        elif name in SECRETS:
            if value:
                report.secrets_removed.append(source)
        elif name in HARMLESS:
            report.dropped_harmless.append((source, HARMLESS[name]))
        elif name in REFUSED and value not in OFF:
            report.refused.append((source, REFUSED[name]))
        elif name in REFUSED or (name in CHANGING and value in OFF):
            report.dropped_harmless.append((source, "is off"))
        elif name in CHANGING:
            report.dropped_changes_result.append((source, CHANGING[name]))
        else:
            known = (
                *SAME,
                *HARMLESS,
                *CHANGING,
                *REFUSED,
                "use_fp16",
                "sample_sizes",
                "optimizers",
                "schedulers",
                "dataset",
                "optim_sched_config",
                "use_webdataset",
                *STREAM,
            )
            report.unknown.append((source, did_you_mean(name, known)))

    def _set(self, source: str, ours: str, value: Any, tables: dict[str, Any], old: Any = ...) -> None:
        """Put a value into a table of ours."""
        table, _, name = ours.partition(".")
        if table == "general":
            self.general[name] = value
        else:
            inner = tables.setdefault(table, {})
            if "." in name:
                outer, _, name = name.partition(".")
                inner = inner.setdefault(outer, {})
            inner[name] = value
        self.names[ours] = source
        if old is ... or old == value:
            self.report.carried.append((source, ours, value))
        else:
            self.report.converted.append((source, old, ours, value, "as this program says it"))

    def _model(self, document: Mapping[str, Any]) -> None:
        """A new model in the published layout, unless a checkpoint is named."""
        model = self.tables["model"]
        if "path" in model:
            model.pop("geometry", None)
            return
        model |= {"init": "scratch", "layout": "published"}
        model.setdefault("geometry", {})
        for name, value in {
            "vae_dim": 128,
            "feature_maps_dim": 128,
            "text_embedding_dim": 1024,
            "feature_maps_dim_disc": 8,
        }.items():
            if name not in model["geometry"]:
                model["geometry"][name] = value
                self.report.defaulted.append((f"model.geometry.{name}", value))

    def _defaults(self, whole: bool) -> None:
        """What the source does where a file does not say, and this program would do something else."""
        for ours, value in USUAL.items():
            table, _, name = ours.partition(".")
            own = self.general if table == "general" else self.tables.setdefault(table, {})
            if name not in own and (whole or ours != "train.max_epochs"):
                own[name] = value
                self.report.defaulted.append((ours, value))

    def _memory(self) -> None:
        """Recomputation in the runs and steps that have it, which is all but a flow alone."""
        ours, kept = "memory.gradient_checkpointing", False
        asked = self.tables.pop("memory", {}).get("gradient_checkpointing")
        for tables in self.tables.get("steps") or [self.tables]:
            own = tables.pop("memory", {}).get("gradient_checkpointing", asked)
            objective = tables.get("objective", {})
            if own and any(objective.get(mode) for mode in ("train_vae", "gan_training", "train_diff_full")):
                tables["memory"], kept = {"gradient_checkpointing": own}, True
        if not kept and ours in self.names:
            self.report.leave_out(ours, "is off, or for a flow alone, which does not recompute")

    def _drawings(self, tables: dict[str, Any]) -> None:
        """Leave out what is drawn while an autoencoder trains, which shows reconstructions."""
        if not tables.get("objective", {}).get("train_vae"):
            return
        for name in [name for name in ("prompts", "width", "height") if name in tables.get("sample", {})]:
            del tables["sample"][name]
            self.report.leave_out(f"sample.{name}", "while an autoencoder trains, its reconstructions are shown")

    def _data(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The data set of a file without named ones."""
        prefix = data.get("fixed_prompt_prefix")
        if prefix:
            self.general["caption_prefix"] = f"{prefix}."
            self.report.converted.append(
                ("fixed_prompt_prefix", prefix, "general.caption_prefix", f"{prefix}.", "prefix, point, caption")
            )
        streams = [key for key in ("use_webdataset", "use_tt2m") if data.get(key)]
        for key in [key for key in ("use_webdataset", "use_tt2m") if key in data]:
            self.report.dropped_harmless.append((key, "the data set says so" if data[key] else "is off"))
        own = {key: value for key, value in data.items() if key in STREAM}
        if streams:
            return [self._shards("", own, 10_000)]
        for key in own:
            self.report.dropped_harmless.append((key, "no stream is used"))
        if data.get("data_path") is None:
            if data.get("captions_file") is not None:
                self.report.needs_you.append(
                    ("captions_file", "lists captions of data_path, which is not there; name the folder")
                )
            return []
        return [self._folder("data_path", "captions_file", data["data_path"], data.get("captions_file"))]

    def _folder(self, key: str, list_key: str, folder: Any, captions: Any) -> dict[str, Any]:
        self.report.carried.append((key, "datasets.image_directory", folder))
        entry = {"image_directory": folder}
        if captions is not None:
            self.report.carried.append((list_key, "datasets.captions_file", captions))
            entry["captions_file"] = captions
        return entry

    def _shards(self, where: str, own: Mapping[str, Any], of_shard: int) -> dict[str, Any]:
        """The data set of a stream.

        Args:
            where: in front of the keys. of_shard: pictures that a shard is taken to hold there.
        """
        entry: dict[str, Any] = {
            "shards": URL,
            "shard_image_key": "png",
            "shard_samples": of_shard,
            "missing_caption": "skip",
        }
        for name, value in own.items():
            key, ours = f"{where}{name}", STREAM[name]
            if value is None:
                self.report.dropped_harmless.append((key, "holds nothing"))
                continue
            if ours in COUNTS or ours == "shard_retry_delay":
                value = self._number(key, value, 1)
                value = int(value) if ours in COUNTS else float(value)
            elif not isinstance(value, str):
                self.report.refused.append((key, f"is {value!r}, expected a text"))
                continue
            entry[ours] = value
            self.report.carried.append((key, f"datasets.{ours}", value))
        for ours in [
            ours
            for ours in ("shards", "shard_image_key", "shard_samples", "missing_caption")
            if ours not in {STREAM[name] for name in own}
        ]:
            self.report.defaulted.append((f"datasets.{ours}", entry[ours]))
        return entry

    def _components(self, flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Optimizers and schedulers by role, from a JSON file or tables of the whole file."""
        found: dict[str, dict[str, Any]] = {}
        for key in [key for key in flat if _leaf(key) == "optim_sched_config"]:
            self._read_components(key, flat.pop(key), found)
        for key in [
            key for key in flat if _leaf(key) in ("optimizer_config", "scheduler_config", "optimizers", "schedulers")
        ]:
            kind = "optimizers" if "optimizer" in _leaf(key) else "schedulers"
            self._collect(key, {kind: flat.pop(key)}, found)
        return found

    def _read_components(self, key: str, named: Any, found: dict[str, dict[str, Any]]) -> None:
        """Optimizers and schedulers of a JSON file."""
        if named in OFF:
            return
        try:
            own = json.loads(Path(str(named)).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            self.report.needs_you.append(
                (key, f"{named}: cannot be read ({problem}); import from the folder where it is found")
            )
            return
        self.report.converted.append((key, named, "roles", "...", "optimizers and schedules by role"))
        self._collect(key, own, found)

    def _collect(self, where: str, tables: Any, found: dict[str, dict[str, Any]]) -> None:
        for kind, other in (("optimizers", "optimizer"), ("schedulers", "scheduler")):
            entries = tables.get(kind) if isinstance(tables, dict) else None
            for name, own in entries.items() if isinstance(entries, dict) else ():
                if name not in ROLE_OF:
                    self.report.unknown.append((f"{where}.{kind}.{name}", did_you_mean(name, ROLE_OF)))
                elif not isinstance(own, dict):
                    self.report.refused.append((f"{where}.{kind}.{name}", f"is {own!r}, expected a table"))
                else:
                    found.setdefault(ROLE_OF[name], {})[other] = (f"{where}.{kind}.{name}", own)

    def _roles(
        self, where: str, tables: dict[str, Any], components: Mapping[str, Any], rate: Any, *, given: bool
    ) -> None:
        """Optimizers and schedules of the roles that a run or step trains."""
        objective = tables.get("objective", {})
        vae = objective.get("train_vae") or objective.get("gan_training")
        if objective.get("gan_training") and not objective.get("train_vae"):
            objective |= {"train_vae": True, "train_reconstruction": False}
            self.report.converted.append(
                (f"({where}gan_training)", True, "objective.train_reconstruction", False, "a GAN alone")
            )
        roles = [
            *(["vae"] if vae else []),
            *(["discriminator"] if objective.get("gan_training") else []),
            *(["flow"] if objective.get("train_diff") or objective.get("train_diff_full") else []),
            *(["text_encoder"] if objective.get("train_diff_full") else []),
        ]
        alone = roles == ["flow"]
        for role in roles:
            own = components.get(role) or (components.get("vae") if role == "discriminator" and given else None) or {}
            optimizer = self._optimizer(*own["optimizer"]) if "optimizer" in own else self._default(role, rate, given)
            own_rate = optimizer.get("lr", rate)
            if "scheduler" in own:
                scheduler = self._scheduler(own["scheduler"], own_rate)
            else:
                factor = 0.001 if role == "text_encoder" else self.lr_min
                scheduler = {"type": "cosine", "min_lr": _short(own_rate * factor)}
                self.report.defaulted.append((f"{where}{role} scheduler", "cosine"))
            if alone:
                tables["optimizer"], tables["scheduler"] = optimizer, scheduler
                tables.setdefault("ema", {}).setdefault("decay", SLOW)
            else:
                slow = {"ema": {"decay": SLOW}} if role in ("flow", "text_encoder") else {}
                tables.setdefault("roles", {})[role] = {"optimizer": optimizer, "scheduler": scheduler, **slow}
        for role in [role for role in components if role not in roles]:
            for source, _ in components[role].values():
                self.report.dropped_harmless.append((source, "this role does not train"))

    def _default(self, role: str, rate: Any, given: bool) -> dict[str, Any]:
        """The source's optimizer of a role without one of its own."""
        found = {"type": "AdamW", "weight_decay": 0.01} if given else dict(DEFAULTS[role])
        found["lr"] = rate / 10 if role == "text_encoder" and not given else rate
        self.report.defaulted.append((f"roles.{role}.optimizer", found["type"]))
        return found

    def _optimizer(self, source: str, own: Mapping[str, Any]) -> dict[str, Any]:
        values = {key: number(value) for key, value in own.items()}
        kind = values.pop("type", values.pop("optimizer_type", "AdamW"))
        if kind not in OPTIMIZERS:
            self.report.refused.append((f"{source}.type", f"is {kind!r}; the source builds {', '.join(OPTIMIZERS)}"))
            return {}
        found: dict[str, Any] = {
            "type": kind,
            "lr": self._number(f"{source}.lr", values.pop("lr", 1e-5), 1e-5),
            "weight_decay": self._number(f"{source}.weight_decay", values.pop("weight_decay", 0.0), 0.0),
        }
        arguments: dict[str, Any] = {}
        for key, value in values.items():
            where = f"{source}.{key}"
            if key not in ARGUMENTS:
                self.report.unknown.append((where, did_you_mean(key, (*ARGUMENTS, "lr", "weight_decay"))))
            elif kind not in ARGUMENTS[key] or value is None:
                self.report.dropped_harmless.append(
                    (where, f"{kind} has no such argument" if value is not None else "holds nothing")
                )
            elif key == "betas":
                if not isinstance(value, list) or len(value) != 2 or not all(_is_real(number(each)) for each in value):
                    self.report.refused.append((where, f"is {value!r}, expected two numbers"))
                else:
                    found["betas"] = [float(number(each)) for each in value]
            elif key == "eps":
                found["eps"] = self._number(where, value, 1e-8)
            elif key != "decoupled_weight_decay":
                arguments[key] = value
            elif not value:
                self.report.dropped_changes_result.append((where, "weight decay of Lion is decoupled here"))
        if arguments:
            found["args"] = arguments
        self.report.carried.append((source, "optimizer", found))
        return found

    def _scheduler(self, entry: tuple[str, Mapping[str, Any]], rate: Any) -> dict[str, Any]:
        source, own = entry
        values = {key: number(value) for key, value in own.items()}
        kind = values.pop("type", values.pop("scheduler_type", "CosineAnnealingLR"))
        if not isinstance(kind, str) or kind not in CURVES:
            self.report.refused.append(
                (source, f"{kind!r} is no scheduler of the source, which has {', '.join(CURVES)}")
            )
            return {}
        known = CURVES[kind]
        for key in [key for key in values if key not in known]:
            others = any(key in keys for keys in CURVES.values())
            if others:
                self.report.dropped_harmless.append((f"{source}.{key}", f"{kind} has no such key"))
            else:
                self.report.unknown.append((f"{source}.{key}", did_you_mean(key, known)))
        mode = values.pop("mode", "min")
        if kind == "ReduceLROnPlateau" and mode != "min":
            self.report.refused.append((f"{source}.mode", f'is {mode!r}; losses fall here, so it is "min"'))
        values = {key: self._number(f"{source}.{key}", values[key], None) for key in known if key in values}
        values = {key: value for key, value in values.items() if value is not None}
        length, rule = int(values.get("total_iters", 0)), "the same curve"
        found: dict[str, Any]
        if kind == "CosineAnnealingLR":
            found = {"type": "cosine", "min_lr": _short(rate * values.get("eta_min_factor", 0.1))}
            if values.get("T_max"):
                found["total_steps"] = int(values["T_max"])
        elif kind == "LinearLR" and values.get("start_factor", 1.0) < values.get("end_factor", 0.1):
            found, rule = (
                {"type": "constant", "warmup_steps": length or 5},
                "a warm-up that begins at 0, not at start_factor",
            )
        elif kind == "LinearLR":
            found = {"type": "linear", "min_lr": _short(rate * values.get("end_factor", 0.1))}
            if length:
                found["total_steps"] = length
        elif kind == "ConstantLR":
            factor = values.get("factor", 1.0)
            found = {"type": "constant"}
            if factor != 1:
                found = {"type": "piecewise_constant", "rules": f"{factor:g}:{length or 5},1"}
        elif kind == "StepLR" and values.get("step_size"):
            step, gamma = int(values["step_size"]), values.get("gamma", 0.1)
            pieces = [f"{gamma**n:g}:{step * (n + 1)}" for n in range(PIECES)]
            found, rule = (
                {"type": "piecewise_constant", "rules": ",".join([*pieces, f"{gamma**PIECES:g}"])},
                f"its first {PIECES} falls",
            )
        elif kind == "ReduceLROnPlateau":
            found, rule = {"type": "plateau"}, "measured by epochs and not by updates"
            found |= {key: int(value) if key == "patience" else value for key, value in values.items()}
        elif kind == "ExponentialLR":
            found = {"type": "exponential", "gamma": values.get("gamma", 0.95)}
        else:
            self.report.refused.append((source, "StepLR has no step_size; give it one"))
            return {}
        self.report.converted.append((source, kind, "scheduler.type", found["type"], rule))
        return found

    def _pipeline(
        self, pipeline: Any, rate: Any, components: Mapping[str, Any], datasets: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Steps, and their data sets."""
        own = dict(pipeline) if isinstance(pipeline, dict) else {}
        steps, defaults = own.pop("steps", None), self._table("pipeline.defaults", own.pop("defaults", None))
        named, usual = self._table("pipeline.datasets", own.pop("datasets", None)), own.pop("default_dataset", None)
        for key in own:
            self._key(f"pipeline.{key}", key, own[key], {})
        if not isinstance(steps, list) or not steps:
            self.report.refused.append(("training.pipeline.steps", "No pipeline steps defined"))
            return datasets
        found = list(datasets)
        if datasets and named:  # steps that name no data set have that of the whole file
            datasets[0]["name"] = WHOLE
            usual = WHOLE if usual is None else usual
        loading: dict[str, dict[str, Any]] = {}
        for name, table in named.items():
            entry = self._named(name, table, loading)
            if entry is not None:
                found.append(entry)
        self.tables["steps"] = []
        known = {*named, *(entry["name"] for entry in datasets if "name" in entry)}
        for index, step in enumerate(steps):
            own_keys = self._table(f"pipeline.steps[{index}]", step)
            data = own_keys.get("dataset", defaults.get("dataset", usual))
            of_data = loading.get(data, {}) if isinstance(data, str) else {}
            given = {**defaults, **of_data, **own_keys}
            self.tables["steps"].append(self._step(index, given, rate, components, usual, known))
        return found

    def _named(self, name: str, table: Any, loading: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        """A data set of a pipeline.

        Args:
            loading: gets its batch size and workers, which steps that use it have, unless they have their own.
        """
        where = f"pipeline.datasets.{name}"
        if not isinstance(table, dict) or table.get("type", "local") not in ("local", "webdataset"):
            self.report.refused.append((where, "is neither of type local nor of type webdataset"))
            return None
        rest = dict(table)
        kind = rest.pop("type", "local")
        loading[name] = {key: rest.pop(key) for key in ("batch_size", "workers") if key in rest}
        for key, value in loading[name].items():
            self.report.converted.append((f"{where}.{key}", value, f"steps.{key}", value, "in each step that uses it"))
        if kind == "webdataset":
            entry = {
                "name": name,
                **self._shards(f"{where}.", {key: rest.pop(key) for key in STREAM if key in rest}, 1000),
            }
            for key, value in rest.items():
                self._key(f"{where}.{key}", key, value, {}, step=True)
            return entry
        folder, captions = rest.pop("image_folder", None), rest.pop("captions_file", None)
        if folder is None:
            self.report.refused.append((where, "has no image_folder"))
            return None
        entry = {"name": name, **self._folder(f"{where}.image_folder", f"{where}.captions_file", folder, captions)}
        for key, value in rest.items():
            self._key(f"{where}.{key}", key, value, {}, step=True)
        return entry

    def _step(
        self, index: int, step: dict[str, Any], rate: Any, components: Mapping[str, Any], usual: Any, named: set[str]
    ) -> dict[str, Any]:
        name = str(step.pop("name", f"step{index + 1}"))
        where = f"steps.{name}"
        found: dict[str, Any] = {"name": name, **({"start": "previous"} if index else {})}
        own: dict[str, dict[str, Any]] = {}
        for key in ("optimizers", "schedulers"):
            self._collect(where, {key: step.pop(key, None)}, own)
        self._read_components(f"{where}.optim_sched_config", step.pop("optim_sched_config", None), own)
        optimization = step.pop("optimization", None)
        self._collect(f"{where}.optimization", optimization, own)
        data = step.pop("dataset", usual)
        if data is not None:
            found["use"] = [data]
            if not isinstance(data, str) or data not in named:
                self.report.refused.append(
                    (f"{where}.dataset", f"{data!r} is no data set.{did_you_mean(str(data), named)}")
                )
        own_rate = self._number(f"{where}.lr", step.pop("lr", rate), rate)
        for key in ("stop_condition", "transition_on", "transition_criteria"):
            if key in step:
                self._until(f"{where}.{key}", step.pop(key), step, found)
        trains = any(step.get(mode) for mode in ("train_vae", "gan_training"))
        for key, value in step.items():
            if (
                key in OF_VAE
                and not trains
                and any(step.get(mode) for mode in ("train_diff", "train_diff_full", "train_flow"))
            ):
                self.report.dropped_harmless.append(
                    (f"{where}.{key}", "acts on the autoencoder, which this step does not train")
                )
            else:
                self._key(f"{where}.{key}", key, value, found, step=True)
        objective = found.setdefault("objective", {})
        if not any(objective.get(mode) for mode in MODES):
            self.report.refused.append((where, f"has no mode; set one of {', '.join(MODES)}"))
        self._roles(f"{where}.", found, own or components, own_rate, given=True)
        self._frozen(where, step, objective)
        self._drawings(found)
        return found

    def _frozen(self, where: str, step: Mapping[str, Any], objective: Mapping[str, Any]) -> None:
        """Conflicts of what is frozen with what is trained."""
        listed = step.get("freeze") or []
        if not isinstance(listed, list):
            self.report.refused.append((f"{where}.freeze", f"is {listed!r}, expected a list of parts"))
            return
        frozen = {ROLE_OF.get(str(part), "vae" if part in ("compressor", "expander") else str(part)) for part in listed}
        for part in sorted(frozen - {*ROLE_OF.values()}):
            self.report.unknown.append((f"{where}.freeze", f" {part!r} is no part.{did_you_mean(part, ROLE_OF)}"))
        own = (("vae", "freeze_vae"), ("flow", "freeze_flow"), ("text_encoder", "freeze_text_encoder"))
        frozen |= {name for name, key in own if step.get(key)}
        trained = {"vae"} if objective.get("train_vae") else set()
        trained |= {"flow"} if objective.get("train_diff") or objective.get("train_diff_full") else set()
        trained |= {"text_encoder"} if objective.get("train_diff_full") else set()
        trained |= {"discriminator"} if objective.get("gan_training") else set()
        for role in sorted(frozen & trained):
            self.report.refused.append((f"{where}.freeze", f"freezes {role}, which the step trains"))

    def _number(self, source: str, value: Any, otherwise: Any) -> Any:
        """A value that must be a number; what is none is refused."""
        found = number(value)
        if _is_real(found):
            return found
        self.report.refused.append((source, f"is {value!r}, expected a number"))
        return otherwise

    def _table(self, source: str, value: Any) -> dict[str, Any]:
        """A value that must be a table; what is none is refused."""
        if value is None or isinstance(value, dict):
            return dict(value or {})
        self.report.refused.append((source, f"is {value!r}, expected a table"))
        return {}

    def _until(self, source: str, rule: Any, step: dict[str, Any], found: dict[str, Any]) -> None:
        """An early end by a metric."""
        values = dict(rule) if isinstance(rule, dict) else {}
        if values.pop("mode", "loss_threshold") == "epoch":
            self.report.dropped_harmless.append((source, "the step ends with its epochs"))
            return
        metric = values.get("metric") or values.get("loss_name") or values.get("metric_name")
        limit = values.get("threshold", values.get("loss_threshold"))
        tag = next((tag for tag, names in METRICS.items() if metric in names), None)
        if tag is None or not _is_real(number(limit)):
            known = ", ".join(name for names in METRICS.values() for name in names[:1])
            self.report.refused.append(
                (source, f"names the metric {metric!r} and the threshold {limit!r}; known metrics: {known}")
            )
            return
        alone = not any(step.get(mode) for mode in ("train_vae", "gan_training", "train_diff_full"))
        until = {"metric": "loss/main" if tag == "loss/flow" and alone else tag, "below": float(number(limit))}
        for key in ("min_epochs", "patience"):
            if values.get(key) is not None:
                until[key] = int(self._number(f"{source}.{key}", values[key], 1))
        if values.get("max_epochs") is not None:
            most = int(self._number(f"{source}.max_epochs", values["max_epochs"], 1))
            step["n_epochs"] = min(most, int(self._number(f"{source}.n_epochs", step.get("n_epochs", most), most)))
        found["until"] = until
        self.report.converted.append(
            (source, metric, "until.metric", until["metric"], "mean of the last 20 logged values")
        )


def _flattened(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys of sections with the name of the section in front, and those that stand alone."""
    for key, value in document.items():
        if key in SECTIONS and isinstance(value, dict):
            for name, own in value.items():
                yield f"{key}.{name}", own
        else:
            yield key, value


def _leaf(key: str) -> str:
    """A key without its section."""
    return key.rpartition(".")[2]


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: float) -> float:
    """A product without the last digits, which rounding made."""
    return float(f"{value:.6g}")


def number(value: Any) -> Any:
    """A number that YAML reads as a text, such as 1e-5, as the number."""
    if isinstance(value, str) and is_number(value):
        found = float(value)
        return int(found) if found.is_integer() and "e" not in value.lower() and "." not in value else found
    return value
