"""Cache jobs over datasets with different teachers: every one gets what it would get in a run of its own."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file

from musubi_tuner.caching.file_format import cache_path
from musubi_tuner.caching.status import examine, find_orphans, needed_kinds
from musubi_tuner.config import RunConfig
from musubi_tuner.errors import CheckpointError
from musubi_tuner.headers import read_header

pytestmark = pytest.mark.long

Summary = Callable[[], list[str]]
LUNE_ONLY = {"enable_sol": False, "time_buckets": 2, "seed": 5}


def datasets(*experts: Any) -> list[dict[str, Any]]:
    """Datasets of the folders set0, set1, ... with these teachers; None = those of the run."""
    return [
        {"image_directory": f"set{number}", "cache_directory": f"cache{number}"}
        | ({} if own is None else {"experts": own})
        for number, own in enumerate(experts)
    ]


@pytest.fixture
def mixed(project: Any) -> Any:
    """Three datasets of two, one and two pictures: with the run's teachers, without any, and with some of its own."""
    for name, size in (
        ("set0/a", (64, 64)),
        ("set0/b", (128, 64)),
        ("set1/c", (64, 64)),
        ("set2/d", (64, 64)),
        ("set2/e", (64, 64)),
    ):
        project.picture(f"../{name}", size)
    project.tables["datasets"] = datasets(None, False, LUNE_ONLY)
    return project


def status(config: RunConfig, project: Any) -> Any:
    family = config.spec.family.checkpoint_options(config)
    return examine(config, project.items(config), "experts", family)


