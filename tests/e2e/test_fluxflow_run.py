"""FluxFlow from pictures to pictures: an autoencoder, then against a discriminator, then a flow on its latents."""

import json
import re
import tarfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from PIL import Image
from project import ForkServer, differing, final_files, metrics, words
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from musubi_tuner import fluxflow_generate, fluxflow_graphs, fluxflow_output, import_checkpoint

GEOMETRY = {
    "vae_dim": 8, "downscales": 2, "attn_layers": 1, "attn_heads": 4, "down_kernel": 4, "up_kernel": 4, "mix_kernel": 3,
    "head_widths": [16, 8], "feature_maps_dim": 16, "flow_layers": 1, "flow_heads": 2, "text_embedding_dim": 12,
    "feature_maps_dim_disc": 4, "disc_depth": 2, "text_width": 16, "text_layers": 1, "text_heads": 2, "text_ff": 16,
    "text_vocab": 256, "text_positions": 16,
}  # fmt: skip
STEPS: list[dict[str, Any]] = [
    {"name": "vae", "objective": {"train_vae": True}},
    {
        "name": "gan",
        "start": "previous",
        "objective": {"train_vae": True, "gan_training": True, "train_spade": True, "gan_balance": "gradient"},
    },
    {"name": "flow", "start": "previous_ema", "objective": {"train_diff": True}, "sample": {"prompts": ["a cat"]}},
]
FOLDERS = ["01-vae", "02-gan", "03-flow"]


def tokenizer_of(folder: Path, known: Iterable[str]) -> Path:
    """A tokenizer of whole words with the marks of BERT; returns its folder."""
    ids = {word: number for number, word in enumerate(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *known]))}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_of(tmp_path_factory.mktemp("words") / "tokenizer", words())


def write(root: Path, photographs: Path, tokenizer: Path, steps: list[dict[str, Any]] = STEPS, **changes: Any) -> Path:
    """A run file in a new folder."""
    tables: dict[str, Any] = {
        "schema_version": 1,
        "run": {"name": "photos", "output_dir": str(root / "out"), "seed": 7, "threads": 1, "device": "cpu"},
        "model": {
            "arch": "ff", "init": "scratch", "geometry": GEOMETRY, "bert_tokenizer": str(tokenizer), "text_max_tokens": 12,
        },
        "general": {"resolution": 64, "batch_size": 2},
        "datasets": [{"image_directory": str(photographs), "cache_directory": str(root / "cache")}],
        "train": {"max_steps": 3, "mixed_precision": "no", "grad_accum_steps": 2},
        "optimizer": {"lr": 1e-3},
        "scheduler": {"type": "constant", "warmup_steps": 0},
        "sample": {"width": 64, "height": 64, "steps": 2, "every_steps": 3},
        "ema": {"decay": 0.5},
        "save": {"every_steps": 2, "every_epochs": 0, "release": False},
        "log": {"every_steps": 1, "tensorboard": False},
        "steps": steps,
    }  # fmt: skip
    for table, values in changes.items():
        tables[table] = {**tables.get(table, {}), **values} if isinstance(values, dict) else values
    root.mkdir(parents=True)
    path = root / "run.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, server: ForkServer, photographs: Path, tokenizer: Path
) -> tuple[Path, str]:
    """Three steps, and what they printed."""
    config = write(tmp_path_factory.mktemp("fluxflow") / "whole", photographs, tokenizer)
    return config, server.run("train", [config], config.parent).expect(0).out


def ends(config: Path, folders: Sequence[str]) -> dict[str, Any]:
    return {
        f"{folder}/{name}": content
        for folder in folders
        for name, content in final_files(config.parent / "out" / folder).items()
    }


