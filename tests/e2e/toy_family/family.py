"""A denoiser of two Linear blocks over latent pixels, and everything the framework asks of a family."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from musubi_tuner.models.toy.gan import GanTask, autoencoder, discriminator
from torch import Tensor, nn

from musubi_tuner.flow import interpolate, sampling_schedule, solve, squared_error
from musubi_tuner.memory.storage import Storing, freeze_layers, merge_layers
from musubi_tuner.models.family import LossTerm, ModelOutline, TaskOutline, Trainee
from musubi_tuner.weights.checkpoints import copy_weights, find_weights, read_weights


@dataclass(frozen=True)
class ToyConfig:
    """Geometry."""

    width: int = 24
    gan: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Toy(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.enter, self.text = nn.Linear(17, config.width), nn.Linear(32, config.width)
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(2))
        self.leave = nn.Linear(config.width, 16)

    def forward(self, noisy: Tensor, time: Tensor, clip: Tensor) -> Tensor:
        pixels = noisy.flatten(2).transpose(1, 2)
        times = time[:, None, None].expand(-1, pixels.shape[1], 1)
        x = self.enter(torch.cat((pixels, times), dim=-1)) + self.text(clip)[:, None]
        for block in self.blocks:
            x = block(x)
        return self.leave(x).transpose(1, 2).reshape(noisy.shape)


class ToyProcess:
    uniforms: tuple[str, ...] = ()
    time_draw = "uniform"

    def size(self, x0: Tensor) -> tuple[int, ...]:
        return ()

    def time(self, draws_B: Tensor, size: tuple[int, ...], uniforms: dict[str, Tensor]) -> Tensor:
        return draws_B

    def sigma(self, time_B: Tensor) -> Tensor:
        return time_B

    def add_noise(self, x0: Tensor, noise: Tensor, time_B: Tensor) -> Tensor:
        return interpolate(x0, noise, time_B)

    def target(self, x0: Tensor, noise: Tensor, time_B: Tensor) -> Tensor:
        return noise - x0

    def conditioning(self, batch: Any, time_B: Tensor, uniforms: dict[str, Tensor]) -> dict[str, Any]:
        return text_inputs(batch.tensors, False)

    def predict(self, model: nn.Module, noisy: Tensor, time_B: Tensor, inputs: Any) -> tuple[Tensor, dict[str, Any]]:
        return model(noisy, time_B, inputs["clip"]), {}

    def losses(self, prediction: Tensor, target: Tensor, *rest: Any) -> dict[str, LossTerm]:
        return {"main": LossTerm(squared_error(prediction, target).flatten(1).mean(1), 1.0)}

    def solve(
        self, name: str, predict: Callable[[Tensor, float], Tensor], noise: Tensor, times: Sequence[float]
    ) -> Tensor:
        """Integrate the velocity; see `flow.solve`."""
        return solve(name, predict, noise, times)

    def sampling_times(self, steps: int, size: tuple[int, ...], shift: float | None = None) -> list[float]:
        return sampling_schedule(steps, shift=shift)


def text_inputs(encoded: dict[str, Tensor], use_mask: bool) -> dict[str, Tensor]:
    return {"clip": encoded["clip_l_pooler"].float()}


def null_inputs(like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in like.items()}


def concatenate(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {key: torch.cat((first[key], second[key])) for key in first}


def load_for_training(config: Any, storing: Storing) -> Trainee:
    if config.model.init == "checkpoint":
        model = load_for_run(open_base(config), config, storing)
    else:
        torch.manual_seed(config.run.seed)
        geometry = ToyConfig(**config.model.geometry)
        if geometry.gan:
            parts = {"vae": autoencoder(geometry.width), "discriminator": discriminator(geometry.width)}
            return Trainee(nn.ModuleDict(parts), geometry, {})
        model = Toy(geometry)
    return Trainee(model, model.config, {})


def make_task(config: Any, trainee: Trainee, make_role: Any) -> GanTask:
    return GanTask(trainee.model, make_role, config.run.seed)


def outline_task(config: Any, make_role: Any) -> TaskOutline:
    with torch.device("meta"):
        model = load_for_training(config, None).model
    task: Any = GanTask(model, make_role, config.run.seed)
    return TaskOutline(task, [model], lambda bucket, count: {"pixels": torch.zeros(count, 3, bucket[1], bucket[0])})


def make_tokenizer(config: Any) -> None:
    return None


def open_base(config: Any) -> Any:
    return load_checkpoint(config.locate(config.model.path))


def load_checkpoint(source: Any, *, ema: bool = False) -> Any:
    return read_weights(find_weights(source, ema=ema))


def load_for_run(file: Any, config: Any, storing: Storing) -> Toy:
    model = Toy(ToyConfig(**{key: value for key, value in file.config.items() if key == "width"}))
    copy_weights(model, file.tensors, str(file.path))
    if storing.merges is not None:
        merge_layers(model, storing.merges)
    if storing.freeze is not None:
        freeze_layers(model, storing.freeze)
    return model


def outline_model(config: Any) -> ModelOutline:
    width = (
        config.model.geometry.get("width", 24) if config.model.init == "scratch" else open_base(config).config["width"]
    )
    with torch.device("meta"):
        return ModelOutline(Toy(ToyConfig(width)), torch.float32, {"clip_l_pooler": (32,)}, {})


def check_caches(config: Any, geometry: ToyConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    assert shapes["clip_l_pooler"] == (32,)


def checkpoint_options(config: Any) -> dict[str, Any]:
    return {}


def options_of(file: Any) -> dict[str, Any]:
    return {}


def make_process(config: Any, options: dict[str, Any]) -> ToyProcess:
    return ToyProcess()


def diffusers_modules(depth: int, depth_single: int) -> dict[str, tuple[str, ...]]:
    return {}