def files(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Fingerprint and tensors of the cache files of a folder."""
    return {
        path.name: (read_header(path).metadata["fingerprint"], {k: v.tolist() for k, v in load_file(path).items()})
        for path in sorted(folder.glob("[!.]*.safetensors"))
    }


def test_every_dataset_gets_what_it_would_get_in_a_run_of_its_own(mixed: Any, summary: Summary) -> None:
    assert mixed.run("experts") == 0
    lines = [line for line in summary() if not line.startswith("experts: lune")]
    assert lines == [
        "experts of datasets[0]:", "experts: encoded 2, up to date 0, failed 0",
        "experts of datasets[2]:", "experts: encoded 2, up to date 0, failed 0",
    ]  # fmt: skip
    assert not (mixed.root / "cache1").exists()
    found = {name: files(mixed.root / name) for name in ("cache0", "cache2")}
    assert set(found["cache2"]["d_tf_experts.safetensors"][1]) == {"t_buckets_float32", "lune_features_float32"}
    for name in found:
        shutil.rmtree(mixed.root / name)
    mixed.tables["datasets"] = datasets(None)
    assert mixed.run("experts") == 0
    assert files(mixed.root / "cache0") == found["cache0"]
    alone = {**datasets(None, None, None)[2]}
    mixed.tables |= {"datasets": [alone], "experts": mixed.tables["experts"] | LUNE_ONLY}
    assert mixed.run("experts") == 0
    assert files(mixed.root / "cache2") == found["cache2"]


def test_a_second_run_makes_nothing_and_a_change_of_one_dataset_only_its_own_files(
    mixed: Any, summary: Summary
) -> None:
    assert mixed.run("experts") == 0
    summary()
    assert mixed.run("experts") == 0
    assert summary()[1::2] == ["experts: encoded 0, up to date 2, failed 0"] * 2
    mixed.tables["datasets"] = datasets(None, False, LUNE_ONLY | {"time_buckets": 4})
    config = mixed.config()
    found = status(config, mixed)
    assert (found.due, found.fresh) == (dict.fromkeys(("2:d", "2:e"), "time_buckets was 2, now 4"), 2)
    own = found.of([item for item in mixed.items(config) if item.dataset == 2])
    assert (len(own.due), own.fresh, own.reasons) == (2, 0, [("time_buckets was 2, now 4", 2)])
    before = files(mixed.root / "cache0")
    assert mixed.run("experts") == 0
    assert summary()[-1] == "experts: encoded 2, up to date 0, failed 0"
    assert files(mixed.root / "cache0") == before
    # Teachers turned on later: the files of that dataset are all that is due.
    mixed.tables["datasets"] = datasets(None, None, LUNE_ONLY | {"time_buckets": 4})
    assert status(mixed.config(), mixed).due == {"1:c": "missing"}


def test_weights_laid_over_the_unet_of_one_dataset_make_its_files_another(mixed: Any, encoders: Path) -> None:
    overlay = mixed.root / "lune.safetensors"
    shutil.copy(encoders / "unet" / "diffusion_pytorch_model.safetensors", overlay)
    mixed.tables["datasets"] = datasets(None, False, {"lune": str(overlay)})
    expected = status(mixed.config(), mixed).expected
    assert sorted(expected) == [0, 2]
    plain, laid_over = expected[0].shared, expected[2].shared
    assert "lune" not in plain
    assert {key for key in laid_over if laid_over[key] != plain.get(key)} == {"lune"}


def test_kinds_that_are_needed(mixed: Any) -> None:
    assert needed_kinds(mixed.config()) == ["latents", "text", "experts"]
    for kind, made in (("latents", 5), ("text", 5), ("experts", 4)):
        assert (
            len(examine(mixed.config(), mixed.items(), kind, {"expert_input": "random", "expert_time": "aligned"}).due)
            == made
        )


def test_features_of_a_dataset_that_turned_its_teachers_off_are_kept(mixed: Any) -> None:
    assert mixed.run("experts") == 0
    mixed.tables["datasets"] = datasets(False, None, None)
    config = mixed.config()
    roots = [dataset.cache_directory for dataset in config.datasets]
    assert find_orphans(mixed.items(config), "experts", "tf", roots) == []
    assert cache_path(mixed.items(config)[0], "experts", "tf").is_file()


def test_plan_tells_the_teachers_of_every_dataset_and_the_state_of_their_features(mixed: Any) -> None:
    from musubi_tuner.planning.plan import describe, make_plan

    def lines() -> list[str]:
        config = mixed.config()
        text = describe(config, make_plan(config, 1, download=False), 1).splitlines()
        (first,) = [number for number, line in enumerate(text) if line.startswith("  experts ")]
        return text[first : first + 4]

    assert lines() == [
        "  experts  0 up to date, 4 to make (4 x missing)",
        "           datasets[0]: lune and sol at 3 times: 0 up to date, 2 to make (2 x missing)",
        "           datasets[1]: no teachers: 1 image is trained without",
        "           datasets[2]: lune at 2 times: 0 up to date, 2 to make (2 x missing)",
    ]
    mixed.tables["datasets"] = datasets(None, None, None)
    assert not lines()[1].startswith("           datasets[0]")


def test_disk_is_counted_with_the_teachers_of_every_dataset(mixed: Any) -> None:
    from musubi_tuner.planning.report import cache_bytes

    def size() -> int:
        config = mixed.config()
        return cache_bytes(config, mixed.items(config), config.spec.family.outline_model(config)).total()

    found = size()
    mixed.tables["datasets"] = datasets(None, None, None)
    # Three times of 1280 features, 3 statistics and a map of 8 x 8, float32; the times are counted with the texts.
    features, times = 4 * 3 * (1280 + 3 + 64), 2 * 3
    lune, fewer = 4 * 2 * 1280, 2 * 2
    assert size() - found == 3 * (features + times) - 2 * (lune + fewer)


def test_memory_is_estimated_with_the_longest_tables(mixed: Any) -> None:
    mixed.tables["datasets"] = datasets(None, False, {"time_buckets": 11})
    config = mixed.config()
    shapes = config.spec.family.outline_model(config).shapes
    assert (shapes["t_buckets"], shapes["lune_features"]) == ((11,), (11, 1280))


def test_looking_at_the_plan_downloads_no_checkpoint(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from musubi_tuner.planning.plan import make_plan

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    project.picture("a")
    project.tables["experts"].pop("expert_input")
    project.tables["model"] |= {"init": "checkpoint", "path": "owner/model"}
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
        plan = make_plan(project.config(), 1, download=False, only_look=True)
    assert plan.due == ["latents", "text", "experts"]
    assert plan.status["experts"].expected[0].shared["expert_input"] == "random"  # what a file without records means
    asked: list[str] = []

    def unreachable(_: Any, repo: str, **__: Any) -> None:
        asked.append(repo)
        raise OfflineModeIsEnabled(repo)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(CheckpointError, match="owner/model"):
        make_plan(project.config(), 1, download=False)
    assert asked == ["owner/model"]
    (project.root / "empty").mkdir()
    project.tables["model"]["path"] = "empty"  # what is here is read, and has to be a checkpoint
    with pytest.raises(CheckpointError, match="empty"):
        make_plan(project.config(), 1, download=False, only_look=True)
