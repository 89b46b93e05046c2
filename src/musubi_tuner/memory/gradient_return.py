"""Gradients of trained blocks whose weights live in main memory, on their way there beside the computation.

The layers of a block leave their gradients in a flat buffer on the device, laid out as the block's weights. Behind the block's
backward pass one copy brings the buffer to main memory while the block before computes, and a thread adds what arrives to the sums of
the block. There are two buffers, so a copy has the time of a whole block before anything waits for it.

    begin    the computation waits until the last copy out of the buffer is done, two blocks ago
    put      a layer's gradient goes into the buffer
    send     the program waits until the last arrival of this buffer is added up, then the copy begins
    end of the backward pass      the program waits for everything; the sums become the parameters' ``.grad``

Until then the parameters have the gradients from before: after an exception half-way they are as if the backward pass had not
been, or, where earlier micro-batches count, as incomplete as autograd leaves them. The sums are rounded as autograd rounds them.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from musubi_tuner.memory.flat import Part
from musubi_tuner.memory.transfer import Transfer, host_buffer, transfer_for
from musubi_tuner.units import Bytes

GRADIENT_BUFFERS = 2
"""On the device, and as many in main memory."""


class _Left(NamedTuple):
    """A gradient that a layer has left in the buffer: whose it is, where, and whether nothing is summed up yet."""

    parameter: nn.Parameter
    part: Part
    first: bool


class GradientReturn:
    """The way back of the gradients of one model's streamed blocks.

    Args:
        sizes: bytes of each block. transfer: engine; absent = the device's.
    """

    def __init__(self, sizes: Sequence[Bytes], device: torch.device, transfer: Transfer | None = None) -> None:
        # An engine of its own: both directions at once.
        self.transfer = transfer or transfer_for(device)
        count, size = min(GRADIENT_BUFFERS, len(sizes)), max(sizes)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        advice = "lower memory.blocks_to_swap"
        self.arrived = [host_buffer(size, device.type == "cuda", advice) for _ in range(count)]
        self.sums = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        self.thread = ThreadPoolExecutor(1, "gradients")
        self.adding: list[Future[None] | None] = [None] * count
        self.turn = 0
        self.rank: int | None = None
        self.left: dict[nn.Parameter, _Left] = {}
        self.whole: dict[nn.Parameter, Tensor] = {}
        self.ends = False

    @property
    def device_bytes(self) -> Bytes:
        """Device memory of the buffers."""
        return sum(len(buffer) for buffer in self.buffers)

    def begin(self, rank: int) -> None:
        """Have a buffer for the gradients of the block whose backward pass comes next. Called within the backward pass."""
        if not self.ends:
            Variable._execution_engine.queue_callback(self._finish)
            self.ends = True
        self.turn = (self.turn + 1) % len(self.buffers)
        self.transfer.wait(self.turn)
        self.rank, self.left = rank, {}

    def put(self, rank: int, parameter: nn.Parameter, part: Part, gradient: Tensor) -> None:
        """Leave a gradient of a block on the device, in the dtype of the parameter.

        Raises:
            RuntimeError: outside of the block's backward pass.
        """
        if self.rank != rank:
            raise RuntimeError(f"a gradient of streamed block {rank} comes when the buffer is that of {self.rank}")
        target = part.of(self.buffers[self.turn])
        if parameter in self.left:
            target.add_(gradient)
            return
        target.copy_(gradient)
        held, total = parameter.grad, part.of(self.sums[rank])
        self.left[parameter] = _Left(parameter, part, held is None or held.data_ptr() != total.data_ptr())

    def send(self, rank: int) -> None:
        """Begin to copy what the layers of a block have left."""
        turn, left, self.rank = self.turn, list(self.left.values()), None
        before, size = self.adding[turn], len(self.sums[rank])
        if before is not None:
            before.result()
        self.transfer.submit(
            turn, self.arrived[turn][:size], self.buffers[turn][:size], self.transfer.record(), held=True
        )
        self.adding[turn] = self.thread.submit(self._add, turn, rank, left)
        self.whole |= {one.parameter: one.part.of(self.sums[rank]) for one in left}

    def _add(self, turn: int, rank: int, left: Sequence[_Left]) -> None:
        """In the thread: add up what has arrived."""
        self.transfer.host_wait(turn)
        for one in left:
            arrived, total = one.part.of(self.arrived[turn]), one.part.of(self.sums[rank])
            if one.first:
                total.copy_(arrived)
            else:
                total.add_(arrived)

    def _finish(self) -> None:
        """At the end of the backward pass: give the parameters their gradients."""
        self.ends = False
        for adding in self.adding:
            if adding is not None:
                adding.result()
        for parameter, total in self.whole.items():
            if parameter.grad is None:
                parameter.grad = total
            elif parameter.grad.data_ptr() != total.data_ptr():
                parameter.grad.add_(total)
        self.whole = {}

    def reset(self) -> None:
        """Forget a backward pass that did not come to its end."""
        wait([adding for adding in self.adding if adding is not None])
        self.adding = [None] * len(self.adding)
        self.whole, self.ends, self.rank = {}, False, None
