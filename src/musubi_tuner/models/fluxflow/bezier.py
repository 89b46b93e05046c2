"""Cubic Bezier curves as activations.

    Bez(t; p0, p1, p2, p3) = u^3 p0 + 3 u^2 t p1 + 3 u t^2 p2 + t^3 p3          u = 1 - t

`BezierActivation` takes t and the control points from its input: five channels in, one out, in groups of neighbours. It keeps
only that input for the backward pass and computes everything else again. `TrainableBezier` learns the control points.

Values are computed by de Casteljau's scheme, whose last two points e and d also give the slope, 3 (e - d).
"""

from typing import Any

import torch
from torch import Tensor, nn

PRE_ACTIVATIONS = ("none", "sigmoid", "tanh", "silu")
CHUNK = 1 << 16
"""Values that a CPU works on at a time, so that its intermediate values stay in the cache."""
LARGE_CHUNK = 1 << 24
"""The same for other devices, where it bounds the memory of intermediate values; and for tensors without storage."""


def _activate(x: Tensor, kind: str) -> Tensor:
    if kind == "none":
        return x
    if kind == "sigmoid":
        return x.sigmoid()
    return x.tanh() if kind == "tanh" else nn.functional.silu(x)


def _chain(grad: Tensor, x: Tensor, activated: Tensor, kind: str) -> Tensor:
    """Gradient in front of a pre-activation from the one behind it, which it may overwrite."""
    if kind == "none":
        return grad
    if kind == "sigmoid":
        return torch.ops.aten.sigmoid_backward(grad, activated)
    if kind == "tanh":
        return torch.ops.aten.tanh_backward(grad, activated)
    return torch.ops.aten.silu_backward(grad, x)


def _curve(t: Tensor, points: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The last two points of de Casteljau's scheme; the value lies between them at t."""
    p0, p1, p2, p3 = points
    middle = p1.lerp(p2, t)
    return p0.lerp(p1, t).lerp_(middle, t), middle.lerp_(p2.lerp(p3, t), t)


def _parts(x: Tensor, axis: int) -> tuple[Tensor, ...]:
    """t, p0, p1, p2, p3 of an input whose channels are on an axis, as views."""
    return x.unflatten(axis, (-1, 5)).unbind(axis + 1 if axis >= 0 else axis)


def _pieces(x: Tensor, axis: int) -> list[slice]:
    """Slices of output channels to work on one after another."""
    channels = x.shape[axis] // 5
    if not x.numel():
        return [slice(None)]
    size = CHUNK if x.device.type == "cpu" and type(x) is Tensor else LARGE_CHUNK
    step = max(1, size * channels * 5 // x.numel())
    return [slice(start, start + step) for start in range(0, channels, step)]


class _Bezier(torch.autograd.Function):
    """Value and gradient of the channel form; saves its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t_pre: str, p_pre: str, axis: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = t_pre, p_pre, axis
        raw = _parts(x, axis)
        y = torch.empty_like(raw[0], memory_format=torch.contiguous_format)
        at = (slice(None),) * axis if axis >= 0 else (...,)
        for piece in _pieces(x, axis):
            where = (*at, piece)
            t, *points = (_activate(part[where], kind) for part, kind in zip(raw, (t_pre, *[p_pre] * 4), strict=True))
            lower, upper = _curve(t, points)
            torch.lerp(lower, upper, t, out=y[where])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        t_pre, p_pre, axis = ctx.settings
        raw, out = _parts(x, axis), torch.empty_like(x)
        parts = _parts(out, axis)
        at = (slice(None),) * axis if axis >= 0 else (...,)
        for piece in _pieces(x, axis):
            where = (*at, piece)
            x_t, *x_points = (part[where] for part in raw)
            t, points, g = _activate(x_t, t_pre), [_activate(p, p_pre) for p in x_points], grad[where]
            lower, upper = _curve(t, points)
            parts[0][where] = _chain((upper.sub_(lower)).mul_(3).mul_(g), x_t, t, t_pre)
            u = 1 - t
            gu, gt = g * u, g * t
            middle = gu.mul(t).mul_(3)
            factors = (gu.mul_(u).mul_(u), middle * u, middle * t, gt.mul_(t).mul_(t))
            for target, factor, source, point in zip(parts[1:], factors, x_points, points, strict=True):
                target[where] = _chain(factor, source, point, p_pre)
        return out, None, None, None


class BezierActivation(nn.Module):
    """Channel form: 5 F channels -> F, in groups of five neighbours t, p0, p1, p2, p3. Without parameters.

    The channel axis is the last of inputs with two or three axes, [B, 5F] and [B, S, 5F], and axis 1 of [B, 5F, H, W, ...].

    Args:
        t_pre, p_pre: activation in front of t and of the control points, one of `PRE_ACTIVATIONS`.

    Raises:
        ValueError: for another activation, or channels that are no multiple of 5.
    """

    def __init__(self, t_pre: str = "sigmoid", p_pre: str = "none") -> None:
        super().__init__()
        for name, kind in (("t_pre", t_pre), ("p_pre", p_pre)):
            if kind not in PRE_ACTIVATIONS:
                raise ValueError(f"{name} is '{kind}'; known: {', '.join(PRE_ACTIVATIONS)}")
        self.t_pre, self.p_pre = t_pre, p_pre

    def forward(self, x: Tensor) -> Tensor:
        axis = 1 if x.ndim >= 4 else x.ndim - 1
        if x.shape[axis] % 5:
            raise ValueError(
                f"{x.shape[axis]} channels are no multiple of 5: t and four control points make one output"
            )
        return _Bezier.apply(x, self.t_pre, self.p_pre, axis)

    def extra_repr(self) -> str:
        return f"t_pre={self.t_pre}, p_pre={self.p_pre}"


DEFAULT_POINTS = (1e-8, 0.25, 0.75, 1.0)


class TrainableBezier(nn.Module):
    """Parametric form: control points are parameters ``p0`` to ``p3``, t is the sigmoid of the input; keeps its shape.

    The output stays between the smallest and the largest control point.

    Args:
        shape: of the control points: (C,) for inputs [..., C], or (C, 1, 1) for [B, C, H, W].
        points: values that they begin with.
        channel_only: control points of shape (C,) lie along axis 1 of [B, C, H, W].
    """

    p0: Tensor
    p1: Tensor
    p2: Tensor
    p3: Tensor

    def __init__(
        self,
        shape: int | tuple[int, ...],
        points: tuple[float, float, float, float] = DEFAULT_POINTS,
        channel_only: bool = False,
    ) -> None:
        super().__init__()
        for name, value in zip(("p0", "p1", "p2", "p3"), points, strict=True):
            self.register_parameter(
                name, nn.Parameter(torch.full((shape,) if isinstance(shape, int) else shape, value))
            )
        self.channel_only = channel_only

    def forward(self, x: Tensor) -> Tensor:
        points = [self.p0, self.p1, self.p2, self.p3]
        if self.channel_only:
            points = [point.view(-1, *[1] * (x.ndim - 2)) for point in points]
        p0, p1, p2, p3 = points
        t = x.sigmoid()
        u = 1 - t
        return u**3 * p0 + 3 * u.square() * t * p1 + 3 * u * t.square() * p2 + t**3 * p3
