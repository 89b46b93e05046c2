"""Facts of the toy family. Torch-free."""

from typing import Any

from musubi_tuner.config.schema.model import ClipAndT5, ModelSection, NewModel
from musubi_tuner.config.schema.roles import roles_section
from musubi_tuner.models.spec import AdapterTargets, ModelSpec, TaskFacts


class ToyModel(NewModel, ClipAndT5, ModelSection):
    """Which model is trained, and the frozen networks around it."""


def task(config: Any) -> TaskFacts:
    if config.model.geometry and config.model.geometry.get("gan"):
        return TaskFacts(roles=("vae", "discriminator"), caches=(), pixels=True)
    return TaskFacts()


SPEC = ModelSpec(
    code="ty",
    full_name="toy",
    title="Toy",
    modelspec_architecture="Toy",
    pixel_step=16,
    vae_factor=8,
    latent_channels=16,
    latent_shift=True,
    sample_size=64,
    t5_tokenizer="none",
    clip_tokenizer="none",
    dataset_defaults={
        "resolution": 64,
        "enable_bucket": True,
        "bucket_no_upscale": False,
        "caption_extension": ".txt",
        "batch_size": 1,
        "num_repeats": 1,
        "missing_caption": "error",
        "recursive": False,
    },
    sections={"model": ToyModel, "roles": roles_section("vae", "discriminator")},
    geometry="musubi_tuner.models.toy.family:ToyConfig",
    task=task,
    package="musubi_tuner.models.toy",
    block_lists=("blocks",),
    adapters=AdapterTargets(layers={"blocks": ("inner",)}, network_module="networks.lora_toy"),
)
