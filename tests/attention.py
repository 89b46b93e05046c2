"""Sol's statistics from whole attention tensors, which the teacher itself never keeps."""

from collections.abc import Iterable

from torch import Tensor

from musubi_tuner.encoders.teachers import MAP_SIZE, LayerSums, combine_layers


def reduce_attention(
    layers: Iterable[tuple[Tensor, tuple[int, int]]], batch: int, size: int = MAP_SIZE
) -> tuple[Tensor, Tensor]:
    """Stats [B, 3] and map [B, size, size].

    Args:
        layers: (probabilities [B, heads, n, n], grid); those of another batch, or whose grid is not n, are left out.
    """
    sums = []
    for probabilities, grid in layers:
        if probabilities.shape[0] == batch and grid[0] * grid[1] == probabilities.shape[-1]:
            layer = LayerSums.empty(batch, grid, probabilities.device)
            layer.add(probabilities, 0)
            sums.append(layer)
    return combine_layers(sums, size)
