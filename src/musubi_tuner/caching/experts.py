"""The cache job of the teachers: what each sees at which time, with one U-Net in memory after the other.

    t           time buckets, data fractions: centres of equal slices of [0, 1]
    picture     noise (expert_input = "random"), or (1 - t) noise + t image, image = SD1.5 latents of the item
    timestep    1000 t (expert_time = "reference") or, in SD's own direction, 1000 (1 - t) ("aligned")

Where both teachers are run and have weights of their own, the job is one of two halves. CLIP, the autoencoder and Lune
come first; what Sol will see (text states, latents of the image) waits with Lune's features in the half files. So CLIP
reads each caption once, and only the U-Net is loaded for Sol. Teachers of the same weights share their forward passes.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from musubi_tuner.caching.file_format import caption_metadata, caption_name
from musubi_tuner.caching.fingerprint import STORED
from musubi_tuner.caching.job import Encoded, Encoder, Job, JobOptions, name_of, storage_dtype, store
from musubi_tuner.caching.shards import run_with_shards
from musubi_tuner.config import RunConfig
from musubi_tuner.data.buckets import filtered, place, squash
from musubi_tuner.data.images import open_image, resize_crop, to_array
from musubi_tuner.data.item import Item
from musubi_tuner.device import choose_device, encoder_dtype
from musubi_tuner.encoders.autoencoder import load_autoencoder
from musubi_tuner.encoders.locate import encoder_sources
from musubi_tuner.encoders.teachers import SplitTeacher, check_overlay, geometric_sol, load_teacher
from musubi_tuner.encoders.text import load_clip
from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.randomness import normal

if TYPE_CHECKING:
    from musubi_tuner.encoders.teachers import SplitTeacher

SEEN = "seen_"
"""Begins the names of what a half file holds for the other teacher: ``seen_text``, ``seen_image``."""


def time_buckets(count: int) -> Tensor:
    """Centres of ``count`` equal slices of [0, 1]: 0.05, 0.15, ..., 0.95 for ten."""
    return (torch.arange(count, dtype=torch.float64) + 0.5).div(count).float()


def teacher_grid(item: Item, resolution: int, keep_aspect: bool) -> tuple[int, int]:
    """Rows and columns of the teacher's latent: the item's aspect at about resolution^2 pixels, sides multiples of 64.

    Without ``keep_aspect`` a square.
    """
    if not keep_aspect:
        return resolution // 8, resolution // 8
    width, height = item.bucket
    factor = resolution / (width * height) ** 0.5
    rows, columns = (max(64, round(side * factor / 64) * 64) // 8 for side in (height, width))
    return rows, columns


def noise_of(items: list[Item], caption: int, times: int, seed: int, grid: tuple[int, int]) -> Tensor:
    """Noise [items, times, 4, h, w] that belongs to an item, one of its captions and a time, whatever the batch."""
    shape = (4, *grid)
    return torch.stack(
        [torch.stack([normal(shape, seed, "teacher", item.id, caption, k) for k in range(times)]) for item in items]
    )


def noised(images_NCHW: Tensor, noise_NTCHW: Tensor, t_T: Tensor) -> Tensor:
    """Images mixed with noise at data fractions: ``(1 - t) noise + t image``, [N, T, C, H, W]."""
    t = t_T.view(1, -1, 1, 1, 1)
    return (1 - t) * noise_NTCHW + t * images_NCHW[:, None]


def teacher_timestep(t_T: Tensor, expert_time: str) -> Tensor:
    """SD1.5's time 0 .. 1000, in which 0 is the image, for data fractions.

    Args:
        expert_time: ``aligned``, or ``reference``, which feeds 1000 t although the two directions differ, as published.
    """
    return 1000 * (1 - t_T if expert_time == "aligned" else t_T)


def cache_experts(config: RunConfig, options: JobOptions, family: dict[str, Any]) -> int:
    """Run the teachers at every time bucket and keep their features."""
    experts = ExpertsJob(config, family)
    job = Job(
        "experts",
        config.get("cache.experts_batch_size"),
        True,
        experts.open if experts.names else experts.open_geometric,
        experts.read if experts.sees_image else None,
        experts.metadata,
        experts.open_second if experts.apart else None,
        precision=name_of(experts.dtype) if experts.names else None,
    )
    return run_with_shards(config, job, options, family)


class ExpertsJob:
    """The parts of the job under one config.

    Attributes:
        names: teachers that are run. apart: whether they are two U-Nets.
        sees_image: whether they see the item's image.
    """

    def __init__(self, config: RunConfig, family: dict[str, Any]) -> None:
        self.config, self.family = config, family
        self.names = config.experts.extracted
        self.apart = len(self.names) == 2 and config.sd15.lune != config.sd15.sol
        self.sees_image = bool(self.names) and family["expert_input"] == "noised_image"
        if self.sees_image and config.sd15.vae is None:
            raise ConfigError(
                'experts.vae: is needed, because the checkpoint was trained with expert_input = "noised_image"; give the SD1.5 '
                'autoencoder, or set expert_input = "random"'
            )
        self.t_T = time_buckets(config.sd15.time_buckets)
        self.stored = storage_dtype(config, STORED["experts"])

    @cached_property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return choose_device(self.config.run.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Precision of CLIP and the teachers."""
        return encoder_dtype(self.config.sd15.dtype, self.device, gpu="float16")

    def metadata(self, item: Item) -> dict[str, str]:
        """Header entries of an item."""
        seed = str(self.config.sd15.seed)
        return {**caption_metadata(item), "time_convention": "data_at_1", "seed": seed}

    def read(self, item: Item) -> Tensor:
        """The item's image at the size that the teachers see, [3, H, W] in [-1, 1]."""
        rows, columns = teacher_grid(item, self.config.sd15.resolution, keep_aspect=True)
        put = squash if item.squashed else place
        placement = filtered(put(item.size, (columns * 8, rows * 8)), item.interpolation)
        image = resize_crop(open_image(item.path, item.background), placement)
        return torch.from_numpy(to_array(image).copy()).permute(2, 0, 1).float() / 127.5 - 1

    def _paths(self) -> dict[str, Path | None]:
        return encoder_sources(self.config, "experts").paths(download=True)

    def _load(self, names: list[str], paths: dict[str, Path | None]) -> "SplitTeacher":
        assert paths["unet"] is not None
        title = " and ".join(names)
        print(f"experts: {title} in {self.dtype} on {self.device}, input {self.family['expert_input']}, "
              f"time {self.family['expert_time']}")  # fmt: skip
        overlay = paths.get(names[0])
        return SplitTeacher(
            load_teacher(paths["unet"], overlay, name=names[0], dtype=self.dtype, device=self.device), title
        )

    def open(self) -> Encoder:
        """Load CLIP, the autoencoder and the first teacher, which may be both."""
        paths = self._paths()
        assert paths["clip"] is not None
        clip = load_clip(
            paths["clip"],
            paths.get("clip_tokenizer"),
            self.config.spec.clip_tokenizer,
            dtype=self.dtype,
            device=self.device,
        )
        names = self.names[:1] if self.apart else self.names
        teacher = self._load(names, paths)
        wide = int(teacher.teacher.unet.config.cross_attention_dim)  # type: ignore[union-attr, arg-type]
        if wide != clip.width:
            raise CheckpointError(
                f"experts.unet: expects text of width {wide}, but model.clip_path gives {clip.width}; SD1.5 belongs to CLIP-L"
            )
        second = paths.get(self.names[-1]) if self.apart else None
        if second is not None:
            check_overlay(teacher.teacher, second, self.names[-1])
        vae = None
        if self.sees_image:
            assert paths["expert_vae"] is not None
            vae = load_autoencoder(
                paths["expert_vae"], channels=4, dtype=torch.float32, device=self.device, key="experts.vae"
            )

        def encode(items: list[Item], pixels: list[Any]) -> list[Encoded]:
            images = None if vae is None else vae.encode(torch.stack(pixels), None, use_shift=False).cpu()
            found: list[Encoded] = [{"t_buckets_float32": self.t_T} for _ in items]
            for number, rows in _by_caption(items):
                text = clip.encode([items[row].captions[number] for row in rows])
                self._add_features(found, names, teacher, items, number, rows, images, text.states)
                if self.config.sd15.sol_source == "geometric":
                    self._add_geometric(found, number, rows)
                if self.apart:
                    # CLIP computes in the teachers' precision, so nothing is lost.
                    for row, states in zip(rows, text.states.to(self.dtype), strict=True):
                        found[row][SEEN + caption_name("text", number)] = states
            if self.apart and images is not None:
                for tensors, image in zip(found, images, strict=True):
                    tensors[f"{SEEN}image"] = image
            return found

        return encode

    def open_second(self) -> Encoder:
        """Load the second teacher, which sees what the half files hold for it."""
        names = self.names[1:]
        teacher = self._load(names, self._paths())

        def encode(items: list[Item], halves: list[Encoded]) -> list[Encoded]:
            images = torch.stack([half[f"{SEEN}image"] for half in halves]) if self.sees_image else None
            found = [{key: value for key, value in half.items() if not key.startswith(SEEN)} for half in halves]
            for number, rows in _by_caption(items):
                states = torch.stack([halves[row][SEEN + caption_name("text", number)] for row in rows])
                self._add_features(found, names, teacher, items, number, rows, images, states)
            return found

        return encode

    def open_geometric(self) -> Encoder:
        """No teacher at all: Sol's stand-in alone."""
        print("experts: Sol by formula, no teacher is run")

        def encode(items: list[Item], _: list[Any]) -> list[Encoded]:
            found: list[Encoded] = [{"t_buckets_float32": self.t_T} for _ in items]
            for number, rows in _by_caption(items):
                self._add_geometric(found, number, rows)
            return found

        return encode

    def _add_features(
        self,
        found: list[Encoded],
        names: list[str],
        teacher: "SplitTeacher",
        items: list[Item],
        number: int,
        rows: list[int],
        images: Tensor | None,
        states: Tensor,
    ) -> None:
        """Features of one caption of some items at all times.

        Args:
            found: of all items. rows: which of them have the caption. images: latents of all items, if they are seen.
            states: of the captions, one per row.
        """
        experts, some, times = self.config.sd15, [items[row] for row in rows], len(self.t_T)
        grid = teacher_grid(some[0], experts.resolution, keep_aspect=images is not None)
        pictures = noise_of(some, number, times, experts.seed, grid)
        if images is not None:
            pictures = noised(images[rows], pictures, self.t_T)
        split = experts.times_per_forward
        features = teacher.features(
            pictures.flatten(0, 1),
            teacher_timestep(self.t_T, self.family["expert_time"]).repeat(len(rows)),
            states.repeat_interleave(times, dim=0),
            lune="lune" in names,
            sol="sol" in names,
            together=None if split == "auto" else split * len(rows),
        )
        for name, values in features.items():
            for row, value in zip(rows, values.unflatten(0, (len(rows), times)), strict=True):
                self._add(found[row], name, number, value)

    def _add_geometric(self, found: list[Encoded], number: int, rows: list[int]) -> None:
        stats, spatial = geometric_sol(self.t_T)
        for row in rows:
            self._add(found[row], "sol_stats", number, stats)
            self._add(found[row], "sol_spatial", number, spatial)

    def _add(self, tensors: Encoded, name: str, number: int, value: Tensor) -> None:
        suffix = str(self.stored).removeprefix("torch.")
        tensors[f"{caption_name(name, number)}_{suffix}"] = store(value, self.stored)


def _by_caption(items: list[Item]) -> Iterator[tuple[int, list[int]]]:
    """Number of each caption that an item has, and the rows of the items that have it."""
    for number in range(max(len(item.captions) for item in items)):
        yield number, [row for row, item in enumerate(items) if number < len(item.captions)]
