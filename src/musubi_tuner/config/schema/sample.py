"""[sample]."""

from typing import ClassVar, Literal

from musubi_tuner.config.fields import MOST, Section, param
from musubi_tuner.config.when import When, on


class SampleSection(Section):
    """Pictures drawn while training."""

    tab = "saving"
    acts_when: ClassVar[When | None] = on("sample.prompts")

    prompts: list[str] | str | None = param(
        None,
        "Prompts, or a prompt file (.txt, .toml, .json); absent = no samples.",
        flat=("sample_prompts",),
        resume="free",
    )
    every_steps: int | None = param(
        None,
        "Draw every so many updates; 0 = off.",
        flat=("sample_every_n_steps",),
        ge=0,
        le=MOST,
        resume="free",
        unit="updates",
    )
    every_epochs: int | None = param(
        None,
        "Draw every so many epochs; 0 = off.",
        flat=("sample_every_n_epochs",),
        ge=0,
        le=MOST,
        resume="free",
        unit="epochs",
    )
    at_first: bool = param(False, "Draw once before the first update.", flat=("sample_at_first",), resume="free")
    width: int | None = param(
        None, "Width of a sample; absent = the family's default.", ge=16, le=8192, resume="free", unit="pixels"
    )
    height: int | None = param(
        None, "Height of a sample; absent = the family's default.", ge=16, le=8192, resume="free", unit="pixels"
    )
    steps: int = param(28, "Solver steps.", flat=("sample_steps",), ge=1, le=1000, resume="free", unit="solver steps")
    guidance: float = param(
        5.0, "Guidance: the embedded number where a model takes one, else classifier-free (1 = off).", ge=0, le=100,
        resume="free",
    )  # fmt: skip
    negative_prompt: str | None = param(
        None, "What to avoid; absent = the trained null condition, which differs from an empty text.", resume="free"
    )
    solver: Literal["euler", "heun"] = param("euler", "Solver of the sampling equation.", resume="free")
    seed: int = param(42, "Image i is drawn from seed + i.", flat=("sample_seed",), ge=0, lt=2**32, resume="free")
    use_ema: bool = param(True, "Draw with the averaged weights.", resume="free", when=on("ema.enabled"))
