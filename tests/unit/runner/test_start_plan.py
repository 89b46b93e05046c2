"""What the plan says of the average and of the learning rate, for a new run and for one that goes on."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from matplotlib import pyplot
from PIL import Image

from musubi_tuner.config import RunConfig, Steps, load_config
from musubi_tuner.config.run_config import lay
from musubi_tuner.data.sources import ScannedItems
from musubi_tuner.errors import ConfigError
from musubi_tuner.planning import schedule_plot
from musubi_tuner.planning.plan import Plan, describe
from musubi_tuner.runner import command
from musubi_tuner.runner.command import Runner, fresh_folder
from musubi_tuner.training.checkpoint import CheckpointList, Entry, peek_state

Load = Callable[..., RunConfig]
SCRATCH = {"init": "scratch", "path": None, "geometry": {"num_single_layers": 1}}


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a run file of 200 updates that begins with a checkpoint, with changes by table; None leaves a key out."""
    (tmp_path / "images").mkdir()
    (tmp_path / "model.safetensors").touch()

    def read(**changes: dict[str, Any]) -> RunConfig:
        tables: dict[str, dict[str, Any]] = {
            "run": {"name": "x", "output_dir": str(tmp_path / "out"), "device": "cpu"},
            "model": {"arch": "tf", "path": str(tmp_path / "model.safetensors")},
            "experts": {"enable_lune": False, "enable_sol": False},
            "train": {"max_steps": 200, "mixed_precision": "no"},
            "optimizer": {"lr": 1e-3},
            "scheduler": {"warmup_steps": 0},
            "cache": {"run": "never"},
        }
        for name, values in changes.items():
            merged = {**tables.get(name, {}), **values}
            tables[name] = {key: value for key, value in merged.items() if value is not None}
        document = {"schema_version": 1, **tables, "datasets": [{"image_directory": str(tmp_path / "images")}]}
        (tmp_path / "run.toml").write_text(tomli_w.dumps(document), encoding="utf-8")
        return load_config(tmp_path / "run.toml")

    return read


def leave_state(config: RunConfig, step: int, began: dict[str, Any] | None = None, **values: Any) -> None:
    """What the plan reads of a state that a run has left."""
    folder = config.output_dir / f"x-step{step:08d}-state"
    folder.mkdir(parents=True)
    stored = {"step": step, "ema_updates": step, "config": {"scheduler.min_lr": 0.0, **(began or {})}, **values}
    (folder / "state.json").write_text(json.dumps(stored), encoding="utf-8")


def planned(config: RunConfig, total: int = 200) -> str:
    """The plan of a run over so many updates."""
    return describe(
        config,
        Plan(ScannedItems([], []), [], [], {}, Steps(10, 10, total, total // 10, 10), state=peek_state(config)),
        1,
    )


# The average

MUCH = "warning: average: after 200 updates, 98.0 % of the average would still be the initial weights; "


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {},
            '  average  decay 0.9999, with warm-up (ema.warmup = "auto"); after 200 updates, 0.0 % of the average is still the initial weights',
        ),
        ({"ema": {"warmup": False}}, MUCH + "lower ema.decay or set ema.warmup = true"),
        ({"ema": {"init": "checkpoint"}}, MUCH + 'lower ema.decay, or set ema.init = "model"'),
        ({"model": SCRATCH}, MUCH + "lower ema.decay or set ema.warmup = true"),
        ({"model": SCRATCH, "ema": {"decay": 0.98}}, "  average  decay 0.98, without warm-up (ema.warmup = "),
        (
            {"model": SCRATCH, "ema": {"decay": 0.98}},
            "; after 200 updates, 1.8 % of the average is still the initial weights",
        ),
    ],
)
def test_the_plan_says_how_much_of_the_start_is_left_in_the_average(
    changes: dict[str, Any], said: str, load: Load
) -> None:
    text = planned(load(**changes))
    assert said in text
    assert ("warning: average" in text) == said.startswith("warning")


