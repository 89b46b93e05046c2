"""Versions of pictures and captions in the caches: all are encoded, and each presentation takes one of each."""

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner.caching.fingerprint import difference, expectation
from musubi_tuner.caching.reader import CachedDataset
from musubi_tuner.data.plan import MicroBatch
from musubi_tuner.errors import CacheError

if TYPE_CHECKING:
    from conftest import Project

NO_TEACHERS = {"enable_lune": False, "enable_sol": False}


def test_a_mirrored_picture_is_cached_beside_it_and_both_are_read(project: "Project") -> None:
    project.tables["experts"] |= NO_TEACHERS
    project.picture("a")
    config = project.config(general={"flip_aug": True, "resolution": 64}, cache={"latent_mode": "mean"})
    assert project.run("latents", config) == project.run("text", config) == 0
    (path,) = (project.root / "cache").glob("a_*_tf.safetensors")
    tensors = load_file(path)
    plain, mirrored = tensors["latents_1x8x8_float32"], tensors["latents_v1_1x8x8_float32"]
    assert not torch.equal(plain, mirrored)
    # The demo's autoencoder is linear over patches: what it makes of a mirrored picture is not the mirrored latents.
    assert not torch.allclose(mirrored, plain.flip(-1))
    data = CachedDataset(config, project.items(config), ["latents", "text"])
    read = [data.read(MicroBatch((0,), (n,)), epoch=0).tensors["latents"][0] for n in range(20)]
    assert {0 if torch.equal(one, plain) else 1 for one in read} == {0, 1}
    assert all(torch.equal(one, plain) or torch.equal(one, mirrored) for one in read)
    fixed = CachedDataset(config, project.items(config), ["latents", "text"], dropping=False)
    assert all(torch.equal(fixed.read(MicroBatch((0,), (n,)), 0).tensors["latents"][0], plain) for n in range(5))


def test_versions_are_part_of_the_fingerprint(project: "Project") -> None:
    project.tables["experts"] |= NO_TEACHERS
    project.picture("a", (128, 64))
    plain = project.config()
    cropped = project.config(general={"random_crop": True, "resolution": 64}, cache={"latent_variants": 3})
    prints = [
        expectation(config, "latents", {}, download=False).of_item(project.items(config)[0])
        for config in (plain, cropped)
    ]
    assert prints[0]["views"] is None and len(prints[1]["views"]) == 3
    assert difference(prints[1], prints[0]) is not None and difference(prints[0], prints[1]) is not None
    old = {key: value for key, value in prints[0].items() if key != "views"}  # made before there were versions
    assert difference(old, prints[0]) is None


def test_a_file_of_other_versions_is_refused_although_names_are_enough(project: "Project") -> None:
    project.tables["experts"] |= NO_TEACHERS
    project.picture("a")
    for kind in ("latents", "text"):
        assert project.run(kind) == 0
    config = project.config(general={"flip_aug": True, "resolution": 64}, cache={"skip_existing": "name"})
    with pytest.raises(CacheError, match="is of 1 versions, the data wants 2"):
        CachedDataset(config, project.items(config), ["latents", "text"])


def test_variants_of_captions_are_encoded_and_drawn(project: "Project") -> None:
    project.tables["experts"] |= NO_TEACHERS
    project.picture("a", caption="red, blue, green, circle")
    config = project.config(
        general={"shuffle_caption": True, "resolution": 64}, cache={"text_variants": 3}, objective={"text_dropout": 0.0}
    )
    assert project.run("latents", config) == project.run("text", config) == 0
    (item,) = project.items(config)
    assert len(set(item.captions)) > 1
    (path,) = (project.root / "cache").glob("a_tf_te.safetensors")
    tensors = load_file(path)
    variants = [tensors[f"t5_vec{end}_bfloat16"] for end in ("", "_v1", "_v2")]
    data = CachedDataset(config, [item], ["latents", "text"])
    read = [data.read(MicroBatch((0,), (n,)), epoch=0).tensors["t5_vec"][0] for n in range(30)]
    taken = {next(k for k, one in enumerate(variants) if torch.equal(one, row)) for row in read}
    assert len(taken) == len({tuple(one.flatten().tolist()) for one in variants})
