"""The start of a new autoencoder: every layer before a Bezier activation gives values of spread 1.

A cubic of five channels shrinks what depends on the picture about fortyfold per stage when its layer has the usual start values; after
four stages nothing is left, and no gradient comes back (docs/fluxflow.md). Layers are scaled in the order in which they are called, on
pictures of the data, as in LSUV (Mishkin and Matas 2015, arXiv:1511.06422): each sees what those before it give when they are scaled.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musubi_tuner.flow import unpack_pixels
from musubi_tuner.models.fluxflow import losses
from musubi_tuner.models.fluxflow.autoencoder import Compressor, Expander, Spade
from musubi_tuner.models.fluxflow.bezier import BezierActivation

LEAST_SPREAD = 1e-4
"""Of mu over pictures: less means that the latents say nothing about them."""


def initialize(part: nn.Module) -> None:
    """Start values of a new part that need no data: modulation begins as the identity, shortcuts keep what they are given."""
    for module in part.modules():
        if isinstance(module, Spade):
            for layer in (module.mlp_gamma, module.mlp_beta):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    for shortcut in getattr(part, "shortcuts", None) or ():
        nn.init.orthogonal_(shortcut.weight)
        nn.init.zeros_(shortcut.bias)


def _layers(*modules: nn.Module) -> Iterator[nn.Module]:
    """Layers right before a Bezier activation."""
    for module in modules:
        for sequence in module.modules():
            if isinstance(sequence, nn.Sequential):
                children = list(sequence)
                yield from (
                    layer for layer, after in itertools.pairwise(children) if isinstance(after, BezierActivation)
                )


def _scale(layer: nn.Module, output: Tensor, per_channel: bool) -> Tensor:
    """Change a layer so that its output has spread 1, and per channel mean 0 where it has a bias; returns that output."""
    axis = 1 if output.ndim >= 4 else output.ndim - 1
    others = [other for other in range(output.ndim) if other != axis]
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    shape = [-1 if other == axis else 1 for other in range(output.ndim)]
    if per_channel:
        mean, spread = output.mean(dim=others), output.std(dim=others)
    else:
        mean, spread = output.new_zeros(output.shape[axis]), output.std().expand(output.shape[axis])
    spread = spread.clamp(min=1e-8)
    mean = mean if isinstance(bias, Tensor) else torch.zeros_like(mean)
    # The output channels of a transposed convolution are on its second axis.
    out_axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    weight.div_(spread.view([-1 if other == out_axis else 1 for other in range(weight.ndim)]))
    if isinstance(bias, Tensor):
        bias.sub_(mean).div_(spread)
    return (output - mean.view(shape)) / spread.view(shape)


@torch.no_grad()
def calibrate(compressor: Compressor, expander: Expander, images_BCHW: Tensor, per_channel: bool) -> int:
    """Scale the layers of a new autoencoder; returns how many.

    Args:
        images_BCHW: pictures of the data, about 32. per_channel: every channel for itself, instead of whole layers.
    """
    scaled: list[nn.Module] = []

    def hook(layer: nn.Module, _: object, output: Tensor) -> Tensor:
        scaled.append(layer)
        return _scale(layer, output, per_channel)

    hooks = [layer.register_forward_hook(hook) for layer in _layers(compressor, expander)]
    try:
        mu, _, latent = compressor.encode(images_BCHW)
        height, width = mu.shape[-2:]
        expander.decode(unpack_pixels(compressor.tokens(mu, latent), height, width))
    finally:
        for each in hooks:
            each.remove()
    return len(scaled)


@dataclass
class Health:
    """What a start-up check finds.

    Attributes:
        spread: standard deviation of mu over pictures, averaged over places. gradient: largest of the first layer's.
    """

    spread: float
    gradient: float


def check(compressor: Compressor, expander: Expander, images_BCHW: Tensor, use_context: bool) -> Health:
    """Whether the latents answer to the pictures, and gradients reach the first layer."""
    first: Tensor = compressor.encoder_first_step[0][0].weight  # type: ignore[index,assignment]
    before = first.requires_grad
    first.requires_grad_()
    with torch.enable_grad():
        mu, _, latent = compressor.encode(images_BCHW)
        height, width = mu.shape[-2:]
        image = expander.decode(unpack_pixels(compressor.tokens(mu, latent), height, width), use_context)
        (gradient,) = torch.autograd.grad(losses.reconstruction(image, images_BCHW).mean(), first)
    first.requires_grad_(before)
    spread = float(mu.detach().std(dim=0).mean()) if len(mu) > 1 else float("nan")
    return Health(spread, float(gradient.abs().max()))
