"""Full training with the model sharded across the ranks: torch's FSDP2.

Every rank keeps a shard of each weight, cut along its first axis, with its gradient, optimizer state and average. A block is gathered
while it computes. Optimizers and averages see the shards as plain tensors; states and checkpoints hold full tensors, as those of one
process do.

Scalars cannot be sharded (fully_shard refuses them): every rank has them, and `Role.ready` reduces their gradients.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


class Unmatched(NamedTuple):
    """Names that a model has and a state lacks, and the other way round."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class ShardedModel(nn.Module):
    """This rank's shards of a model, under the model's names; creating this shards the model.

    Args:
        model: on its device. block_lists: names of its lists of blocks; each block is gathered by itself.
        count: ranks.
    """

    def __init__(
        self, model: nn.Module, block_lists: Sequence[str], device: torch.device, rank: int, count: int
    ) -> None:
        super().__init__()
        self.rank, self.count = rank, count
        whole = {parameter for parameter in model.parameters() if parameter.ndim == 0}
        mesh = init_device_mesh(device.type, (count,))
        blocks = [block for name in block_lists for block in getattr(model, name)]
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh, ignored_params=whole)
        # Of blocks whose outputs are views; nothing here writes into them.
        warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
        self._held = (model,)  # not a submodule
        self._sharded: dict[str, DTensor] = {}
        self._parts: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                self._sharded[name] = parameter
                self._parts[name] = nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
            else:
                self._parts[name] = parameter

    @property
    def model(self) -> nn.Module:
        """The sharded model, which computes."""
        return self._held[0]

    @property
    def replicated(self) -> list[nn.Parameter]:
        """Trained parameters that every rank has in full, whose gradients FSDP does not reduce."""
        return [part for name, part in self._parts.items() if part.requires_grad and name not in self._sharded]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parts."""
        return ((prefix + name, part) for name, part in self._parts.items())

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Buffers of the model, which are whole."""
        return self.model.named_buffers(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """The parts and the buffers, not copied."""
        return {
            name: self._parts[name].detach() if name in self._parts else tensor
            for name, tensor in self.model.state_dict().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy parts into the model's.

        Raises:
            RuntimeError: if ``strict`` and the names differ.
        """
        own = self.state_dict()
        unmatched = Unmatched(
            [name for name in own if name not in state_dict], [name for name in state_dict if name not in own]
        )
        if strict and any(unmatched):
            raise RuntimeError(f"the weights belong to another model: {unmatched}")
        for name, tensor in own.items():
            if name in state_dict:
                tensor.copy_(state_dict[name])
        return unmatched

    def collect_gradients(self) -> None:
        """Give the parts their gradients, which are averaged over the ranks by now."""
        for name, parameter in self._sharded.items():
            gradient = parameter.grad
            self._parts[name].grad = None if gradient is None else gradient.to_local()  # type: ignore[attr-defined]

    def forget_gradients(self) -> None:
        """Forget those of the model."""
        for parameter in self._sharded.values():
            parameter.grad = None

    @torch.no_grad()
    def clip_gradients(self, max_norm: float, add_up: Callable[[Tensor], None]) -> Tensor:
        """As `optimizers.clip_gradients`, with the norm over all parts of all ranks.

        Args:
            add_up: replaces a tensor by its sum over the ranks.
        """
        gradients = {name: part.grad for name, part in self._parts.items() if part.grad is not None}
        cut = [gradient.float().square().sum() for name, gradient in gradients.items() if name in self._sharded]
        whole = [gradient.float().square().sum() for name, gradient in gradients.items() if name not in self._sharded]
        device = next(iter(self._parts.values())).device
        squares = torch.stack([*cut, torch.zeros((), device=device)]).sum()
        add_up(squares)
        norm = torch.stack([squares, *whole]).sum().sqrt()
        if max_norm:
            torch._foreach_mul_(list(gradients.values()), (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def cut(self, tensors: Mapping[str, Tensor], name_of: Callable[[str], str] = str) -> dict[str, Tensor]:
        """This rank's parts of whole tensors; what is not of the shape of a sharded parameter stays whole.

        Args:
            name_of: key -> name of the parameter that it belongs to.
        """
        found = {}
        for key, tensor in tensors.items():
            sharded = self._sharded.get(name_of(key))
            if sharded is not None and tensor.shape == sharded.shape:
                chunks = tensor.chunk(self.count)
                tensor = (chunks[self.rank] if self.rank < len(chunks) else tensor[:0]).clone()
            found[key] = tensor
        return found

    def gathered(self, tensors: Mapping[str, Tensor], name_of: Callable[[str], str] = str) -> dict[str, Tensor]:
        """Whole tensors from the parts of all ranks, in main memory of the first one; {} on the others, which call it together.

        Args:
            name_of: see `cut`.
        """
        found = {}
        for key, tensor in tensors.items():
            sharded = self._sharded.get(name_of(key))
            if sharded is not None and tensor.shape == self._parts[name_of(key)].shape:
                tensor = DTensor.from_local(
                    tensor.to(sharded.device).contiguous(), sharded.device_mesh, sharded.placements,
                    run_check=False, shape=sharded.shape, stride=sharded.stride(),
                ).full_tensor()  # fmt: skip
            if self.rank == 0:
                found[key] = tensor.cpu()
        return found

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The whole model on every rank inside the block, so that each may compute what it wants. All ranks enter it."""
        modules = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self.model, recurse=False)
