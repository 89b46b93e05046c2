"""Streaming the blocks of a model through a few device buffers.

Main memory keeps every streamed block, all its weights in one flat buffer; weights are never copied back. A frozen model's
are a permanent copy. A trained model's are its parameters themselves (`HostLinear`): gradients come back (see
gradient_return), the optimizer steps in main memory, and copies on the device that are older than the step are made again. The device has a ring of B buffers. Streamed blocks are numbered in call order; block j uses buffer j mod B.

    forward     before block j: wait for its copy      after it: its buffer is free, begin to copy block j + B into it
    backward    the last B blocks are still there      after block j: begin to copy block j - B

No module hooks: a call is Enter -> block (perhaps checkpointed) -> Exit, two identity functions of autograd that carry
the activations. In the backward pass Exit comes first and waits for the block, so that it can be recomputed; Enter comes last
and frees it. A forward pass that no backward pass follows (drawing, an exception) leaves other blocks in the ring: the next
`enter` finds that out, copies on the spot and counts it.

A buffer that is refilled while its block computes, or read while another block is in it, raises.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.memory.flat import ALIGNMENT, Part
from musubi_tuner.memory.frozen_linear import FrozenLinear
from musubi_tuner.memory.gradient_return import GradientReturn
from musubi_tuner.memory.host_linear import HostLinear
from musubi_tuner.memory.transfer import Transfer, block_buffers, transfer_for
from musubi_tuner.units import Bytes


def streamed_indices(total: int, swapped: int) -> list[int]:
    """Which blocks of a list are streamed: spread evenly, so that copies have resident blocks to hide behind."""
    return [(2 * i + 1) * total // (2 * swapped) for i in range(swapped)]


@dataclass
class _Streamed:
    """A streamed block: its name, its weights in main memory, those of them that train, and its layers."""

    name: str
    master: Tensor
    trained: list[nn.Parameter] = field(default_factory=list)
    layers: list[tuple[FrozenLinear | HostLinear, "_Residence"]] = field(default_factory=list)

    @property
    def version(self) -> int:
        """Changes when a loader, or an optimizer that is not fused, writes into a weight."""
        return sum(parameter._version for parameter in self.trained)


@dataclass
class _Slot:
    """A device buffer: which block is in it or on its way, and whether it computes."""

    buffer: Tensor
    holder: int = -1
    version: int = -1
    ready: bool = False
    in_use: bool = False


@dataclass
class _Residence:
    """What a streamed layer asks for its weights."""

    swap: "BlockSwap"
    rank: int
    parts: dict[str, Part] = field(default_factory=dict)

    def fetch(self, layer: nn.Module, name: str) -> Tensor | None:
        """A buffer on the device.

        Raises:
            RuntimeError: if the block is not there.
        """
        part = self.parts.get(name)
        if part is None:
            return None
        own = layer._parameters.get(name)
        if own is not None and own.data_ptr() != self.swap.streamed[self.rank].master.data_ptr() + part.start:
            raise RuntimeError(
                f"{self.swap.streamed[self.rank].name}: its {name} was replaced; load weights into it in place"
            )
        slot = self.swap.slot_of(self.rank)
        if slot.holder != self.rank or not slot.ready:
            raise RuntimeError(f"{self.swap.streamed[self.rank].name} is read while its weights are not on the device")
        return part.of(slot.buffer)

    def master(self, name: str) -> Tensor | None:
        """A buffer in main memory."""
        part = self.parts.get(name)
        if part is None:
            return None
        return part.of(self.swap.streamed[self.rank].master)

    def leave(self, layer: nn.Module, name: str, gradient: Tensor) -> None:
        """A gradient that goes to main memory."""
        assert self.swap.gradients is not None
        parameter = layer._parameters[name]
        assert parameter is not None
        self.swap.gradients.put(self.rank, parameter, self.parts[name], gradient)


class BlockSwap:
    """The streamed blocks of one model.

    Args:
        model: in main memory. Frozen blocks have `FrozenLinear` layers; the Linear layers of trained ones become `HostLinear`.
            Everything that is not streamed goes to the device.
        counts: how many blocks of each list are streamed.
        ring: device buffers. pinned: pin the permanent copies; else they go through two small pinned buffers.
        transfer: engine; absent = the device's.
        bind: give the layers of a block their device buffers while it is there, as compiled blocks need it. Those keep views
            of them for the backward pass, so the blocks must be checkpointed.
    """

    def __init__(
        self,
        model: nn.Module,
        counts: Mapping[str, int],
        device: torch.device,
        *,
        ring: int = 2,
        pinned: bool = True,
        transfer: Transfer | None = None,
        bind: bool = False,
    ) -> None:
        self.device, self.recoveries, self.bind = device, 0, bind
        self.transfer = transfer or transfer_for(device, pinned=pinned)
        blocks = {
            f"{name}.{index}": getattr(model, name)[index]
            for name, count in counts.items()
            for index in streamed_indices(len(getattr(model, name)), count)
        }
        plans = [self._lay_out(block, name, rank) for rank, (name, block) in enumerate(blocks.items())]
        advice = "set memory.swap_pinned = false (slower copies), or lower memory.blocks_to_swap"
        masters = block_buffers([size for _, size in plans], pinned and device.type == "cuda", advice)
        self.streamed: list[_Streamed] = []
        for name, (layers, _), master in zip(blocks, plans, masters):
            self._take(_Streamed(name, master, layers=layers))
        model.to(device)
        size = max((len(block.master) for block in self.streamed), default=0)
        self.slots = [
            _Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(min(ring, len(self.streamed)))
        ]
        trained = any(weight.requires_grad for block in self.streamed for weight in block.trained)
        self.gradients = GradientReturn([len(block.master) for block in self.streamed], device) if trained else None
        for rank, block in enumerate(blocks.values()):
            block.forward = self._swapped(block.forward, rank)  # type: ignore[method-assign]
        for rank in range(len(self.slots)):
            self._load(rank, self.transfer.record())

    def _lay_out(
        self, block: nn.Module, name: str, rank: int
    ) -> tuple[list[tuple[FrozenLinear | HostLinear, _Residence]], Bytes]:
        """Where the buffers of a block's layers will lie in its flat buffer, and the size of that."""
        for path, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                if type(layer) is not nn.Linear:
                    raise ValueError(f"{name}.{path} carries an adapter on an ordinary layer; freeze its weight first")
                block.set_submodule(path, HostLinear(layer))
        layers: list[tuple[FrozenLinear | HostLinear, _Residence]] = []
        size = 0
        for layer in block.modules():
            if not isinstance(layer, FrozenLinear | HostLinear):
                continue
            residence = _Residence(self, rank)
            for key in layer.BUFFERS:
                tensor = getattr(layer, key)
                if tensor is not None:
                    length = tensor.numel() * tensor.element_size()
                    residence.parts[key] = Part(size, size + length, tensor.dtype, tensor.shape)
                    size += -(-length // ALIGNMENT) * ALIGNMENT
            layers.append((layer, residence))
        if not layers:
            raise ValueError(f"{name} has no layers to swap")
        return layers, size

    def _take(self, streamed: _Streamed) -> None:
        """Move the weights of a block's layers into its flat buffer."""
        self.streamed.append(streamed)
        for layer, residence in streamed.layers:
            for key, part in residence.parts.items():
                target, own = part.of(streamed.master), getattr(layer, key)
                target.copy_(own.detach())
                if isinstance(layer, HostLinear):
                    own.data = target
                    streamed.trained.append(own)
                else:
                    layer._buffers[key] = None
            layer.residence = residence

    @property
    def host_bytes(self) -> int:
        """Main memory that the streamed blocks take."""
        pieces = {block.master.untyped_storage().data_ptr(): block.master.untyped_storage() for block in self.streamed}
        return sum(piece.nbytes() for piece in pieces.values())

    @property
    def device_bytes(self) -> int:
        """Device memory of the ring, and of gradients on their way."""
        ring = sum(len(slot.buffer) for slot in self.slots)
        return ring + (self.gradients.device_bytes if self.gradients is not None else 0)

    def slot_of(self, rank: int) -> _Slot:
        """The buffer that a block uses."""
        return self.slots[rank % len(self.slots)]

    # -- the order -----------------------------------------------------------------------------------------------------

    def _load(self, rank: int, after: Any) -> None:
        """Begin to copy a block into its buffer.

        Raises:
            RuntimeError: if a block computes with that buffer.
        """
        slot = self.slot_of(rank)
        if slot.in_use:
            raise RuntimeError(
                f"{self.streamed[rank].name} would overwrite {self.streamed[slot.holder].name} while that computes"
            )
        # Nobody's until the copy has begun: an exception in between must not leave a claim on old bytes.
        slot.holder, slot.ready, slot.version = -1, False, -1
        source, version = self.streamed[rank].master, self.streamed[rank].version
        self.transfer.submit(rank % len(self.slots), slot.buffer[: len(source)], source, after)
        slot.holder, slot.version = rank, version

    def enter(self, rank: int, *, begins: bool = False) -> None:
        """Have a block's weights on the device, and keep them there until it is left.

        Args:
            begins: a forward pass begins with this block, so nothing is in use.
        """
        if begins:
            self.reset()
        slot = self.slot_of(rank)
        if slot.holder != rank or slot.version != self.streamed[rank].version:
            self.recoveries += 1
            self._load(rank, self.transfer.record())
        self.transfer.wait(rank % len(self.slots))
        slot.ready = slot.in_use = True
        if self.bind:
            for layer, residence in self.streamed[rank].layers:
                layer._buffers.update({key: part.of(slot.buffer) for key, part in residence.parts.items()})

    def leave_forward(self, rank: int, training: bool) -> None:
        """Free a block's buffer for the one that needs it next."""
        following = rank + len(self.slots)
        if following >= len(self.streamed):
            # The backward pass begins here; without one, the next forward pass does.
            following = rank if training else rank % len(self.slots)
        self._free(rank, following)

    def enter_backward(self, rank: int) -> None:
        """Have a block's weights on the device for its backward pass, and room for its gradients."""
        self.enter(rank)
        if self.gradients is not None:
            self.gradients.begin(rank)

    def leave_backward(self, rank: int) -> None:
        """Free a block's buffer for the one before, and let its gradients go."""
        if self.gradients is not None:
            self.gradients.send(rank)
        self._free(rank, rank - len(self.slots) if rank >= len(self.slots) else rank)

    def _free(self, rank: int, following: int) -> None:
        self._release(self.slot_of(rank))
        if following != rank:
            self._load(following, self.transfer.record())

    def refresh(self) -> None:
        """After a change of trained weights: begin to copy the first blocks again, whose copies are old now."""
        for slot in self.slots:
            self._release(slot)
            if slot.holder >= 0 and self.streamed[slot.holder].trained:
                slot.version = -1
        for rank, slot in enumerate(self.slots):
            if slot.holder != rank or slot.version == -1:
                self._load(rank, self.transfer.record())

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Refresh after every step of an optimizer; a fused one leaves no trace in the weights themselves."""
        optimizer.register_step_post_hook(lambda *_: self.refresh())

    def reset(self) -> None:
        """After an exception inside a block, or before the first: nothing computes."""
        for slot in self.slots:
            self._release(slot)
        if self.gradients is not None:
            self.gradients.reset()

    def _release(self, slot: _Slot) -> None:
        """The block in a buffer does not compute any more."""
        slot.in_use = False
        if self.bind and slot.holder >= 0:
            for layer, residence in self.streamed[slot.holder].layers:
                layer._buffers.update(dict.fromkeys(residence.parts))

    def _swapped(self, forward: Callable[..., Any], rank: int) -> Callable[..., Any]:
        @wraps(forward)
        def streaming(*args: Any) -> Any:
            training = torch.is_grad_enabled()
            # Activations [B, tokens, width] go through the gates. The conditioning vector [B, width] goes around them: through
            # them its gradient would be summed per block first, and so be rounded otherwise.
            places = [
                index
                for index, arg in enumerate(args)
                if isinstance(arg, Tensor) and arg.is_floating_point() and arg.ndim >= 3
            ]
            tensors = [args[index] for index in places]
            if training and not any(tensor.requires_grad for tensor in tensors):
                # Else autograd would never come back through Enter.
                tensors[0] = tensors[0].detach().requires_grad_()
            entered = _Enter.apply(self, rank, *tensors)
            inner = list(args)
            for index, tensor in zip(places, entered, strict=True):
                inner[index] = tensor
            try:
                out = forward(*inner)
            except BaseException:
                self.reset()
                raise
            alone = isinstance(out, Tensor)
            left = _Exit.apply(self, rank, training, *((out,) if alone else out))
            return left[0] if alone else left

        return streaming


class _Enter(torch.autograd.Function):
    """Identity; brings a block in before its forward pass, lets it go after its backward pass."""

    @staticmethod
    def forward(ctx: Any, swap: BlockSwap, rank: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.swap, ctx.rank = swap, rank
        swap.enter(rank, begins=rank == 0)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.swap.leave_backward(ctx.rank)
        return None, None, *gradients


class _Exit(torch.autograd.Function):
    """Identity; lets a block go after its forward pass, brings it in before its backward pass."""

    @staticmethod
    def forward(ctx: Any, swap: BlockSwap, rank: int, training: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.swap, ctx.rank = swap, rank
        swap.leave_forward(rank, training)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.swap.enter_backward(ctx.rank)
        return None, None, None, *gradients


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Path and dense weight of every Linear layer, wherever and however it is stored; on the CPU for swapped ones."""
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | HostLinear):
            yield path, layer.weight
        elif isinstance(layer, FrozenLinear):
            residence = layer.residence
            if residence is None:
                yield path, layer.dense_weight(layer.dtype)
                continue
            copy = FrozenLinear(
                residence.master("stored"), residence.master("scale"), None, layer.dtype, storage=layer.storage,
                shape=(layer.out_features, layer.in_features),
            )  # fmt: skip
            yield path, copy.dense_weight(layer.dtype)
