"""How many processes a launcher started, and launchers whose processes would train apart."""

import pytest

from musubi_tuner.errors import ConfigError
from musubi_tuner.runner.processes import launched_processes

NAMES = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "MASTER_ADDR",
    "ACCELERATE_MIXED_PRECISION",
)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, 4),  # srun starts a torchrun on each of two machines
        ({"SLURM_STEP_NUM_TASKS": "1", "MASTER_ADDR": "10.0.0.1"}, 1),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1),
    ],
)
def test_processes_that_know_of_each_other_are_counted(
    environment: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_processes() == count


@pytest.mark.parametrize(
    "environment",
    [
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "8"},
        {
            "ACCELERATE_MIXED_PRECISION": "no",
            "MASTER_ADDR": "127.0.0.1",
        },  # accelerate launch --cpu --num_machines 2, and MULTI_CPU without MPI
    ],
)
def test_processes_that_would_train_apart_are_an_error(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{list(environment)[-1]}=.*torchrun --nnodes"):
        launched_processes()
