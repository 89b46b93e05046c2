"""One training step of a run on tensors without storage (torch's fake tensors): what it would keep and compute."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from musubi_tuner.adapters.attach import attach, make_adapters, plan_adapters, target_paths
from musubi_tuner.config import RunConfig
from musubi_tuner.data.dataset import Batch
from musubi_tuner.memory.activation_offload import leaves
from musubi_tuner.memory.checkpointing import checkpoint_blocks
from musubi_tuner.models.spec import Process
from musubi_tuner.training.step import Draws, training_step
from musubi_tuner.units import Bytes


@dataclass
class StepNeeds:
    """What a training step on tensors without storage shows.

    Attributes:
        kept: bytes that autograd keeps on the device. block: that one block alone would keep, where blocks are recomputed.
        offloaded: bytes in main memory. inputs: the share of the block with the most of them.
        operations: of the matrix products. widest_input, widest_output: values of the largest one of a product with weights.
        values: trained ones.
    """

    kept: Bytes
    block: Bytes
    offloaded: Bytes
    inputs: Bytes
    operations: int
    widest_input: int
    widest_output: int
    values: int


def run_step(
    config: RunConfig,
    model: nn.Module,
    dtype: torch.dtype,
    shapes: Mapping[str, tuple[int, ...]],
    bucket: tuple[int, int],
    batch_size: int,
    options: dict[str, Any],
    *,
    count: bool = True,
) -> StepNeeds:
    """Run the step of a config on a batch of one bucket.

    Args:
        model: of the run, without adapters; its class and config are used. dtype: of its weights.
        shapes: of the cached tensors of one sample, latents left out.
        bucket: width and height in pixels. options: of the family's process.
        count: operations too, which takes about as long again; otherwise they are 0.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec, memory = config.spec, config.memory
    process = spec.load("make_process")(config, options)
    with FakeTensorMode():
        # Built anew in this mode, which does not take tensors from outside.
        model = _trainable_copy(config, model, dtype)
        batch, draws = _empty_batch(config, process, shapes, bucket, batch_size)
        values = sum(p.numel() for p in model.parameters() if p.requires_grad)
        weights = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
        operations, products = 0, _Operations()
        if count or memory.fp8_compute:
            operations, products = _count_operations(config, model, process, batch, draws)
        inside: list[_Inside] = []
        away = _Away()
        if memory.checkpoints:
            blocks = [block for name in spec.block_lists for block in getattr(model, name)]
            checkpoint_blocks(
                model, spec.block_lists, memory.checkpoint_every, away if memory.checkpoint_offload else None
            )
            inside = [_Inside(block) for block in {type(block): block for block in blocks}.values()]
        kept = _Kept(weights)
        with kept, _autocast(config):
            training_step(model, process, batch, draws, 0)
        return StepNeeds(
            kept=kept.total,
            block=max((block.kept for block in inside), default=0),
            offloaded=away.total,
            inputs=away.largest,
            operations=operations,
            widest_input=products.widest_input,
            widest_output=products.widest_output,
            values=values,
        )


