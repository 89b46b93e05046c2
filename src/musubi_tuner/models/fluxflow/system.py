"""The parts of a FluxFlow system as one model: the flow processor, with the frozen parts that it is used with.

Texts come as states of the language model; its head is computed here. Without a text, the pooled vector is zero and no state is seen.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from musubi_tuner.flow import pack_pixels, unpack_pixels
from musubi_tuner.models.fluxflow.autoencoder import Compressor, UpBlock, recomputing
from musubi_tuner.models.fluxflow.geometry import FluxFlowConfig
from musubi_tuner.models.fluxflow.model import FlowProcessor
from musubi_tuner.models.fluxflow.state_dict import build_part
from musubi_tuner.models.fluxflow.text_encoder import TextEncoder

VAE_PARTS = ("compressor", "expander")


class FluxFlowSystem(nn.Module):
    """Parts by the names that they have in our files: ``vae``, ``flow``, ``text_encoder``, ``discriminator``.

    Args:
        config: geometry. parts: that it has, of `state_dict.PARTS`.
    """

    def __init__(self, config: FluxFlowConfig, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.config = config
        vae = {name: parts[name] for name in VAE_PARTS if name in parts}
        if vae:
            self.vae = nn.ModuleDict(vae)
        for name in ("flow", "text_encoder", "discriminator"):
            if name in parts:
                self.add_module(name, parts[name])

    def recompute(self) -> None:
        """From now on stages of the autoencoder and blocks of the flow keep their inputs only."""
        for module in self.modules():
            if isinstance(module, Compressor | UpBlock | FlowProcessor):
                module.call = recomputing

    def forward(self, noisy_BDhw: Tensor, index: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """v [B, D, h, w] of noisy latents.

        Args:
            index: times, int64 [B] in 0..999. inputs: see `conditioning`.
        """
        flow: FlowProcessor = self.flow  # type: ignore[assignment]
        height, width = noisy_BDhw.shape[-2:]
        pooled, states, mask = self.text(inputs)
        v = flow.predict(pack_pixels(noisy_BDhw), (height, width), pooled, index, states, mask)
        return unpack_pixels(v, height, width)

    def text(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Pooled texts [B, E], and states with their mask where the model takes them."""
        encoder: TextEncoder = self.text_encoder  # type: ignore[assignment]
        keep = inputs["keep"]
        if "bert_mean" in inputs:
            pooled = encoder.ouput_layer(inputs["bert_mean"])
            return pooled * keep[:, None].to(pooled.dtype), None, None
        mask = inputs["bert_mask"].bool()
        states = inputs["bert_states"] if "bert_states" in inputs else encoder.states(inputs["bert_ids"], mask)
        pooled = encoder.pool(states, mask)
        pooled = pooled * keep[:, None].to(pooled.dtype)
        if self.config.text_mode == "pooled":
            return pooled, None, None
        return pooled, states, mask & keep[:, None].bool()


def build_system(config: FluxFlowConfig, parts: tuple[str, ...]) -> FluxFlowSystem:
    """A system with fresh weights, or on the meta device inside ``torch.device("meta")``."""
    return FluxFlowSystem(config, {part: build_part(part, config) for part in parts})


def freeze_all_but_flow(model: FluxFlowSystem) -> None:
    """Only the flow processor trains."""
    model.requires_grad_(False)
    model.flow.requires_grad_(True)  # type: ignore[operator]


def no_text(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of the unconditional branch, which training drops texts to."""
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}
