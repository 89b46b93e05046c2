"""A drawn picture depends on its prompt, its seed and the settings, and on nothing else."""

import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from musubi_tuner.config.prompts import Prompt, SampleSettings, read_prompts
from musubi_tuner.encoders.autoencoder import Autoencoder
from musubi_tuner.encoders.linear_patch import LinearPatchAutoencoder, LinearPatchConfig
from musubi_tuner.errors import ConfigError
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.spec import Latents
from musubi_tuner.models.tinyflux import TinyFluxDeep, TinyFluxProcess, initialize
from musubi_tuner.models.tinyflux.process import TeacherSettings
from musubi_tuner.models.tinyflux.settings import TinyFluxObjective
from musubi_tuner.training.sampling import (
    contact_sheet,
    decode_images,
    draw,
    encode_prompts,
    save_new_png,
    save_png,
    save_samples,
)
from tiny import TINY

SPEC = MODELS["tf"]
CONFIG = replace(
    TINY, in_channels=16, joint_attention_dim=12, pooled_projection_dim=10, lune_expert_dim=6, lune_dropout=0.5
)
PROCESS = TinyFluxProcess(TinyFluxObjective(shift=3.0), TeacherSettings(True, True, "sum"))
SETTINGS = SampleSettings(width=32, height=48, steps=3, guidance=3.0, solver="euler", seed=7, negative=None)
TOLERANCE = 1e-5
"""Relative to the largest value: matrix products of other sizes differ in the last bits of float32."""


@pytest.fixture(scope="module")
def model() -> TinyFluxDeep:
    """A model in which every path acts, in training mode as while training."""
    generator = torch.Generator().manual_seed(0)
    model = TinyFluxDeep(CONFIG)
    initialize(model, "reference", generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.train()


def encode(texts: list[str]) -> dict[str, Tensor]:
    """A text encoder of sorts: numbers that depend on the text, with two rows of padding."""
    rows = []
    for text in texts:
        generator = torch.Generator().manual_seed(sum(text.encode()))
        rows.append((torch.randn(6, 12, generator=generator), torch.randn(10, generator=generator)))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]]).repeat(len(texts), 1)
    return {
        "t5_vec": torch.stack([t5 for t5, _ in rows]),
        "t5_mask": mask,
        "clip_l_pooler": torch.stack([clip for _, clip in rows]),
    }


PROMPTS = ["a red circle", "a blue square", "nothing at all"]


def drawn(
    model: TinyFluxDeep,
    prompts: list[str] | None = None,
    settings: SampleSettings = SETTINGS,
    *,
    encoder: Callable[[list[str]], dict[str, Tensor]] = encode,
    **options: Any,
) -> Tensor:
    latents = draw(
        model,
        PROCESS,
        SPEC,
        encode_prompts(encoder, prompts or PROMPTS, settings.negative),
        settings,
        **{"size": Latents(16, 8), "use_mask": False, "device": torch.device("cpu"), "compute_dtype": None, **options},
    )
    return torch.stack(latents)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() <= TOLERANCE * expected.abs().max().item()


def differ(first: Tensor, second: Tensor) -> bool:
    """Differ by more than rounding."""
    return (first - second).abs().max().item() > 1e-3 * first.abs().max().item()


# What a picture depends on


