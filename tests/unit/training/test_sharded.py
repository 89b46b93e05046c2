"""A sharded model: what one process sees of it. Several processes are in `tests/e2e/test_processes.py`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.training.optimizers import clip_gradients
from musubi_tuner.training.sharded import ShardedModel


class Net(nn.Module):
    """Two blocks, a layer outside of them, a scalar and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.head = nn.Linear(3, 1)
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.gate * self.head(x + self.table)


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[ShardedModel]:
    """Of the model, in a group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield ShardedModel(Net(), ["blocks"], torch.device("cpu"), rank=0, count=1)
    torch.distributed.destroy_process_group()


def test_parts_have_the_names_of_the_model_and_act_on_it(sharded: ShardedModel) -> None:
    plain = Net()
    assert {name: part.shape for name, part in sharded.named_parameters()} == {
        name: parameter.shape for name, parameter in plain.named_parameters()
    }
    assert list(sharded.state_dict()) == list(plain.state_dict())
    assert [part.ndim for part in sharded.replicated] == [0]
    with torch.no_grad():
        for part in sharded.parameters():
            part.mul_(2)
        for parameter in plain.parameters():
            parameter.mul_(2)
    x = torch.ones(2, 3)
    assert torch.equal(sharded.model(x), plain(x))
    with sharded.whole():
        assert torch.equal(sharded.model(x), plain(x))


def test_gradients_are_clipped_as_those_of_a_whole_model(sharded: ShardedModel) -> None:
    plain, x = Net(), torch.ones(2, 3)
    for model in (plain, sharded.model):
        model(x).sum().backward()
    sharded.collect_gradients()
    expected = clip_gradients(list(plain.parameters()), 0.1)
    norm = sharded.clip_gradients(0.1, lambda values: None)
    assert norm > 0.1
    torch.testing.assert_close(norm, expected)
    for (name, part), parameter in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        assert part.grad is not None, name
        torch.testing.assert_close(part.grad, parameter.grad)
    sharded.forget_gradients()
    sharded.collect_gradients()
    assert all(part.grad is None for name, part in sharded.named_parameters() if name != "gate")


def test_whole_tensors_are_cut_by_rows_and_what_is_no_weight_stays() -> None:
    """The third of three processes has nothing of two rows."""
    sharded = ShardedModel.__new__(ShardedModel)
    nn.Module.__init__(sharded)
    sharded._sharded = {"w": torch.zeros(2, 3)}  # type: ignore[dict-item]
    tensors = {"w/moment": torch.arange(6.0).view(2, 3), "w/step": torch.tensor(7.0), "other": torch.ones(2, 3)}
    sharded.count, found = 3, []
    for sharded.rank in range(3):
        found.append(sharded.cut(tensors, lambda key: key.partition("/")[0]))
    assert [part["w/moment"].tolist() for part in found] == [[[0, 1, 2]], [[3, 4, 5]], []]
    assert all(part["w/step"] == 7 and torch.equal(part["other"], torch.ones(2, 3)) for part in found)


def test_weights_of_another_model_are_refused(sharded: ShardedModel) -> None:
    with pytest.raises(RuntimeError, match="another model"):
        sharded.load_state_dict({"other": torch.ones(1)})
    missing, unexpected = sharded.load_state_dict({"other": torch.ones(1)}, strict=False)
    assert len(missing) == 8 and unexpected == ["other"]
