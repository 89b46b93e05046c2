"""The two SD1.5 teachers and what is kept of a forward pass.

    Lune   mean of the U-Net's mid-block output over space: [E]
    Sol    of every self-attention layer: locality, entropy and where attention goes, averaged over layers:
           stats [locality, entropy, clustering], map [8, 8] that sums to 1

Sol never holds a layer's attention: the processor walks over blocks of queries, keeps three small sums per layer and
produces the layer's normal output on the way. Peak memory does not grow with the number of layers.

For one layer on an h x w grid, with P the attention probabilities averaged over heads (float32):
    entropy    mean over queries of -sum_k P ln P, divided by ln(h w), clamped to [0, 1]
    locality   1 - mean over queries of sum_k P * distance(q, k) / largest distance, clamped to [0, 1]
    map        sum over queries of P, on the grid, resized bilinearly to 8 x 8
Across layers: plain means; clustering = 1 - entropy; the map is divided by its sum.

`SplitTeacher` sends as many pictures through a teacher at once as its memory allows. `geometric_sol` needs no teacher.
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from musubi_tuner.errors import CacheError, CheckpointError
from musubi_tuner.weights.checkpoints import read_weights, strip_wrappers
from musubi_tuner.weights.sources import materialize, on_meta, read_source

logger = logging.getLogger(__name__)

MAP_SIZE = 8
QUERY_BLOCK_BYTES = 64 << 20
"""Attention probabilities held at once, in bytes; sets how many queries are walked together."""
OVERLAY_SHARE = 0.99
"""An overlay must provide at least this share of the U-Net's keys."""
OVERLAY_SHOWN = 8
"""So many keys are named where an overlay and the U-Net differ."""
ORIGINAL_PREFIX = "model.diffusion_model."
"""Of the U-Net's keys in a whole checkpoint as Stable Diffusion was published."""

SD15_UNET_CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


