"""The adapter files that a run merges into its frozen model while that is loaded."""

from collections.abc import Sequence

from torch import Tensor

from musubi_tuner.adapters.attach import Merging
from musubi_tuner.adapters.files import read_adapter
from musubi_tuner.config import RunConfig


class RunMerges:
    """adapter.merge of a run, as one function of a layer's path and weight.

    Args:
        paths: all layers of the model that can be adapted.

    Attributes:
        changed: paths of the layers that it has changed.

    Raises:
        CheckpointError: if a file does not fit. ConfigError: if it was trained with padding hidden and the run is not.
    """

    def __init__(self, config: RunConfig, paths: list[str]) -> None:
        settings, self.changed = config.adapter, set[str]()
        multipliers = settings.merge_multipliers or [1.0] * len(settings.merge)
        self.files: list[tuple[str, float, list[str], Merging]] = []
        for source, multiplier in zip(settings.merge, multipliers, strict=True):
            file = read_adapter(config.locate(source), config.spec, ignore_unmatched=settings.merge_ignore_unmatched)
            file.check_padding(config, "adapter.merge")
            merging = Merging(
                file.tensors,
                paths,
                multiplier,
                ignore_unmatched=settings.merge_ignore_unmatched,
                what=f"adapter.merge: {file.path}",
            )
            self.files.append((file.path.name, multiplier, file.skipped, merging))

    def __call__(self, path: str, weight: Tensor) -> Tensor:
        """The weight with the changes of all files."""
        before = weight
        for _, _, _, merging in self.files:
            weight = merging(path, weight)
        if weight is not before:
            self.changed.add(path)
        return weight

    def notes(self) -> list[str]:
        """What was merged, for the person."""
        return [
            f"merged {name} at {multiplier:g} into {merging.report.layers} layers: changes {merging.report.ratio:.2%} of their norm"
            + left_out([*skipped, *merging.skipped])
            for name, multiplier, skipped, merging in self.files
        ]


def left_out(keys: Sequence[str]) -> str:
    """Names the keys of a file that are not used."""
    return f"; not used: {len(keys)} keys ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})" if keys else ""