def test_three_steps_train_what_they_say_and_nothing_else(whole: tuple[Path, str]) -> None:
    config, said = whole
    out = config.parent / "out"
    vae, gan, flow = (load_file(out / folder / "photos.safetensors") for folder in FOLDERS)
    averaged = load_file(out / "02-gan" / "photos_ema.safetensors")
    assert {key.split(".")[0] for key in vae} == {"vae"}
    assert {key.split(".")[0] for key in gan} == {"vae", "discriminator"}
    assert {key.split(".")[0] for key in flow} == {"vae", "discriminator", "flow", "text_encoder"}
    moved = [key for key, tensor in gan.items() if key in vae and not tensor.equal(vae[key])]
    assert len(moved) > 0.9 * len([key for key in vae if "context_mixer" not in key])
    assert all(flow[key].equal(tensor) for key, tensor in averaged.items())
    rows = [metrics(out / folder) for folder in FOLDERS]
    assert {"loss/recon", "loss/kl", "loss/color", "loss/hist", "loss/contrast"} <= set(rows[0][0])
    assert {"loss/gen", "loss/disc", "loss/r1"} <= set(rows[1][0]) and "loss/r1" not in rows[1][1]
    assert set(rows[2][0]) >= {"loss/main", "train/lr"}
    line = r"\[\d\d:\d\d:\d\d\] Step vae \(1/3\) \| Epoch 1/1 \| Batch 1/3 \| VAE: [\d.]+ \| KL: [\d.]+ \| Bezier: 0.0000 \| ColorStats: "
    assert re.search(line, said) and re.search(r"Step flow \(3/3\).* \| Flow: [\d.]+ \| [\d.]+s/batch", said)
    assert "calibrated" in said and "mu varies by" in said
    assert "warning: Auto-created D_img with feature_maps_dim_disc=4" in said
    assert "warning: Auto-created flow_processor with feature_maps_dim=16" in said
    assert [line for line in said.splitlines() if line.startswith("Freezing ")] == [
        "Freezing compressor", "Freezing expander", "Freezing text_encoder", "Freezing D_img",
    ]  # fmt: skip
    assert all((out / folder / "sample" / "samples_step_3.png").is_file() for folder in FOLDERS)
    assert "step 3: drew 4 samples" in said
    options = json.loads((out / "03-flow" / "options.json").read_text(encoding="utf-8"))
    assert options["spade"] is True and len(options["latent_mean"]) == 8