def _trainable_copy(config: RunConfig, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model of a run with its adapters, in the mode of the caller."""
    with default_dtype(dtype):
        copy = type(model)(model.config)
    if config.adapter.type != "none":
        copy.requires_grad_(False)
        plans = plan_adapters(target_paths(copy, config.spec.adapters), config.spec.adapters, config.adapter)
        # Dropout draws numbers to branch on, which tensors without storage do not have.
        attach(copy, make_adapters(copy, plans, config.adapter.model_copy(update={"module_dropout": 0.0})))
    return copy


def _empty_batch(
    config: RunConfig, process: Process, shapes: Mapping[str, tuple[int, ...]], bucket: tuple[int, int], batch_size: int
) -> tuple[Batch, Draws]:
    spec = config.spec
    size = (batch_size, spec.latent_channels, bucket[1] // spec.vae_factor, bucket[0] // spec.vae_factor)
    tensors = {name: torch.zeros(batch_size, *shape) for name, shape in shapes.items()}
    valid = dict.fromkeys(tensors, torch.ones(batch_size, dtype=torch.bool))
    ids = torch.zeros(batch_size, dtype=torch.int64)
    batch = Batch(torch.zeros(size), tensors, valid, [""] * batch_size, tuple(range(batch_size)), ids)
    uniforms = {name: torch.full((batch_size,), 0.5) for name in process.uniforms}
    return batch, Draws(torch.zeros(size), torch.full((batch_size,), 0.5), uniforms)


def _autocast(config: RunConfig) -> torch.autocast:
    compute = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.mixed_precision]
    return torch.autocast("cpu", dtype=compute or torch.bfloat16, enabled=compute is not None)


def _count_operations(
    config: RunConfig, model: nn.Module, process: Process, batch: Batch, draws: Draws
) -> tuple[int, "_Operations"]:
    """Operations of forward, backward and recomputation; and what was met in a forward pass with one block in every list.

    Blocks of a list are alike: they are counted with one block in every list, and then, where there are more or the operations
    of one block are needed, with the first of one list twice.
    """
    lists = {name: blocks for name in config.spec.block_lists if len(blocks := getattr(model, name))}
    met: list[_Operations] = []

    def count(twice: str = "") -> tuple[int, int]:
        for name, blocks in lists.items():
            setattr(model, name, nn.ModuleList([blocks[0]] * (2 if name == twice else 1)))
        forward, backward = _Operations(), _Operations()
        with forward, _autocast(config):
            output = training_step(model, process, batch, draws, 0)
        with backward:
            output.loss.backward()
        model.zero_grad(set_to_none=True)
        met.append(forward)
        return forward.total, backward.total

    base = count()
    more = {name: count(name) for name, blocks in lists.items() if len(blocks) > 1 or config.memory.checkpoints}
    for name, blocks in lists.items():
        setattr(model, name, blocks)
    total, index = sum(base), 0
    for name, blocks in lists.items():
        if name in more:
            total += (len(blocks) - 1) * (sum(more[name]) - sum(base))
        if config.memory.checkpoints:
            total += (more[name][0] - base[0]) * sum(
                (index + i) % config.memory.checkpoint_every == 0 for i in range(len(blocks))
            )
        index += len(blocks)
    return total, met[0]


class _Operations(TorchDispatchMode):
    """Adds up the operations of matrix products by torch's formulas, and those of the attention kernel of CPUs."""

    def __init__(self) -> None:
        super().__init__()
        aten = torch.ops.aten
        self.total = self.widest_input = self.widest_output = 0
        self.products = (aten.mm, aten.addmm)
        self.formulas: dict[Any, Callable[..., int]] = {
            **flop_registry,
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
                q.shape, k.shape, v.shape
            ),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda out, q, k, v, *_, **__: (
                sdpa_backward_flop_count(out.shape, q.shape, k.shape, v.shape)
            ),
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        if func._overloadpacket in self.products:
            self.widest_input = max(self.widest_input, args[-2].numel())
            self.widest_output = max(self.widest_output, out.numel())
        return out


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Inside:
    """What one call of a checkpointed block would keep without checkpointing, noted whenever it is called."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.recomputing, self.kept = block, block.forward, 0
        block.forward = self._measured  # type: ignore[method-assign]

    def _measured(self, *args: Any) -> Any:
        outside = {id(t.untyped_storage()) for t in args if isinstance(t, Tensor)}
        outside |= {id(t.untyped_storage()) for t in (*self.block.parameters(), *self.block.buffers())}
        entered = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        outside |= {id(t.untyped_storage()) for t in entered if isinstance(t, Tensor)}
        inside = _Kept(outside)
        with torch.enable_grad(), inside:
            type(self.block).forward(self.block, *entered)
        self.kept = inside.total
        return self.recomputing(*args)


class _Away:
    """Counts the inputs of blocks that are kept in main memory; see memory.activation_offload, whose rule it follows."""

    def __init__(self) -> None:
        self.total = self.largest = 0

    def saving(self) -> Any:
        """Context for the call of one block."""
        before = self.total

        def pack(tensor: Tensor) -> Tensor:
            if leaves(tensor):
                self.total += tensor.numel() * tensor.element_size()
                self.largest = max(self.largest, self.total - before)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


class _Kept:
    """Context that adds up the storages which autograd keeps inside it, each once; known ones are left out."""

    def __init__(self, known: set[int]) -> None:
        self.known, self.total = known, 0
        self.alive: list[Any] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self.known:
            self.known.add(id(storage))
            self.alive.append(storage)
            self.total += storage.nbytes()
        return tensor

    def __enter__(self) -> "_Kept":
        self.hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.hooks.__exit__(*args)


class Alive(TorchDispatchMode):
    """The most bytes at once of the tensors that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and id(storage) not in self.known | before:
                self.known.add(id(storage))
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, size: Bytes) -> None:
        self.known.discard(key)
        self.now -= size