def test_a_strict_run_refuses_what_its_plan_warns_of(load: Load, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a picture", encoding="utf-8")
    config = load(run={"strict": True}, ema={"warmup": False}, train={"max_steps": None, "max_epochs": 3})
    options = Namespace(plan=True, fresh=False, cache_only=False, skip_cache=False)
    with pytest.raises(
        ConfigError, match=r"^run\.strict: .*\n  warning: 1 of 1 images.*\n  warning: average: after 3 "
    ):
        Runner(config, options, {}).run()


def test_a_run_without_an_average_has_no_line_of_it(load: Load) -> None:
    assert "  average  " not in planned(load(ema={"enabled": False}))


def test_a_run_that_goes_on_is_planned_with_the_average_that_it_began_with(load: Load) -> None:
    """A state of before, which knows no "auto": without warm-up, and not to be changed any more."""
    config = load()
    leave_state(config, 100, {"ema.warmup": False})
    text = planned(config)
    assert "decay 0.9999, without warm-up" in text and MUCH + "a run keeps its [ema]" in text and "--fresh" in text
    assert "set ema.warmup" not in text


def test_updates_that_the_average_has_seen_count_and_not_those_of_the_run(load: Load) -> None:
    """An imported state without an average: it begins at step 150, so only 50 updates move it."""
    config = load(ema={"decay": 0.99})
    leave_state(config, 150, {"ema.warmup": False}, ema_updates=0)
    assert f"{100 * 0.99**50:.1f} % of the average would still be the initial weights" in planned(config)


# The learning rate


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_run_that_is_made_longer_is_told_how_its_rate_jumps(kind: str, load: Load) -> None:
    config = load(scheduler={"type": kind})
    leave_state(config, 100, schedule_end=100)
    text = planned(config)
    before, after = {"cosine": ("2.47e-07", "0.0005"), "linear": ("1e-05", "0.0005")}[kind]
    times = {"cosine": 2027, "linear": 50}[kind]
    assert (
        f"warning: the learning rate jumps: {before} at update 100, {after} at update 101, {times} times as high"
        in text
    )
    assert "scheduler.total_steps = 100 keeps the old curve" in text and "set scheduler.min_lr too" in text


def test_a_rate_that_falls_suddenly_is_a_jump_too(load: Load) -> None:
    config = load(scheduler={"min_lr": 1e-4})
    leave_state(config, 100, {"scheduler.min_lr": 1e-4}, schedule_end=1000)
    text = planned(config)
    assert "the learning rate jumps: 0.000978 at update 100, 0.00055 at update 101, because" in text
    assert "set scheduler.min_lr too" not in text and "stays at scheduler.min_lr = 0.0001" in text


@pytest.mark.parametrize(
    ("scheduler", "end"),
    [({}, 200), ({"type": "constant"}, 100), ({"total_steps": 100}, 100), ({"type": "cosine"}, None)],
)
def test_a_rate_that_goes_on_as_it_was_needs_no_word(scheduler: dict[str, Any], end: int | None, load: Load) -> None:
    config = load(scheduler=scheduler)
    leave_state(config, 100, schedule_end=end)
    assert "learning rate" not in planned(config)


def test_the_end_of_a_finished_run_of_before_is_that_of_its_schedule(load: Load) -> None:
    """Its state does not say how long the schedule was."""
    config = load()
    leave_state(config, 100)
    CheckpointList(config.output_dir, "x").add("final", Entry(100, 10, "final", "x.safetensors"))
    assert "because cosine ended at update 100 and ends at 200 now" in planned(config)


def test_a_smallest_rate_that_was_changed_is_a_jump(load: Load) -> None:
    config = load(scheduler={"total_steps": 100, "min_lr": 5e-4})
    leave_state(config, 100, schedule_end=100)
    text = planned(config)
    assert "the learning rate jumps: 2.47e-07 at update 100, 0.0005 at update 101" in text
    assert "because scheduler.min_lr has changed" in text and "keeps the old curve" not in text


def test_a_run_that_goes_on_at_the_rate_that_a_plateau_has_left_does_not_jump(load: Load) -> None:
    plateau = {"plateau": {"model": {"share": 0.01, "lowest": 1.0, "bad": 0, "resting": 0}}}
    config = load(scheduler={"type": "plateau", "min_lr": 1e-6, "patience": 1})
    leave_state(config, 100, {"scheduler.type": "plateau"}, schedule_end=100, **plateau)
    assert "jumps" not in planned(config)
    config = load(scheduler={"type": "constant"}, resume={"allow": ["scheduler.type"]})
    assert "the learning rate jumps: 1e-05 at update 100, 0.001 at update 101, 100 times as high" in planned(config)


@pytest.mark.parametrize(
    ("train", "patience", "measured"),
    [
        ({"max_steps": 200}, 17, None),
        ({"max_steps": 200}, 18, "the mean loss of an epoch is measured 19 time(s)"),
        ({"max_steps": 9}, 0, "the mean loss of an epoch is measured 0 time(s)"),
    ],
)
def test_the_plan_says_that_a_plateau_is_never_seen(
    train: dict[str, Any], patience: int, measured: str | None, load: Load
) -> None:
    """An epoch has 10 updates; the first measurement always improves, and what follows the last one has no use."""
    config = load(scheduler={"type": "plateau", "patience": patience}, train=train)
    text = planned(config, train["max_steps"])
    assert ("never lowers the learning rate" in text) == (measured is not None)
    assert measured is None or (measured in text and f"scheduler.patience + 2 = {patience + 2}" in text)


# The picture of the plan


def test_the_plan_draws_the_learning_rate_and_writes_nothing_else(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Runner, "_plan_memory", lambda runner, plan: None)  # which takes seconds
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a picture", encoding="utf-8")
    load(model=SCRATCH, ema={"enabled": False})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"^--plot: .*add --plan"):
        command._main([str(tmp_path / "run.toml"), "--plot"], None)
    assert command._main([str(tmp_path / "run.toml"), "--plan", "--plot"], None) == 0
    picture = tmp_path / "out" / "x.schedule.png"
    assert sorted(tmp_path.rglob("*")) == sorted([*before, picture.parent, picture])
    assert capsys.readouterr().out.splitlines()[-1] == f"  plot     {picture}"
    with Image.open(picture) as drawn:
        assert drawn.width > 800
    assert fresh_folder(picture.parent) == picture.parent
    (picture.parent / "metrics.jsonl").touch()
    assert fresh_folder(picture.parent) == tmp_path / "out-2"


