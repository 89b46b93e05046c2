"""A lack of memory ends a command with one line, whatever asked for it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from musubi_tuner.config.schema.memory import MemorySection
from musubi_tuner.errors import EXIT_FAILED, CacheError, advise_on_memory, out_of_memory, run_command
from musubi_tuner.memory.compose import ways_to_save
from musubi_tuner.models.registry import MODELS

STORAGE = 'set memory.base_storage = "fp8_scaled"'
LAST = "lower the resolution or the batch size of the data sets"
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.12 GiB is free. "
    "Process 1 has 4.00 GiB memory in use."
)


def ask_for_too_much() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def test_a_command_that_finds_no_main_memory_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(ask_for_too_much) == EXIT_FAILED
    printed = capsys.readouterr().err
    assert printed == f"error: main memory is full ({1 << 60} bytes more were wanted); end other programs that use it\n"


def test_a_command_that_finds_no_device_memory_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def fill() -> None:
        raise torch.OutOfMemoryError(CUDA)

    assert run_command(fill) == EXIT_FAILED
    printed = capsys.readouterr().err
    assert printed == "error: the device's memory is full (2.50 GiB more were wanted); end other programs that use it\n"


def test_python_says_no_size() -> None:
    assert out_of_memory(MemoryError()) == ("main memory is full", False)


def test_advice_follows_the_reason() -> None:
    said = r"^main memory is full \(\d+ bytes more were wanted\); take less$"
    with pytest.raises(CacheError, match=said), advise_on_memory(CacheError, "take less"):
        ask_for_too_much()


def test_advice_may_depend_on_which_memory_is_full() -> None:
    def advice(on_device: bool) -> str:
        return "swap" if on_device else "do not swap"

    with pytest.raises(CacheError, match=r"\); do not swap$"), advise_on_memory(CacheError, advice):
        ask_for_too_much()
    with pytest.raises(CacheError, match=r"\); swap$"), advise_on_memory(CacheError, advice):
        raise torch.OutOfMemoryError(CUDA)


@pytest.mark.parametrize(
    ("memory", "on_device", "ways"),
    [
        ({}, True, ["turn on memory.gradient_checkpointing", 'set memory.blocks_to_swap = "auto"', STORAGE]),
        ({"gradient_checkpointing": True, "checkpoint_every": 2, "base_storage": "nf4", "blocks_to_swap": 3}, True,
         ["lower memory.checkpoint_every", "raise memory.blocks_to_swap"]),
        ({"gradient_checkpointing": True, "blocks_to_swap": "auto"}, True, [STORAGE]),
        ({"gradient_checkpointing": True, "blocks_to_swap": 3}, False, ["lower memory.blocks_to_swap", STORAGE]),
        ({"gradient_checkpointing": True}, False, [STORAGE]),
    ],
)  # fmt: skip
def test_ways_to_save_are_those_that_are_not_taken_yet(
    memory: dict[str, Any], on_device: bool, ways: list[str]
) -> None:
    config: Any = SimpleNamespace(
        memory=MemorySection(**memory), adapter=SimpleNamespace(type="lora"), spec=MODELS["tf"]
    )
    assert ways_to_save(config, on_device) == ", ".join([*ways, LAST])


def test_a_model_that_trains_is_not_quantised() -> None:
    config: Any = SimpleNamespace(
        memory=MemorySection(checkpoint_offload=True), adapter=SimpleNamespace(type="none"), spec=MODELS["tf"]
    )
    assert ways_to_save(config, False) == LAST


def test_other_errors_stay_what_they_are() -> None:
    def fail() -> None:
        raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="out of ideas"), advise_on_memory(CacheError, "take less"):
        fail()
    with pytest.raises(RuntimeError, match="out of ideas"):
        run_command(fail)
