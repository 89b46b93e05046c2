"""What the machine can do for a run: whether [memory] works on it, how much device memory is free, how fast the device is.

A GPU is asked by a child: the command itself would hold device memory, with its children encoding and training beside it.

    python -m musubi_tuner.planning.probe RUN_FILE NUM_PROCESSES [options]      prints one line of JSON
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.config.command_line import override_arguments, split_overrides
from musubi_tuner.device import choose_device, with_precision
from musubi_tuner.errors import ConfigError
from musubi_tuner.memory.compose import check_machine
from musubi_tuner.planning.report import Rates, measure_rates
from musubi_tuner.precision import COMPUTE_DTYPES


@dataclass(frozen=True)
class Machine:
    """What a probe found.

    Attributes:
        free: bytes of device memory, the least of all GPUs of the run; None = the device computes in main memory.
        rates: of the device; None = not measured.
    """

    free: int | None = None
    rates: Rates | None = None


def probe(config: RunConfig, overrides: Mapping[str, Any], processes: int, device: torch.device) -> Machine:
    """Ask the device of a run.

    Raises:
        ConfigError: if this machine lacks what [memory] asks for, or its GPU does not answer.
    """
    if device.type != "cuda":
        check_machine(config, device)
        return Machine()
    return ask_child(config, overrides, processes)


def ask_child(config: RunConfig, overrides: Mapping[str, Any], processes: int) -> Machine:
    """`measure` in a process of its own.

    Raises:
        ConfigError: see `probe`.
    """
    words = ["-m", "musubi_tuner.planning.probe", str(config.path), str(processes), *override_arguments(overrides)]
    done = subprocess.run([sys.executable, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ConfigError(f'run.device: the device does not answer (code {done.returncode}, see above); use "cpu"')
    answer = json.loads(done.stdout.splitlines()[-1])
    if "problem" in answer:
        raise ConfigError(answer["problem"])
    return Machine(answer["free"], Rates(**answer["rates"]) if answer["rates"] else None)


def measure(config: RunConfig, processes: int) -> Machine:
    """Check, then measure with the device itself.

    Raises:
        ConfigError: if this machine lacks what [memory] asks for.
    """
    config = with_precision(config)
    device = choose_device(config.run.device)
    check_machine(config, device)
    free = None
    if device.type == "cuda":
        free = min(torch.cuda.mem_get_info(index)[0] for index in range(min(processes, torch.cuda.device_count())))
    moves = config.memory.blocks_to_swap or config.memory.checkpoint_offload
    return Machine(free, measure_rates(device, COMPUTE_DTYPES[config.train.mixed_precision]) if moves else None)


def main() -> None:
    """Print what `measure` finds, or the problem."""
    path, processes, *words = sys.argv[1:]
    try:
        found = asdict(measure(load_config(path, split_overrides(words, set())[1]), int(processes)))
    except ConfigError as problem:
        found = {"problem": str(problem)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
