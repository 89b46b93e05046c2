"""What a loader worker died of, how much shared memory it needs, and its errors as they were."""

import errno
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from musubi_tuner.data import workers
from musubi_tuner.data.batch import Batch, PlannedBatches, raise_errors
from musubi_tuner.data.plan import MicroBatch
from musubi_tuner.data.workers import explain_workers, shared_memory_warning, to_shared_memory
from musubi_tuner.errors import CacheError, TrainingError

pytestmark = pytest.mark.long

Usage = namedtuple("Usage", "total used free")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB of shared memory, as in a container, of which 40 are free."""
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(64 * MIB, 24 * MIB, 40 * MIB))


def batch() -> Batch:
    return Batch({"text": torch.ones(2)}, {"text": torch.tensor([True])}, ["a"], (0,), torch.zeros(1).long())


class Source(Dataset[Batch]):
    """Two batches; ``do`` is done in the worker before the second one."""

    def __init__(self, do: Any) -> None:
        self.do = do

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Batch:
        if index:
            self.do()
        return batch()


def load(do: Any, collate: Any = to_shared_memory) -> list[Batch]:
    """All batches, through a worker."""
    loader = DataLoader(Source(do), batch_size=None, num_workers=1, multiprocessing_context="fork", collate_fn=collate)
    with explain_workers(1):
        iterator = iter(loader)
        try:
            return list(iterator)
        finally:
            iterator._shutdown_workers()  # not some time, when it is collected


def test_batches_come_through_shared_memory_as_they_are() -> None:
    first, second = load(lambda: None)
    for found in (first, second):
        assert found.dataset_ids.is_shared() and found.tensors["text"].is_shared()
        assert torch.equal(found.tensors["text"], torch.ones(2)) and found.items == ["a"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGBUS, r"worker \(process \d+\) died of a bus error: .* has 64\.0 MiB, of which 40\.0 MiB are free"),
        (signal.SIGKILL, r"worker \(process \d+\) was killed, as the system does when main memory is full"),
        (signal.SIGTERM, r"worker \(process \d+\) ended by a signal \(Terminated\)"),
    ],
)
def test_a_worker_that_dies_is_named_with_the_way_out(number: int, said: str) -> None:
    with pytest.raises(TrainingError, match=said) as caught:
        load(lambda: os.kill(os.getpid(), number))
    assert "train.loader_workers" in str(caught.value) and "continues from the newest state" in str(caught.value)


def test_a_worker_that_leaves_without_a_word_is_named() -> None:
    with pytest.raises(
        TrainingError, match=r"worker \(process \d+\) ended without a message: .*train\.loader_workers = 0"
    ):
        load(lambda: os._exit(3))


def test_no_room_for_a_batch_is_an_error_and_no_endless_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(TrainingError, match=r"a loader worker failed: .* has 64\.0 MiB") as caught:
        load(lambda: None)
    assert "train.loader_workers = 0" in str(caught.value) and "docker run --shm-size" in str(caught.value)


def test_a_batch_that_cannot_be_sent_ends_its_worker(capfd: pytest.CaptureFixture[str]) -> None:
    def unsendable(found: Batch) -> Any:
        to_shared_memory(found)
        return lambda: None

    with pytest.raises(TrainingError, match="ended without a message"):
        load(lambda: None, unsendable)
    assert "error: a loader worker cannot send a batch" in (said := capfd.readouterr().err) and "Traceback" not in said


class Broken:
    """A data set of which nothing can be read."""

    def read(self, batch: MicroBatch, epoch: int) -> Batch:
        try:
            raise OSError("gone")
        except OSError as error:
            raise CacheError("a.safetensors: changed while training (gone)\n  run the jobs again") from error


def test_an_error_of_ours_comes_out_of_a_worker_as_it_was() -> None:
    source = PlannedBatches(Broken(), [MicroBatch((0,), (0,))], 0)  # type: ignore[arg-type]
    loader = DataLoader(
        source, batch_size=None, num_workers=1, multiprocessing_context="fork", collate_fn=to_shared_memory
    )
    with pytest.raises(CacheError) as caught:
        list(raise_errors(loader))
    assert str(caught.value) == "a.safetensors: changed while training (gone)\n  run the jobs again"


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="a mistake of ours"), explain_workers(1):
        raise RuntimeError("a mistake of ours")
    with pytest.raises(CacheError, match=r"^plain$"), explain_workers(1):
        raise CacheError("plain")


def test_no_room_for_locks_is_found_before_workers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(context: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.context.BaseContext.Lock", full)
    with pytest.raises(TrainingError, match=r"no loader worker can be started \(No space left.*64\.0 MiB"):
        load(lambda: None)
    with explain_workers(0):
        pass


def test_the_plan_warns_where_batches_may_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert shared_memory_warning(7 * MIB, 2) is None  # 5 batches at once, of 36 MiB together
    said = shared_memory_warning(8 * MIB, 2)
    assert said is not None and "has 64.0 MiB, of which 40.0 MiB are free" in said and "2 loader worker(s)" in said
    assert "train.loader_workers = 0" in said and "docker run --shm-size" in said
    assert shared_memory_warning(7 * MIB, 2, processes=2) is not None
    assert shared_memory_warning(100 * MIB, 0) is None
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path / "none")
    assert shared_memory_warning(100 * MIB, 2) is None
