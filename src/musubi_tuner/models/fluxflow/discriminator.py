"""FluxFlow's patch discriminator: convolutions with spectral norm, and a projection of the autoencoder's tokens.

    logits = conv(h) + <mean of h over places, MLP(context)>            W = W_orig / sigma,  sigma = u^T W_orig v

Spectral norm is Miyato et al. 2018 (arXiv:1802.05957), the projection Miyato and Koyama 2018 (arXiv:1802.05637). u and v are
buffers that stand still in a forward pass; `advance` moves them by one power iteration.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12
SLOPE = 0.2


class SpectralNorm(nn.Module):
    """A layer whose weight is divided by its largest singular value, with the names of torch's first form of it.

    Args:
        layer: Conv2d or Linear whose weight is taken over.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.weight_orig, self.bias = nn.Parameter(layer.weight.detach()), layer.bias
        self.padding = layer.padding if isinstance(layer, nn.Conv2d) else None
        rows, columns = self._matrix().shape
        self.register_buffer("weight_u", F.normalize(torch.randn(rows), dim=0, eps=EPS))
        self.register_buffer("weight_v", F.normalize(torch.randn(columns), dim=0, eps=EPS))

    def _matrix(self) -> Tensor:
        return self.weight_orig.flatten(1)

    @torch.no_grad()
    def advance(self) -> None:
        """One power iteration."""
        matrix = self._matrix().to(self.weight_u.dtype)
        self.weight_v.copy_(F.normalize(matrix.t() @ self.weight_u, dim=0, eps=EPS))
        self.weight_u.copy_(F.normalize(matrix @ self.weight_v, dim=0, eps=EPS))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            # Buffers are copied, because they may move between this pass and its backward.
            sigma = torch.dot(self.weight_u.clone(), torch.mv(self._matrix(), self.weight_v.clone()))
            weight = self.weight_orig / sigma
        if self.padding is None:
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


def conv(inputs: int, outputs: int) -> SpectralNorm:
    """A 3 x 3 convolution with spectral norm."""
    return SpectralNorm(nn.Conv2d(inputs, outputs, 3, padding=1))


def conv_pair(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions."""
    return nn.Sequential(conv(inputs, outputs), nn.LeakyReLU(SLOPE), conv(outputs, outputs))


class DownBlock(nn.Module):
    """Twice the width at half the sides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_pair(width, 2 * width), conv_pair(2 * width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), SLOPE)), SLOPE)
        return F.avg_pool2d(x, 2)


class PatchDiscriminator(nn.Module):
    """Tells pictures from decoded ones, patch by patch.

    Args:
        in_channels: of images. base_ch: width of the first layer. depth: halvings. ctx_dim: width of the context.
    """

    def __init__(self, in_channels: int = 3, base_ch: int = 64, depth: int = 4, ctx_dim: int = 128) -> None:
        super().__init__()
        widths = [base_ch * 2**level for level in range(depth + 1)]
        self.backbone = nn.Sequential(
            conv_pair(in_channels, base_ch), nn.LeakyReLU(SLOPE), *(DownBlock(width) for width in widths[:-1])
        )
        self.head = conv(widths[-1], 1)
        self.ctx_proj = nn.Sequential(
            SpectralNorm(nn.Linear(ctx_dim, widths[-1])),
            nn.LeakyReLU(SLOPE),
            SpectralNorm(nn.Linear(widths[-1], widths[-1])),
        )

    def forward(self, img: Tensor, ctx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [B, 1, h, w] and features [B, C].

        Args:
            img: [B, 3, H, W]. ctx: mean of the tokens of an image [B, D]; None = no projection.
        """
        h = self.backbone(img)
        features = h.mean(dim=(2, 3))
        logits = self.head(h)
        if ctx is not None:
            logits = logits + (features * self.ctx_proj(ctx)).sum(dim=1).view(-1, 1, 1, 1)
        return logits, features

    def advance(self) -> None:
        """Move u and v of all layers by one power iteration."""
        for module in self.modules():
            if isinstance(module, SpectralNorm):
                module.advance()