@dataclass
class LayerSums:
    """Running reduction of one attention layer.

    Attributes:
        grid: (h, w). entropy, distance: sums over queries [B]. received: [B, h * w]. queries: how many were seen.
    """

    grid: tuple[int, int]
    entropy: Tensor
    distance: Tensor
    received: Tensor
    queries: int = 0

    @classmethod
    def empty(cls, batch: int, grid: tuple[int, int], device: torch.device) -> "LayerSums":
        """Nothing seen yet."""
        zeros = torch.zeros(batch, device=device)
        return cls(grid, zeros, zeros.clone(), torch.zeros(batch, grid[0] * grid[1], device=device))

    def add(self, probabilities_BAQK: Tensor, first_query: int) -> None:
        """Take in the attention of a block of queries, averaged over heads here."""
        mean = probabilities_BAQK.float().mean(dim=1)
        floor = mean.clamp(min=1e-8)
        self.entropy += -(floor * floor.log()).sum(dim=(1, 2))
        self.distance += (mean * grid_distance(self.grid, first_query, mean.shape[1], mean.device)).sum(dim=(1, 2))
        self.received += mean.sum(dim=1)
        self.queries += mean.shape[1]

    def statistics(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Locality [B], entropy [B] and map [B, size, size] of the layer, the map not yet normalised."""
        height, width = self.grid
        tokens = height * width
        entropy = (self.entropy / self.queries / math.log(max(tokens, 2))).clamp(0, 1)
        longest = math.hypot(height - 1, width - 1) or 1.0
        locality = (1 - self.distance / self.queries / longest).clamp(0, 1)
        received = self.received.view(-1, 1, height, width)
        resized = F.interpolate(received, size=(size, size), mode="bilinear", align_corners=False)[:, 0]
        return locality, entropy, resized


def grid_distance(grid: tuple[int, int], first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Euclidean distance of ``count`` grid points from ``first`` on to all points, [count, h * w] float32."""
    height, width = grid
    index = torch.arange(height * width, device=device)
    rows, columns = (index // width).float(), (index % width).float()
    chosen = slice(first, first + count)
    return torch.sqrt((rows[chosen, None] - rows[None]).square() + (columns[chosen, None] - columns[None]).square())


def combine_layers(layers: Sequence[LayerSums], size: int = MAP_SIZE) -> tuple[Tensor, Tensor]:
    """Average layers into stats [B, 3] and a map [B, size, size] that sums to 1.

    Values that are not finite become 0.5 in the stats and uniform in the map, as published.

    Raises:
        CacheError: if there is no layer.
    """
    if not layers:
        raise CacheError("Sol: no self-attention layer was captured; is this U-Net an SD1.5 U-Net of diffusers?")
    parts = [layer.statistics(size) for layer in layers]
    locality = torch.stack([part[0] for part in parts]).mean(0)
    entropy = torch.stack([part[1] for part in parts]).mean(0)
    spatial = torch.stack([part[2] for part in parts]).mean(0)
    spatial = spatial / spatial.sum(dim=(1, 2), keepdim=True).clamp(min=1e-8)
    stats = torch.stack((locality, entropy, 1 - entropy), dim=-1)
    return torch.nan_to_num(stats, nan=0.5), torch.nan_to_num(spatial, nan=1 / (size * size))


def geometric_sol(t_B: Tensor, size: int = MAP_SIZE) -> tuple[Tensor, Tensor]:
    """A stand-in for Sol's features that knows the time alone, as TinyFlux v4.1 had it.

    Its author calls it wrong: near noise the corners of the map are negative.

    Args:
        t_B: data fraction, 0 = noise, 1 = image.

    Returns:
        Stats [B, 3]: locality 1 - t, entropy t, clustering 0.5 - 0.3 |t - 0.5|; and the map 1 - r (1 - t), with r the
        distance from the centre of [-1, 1]^2, divided by its sum, [B, size, size].
    """
    t = t_B.float()
    stats = torch.stack((1 - t, t, 0.5 - 0.3 * (t - 0.5).abs()), dim=-1)
    axis = torch.linspace(-1, 1, size, device=t.device)
    radius = torch.sqrt(axis[:, None].square() + axis[None, :].square())
    spatial = 1 - radius * (1 - t).view(-1, 1, 1)
    return stats, spatial / spatial.sum(dim=(1, 2), keepdim=True)


@dataclass
class Capture:
    """What one forward pass leaves behind; filled by the processors, if Sol is wanted, and by the mid-block hook."""

    sol: bool = True
    layers: list[LayerSums] = field(default_factory=list)
    mid: Tensor | None = None


class StreamingAttention:
    """Attention processor of diffusers that reduces self-attention while computing it.

    ``grid`` is set before each call by a hook on the enclosing transformer, from its feature map.
    """

    def __init__(self, owner: "Teacher") -> None:
        self.owner = owner
        self.grid: tuple[int, int] | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Same output as the library's processor, without a mask: as SD1.5 was trained, padding of the text takes part."""
        assert attention_mask is None
        residual, shape, grid = hidden_states, hidden_states.shape, self.grid
        if hidden_states.ndim == 4:
            grid = (shape[2], shape[3])
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        is_self = encoder_hidden_states is None
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if not is_self and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        record = is_self and grid is not None and grid[0] * grid[1] == q.shape[2]
        capture = self.owner.capture
        if record and capture is not None and capture.sol:
            assert grid is not None
            out = self._walk(attn, q, k, v, grid, capture)
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2).to(residual.dtype)))
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor

    def _walk(self, attn: Any, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], capture: Capture) -> Tensor:
        batch, heads, queries, _ = q.shape
        sums = LayerSums.empty(batch, grid, q.device)
        step = max(1, QUERY_BLOCK_BYTES // (batch * heads * k.shape[2] * 4))
        out = torch.empty_like(q)
        for start in range(0, queries, step):
            block = slice(start, start + step)
            logits = (q[:, :, block] @ k.transpose(-1, -2)).float() * attn.scale
            probabilities = logits.softmax(dim=-1)
            sums.add(probabilities, start)
            out[:, :, block] = probabilities.to(v.dtype) @ v
        capture.layers.append(sums)
        return out


class Teacher:
    """A frozen SD1.5 U-Net with capture of Lune and Sol features."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.capture: Capture | None = None
        from diffusers.models.attention_processor import Attention
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        unet.mid_block.register_forward_hook(self._keep_mid)  # type: ignore[union-attr]  # diffusers' U-Net has one
        for module in unet.modules():
            if isinstance(module, Transformer2DModel):
                processors = []
                for inner in module.modules():
                    if isinstance(inner, Attention):
                        processor = StreamingAttention(self)
                        inner.set_processor(processor)  # type: ignore[arg-type]  # any callable of this form works
                        processors.append(processor)
                module.register_forward_pre_hook(_grid_setter(processors), with_kwargs=True)

    def _keep_mid(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.capture is not None:
            self.capture.mid = output

    @torch.no_grad()
    def features(
        self, latents: Tensor, timestep_B: Tensor, text: Tensor, *, lune: bool, sol: bool
    ) -> dict[str, Tensor]:
        """One forward pass.

        Args:
            latents: [B, 4, h, w]. timestep_B: in SD1.5's units 0 .. 1000, float.
            text: CLIP states [B, L, D], padding included.
            lune, sol: what to keep.

        Returns:
            ``lune_features`` [B, E], ``sol_stats`` [B, 3], ``sol_spatial`` [B, 8, 8], float32 on the CPU.

        Raises:
            CacheError: if the hooks did not fire (a compiled or foreign U-Net).
        """
        device, dtype = next(self.unet.parameters()).device, next(self.unet.parameters()).dtype
        self.capture = Capture(sol)
        try:
            self.unet(
                latents.to(device, dtype),
                timestep_B.to(device),
                encoder_hidden_states=text.to(device, dtype),
                return_dict=False,
            )
            captured = self.capture
        finally:
            self.capture = None
        found: dict[str, Tensor] = {}
        if lune:
            if captured.mid is None:
                raise CacheError("Lune: the U-Net's mid block was not captured; is it compiled?")
            found["lune_features"] = captured.mid.float().mean(dim=(2, 3)).cpu()
        if sol:
            stats, spatial = combine_layers(captured.layers)
            found["sol_stats"], found["sol_spatial"] = stats.cpu(), spatial.cpu()
        return found


class SplitTeacher:
    """A teacher that takes as many pictures per forward pass as memory allows."""

    def __init__(self, teacher: Teacher, name: str) -> None:
        """``name`` is for messages."""
        self.teacher, self.name = teacher, name
        self.most: int | None = None
        """Pictures that fit into memory together; None until too many were tried."""

    def features(
        self,
        latents: Tensor,
        timestep_B: Tensor,
        text: Tensor,
        *,
        lune: bool,
        sol: bool,
        together: int | None,
    ) -> dict[str, Tensor]:
        """`Teacher.features` of any number of pictures; the split changes them by rounding only.

        Args:
            together: pictures per forward pass; None = all, halved whenever the device's memory is too small. What fitted
                is kept for later calls.

        Raises:
            CacheError: if ``together`` pictures, or a single one, do not fit into memory.
        """
        parts: list[dict[str, Tensor]] = []
        start = 0
        while start < len(latents):
            count = min(together or self.most or len(latents), len(latents) - start)
            some = slice(start, start + count)
            try:
                parts.append(self.teacher.features(latents[some], timestep_B[some], text[some], lune=lune, sol=sol))
                start += count
                continue
            except torch.OutOfMemoryError:
                pass  # The error holds the frames of the forward pass: nothing is freed before this block ends.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if together is not None:
                raise CacheError(
                    f"{self.name}: {count} pictures in one forward pass do not fit into the device's memory; lower "
                    'experts.times_per_forward or cache.experts_batch_size, or write experts.times_per_forward = "auto"'
                )
            if count == 1:
                raise CacheError(
                    f"{self.name}: a single picture does not fit into the device's memory; end other programs there, or "
                    'choose experts.dtype = "float16" or a smaller experts.resolution'
                )
            self.most = count // 2
            logger.warning(
                "%s: %d pictures do not fit into the device's memory together; continuing with %d per forward pass",
                self.name, count, self.most,
            )  # fmt: skip
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _grid_setter(processors: list[StreamingAttention]) -> Any:
    def set_grid(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        for processor in processors:
            processor.grid = (hidden.shape[-2], hidden.shape[-1]) if hidden.ndim == 4 else None

    return set_grid


def load_teacher(
    unet: Path, overlay: Path | None, *, name: str, dtype: torch.dtype, device: torch.device | str
) -> Teacher:
    """Load an SD1.5 U-Net and lay a teacher's weights over it.

    Args:
        overlay: weight file; None = the U-Net as it is.
        name: ``lune`` or ``sol``, for messages.

    Raises:
        CheckpointError: if it is no such U-Net, in the names of diffusers or of an original checkpoint, or the overlay provides
            less than 99 % of its keys.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    tensors, config, file = read_source(unet)
    what = f"experts.unet: {file}"
    config = config or SD15_UNET_CONFIG
    values = {key: value for key, value in config.items() if not key.startswith("_")}
    original = {key: tensor for key, tensor in tensors.items() if key.startswith(ORIGINAL_PREFIX)}
    if original:
        try:
            tensors = convert_ldm_unet_checkpoint(original, values)
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{what}: is an original checkpoint, but not of an SD1.5 U-Net ({error!r})"
            ) from error
    module = on_meta(lambda: UNet2DConditionModel.from_config(values))
    materialize(module, tensors, f"{what}: is not this U-Net", dtype, device)
    if overlay is not None:
        _lay_over(module, overlay, f"experts.{name}: {overlay}")
    return Teacher(module)


