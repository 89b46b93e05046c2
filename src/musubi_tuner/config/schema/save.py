"""[save]."""

from typing import Any

from musubi_tuner.config.fields import MOST, Dtype, Section, param
from musubi_tuner.config.when import is_not, on

_ADAPTER = is_not("adapter.type", "none")


def _modelspec(what: str, absent: str = "") -> Any:
    """A field of modelspec, under the name that sd-scripts has for it."""
    name = what.partition(",")[0].lower()
    return param(None, f"{what} in the metadata of adapter files{absent}.", flat=(f"metadata_{name}",), min_length=1,
                 resume="free", expert=True, when=_ADAPTER)  # fmt: skip


class SaveSection(Section):
    """Checkpoints during training; the final one is always written."""

    tab = "saving"

    every_steps: int | None = param(
        5000,
        "Save every so many updates; 0 = off.",
        flat=("save_every_n_steps",),
        ge=0,
        le=MOST,
        resume="free",
        unit="updates",
    )
    every_epochs: int | None = param(
        None,
        "Save every so many epochs; 0 = off.",
        flat=("save_every_n_epochs",),
        ge=0,
        le=MOST,
        resume="free",
        unit="epochs",
    )
    keep_last_steps: int | None = param(
        3,
        "Number of newest step checkpoints to keep; 0 = all.",
        ge=0,
        le=MOST,
        resume="free",
        unit="checkpoints",
        when=on("save.every_steps"),
    )
    keep_last_epochs: int | None = param(
        3,
        "Number of newest epoch checkpoints to keep; 0 = all.",
        ge=0,
        le=MOST,
        resume="free",
        unit="checkpoints",
        when=on("save.every_epochs"),
    )
    dtype: Dtype = param("float32", "Precision of saved weights; states always hold float32.",
                         flat=("save_precision",), resume="free")  # fmt: skip
    keep_last_states: int | None = param(
        2, "Number of newest states to keep, across all checkpoints; older checkpoints keep only their weights; 0 = all.", ge=0, le=MOST,
        resume="free", unit="states", when=on("save.state")
    )  # fmt: skip
    state: bool = param(True, "Write a resumable state with every checkpoint.", flat=("save_state",), resume="free")
    best: bool | None = param(
        None, "Keep the weights of the lowest validation loss (without validation: of the lowest mean training loss of an epoch) "
        "as `best`; absent = only with validation.", resume="free",
    )  # fmt: skip
    release: bool = param(True, "At the end, write a release folder that can be loaded or shared.", resume="free")
    comment: str | None = param(None, "Remark stored in the metadata of adapter files.", flat=("training_comment",),
                                resume="free", when=_ADAPTER)  # fmt: skip
    title: str | None = _modelspec("Title", "; absent = run.name")
    author: str | None = _modelspec("Author")
    description: str | None = _modelspec("Description")
    license: str | None = _modelspec("License")
    tags: str | None = _modelspec("Tags, separated by commas,")
