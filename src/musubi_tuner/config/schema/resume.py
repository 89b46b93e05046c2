"""[resume]."""

from musubi_tuner.config.fields import Section, param


class ResumeSection(Section):
    """How a run continues."""

    tab = "setup"

    from_: str = param(
        "auto",
        "auto = the newest good state of this run, or a new start; none = a new start; or the path of a state. The last two need an "
        "output_dir without later checkpoints.",
        flat=("resume",),
        alias="from",
        resume="free",
    )
