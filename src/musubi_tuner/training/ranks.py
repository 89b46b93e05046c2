"""The processes of a run, called ranks: the device of this one, what they agree on, and gradients that all of them have.

One rank is the usual case, and then nothing here costs anything.
"""

import contextlib
import os
import platform
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from musubi_tuner.config import RunConfig
from musubi_tuner.device import choose_device
from musubi_tuner.errors import ConfigError
from musubi_tuner.run_record import REQUESTS
from musubi_tuner.stopping import StopRequest


@dataclass(frozen=True)
class Requests:
    """What a run is asked to do between two updates.

    Attributes:
        signum: of the signal that asks to stop; 0 = none. stop, save, sample: files in control.
    """

    signum: int = 0
    stop: bool = False
    save: bool = False
    sample: bool = False


class Ranks:
    """This process among those of its run.

    Attributes:
        device: of this rank. rank: its number. count: of all. main: whether it is the one that writes and draws.
        sharded: whether the model is sharded across them; see `sharded`.
        stop: a signal to stop that arrived here; `requests` is what all ranks agree on.

    Args:
        answer: tells the person at once that a request to stop arrived.

    Raises:
        ConfigError: if the launcher started several processes that would not train together, or fp16 has no GPU.
    """

    def __init__(self, config: RunConfig, answer: Callable[[], None]) -> None:
        self.accelerator = _make_accelerator(config)
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.count: int = self.accelerator.num_processes
        self.main: bool = self.accelerator.is_main_process
        self.sharded = config.distributed.fsdp and self.count > 1
        self.stop = StopRequest(lambda: answer() if self.main else None)
        self._patient = _patient_group() if self.count > 1 else None

    @property
    def sum_device(self) -> torch.device:
        """Where float64 sums are kept."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    @property
    def local_count(self) -> int:
        """Ranks on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def wait(self) -> None:
        """Wait for all ranks, however long the main one draws, saves or encodes."""
        if self.count > 1:
            torch.distributed.barrier(group=self._patient)

    def end(self) -> None:
        """Leave the group: what the main rank does after it, the others need not wait for."""
        self.wait()
        if self.count > 1:
            torch.distributed.destroy_process_group()

    def add_up(self, values: Tensor) -> None:
        """Replace a tensor by its sum over all ranks, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(values)

    def joined(self, values: dict[str, Any]) -> dict[str, Any]:
        """The entries of all ranks; where several have one, the greatest, for a rank knows old entries of the others."""
        if self.count == 1:
            return dict(values)
        found: list[dict[str, Any]] = [{} for _ in range(self.count)]
        torch.distributed.all_gather_object(found, values, group=self._patient)
        return {
            key: max(own[key] for own in found if key in own) for key in {key: None for own in found for key in own}
        }

    def agree(self, values: dict[str, Any]) -> None:
        """Compare what must be the same on all ranks.

        Args:
            values: by the name that a person knows.

        Raises:
            ConfigError: naming what differs, with the ranks and their machines.
        """
        if self.count == 1:
            return
        found: list[tuple[str, dict[str, Any]]] = [("", {})] * self.count
        torch.distributed.all_gather_object(found, (platform.node(), values), group=self._patient)
        for name in values:
            if any(own.get(name) != values[name] for _, own in found):
                each = "; ".join(f"rank {rank} on {host}: {own.get(name)}" for rank, (host, own) in enumerate(found))
                raise ConfigError(
                    f"the processes of this run do not have the same {name} ({each}); all of them need the same run file, "
                    "run.output_dir, pictures and caches, on storage that they share or in equal copies"
                )

    def least(self, value: int) -> int:
        """The smallest value that a rank has."""
        return self._agreed([value], torch.distributed.ReduceOp.MIN)[0] if self.count > 1 else value

    def any(self, here: bool) -> bool:
        """Whether something holds on any rank."""
        return bool(self._agreed([int(here)], torch.distributed.ReduceOp.MAX)[0]) if self.count > 1 else here

    def requests(self, of_control: Collection[str] = ()) -> Requests:
        """What is asked for, by a signal to any rank or by files in control, the same on all ranks.

        Args:
            of_control: names of requests that the main rank found there.
        """
        found = [self.stop.signum, *(int(name in of_control) for name in REQUESTS)]
        if self.count > 1:
            found = self._agreed(found, torch.distributed.ReduceOp.MAX)
        return Requests(found[0], *map(bool, found[1:]))

    def _agreed(self, values: list[int], operation: Any) -> list[int]:
        shared = torch.tensor(values, device=self.device)
        torch.distributed.all_reduce(shared, op=operation)
        return [int(value) for value in shared.tolist()]

    def parallel(self, model: nn.Module, by_hand: Sequence[nn.Parameter] = ()) -> nn.Module:
        """A model whose gradients are averaged over the ranks while they are made; itself if there is one rank, or the model is sharded.

        Args:
            by_hand: trained parameters that `average_gradients` takes care of instead. Frozen ones need no average.
        """
        if self.count == 1 or self.sharded:
            return model
        aside = {id(parameter) for parameter in by_hand}
        left_out = [name for name, p in model.named_parameters() if not p.requires_grad or id(p) in aside]
        if left_out:
            left_out += [name for name, _ in model.named_buffers()]
            ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(model, left_out)  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            # The name that replaces it is unknown to older versions of torch.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return self.accelerator.prepare(model)

    def accumulating(self, model: nn.Module | None, is_last: bool) -> AbstractContextManager[Any]:
        """Holds the exchange of gradients back until the last micro-batch of an update.

        Args:
            model: what `parallel` gave; None where gradients are not exchanged while they are made.
        """
        if model is None or is_last or self.count == 1 or self.sharded:
            return (
                contextlib.nullcontext()
            )  # gradients of a sharded model are reduced in every micro-batch, since only shards are kept
        return self.accelerator.no_sync(model)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients of some parameters over the ranks, wherever they lie.

        One that a rank lacks counts as 0 there; one that all lack stays absent.
        """
        if self.count == 1 or not parameters:
            return
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        flat = torch.cat([
            *((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters), present
        ]).to(self.device)  # fmt: skip
        torch.distributed.all_reduce(flat)
        flat /= self.count
        *means, present = flat.split([*(p.numel() for p in parameters), len(parameters)])
        for number, (parameter, mean) in enumerate(zip(parameters, means)):
            if parameter.grad is None and not present[number]:
                continue
            parameter.grad = mean.view_as(parameter).to(parameter.device, copy=True)


def _make_accelerator(config: RunConfig) -> Accelerator:
    device = choose_device(config.run.device)
    if config.train.mixed_precision == "fp16" and device.type != "cuda":
        raise ConfigError(
            'train.mixed_precision = "fp16" needs a CUDA GPU, and this run is on the CPU; use "bf16" or "no"'
        )
    for wrapper in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{wrapper}", "false").lower() == "true":
            raise ConfigError(
                f"ACCELERATE_USE_{wrapper}=true: accelerate would wrap the model in a way that states and samples do not know; launch "
                "without it, and set distributed.fsdp = true to shard the model across the processes"
            )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.distributed.timeout_minutes)),
        ],
    )
    if launched > 1 and accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}: they would train apart and "
            f"overwrite each other. Set [distributed] num_processes = {launched} and run `python train.py`, or on a CPU "
            "launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu"
        )
    if config.distributed.num_processes > 1 and accelerator.num_processes != config.distributed.num_processes:
        raise ConfigError(
            f"distributed.num_processes is {config.distributed.num_processes}, but {accelerator.num_processes} processes run"
        )
    return accelerator


def _patient_group() -> Any:
    """All ranks, for waiting on the main one.

    Gloo, because its members sleep while they wait, and without the time limit of `distributed.timeout_minutes`: that one
    is for ranks that hang, and drawing, saving or encoding may take longer. A rank that dies is noticed at once.
    """
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=365))
