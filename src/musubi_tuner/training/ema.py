"""Exponential moving average of a model's weights.

    shadow <- decay * shadow + (1 - decay) * weight        after every real optimizer step

The shadow is float32 whatever the model's dtype: in bfloat16 a step of 1 - 0.9999 is below the rounding step and the
average would never move. Buffers are constants of the model (rotary frequencies) and are copied, not averaged.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.files import replace_file
from musubi_tuner.tensors import save_tensors
from musubi_tuner.training.schedulers import average_decay
from musubi_tuner.weights.checkpoints import read_weights, strip_wrappers


def unwrap(model: nn.Module) -> nn.Module:
    """The bare model below torch.compile and data parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__.endswith("DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _wide(value: Tensor) -> Tensor:
    """A shadow is float32, whatever it comes from."""
    return value.float() if value.is_floating_point() else value


@dataclass
class LoadReport:
    """What `EMA.load_shadow` did, in numbers of keys."""

    loaded: int
    skipped: int
    initialized: int


class EMA:
    """Averaged weights of a model.

    Args:
        model: whose present state becomes the first average.
        decay: share of the old average kept at every update, in [0, 1).
        warmup: start with a smaller decay; see `average_decay`.
        device: where the shadow lives; absent = with the model.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, *, warmup: bool = False, device: torch.device | str | None = None
    ) -> None:
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self._backup: dict[str, Tensor] | None = None
        self.shadow = {
            key: _wide(value.detach()).to(device or value.device, copy=True).clone()
            for key, value in unwrap(model).state_dict().items()
        }

    def current_decay(self) -> float:
        """Decay of the next update."""
        return average_decay(self.updates, self.decay, self.warmup)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights."""
        bare = unwrap(model)
        weight = 1 - self.current_decay()
        averaged = {
            name for name, parameter in bare.named_parameters(remove_duplicate=False) if parameter.is_floating_point()
        }
        shadows, values = [], []
        for key, value in bare.state_dict().items():
            if key not in self.shadow:
                continue
            shadow = self.shadow[key]
            if key in averaged:
                shadows.append(shadow)
                values.append(value.detach().to(shadow.device, shadow.dtype))
            else:
                shadow.copy_(value)
        if shadows:
            torch._foreach_lerp_(shadows, values, weight)
        self.updates += 1

    @torch.no_grad()
    def apply_shadow(self, model: nn.Module) -> None:
        """Put the average into the model and remember the training weights.

        Raises:
            RuntimeError: if it is applied already.
        """
        if self._backup is not None:
            raise RuntimeError("the averaged weights are applied already; call restore first")
        bare = unwrap(model)
        self._backup = {key: value.detach().clone() for key, value in bare.state_dict().items()}
        try:
            bare.load_state_dict(self.shadow)
        except RuntimeError:
            self.restore(model)
            raise

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Bring the training weights back; a second call does nothing."""
        if self._backup is not None:
            unwrap(model).load_state_dict(self._backup)
            self._backup = None

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The average inside the block, the training weights after it, whatever happens."""
        self.apply_shadow(model)
        try:
            yield
        finally:
            self.restore(model)

    def to(self, device: torch.device | str) -> "EMA":
        """Move the shadow."""
        self.shadow = {key: value.to(device) for key, value in self.shadow.items()}
        return self

    def state_dict(self) -> dict[str, Any]:
        """Shadow (not copied), decay and number of updates."""
        return {"shadow": self.shadow, "decay": self.decay, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; the shadow is copied, in float32."""
        self.shadow = {key: _wide(value).clone() for key, value in state["shadow"].items()}
        self.decay = state.get("decay", self.decay)
        self.updates = state.get("updates", self.updates)

    def load_shadow(self, weights: Mapping[str, Tensor], model: nn.Module | None = None) -> LoadReport:
        """Replace the known entries of the shadow.

        Args:
            weights: key -> tensor; wrapper prefixes are removed, unknown keys are counted and skipped.
            model: fills the entries that ``weights`` lacks.

        Raises:
            ValueError: if a tensor has another shape.
        """
        weights = {strip_wrappers(key): tensor for key, tensor in weights.items()}
        own = unwrap(model).state_dict() if model is not None else {}
        loaded = initialized = 0
        for key, shadow in self.shadow.items():
            if key in weights:
                if weights[key].shape != shadow.shape:
                    raise ValueError(f"{key} is {list(weights[key].shape)}, the average has {list(shadow.shape)}")
                shadow.copy_(weights[key])
                loaded += 1
            elif key in own:
                shadow.copy_(own[key])
                initialized += 1
        return LoadReport(loaded, sum(key not in self.shadow for key in weights), initialized)

    def save(self, path: Path) -> None:
        """Write the shadow under the model's keys as safetensors.

        Raises:
            ValueError: for a name of another kind of file.
        """
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: averages are written as safetensors; give a name that ends so")
        replace_file(path, partial(save_tensors, {key: value.contiguous() for key, value in self.shadow.items()}))

    def load(self, path: Path, device: torch.device | str = "cpu") -> None:
        """Replace the shadow wholesale by a file's content."""
        self.shadow = {key: _wide(value).to(device, copy=True) for key, value in read_weights(path).tensors.items()}
