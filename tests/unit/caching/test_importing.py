"""Caches of the published trainer become ours: the right row at the right item, or a refusal that says why."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from musubi_tuner.caching.__main__ import main
from musubi_tuner.caching.file_format import KINDS, cache_path, plain_name
from musubi_tuner.caching.importing import ImportOptions, import_caches
from musubi_tuner.caching.reader import CachedDataset
from musubi_tuner.caching.status import KindStatus, examine
from musubi_tuner.config import RunConfig
from musubi_tuner.errors import CacheError, ConfigError, DataError
from musubi_tuner.headers import read_header
from musubi_tuner.models.foreign_caches import Rows
from musubi_tuner.planning.plan import describe, make_plan
from reference_caches import (
    Columns,
    make_columns,
    save,
    write_encodings_progress,
    write_flat,
    write_folder,
    write_shards,
    write_teacher_progress,
)

pytestmark = pytest.mark.long

TIMES = (0.05, 0.5, 0.95)
NAMES = ["a-1", "a", "b"]
"""Pictures by file name, which is the order of the published trainer; by id, our order, a comes first."""
CAPTIONS = {"a-1": "a red square", "a": "a red circle", "b": "a blue  triangle "}
OURS = {"t5_embeds": "t5_vec", "clip_pooled": "clip_l_pooler", "features": "lune_features", "stats": "sol_stats",
        "spatial": "sol_spatial"}  # fmt: skip


def columns_of(rows: int, **changes: Any) -> Columns:
    sizes: dict[str, Any] = {"latents": (16, 8, 8), "text": (8, 16), "clip": 16, "times": TIMES, "lune": 16}
    return make_columns(rows, **{**sizes, **changes})


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync waits for whatever else the machine writes, and no test pulls its plug."""
    monkeypatch.setattr("os.sync", lambda: None)


@pytest.fixture
def columns() -> Columns:
    """Three rows."""
    return columns_of(3)


@pytest.fixture
def run(project: Any) -> Any:
    """Three pictures, none of them square, trained at 64x64 as the published trainer squashes them."""
    for name in NAMES:
        project.picture(name, (96, 64), CAPTIONS[name])
    project.tables["general"] |= {"enable_bucket": False}
    project.tables["experts"] |= {"expert_input": "random", "expert_time": "reference", "resolution": 512}
    return project


@pytest.fixture
def prompts() -> list[str]:
    return [CAPTIONS[name] for name in NAMES]


def bring(project: Any, *sources: Path, config: RunConfig | None = None, **options: Any) -> int:
    """Import into the first dataset."""
    return import_caches(config or project.config(), sources, ImportOptions(**options))


def flat(project: Any, *arguments: Any) -> Path:
    """Flat files of v4.1, and a run that takes their Sol."""
    project.tables["experts"]["sol_source"] = "geometric"
    return write_flat(*arguments)


def stored(project: Any, name: str) -> dict[str, Tensor]:
    """Tensors of an item by plain name, of all its files."""
    item = next(item for item in project.items() if item.id == name)
    found: dict[str, Tensor] = {}
    for kind in KINDS:
        path = cache_path(item, kind, "tf")
        found |= {plain_name(key): tensor for key, tensor in load_file(path).items()} if path.exists() else {}
    return found


def assert_rows(project: Any, columns: Columns, names: list[str] = NAMES) -> None:
    """Every item holds its row, bit for bit."""
    for row, name in enumerate(names):
        found = stored(project, name)
        for key in ("latents", *OURS):
            tensor = found[OURS.get(key, key)]
            assert tensor.dtype == columns[key].dtype
            assert torch.equal(tensor, columns[key][row]), (name, key)
        assert torch.equal(found["t_buckets"], columns["t_buckets"])


def statuses(project: Any, config: RunConfig | None = None) -> dict[str, KindStatus]:
    config = config or project.config()
    family = config.spec.family.checkpoint_options(config)
    return {kind: examine(config, project.items(config), kind, family) for kind in KINDS}


def reasons(project: Any, config: RunConfig | None = None) -> dict[str, set[str]]:
    """Why files are due, by kind, where any is."""
    return {kind: set(status.due.values()) for kind, status in statuses(project, config).items() if status.due}


