"""One training step of a run on tensors without storage (torch's fake tensors): what it would keep and compute.

A model of many blocks is run with few. Blocks of a list are of one kind if all of them are recomputed or none, they carry the same
adapters, and something before them trains or nothing does. Each of a kind adds the same to everything that is measured, but the
first: it brings along what they share. So one run has one block of every kind, and there is one more run per kind:

    all of it = first run  +  sum over kinds of (blocks beyond the first) x (run with two of the kind - first run)

These are the numbers of the whole model, to the byte and to the operation.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from musubi_tuner.adapters.attach import Placement, attach, make_adapters, placements_of
from musubi_tuner.config import RunConfig
from musubi_tuner.data.batch import Batch
from musubi_tuner.memory.activation_offload import leaves
from musubi_tuner.memory.checkpointing import checkpoint_blocks
from musubi_tuner.models.family import ModelOutline, Process
from musubi_tuner.precision import COMPUTE_DTYPES, autocast
from musubi_tuner.training.task import Draws, FlowPhase, Position, weighted_sum
from musubi_tuner.units import Bytes


@dataclass
class StepNeeds:
    """What a training step on tensors without storage shows.

    Attributes:
        kept: bytes that autograd keeps on the device. block: that one block alone would keep, where blocks are recomputed.
        offloaded: bytes in main memory. inputs: the share of the block with the most of them.
        operations: of the matrix products. widest_input, widest_output: values of the largest one of a product with weights.
        trained: shapes of trained parameters, and how many have each.
    """

    kept: Bytes
    block: Bytes
    offloaded: Bytes
    inputs: Bytes
    operations: int
    widest_input: int
    widest_output: int
    trained: Counter[torch.Size]


def run_step(
    config: RunConfig,
    plan: ModelOutline,
    bucket: tuple[int, int],
    batch_size: int,
    *,
    count: bool = True,
    gpu: bool = False,
) -> StepNeeds:
    """Run the step of a config on a batch of one bucket.

    Args:
        plan: of the model without adapters. bucket: width and height in pixels.
        count: operations too, which takes a backward pass; otherwise they are 0.
        gpu: as a GPU computes it, whose autocast keeps more in float32 than a CPU's.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    memory, names = config.memory, config.spec.block_lists
    process = config.spec.family.make_process(config, plan.options)
    layers = _adapted_layers(config, plan.model)
    kinds = _kinds(config, plan.model, layers)
    norms = norms_of_gpus if gpu else nullcontext
    away = _Away()
    model = copy.deepcopy(plan.model)
    if memory.checkpoints:
        checkpoint_blocks(model, names, memory.checkpoint_every, away if memory.checkpoint_offload else None)
    with FakeTensorMode():
        trained = _give_weights(model, config, plan, kinds, layers)
        blocks = {name: list(getattr(model, name)) for name in names}
        inside = [_Inside(blocks[kind.name][kind.numbers[0]]) for kind in kinds if kind.recomputed]
        phase = FlowPhase(model, process, "model")
        batch, draws = _empty_batch(config, process, plan.shapes, bucket, batch_size)
        widest = [0, 0]

        def run(twice: _Kind | None = None) -> _Sums:
            """The step with one block of every kind, and with a second one of this."""
            for name in names:
                of_list = (kind.numbers[: 1 + (kind is twice)] for kind in kinds if kind.name == name)
                chosen = [blocks[name][number] for numbers in of_list for number in numbers]
                setattr(model, name, nn.ModuleList(chosen))
            weights = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
            away.total = 0
            kept, forward, backward = Kept(weights), _Operations(), _Operations()
            with norms():
                with forward, kept, autocast_of(config):
                    loss = weighted_sum(phase.losses(batch, draws, Position()))
                if count:
                    with backward:
                        loss.backward()
                    model.zero_grad(set_to_none=True)
            widest[:] = max(widest[0], forward.widest_input), max(widest[1], forward.widest_output)
            return _Sums(kept.total, away.total, forward.total + backward.total if count else 0)

        total = first = run()
        for kind in kinds:
            if len(kind.numbers) > 1:
                total = total.plus(run(kind), first, len(kind.numbers) - 1)
        with norms(), autocast_of(config):
            largest = max((block.kept() for block in inside), default=0)
    return StepNeeds(
        kept=total.kept,
        block=largest,
        offloaded=total.offloaded,
        inputs=away.largest,
        operations=total.operations,
        widest_input=widest[0],
        widest_output=widest[1],
        trained=trained,
    )


class _Sums(NamedTuple):
    """What grows with every block: bytes kept on the device and in main memory, operations."""

    kept: Bytes
    offloaded: Bytes
    operations: int

    def plus(self, more: "_Sums", first: "_Sums", times: int) -> "_Sums":
        """With so many times what one run has more than another."""
        return _Sums(*(own + times * (m - f) for own, m, f in zip(self, more, first)))


class _Kind(NamedTuple):
    """Blocks of the list ``name`` that are alike, see the module text, by number."""

    name: str
    recomputed: bool
    numbers: list[int]


Layers = Mapping[str, list[Placement]]
"""Block, as in ``single_blocks.3`` -> its adapted layers."""


def _adapted_layers(config: RunConfig, model: nn.Module) -> Layers:
    found: dict[str, list[Placement]] = {}
    if config.adapter.type != "none":
        for plan in placements_of(model, config.spec.adapters, config.adapter):
            found.setdefault(_block(plan.path), []).append(plan)
    return found


def _block(path: str) -> str:
    """The block that a module belongs to, if it belongs to one."""
    return ".".join(path.split(".")[:2])


