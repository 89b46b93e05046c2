"""What programs state of an adapter's alphas and ranks outside its tensors, and whether it belongs to the file.

    header, as JSON      lora_adapter_metadata (diffusers), adapter_config, peft_config: the fields of peft's LoraConfig, plain,
                         behind a component ("transformer.lora_alpha") or below it ({"transformer": {...}})
    header, one by one   transformer.lora_alpha, transformer.r (SimpleTuner), lora_alpha, network_alpha, alpha, rank
    beside the file      adapter_config.json (peft)
    header of kohya      ss_network_alpha, ss_network_dim: for lora_down and lora_up alone; files under other names may keep these
                         entries although their alpha has been folded into the matrices (musubi-tuner's convert_lora does)

The first of them that says anything counts, for layers without an ``.alpha`` of their own; without any, alpha is the rank.
Patterns are matched as peft does. rs-LoRA divides alpha by the root of the rank. What is read comes back as ``.alpha``
tensors, with a line that says where from.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.adapters.convert import FileLayer, bare_name, read_layers
from musubi_tuner.errors import CheckpointError
from musubi_tuner.weights.checkpoints import ADAPTER_CONFIG, ADAPTER_FILES

JSON_ENTRIES = ("lora_adapter_metadata", "adapter_config", "peft_config", "lora_config")
COMPONENTS = ("transformer", "unet", "diffusion_model", "dit", "denoiser", "model")
"""What programs call the denoiser."""
NAMES = {
    "alpha": ("lora_alpha", "network_alpha", "alpha"),
    "rank": ("r", "rank", "lora_rank", "network_dim"),
    "alphas": ("alpha_pattern",),
    "ranks": ("rank_pattern",),
    "by_root": ("use_rslora", "use_rs_lora", "rs_lora", "rslora"),
    "targets": ("target_modules",),
    "method": ("peft_type",),
    "start": ("init_lora_weights",),
}
"""Ours -> the names under which it is stated."""
EXTRAS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "a LoRA with biases",
    "kasa_config": "KaSA",
    "alora_invocation_tokens": "an activated LoRA",
    "arrow_config": "Arrow",
}
"""Settings of peft under which a change is more than its two matrices."""
SINGLE = {name for names in NAMES.values() for name in names} | set(EXTRAS)
STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that change the model's own weights too."""
_UNSET: tuple[Any, ...] = (None, False, "False", [], {})