def check_overlay(teacher: Teacher, overlay: Path, name: str) -> None:
    """Look, before hours of work with another teacher, whether an overlay will fit a U-Net of the same geometry.

    Raises:
        CheckpointError: as `load_teacher`.
    """
    _matching(teacher.unet, _shapes(overlay), f"experts.{name}: {overlay}")


def _shapes(path: Path) -> dict[str, torch.Size]:
    """Shapes of the tensors of a weight file, from its header where it has one."""
    if path.suffix in (".safetensors", ".sft"):
        with suppress(SafetensorError), safe_open(str(path), "pt") as file:
            keys = list(file.keys())
            return {strip_wrappers(key): torch.Size(file.get_slice(key).get_shape()) for key in keys}
    return {key: tensor.shape for key, tensor in read_weights(path).tensors.items()}


def _matching(module: nn.Module, shapes: Mapping[str, torch.Size], what: str) -> list[str]:
    """Keys of a module that an overlay has in the same shape, ``unet.`` left out of its names."""
    found = {key.removeprefix("unet."): shape for key, shape in shapes.items()}
    own = module.state_dict(keep_vars=True)
    matching = [key for key in own if found.get(key) == own[key].shape]
    if len(matching) < OVERLAY_SHARE * len(own):
        absent = [key for key in own if key not in set(matching)]
        raise CheckpointError(
            f"{what}: provides {len(matching)} of {len(own)} weights of the U-Net, expected at least "
            f"{OVERLAY_SHARE:.0%}; missing or of another shape: {', '.join(absent[:4])}, ..."
        )
    return matching


def _report_overlay(own: Collection[str], held: Collection[str], matching: Collection[str], what: str) -> None:
    """Name what an overlay left as it was, and what of it went nowhere."""
    laid = set(matching)
    kept, unused = ([key for key in keys if key not in laid] for keys in (own, held))
    for keys, said in (
        (kept, "lacks %d weights of the U-Net, which stay as they are below it: %s"),
        (unused, "has %d weights that are none of the U-Net: %s"),
    ):
        if keys:
            more = f" and {len(keys) - OVERLAY_SHOWN} more" if len(keys) > OVERLAY_SHOWN else ""
            logger.warning(f"%s: {said}", what, len(keys), ", ".join(keys[:OVERLAY_SHOWN]) + more)


def _lay_over(module: nn.Module, overlay: Path, what: str) -> None:
    tensors = {key.removeprefix("unet."): tensor for key, tensor in read_weights(overlay).tensors.items()}
    own = module.state_dict(keep_vars=True)
    matching = _matching(module, {key: tensor.shape for key, tensor in tensors.items()}, what)
    _report_overlay(own, tensors, matching, what)
    with torch.no_grad():
        for key in matching:
            own[key].copy_(tensors[key])
