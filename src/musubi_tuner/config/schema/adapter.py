"""[adapter]."""

from typing import Any

from pydantic import field_validator

from musubi_tuner.adapter_types import BY_NAME, Name, using
from musubi_tuner.config.fields import Section, param
from musubi_tuner.config.when import When, is_, is_not, off, on

_RANKS = off("adapter.rank_from_weights")


def _acts(setting: str) -> When:
    """Where a setting acts: on the types that use it."""
    return is_("adapter.type", *using(setting))


class AdapterTarget(Section):
    """Settings of the layers that a pattern matches; absent ones do not change."""

    pattern: str = param(..., "Whole module path: `*` is one part, `**` any number, [2-5] a range, [2,4] a list.")
    rank: int | None = param(None, "Width of the matrices.", ge=1, le=1024)
    alpha: float | None = param(None, "The adapter is scaled by alpha / rank; 0 = the rank.", ge=0)
    lr_scale: float | None = param(None, "Factor of the learning rate.", ge=0, le=1000)
    depth: int | None = param(None, "Parallel pairs of matrices.", ge=1, le=64)
    dropout: float | None = param(None, "Share of rank activations dropped.", ge=0, lt=1)
    enabled: bool | None = param(
        None, "true adapts these layers even if their kind is not adapted, false leaves them out."
    )
    weight_decay: float | None = param(None, "Weight decay; absent = that of the optimizer.", ge=0, le=10)

    def fields(self) -> dict[str, Any]:
        """What it sets."""
        return self.model_dump(exclude_none=True, exclude={"pattern"})