Write = Callable[[Path, Columns, list[str]], Path]
STATES: dict[str, dict[str, Any]] = {
    "shards of a list": {},
    "shards of a stream": {"shard_size": None, "completed_shards": None, "chunk_size": 2, "completed_chunks": [1, 0]},
    "shards of a stream of unknown length": {
        "shard_size": None, "completed_shards": None, "chunk_size": 2, "completed_chunks": [0, 1], "n_samples": None,
    },
    "shards by model": {
        "shard_size": None, "completed_shards": None, "chunk_size": 2,
        "enc_done": [0, 1], "lune_done": [0, 1], "sol_done": [0, 1],
    },
}  # fmt: skip
FORMS: dict[str, Write] = {
    "folder": write_folder,
    "v4.1": lambda folder, columns, prompts: write_flat(folder, columns, "set_of_three"),
    **{
        name: lambda folder, columns, prompts, state=state: write_shards(folder, columns, prompts, 2, **state)  # type: ignore[misc]
        for name, state in STATES.items()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form_reach_the_images_in_the_order_of_their_names(
    form: str, run: Any, columns: Columns, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FORMS[form](tmp_path / "caches", columns, prompts)
    run.tables["experts"]["sol_source"] = "geometric" if form == "v4.1" else "extracted"
    assert bring(run, source) == 0
    assert_rows(run, columns)
    assert reasons(run) == {}
    assert {kind: len(status.imported) for kind, status in statuses(run).items()} == dict.fromkeys(KINDS, 3)
    out = capsys.readouterr().out
    assert "3 images in the order of file names, a-1 to b\n" in out
    kept = "are not kept there" if form == "v4.1" else "3 agree with the captions"
    assert f"  prompts  {kept}" in out
    for kind in KINDS:
        assert f"{kind}: imported 3, up to date 0, failed 0\n" in out


def test_headers_say_what_is_known_and_that_it_was_imported(run: Any, columns: Columns, tmp_path: Path) -> None:
    bring(run, flat(run, tmp_path / "caches", columns, "three"))
    item = run.items()[1]
    facts = {}
    for kind in KINDS:
        header = read_header(cache_path(item, kind, "tf"))
        assert header.metadata["architecture"] == "tinyflux"
        fingerprint = header.fingerprint
        assert fingerprint is not None
        assert fingerprint.pop("provenance") == "imported"
        assert len(fingerprint.pop("source")) == 16
        assert (item.id, fingerprint.pop("item"), fingerprint.pop("rows")) == ("a-1", "a-1", [0])
        assert fingerprint.pop("format") and fingerprint.pop("architecture") == "tinyflux"
        facts[kind] = fingerprint
    assert facts["latents"].pop("image")["sha256"]
    # Neither weights nor precision nor the crop, which an import cannot know.
    assert facts == {
        "latents": {"latent_mode": "sample", "latent_shift": False, "bucket": [64, 64], "mask": None, "views": None},
        "text": {"t5_max_tokens": 8, "t5_masked": True, "caption": "a red square", "captions": None},
        "experts": {
            "lune_enabled": True, "sol_enabled": True, "expert_input": "random", "expert_time": "reference",
            "text_padding": "visible", "resolution": 512, "time_buckets": 3, "sol_source": "geometric", "caption": "a red square", "captions": None,
        },
    }  # fmt: skip
    latents = read_header(cache_path(item, "latents", "tf")).metadata
    assert latents["vae_shift_applied"] == "false" and latents["bucket_width"] == "64"
    assert read_header(cache_path(item, "text", "tf")).metadata["caption1"] == "a red square"
    assert read_header(cache_path(item, "experts", "tf")).metadata["time_convention"] == "data_at_1"


def test_sol_of_a_folder_is_extracted_and_its_fourth_statistic_makes_it_geometric(
    run: Any, columns: Columns, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_folder(tmp_path / "caches", columns, prompts)
    bring(run, source)
    fingerprint = read_header(cache_path(run.items()[0], "experts", "tf")).fingerprint
    assert fingerprint is not None and fingerprint["sol_source"] == "extracted"
    assert "geometric" not in capsys.readouterr().out
    sol = torch.load(source / "sol.pt", weights_only=True)
    sol["stats"] = torch.cat([sol["stats"], torch.ones(3, 3, 1)], dim=-1)
    torch.save(sol, source / "sol.pt")
    with pytest.raises(ConfigError, match=r"experts\.sol_source was 'geometric', now 'extracted'"):
        bring(run, source, replace=True)
    run.tables["experts"]["sol_source"] = "geometric"
    bring(run, source, replace=True)
    fingerprint = read_header(cache_path(run.items()[0], "experts", "tf")).fingerprint
    assert fingerprint is not None and fingerprint["sol_source"] == "geometric"
    assert "Sol is geometric: a formula of the time" in capsys.readouterr().out
    assert_rows(run, {**columns, "stats": columns["stats"].float()})


class TestPrecision:
    def test_named_precision_is_written(self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path) -> None:
        config = run.config(cache={"dtype": "float32"})
        bring(run, write_folder(tmp_path / "caches", columns, prompts), config=config)
        wide = {name: tensor.float() for name, tensor in columns.items()}
        assert_rows(run, wide)
        assert reasons(run, config) == {}

    def test_rows_that_are_not_finite_are_named_and_the_others_imported(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        columns["t5_embeds"][1, 0, 0] = float("inf")
        assert bring(run, write_folder(tmp_path / "caches", columns, prompts)) == 1
        captured = capsys.readouterr()
        assert "t5_vec_float16 is not finite" in captured.err and "images/a.png" in captured.err
        assert "text: imported 2, up to date 0, failed 1\n" in captured.out
        assert reasons(run) == {"text": {"missing"}}


class TestStatus:
    @pytest.fixture
    def imported(self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path) -> Any:
        bring(run, write_folder(tmp_path / "caches", columns, prompts))
        return run

    @pytest.mark.parametrize(
        ("table", "changes"),
        [
            ("model", {"vae_path": "nobody/nothing-of-this-name:vae", "t5_path": "nobody/nothing-of-this-name:t5"}),
            ("experts", {"seed": 8, "dtype": "float32"}),
            ("cache", {"dtype": "bfloat16"}),
        ],
    )
    def test_what_an_import_does_not_know_makes_nothing_stale(self, table: str, changes: Any, imported: Any) -> None:
        assert reasons(imported, imported.config(**{table: changes})) == {}

    @pytest.mark.parametrize(
        ("table", "changes", "expected"),
        [
            ("experts", {"expert_time": "aligned"}, {"experts": "expert_time was 'reference', now 'aligned'"}),
            ("experts", {"expert_input": "noised_image"}, {"experts": "expert_input was 'random', now 'noised_image'"}),
            ("cache", {"latent_mode": "mean"}, {"latents": "cache.latent_mode was 'sample', now 'mean'"}),
            ("model", {"t5_max_tokens": 6}, {"text": "model.t5_max_tokens was 8, now 6"}),
            ("model", {"t5_attn_mask": True}, {"text": "it holds no t5_mask"}),
        ],
    )
    def test_what_is_known_of_the_rows_must_agree(self, table: str, changes: Any, expected: Any, imported: Any) -> None:
        found = reasons(imported, imported.config(**{table: changes}))
        assert found == {kind: {reason} for kind, reason in expected.items()}

    def test_another_picture_or_caption_makes_an_item_stale(self, imported: Any) -> None:
        Image.new("RGB", (96, 64)).save(imported.root / "images" / "b.png")
        (imported.root / "images" / "b.txt").write_text("a green triangle")
        assert reasons(imported) == {
            "latents": {"the image has changed"},
            "text": {"caption was 'a blue  triangle', now 'a green triangle'"},
            "experts": {"caption was 'a blue  triangle', now 'a green triangle'"},
        }

    def test_plan_says_what_is_imported_and_warns_of_a_mixture(self, imported: Any) -> None:
        config = imported.config()
        plan = describe(config, make_plan(config, 1, download=False), 1)
        assert "  latents  3 up to date (3 of them imported), 0 to make\n" in plan
        assert "are imported" not in plan
        imported.picture("c")
        plan = describe(config, make_plan(config, 1, download=False), 1)
        for kind in KINDS:
            assert f"warning: {kind}: 3 files are imported, 1 are made by this run's encoders" in plan

    def test_a_job_encodes_only_what_was_not_imported_and_says_that_they_differ(
        self, imported: Any, columns: Columns, capsys: pytest.CaptureFixture[str]
    ) -> None:
        imported.picture("c")
        assert imported.run("text") == 0
        captured = capsys.readouterr()
        assert "text: encoded 1, up to date 3, failed 0" in captured.out
        assert "warning: text: 3 files are imported, 1 are made by this run's encoders" in captured.err
        assert_rows(imported, columns)

    def test_training_reads_the_rows(self, imported: Any, columns: Columns) -> None:
        from musubi_tuner.data.plan import MicroBatch

        config = imported.config()
        batch = CachedDataset(config, imported.items(), list(KINDS))[MicroBatch((0, 2), (0, 1))]
        assert batch.items == ["a", "b"]
        assert torch.equal(batch.tensors["latents"], columns["latents"][[1, 2]].float())
        assert torch.equal(batch.tensors["lune_features"], columns["features"][[1, 2]])


class TestRefusals:
    @pytest.mark.parametrize("rows", [2, 4])
    def test_another_number_of_images(self, run: Any, tmp_path: Path, rows: int) -> None:
        source = write_folder(tmp_path / "caches", columns_of(rows), None)
        with pytest.raises(DataError) as caught:
            bring(run, source)
        for part in (str(source), f"{rows} rows of latents", "datasets[0] has 3 images", "exactly the images"):
            assert part in str(caught.value)
        assert not (run.root / "cache").exists()

    def test_an_unfinished_build_of_more_images(self, run: Any, tmp_path: Path) -> None:
        source = write_encodings_progress(tmp_path / "caches", columns_of(5), finished=4, batch=2)
        with pytest.raises(DataError, match=r"has 4 rows of latents, datasets\[0\] has 3 images"):
            bring(run, source)

    def test_prompts_that_are_not_the_captions(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path
    ) -> None:
        source = write_folder(tmp_path / "caches", columns, [prompts[0], "another circle", prompts[2]])
        with pytest.raises(DataError) as caught:
            bring(run, source)
        for part in (str(source), "1 of 3 prompts", "row 1, a: 'another circle' there, 'a red circle' here"):
            assert part in str(caught.value)

    def test_prompts_of_another_number_than_the_rows_say_nothing(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert bring(run, write_folder(tmp_path / "caches", columns, prompts[:2])) == 0
        assert (
            "  prompts  are not kept there: that the order is the same cannot be checked\n" in capsys.readouterr().out
        )

    def test_the_same_prompts_in_another_order(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path
    ) -> None:
        with pytest.raises(DataError, match="they are the same in another order; list the images in that order"):
            bring(run, write_shards(tmp_path / "caches", columns, prompts[::-1], 2))

    def test_latents_of_another_size(self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path) -> None:
        source = write_folder(tmp_path / "caches", columns, prompts)
        with pytest.raises(DataError) as caught:
            bring(run, source, config=run.config(general={"enable_bucket": True}))
        assert "latents are [16, 8, 8], which is 64x64 pixels, but this run trains 3 of 3 images at other sizes" in str(
            caught.value
        )
        assert "set resolution = [64, 64] and enable_bucket = false" in str(caught.value)

    def test_teachers_that_ran_otherwise(self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path) -> None:
        config = run.config(experts={"expert_time": "aligned", "time_buckets": 4})
        with pytest.raises(ConfigError) as caught:
            bring(run, write_folder(tmp_path / "caches", columns, prompts), config=config)
        assert (
            "its experts do not fit this run: expert_time was 'reference', now 'aligned'; time_buckets was 3, now 4"
            in str(caught.value)
        )
        assert bring(run, tmp_path / "caches", config=config, kinds=["latents", "text"]) == 0

    def test_a_teacher_that_is_missing(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_folder(tmp_path / "caches", columns, prompts, parts=["encodings", "lune"])
        with pytest.raises(ConfigError, match=r"holds Lune and no Sol.*experts\.enable_sol = false"):
            bring(run, source)
        config = run.config(experts={"enable_sol": False})
        assert bring(run, source, config=config) == 0
        assert "sol_stats" not in stored(run, "a")
        assert reasons(run, config) == {}

    def test_a_teacher_that_the_run_does_not_use_is_left_out_aloud(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = run.config(experts={"enable_lune": False})
        assert bring(run, write_folder(tmp_path / "caches", columns, prompts), config=config) == 0
        assert "note     lune left out: experts.enable_lune is false" in capsys.readouterr().out
        assert "lune_features" not in stored(run, "a")

    def test_hidden_padding_needs_a_mask_that_these_caches_lack(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path
    ) -> None:
        source = write_folder(tmp_path / "caches", columns, prompts)
        config = run.config(model={"t5_attn_mask": True})
        with pytest.raises(ConfigError, match=r"model\.t5_attn_mask is true, but caches .* keep no attention mask"):
            bring(run, source, config=config)
        assert bring(run, source, config=config, kinds=["latents"]) == 0

    def test_caches_without_images(self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path) -> None:
        source = write_folder(tmp_path / "caches", columns, prompts)
        for path in (run.root / "images").iterdir():
            path.unlink()
        with pytest.raises(DataError, match="caches alone cannot be trained from, because sizes, captions and names"):
            bring(run, source)

    def test_a_pickle_that_runs_code_is_not_opened(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path
    ) -> None:
        class Harm:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (tmp_path / "harm",)

        source = write_folder(tmp_path / "caches", columns, prompts)
        save({"features": Harm()}, source / "lune.pt")
        with pytest.raises(CacheError, match=r"lune\.pt: holds more than tensors, numbers and texts"):
            bring(run, source)
        (source / "lune.pt").write_bytes(pickle.dumps(Harm(), 2))
        with pytest.raises(CacheError, match=r"lune\.pt: holds more than tensors, numbers and texts"):
            bring(run, source)
        assert not (tmp_path / "harm").exists()

    def test_a_file_that_is_cut_short(self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path) -> None:
        source = write_folder(tmp_path / "caches", columns, prompts)
        raw = (source / "sol.pt").read_bytes()
        (source / "sol.pt").write_bytes(raw[: len(raw) // 2])
        with pytest.raises(CacheError, match=r"sol\.pt: .*no (complete )?torch file"):
            bring(run, source)

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("encodings", {"t5_embeds": None}, r"encodings\.pt: t5_embeds is missing, expected a tensor of floats"),
            ("encodings", {"latents": torch.zeros(2, 16, 8, 8)}, "has 2 latents, 3 t5_embeds, 3 clip_pooled"),
            (
                "encodings",
                {"clip_pooled": torch.zeros(3, 2, 8)},
                r"clip_l_pooler is \[3, 2, 8\], expected 2 dimensions",
            ),
            (
                "encodings",
                {"clip_pooled": torch.zeros(3, 8).int()},
                "clip_pooled is a Tensor, expected a tensor of floats",
            ),
            ("encodings", {"latents": torch.zeros(3, 4, 8, 8)}, "latents have 4 channels, TinyFlux-Deep takes 16"),
            ("lune", {"t_buckets": torch.tensor([0.5, 0.1, 0.9])}, "expected rising times"),
            ("lune", {"t_buckets": torch.tensor([0.1, 0.5, 0.9])}, "sol has the times"),
            ("lune", {"features": torch.zeros(3, 4, 16)}, "lune_features has 4 times per row, t_buckets 3"),
            ("lune", {"features": torch.zeros(2, 3, 16)}, "Lune is of 2 rows, Sol of 3"),
            ("sol", {"stats": torch.zeros(3, 3, 5)}, "expected 3 or 4 statistics and a square map per time"),
        ],
    )
    def test_tensors_that_contradict_each_other(
        self, name: str, changes: Any, message: str, run: Any, columns: Columns, prompts: list[str], tmp_path: Path
    ) -> None:
        source = write_folder(tmp_path / "caches", columns, prompts)
        content = torch.load(source / f"{name}.pt", weights_only=True)
        torch.save({**content, **changes}, source / f"{name}.pt")
        with pytest.raises((CacheError, DataError), match=message):
            bring(run, source)

    def test_a_place_without_caches(self, run: Any, tmp_path: Path) -> None:
        with pytest.raises(CacheError, match="no such file or folder"):
            bring(run, tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(CacheError, match="is no cache of the published trainer; expected a folder with encodings"):
            bring(run, tmp_path / "empty")

    def test_a_family_whose_trainer_has_no_caches(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path
    ) -> None:
        source = write_folder(tmp_path / "caches", columns, prompts)
        (run.root / "base.safetensors").write_bytes(b"")
        del run.tables["experts"]
        model = {key: run.tables["model"][key] for key in ("vae_path", "t5_path", "clip_path")}
        run.tables["model"] = {"arch": "fd", "path": "base.safetensors", **model}
        config = run.config(adapter={"type": "lora"})
        with pytest.raises(ConfigError, match=r"FLUX\.1.* has no published trainer with caches of its own"):
            bring(run, source, config=config)


class TestShards:
    def test_finished_shards_of_an_unfinished_build_are_imported(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_shards(tmp_path / "caches", columns, prompts, 2, completed_shards=[0])
        assert bring(run, source) == 0
        assert_rows(run, columns, NAMES[:2])
        captured = capsys.readouterr()
        assert "note     encodings: shard_0001.pt left out: not in completed_shards\n" in captured.out
        assert "  latents  2 to write (0.0 MiB), 0 up to date, 1 not finished there; " in captured.out
        squashed = (
            'note     pictures were squashed there, and the rest would be cut; resize = "squash" makes them alike\n'
        )
        assert squashed in captured.out
        assert "text: not complete there; the rest is made by: python -m musubi_tuner.caching text" in captured.out
        assert reasons(run) == {kind: {"missing"} for kind in KINDS}
        run.tables["general"] |= {"resize": "squash"}
        assert bring(run, source) == 0
        assert squashed not in capsys.readouterr().out

    def test_each_model_has_its_own_progress(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path
    ) -> None:
        state = {**STATES["shards by model"], "lune_done": [0, 1], "sol_done": [0]}
        assert bring(run, write_shards(tmp_path / "caches", columns, prompts, 2, **state)) == 0
        assert reasons(run) == {"experts": {"missing"}}
        assert set(stored(run, "b")) == {"latents", "t5_vec", "clip_l_pooler"}

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"completed_shards": [1]}, r"completed_shards has no 0 before 1; rows behind a gap belong to other items"),
            ({"completed_shards": [0, 1, 2]}, "lists 3 shards, but 3 rows in shards of 2 are 2"),
            ({"completed_shards": 2}, "completed_shards is 2, expected a list of shard numbers"),
            ({"completed_shards": []}, "no shard of this build is finished"),
            ({"n_samples": 4}, r"encodings/shard_0001\.pt: holds 1 rows, expected 2"),
            ({"n_samples": 2, "completed_shards": [0]}, r"shard_0001\.pt: is no shard of this build, which has 1"),
            ({"n_samples": "3"}, "is no state of a build"),
            ({"shard_size": None}, "is no state of a build"),
        ],
    )
    def test_a_state_that_the_files_contradict(
        self, state: Any, message: str, run: Any, columns: Columns, prompts: list[str], tmp_path: Path
    ) -> None:
        source = write_shards(tmp_path / "caches", columns, prompts, 2, **state)
        if state.get("shard_size", 2) is None:
            assert "shard_size" not in json.loads((source / "state.json").read_text())
        with pytest.raises(CacheError, match=message):
            bring(run, source)

    def test_a_shard_that_is_missing_and_one_that_is_left_over(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path
    ) -> None:
        source = write_shards(tmp_path / "caches", columns, prompts, 2)
        shard = source / "lune" / "shard_0001.pt"
        (source / "lune" / "shard_0002.pt").write_bytes(shard.read_bytes())
        with pytest.raises(
            CacheError, match=r"lune/shard_0002\.pt: is no shard of this build, which has 2; .* Move it away"
        ):
            bring(run, source)
        shard.unlink()
        (source / "lune" / "shard_0002.pt").unlink()
        with pytest.raises(
            CacheError, match=r"lune/shard_0001\.pt: is missing \(1 in all\), but completed_shards .* lists it"
        ):
            bring(run, source)

    def test_shards_whose_teachers_ran_at_other_times(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path
    ) -> None:
        source = write_shards(tmp_path / "caches", columns, prompts, 2)
        path = source / "lune" / "shard_0001.pt"
        content = torch.load(path, weights_only=True)
        for times in (content["t_buckets"] * 0.5, content["t_buckets"][:2]):
            torch.save({**content, "t_buckets": times}, path)
            with pytest.raises(CacheError, match=r"shard_0001\.pt: t_buckets are .*, in the files before \[0\.05"):
                bring(run, source)

    def test_shards_are_joined_by_number_not_by_name(self, run: Any, tmp_path: Path) -> None:
        source = write_shards(tmp_path / "caches", columns_of(3), None, 1)
        for part in ("encodings", "lune", "sol"):  # beyond 9999 a name sorts before those with four digits
            (source / part / "shard_0002.pt").rename(source / part / "shard_000000000000002.pt")
        assert bring(run, source) == 0
        assert_rows(run, columns_of(3))


class TestProgress:
    def test_finished_rows_of_encodings(
        self, run: Any, columns: Columns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_encodings_progress(tmp_path / "caches", columns, finished=2, batch=1)
        assert bring(run, source) == 0
        for row, name in enumerate(NAMES[:2]):
            assert torch.equal(stored(run, name)["latents"], columns["latents"][row])
        assert stored(run, "b") == {}
        assert "note     encodings: 2 rows were finished\n" in capsys.readouterr().out
        assert reasons(run) == {kind: {"missing"} for kind in KINDS}

    def test_rows_behind_the_finished_ones_are_zeros_and_left_alone(
        self, run: Any, columns: Columns, tmp_path: Path
    ) -> None:
        source = write_teacher_progress(tmp_path / "caches", columns, finished=2, name="lune")
        config = run.config(experts={"enable_sol": False})
        assert bring(run, source, config=config) == 0
        assert torch.equal(stored(run, "a")["lune_features"], columns["features"][1])
        assert torch.allclose(stored(run, "a")["t_buckets"], torch.tensor([1 / 6, 1 / 2, 5 / 6]))
        assert stored(run, "b") == {}

    def test_progress_without_a_count_is_refused(self, run: Any, columns: Columns, tmp_path: Path) -> None:
        source = write_encodings_progress(tmp_path / "caches", columns, finished=2, batch=1)
        content = torch.load(source / "encodings_progress.pt", weights_only=True)
        for count, message in ((None, "holds no next_idx"), (5, "holds 2 rows of 5")):
            torch.save({**content, "next_idx": count}, source / "encodings_progress.pt")
            with pytest.raises(CacheError, match=message):
                bring(run, source)

    def test_teachers_under_way_beside_complete_encodings(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_folder(tmp_path / "caches", columns, prompts)
        (source / "lune.pt").unlink()
        write_teacher_progress(source, columns, finished=2, name="lune")
        bring(run, source)
        printed = capsys.readouterr().out
        assert "lune: 2 rows were finished" in printed and "left out" not in printed
        assert "unfinished build" in printed

    def test_progress_beside_a_complete_cache_is_left_out_aloud(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_folder(tmp_path / "caches", columns, prompts)
        write_encodings_progress(source, columns_of(3, seed=1), finished=2, batch=1)
        assert bring(run, source) == 0
        assert_rows(run, columns)
        assert "note     encodings_progress.pt left out: the build beside it is complete\n" in capsys.readouterr().out


class TestFlatFiles:
    def test_latents_count_images_and_text_counts_captions(self, run: Any, tmp_path: Path) -> None:
        listing = [
            {"image_path": "images/b.png", "long": "a blue triangle", "short": "triangle"},
            {"image_path": "images/a.png", "long": "", "short": "circle"},
        ]
        (run.root / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listing))
        run.tables["datasets"] = [
            {"image_jsonl_file": "list.jsonl", "cache_directory": "cache", "caption_columns": ["long", "short"]}
        ]
        columns = columns_of(3)
        two = {**columns, "latents": columns["latents"][:2]}
        assert bring(run, flat(run, tmp_path / "caches", two, "portraits")) == 0
        found = stored(run, "b")  # the first line, though the second item
        assert torch.equal(found["latents"], columns["latents"][0])
        assert torch.equal(found["t5_vec"], columns["t5_embeds"][0])
        assert torch.equal(found["t5_vec_v1"], columns["t5_embeds"][1])
        assert torch.equal(found["sol_spatial_v1"], columns["spatial"][1])
        found = stored(run, "a")
        assert torch.equal(found["latents"], columns["latents"][1])
        assert torch.equal(found["lune_features"], columns["features"][2])
        assert "t5_vec_v1" not in found
        assert reasons(run) == {}
        CachedDataset(run.config(), run.items(), list(KINDS))

    def test_latents_may_repeat_for_every_caption(self, run: Any, columns: Columns, tmp_path: Path) -> None:
        listing = {"image_path": "images/a.png", "one": "a", "two": "b", "three": "c"}
        (run.root / "list.jsonl").write_text(json.dumps(listing))
        run.tables["datasets"] = [{"image_jsonl_file": "list.jsonl", "cache_directory": "cache",
                                   "caption_columns": ["one", "two", "three"]}]  # fmt: skip
        assert bring(run, write_folder(tmp_path / "caches", columns, ["a", "b", "c"])) == 0
        assert torch.equal(stored(run, "a")["latents"], columns["latents"][0])
        assert torch.equal(stored(run, "a")["t5_vec_v2"], columns["t5_embeds"][2])
        assert json.loads((run.root / "cache" / "cache.json").read_text())["roots"] == [str(run.root / "images")]

    def test_masks_are_taken_where_the_dataset_says_so(
        self, run: Any, columns: Columns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        masks = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3))
        source = flat(run, tmp_path / "caches", columns, "sportfashion", masks)
        assert bring(run, source) == 0
        assert 'note     masks left out; mask_source = "imported" takes them\n' in capsys.readouterr().out
        assert "mask_weights" not in stored(run, "a")
        run.tables["datasets"][0]["mask_source"] = "imported"
        assert reasons(run) == {"latents": {"the source of the mask was None, now 'imported'"}}
        assert bring(run, source) == 0
        assert "latents: imported 3, up to date 0" in capsys.readouterr().out
        for row, name in enumerate(NAMES):
            assert torch.equal(stored(run, name)["mask_weights"], masks[row])
        assert reasons(run) == {}
        config = run.config(train={"masked_loss": True})
        CachedDataset(config, run.items(), list(KINDS))
        plan = describe(config, make_plan(config, 1, download=False), 1)
        assert "  masks    3 of 3 images, weights 0.5 to 2; the others have weight 1\n" in plan

    def test_another_number_of_masks_than_latents(self, run: Any, columns: Columns, tmp_path: Path) -> None:
        source = flat(run, tmp_path / "caches", columns, "schnell")
        save(torch.ones(2, 8, 8), source / "schnell_masks_2.pt")
        with pytest.raises(CacheError, match="2 masks for 3 latents; expected as many"):
            bring(run, source)

    def test_masks_of_another_size_than_the_latents(self, run: Any, columns: Columns, tmp_path: Path) -> None:
        run.tables["datasets"][0]["mask_source"] = "imported"
        source = flat(run, tmp_path / "caches", columns, "schnell", torch.ones(3, 4, 4))
        with pytest.raises(DataError, match=r"holds masks of \[4, 4\], but mask_source .* and latents are \[8, 8\]"):
            bring(run, source)

    def test_a_mask_that_can_only_be_imported_is_never_made_up(
        self, run: Any, columns: Columns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run.tables["datasets"][0]["mask_source"] = "imported"
        with pytest.raises(DataError, match='holds no masks, but mask_source is "imported"'):
            bring(run, flat(run, tmp_path / "caches", columns, "schnell"))
        assert run.run("latents") == 1
        assert 'mask_source is "imported", so its latents can only be imported' in capsys.readouterr().err
        masks = torch.full((3, 8, 8), 2.0)
        assert bring(run, flat(run, tmp_path / "caches", columns, "schnell", masks)) == 1
        assert "its mask has values from 2 to 2, expected 0 to 1" in capsys.readouterr().err

    def test_masks_of_the_dataset_are_squashed_as_the_pictures_were(
        self, run: Any, columns: Columns, tmp_path: Path
    ) -> None:
        (run.root / "masks").mkdir()
        ramp = np.zeros((64, 96), dtype=np.uint8)
        ramp[:, 48:] = (
            255  # the right half; a centre crop of 64 pixels has it in the right half too, a wider one would not
        )
        ramp[:, :12] = 255  # the left eighth, which the crop would lose
        Image.fromarray(ramp).save(run.root / "masks" / "a.png")
        run.tables["datasets"][0]["mask_directory"] = "masks"
        assert bring(run, flat(run, tmp_path / "caches", columns, "three")) == 0
        mask = stored(run, "a")["mask_weights"]
        assert torch.allclose(mask[:, 0], torch.ones(8))
        assert torch.allclose(mask[:, 4:], torch.ones(8, 4))
        assert torch.allclose(mask[:, 1:4], torch.zeros(8, 3))
        assert "mask_weights" not in stored(run, "b")
        assert reasons(run) == {}

    def test_one_set_of_several_is_named_by_a_file(self, run: Any, columns: Columns, tmp_path: Path) -> None:
        other = columns_of(3, seed=1)
        folder = flat(run, tmp_path / "caches", columns, "portrait")
        write_flat(folder, other, "imagenet")
        with pytest.raises(
            CacheError, match="holds the sets imagenet, portrait; import one at a time, by naming its files"
        ):
            bring(run, folder)
        assert bring(run, folder / "imagenet_latents_3.pt", folder) == 0
        assert_rows(run, other)

    def test_files_of_one_set_may_lie_in_two_folders(self, run: Any, columns: Columns, tmp_path: Path) -> None:
        folder = flat(run, tmp_path / "encodings", columns, "portrait")
        (tmp_path / "latents").mkdir()
        (folder / "portrait_latents_3.pt").rename(tmp_path / "latents" / "portrait_latents_3.pt")
        assert bring(run, folder, tmp_path / "latents") == 0
        assert_rows(run, columns)

    def test_two_lengths_of_one_set_are_not_guessed(self, run: Any, columns: Columns, tmp_path: Path) -> None:
        folder = flat(run, tmp_path / "caches", columns, "portrait")
        save(columns_of(2)["latents"], folder / "portrait_latents_2.pt")
        with pytest.raises(CacheError, match=r"portrait_latents_2\.pt and .*portrait_latents_3\.pt: are both latents"):
            bring(run, folder)
        assert bring(run, folder / "portrait_latents_3.pt", folder) == 0

    def test_a_name_that_lies_about_its_rows(self, run: Any, columns: Columns, tmp_path: Path) -> None:
        folder = flat(run, tmp_path / "caches", columns, "portrait")
        (folder / "portrait_latents_3.pt").rename(folder / "portrait_latents_4.pt")
        with pytest.raises(CacheError, match=r"portrait_latents_4\.pt: holds 3 rows, its name says 4"):
            bring(run, folder)

    def test_a_set_without_latents_gives_the_rest(
        self, run: Any, columns: Columns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = flat(run, tmp_path / "caches", columns, "schnell")
        (folder / "schnell_latents_3.pt").unlink()
        assert bring(run, folder) == 0
        assert reasons(run) == {"latents": {"missing"}}
        assert "latents: not complete there; the rest is made by: python -m musubi_tuner.caching latents" in (
            capsys.readouterr().out
        )


class TestAgain:
    def test_a_second_import_writes_only_what_is_missing(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_folder(tmp_path / "caches", columns, prompts)
        assert bring(run, source) == 0
        paths = {path: path.stat().st_mtime_ns for path in sorted((run.root / "cache").glob("*.safetensors"))}
        assert len(paths) == 9
        gone = next(path for path in paths if path.name.startswith("b_tf_te"))
        gone.unlink()
        (run.root / "cache" / ".tmp-1-2-b_tf_te.safetensors").write_bytes(b"half")
        capsys.readouterr()
        assert bring(run, source) == 0
        out = capsys.readouterr().out
        assert "text: imported 1, up to date 2, failed 0\n" in out
        assert "latents: imported 0, up to date 3, failed 0\n" in out
        assert {p: p.stat().st_mtime_ns for p in paths if p != gone} == {p: t for p, t in paths.items() if p != gone}
        assert_rows(run, columns)
        assert not list((run.root / "cache").glob(".tmp-*"))

    def test_items_in_another_order_take_the_rows_of_their_new_places(
        self, run: Any, columns: Columns, tmp_path: Path
    ) -> None:
        run.tables["datasets"] = [{"image_jsonl_file": "list.jsonl", "cache_directory": "cache"}]
        source = write_folder(tmp_path / "caches", columns, None)
        for names in (NAMES, NAMES[::-1]):
            lines = [json.dumps({"image_path": f"images/{name}.png", "caption": CAPTIONS[name]}) for name in names]
            (run.root / "list.jsonl").write_text("\n".join(lines))
            assert bring(run, source) == 0
            assert_rows(run, columns, names)

    def test_files_of_another_origin_are_replaced_only_when_asked(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path
    ) -> None:
        assert bring(run, write_folder(tmp_path / "first", columns, prompts)) == 0
        other = columns_of(3, seed=1)
        second = write_folder(tmp_path / "second", other, prompts)
        with pytest.raises(CacheError) as caught:
            bring(run, second)
        assert "9 files were not imported from here (a-1_0096x0064_tf.safetensors, a_0096x0064_tf.safetensors" in str(
            caught.value
        )
        assert_rows(run, columns)
        assert bring(run, second, replace=True) == 0
        assert_rows(run, other)

    def test_encoded_files_are_kept_too(self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path) -> None:
        assert run.run("text") == 0
        source = write_folder(tmp_path / "caches", columns, prompts)
        with pytest.raises(CacheError, match="3 files were not imported from here"):
            bring(run, source)
        assert bring(run, source, kinds=["latents"]) == 0

    def test_a_dry_run_checks_and_writes_nothing(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_folder(tmp_path / "caches", columns, prompts)
        assert bring(run, source, dry_run=True) == 0
        assert not (run.root / "cache").exists()
        out = capsys.readouterr().out
        assert "  experts  3 to write (" in out
        assert "lune_features [3, 16], sol_stats [3, 3], sol_spatial [3, 8, 8] in float16\n" in out
        assert "imported" not in out

    def test_a_job_that_writes_here_is_waited_for(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path
    ) -> None:
        from musubi_tuner.caching.job import lock_for_job

        source = write_folder(tmp_path / "caches", columns, prompts)
        with lock_for_job(run.root / "cache", "text"), pytest.raises(CacheError, match="is writing caches here"):
            bring(run, source)


class TestCommand:
    def test_command_imports_into_the_dataset_that_is_named(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (run.root / "images2").mkdir()
        Image.new("RGB", (64, 64)).save(run.root / "images2" / "z.png")
        (run.root / "images2" / "z.txt").write_text("black")
        run.tables["datasets"].insert(0, {"image_directory": "images2", "cache_directory": "cache2"})
        run.config()
        source = write_folder(tmp_path / "caches", columns, prompts)
        assert main(["import", "run.toml", str(source)]) == 2
        assert (
            "the run file has 2 datasets; say with --dataset 0 to 1 whose caches these are" in capsys.readouterr().err
        )
        assert main(["import", "run.toml", str(source), "--dataset", "2"]) == 2
        assert "--dataset is 2, the run file has datasets 0 to 1" in capsys.readouterr().err
        assert main(["import", "run.toml", str(source), "--dataset", "1", "--only", "text,latents"]) == 0
        assert "into     datasets[1]: 3 images" in capsys.readouterr().out
        assert len(list((run.root / "cache").glob("*.safetensors"))) == 6
        assert not (run.root / "cache2").exists()

    def test_a_dataset_takes_the_teachers_that_it_has(self, run: Any, columns: Columns, tmp_path: Path) -> None:
        (run.root / "images2").mkdir()
        Image.new("RGB", (64, 64)).save(run.root / "images2" / "z.png")
        (run.root / "images2" / "z.txt").write_text("black")
        run.tables["datasets"][0]["experts"] = {"enable_sol": False}
        run.tables["datasets"].append({"image_directory": "images2", "cache_directory": "cache2"})
        source = write_folder(tmp_path / "caches", columns, None, parts=("encodings", "lune"))
        assert bring(run, source, dataset=0) == 0
        assert "sol_stats" not in stored(run, "a")
        assert torch.equal(stored(run, "a")["lune_features"], columns["features"][1])

    def test_unknown_kinds_and_unknown_options_are_wrong_input(
        self, run: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run.config()
        assert main(["import", "run.toml", "caches", "--only", "latent"]) == 2
        assert "--only is 'latent', expected some of latents,text,experts" in capsys.readouterr().err
        assert main(["import", "run.toml", "caches", "--overwrite"]) == 2
        assert "unknown option --overwrite" in capsys.readouterr().err

    def test_files_are_mapped_and_opened_as_weights_only(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[dict[str, Any]] = []
        load = torch.load

        def spy(path: Any, **options: Any) -> Any:
            calls.append(options)
            return load(path, **options)

        monkeypatch.setattr(torch, "load", spy)
        assert bring(run, write_shards(tmp_path / "caches", columns, prompts, 2)) == 0
        assert len(calls) == 6
        assert all(call["weights_only"] is True and call["mmap"] is True for call in calls)

    def test_old_torch_files_that_cannot_be_mapped_are_read(
        self, run: Any, columns: Columns, prompts: list[str], tmp_path: Path
    ) -> None:
        source = write_folder(tmp_path / "caches", columns, prompts)
        for path in source.glob("*.pt"):
            content = torch.load(path, weights_only=True)
            torch.save(content, path, _use_new_zipfile_serialization=False)
        assert bring(run, source) == 0
        assert_rows(run, columns)


def test_rows_of_parts_are_found_and_copied() -> None:
    parts = [torch.arange(4.0).view(2, 2), torch.zeros(0, 2), torch.arange(4.0, 10.0).view(3, 2)]
    rows = Rows(parts, 4)
    assert len(rows) == 4 and rows.shape == (2,)
    assert [rows[index].tolist() for index in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    rows[2].zero_()
    assert parts[2][0].tolist() == [4, 5]
    with pytest.raises(IndexError):
        rows[4]
    with pytest.raises(ValueError, match="rows are of different kinds"):
        Rows([torch.zeros(2, 2), torch.zeros(2, 3)])