@dataclass(frozen=True)
class Alphas:
    """Alphas of a file's layers that stand outside its tensors.

    Attributes:
        tensors: as ``.alpha`` tensors, under the file's names of the layers.
        remark: where they are from, for a person; empty where every layer has its own. beside: whether from a file beside.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    remark: str = ""
    beside: bool = False


@dataclass(frozen=True)
class Stated:
    """Settings of an adapter as one place states them; see `NAMES`."""

    where: str
    values: Mapping[str, Any]
    alpha: float | None
    rank: int | None
    alphas: Mapping[str, float]
    ranks: Mapping[str, int]
    by_root: bool

    @classmethod
    def read(cls, where: str, values: Mapping[str, Any]) -> "Stated | None":
        """Read the settings of the denoiser; None if no alpha is among them.

        Raises:
            ValueError: naming what cannot be read.
        """
        own = _of_denoiser(values)
        found = {ours: next((own[name] for name in names if own.get(name) is not None), None)
                 for ours, names in NAMES.items()}  # fmt: skip
        if found["alpha"] is None and found["alphas"] is None:
            return None
        rank = _number("rank", found["rank"])
        return cls(
            where,
            {**own, **{name: found[name] for name in ("targets", "method", "start")}},
            _number("alpha", found["alpha"]),
            None if rank is None else int(rank),
            _pattern("alpha_pattern", found["alphas"]),
            {name: int(value) for name, value in _pattern("rank_pattern", found["ranks"]).items()},
            found["by_root"] in (True, "true", "True", "1", 1),
        )

    def alpha_of(self, path: str, rank: int) -> float | None:
        """Alpha of a layer by its path in the model; None if it is not stated."""
        alpha = _match(self.alphas, path, self.alpha)
        return alpha if alpha is None or not self.by_root else alpha * math.sqrt(rank)

    def misfit(self, layers: Mapping[str, FileLayer], *, targets: bool = False) -> str:
        """Why it is not about these layers; empty if it may be. ``targets``: compare their names too."""
        names = self.values["targets"] if targets else None
        for module, layer in layers.items():
            path, rank = bare_name(module), len(layer.pair["down"])
            stated = _match(self.ranks, path, self.rank)
            if stated is not None and stated != rank:
                return f"rank {stated:g} for {path}, which has {rank}"
            if isinstance(names, list) and not any(f".{path}".endswith(f".{name}") for name in names):
                return f"no target_modules for {path}"
            if isinstance(names, str) and names != "all-linear" and not re.fullmatch(names, path):
                return f"target_modules that do not match {path}"
        return ""

    def check(self, *, has_norms: bool) -> None:
        """Refuse what its tensors do not show.

        Args:
            has_norms: the file has the norms of DoRA.

        Raises:
            CheckpointError: naming it.
        """
        method, start = self.values["method"], self.values["start"]
        kind = next(
            (
                name
                for key, name in EXTRAS.items()
                if self.values.get(key) not in _UNSET and not (key == "use_dora" and has_norms)
            ),
            "",
        )
        if not kind and method is not None and str(method).rpartition(".")[2].upper() != "LORA":
            kind = str(method)
        if kind:
            missing = (
                "whose norms (lora_magnitude_vector) are not in the file"
                if kind == "DoRA"
                else "which is not supported"
            )
            raise CheckpointError(f"{self.where} says that this is {kind}, {missing}")
        if isinstance(start, str) and start.lower().startswith(STARTS):
            raise CheckpointError(
                f"{self.where} says init_lora_weights = {start}, which changes the model's own weights too; save it with peft's "
                "path_initial_model_for_weight_conversion, which writes a plain LoRA"
            )


def stated_alphas(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Alphas:
    """Alphas for the layers of a file that hold none.

    Args:
        tensors: of the model's own layers. metadata: header of the file at ``path``.

    Raises:
        CheckpointError: if they cannot be read, contradict the file, or tell of something else than LoRA.
    """
    layers = {name: layer for name, layer in read_layers(tensors)[0].items() if {"down", "up"} <= set(layer.pair)}
    without = {name: layer for name, layer in layers.items() if "alpha" not in layer.pair}
    if not without:
        return Alphas()
    try:
        inside = _in_header(metadata, without)
        beside = _beside(path) if any(layer.is_peft for layer in without.values()) else None
        stated, note = _chosen(inside, beside, layers, path)
        if stated is not None:
            stated.check(has_norms=any("dora_scale" in layer.pair for layer in layers.values()))
        found = _alphas(stated, without)
        if inside is not None and beside is not None and not note and _alphas(beside, without) != found:
            note = f"{beside.where} says otherwise and is not used"
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise CheckpointError(f"what it says about its alphas cannot be read ({error})") from error
    remarks = [_remark(stated)] if stated is not None and found else []
    if len(found) < len(without):
        count = len(without) - len(found)
        which = "" if count == len(layers) else f" for {count} of {len(layers)} layers"
        remarks.append(f"no alpha is stated{which}, so it counts as the rank")
        training = _number_or_none(metadata.get("ss_network_alpha"))
        if stated is None and training not in (None, _number_or_none(metadata.get("ss_network_dim"))):
            remarks.append(f"ss_network_alpha {training:g} of its header is that of the training and is not used")
    return Alphas(
        {f"{module}.alpha": torch.tensor(alpha) for module, alpha in found.items()},
        "; ".join([*remarks, *([note] if note else [])]),
        beside=stated is not None and stated is beside,
    )


def _chosen(
    inside: Stated | None, beside: Stated | None, layers: Mapping[str, FileLayer], path: Path
) -> tuple[Stated | None, str]:
    """What counts of the header and of the file beside, and a note about what does not.

    Raises:
        CheckpointError: if what must belong to the file does not fit it.
    """
    if inside is not None and (problem := inside.misfit(layers)):
        raise CheckpointError(f"{inside.where} does not fit its tensors: it says {problem}")
    if beside is None or not (problem := beside.misfit(layers, targets=True)):
        return inside or beside, ""
    if inside is None and path.name in ADAPTER_FILES:
        raise CheckpointError(f"{beside.where} does not fit its tensors: it says {problem}")
    return inside, f"{beside.where} is of another adapter (it says {problem})"


def _alphas(stated: Stated | None, layers: Mapping[str, FileLayer]) -> dict[str, float]:
    """Alpha of each layer for which one is stated."""
    if stated is None:
        return {}
    found = {name: stated.alpha_of(bare_name(name), len(layer.pair["down"])) for name, layer in layers.items()}
    return {name: alpha for name, alpha in found.items() if alpha is not None}


def _remark(stated: Stated) -> str:
    """Which alphas are taken from where."""
    every = sorted({*stated.alphas.values(), *([] if stated.alpha is None else [stated.alpha])})
    text = f"alpha {every[0]:g}" if len(every) == 1 else f"alphas {every[0]:g} to {every[-1]:g}"
    return f"{text} from {stated.where}" + (" (rs-LoRA: divided by the root of the rank)" if stated.by_root else "")


def without_stated(metadata: Mapping[str, str]) -> dict[str, str]:
    """A header without what it states of alphas and ranks, which would be read twice once they are tensors."""
    return {key: value for key, value in metadata.items() if key not in JSON_ENTRIES and not _is_single(key)}


def _is_single(key: str) -> bool:
    """Whether a header entry is one setting of an adapter, plain or behind a component."""
    component, _, name = key.rpartition(".")
    return (not component or component in COMPONENTS) and name in SINGLE


def _in_header(metadata: Mapping[str, str], layers: Mapping[str, FileLayer]) -> Stated | None:
    for name in JSON_ENTRIES:
        if name in metadata:
            values = json.loads(metadata[name])
            if not isinstance(values, dict):
                raise ValueError(f"{name} of its header is no JSON object")
            found = Stated.read(f"{name} of its header", values)
            if found is not None:
                return found
    found = Stated.read("its header", {key: _decoded(value) for key, value in metadata.items() if _is_single(key)})
    if found is not None or any(layer.is_peft for layer in layers.values()):
        return found
    alpha, rank = (_number_or_none(metadata.get(f"ss_network_{name}")) for name in ("alpha", "dim"))
    if not alpha or any(len(layer.pair["down"]) != rank for layer in layers.values()):
        return None
    return Stated.read("ss_network_alpha of its header", {"alpha": alpha, "rank": rank})


def _beside(path: Path) -> Stated | None:
    """What adapter_config.json beside a file states."""
    file = path.with_name(ADAPTER_CONFIG)
    if not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(values, dict):
        raise ValueError(f"{ADAPTER_CONFIG} beside it is no JSON object")
    others = [other for other in path.parent.glob("*.safetensors") if other.name != path.name]
    more = f" (and beside {len(others)} other files)" if others and path.name not in ADAPTER_FILES else ""
    return Stated.read(f"{ADAPTER_CONFIG} beside it{more}", values)


def _of_denoiser(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries of the denoiser: below its name, behind its name, or plain."""
    for component in COMPONENTS:
        below = values.get(component)
        if isinstance(below, dict):
            return below
        behind = {
            key.removeprefix(f"{component}."): value for key, value in values.items() if key.startswith(f"{component}.")
        }
        if behind:
            return behind
    return {key: value for key, value in values.items() if "." not in key}


def _decoded(text: str) -> Any:
    """A header entry as JSON, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}, expected a number")
    return number


def _number_or_none(text: str | None) -> float | None:
    try:
        return _number("", text)
    except ValueError:
        return None


def _pattern(name: str, value: Any) -> dict[str, float]:
    """Expression -> number."""
    decoded = _decoded(value) if isinstance(value, str) else value
    if decoded is None:
        return {}
    if not isinstance(decoded, dict):
        raise ValueError(f"{name} is {value!r}, expected an object")
    numbers = {key: _number(f"{name}.{key}", entry) for key, entry in decoded.items()}
    return {key: number for key, number in numbers.items() if number is not None}


def _match(patterns: Mapping[str, float], path: str, default: float | None) -> float | None:
    """The number of the first expression that matches a path, as peft matches it."""
    return next((number for key, number in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)