def test_steps_are_drawn_one_after_the_other_with_their_marks(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(schedule_plot, "save_figure", lambda figure, target: seen.append(figure))
    parts = [
        schedule_plot.Part("first", load(scheduler={"type": "linear", "warmup_steps": "10%"}), 100),
        schedule_plot.Part(
            "second", load(scheduler={"type": "plateau", "min_lr": 1e-5, "total_steps": None}), 300, done=30
        ),
        schedule_plot.Part("third", load(scheduler={"type": "cosine", "total_steps": 50}), 100),
    ]
    schedule_plot.draw_schedule(parts, tmp_path / "a.png", "cats")
    (axes,) = seen[0].axes
    first, second, _ = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert list(first.get_xdata()) == list(range(1, 101)) and list(second.get_xdata()) == list(range(101, 401))
    assert first.get_ydata()[:11] == pytest.approx([k * 1e-4 for k in range(11)])
    words = {note.get_text(): note.xy[0] for note in axes.texts}
    assert words == {
        "first: 100 updates": 0, "warm-up ends: 10": 10, "second: 300 updates": 100, "done: 30": 130, "third: 100 updates": 400,
        "schedule ends: 50": 450,
    }  # fmt: skip
    assert axes.get_title() == "cats: planned learning rate" and axes.get_ylabel() == "learning rate"
    labels = [text.get_text().splitlines()[0] for text in axes.get_legend().get_texts()]
    assert labels == ["first: linear", "second: plateau", "min_lr = 1e-05", "third: cosine"]
    pyplot.close(seen[0])


def test_a_rate_that_the_optimizer_sets_has_no_curve(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(schedule_plot, "save_figure", lambda figure, target: seen.append(figure))
    config = load(scheduler={"type": "adafactor"}, optimizer={"type": "Adafactor"})
    schedule_plot.draw_schedule([schedule_plot.Part("", config, 200)], tmp_path / "a.png", "x")
    assert {"end: 200", "Adafactor sets the rate"} == {note.get_text() for note in seen[0].axes[0].texts}
    pyplot.close(seen[0])


def test_roles_that_move_alike_share_a_curve(load: Load) -> None:
    config = load()
    roles = {"a": {}, "b": {"lr": 1e-5}, "c": {}, "d": {}}

    class Roles(RunConfig):
        """A run of several roles, one of them frozen."""

        @property
        def spec(self) -> Any:
            return Namespace(task=lambda config: Namespace(roles=tuple(roles)))

        @property
        def frozen(self) -> list[str]:
            return ["d"]

        def for_role(self, name: str) -> RunConfig:
            return self.model_copy(update={"optimizer": lay(self.optimizer, roles[name])})

    found = schedule_plot.curves_of(Roles.model_construct(**dict(config)), 50)
    assert [(curve.label, curve.rates.max()) for curve in found] == [("a, c: cosine", 1e-3), ("b: cosine", 1e-5)]
