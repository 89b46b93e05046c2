"""[hub]."""

from typing import Literal

from musubi_tuner.config.fields import MOST, Section, param
from musubi_tuner.config.when import on


class HubSection(Section):
    """Upload of a run to a repository on the hub; never stops the training."""

    tab = "saving"
    acts_when = on("hub.repo_id")

    repo_id: str | None = param(None, "Repository `owner/name`; absent = no upload.", flat=("huggingface_repo_id",),
                                resume="free")  # fmt: skip
    run_name: str | None = param(None, "Folder below checkpoint_runs/; absent = the run's name.", resume="free")
    private: bool = param(True, "Whether a newly created repository is private.", resume="free")
    token: str | None = param(None, "Access token; better set as the environment variable HF_TOKEN.", flat=("huggingface_token",),
                              secret=True, resume="free", tab="setup")  # fmt: skip
    every_steps: int = param(
        0, "Upload the newest checkpoint every so many updates; 0 here and below = every checkpoint when it is saved. The final "
        "one is always uploaded.", flat=("upload_every_steps",), ge=0, le=MOST, resume="free", unit="updates", when=on("save.every_steps") | on("save.every_epochs")
    )  # fmt: skip
    every_epochs: int = param(
        0,
        "Upload the newest checkpoint every so many epochs.",
        flat=("upload_every_epochs",),
        ge=0,
        le=MOST,
        resume="free",
        unit="epochs",
        when=on("save.every_steps") | on("save.every_epochs"),
    )
    release: Literal["final", "best", "none"] = param(
        "final", "Checkpoint that `owner/name` loads, at the root of the repository: the final one, or the best so far whenever "
        "there is a better one.", resume="free",
    )  # fmt: skip
    upload_samples: bool = param(
        True, "Upload the pictures that are drawn, to samples/.", resume="free", when=on("sample.prompts")
    )
    upload_logs: bool = param(
        True,
        "Upload TensorBoard events and metrics.jsonl to logs/, with each checkpoint and at the end.",
        resume="free",
    )
    upload_state: bool = param(
        False,
        "Upload states with the checkpoints, to continue elsewhere: several times as much data.",
        flat=("save_state_to_huggingface",),
        resume="free",
    )
    timeout_seconds: int = param(
        600,
        "Time limit of an upload, for its three attempts together; then it is given up.",
        ge=1,
        le=MOST,
        resume="free",
        unit="seconds",
    )
    retry_seconds: float = param(
        5.0,
        "Pause before the second attempt; four times as long before the third.",
        ge=0,
        le=3600,
        resume="free",
        unit="seconds",
    )
    finish_seconds: int = param(
        1800, "How long a run waits at the end for remaining uploads; those that are left are listed.", ge=0, le=MOST, resume="free", unit="seconds"
    )  # fmt: skip
