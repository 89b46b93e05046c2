"""LPIPS, the perceptual distance of Zhang et al. 2018 (arXiv:1801.03924), version 0.1 on VGG16; without torchvision.

    distance = sum over five layers of   mean over places of   sum over channels of   w (f(x) - f(y))^2

f are features of VGG16 behind the last activation of each of its five blocks, divided by their length over channels; w are the
published linear weights, one per channel. Both networks are frozen; the gradient goes to the first picture.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.config import RunConfig
from musubi_tuner.encoders.locate import source
from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.models.fluxflow.settings import model_of
from musubi_tuner.weights.checkpoints import copy_weights, find_weights, read_weights

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of the convolutions of VGG16; a halving stands between two blocks."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""From [-1, 1] to what VGG16 was trained on."""
EPS = 1e-10


def vgg_features() -> tuple[nn.Sequential, list[int]]:
    """The convolutions of VGG16 under their usual numbers, and the numbers of the layers whose output counts."""
    layers: list[nn.Module] = []
    taken, inputs = [], 3
    for block in BLOCKS:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for width in block:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        taken.append(len(layers) - 1)
    return nn.Sequential(*layers), taken


class Lpips(nn.Module):
    """The distance. Weights are random until they are loaded; see `load_lpips`."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features, self.taken = vgg_features()
        self.linear = nn.ParameterList(torch.rand(block[-1]) for block in BLOCKS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """Features of five layers, of length 1 at every place."""
        x, found = (images_BCHW - self.shift) / self.scale, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.taken:
                found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + EPS))
        return found

    def forward(self, pred_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Distance [B] of pictures in [-1, 1]; no gradient reaches the second."""
        with torch.no_grad():
            wanted = self.maps(target_BCHW)
        total = pred_BCHW.new_zeros(len(pred_BCHW))
        for own, other, weight in zip(self.maps(pred_BCHW), wanted, self.linear, strict=True):
            total = total + F.conv2d((own - other).square(), weight.view(1, -1, 1, 1)).mean(dim=(1, 2, 3))
        return total.float()


def load_lpips(config: RunConfig, device: torch.device) -> Lpips:
    """LPIPS with the weights that a run names, frozen.

    Raises:
        ConfigError: if a key is missing. CheckpointError: if a file holds something else.
    """
    settings, found = model_of(config), Lpips()
    if settings.vgg_path is None:
        raise ConfigError(
            "model.vgg_path: is needed for objective.use_lpips; give VGG16 weights (a file, a folder, or a hub id such as timm/vgg16.tv_in1k)"
        )
    place = source("model.vgg_path", settings.vgg_path, config.locate(settings.vgg_path)).resolve()
    assert place is not None
    vgg = read_weights(find_weights(place) if place.is_dir() else place)
    own = {key.removeprefix("features."): t for key, t in vgg.tensors.items() if key.startswith("features.")}
    copy_weights(found.features, own, f"model.vgg_path: {vgg.path}")
    linear = linear_weights(config)
    tensors = read_weights(linear).tensors
    for number, weight in enumerate(found.linear):
        key = next(
            (key for key in (f"lin{number}.model.1.weight", f"lins.{number}.model.1.weight") if key in tensors), None
        )
        if key is None or tensors[key].numel() != weight.numel():
            raise CheckpointError(
                f"model.lpips_path: {linear}: holds no linear weights of LPIPS on VGG16 (lin{number}.model.1.weight)"
            )
        weight.copy_(tensors[key].flatten())
    return found.to(device).eval()


def linear_weights(config: RunConfig) -> Path:
    """The file of the linear weights: as given, else that of the package lpips, which is not imported.

    Raises:
        ConfigError: if there is neither.
    """
    given = model_of(config).lpips_path
    if given is not None:
        path = config.locate(given)
        if not path.is_file():
            raise ConfigError(f"model.lpips_path: {given}: no such file")
        return path
    spec = importlib.util.find_spec("lpips")
    for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        path = Path(folder) / "weights" / "v0.1" / "vgg.pth"
        if path.is_file():
            return path
    raise ConfigError(
        "model.lpips_path: is needed for objective.use_lpips; give vgg.pth of LPIPS v0.1, or pip install lpips, whose file is then read"
    )
