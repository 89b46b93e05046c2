"""Weights of TinyFlux v3 for v4.2 models, and the way back.

    expert_predictor.X <-> lune_predictor.X        its gate is [1] in v3 and [] in v4, with the same meaning
    *.sin_basis                                    dropped; so are guidance_in.* and *.spatial_to_mod.* where the model has no such part
    sol_prior, t5_pool, text_balance, spatial_to_mod, a missing predictor: start values

Every other name is the same. Which way is taken follows from the names of the model and of the file.

A neutral upgrade computes what the older model did, as far as it can: ``text_balance`` = 8 gives the pooled CLIP text
99.97 % of the vector and ``t5_pool``'s last layer is zero, as are ``spatial_to_mod`` and the last layer of a predictor
that the file lacks. Sol's temperature cannot be neutral, because it is 70 % geometric, and is reported.

The reports account for every key of the file and of the model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig
from musubi_tuner.models.tinyflux.model import TinyFluxDeep, initialize, rotary_frequencies
from musubi_tuner.weights.checkpoints import WeightFile, check_keys

V3, V4 = "expert_predictor.", "lune_predictor."
"""Prefix of the Lune predictor."""
PARTS = (V4, V3, "sol_prior.", "t5_pool.", "text_balance", ".spatial_to_mod.", "rope.freqs_")
"""What a model may have and an older file may lack; a file with a piece of a part is damaged."""
OBSOLETE = ("guidance_in.", ".sin_basis")
SWITCHES = {
    V4: ("use_lune_expert", "use_expert_predictor"),
    "sol_prior.": ("use_sol_prior",),
    "t5_pool.": ("use_t5_vec",),
}
"""Part -> fields of a config that say whether a model has it."""
NEUTRAL_BALANCE = 8.0
V3_GATE = 0.5
"""Start value of the predictor's gate in v3; 0 in v4."""


