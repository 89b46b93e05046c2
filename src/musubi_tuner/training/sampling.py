"""Drawing pictures from a model, while training and from a checkpoint.

Each picture has its own CPU generator (seed + index), so it does not depend on the batch it is drawn in. State and
times are float32; both guidance branches go through the model in one forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from musubi_tuner.config import RunConfig
from musubi_tuner.config.prompts import Prompt, SampleSettings, as_prompts, prompt_texts
from musubi_tuner.errors import ConfigError
from musubi_tuner.files import json_text, replace_file, write_new_file, write_text
from musubi_tuner.flow import guide
from musubi_tuner.models.family import AutoencoderNetwork, Process
from musubi_tuner.models.spec import Latents, ModelSpec
from musubi_tuner.precision import autocast


@dataclass
class EncodedPrompts:
    """Prompts, and the encodings of all their texts.

    Attributes:
        encoded: one row per text in ``rows``.
    """

    prompts: list[Prompt]
    encoded: dict[str, Tensor]
    rows: dict[str, int]

    def of(self, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Encodings of some of the texts."""
        index = torch.tensor([self.rows[text] for text in texts])
        return {key: tensor[index].to(device) for key, tensor in self.encoded.items()}


def sample_settings(config: RunConfig) -> SampleSettings:
    """How [sample] draws, with the family's picture size where none is given."""
    sample, side = config.sample, config.spec.sample_size
    return SampleSettings(
        width=sample.width or side,
        height=sample.height or side,
        steps=sample.steps,
        guidance=sample.guidance,
        solver=sample.solver,
        seed=sample.seed,
        negative=sample.negative_prompt,
        cfg_scale=config.get("sample.cfg_scale") or 1.0,
        shift=config.get("sample.shift"),
    )


def encode_prompts(
    encode: Callable[[list[str]], dict[str, Tensor]], prompts: Sequence[str | Prompt], negative: str | None
) -> EncodedPrompts:
    """Encode prompts, their negative prompts, the shared one and the empty text, each once."""
    texts = prompt_texts(prompts, negative)
    return EncodedPrompts(as_prompts(prompts), encode(texts), {text: row for row, text in enumerate(texts)})


@torch.no_grad()
def draw(
    model: nn.Module,
    process: Process,
    spec: ModelSpec,
    prompts: EncodedPrompts,
    settings: SampleSettings,
    *,
    size: Latents,
    use_mask: bool,
    device: torch.device,
    compute_dtype: torch.dtype | None,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda count: None,
    check: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Draw one latent per prompt; prompts that differ only in text and seed go through the model together.

    Args:
        size: of the run's latents. use_mask: hide text padding, for models trained so.
        compute_dtype: of the model's products; None = that of its weights.
        progress: called with the number of pictures finished.
        check: called before every evaluation of the model; what it raises ends the drawing.

    Returns:
        Latents [C, H, W] float32 on the CPU, in the order of the prompts. The model's training mode is restored.
    """
    own = [settings.of(prompt, index, spec.pixel_step) for index, prompt in enumerate(prompts.prompts)]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, wanted in enumerate(own):
        key = (wanted.width, wanted.height, wanted.steps, wanted.guidance, wanted.cfg_scale, wanted.shift,
               wanted.multiplier, wanted.negative is None)  # fmt: skip
        groups.setdefault(key, []).append(index)
    drawn: dict[int, Tensor] = {}
    with evaluating(model):
        try:
            for members in groups.values():
                _set_strength(model, own[members[0]].multiplier)
                for start in range(0, len(members), batch_size):
                    batch = members[start : start + batch_size]
                    texts = [prompts.prompts[index].text for index in batch]
                    found = _draw_batch(
                        model,
                        process,
                        spec,
                        prompts,
                        texts,
                        [own[i] for i in batch],
                        size,
                        use_mask,
                        device,
                        compute_dtype,
                        check,
                    )
                    drawn.update(zip(batch, found))
                    progress(len(batch))
        finally:
            _set_strength(model, 1.0)
    return [drawn[index] for index in range(len(own))]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; after it every module is as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _set_strength(model: nn.Module, multiplier: float) -> None:
    """Strength of the model's adapters."""
    adapters = getattr(model, "adapters", None)
    if adapters is not None:
        for each in (adapters, *getattr(model, "more_adapters", ())):
            each.set_multiplier(multiplier)
    elif multiplier != 1:
        raise ConfigError(f"--m {multiplier:g}: there is no adapter whose strength could be set")


def _draw_batch(
    model: nn.Module,
    process: Process,
    spec: ModelSpec,
    prompts: EncodedPrompts,
    texts: list[str],
    own: list[SampleSettings],
    latents: Latents,
    use_mask: bool,
    device: torch.device,
    compute_dtype: torch.dtype | None,
    check: Callable[[], None],
) -> Tensor:
    family, shared, count = spec.family, own[0], len(texts)
    # Where the model embeds its guidance, classifier-free guidance is a second, separate number.
    scale = shared.cfg_scale if spec.guidance_embedded else shared.guidance
    inputs: dict[str, Any] = family.text_inputs(prompts.of(texts, device), use_mask)
    if scale > 1:
        if shared.negative is None and not spec.guidance_embedded:
            negative = family.null_inputs(inputs)
        else:
            negative = family.text_inputs(prompts.of([one.negative or "" for one in own], device), use_mask)
        inputs = family.concatenate(inputs, negative)
    if spec.guidance_embedded:
        inputs["guidance"] = torch.full((len(next(iter(inputs.values()))),), shared.guidance, device=device)
    shape = latents.shape(shared.width, shared.height)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(one.seed)) for one in own])

    def velocity(x: Tensor, now: float) -> Tensor:
        check()
        batch = torch.cat((x, x)) if scale > 1 else x
        time = torch.full((len(batch),), now, device=device)
        with autocast(device, compute_dtype):
            prediction, _ = process.predict(model, batch, time, inputs)
        prediction = prediction.float()
        return guide(prediction[:count], prediction[count:], scale) if scale > 1 else prediction

    times = process.sampling_times(shared.steps, process.size(noise), shared.shift)
    return process.solve(shared.solver, velocity, noise.to(device), times).cpu()


