"""A lack of memory ends a command with one line, whatever asked for it."""

import pytest
import torch

from musubi_tuner.errors import EXIT_FAILED, CacheError, advise_on_memory, out_of_memory, run_command

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
    assert out_of_memory(MemoryError()) == "main memory is full"


def test_advice_follows_the_reason() -> None:
    said = r"^main memory is full \(\d+ bytes more were wanted\); take less$"
    with pytest.raises(CacheError, match=said), advise_on_memory(CacheError, "take less"):
        ask_for_too_much()


def test_other_errors_stay_what_they_are() -> None:
    def fail() -> None:
        raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="out of ideas"), advise_on_memory(CacheError, "take less"):
        fail()
    with pytest.raises(RuntimeError, match="out of ideas"):
        run_command(fail)
