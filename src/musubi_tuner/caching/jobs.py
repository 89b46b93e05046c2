"""The cache jobs of latents and texts, which encode items through `shards.run_with_shards`, and the list of all (`JOBS`)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.caching.experts import cache_experts
from musubi_tuner.caching.file_format import caption_metadata, caption_name, latents_key, mask_key
from musubi_tuner.caching.fingerprint import STORED
from musubi_tuner.caching.job import Encoded, Encoder, Job, JobOptions, name_of, storage_dtype, store
from musubi_tuner.caching.prompts import keep_prompts, prompt_encodings, texts_of_run
from musubi_tuner.caching.shards import run_with_shards
from musubi_tuner.caching.status import job_groups
from musubi_tuner.caching.text_check import caption_lines, token_limits
from musubi_tuner.config import RunConfig
from musubi_tuner.data.item import Item
from musubi_tuner.data.masks import read_mask, to_latent
from musubi_tuner.data.pixels import read_pixels
from musubi_tuner.data.views import View
from musubi_tuner.device import choose_device
from musubi_tuner.encoders.locate import encoder_sources
from musubi_tuner.models.spec import ModelSpec
from musubi_tuner.randomness import normal


def cache_latents(config: RunConfig, options: JobOptions, family: dict[str, Any]) -> int:
    """Encode images into latents [C, H / 8, W / 8], with their loss masks at the same size."""

    def read(item: Item) -> tuple[list[Tensor], dict[str, Tensor]]:
        """All versions of a picture, and their masks by key."""
        chosen: list[View | None] = [*item.views] or [None]
        pixels = [read_pixels(item, view) for view in chosen]
        if item.mask is None:
            return pixels, {}
        grey, masks = read_mask(item.mask, item.path, item.background), {}
        for number, view in enumerate(chosen):
            placement = item.placement if view is None else view.place(item.placement)
            found = to_latent(grey, placement, config.latents.factor)
            mask = torch.from_numpy((found if view is None else view.mirror(found)).copy())
            masks[mask_key(tuple(mask.shape), number)] = mask
        return pixels, masks

    def open_encoder() -> Encoder:
        spec, device = config.spec, choose_device(config.run.device)
        path = encoder_sources(config, "latents").paths(download=True)["vae"]
        vae = spec.encoders.open_autoencoder(config, device)
        stored, job.precision = storage_dtype(config, STORED["latents"]), name_of(vae.dtype)
        print(f"latents: {path} in {vae.dtype} on {device}")

        def encode(items: list[Item], inputs: list[Any]) -> list[Encoded]:
            found: list[Encoded] = [dict(masks) for _, masks in inputs]
            for number in range(max(len(pixels) for pixels, _ in inputs)):
                rows = [row for row, (pixels, _) in enumerate(inputs) if number < len(pixels)]
                batch = torch.stack([inputs[row][0][number] for row in rows])
                noise = None
                if config.cache.latent_mode == "sample":
                    shape = (vae.channels, batch.shape[2] // vae.factor, batch.shape[3] // vae.factor)
                    keys = [(config.cache.seed, "latent", items[row].id, number) for row in rows]
                    noise = torch.stack([normal(shape, *key) for key in keys])
                latents = vae.encode(batch, noise, spec.latent_shift).cpu()
                name = latents_key(tuple(latents.shape), name_of(stored), number)
                for row, latent in zip(rows, latents, strict=True):
                    found[row][name] = store(latent, stored)
            return found

        return encode

    job = Job(
        "latents", config.cache.latents_batch_size, True, open_encoder, read, partial(latents_metadata, config.spec)
    )
    return run_with_shards(config, job, options, family)


def latents_metadata(spec: ModelSpec, item: Item) -> dict[str, str]:
    """Header entries of a latents file."""
    (width, height), (bucket_width, bucket_height) = item.size, item.bucket
    return {
        "width": str(width),
        "height": str(height),
        "bucket_width": str(bucket_width),
        "bucket_height": str(bucket_height),
        "vae_shift_applied": str(spec.latent_shift).lower(),
    }


def cache_text(config: RunConfig, options: JobOptions, family: dict[str, Any]) -> int:
    """Encode captions with the text encoders of the family."""

    def report(items: list[Item]) -> list[str]:
        return caption_lines(token_limits(config, download=True), items)

    def open_encoder() -> Encoder:
        device = choose_device(config.run.device)
        encoders = config.spec.encoders.open_text(config, device)
        stored, job.precision = storage_dtype(config, STORED["text"]), name_of(encoders.dtype)
        suffix = name_of(stored)
        print(f"text: {encoders.title} in {encoders.dtype} on {device}")
        keep_prompts(config, encoders)

        def encode(items: list[Item], _: list[Any]) -> list[Encoded]:
            encoded = encoders.encode([caption for item in items for caption in item.captions])
            rows = iter(range(len(next(iter(encoded.values())))))
            found: list[Encoded] = []
            for item in items:
                tensors: Encoded = {}
                for number, row in zip(range(len(item.captions)), rows, strict=False):
                    for name, values in encoded.items():
                        if values.is_floating_point():
                            tensors[f"{caption_name(name, number)}_{suffix}"] = store(values[row], stored)
                        elif name != "t5_mask" or config.spec.t5_attention_mask:
                            tensors[caption_name(name, number)] = values[row]
                found.append(tensors)
            return found

        return encode

    job = Job("text", config.cache.text_batch_size, False, open_encoder, metadata=caption_metadata, report=report)
    code = run_with_shards(config, job, options, family)
    texts = [] if options.dry_run or options.shard != (1, 1) else texts_of_run(config)
    if texts:
        prompt_encodings(config, texts, choose_device(config.run.device))
    return code


JOBS = {"latents": cache_latents, "text": cache_text, "experts": cache_experts}


def run_jobs(config: RunConfig, kind: str, options: JobOptions, family: dict[str, Any]) -> int:
    """Do a job for the datasets that want it: once, or once for each of the [experts] that they have.

    Returns:
        0, or 1 if an item failed.
    """
    codes, groups = [], job_groups(config, kind)
    for group in groups:
        if len(groups) > 1:
            print(f"{kind} of {', '.join(config.datasets[number].name for number in group)}:")
        codes.append(JOBS[kind](config.limited_to(group), options, family))
    return max(codes)
