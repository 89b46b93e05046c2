"""The adapter files that a run merges into its frozen model while that is loaded."""

from torch import Tensor

from musubi_tuner.adapters.attach import Merging
from musubi_tuner.adapters.files import AdapterFile, left_out, read_adapter
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
        self.files: list[tuple[AdapterFile, float, Merging]] = []
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
            self.files.append((file, multiplier, merging))

    def __call__(self, path: str, weight: Tensor) -> Tensor:
        """The weight with the changes of all files."""
        before = weight
        for _, _, merging in self.files:
            weight = merging(path, weight)
        if weight is not before:
            self.changed.add(path)
        return weight

    def notes(self) -> list[str]:
        """What was merged, for the person."""
        return [
            f"merged {file.path.name} at {multiplier:g} into {merging.report.layers} layers: changes "
            f"{merging.report.ratio:.2%} of their norm{file.remarks}{left_out(merging.skipped)}"
            for file, multiplier, merging in self.files
        ]
