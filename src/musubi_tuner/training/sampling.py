"""Drawing pictures from a model, while training and from a checkpoint.

Each picture has its own CPU generator (seed + index), so it does not depend on the batch it is drawn in. State and
times are float32; both guidance branches go through the model in one forward pass.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from musubi_tuner.encoders.autoencoder import Autoencoder
from musubi_tuner.files import replace_file, write_text
from musubi_tuner.flow import guide, solve
from musubi_tuner.models.spec import ModelSpec, Process


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are drawn; sizes in pixels, ``negative`` None = the trained null condition."""

    width: int
    height: int
    steps: int
    guidance: float
    solver: str
    seed: int
    negative: str | None


@dataclass
class EncodedPrompts:
    """Prompts with their encodings, and that of the negative prompt (None = the null condition)."""

    prompts: list[str]
    encoded: dict[str, Tensor]
    negative: dict[str, Tensor] | None


def encode_prompts(
    encode: Callable[[list[str]], dict[str, Tensor]], prompts: Sequence[str], negative: str | None
) -> EncodedPrompts:
    """Encode prompts once."""
    return EncodedPrompts(list(prompts), encode(list(prompts)), None if negative is None else encode([negative]))


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one per line; blank lines and lines that begin with # are left out.

    Raises:
        ConfigError: if there is none.
    """
    from musubi_tuner.errors import ConfigError

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a prompt file ({error})") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ConfigError(f"{path}: holds no prompt; write one per line")
    for number, line in enumerate(lines, start=1):
        option = re.search(r"(?:^|\s)--([A-Za-z]\w*)", line)
        if option and not line.lstrip().startswith("#"):
            raise ConfigError(f"{path} line {number}: option --{option[1]}: options per line are not supported yet")
    return prompts


@torch.no_grad()
def draw(
    model: nn.Module,
    process: Process,
    spec: ModelSpec,
    prompts: EncodedPrompts,
    settings: SampleSettings,
    *,
    use_mask: bool,
    device: torch.device,
    autocast: torch.dtype | None,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Draw one latent per prompt.

    Args:
        use_mask: hide text padding, for models trained so.
        autocast: compute dtype of the model's matrix products, None = that of its weights.
        progress: called with the number of pictures finished.

    Returns:
        Latents [P, C, H, W] float32 on the CPU. The model's training mode is restored.
    """
    text_inputs, null_inputs, concatenate = (spec.load(n) for n in ("text_inputs", "null_inputs", "concatenate"))
    times = process.sampling_times(settings.steps)
    shape = (spec.latent_channels, settings.height // spec.vae_factor, settings.width // spec.vae_factor)
    was_training = model.training
    model.eval()
    drawn = []
    try:
        for start in range(0, len(prompts.prompts), batch_size):
            rows = slice(start, start + batch_size)
            positive = text_inputs({key: t[rows].to(device) for key, t in prompts.encoded.items()}, use_mask)
            count = len(prompts.prompts[rows])
            inputs = positive
            if settings.guidance > 1:
                negative = null_inputs(positive)
                if prompts.negative is not None:
                    repeated = {key: t.to(device).expand(count, *t.shape[1:]) for key, t in prompts.negative.items()}
                    negative = text_inputs(repeated, use_mask)
                inputs = concatenate(positive, negative)
            noise = torch.stack(
                [
                    torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed + start + index))
                    for index in range(count)
                ]
            )

            def velocity(x: Tensor, now: float, inputs: dict[str, Any] = inputs, count: int = count) -> Tensor:
                guided = settings.guidance > 1
                batch = torch.cat((x, x)) if guided else x
                time = torch.full((len(batch),), now, device=device)
                with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                    prediction, _ = process.predict(model, batch, time, inputs)
                prediction = prediction.float()
                return guide(prediction[:count], prediction[count:], settings.guidance) if guided else prediction

            drawn.append(solve(settings.solver, velocity, noise.to(device), times).cpu())
            progress(count)
    finally:
        model.train(was_training)
    return torch.cat(drawn)


def decode_images(vae: Autoencoder, latents: Tensor, use_shift: bool) -> list[np.ndarray]:
    """Latents to uint8 pictures [H, W, 3], one at a time."""
    pictures = []
    for latent in latents:
        pixels = vae.decode(latent[None], use_shift)[0]
        pictures.append(((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())
    return pictures


def save_png(path: Path, picture: np.ndarray, text: dict[str, Any] | None = None) -> None:
    """Write a picture, with its settings in a text chunk."""
    info = PngImagePlugin.PngInfo()
    if text:
        info.add_text("parameters", json.dumps(text, ensure_ascii=False))
    image = Image.fromarray(picture)
    replace_file(path, lambda target: image.save(target, format="PNG", pnginfo=info))


def contact_sheet(pictures: Sequence[np.ndarray], columns: int = 2, padding: int = 2) -> np.ndarray:
    """Pictures of one size on one sheet, row by row, white between them."""
    height, width = pictures[0].shape[:2]
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    shape = (rows * (height + padding) + padding, columns * (width + padding) + padding, 3)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def save_samples(
    folder: Path, name: str, step: int, prompts: Sequence[str], pictures: Sequence[np.ndarray], settings: SampleSettings
) -> np.ndarray:
    """Write the pictures of one step, their sheet and their prompts; returns the sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (prompt, picture) in enumerate(zip(prompts, pictures)):
        text = {"prompt": prompt, **vars(settings), "seed": settings.seed + index, "step": step}
        save_png(folder / f"{name}_{step:08d}_{index:02d}.png", picture, text)
    sheet = contact_sheet(pictures)
    save_png(folder / f"samples_step_{step}.png", sheet)
    write_text(folder / f"prompts_step_{step}.txt", "".join(f"{i}: {prompt}\n" for i, prompt in enumerate(prompts)))
    return sheet