def _kinds(config: RunConfig, model: nn.Module, layers: Layers) -> list[_Kind]:
    """The kinds of all lists, in the order of their first blocks."""
    memory, found = config.memory, dict[Any, _Kind]()
    passed, trains = 0, False
    for name in config.spec.block_lists:
        for number in range(len(getattr(model, name))):
            recomputed = memory.checkpoints and passed % memory.checkpoint_every == 0
            adapters = _adapters(layers.get(f"{name}.{number}", ()))
            kind = found.setdefault((name, recomputed, adapters, trains), _Kind(name, recomputed, []))
            kind.numbers.append(number)
            passed, trains = passed + 1, trains or bool(adapters)
    return list(found.values())


def _adapters(plans: Iterable[Placement]) -> tuple[tuple[str, str, int, bool], ...]:
    """What the adapters of a block do to memory and time."""
    return tuple((plan.path.removeprefix(_block(plan.path)), plan.type, plan.rank, plan.dropout > 0) for plan in plans)


def fill_with_nothing(
    model: nn.Module, dtype: torch.dtype = torch.float32, *, frozen: bool = False, but: Collection[str] = ()
) -> None:
    """Fill a model with tensors of the caller's mode.

    Args:
        dtype: of the parameters. frozen: none of them trains. but: blocks that stay as they are.
    """
    for path, module in model.named_modules():
        if _block(path) in but:
            continue
        for name, weight in module.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=weight.requires_grad and not frozen))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _give_weights(
    model: nn.Module, config: RunConfig, plan: ModelOutline, kinds: Sequence[_Kind], layers: Layers
) -> Counter[torch.Size]:
    """Fill a model with tensors of the caller's mode, which takes none from outside, and put adapters on it.

    Blocks that do not run stay as they are: of every kind, all but two.

    Returns:
        What trains in the whole model: shapes, and how many have each.
    """
    frozen = config.adapter.type != "none"
    idle = {f"{kind.name}.{number}" for kind in kinds for number in kind.numbers[2:]}
    fill_with_nothing(model, plan.dtype, frozen=frozen, but=idle)
    if not frozen:
        return Counter(weight.shape for weight in plan.model.parameters() if weight.requires_grad)
    plans = [layer for block, each in layers.items() if block not in idle for layer in each]
    # Dropout of whole modules draws numbers to branch on, which tensors without storage do not have.
    adapters = make_adapters(model, plans, config.adapter.model_copy(update={"module_dropout": 0.0}))
    attach(model, adapters)
    alike = {f"{kind.name}.{kind.numbers[0]}": len(kind.numbers) for kind in kinds}
    trained = Counter[torch.Size]()
    for path, adapter in adapters.items():
        for weight in adapter.parameters():
            outside = _block(path).partition(".")[0] not in config.spec.block_lists
            trained[weight.shape] += alike.get(_block(path), int(outside))
    return trained


def _empty_batch(
    config: RunConfig, process: Process, shapes: Mapping[str, tuple[int, ...]], bucket: tuple[int, int], batch_size: int
) -> tuple[Batch, Draws]:
    size = (batch_size, *config.latents.shape(*bucket))
    tensors = {
        "latents": torch.zeros(size),
        **{name: torch.zeros(batch_size, *shape) for name, shape in shapes.items()},
    }
    valid = dict.fromkeys(tensors, torch.ones(batch_size, dtype=torch.bool))
    ids = torch.zeros(batch_size, dtype=torch.int64)
    batch = Batch(tensors, valid, [""] * batch_size, tuple(range(batch_size)), ids)
    uniforms = {name: torch.full((batch_size,), 0.5) for name in process.uniforms}
    return batch, Draws(torch.zeros(size), torch.full((batch_size,), 0.5), uniforms)


def autocast_of(config: RunConfig) -> torch.autocast:
    return autocast(torch.device("cpu"), COMPUTE_DTYPES[config.train.mixed_precision])


@contextmanager
def norms_of_gpus() -> Iterator[None]:
    """LayerNorm in float32 under autocast, which is what torch does on GPUs; on CPUs it keeps the dtype of its input.

    Of what autocast brings to float32 on GPUs only, it is all that our models leave to it. The function is replaced for the moment:
    a function mode of torch is off in the backward pass, so blocks would be recomputed otherwise than they were computed.
    """
    plain = F.layer_norm

    def layer_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            input, args, kwargs = tree_map_only(Tensor, Tensor.float, (input, args, kwargs))
        return plain(input, *args, **kwargs)

    F.layer_norm = layer_norm
    try:
        yield
    finally:
        F.layer_norm = plain


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
    """What one call of a checkpointed block would keep without checkpointing."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.recomputing = block, block.forward
        self.args: tuple[Any, ...] = ()
        block.forward = self._noting  # type: ignore[method-assign]

    def _noting(self, *args: Any) -> Any:
        self.args = args
        return self.recomputing(*args)

    def kept(self) -> Bytes:
        """Call the block once more, with what it was called with."""
        outside = {id(t.untyped_storage()) for t in self.args if isinstance(t, Tensor)}
        outside |= {id(t.untyped_storage()) for t in (*self.block.parameters(), *self.block.buffers())}
        entered = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in self.args]
        outside |= {id(t.untyped_storage()) for t in entered if isinstance(t, Tensor)}
        inside = Kept(outside)
        with torch.enable_grad(), inside:
            type(self.block).forward(self.block, *entered)
        return inside.total


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


class Kept:
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

    def __enter__(self) -> "Kept":
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