def test_latents_have_the_size_of_the_picture_divided_by_that_of_a_cell(model: TinyFluxDeep) -> None:
    latents = drawn(model)
    assert latents.shape == (3, 16, 48 // 8, 32 // 8)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_picture_does_not_depend_on_its_batch(batch_size: int, guidance: float, model: TinyFluxDeep) -> None:
    settings = replace(SETTINGS, guidance=guidance)
    assert_close(drawn(model, settings=settings, batch_size=batch_size), drawn(model, settings=settings))


def test_picture_has_the_seed_of_its_position(model: TinyFluxDeep) -> None:
    both = drawn(model, PROMPTS[:2])
    assert_close(drawn(model, PROMPTS[1:2], replace(SETTINGS, seed=SETTINGS.seed + 1)), both[1:])


def test_same_prompt_twice_gives_two_pictures(model: TinyFluxDeep) -> None:
    first, second = drawn(model, PROMPTS[:1] * 2)
    assert differ(first, second)


def test_global_generator_is_neither_used_nor_moved(model: TinyFluxDeep) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = drawn(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(drawn(model), first)


def test_prompt_acts(model: TinyFluxDeep) -> None:
    assert differ(drawn(model, ["a red circle"]), drawn(model, ["a blue square"]))


def test_drawing_is_the_solution_of_the_sampling_equation(model: TinyFluxDeep) -> None:
    latents = drawn(model, PROMPTS[:1])
    x = torch.randn((16, 6, 4), generator=torch.Generator().manual_seed(SETTINGS.seed))[None]
    text = encode(PROMPTS[:1])
    times = PROCESS.sampling_times(3, (6, 4))
    model.eval()
    with torch.no_grad():
        for now, following in itertools.pairwise(times):
            tokens, t = x.flatten(2).transpose(1, 2), torch.tensor([now])
            positive = model(tokens, text["t5_vec"], text["clip_l_pooler"], t, height=6, width=4)
            negative = model(tokens, torch.zeros(1, 6, 12), torch.zeros(1, 10), t, height=6, width=4)
            velocity = negative + SETTINGS.guidance * (positive - negative)
            x = x + (following - now) * velocity.transpose(1, 2).reshape(x.shape)
    model.train()
    assert_close(latents, x)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_solver_is_the_one_asked_for(solver: str, model: TinyFluxDeep) -> None:
    calls = count_calls(model, replace(SETTINGS, solver=solver, guidance=1.0))
    # Heun's method calls twice per interval but for the last.
    assert len(calls) == {"euler": 3, "heun": 5}[solver]


def test_autocast_computes_in_bfloat16_and_keeps_the_state_in_float32(model: TinyFluxDeep) -> None:
    exact, rough = drawn(model), drawn(model, compute_dtype=torch.bfloat16)
    assert rough.dtype == torch.float32
    # Three steps of a model with 8 bits: closer than another prompt, farther than rounding in float32.
    assert 1e-4 < (rough - exact).norm().item() / exact.norm().item() < 0.05


def test_progress_counts_the_finished_pictures(model: TinyFluxDeep) -> None:
    counts: list[int] = []
    drawn(model, batch_size=2, progress=counts.append)
    assert counts == [2, 1]


# Guidance


def count_calls(model: TinyFluxDeep, settings: SampleSettings, **options: Any) -> list[int]:
    """Batch sizes of the model's forward passes."""
    sizes: list[int] = []
    hook = model.img_in.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        drawn(model, settings=settings, **options)
    finally:
        hook.remove()
    return sizes


def test_both_branches_go_through_the_model_in_one_pass(model: TinyFluxDeep) -> None:
    assert count_calls(model, SETTINGS, batch_size=2) == [4, 4, 4, 2, 2, 2]


def test_guidance_of_one_is_a_single_branch(model: TinyFluxDeep) -> None:
    assert count_calls(model, replace(SETTINGS, guidance=1.0), batch_size=2) == [2, 2, 2, 1, 1, 1]


def test_negative_prompt_has_no_effect_without_guidance(model: TinyFluxDeep) -> None:
    settings = replace(SETTINGS, guidance=1.0)
    assert torch.equal(drawn(model, settings=replace(settings, negative="blurry")), drawn(model, settings=settings))


def test_default_negative_is_the_trained_null_condition_and_not_an_empty_text(model: TinyFluxDeep) -> None:
    def with_zero_negative(texts: list[str]) -> dict[str, Tensor]:
        encoded = encode(texts)
        row = texts.index("zeros")
        encoded["t5_vec"][row], encoded["clip_l_pooler"][row] = 0, 0
        return encoded

    null = drawn(model)
    assert_close(drawn(model, settings=replace(SETTINGS, negative="zeros"), encoder=with_zero_negative), null)
    assert differ(drawn(model, settings=replace(SETTINGS, negative="")), null)


def test_negative_prompt_acts_on_every_picture(model: TinyFluxDeep) -> None:
    plain, pushed = drawn(model), drawn(model, settings=replace(SETTINGS, negative="blurry"), batch_size=2)
    assert all(differ(first, second) for first, second in zip(plain, pushed))


def test_prompts_and_negative_are_encoded_once_each() -> None:
    asked: list[list[str]] = []

    def encoder(texts: list[str]) -> dict[str, Tensor]:
        asked.append(texts)
        return encode(texts)

    encoded = encode_prompts(encoder, ("a", "b", "a --n c"), "blurry")
    assert asked == [["a", "b", "c", "blurry"]]
    assert [prompt.text for prompt in encoded.prompts] == ["a", "b", "a"]
    assert torch.equal(encoded.of(["c", "a"], torch.device("cpu"))["t5_vec"], encode(["c", "a"])["t5_vec"])


@pytest.mark.parametrize("use_mask", [True, False])
@pytest.mark.parametrize("negative", [None, "blurry"])
def test_padding_acts_only_on_models_trained_with_it(use_mask: bool, negative: str | None, model: TinyFluxDeep) -> None:
    def with_other_padding(texts: list[str]) -> dict[str, Tensor]:
        encoded = encode(texts)
        encoded["t5_vec"][:, 4:] += 5.0
        return encoded

    settings = replace(SETTINGS, negative=negative)
    first = drawn(model, settings=settings, use_mask=use_mask)
    second = drawn(model, settings=settings, use_mask=use_mask, encoder=with_other_padding)
    assert differ(first, second) == (not use_mask)


def test_prompts_in_bfloat16_are_accepted(model: TinyFluxDeep) -> None:
    def encoder(texts: list[str]) -> dict[str, Tensor]:
        return {key: t if key == "t5_mask" else t.bfloat16() for key, t in encode(texts).items()}

    assert drawn(model, encoder=encoder).isfinite().all()


# The model afterwards


@pytest.mark.parametrize("training", [True, False])
def test_model_draws_in_eval_mode_and_has_its_mode_back(training: bool, model: TinyFluxDeep) -> None:
    modes: list[bool] = []
    hook = model.lune_predictor.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    model.train(training)
    try:
        drawn(model)
        assert set(modes) == {False}
        assert {module.training for module in model.modules()} == {training}
    finally:
        hook.remove()
        model.train()


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_comes_back_after_an_exception(training: bool, model: TinyFluxDeep) -> None:
    def fail(module: torch.nn.Module, args: Any) -> None:
        raise MemoryError("out of memory")

    hook = model.final_linear.register_forward_pre_hook(fail)
    model.train(training)
    try:
        with pytest.raises(MemoryError, match="out of memory"):
            drawn(model)
        assert {module.training for module in model.modules()} == {training}
    finally:
        hook.remove()
        model.train()
    assert torch.is_grad_enabled()


# Pictures and files


def test_decoded_pictures_are_bytes_in_rows_and_columns() -> None:
    vae = LinearPatchAutoencoder(LinearPatchConfig(patch_size=2, encoder_window=2, decoder_window=1))
    with torch.no_grad():
        vae.decoder.weight.zero_()
        assert vae.decoder.bias is not None
        # The output is channel by channel, four pixels each: red, green, blue.
        vae.decoder.bias.copy_(torch.tensor([1.0] * 4 + [0.0] * 4 + [-3.0] * 4))
    autoencoder = Autoencoder(vae, vae.config.to_dict())
    first, second = decode_images(autoencoder, torch.zeros(2, 16, 3, 5), False)
    assert first.shape == second.shape == (6, 10, 3)
    assert first.dtype == np.uint8
    assert first[0, 0].tolist() == first[5, 9].tolist() == [255, 128, 0]


@pytest.mark.parametrize("fails", [False, True])
def test_autoencoder_is_on_the_device_while_it_decodes(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LinearPatchConfig()
    vae = Autoencoder(LinearPatchAutoencoder(config), config.to_dict())
    done: list[str] = []

    def decode(*_: Any) -> Tensor:
        done.append("decode")
        if fails:
            raise RuntimeError("out of memory")
        return torch.zeros(1, 3, 16, 16)

    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: done.append(str(device)))
    monkeypatch.setattr(vae, "decode", decode)
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        decode_images(vae, torch.zeros(1, 16, 2, 2), False, torch.device("meta"))
    assert done == ["meta", "decode", "cpu"]


def solid(value: int, height: int = 3, width: int = 4) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def test_sheet_has_two_columns_and_white_between_pictures() -> None:
    sheet = contact_sheet([solid(10 * (index + 1)) for index in range(5)])
    # Three rows of 3 pixels and two columns of 4, with 2 pixels before, between and after.
    assert sheet.shape == (3 * 3 + 4 * 2, 2 * 4 + 3 * 2, 3)
    expected = np.full_like(sheet, 255)
    for index, (top, left) in enumerate([(2, 2), (2, 8), (7, 2), (7, 8), (12, 2)]):
        expected[top : top + 3, left : left + 4] = 10 * (index + 1)
    assert (sheet == expected).all()


def test_sheet_of_one_picture_has_one_column() -> None:
    assert contact_sheet([solid(7)]).shape == (3 + 4, 4 + 4, 3)


def test_sheet_takes_other_columns_and_padding() -> None:
    sheet = contact_sheet([solid(index) for index in range(3)], columns=3, padding=0)
    assert sheet.shape == (3, 12, 3)
    assert sheet[0, :, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_png_holds_pixels_and_settings(tmp_path: Path) -> None:
    picture = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    settings = {"prompt": 'Bär, 熊 and "quotes"', "seed": 3, "guidance": 2.5, "negative": None}
    save_png(tmp_path / "a.png", picture, settings)
    with Image.open(tmp_path / "a.png") as image:
        assert isinstance(image.text["parameters"], str)
        assert json.loads(image.text["parameters"]) == settings
        assert (np.asarray(image) == picture).all()


def test_a_picture_takes_the_next_free_number_and_replaces_none(tmp_path: Path) -> None:
    def numbered(number: int) -> Path:
        return tmp_path / f"{number}.png"

    white, black = (np.full((2, 2, 3), value, dtype=np.uint8) for value in (255, 0))
    assert save_new_png(numbered, 0, white) == (numbered(0), 0)
    numbered(1).write_bytes(b"mine")
    assert save_new_png(numbered, 0, black) == (numbered(2), 2)
    assert numbered(1).read_bytes() == b"mine"
    assert [np.asarray(Image.open(numbered(number))).max() for number in (0, 2)] == [255, 0]


def test_a_picture_that_cannot_be_written_leaves_its_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space"):
        save_new_png(lambda number: tmp_path / f"{number}.png", 0, np.zeros((2, 2, 3), dtype=np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_png_without_settings_has_no_text(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", solid(1))
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {}


def save_two(folder: Path, step: int = 40) -> np.ndarray:
    return save_samples(folder, "cat", step, [Prompt(text) for text in PROMPTS[:2]], [solid(1), solid(2)], SETTINGS, 16)


def test_samples_are_named_by_run_step_and_index(tmp_path: Path) -> None:
    save_two(tmp_path / "sample")
    assert {path.name for path in (tmp_path / "sample").iterdir()} == {
        "cat_00000040_00.png",
        "cat_00000040_01.png",
        "samples_step_40.png",
        "prompts_step_40.txt",
    }


def test_sample_says_how_it_was_drawn(tmp_path: Path) -> None:
    save_two(tmp_path)
    with Image.open(tmp_path / "cat_00000040_01.png") as image:
        text = json.loads(image.text["parameters"])
    assert text == {**vars(SETTINGS), "prompt": PROMPTS[1], "seed": SETTINGS.seed + 1, "step": 40}


def test_sheet_and_prompts_lie_beside_the_samples(tmp_path: Path) -> None:
    sheet = save_two(tmp_path)
    with Image.open(tmp_path / "samples_step_40.png") as image:
        assert (np.asarray(image) == sheet).all()
    assert (sheet == contact_sheet([solid(1), solid(2)])).all()
    assert (tmp_path / "prompts_step_40.txt").read_text(encoding="utf-8") == "0: a red circle\n1: a blue square\n"


def test_samples_written_again_replace_the_old_ones(tmp_path: Path) -> None:
    save_two(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_two(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Prompt files


def prompt_file(folder: Path, content: str | bytes) -> Path:
    path = folder / "prompts.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts_of(path: Path) -> list[str]:
    return [prompt.text for prompt in read_prompts(path)]


def message_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    return str(caught.value)


def test_prompts_are_lines_without_blank_ones_and_comments(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, "# prompts\n a cat \n\n   \n  # --w 5\r\na dog, no. #2\r\nein Bär")
    assert texts_of(path) == ["a cat", "a dog, no. #2", "ein Bär"]


def test_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    assert texts_of(prompt_file(tmp_path, b"\xef\xbb\xbfa cat\n")) == ["a cat"]


@pytest.mark.parametrize(
    "prompt",
    ["a cat -- black and white", "well-known --- really", "10 --5 degrees", "x--y", "a 1 - 2 score", "cat -up 3"],
)
def test_dashes_that_begin_no_option_belong_to_the_prompt(prompt: str, tmp_path: Path) -> None:
    assert texts_of(prompt_file(tmp_path, prompt)) == [prompt]


@pytest.mark.parametrize("content", ["", "\n  \n", "# only a comment\n"])
def test_file_without_a_prompt_is_refused(content: str, tmp_path: Path) -> None:
    path = prompt_file(tmp_path, content)
    assert message_of(path) == f"{path}: has no prompt; write one per line"


def test_missing_prompt_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    assert message_of(path).startswith(f"{path}: cannot be read as a prompt file (")
    assert "No such file" in message_of(path)


def test_prompt_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, b"a cat\n\xff\xfe\x00")
    assert message_of(path).startswith(f"{path}: is not UTF-8 text: line 2 holds the byte FF")


def test_options_of_a_line(tmp_path: Path) -> None:
    line = (
        "I am a cat, of mice --W 768 --h 512 --d 7 --s 12 --g 2.5 --l 3 --fs 0 --n blurry, -- dark --m 0.5 --name one"
    )
    (prompt,) = read_prompts(prompt_file(tmp_path, line))
    assert prompt == Prompt("I am a cat, of mice", "blurry, -- dark", 768, 512, 7, 12, 2.5, 3.0, 0.0, "one", 0.5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --x 5", "--x is not an option; known: --w, --h"),
        ("a cat --d -3", "--d -3: expected 0 to"),
        ("a cat --w wide", "--w wide: expected a whole number"),
        ("a cat --g", "--g (nothing): expected a number"),
        ("a cat --w 512 --w 256", "--w is given twice"),
        ("a cat --ci a.png", "--ci is for control images"),
        ("--w 512", "has options but no prompt"),
        ("a cat --s 1001", "--s 1001: expected 1 to 1000"),
        ("a cat \u2014w 512", "'\u2014w' would be part of the prompt; write options with two hyphens: --w"),
        ("a cat -w 512", "'-w' would be part of the prompt"),
    ],
)
def test_bad_options_are_refused_with_the_line(line: str, message: str, tmp_path: Path) -> None:
    path = prompt_file(tmp_path, f"# comment\n\na dog\n{line}\n")
    assert message_of(path).startswith(f"{path} line 4: {message}")


def test_values_behind_an_equals_sign(tmp_path: Path) -> None:
    assert read_prompts(prompt_file(tmp_path, "a cat --w=64 --d=3")) == [Prompt("a cat", width=64, seed=3)]


def test_prompts_of_toml_and_json(tmp_path: Path) -> None:
    toml, listing = tmp_path / "p.toml", tmp_path / "p.json"
    toml.write_text(
        '[prompt]\nwidth = 512\nnegative_prompt = "dark"\n[[prompt.subset]]\nprompt = "a cat"\n'
        '[[prompt.subset]]\nprompt = "a dog"\nwidth = 256\n'
    )
    listing.write_text('["a cat --w 512 --n dark", {"prompt": "a dog", "width": 256, "negative_prompt": "dark"}]')
    expected = [Prompt("a cat", "dark", 512), Prompt("a dog", "dark", 256)]
    assert read_prompts(toml) == read_prompts(listing) == expected
    listing.write_text('[{"prompt": "a dog", "widht": 256}]')
    assert message_of(listing).startswith(f"{listing} entry 1: unknown key widht")
    listing.write_text('[{"prompt": "a dog", "width": "256"}]')
    assert message_of(listing) == f"{listing} entry 1: width is '256', expected a number"
    assert (
        message_of(tmp_path / "p.yaml") == f"{tmp_path / 'p.yaml'}: is not a prompt file; expected .txt, .toml or .json"
    )


def test_pictures_of_different_options_come_back_in_order(model: TinyFluxDeep) -> None:
    lines = ["a red circle --w 48", "a blue square", "a red circle --w 48 --d 7", "a red circle --h 37"]
    latents = draw(
        model, PROCESS, SPEC, encode_prompts(encode, lines, None), SETTINGS,
        size=Latents(16, 8), use_mask=False, device=torch.device("cpu"), compute_dtype=None,
    )  # fmt: skip
    assert [tuple(latent.shape) for latent in latents] == [(16, 6, 6), (16, 6, 4), (16, 6, 6), (16, 4, 4)]
    assert torch.equal(latents[0], latents[2])  # the first picture's seed is 7 too


def test_strength_without_adapters_is_refused(model: TinyFluxDeep) -> None:
    with pytest.raises(ConfigError, match=r"--m 0.5: there is no adapter"):
        drawn(model, ["a cat --m 0.5"])
