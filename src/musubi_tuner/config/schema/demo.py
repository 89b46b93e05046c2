"""[demo]."""

from musubi_tuner.config.fields import Section, param


class DemoSection(Section):
    """The built-in demo: makes its own pictures and encoders, and scores what the model draws."""

    expert = True

    folder: str = param(..., "Where the demo's pictures, captions and encoders are made.", path=True)
    pictures: int = param(1536, "Training pictures to draw.", ge=1, le=1_000_000, unit="pictures")
    size: int = param(64, "Side of a picture in pixels.", ge=32, le=1024, multiple_of=16, unit="pixels")
    held_out: int = param(
        24,
        "Combinations of shape, colour, place and background that are not trained on.",
        ge=0,
        le=100,
        unit="combinations",
    )
    seed: int = param(0, "Seed of the pictures and encoders.", ge=0, lt=2**32)
    score_prompts: int = param(120, "Prompts scored at the end; half are held-out combinations.", ge=1, le=100_000,
                               resume="free", unit="prompts")  # fmt: skip
    score_seed: int = param(1234, "Seed of the noise used for scoring.", ge=0, lt=2**32, resume="free")
