"""Orthogonal fine-tuning of a Linear layer: Diag-OFT (Qiu et al. 2023, arXiv:2306.07280) and BOFT (Liu et al. 2023, arXiv:2311.06243).

    R = (I + Q) (I - Q)^-1, Q = P - P'        Cayley: a rotation for any square P

Diag-OFT rotates blocks of outputs, W' = R' W block by block; BOFT goes through log2(blocks) + 1 stages that mix ever more distant
outputs. P begins as zero. Files and strengths are as in LyCORIS: a multiplier blends with the identity, in BOFT stage by stage.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.base import Adapter, Base, Bias, blend
from musubi_tuner.adapters.lokr import divide


class DiagOFT(Adapter):
    """Rotations of blocks of outputs.

    Args:
        rank: size of a block; the nearest size that `block_shape` finds is taken. alpha: of a file: the constraint.
        constraint: limit of |Q| for each output; 0 = none. rescaled: train a factor of each output too.
        shape: of ``oft_blocks`` of a file.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float = 0.0,
        *,
        constraint: float = 0.0,
        rescaled: bool = False,
        shape: tuple[int, ...] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, **options)
        self.oft_blocks = nn.Parameter(torch.zeros(shape or self.block_shape(out_features, rank), dtype=torch.float32))
        self.rescale = nn.Parameter(torch.ones(out_features, 1, dtype=torch.float32)) if rescaled else None
        self.register_buffer("alpha", torch.tensor(float(constraint)))
        self.limit = float(constraint) * out_features

    @staticmethod
    def block_shape(size: int, wanted: int) -> tuple[int, ...]:
        """Shape of the blocks of so many outputs: [blocks, side, side]."""
        side, count = divide(size, wanted)
        return count, side, side

    @classmethod
    def sizes_of(cls, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        blocks = tuple(parts["oft_blocks"].shape)
        if blocks[-3] * blocks[-1] != shape[0] or blocks[-1] != blocks[-2]:
            raise ValueError(f"oft_blocks is {list(blocks)}, the layer has {shape[0]} outputs")
        return {
            "rank": blocks[-1],
            "constraint": float(parts.get("alpha", 0.0)),
            "rescaled": "rescale" in parts,
            "shape": blocks,
        }

    def take_alpha(self) -> None:
        self.limit = float(self.alpha) * self.out_features

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        self.oft_blocks.zero_()

    def rotations(self) -> Tensor:
        """R of all blocks, float32."""
        with torch.autocast(self.oft_blocks.device.type, enabled=False):
            turn = self.oft_blocks.float()
            turn = turn - turn.transpose(-1, -2)
            if self.limit:
                turn = turn * (self.limit / (turn.norm() + 1e-8)).clamp(max=1)
            one = torch.eye(turn.shape[-1], device=turn.device).expand(turn.shape)
            return torch.linalg.solve(one - turn, one + turn)

    def rotate(self, y: Tensor, share: float) -> Tensor:
        """Outputs [..., out] rotated and rescaled, at a strength."""
        count, side, _ = self.oft_blocks.shape
        turned = torch.einsum("knm,...kn->...km", self.rotations(), self.cast(y).unflatten(-1, (count, side))).flatten(
            -2
        )
        return blend(y, turned if self.rescale is None else turned * self.rescale.flatten(), share)

    def apply_to(self, x: Tensor, base: Base, bias: Bias) -> Tensor:
        out = base(x)
        if self.skips():
            return out + self.nothing().to(out.dtype)
        offset, after = bias(), self.rotate(out, self.multiplier)
        if offset is not None:
            after = after + (offset - self.rotate(offset, self.multiplier))
        return after.to(out.dtype)

    @torch.no_grad()
    def changed(self, weight: Tensor) -> Tensor:
        place = self.oft_blocks.device
        return self.rotate(weight.T.to(place), self.multiplier).T.to(weight.device).contiguous()


class BOFT(DiagOFT):
    """Rotations in butterfly stages; ``oft_blocks`` is [stages, blocks, side, side], its side even and its blocks a power of two."""

    @staticmethod
    def block_shape(size: int, wanted: int) -> tuple[int, ...]:
        odd = size
        while odd % 2 == 0:
            odd //= 2
        sides = [odd * 2**k for k in range(1, int(math.log2(size // odd)) + 1)]
        if not sides:
            raise ValueError(f"BOFT needs an even number of outputs, the layer has {size}")
        side = max((each for each in sides if each <= wanted), default=sides[0])
        return int(math.log2(size // side)) + 1, size // side, side, side

    def rotate(self, y: Tensor, share: float) -> Tensor:
        side = self.oft_blocks.shape[-1]
        one = torch.eye(side, device=y.device)
        turned = self.cast(y)
        for stage, turn in enumerate(self.rotations()):
            turn = blend(one, turn, share)
            width = 2**stage * (side // 2)
            # Outputs that are ``width`` apart come together in a block, and go back behind it.
            turned = turned.unflatten(-1, (-1, 2, width)).transpose(-2, -1).flatten(-3).unflatten(-1, (-1, side))
            turned = torch.einsum("bij,...bj->...bi", turn, turned).flatten(-2)
            turned = turned.unflatten(-1, (-1, width, 2)).transpose(-2, -1).flatten(-3)
        return turned if self.rescale is None else turned * self.rescale.flatten()