@pytest.mark.parametrize(("step", "where"), [("gan", "train.phase:3"), ("flow", "state.renamed:1")])
def test_a_killed_pipeline_ends_in_the_same_bits(
    step: str,
    where: str,
    whole: tuple[Path, str],
    server: ForkServer,
    photographs: Path,
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    config = write(tmp_path / "killed", photographs, tokenizer)
    before = [each["name"] for each in STEPS].index(step)
    for earlier in STEPS[:before]:
        server.run("train", [config, "--step", earlier["name"]], tmp_path).expect(0)
    server.run("train", [config, "--step", step], tmp_path, MUSUBI_FAULT=where).expect(-9)
    server.run("train", [config, "--step", step], tmp_path).expect(0)
    folders = FOLDERS[: before + 1]
    assert differing(ends(config, folders), ends(whole[0], folders)) == []


def test_latents_are_made_anew_for_another_autoencoder_only(
    whole: tuple[Path, str], server: ForkServer, photographs: Path, tokenizer: Path, tmp_path: Path
) -> None:
    first = whole[0].parent / "out"

    def plan(path: Path, **model: Any) -> str:
        data = {"cache_directory": str(whole[0].parent / "cache"), "image_directory": str(photographs)}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        own = {"init": "checkpoint", "path": str(path), "geometry": {}, **model}
        config = write(folder, photographs, tokenizer, [], model=own, objective={"train_diff": True})
        tables = config.read_text(encoding="utf-8").replace(str(folder / "cache"), data["cache_directory"])
        config.write_text(tables, encoding="utf-8")
        return server.run("train", [config, "--plan"], tmp_path).expect(0).out

    # The flow was trained on, the autoencoder and the language model are the same.
    same = plan(first / "03-flow")
    assert "latents  9 up to date" in same and "text     9 up to date" in same
    other = plan(first / "01-vae")
    assert "latents  0 up to date, 9 to make (9 x the autoencoder was" in other


def test_the_flags_of_the_published_program_draw(
    whole: tuple[Path, str], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "cat.txt").write_text("a cat", encoding="utf-8")
    words = ["--model_checkpoint", str(whole[0].parent / "out" / "03-flow"), "--text_prompts_path", str(prompts), "--output_path",
             str(tmp_path / "drawn"), "--img_size", "64", "--ddim_steps", "2", "--tokenizer_name", str(tokenizer)]  # fmt: skip
    assert fluxflow_generate.main(words) == 0
    with Image.open(tmp_path / "drawn" / "cat_gen.webp") as picture:
        assert picture.size == (64, 64)
    plain = (tmp_path / "drawn" / "cat_gen.webp").read_bytes()
    assert fluxflow_generate.main(words) == 2
    assert (
        fluxflow_generate.main([*words, "--overwrite", "--use_cfg", "--guidance_scale", "5", "--solver", "ddim"]) == 0
    )
    assert (tmp_path / "drawn" / "cat_gen.webp").read_bytes() != plain
    assert fluxflow_generate.main([*words, "--overwrite", "--vae_dim", "32"]) == 2
    assert "--vae_dim is 32, but the checkpoint has 8" in capsys.readouterr().err


def test_text_encoder_and_all_parts_together(
    whole: tuple[Path, str], server: ForkServer, photographs: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """Each step moves its own roles; what takes no part is carried along to the bit."""
    full = {"train_diff_full": True, "min_snr_gamma": 5.0}
    steps: list[dict[str, Any]] = [
        {"name": "head", "objective": full, "sample": {"prompts": ["a cat"]}},
        {"name": "language", "start": "previous", "objective": {**full, "train_language": True}},
        {
            "name": "joint",
            "save": {"dtype": "bfloat16"},  # of what trains; the text encoder keeps its bits
            "start": "previous",
            "objective": {"train_vae": True, "train_diff": True, "text_dropout": 0.5},
        },
    ]
    start = str(whole[0].parent / "out" / "03-flow")
    model = {"init": "checkpoint", "path": start, "geometry": {}}
    config = write(tmp_path / "more", photographs, tokenizer, steps, model=model)
    said = server.run("train", [config], tmp_path).expect(0).out
    assert "text     0 up to date, 9 to make" in said
    ends = [Path(start), *(tmp_path / "more" / "out" / name for name in ("01-head", "02-language", "03-joint"))]
    files = [load_file(folder / "photos.safetensors") for folder in ends]
    expected = [
        {"flow", "text_encoder.ouput_layer"},
        {"flow", "text_encoder.ouput_layer", "text_encoder.language_model"},
        {"flow", "vae.compressor", "vae.expander"},
    ]
    for before, after, trained in zip(files, files[1:], expected, strict=False):
        assert before.keys() == after.keys()
        moved = {key for key, tensor in after.items() if not tensor.equal(before[key])}
        parts = {key.split(".")[0] if key.startswith("flow") else ".".join(key.split(".")[:2]) for key in moved}
        assert parts == trained
    assert (ends[1] / "sample" / "samples_step_3.png").is_file()
    assert {"loss/flow", "loss/recon", "train/lr_flow"} <= set(metrics(ends[3])[0])


def test_the_output_of_the_published_trainer_is_laid_out_and_drawn(whole: tuple[Path, str], tmp_path: Path) -> None:
    run, tree = whole[0].parent / "out", tmp_path / "tree"
    before = sorted(path for path in run.rglob("*"))
    assert fluxflow_graphs.main([str(run), "-o", str(tree), "--training_states"]) == 0
    assert sorted(path for path in run.rglob("*")) == before
    steps = [each["name"] for each in STEPS]
    weights = {f"flxflow_step_{name}_final.safetensors" for name in steps} | {
        "flxflow_final.safetensors",
        "text_encoder.safetensors",
    }
    assert weights | {"D_img.safetensors", "training_state.json", "lr_sav.json", "training_states.pt"} <= {
        path.name for path in tree.iterdir()
    }
    drawn = {f"{name}_{step}.png" for step in steps for name in fluxflow_graphs.DIAGRAMS} - {"kl_loss_flow.png"}
    texts = {
        f"{name}_{step}{end}"
        for step in steps
        for name, end in (("training_metrics", ".jsonl"), ("session", ".json"), ("training_summary", ".txt"))
    }
    assert {path.name for path in (tree / "graph").iterdir()} == drawn | texts
    final, own = load_file(tree / "flxflow_final.safetensors"), load_file(run / "03-flow" / "photos_ema.safetensors")
    for key, tensor in final.items():
        ours = key.replace("diffuser.flow_processor.", "flow.").replace("diffuser.", "vae.")
        assert torch.equal(tensor, own[ours]), key
    rows = [json.loads(line) for line in (tree / "graph" / "training_metrics_gan.jsonl").read_text().splitlines()]
    assert [row["global_step"] for row in rows] == [4, 5, 6] and set(fluxflow_output.TAGS) <= set(rows[0]["metrics"])
    logged = metrics(run / "02-gan")[0]
    assert rows[0]["metrics"]["generator_loss"] == logged["loss/gen"] and rows[0]["metrics"]["lpips_loss"] is None
    assert rows[0]["learning_rates"] == {"vae_lr": 1e-3, "discriminator_lr": 1e-3} and rows[0]["epoch"] == 1
    kept = json.loads((tree / "training_state.json").read_text())
    assert (
        kept["pipeline"]["steps_completed"] == ["vae", "gan"]
        and kept["global_step"] == 9
        and kept["mode"] == "pipeline"
    )
    assert (tree / "samples" / "sample_vae_epoch_1_batch_3.png").is_file()
    picture = Image.open(tree / "graph" / "training_overview_gan.png")
    assert picture.width > 1500 and len(picture.convert("L").getcolors(256) or []) > 20
    assert fluxflow_graphs.main([str(tree), "-o", str(tmp_path / "again")]) == 0  # a folder of the published trainer
    drawn_again = tmp_path / "again" / "graph" / "training_losses_vae.png"
    drawn_again.unlink()
    assert fluxflow_graphs.main([str(tree), "-o", str(tmp_path / "again")]) == 0  # and once more over what is there
    assert drawn_again.is_file()


def test_states_of_the_published_trainer_are_written_and_read(
    whole: tuple[Path, str], server: ForkServer, photographs: Path, tokenizer: Path, tmp_path: Path
) -> None:
    source = whole[0].parent / "out" / "01-vae"
    assert fluxflow_graphs.main([str(source), "-o", str(tmp_path / "tree"), "--training_states"]) == 0
    held = torch.load(tmp_path / "tree" / "training_states.pt", weights_only=True)
    assert set(held) == {"optimizers", "schedulers", "ema"} and held["schedulers"]["vae"]["last_epoch"] == 3
    own = held["optimizers"]["vae"]
    moments = [
        own["state"].get(number, {}).get("exp_avg", torch.zeros(1)) for number in own["param_groups"][0]["params"]
    ]
    weights = [torch.nn.Parameter(torch.zeros_like(moment)) for moment in moments]
    again = torch.optim.AdamW(weights)
    again.load_state_dict(own)
    number = next(iter(own["state"]))
    weights[number].grad = torch.ones_like(weights[number])
    again.step()  # with betas and so on of the state
    config = write(tmp_path / "run", photographs, tokenizer, [{**STEPS[0]}], model={"init": "checkpoint", "path": str(tmp_path / "tree")},
                   train={"max_steps": 5, "mixed_precision": "no"})  # fmt: skip
    tables = tomllib.loads(config.read_text(encoding="utf-8"))
    tables["objective"] = tables.pop("steps")[0]["objective"]
    tables["model"] = {
        key: tables["model"][key] for key in ("arch", "init", "path", "bert_tokenizer", "text_max_tokens")
    }
    tables["sample"] = {"every_steps": 3}
    config.write_text(tomli_w.dumps(tables), encoding="utf-8")
    assert import_checkpoint.main([str(tmp_path / "tree"), str(config)]) == 0
    for part in ("ema", "optimizer"):
        ours, theirs = (load_file(folder / f"{part}.safetensors") for folder in
                        (tmp_path / "run" / "out" / "photos-step00000003-state", source / "photos-state"))  # fmt: skip
        assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()), (
            part
        )
    assert (
        "continuing from photos-step00000003-state: step 3 of 5"
        in server.run("train", [config], tmp_path).expect(0).out
    )
    (tmp_path / "tree" / "training_state.json").write_text("{}")
    assert (
        import_checkpoint.main([str(tmp_path / "tree"), str(config), "--run.output_dir", str(tmp_path / "other")]) == 2
    )


def test_an_autoencoder_trains_from_shards_and_goes_on_behind_what_was_read(
    server: ForkServer, photographs: Path, tokenizer: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, picture in enumerate(sorted(photographs.glob("*.png"))[:4]):
        with tarfile.open(shards / f"{number}.tar", "w") as archive:
            archive.add(picture, f"{picture.stem}.png")
    config = write(
        tmp_path / "run", photographs, tokenizer, STEPS[:1], datasets=[{"shards": str(shards / "{0..3}.tar"), "epoch_samples": 6}],
        distributed={"num_processes": 2}, train={"max_steps": 3, "mixed_precision": "no", "grad_accum_steps": 1}, save={"every_steps": 1},
    )  # fmt: skip
    out = tmp_path / "run" / "out" / "01-vae"
    assert server.run("train", [config, "--step", "vae"], tmp_path, MUSUBI_FAULT="state.renamed:2").code == 137
    states = sorted(out.glob("*-state/state.json"))
    kept = json.loads(states[-1].read_text(encoding="utf-8"))
    assert kept["resume_exact"] is False and set(kept["places"]) == {"0/2", "1/2"}
    said = server.run("train", [config, "--step", "vae"], tmp_path).expect(0).out
    assert "a stream of 4 shards" in said and "a stream, 6 images per epoch" in said
    assert "not bit for bit" in said and "resume_exact = false" in said
    assert [row["step"] for row in metrics(out)] == [1, 2, 3]


def test_two_processes_train_what_one_trains(
    whole: tuple[Path, str], server: ForkServer, photographs: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """The flow alone is the task of every denoiser, which tests/e2e/test_processes.py has."""
    alone = {"train": {"grad_accum_steps": 1}, "distributed": {"num_processes": 2}}
    config = write(tmp_path / "two", photographs, tokenizer, STEPS[:2], **alone)
    server.run("train", [config], tmp_path).expect(0)
    for folder in FOLDERS[:2]:
        ours, theirs = (load_file(path.parent / "out" / folder / "photos.safetensors") for path in (config, whole[0]))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (ours[key] - tensor).abs().max() <= 2e-4 * max(1.0, float(tensor.abs().max())), (folder, key)
