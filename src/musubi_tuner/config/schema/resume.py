"""[resume]."""

import re

from musubi_tuner.config.fields import Section, param

_CHANGEABLE = (
    r"(roles\.\w+\.)?(optimizer\.(lr|weight_decay|betas|eps)|scheduler\.\w+|train\.max_grad_norm)|objective\.\w+"
    r"|train\.prior_loss_weight|adapter\.(dropout|rank_dropout|module_dropout)|ema\.decay"
)


class ResumeSection(Section):
    """How a run continues."""

    tab = "setup"

    from_: str = param(
        "auto",
        "auto = the newest good state of this run, else a new start; none = a new start; or the path of a state. The last two need an "
        "output_dir without later checkpoints.",
        flat=("resume",),
        alias="from",
        resume="free",
    )
    allow: list[str] = param(
        [],
        "Settings that may differ from those of the state, such as optimizer.lr: the run goes on with the new value, and its states record "
        "the change.",
        resume="free",
        expert=True,
    )


def is_changeable(key: str) -> bool:
    """Whether a run can go on from a state with another value of a setting: it says how weights move, and not what they are."""
    return re.fullmatch(_CHANGEABLE, key) is not None
