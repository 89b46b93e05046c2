"""Types of adapters: one record for each, from which settings, checks, files, importers and docs take what they need. Torch-free.

The classes are in adapters/, a file for each kind of change; `adapters.base` says what a class has. Leaves of file keys are those of
kohya's scripts and of LyCORIS, which ComfyUI reads too.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from musubi_tuner.adapters.base import Adapter

Name = Literal["none", "lora", "locon", "dora", "loha", "lokr", "dylora", "ia3", "glora", "diag-oft", "boft", "native"]
NORM = "norm"
"""Type of the changes of norms (adapter.train_norm), which lie in files beside those of another type."""

_LORA = ("lora_down.weight", "lora_up.weight", "alpha")
_SIZED = ("rank", "alpha", "rs_lora")
_DROPS = ("dropout", "rank_dropout")
_FACTORS = (*_SIZED, *_DROPS, "depth", "loraplus_lr_ratio", "max_norm")


@dataclass(frozen=True)
class AdapterType:
    """One type.

    Attributes:
        source: ``module:class``. about: a sentence. formula: of the weight.
        leaves: ends of its keys in a file. needed: those that every layer has. marks: those that only this type has.
        uses: settings of [adapter] that act on it, of those that do not act on all.
        prefix: of its names in our files. elsewhere: names of other trainers, in lower case, beside its own.
        written_as: the type that its files are of, if it is another one.
    """

    source: str
    about: str
    formula: str
    leaves: tuple[str, ...]
    needed: tuple[str, ...]
    marks: tuple[str, ...]
    uses: tuple[str, ...] = ()
    prefix: Literal["lora_unet_", "lycoris_"] = "lycoris_"
    elsewhere: tuple[str, ...] = ()
    written_as: str = ""

    def load(self) -> "type[Adapter]":
        """The class; imports torch."""
        module, name = self.source.split(":")
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _of(name: str) -> str:
    return f"musubi_tuner.adapters.{name}"


ADAPTERS: dict[str, AdapterType] = {
    "lora": AdapterType(
        _of("lora:LoRALinear"), "two low-rank matrices (Hu et al. 2021)", "W + s B A", _LORA, _LORA[:2], _LORA[:2], _FACTORS,
        "lora_unet_", ("standard", "loraxs", "networks.lora"),
    ),
    "locon": AdapterType(
        _of("locon:LoCon"), "LoRA, convolutions included; on Linear layers it is LoRA", "W + s B A", _LORA, _LORA[:2], (),
        (*_FACTORS, "conv_rank", "conv_alpha"), "lora_unet_", written_as="lora",
    ),
    "dora": AdapterType(
        _of("dora:DoRA"), "LoRA with trained norms of rows (Liu et al. 2024)", "m V / |V| by rows, V = W + s B A",
        (*_LORA, "dora_scale"), (*_LORA[:2], "dora_scale"), ("dora_scale",), (*_SIZED, *_DROPS, "loraplus_lr_ratio"), "lora_unet_",
    ),
    "loha": AdapterType(
        _of("loha:LoHa"), "Hadamard product of two low-rank matrices (Hyeon-Woo et al. 2022)", "W + s (B1 A1) * (B2 A2)",
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (*_SIZED, "rank_dropout", "max_norm"), "lora_unet_",
    ),
    "lokr": AdapterType(
        _of("lokr:LoKr"), "Kronecker product of a small matrix and a large, low-rank one (Yeh et al. 2023)", "W + s W1 x W2",
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"), (),
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        (*_SIZED, "max_norm", "lokr_factor", "lokr_decompose_both", "lokr_full"), "lora_unet_",
    ),
    "dylora": AdapterType(
        _of("dylora:DyLoRA"), "LoRA that can be cut to a smaller rank (Valipour et al. 2022)", "W + s B[:, :b] A[:b], b drawn",
        _LORA, _LORA[:2], (), (*_SIZED, "dropout", "loraplus_lr_ratio", "max_norm", "block_size"), "lora_unet_", written_as="lora",
    ),
    "ia3": AdapterType(
        _of("ia3:IA3"), "a factor for each output, or input, of a layer (Liu et al. 2022)", "(1 + w) W by rows, or by columns",
        ("weight", "on_input"), ("weight",), ("weight", "on_input"), elsewhere=("(ia)^3", "ia^3"),
    ),
    "glora": AdapterType(
        _of("glora:GLoRA"), "low-rank changes of the input and of the output (Chavan et al. 2023)", "W + s (W A1 A2 + B1 B2)",
        ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"), ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
        ("a1.weight", "a2.weight", "b1.weight", "b2.weight"), (*_SIZED, *_DROPS),
    ),
    "diag-oft": AdapterType(
        _of("oft:DiagOFT"), "rotations of blocks of outputs (Qiu et al. 2023)", "R' W, R = (I + Q) (I - Q)^-1, Q = P - P'",
        ("oft_blocks", "rescale", "alpha"), ("oft_blocks",), ("oft_blocks", "rescale"), ("rank", "constraint", "rescaled"),
        elsewhere=("oft", "diag_oft", "diagoft"),
    ),
    "boft": AdapterType(
        _of("oft:BOFT"), "rotations in butterfly stages, so that all outputs mix (Liu et al. 2023)", "R_m ... R_1 W",
        ("oft_blocks", "rescale", "alpha"), ("oft_blocks",), (), ("rank", "constraint", "rescaled"),
    ),
    "native": AdapterType(
        _of("native:Native"), "the whole change of a weight", "W + D", ("diff",), ("diff",), ("diff",), ("max_norm",), elsewhere=("full",),
    ),
    NORM: AdapterType(
        _of("norm:NormScale"), "changes of the scales of norms", "w + d", ("w_norm",), ("w_norm",), ("w_norm",),
    ),
}  # fmt: skip
assert (*ADAPTERS, "none")[:-2] == get_args(Name)[1:]
BY_NAME: dict[str, str] = {
    other: name for name, record in ADAPTERS.items() if name != NORM for other in (name, *record.elsewhere)
}
"""Names of all trainers, in lower case -> ours."""


def using(setting: str) -> tuple[str, ...]:
    """The types on which a setting of [adapter] acts."""
    return tuple(name for name, record in ADAPTERS.items() if setting in record.uses)


def type_of(leaves: dict[str, int]) -> str | None:
    """The type of the change of a layer from the ends of its keys; None if they are of no type.

    Args:
        leaves: with the number of axes of each.
    """
    if "dora_scale" in leaves:
        return "dora" if set(leaves) <= set(ADAPTERS["dora"].leaves) else None
    if leaves.get("oft_blocks") == 4:
        return "boft"
    for name, record in ADAPTERS.items():
        if set(leaves) <= set(record.leaves) and set(leaves) & set(record.marks):
            return name
    return None
