"""The sample pictures of a run: its prompts are encoded before the model needs the memory, its main rank draws.

A request to stop ends the drawing between two evaluations of the model; the state remembers that these samples are due, and the
next start draws them first.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.caching.prompts import prompt_encodings
from musubi_tuner.config import RunConfig
from musubi_tuner.config.prompts import sample_prompts
from musubi_tuner.errors import ConfigError
from musubi_tuner.models.family import Process
from musubi_tuner.precision import COMPUTE_DTYPES, autocast
from musubi_tuner.training.metrics import Metrics
from musubi_tuner.training.ranks import Ranks
from musubi_tuner.training.role import Role
from musubi_tuner.training.sampling import (
    EncodedPrompts,
    contact_sheet,
    decode_images,
    draw,
    encode_prompts,
    evaluating,
    sample_settings,
    save_png,
    save_samples,
    to_picture,
)


class DrawingLeft(Exception):
    """Samples were given up because the run was asked to stop."""


@dataclass
class PreparedPrompts:
    """Encoded prompts, and the autoencoder in main memory."""

    encoded: EncodedPrompts
    vae: Any


def prepare_prompts(config: RunConfig, ranks: Ranks) -> PreparedPrompts | None:
    """The encoded prompts of [sample] on the main rank; None where there are none, and on the others.

    Raises:
        ConfigError: if the list of prompts is empty, or an encoder is missing.
    """
    if config.sample.prompts is None or not ranks.main:
        return None
    texts = sample_prompts(config)
    if not texts:
        raise ConfigError("sample.prompts is an empty list; give prompts, or remove the key")
    encoded = encode_prompts(
        lambda wanted: prompt_encodings(config, wanted, ranks.device), texts, config.sample.negative_prompt
    )
    vae = config.spec.encoders.open_autoencoder(config, ranks.device, torch.device("cpu"))
    return PreparedPrompts(encoded, vae)


@contextmanager
def averages_in_place(config: RunConfig, roles: Sequence[Role]) -> Iterator[None]:
    """The averages of roles in the place of their weights, if sample.use_ema wants them and they have begun."""
    with ExitStack() as stack:
        for role in roles:
            begun = role.ema is not None and (role.ema.updates > 0 or config.ema.init == "checkpoint")
            stack.enter_context(role.averaged(config.sample.use_ema and begun))
        yield


class Samples:
    """Draws the prompts of a run.

    Args:
        prompts: see `prepare_prompts`. model: that draws, without wrappers of data parallelism. roles: with their averages.
        use_mask: hide text padding, for models trained so. batch_size: pictures that go through the model together.

    Attributes:
        due: whether samples were begun, or asked for before the first update, and are not drawn.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        prompts: PreparedPrompts | None,
        *,
        model: nn.Module,
        roles: Sequence[Role],
        process: Process,
        use_mask: bool,
        batch_size: int,
    ) -> None:
        self.config, self.ranks, self.prompts = config, ranks, prompts
        self.model, self.roles, self.process = model, roles, process
        self.use_mask, self.batch_size = use_mask, batch_size
        self.due = config.sample.at_first and config.sample.prompts is not None

    def draw(self, step: int, metrics: Metrics | None) -> int:
        """Draw, write and show the pictures of a step; returns how many.

        Raises:
            DrawingLeft: if the run is asked to stop meanwhile.
        """
        if self.prompts is None or metrics is None:
            if any(role.sharded for role in self.roles):
                with averages_in_place(self.config, self.roles):
                    pass  # the main rank gathers the weights
            return 0
        config, spec, device = self.config, self.config.spec, self.ranks.device
        settings = sample_settings(config)
        with averages_in_place(config, self.roles):
            latents = draw(
                self.model,
                self.process,
                spec,
                self.prompts.encoded,
                settings,
                size=config.latents,
                use_mask=self.use_mask,
                device=device,
                compute_dtype=COMPUTE_DTYPES[config.train.mixed_precision],
                batch_size=self.batch_size,
                check=self._leave,
            )
        pictures = decode_images(self.prompts.vae, latents, spec.latent_shift, device, check=self._leave)
        prompts = self.prompts.encoded.prompts
        sheet = save_samples(self.folder, config.run.name, step, prompts, pictures, settings, spec.pixel_step)
        metrics.image("samples", sheet, step)
        return len(pictures)

    @property
    def folder(self) -> Path:
        """Where the pictures lie."""
        return self.config.output_dir / "sample"

    @property
    def message(self) -> str:
        """What it is about to do."""
        count = len(self.prompts.encoded.prompts) if self.prompts else 0
        return f"drawing {count} pictures"

    def _leave(self) -> None:
        if self.ranks.stop.signum:
            raise DrawingLeft


class Reconstructions:
    """Shows pictures of the data beside what a task makes of them.

    Args:
        roles: with their averages. reconstruct: pictures [B, 3, H, W] in [-1, 1] -> the same. pictures: [3, H, W] each.

    Attributes:
        due: see `Samples`.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        roles: Sequence[Role],
        reconstruct: Callable[[Tensor], Tensor],
        pictures: Sequence[Tensor],
    ) -> None:
        self.config, self.ranks, self.roles = config, ranks, roles
        self.reconstruct, self.pictures = reconstruct, pictures
        self.due = config.sample.at_first

    def draw(self, step: int, metrics: Metrics | None) -> int:
        """Write pairs of original and reconstruction, each pair a row; returns the number of pairs."""
        if metrics is None:
            return 0
        with averages_in_place(self.config, self.roles), ExitStack() as stack:
            for role in self.roles:
                stack.enter_context(evaluating(role.module))
            with autocast(self.ranks.device, COMPUTE_DTYPES[self.config.train.mixed_precision]):
                made = [self.reconstruct(picture[None].to(self.ranks.device))[0] for picture in self.pictures]
        pairs = [to_picture(each) for pair in zip(self.pictures, made, strict=True) for each in pair]
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet = contact_sheet(pairs)
        save_png(self.folder / f"samples_step_{step}.png", sheet)
        metrics.image("samples", sheet, step)
        return len(self.pictures)

    @property
    def folder(self) -> Path:
        """Where the pictures lie."""
        return self.config.output_dir / "sample"

    @property
    def message(self) -> str:
        """What it is about to do."""
        return f"reconstructing {len(self.pictures)} pictures"