def decode_images(
    vae: AutoencoderNetwork,
    latents: Sequence[Tensor] | Tensor,
    use_shift: bool,
    device: torch.device | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """Latents to uint8 pictures [H, W, 3], one at a time.

    Args:
        device: where the autoencoder is meanwhile; absent = where it is.
        check: called before every picture; what it raises ends the decoding.
    """
    pictures = []
    with vae.on(device or vae.device):
        for latent in latents:
            check()
            pictures.append(to_picture(vae.decode(latent[None], use_shift)[0]))
    return pictures


def to_picture(pixels: Tensor) -> np.ndarray:
    """Pixels [3, H, W] in [-1, 1] as a uint8 picture [H, W, 3]."""
    picture: np.ndarray = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return picture


def save_png(path: Path, picture: np.ndarray, text: dict[str, Any] | None = None) -> None:
    """Write a picture, with its settings in a text chunk; an older one of the name is replaced."""
    replace_file(path, _png_writer(picture, text))


def save_new_png(
    name: Callable[[int], Path], number: int, picture: np.ndarray, text: dict[str, Any] | None = None
) -> tuple[Path, int]:
    """Write a picture under the first free of the names from ``number`` on; returns the path and its number."""
    write = _png_writer(picture, text)
    while not write_new_file(name(number), write):
        number += 1
    return name(number), number


def _png_writer(picture: np.ndarray, text: dict[str, Any] | None) -> Callable[[Path], None]:
    info = PngImagePlugin.PngInfo()
    if text:
        info.add_text("parameters", json_text(text))
    image = Image.fromarray(picture)
    return lambda target: image.save(target, format="PNG", pnginfo=info)


def contact_sheet(pictures: Sequence[np.ndarray], columns: int = 2, padding: int = 2) -> np.ndarray:
    """Pictures on one sheet, row by row, white between them; cells are as large as the largest picture."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    shape = (rows * (height + padding) + padding, columns * (width + padding) + padding, 3)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def picture_text(prompt: Prompt, own: SampleSettings) -> dict[str, Any]:
    """What a picture's text chunk says about how it was drawn."""
    return {"prompt": prompt.text, **vars(own)}


def save_samples(
    folder: Path,
    name: str,
    step: int,
    prompts: Sequence[Prompt],
    pictures: Sequence[np.ndarray],
    settings: SampleSettings,
    pixel_step: int,
) -> np.ndarray:
    """Write the pictures of one step, their sheet and their prompts; returns the sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (prompt, picture) in enumerate(zip(prompts, pictures)):
        text = {**picture_text(prompt, settings.of(prompt, index, pixel_step)), "step": step}
        part = f"_{file_part(prompt.name)}" if prompt.name else ""
        save_png(folder / f"{name}_{step:08d}_{index:02d}{part}.png", picture, text)
    sheet = contact_sheet(pictures)
    save_png(folder / f"samples_step_{step}.png", sheet)
    lines = "".join(f"{index}: {prompt.text}\n" for index, prompt in enumerate(prompts))
    write_text(folder / f"prompts_step_{step}.txt", lines)
    return sheet


def file_part(text: str) -> str:
    """A text as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)
