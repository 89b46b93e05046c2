"""What is wrong with a config, found all at once and printed together."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Diagnostic:
    """One finding.

    Attributes:
        level: an error refuses the start; a warning is shown and the run goes on; info is shown in the plan.
        key: dotted TOML key or file the finding is about.
        message: what was found, what was expected, what to do.
    """

    level: Level
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


WHOLE_MODEL = (
    "is not built: every process holds the whole model; memory.base_storage and memory.blocks_to_swap save memory"
)
WHOLE_GRADIENT = "is not built: gradients are clipped and checked together before the optimizer steps"
FLOAT32 = "is not built: what trains is held in float32; train.mixed_precision sets what is computed in"
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(("fsdp", "fsdp2", "deepspeed", "zero_stage"), WHOLE_MODEL),
    **dict.fromkeys(("fused_backward", "fused_backward_pass"), WHOLE_GRADIENT),
    **dict.fromkeys(("full_bf16", "full_fp16", "full_half", "stochastic_rounding"), FLOAT32),
}
"""Settings of other trainers that are refused by name, and why."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def format_problems(source: str, problems: list[Diagnostic]) -> str:
    """All errors as one message: a count, then one indented line each."""
    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    return "\n  ".join([f"{source}: {count}", *(str(problem) for problem in problems)])