@dataclass
class UpgradeReport:
    """What became of every key.

    Attributes:
        remapped: name in the file -> name in the model; also in ``loaded``.
        loaded: keys taken from the file. copied: from the other weights given. fresh: with start values.
        dropped: keys of the file that the model has no use for, of known kinds; unexpected: of unknown ones.
        missing: keys of the model that nothing gives a value. mismatched: keys whose tensor in the file has another shape.
        notes: what a person should know.
    """

    remapped: dict[str, str] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether the file simply holds the model; rotary frequencies may have been computed."""
        fresh = [key for key in self.fresh if not key.startswith("rope.")]
        return not (
            self.remapped or self.copied or fresh or self.dropped or self.unexpected or self.missing or self.mismatched
        )

    def lines(self, what: str) -> list[str]:
        """Text for a person; ``what`` names the file."""
        text = [f"{what}: {len(self.loaded)} tensors loaded, {len(self.remapped)} of them under other names"]
        for kind, keys in (
            ("copied from the model", self.copied),
            ("fresh", self.fresh),
            ("dropped", self.dropped),
            ("unexpected", self.unexpected),
            ("missing", self.missing),
            ("of another shape", self.mismatched),
        ):
            if keys:
                text.append(f"  {kind:<9} {len(keys)}: {', '.join(summary(keys))}")
        return text + [f"  {note}" for note in self.notes]


def summary(keys: Iterable[str]) -> list[str]:
    """Keys of a part as one entry with their number, the others as they are, at most eight in all."""
    counts: dict[str, int] = {}
    for key in keys:
        name = next((part.strip(".") for part in (*PARTS, "guidance_in.") if _in_part(key, part)), key)
        counts[name] = counts.get(name, 0) + 1
    shown = [name if count == 1 else f"{name} ({count})" for name, count in list(counts.items())[:8]]
    return shown + (["..."] if len(counts) > 8 else [])


def _in_part(key: str, part: str) -> bool:
    return part in key if part.startswith(".") else key.startswith(part)


def is_older(file: WeightFile) -> bool:
    """Whether a file was written for a model that knew fewer parts than this one.

    A v3 name says so, and so does a part that the file does not hold and its config does not mention.
    """
    if any(key.startswith(V3) for key in file.tensors):
        return True
    stated = set(file.config or {})
    return "img_in.weight" in file.tensors and any(
        not stated.intersection(switches) and not any(key.startswith(part) for key in file.tensors)
        for part, switches in SWITCHES.items()
    )


def shapes(config: TinyFluxConfig) -> dict[str, Tensor]:
    """State dict of a model on the meta device."""
    with torch.device("meta"):
        return TinyFluxDeep(config).state_dict()


def v3_shapes(config: TinyFluxConfig) -> dict[str, Tensor]:
    """State dict of the v3 model with these sizes, on the meta device: without Sol and the T5 vector."""
    own = shapes(v3_geometry(config))
    gate = f"{V4}expert_gate"
    return {
        key.replace(V4, V3, 1) if key.startswith(V4) else key: tensor.view(1) if key == gate else tensor
        for key, tensor in own.items()
    }


def v3_geometry(config: TinyFluxConfig) -> TinyFluxConfig:
    """The sizes without what v3 does not have."""
    return replace(config, use_sol_prior=False, use_t5_vec=False)


def remap(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], UpgradeReport]:
    """Bring the tensors of a file to the names and shapes of a model.

    Args:
        own: state dict of the model, on any device; its predictor's prefix decides the direction.

    Returns:
        What fits the model, and a report in which nothing is fresh yet.
    """
    report, result = UpgradeReport(), {}
    to_v3 = any(key.startswith(V3) for key in own)
    before, after = (V4, V3) if to_v3 else (V3, V4)
    for key, tensor in tensors.items():
        name = after + key.removeprefix(before) if key.startswith(before) else key
        if name in own and (name == key or name not in tensors):
            if tensor.shape != own[name].shape and not tensor.numel() == own[name].numel() == 1:
                report.mismatched[name] = tensor
                continue
            result[name] = tensor.view(own[name].shape) if tensor.numel() == 1 else tensor
            report.loaded.append(name)
            if name != key:
                report.remapped[key] = name
        elif _is_obsolete(key, name, own, to_v3, name in tensors):
            report.dropped.append(key)
        else:
            report.unexpected.append(key)
    report.mismatched = {key: report.mismatched[key] for key in own if key in report.mismatched}
    report.missing = [key for key in own if key not in result and key not in report.mismatched]
    return result, report


def _is_obsolete(key: str, name: str, own: Mapping[str, Tensor], to_v3: bool, twice: bool) -> bool:
    """Whether a key that the model does not have is one that may be dropped."""
    if any(part in key for part in OBSOLETE) or (twice and name in own):
        return True
    if ".spatial_to_mod." in key:
        return not any(entry.startswith("sol_prior.") for entry in own)
    return to_v3 and key.startswith(("sol_prior.", "t5_pool.", "text_balance"))


def upgrade_weights(
    tensors: Mapping[str, Tensor],
    config: TinyFluxConfig,
    *,
    to: str = "v4",
    model: Mapping[str, Tensor] | None = None,
    neutral: bool = True,
    strict: bool = False,
    whole_parts: bool = True,
    seed: int = 0,
    what: str = "weights",
) -> tuple[dict[str, Tensor], UpgradeReport]:
    """Bring the tensors of a file to a model, with start values for the parts that they lack.

    Args:
        config: geometry of the v4.2 model, or, with ``to`` = "v3", of the v4.2 model that the file holds.
        model: weights of the same model under its names; they fill what an average lacks.
        neutral: choose start values that change as little as possible of what is computed; see the module text.
        strict: keys that are missing, unexpected or of another shape are an error. whole_parts: give start values to all
            parts that the file lacks, not to rotary frequencies alone.
        seed: of the start values. what: begins the error.

    Returns:
        Tensors under the model's names, some of them views of those given, and the report.

    Raises:
        CheckpointError: as ``strict`` says.
    """
    own = v3_shapes(config) if to == "v3" else shapes(config)
    result, report = remap(tensors, own)
    if model is not None:
        report.copied = [key for key in report.missing if key in model]
        result |= {key: model[key] for key in report.copied}
        report.missing = [key for key in report.missing if key not in model]
    absent = [part for part in PARTS if not any(_in_part(key, part) for key in [*result, *report.mismatched])]
    absent = [part for part in absent if whole_parts or part == "rope.freqs_"]
    report.fresh = [key for key in report.missing if any(_in_part(key, part) for part in absent)]
    if report.fresh:
        result |= fresh_values(config, report, own, neutral=neutral, seed=seed, dtype=_dtype(result))
    report.missing = [key for key in report.missing if key not in set(report.fresh)]
    result = {key: result[key] for key in own if key in result}
    if strict:
        given = {key: result[key] for key in report.loaded}
        given |= {**report.mismatched, **{key: tensors[key] for key in report.unexpected}}
        check_keys(own, given, what, optional=[*report.fresh, *report.copied])
    return result, report


def _other_name(key: str) -> str:
    """A key of the predictor under the prefix of the other version."""
    if key.startswith(V4):
        return V3 + key.removeprefix(V4)
    return V4 + key.removeprefix(V3) if key.startswith(V3) else key


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """That of the weights of a file."""
    given = tensors.get("img_in.weight")
    return torch.float32 if given is None else given.dtype


def fresh_values(
    config: TinyFluxConfig,
    report: UpgradeReport,
    own: Mapping[str, Tensor],
    *,
    neutral: bool,
    seed: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Start values for the fresh keys of a report, to which notes are added."""
    # The parts do not depend on the blocks, and the blocks' own fresh layer starts as zero.
    sizes = replace(config, num_double_layers=0, num_single_layers=0)
    source = TinyFluxDeep(sizes)
    initialize(source, "reference", torch.Generator().manual_seed(seed))
    start = source.state_dict()
    values = {}
    for key in report.fresh:
        v4_key = _other_name(key) if key.startswith(V3) else key
        if key.startswith("rope."):
            values[key] = rotary_frequencies(config.axes_dims_rope[int(key[-1])])
            continue
        value = torch.zeros(own[key].shape) if ".spatial_to_mod." in key else start[v4_key].clone()
        if key == f"{V3}expert_gate":
            value = torch.full(own[key].shape, V3_GATE)
        elif neutral and key == "text_balance":
            value = torch.tensor(NEUTRAL_BALANCE)
        elif neutral and v4_key.startswith(("t5_pool.2.", f"{V4}output_proj.1.")):
            value = torch.zeros_like(value)
        values[key] = value.to(dtype)
    parts = {part for part in PARTS for key in report.fresh if _in_part(key, part)}
    if not neutral and parts & {"text_balance", "t5_pool.", V4, V3}:
        report.notes.append("the start is not neutral: half of the pooled text comes from an untrained projection")
    if "sol_prior." in parts:
        report.notes.append(
            f"not neutral: Sol's attention temperature starts {config.sol_geometric_weight:.0%} geometric, the rest untrained"
        )
    return values
