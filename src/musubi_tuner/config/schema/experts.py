"""[experts]: teachers whose features are distilled."""

from typing import Literal

from musubi_tuner.config.fields import AutoDtype, Section, param
from musubi_tuner.config.when import is_, is_not, on

_TAUGHT = on("experts.enable_lune") | on("experts.enable_sol")
_EXTRACTED = on("experts.enable_lune") | (on("experts.enable_sol") & is_("experts.sol_source", "extracted"))
_SEEN = on("experts.enable_lune") | is_("experts.sol_source", "extracted")
"""Condition of the teacher files; with both teachers off, setting them gives no warning."""


class ExpertsSection(Section):
    """[experts] of a family without teachers: empty."""

    @property
    def extracted(self) -> list[str]:
        """Names of the teachers that are run while caching."""
        return []

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teachers that are on; their names begin those of their tensors."""
        return ()


class Sd15Teachers(ExpertsSection):
    """The SD1.5 teachers whose features are distilled, used only while caching; a data set overrides keys with its `experts`."""

    enable_lune: bool = param(True, "Cache and distil Lune, the pooled mid-block features.")
    enable_sol: bool = param(True, "Cache and distil Sol, the attention statistics and map.")
    unet: str | None = param(
        None,
        "SD1.5 U-Net: a folder, a file (also a whole original checkpoint) or a hub id.",
        path=True,
        when=_SEEN,
    )
    vae: str | None = param(
        None,
        'SD1.5 autoencoder, needed by `expert_input = "noised_image"`.',
        path=True,
        when=_SEEN & is_not("experts.expert_input", "random"),
    )
    lune: str | None = param(
        None,
        "Lune weights laid over the U-Net: a path or `owner/repo:file`; absent = the U-Net as it is.",
        path=True,
        when=on("experts.enable_lune"),
    )
    sol: str | None = param(
        None,
        "Sol weights laid over the U-Net: a path or `owner/repo:file`; absent = the U-Net as it is.",
        path=True,
        when=on("experts.enable_sol") & is_("experts.sol_source", "extracted"),
    )
    sol_source: Literal["extracted", "geometric"] = param(
        "extracted",
        "Where Sol comes from: extracted from the teacher's attention, or geometric, a formula of the time alone that its "
        "author calls wrong (caches of v4.1 hold it).",
        when=on("experts.enable_sol"),
    )
    expert_input: Literal["auto", "random", "noised_image"] = param(
        "auto",
        "What the teacher sees: noise only (published) or the noised image. auto = as the checkpoint was trained, "
        "published with a checkpoint that does not say, noised_image for a new model.",
        when=_EXTRACTED,
    )
    expert_time: Literal["auto", "reference", "aligned"] = param(
        "auto",
        "Teacher time for a data fraction t: reference 1000 t (published), aligned 1000 (1 - t), SD's own direction. "
        "auto as for expert_input.",
        when=_EXTRACTED,
    )
    sol_spatial_norm: Literal["auto", "sum", "mean", "max"] = param(
        "auto",
        "Scale of the Sol map in training: sums to 1 (published), mean 1, or maximum 1. auto as for expert_input.",
        when=_TAUGHT,
    )
    resolution: int = param(
        512,
        "Area of the teacher's picture is about this squared.",
        ge=64,
        le=2048,
        multiple_of=64,
        unit="pixels",
        when=_EXTRACTED,
    )
    time_buckets: int = param(
        10,
        "Number of evenly spaced times per image.",
        ge=1,
        le=100,
        when=_TAUGHT,
    )
    seed: int = param(
        42,
        "Seed of the teacher's noise.",
        ge=0,
        lt=2**32,
        when=_EXTRACTED,
    )
    dtype: AutoDtype = param(
        "auto",
        "Precision of the teachers; auto = float16 on a GPU, float32 on a CPU.",
        when=_EXTRACTED,
    )
    times_per_forward: int | Literal["auto"] = param(
        "auto",
        "Times of an image that go through a teacher together; auto = all, halved whenever the memory of the GPU is too small. "
        "Changes results by rounding only.",
        resume="free",
        when=_EXTRACTED,
    )

    @property
    def extracted(self) -> list[str]:
        """See `ExpertsSection`; a Sol of geometry is computed, not extracted."""
        sol = self.enable_sol and self.sol_source == "extracted"
        return [name for name, runs in (("lune", self.enable_lune), ("sol", sol)) if runs]

    @property
    def teachers(self) -> tuple[str, ...]:
        """See `ExpertsSection`."""
        return tuple(name for name, on in (("lune", self.enable_lune), ("sol", self.enable_sol)) if on)
