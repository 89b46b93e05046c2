"""Folding the changes of adapter files into the weights of a model, as it is or while it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.attach import adaptable_paths
from musubi_tuner.adapters.files import AdapterFile, adapter_of, group_by_layer, left_out, read_adapter
from musubi_tuner.adapters.norm import scale_name
from musubi_tuner.config import RunConfig
from musubi_tuner.errors import CheckpointError
from musubi_tuner.models.spec import AdapterTargets


@dataclass
class MergeReport:
    """What merging a file did.

    Attributes:
        layers: how many changed. ratio: norm of all changes over the norm of these layers' weights.
        skipped: keys that belong to no layer.
    """

    layers: int
    ratio: float
    skipped: list[str]


class Merging:
    """Adapters on their way into a model's weights, layer by layer; call it with a path and the weight in float32.

    Args:
        tensors: of one file, under musubi names. paths: all layers of the model that can be adapted.

    Raises:
        CheckpointError: listing keys that belong to no layer, or naming another kind of adapter.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        paths: list[str],
        multiplier: float = 1.0,
        *,
        ignore_unmatched: bool = False,
        what: str = "the adapter",
    ) -> None:
        self.layers, self.skipped = group_by_layer(tensors, paths)
        self.multiplier, self.what = multiplier, what
        self.changed = self.total = 0.0
        if self.skipped and not ignore_unmatched:
            raise CheckpointError(
                f"{what}: {len(self.skipped)} keys belong to no layer of this model ({', '.join(self.skipped[:4])}); is it for "
                "another model? adapter.merge_ignore_unmatched = true skips them"
            )

    def __call__(self, path: str, weight: Tensor) -> Tensor:
        """The weight with its change; the very same tensor if it has none.

        Raises:
            CheckpointError: if the change is damaged, or of another shape.
        """
        if path not in self.layers:
            return weight
        adapter = adapter_of(self.layers[path], weight.shape, f"{self.what}: {path}").to(weight.device)
        adapter.multiplier = self.multiplier
        changed = adapter.changed(weight)
        self.changed += float((changed - weight).square().sum())
        self.total += float(weight.square().sum())
        return changed

    @property
    def report(self) -> MergeReport:
        """What has been merged so far."""
        ratio = (self.changed / self.total) ** 0.5 if self.total else 0.0
        return MergeReport(len(self.layers), ratio, self.skipped)


@torch.no_grad()
def merge(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    targets: AdapterTargets,
    multiplier: float = 1.0,
    *,
    ignore_unmatched: bool = False,
    what: str = "the adapter",
) -> MergeReport:
    """Add an adapter's changes to a model's weights, in float32, stored in their own dtype.

    Args:
        tensors: under musubi names.

    Raises:
        CheckpointError: listing keys that belong to no layer, or layers of another shape.
    """
    paths = adaptable_paths(model, targets)
    merging = Merging(tensors, paths, multiplier, ignore_unmatched=ignore_unmatched, what=what)
    for path in merging.layers:
        layer = model.get_submodule(path)
        weight = layer._parameters[scale_name(layer) or "weight"]
        assert weight is not None
        weight.copy_(merging(path, weight.float()).to(weight.dtype))
    return merging.report


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