class AdapterSection(Section):
    """A small set of extra weights that is trained instead of the model, which stays frozen."""

    tab = "adapter"
    acts_when = is_not("adapter.type", "none")

    type: Name = param(
        "none", "none trains the model itself; lora and the others train a small change of it, which docs/adapters.md compares."
    )  # fmt: skip
    preset: str | None = param(
        None,
        "A published choice of kinds, rank, alpha and targets; keys set here override it. Names differ by family.",
        when=off("adapter.rank_from_weights"),
    )
    kinds: list[str] | None = param(
        None,
        "Kinds of layers to adapt, by the family's names; absent = the family's default.",
        when=off("adapter.rank_from_weights"),
    )
    rank: int = param(
        16,
        "Width of the matrices; of diag-oft and boft the size of a block of outputs.",
        flat=("network_dim",),
        ge=1,
        le=1024,
        when=_RANKS & _acts("rank"),
    )
    alpha: float | None = param(
        None,
        "The adapter is scaled by alpha / rank; absent = half the rank, 0 = the rank.",
        flat=("network_alpha",),
        ge=0,
        when=_RANKS & _acts("alpha"),
    )
    conv_rank: int | None = param(
        None, "Rank of locon on convolutions, where a family has some; absent = they are left alone.", ge=1, le=1024, flat=("conv_dim",),
        when=_RANKS & _acts("conv_rank")
    )  # fmt: skip
    conv_alpha: float | None = param(
        None, "Alpha of locon on convolutions; absent = half of conv_rank.", ge=0, when=_RANKS & _acts("conv_alpha")
    )
    rs_lora: bool = param(
        False, "Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023); files hold the alpha that gives the same.",
        when=_RANKS & _acts("rs_lora"),
    )  # fmt: skip
    depth: int = param(
        1,
        "Parallel pairs of matrices per layer; equal to one pair that is so many times as wide.",
        ge=1,
        le=64,
        when=_RANKS & _acts("depth"),
    )
    lr_scale: float = param(1.0, "Factor of the learning rate.", ge=0, le=1000)
    dropout: float = param(0.0, "Share of rank activations dropped.", flat=("network_dropout",), ge=0, lt=1)
    rank_dropout: float = param(0.0, "Share of ranks dropped, per sample.", ge=0, lt=1)
    module_dropout: float = param(0.0, "Share of adapters skipped, per micro-batch.", ge=0, lt=1)
    block_size: int = param(
        1, "Ranks that dylora trains together; divides the rank.", ge=1, le=1024, neutral=1, when=_acts("block_size")
    )
    lokr_factor: int = param(
        -1, "Size of one part into which lokr divides a side of a layer; -1 = the most square parts.", ge=-1, le=4096, neutral=-1,
        when=_acts("lokr_factor"), flat=("factor",)
    )  # fmt: skip
    lokr_decompose_both: bool = param(
        False, "Low rank for the small matrix of lokr too.", when=_acts("lokr_decompose_both"), flat=("decompose_both",)
    )
    lokr_full: bool = param(
        False, "The large matrix of lokr whole, whatever the rank.", when=_acts("lokr_full"), flat=("full_matrix",)
    )
    constraint: float = param(
        0.0,
        "Limit of the rotation of diag-oft and boft, for each output; 0 = none.",
        ge=0,
        le=1000,
        when=_acts("constraint"),
    )
    rescaled: bool = param(False, "Train a factor of each output beside the rotation.", when=_acts("rescaled"))
    train_norm: bool = param(False, "Train changes of the scales of norms too.")
    block_rank: list[int] | dict[str, int] = param(
        {}, "Ranks by block: a list of one number for each, or a table such as {\"double_blocks.0-7\" = 8}; 0 = none there.",
        flat=("block_dims",), when=_RANKS & _acts("rank")
    )  # fmt: skip
    block_alpha: list[float] | dict[str, float] = param(
        {}, "Alphas by block, as block_rank.", flat=("block_alphas",), when=_RANKS & _acts("alpha")
    )
    include: list[str] = param(
        [], "Regular expressions of module paths that are adapted even if excluded.", flat=("include_patterns",)
    )
    exclude: list[str] | None = param(
        None,
        "Regular expressions of module paths that are not adapted; replaces the family's list.",
        flat=("exclude_patterns",),
    )
    keep_default_excludes: bool = param(
        False, "Add exclude to the family's list instead of replacing it.", when=on("adapter.exclude")
    )
    only: list[str] = param(
        [], "Adapt only module paths that match one of these regular expressions.", flat=("only_patterns",)
    )
    rank_patterns: dict[str, int] = param(
        {}, "Regular expression of module paths -> rank; the first match counts.", when=_RANKS & _acts("rank")
    )
    alpha_patterns: dict[str, float] = param(
        {},
        "Regular expression of module paths -> alpha; the first match counts.",
        when=_RANKS & _acts("alpha"),
    )
    targets: list[AdapterTarget] = param(
        [],
        "Tables with a pattern of module paths and rank, alpha, lr_scale, depth, dropout, enabled or weight_decay of these "
        "layers; later ones win.",
    )
    loraplus_lr_ratio: float | None = param(
        None, "LoRA+: learning rate of the up matrices as a multiple of the learning rate.", gt=0, le=1000
    )
    max_norm: float | None = param(
        None, "After every update, changes above this norm are scaled down to it.", flat=("scale_weight_norms",), gt=0,
        when=_acts("max_norm")
    )  # fmt: skip
    init_from: str | None = param(
        None, "Adapter file to start from.", flat=("network_weights",), path=True, tab="setup"
    )
    rank_from_weights: bool = param(
        False, "Read rank and alpha of every module from init_from.", flat=("dim_from_weights",)
    )
    merge: list[str] = param(
        [], "Adapter files merged into the model before training.", flat=("base_weights",), tab="setup"
    )
    merge_multipliers: list[float] = param(
        [], "One factor per merged file; absent = 1.", flat=("base_weights_multiplier",), when=on("adapter.merge")
    )
    merge_ignore_unmatched: bool = param(
        False,
        "Skip keys of merged files that belong to no layer, instead of stopping.",
        flat=("ignore_unmatched_lora_keys",),
        when=on("adapter.merge"),
    )

    @field_validator("type", mode="before")
    @classmethod
    def _in_any_spelling(cls, value: Any) -> Any:
        return BY_NAME.get(value.lower(), value) if isinstance(value, str) else value
