"""What an update of several phases does: who moves, for whom gradients are made, and what a gradient that is not finite stops."""

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.config.schema.adapter import AdapterSection
from musubi_tuner.config.schema.ema import EmaSection
from musubi_tuner.config.schema.optimizer import OptimizerSection
from musubi_tuner.config.schema.scheduler import SchedulerSection
from musubi_tuner.config.schema.train import TrainSection
from musubi_tuner.data.batch import Batch
from musubi_tuner.data.plan import MicroBatch, Update
from musubi_tuner.errors import CheckpointError, TrainingError
from musubi_tuner.models.family import LossTerm
from musubi_tuner.training import actions
from musubi_tuner.training import snapshot as snapshot_module
from musubi_tuner.training import update as update_module
from musubi_tuner.training.checkpoint import TrainingState
from musubi_tuner.training.plateau import Plateau
from musubi_tuner.training.ranks import Ranks
from musubi_tuner.training.role import Role, weights_of
from musubi_tuner.training.snapshot import Snapshot
from musubi_tuner.training.task import Position
from musubi_tuner.training.update import Outcome, run_update
from musubi_tuner.training.window import EpochLoss, Window

sys.path.append(str(Path(__file__).resolve().parents[2] / "e2e"))

from toy_family import gan

IMAGES = 4
PIXELS = torch.rand(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
RANKS: Any = SimpleNamespace(
    count=1,
    sharded=False,
    main=True,
    device=torch.device("cpu"),
    sum_device=torch.device("cpu"),
    accumulating=lambda model, is_last: contextlib.nullcontext(),
    average_gradients=lambda parameters: None,
    add_up=lambda values: None,
)


def make_task(
    model: nn.ModuleDict | None = None, frozen: Sequence[str] = (), fused_backward: bool = False
) -> gan.GanTask:
    """The GAN of the toy family, each role with an optimizer and an average."""
    torch.manual_seed(0)
    model = model or nn.ModuleDict({"vae": gan.autoencoder(6), "discriminator": gan.discriminator(6)})
    config: Any = SimpleNamespace(
        optimizer=OptimizerSection(lr=1e-2, fused_backward=fused_backward),
        scheduler=SchedulerSection(type="constant", warmup_steps=0),
        adapter=AdapterSection(),
        ema=EmaSection(decay=0.5),
        train=TrainSection(),
        warms_average=False,
        frozen=frozen,
    )
    config.for_role = lambda name: config
    return gan.GanTask(model, lambda name, part: Role(name, part, config, total=9, ranks=RANKS, wrapped=False), seed=1)


def batches(*sizes: int) -> tuple[Update, list[Batch]]:
    """An update of micro-batches of the given sizes."""
    planned, made, begun = [], [], 0
    for size in sizes:
        keys = tuple(range(begun, begun + size))
        planned.append(MicroBatch(keys, keys))
        ids = torch.zeros(size, dtype=torch.int64)
        made.append(Batch({"pixels": PIXELS[begun : begun + size]}, {}, [f"picture {key}" for key in keys], keys, ids))
        begun += size
    return Update(tuple(planned), tuple(enumerate(planned)), begun), made


def run(task: Any, *sizes: int, step: int = 0) -> Outcome:
    update, made = batches(*sizes)
    at = Position(step=step)
    return run_update(task, update, iter(made), at, ranks=RANKS, seed=1, compute_dtype=None, bins=0)


def values(task: Any) -> dict[str, Tensor]:
    roles = list(task.roles.values())
    return {key: value.clone() for key, value in weights_of(roles).trained.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Roles whose trained weights differ; u and v of spectral norms are buffers."""
    return {
        key.partition(".")[0] for key in before if not key.endswith(("_u", "_v")) and not before[key].equal(after[key])
    }


def test_a_phase_moves_its_roles_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = make_task(), []
    move = update_module._move

    def watched(*arguments: Any) -> bool:
        before = values(task)
        finite = move(*arguments)
        seen.append((arguments[1].name, changed(before, values(task))))
        return finite

    monkeypatch.setattr(update_module, "_move", watched)
    outcome = run(task, 2, 2)
    assert seen == [("discriminator", {"discriminator"}), ("autoencoder", {"vae"})]
    assert set(outcome.sums) == {"critic", "recon", "taken", "total"}
    assert {"train/grad_norm_vae", "train/grad_norm_discriminator"} <= set(outcome.measured)
    for role in task.roles.values():
        assert role.ema is not None and role.ema.updates == 1


@pytest.mark.parametrize(
    ("frozen", "moved", "phase"), [("vae", "discriminator", "discriminator"), ("discriminator", "vae", "autoencoder")]
)
def test_a_frozen_role_stays_and_a_phase_without_another_does_not_run(frozen: str, moved: str, phase: str) -> None:
    task = make_task(frozen=[frozen])
    before = values(task)
    outcome = run(task, 2, 2)
    assert changed(before, values(task)) == {moved}
    assert outcome.moved == [phase] and f"train/grad_norm_{frozen}" not in outcome.measured
    assert task.roles[frozen].ema is None
    assert all(parameter.grad is None for _, parameter in task.roles[frozen].parameters)
    # Its weights are saved as an average of themselves.
    assert set(weights_of(list(task.roles.values())).averaged) == set(before)


def test_no_gradient_is_made_for_a_role_that_stands_still() -> None:
    task = make_task()
    made: dict[str, int] = {}
    phase = ""

    def count(name: str) -> Any:
        def hook(gradient: Tensor) -> None:
            made[f"{phase}: {name}"] = made.get(f"{phase}: {name}", 0) + 1

        return hook

    for name, role in task.roles.items():
        for _, parameter in role.parameters:
            parameter.register_hook(count(name))
    for each in task.phases:
        losses = each.losses

        def begun(*arguments: Any, each: Any = each, losses: Any = losses) -> Any:
            nonlocal phase
            phase = each.name
            return losses(*arguments)

        each.losses = begun  # type: ignore[method-assign]
    run(task, 2, 2)
    of = {name: len(role.parameters) for name, role in task.roles.items()}
    assert made == {"discriminator: discriminator": 2 * of["discriminator"], "autoencoder: vae": 2 * of["vae"]}
    assert all(p.requires_grad and p.grad is None for role in task.roles.values() for _, p in role.parameters)


def test_micro_batches_of_an_update_equal_one_batch_and_spectral_norms_move_once() -> None:
    whole, parts = make_task(), make_task()
    for step in range(3):
        run(whole, 4, step=step)
        run(parts, 1, 2, 1, step=step)
    for key, value in values(whole).items():
        torch.testing.assert_close(values(parts)[key], value, rtol=0, atol=1e-5)


def backward_losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses whose gradients are made from now on."""
    made: list[float] = []
    backward = Role.backward

    def noted(role: Role, loss: Tensor) -> None:
        made.append(loss.item())
        backward(role, loss)

    monkeypatch.setattr(Role, "backward", noted)
    return made


def test_the_loss_of_an_update_is_the_mean_over_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    made = backward_losses(monkeypatch)
    outcome = run(make_task(), 1, 3)
    assert len(made) == 4 and all(made)
    assert sum(made) == pytest.approx(outcome.sums["total"].item() / 4, rel=1e-6)
    sums, weights = outcome.sums, outcome.weights
    total = sum(sums[name] * weights[name] for name in ("critic", "recon", "taken"))
    torch.testing.assert_close(total, sums["total"], rtol=1e-5, atol=1e-6)


def test_a_rank_without_micro_batches_adds_nothing_and_names_the_same_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    full = run(make_task(), 4)
    made = backward_losses(monkeypatch)
    update, batch = batches(4)
    idle = replace(update, share=((0, None),))
    ranks = SimpleNamespace(**{**vars(RANKS), "count": 2})
    outcome = run_update(make_task(), idle, iter(batch), Position(), ranks=ranks, seed=1, compute_dtype=None, bins=0)
    assert made == [0.0, 0.0] and outcome.items == []
    assert outcome.sums.keys() == full.sums.keys() and not any(value.any() for value in outcome.sums.values())


class Both:
    """Both roles in one phase, whose gradients may be spoiled."""

    name, roles, exchange = "both", ("vae", "discriminator"), None

    def __init__(self, task: gan.GanTask, spoiled: str) -> None:
        self.task, self.spoiled = task, spoiled
        self.judge, self.vae = task.roles["discriminator"].module, task.roles["vae"].module

    def due(self, at: Position) -> bool:
        return True

    def begin(self, at: Position) -> None:
        gan.advance(self.judge)

    def end(self, add_up: Callable[[Tensor], None]) -> None:
        pass

    def losses(self, batch: Batch, draws: Any, at: Position) -> dict[str, LossTerm]:
        real = batch.tensors["pixels"]
        terms = {
            "vae": (gan.reconstruct(self.vae, real, draws) - real).square().flatten(1).mean(1),
            "discriminator": self.judge(real).flatten(1).mean(1).square(),
        }
        factor = {name: math.inf if name == self.spoiled else 1.0 for name in terms}
        return {name: LossTerm(term * factor[name], 1.0) for name, term in terms.items()}


@pytest.mark.parametrize("spoiled", ["vae", "discriminator", ""])
def test_roles_of_a_phase_move_together_or_not_at_all(spoiled: str) -> None:
    task = make_task()
    task.phases = [Both(task, spoiled)]  # type: ignore[list-item]
    before, averages = values(task), copy.deepcopy(weights_of(list(task.roles.values())).averaged)
    outcome = run(task, 2, 2)
    if not spoiled:
        assert outcome.not_finite is None and changed(before, values(task)) == {"vae", "discriminator"}
        return
    assert outcome.not_finite == "both"
    assert changed(before, values(task)) == set()
    for role in task.roles.values():
        assert role.ema is not None and role.ema.updates == 0 and not role.optimizer.state
        assert all(parameter.grad is None for _, parameter in role.parameters)
    for key, value in weights_of(list(task.roles.values())).averaged.items():
        assert torch.equal(value, averages[key])


def test_a_phase_that_is_not_finite_ends_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task()
    losses = task.phases[0].losses

    def spoiled(*arguments: Any) -> Any:
        return {name: LossTerm(term.per_sample_B * math.nan, 1.0) for name, term in losses(*arguments).items()}

    monkeypatch.setattr(task.phases[0], "losses", spoiled)
    before = values(task)
    outcome = run(task, 4)
    assert outcome.not_finite == "discriminator"
    assert changed(before, values(task)) == set()
    assert outcome.items == [f"picture {number}" for number in range(4)]


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_ends_with_a_gradient_that_is_not_finite_and_says_whether_weights_moved(fused: bool) -> None:
    task = make_task(fused_backward=fused)
    task.phases = [Both(task, "vae")]  # type: ignore[list-item]
    before = values(task)
    outcome = run(task, 4)
    assert outcome.not_finite == "both" and outcome.moved_anyway is fused is bool(changed(before, values(task)))
    position, config = Position(step=6), SimpleNamespace(train=TrainSection())
    ended: Any = SimpleNamespace(position=position, config=config, task=task, roles=list(task.roles.values()))
    said = (
        "With optimizer.fused_backward weights have moved by then, so nothing is saved"
        if fused
        else "It changed nothing"
    )
    with pytest.raises(TrainingError, match=rf"^step 7: the gradient is not finite \(items picture 0, .*\)\. {said}"):
        actions._not_finite(ended, outcome)


def test_an_update_without_a_phase_takes_its_batches_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task()
    for phase in task.phases:
        monkeypatch.setattr(phase, "due", lambda at: False)
    update, made = batches(2, 2)
    waiting, before = iter(made), values(task)
    outcome = run_update(task, update, waiting, Position(), ranks=RANKS, seed=1, compute_dtype=None, bins=0)
    assert next(waiting, None) is None
    assert outcome.sums == {} and outcome.moved == [] and changed(before, values(task)) == set()


class OneOfTwo(Both):
    """Both roles in one phase whose loss reaches the first only."""

    def losses(self, batch: Batch, draws: Any, at: Position) -> dict[str, LossTerm]:
        return {"vae": super().losses(batch, draws, at)["vae"]}


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_role_that_no_loss_reaches_stays(precision: str) -> None:
    task = make_task()
    task.phases = [OneOfTwo(task, "")]  # type: ignore[list-item]
    if precision == "fp16":
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for role in task.roles.values():
            role.scaler = scaler
            role.optimizer = torch.optim.SGD(role.optimizer.param_groups, lr=0.1)  # not fused: unscaled by the scaler
            for group in role.optimizer.param_groups:
                group.setdefault("lr_scale", 1.0)
    before = values(task)
    assert run(task, 2, 2).not_finite is None
    assert changed(before, values(task)) == {"vae"}


def test_a_state_has_the_plateau_of_each_role(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def taken(task: gan.GanTask) -> tuple[Snapshot, TrainingState]:
        roles = list(task.roles.values())
        snapshot = Snapshot(
            roles, Position(), Window(RANKS, 0), EpochLoss(RANKS), None, None, None, {}, None, RANKS, {}
        )
        state = snapshot.take(SimpleNamespace(flush=lambda: None, length=0))  # type: ignore[arg-type]
        assert state is not None
        return snapshot, state

    assert "plateau" not in taken(make_task())[1].values
    task, again = make_task(frozen=["discriminator"]), make_task()
    for role in (*task.roles.values(), *again.roles.values()):
        role.plateau = None if role.frozen else Plateau(factor=0.5, patience=0, threshold=0.0)
    plateau = task.roles["vae"].plateau
    assert plateau is not None and [plateau.measure(1.0, step) for step in (1, 2)] == [False, True]
    assert task.roles["vae"].rate(0) == 0.5e-2
    state = taken(task)[1]
    assert set(state.values["plateau"]) == {"vae"}
    parts = {"model": state.model, "ema": state.ema, "optimizer": state.optimizer}
    monkeypatch.setattr(snapshot_module, "read_tensors", lambda path, part: parts[part])
    snapshot = taken(again)[0]
    snapshot.restore(tmp_path, state.values)
    assert again.roles["vae"].rate(0) == 0.5e-2 and again.roles["discriminator"].rate(0) == 1e-2


def test_gradients_that_all_ranks_lack_stay_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: Any = SimpleNamespace(count=2, device=torch.device("cpu"))
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    first.grad = torch.tensor([1.0, 3.0])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(2))  # a second rank with the same
    Ranks.average_gradients(ranks, [first, second])
    assert first.grad.tolist() == [1.0, 3.0] and second.grad is None

    def other_has_it(flat: Tensor) -> None:
        flat += torch.tensor([1.0, 1.0, 4.0, 4.0, 4.0, 1.0, 1.0])

    monkeypatch.setattr(torch.distributed, "all_reduce", other_has_it)
    Ranks.average_gradients(ranks, [first, second])
    assert second.grad is not None and second.grad.tolist() == [2.0, 2.0, 2.0]


def test_a_state_with_more_roles_than_the_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    roles = list(make_task().roles.values())
    window = Window(RANKS, 0)
    snapshot = Snapshot(roles, Position(), window, EpochLoss(RANKS), None, None, None, {}, None, RANKS, {})
    state = snapshot.take(SimpleNamespace(flush=lambda: None, length=0))  # type: ignore[arg-type]
    assert state is not None
    parts = {"model": state.model, "ema": state.ema, "optimizer": state.optimizer}
    monkeypatch.setattr(snapshot_module, "read_tensors", lambda path, part: parts[part])
    snapshot.restore(tmp_path, state.values)
    parts["model"] = {**parts["model"], "flow.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"belongs to another model \(flow.weight\)"):
        snapshot.restore(tmp_path, state.values)
