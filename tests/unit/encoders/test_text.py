"""Text encoders: every accepted file gives the states of transformers, and every other file says what is wrong."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner.encoders.text import TextEncoder, find_tokenizer, load_clip, load_t5, load_tokenizer
from musubi_tuner.errors import CheckpointError
from musubi_tuner.models.tinyflux import TinyFluxDeep, encode_clip, encode_t5, initialize
from tiny import TINY

CLIP_FORMS = ("folder", "sharded", "prefixed", "unprefixed", "all in one", "header")
T5_FORMS = ("folder", "sharded", "embed_tokens only", "shared only", "both", "with decoder", "all in one", "header")
TOLERANCE = 1e-4
"""Other attention kernels sum in another order; states are of size one to ten."""
NO_HUB = "no/where"

pytestmark = pytest.mark.usefixtures("offline")


def open_clip(path: Path, tokenizer: Path | None = None, **options: Any) -> TextEncoder:
    return load_clip(path, tokenizer, NO_HUB, **({"dtype": torch.float32, "device": "cpu"} | options))


def open_t5(path: Path, tokenizer: Path | None = None, **options: Any) -> TextEncoder:
    settings = {"max_tokens": 16, "dtype": torch.float32, "device": "cpu"} | options
    return load_t5(path, tokenizer, NO_HUB, **settings)


def test_the_page_of_tinyflux_shows_how_to_call_the_model(
    tmp_path: Path, clip_files: dict[str, Path], t5_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    page = (Path(__file__).parents[3] / "docs" / "tinyflux.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name, files in (("clip", clip_files), ("t5", t5_files)):
        shutil.copytree(files["folder"], tmp_path / name)
    widths = {
        "joint_attention_dim": open_t5(tmp_path / "t5").width,
        "pooled_projection_dim": open_clip(tmp_path / "clip").width,
    }
    model = TinyFluxDeep(replace(TINY, **widths))
    initialize(model, "reference", torch.Generator().manual_seed(0))
    (tmp_path / "checkpoint").mkdir()
    for name in ("model", "ema"):
        save_file(dict(model.state_dict()), tmp_path / "checkpoint" / f"{name}.safetensors")
    (tmp_path / "checkpoint" / "config.json").write_text(model.config.to_json())
    exec(compile(snippet, "docs/tinyflux.md", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([2, 3840, 4]) torch.Size([2, 40]) torch.Size([2, 3])\n"


def test_helpers_give_what_the_model_takes(
    clip_files: dict[str, Path], t5_files: dict[str, Path], texts: list[str]
) -> None:
    clip, t5 = open_clip(clip_files["folder"]), open_t5(t5_files["folder"])
    assert torch.equal(encode_t5(t5, texts), t5.encode(texts).states)
    pooled = clip.encode(texts).pooled
    assert pooled is not None and torch.equal(encode_clip(clip, texts), pooled)
    with pytest.raises(ValueError, match="encode_clip needs CLIP"):
        encode_clip(t5, texts)


def failure(load: Callable[..., TextEncoder], *arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(*arguments)
    return str(caught.value)


class TestClip:
    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls, clip: Any, clip_tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
        tokens = clip_tokenizer(texts, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
        with torch.no_grad():
            out = clip(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return {"states": out.last_hidden_state, "pooled": out.pooler_output, "mask": tokens["attention_mask"]}

    @pytest.mark.parametrize("form", ["folder", "prefixed", "header"])
    def test_an_activation_that_the_config_contradicts(self, clip_files: dict[str, Path], form: str) -> None:
        with pytest.raises(
            CheckpointError, match=r'its config says hidden_act = "quick_gelu", and model\.clip_act "gelu"'
        ):
            open_clip(clip_files[form], activation="gelu")
        open_clip(clip_files[form], activation="quick_gelu")

    @pytest.mark.parametrize("form", CLIP_FORMS)
    def test_every_form_gives_the_states_of_transformers(
        self, clip_files: dict[str, Path], expected: dict[str, Tensor], texts: list[str], form: str
    ) -> None:
        encoder = open_clip(clip_files[form])
        found = encoder.encode(texts)
        assert (encoder.width, encoder.max_tokens) == (32, 20)
        assert found.states.shape == (5, 20, 32)
        assert torch.equal(found.mask, expected["mask"])
        assert (found.states - expected["states"]).abs().max().item() <= TOLERANCE
        assert (found.pooled - expected["pooled"]).abs().max().item() <= TOLERANCE

    def test_texts_are_told_apart(self, clip_files: dict[str, Path], texts: list[str]) -> None:
        pooled = open_clip(clip_files["folder"]).encode(texts).pooled
        assert torch.pdist(pooled).min().item() > 0.01

    def test_longer_texts_are_cut(self, clip_files: dict[str, Path]) -> None:
        encoder = open_clip(clip_files["folder"])
        fits, too_long = "red " * 18, "red " * 19
        found = encoder.encode([fits, too_long, "red"])
        assert found.mask.sum(dim=1).tolist() == [20, 20, 3]

    def test_a_text_is_encoded_alike_in_any_company(self, clip_files: dict[str, Path], texts: list[str]) -> None:
        encoder = open_clip(clip_files["folder"])
        together = encoder.encode(texts)
        for row, text in enumerate(texts):
            alone = encoder.encode([text])
            assert (alone.states[0] - together.states[row]).abs().max().item() <= 1e-5

    def test_it_is_pooled_at_the_first_end_of_text_whatever_the_config_calls_it(
        self, tmp_path: Path, clip_files: dict[str, Path], expected: dict[str, Tensor], texts: list[str]
    ) -> None:
        """Published configs name id 2 as the end of text, and their tokenizer pads with the real one."""
        folder = Path(shutil.copytree(clip_files["folder"], tmp_path / "clip"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 2, "pad_token_id": 1}))
        encoder = open_clip(folder)
        assert encoder.tokenizer.pad_token_id == encoder.tokenizer.eos_token_id != 2
        found = encoder.encode(texts)
        assert found.pooled is not None
        ends = found.mask.sum(dim=1) - 1
        assert torch.equal(found.pooled, found.states[torch.arange(len(texts)), ends])
        assert (found.pooled - expected["pooled"]).abs().max().item() <= TOLERANCE

    def test_the_text_half_of_a_whole_clip_is_used(
        self, tmp_path: Path, clip: Any, clip_files: dict[str, Path], expected: dict[str, Tensor], texts: list[str]
    ) -> None:
        """The published repository holds both halves, and a config with text_config and vision_config."""
        from transformers import CLIPConfig, CLIPModel

        text_config = json.loads((clip_files["folder"] / "config.json").read_text())
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 8, "patch_size": 4}  # fmt: skip
        whole = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision, projection_dim=32))
        tensors = {k: v for k, v in whole.state_dict().items() if not k.startswith("text_model.")}
        text = load_file(clip_files["prefixed"])
        assert set(tensors) & set(text) == {"text_projection.weight"}
        folder = tmp_path / "clip"
        folder.mkdir()
        save_file(tensors | text, folder / "model.safetensors")
        whole.config.save_pretrained(folder)
        encoder = open_clip(folder, clip_files["folder"])
        found = encoder.encode(texts)
        assert (found.pooled - expected["pooled"]).abs().max().item() <= TOLERANCE

    def test_keys_of_the_published_config_are_accepted(
        self, tmp_path: Path, clip_files: dict[str, Path], expected: dict[str, Tensor], texts: list[str]
    ) -> None:
        """Configs on the hub were written by much older libraries, with generation settings in them."""
        folder = Path(shutil.copytree(clip_files["folder"], tmp_path / "clip"))
        config = json.loads((folder / "config.json").read_text())
        old = {
            "_name_or_path": "", "add_cross_attention": False, "bad_words_ids": None, "chunk_size_feed_forward": 0,
            "diversity_penalty": 0.0, "do_sample": False, "dropout": 0.0, "early_stopping": False,
            "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
            "length_penalty": 1.0, "max_length": 20, "model_type": "clip_text_model", "num_beams": 1,
            "output_attentions": False, "output_hidden_states": False, "problem_type": None, "pruned_heads": {},
            "repetition_penalty": 1.0, "return_dict": True, "temperature": 1.0, "tie_encoder_decoder": False,
            "tie_word_embeddings": True, "top_k": 50, "top_p": 1.0, "torch_dtype": "float32", "torchscript": False,
            "transformers_version": "4.16.0.dev0", "use_bfloat16": False,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(old | config))
        found = open_clip(folder).encode(texts)
        assert (found.pooled - expected["pooled"]).abs().max().item() <= TOLERANCE

    def test_weights_are_frozen_copies_in_the_asked_precision(
        self, tmp_path: Path, clip_files: dict[str, Path]
    ) -> None:
        folder = Path(shutil.copytree(clip_files["folder"], tmp_path / "clip"))
        encoder = open_clip(folder, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in encoder.module.parameters()} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
        assert not encoder.module.training
        before = encoder.encode(["a red circle"])
        assert before.states.dtype == torch.float32
        with (folder / "model.safetensors").open("r+b") as file:
            file.write(b"\0" * (folder / "model.safetensors").stat().st_size)
        assert torch.equal(encoder.encode(["a red circle"]).states, before.states)


class TestT5:
    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls, t5: Any, t5_tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
        tokens = t5_tokenizer(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            out = t5(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return {"states": out.last_hidden_state, "mask": tokens["attention_mask"]}

    @pytest.mark.parametrize("form", T5_FORMS)
    def test_every_form_gives_the_states_of_transformers(
        self, t5_files: dict[str, Path], expected: dict[str, Tensor], texts: list[str], form: str
    ) -> None:
        encoder = open_t5(t5_files[form])
        found = encoder.encode(texts)
        assert (encoder.width, encoder.max_tokens) == (32, 16)
        assert found.pooled is None
        assert found.states.shape == (5, 16, 32)
        assert torch.equal(found.mask, expected["mask"])
        # Padding rows are compared too: they are data for models that do not mask them.
        assert (found.states - expected["states"]).abs().max().item() <= TOLERANCE

    def test_padding_does_not_reach_real_tokens(self, t5_files: dict[str, Path]) -> None:
        short, long = (open_t5(t5_files["folder"], max_tokens=n).encode(["a red circle"]) for n in (4, 40))
        assert short.mask.tolist() == [[1] * 4]
        assert (short.states[0] - long.states[0, :4]).abs().max().item() <= TOLERANCE

    @pytest.mark.parametrize("max_tokens", [1, 5, 60])
    def test_texts_are_padded_and_cut_to_the_limit(self, t5_files: dict[str, Path], max_tokens: int) -> None:
        found = open_t5(t5_files["folder"], max_tokens=max_tokens).encode(["red " * 4, "red " * 30])
        assert found.states.shape == (2, max_tokens, 32)
        assert found.mask.sum(dim=1).tolist() == [min(5, max_tokens), min(31, max_tokens)]

    def test_keys_of_the_published_config_are_accepted(
        self, tmp_path: Path, t5_files: dict[str, Path], expected: dict[str, Tensor], texts: list[str]
    ) -> None:
        folder = Path(shutil.copytree(t5_files["folder"], tmp_path / "t5"))
        config = json.loads((folder / "config.json").read_text())
        old = {
            "architectures": ["T5ForConditionalGeneration"], "decoder_start_token_id": 0, "dropout_rate": 0.1,
            "initializer_factor": 1.0, "is_encoder_decoder": True, "model_type": "t5", "n_positions": 512,
            "num_decoder_layers": 2, "output_past": True, "relative_attention_max_distance": 128,
            "task_specific_params": {"summarization": {"early_stopping": True, "max_length": 200, "num_beams": 4}},
            "torch_dtype": "float32", "transformers_version": "4.23.1", "use_cache": True,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | old))
        found = open_t5(folder).encode(texts)
        assert (found.states - expected["states"]).abs().max().item() <= TOLERANCE

    def test_weights_are_frozen_copies_in_the_asked_precision(self, tmp_path: Path, t5_files: dict[str, Path]) -> None:
        folder = Path(shutil.copytree(t5_files["folder"], tmp_path / "t5"))
        encoder = open_t5(folder, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in encoder.module.parameters()} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
        before = encoder.encode(["a red circle"])
        assert before.states.dtype == torch.float32
        with (folder / "model.safetensors").open("r+b") as file:
            file.write(b"\0" * (folder / "model.safetensors").stat().st_size)
        assert torch.equal(encoder.encode(["a red circle"]).states, before.states)

    def test_both_names_of_the_embedding_are_one_matrix(self, t5_files: dict[str, Path]) -> None:
        module = open_t5(t5_files["embed_tokens only"]).module
        assert torch.equal(module.shared.weight, module.encoder.embed_tokens.weight)


class TestMessages:
    def test_t5_in_place_of_clip(self, t5_files: dict[str, Path]) -> None:
        for form in ("folder", "shared only"):
            message = failure(open_clip, t5_files[form])
            assert message.startswith(f"model.clip_path: {t5_files[form]}")
            assert message.endswith("is a T5 encoder, expected CLIP-L; are clip_path and t5_path swapped?")

    def test_clip_in_place_of_t5(self, clip_files: dict[str, Path]) -> None:
        for form in ("folder", "prefixed", "unprefixed"):
            message = failure(open_t5, clip_files[form])
            assert message.startswith(f"model.t5_path: {clip_files[form]}")
            assert message.endswith("is a CLIP text model, expected T5; are clip_path and t5_path swapped?")

    def test_another_network_in_place_of_either(self, vae_files: dict[str, Path]) -> None:
        first = next(iter(load_file(vae_files["header"])))
        path = vae_files["header"]
        assert failure(open_clip, path) == f"model.clip_path: {path}: holds no CLIP text model (first key: {first})"
        assert failure(open_t5, path) == f"model.t5_path: {path}: holds no T5 encoder (first key: {first})"

    def test_a_single_clip_without_config_that_is_not_the_published_one(
        self, tmp_path: Path, clip_files: dict[str, Path]
    ) -> None:
        for form in ("prefixed", "unprefixed"):
            path = Path(shutil.copy(clip_files[form], tmp_path / "clip.safetensors"))
            assert failure(open_clip, path) == (
                f"model.clip_path: {path}: has no config in its header or beside it, and is not the published CLIP-L. Put "
                "its config.json beside the file"
            )

    def test_a_single_t5_without_config_that_is_not_the_published_one(
        self, tmp_path: Path, t5_files: dict[str, Path]
    ) -> None:
        path = Path(shutil.copy(t5_files["shared only"], tmp_path / "t5.safetensors"))
        assert failure(open_t5, path) == (
            f"model.t5_path: {path}: has no config in its header or beside it, and is not the published flan-T5-base. "
            "Put its config.json beside the file"
        )

    def test_weights_that_do_not_fit_the_config(self, tmp_path: Path, clip_files: Any, t5_files: Any) -> None:
        for load, files, key, name in (
            (open_clip, clip_files, "num_hidden_layers", "this CLIP text model"),
            (open_t5, t5_files, "num_layers", "this T5 encoder"),
        ):
            folder = Path(shutil.copytree(files["folder"], tmp_path / key))
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {key: 3}))
            message = failure(load, folder)
            assert f"{folder / 'model.safetensors'}: is not {name}: " in message
            assert "keys missing (" in message

    def test_a_folder_without_config_or_weights(self, tmp_path: Path, clip_files: dict[str, Path]) -> None:
        for load in (open_clip, open_t5):
            assert "the folder has no config.json (found nothing)" in failure(load, tmp_path)
        (tmp_path / "only").mkdir()
        shutil.copy(clip_files["folder"] / "config.json", tmp_path / "only")
        assert "the folder has no weights; looked for " in failure(open_clip, tmp_path / "only")

    def test_a_whole_pipeline_folder_is_told_what_to_give(self, tmp_path: Path) -> None:
        (tmp_path / "model_index.json").write_text("{}")
        (tmp_path / "text_encoder").mkdir()
        assert failure(open_clip, tmp_path).endswith(
            "the folder has no config.json (found model_index.json, text_encoder); give the encoder's own folder"
        )

    def test_a_tokenizer_of_more_tokens_than_the_encoder(self, tmp_path: Path, clip_files: dict[str, Path]) -> None:
        from musubi_tuner.demo.prepare import word_tokenizer

        words = [f"w{index}" for index in range(200)]
        word_tokenizer(words, "<|startoftext|>", "<|endoftext|>", "<pad>", 20).save_pretrained(tmp_path)
        assert failure(open_clip, clip_files["folder"], tmp_path) == (
            f"model.clip_tokenizer: the tokenizer at {tmp_path} knows 204 tokens, the encoder 18; they do not belong together"
        )

    def test_a_tokenizer_of_the_other_encoder(self, clip_files: dict[str, Path], t5_files: dict[str, Path]) -> None:
        """T5's has fewer tokens than CLIP, so its size alone fits: real CLIP has 49,408, real T5 32,100."""
        message = failure(open_clip, clip_files["folder"], t5_files["folder"])
        assert message.startswith(f"model.clip_tokenizer: the tokenizer at {t5_files['folder']}")

    def test_a_tokenizer_that_lost_its_words(self, tmp_path: Path, t5_files: dict[str, Path]) -> None:
        from musubi_tuner.demo.prepare import word_tokenizer

        word_tokenizer([], None, "</s>", "<pad>", 16).save_pretrained(tmp_path)
        assert "knows 3 tokens, the encoder 16" in failure(open_t5, t5_files["folder"], tmp_path)

    def test_a_tokenizer_without_padding(self, tmp_path: Path, t5_files: dict[str, Path], t5_tokenizer: Any) -> None:
        t5_tokenizer.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
        assert failure(open_t5, t5_files["folder"], tmp_path) == (
            f"model.t5_tokenizer: the tokenizer at {tmp_path} has no padding token"
        )

    def test_a_tokenizer_folder_that_holds_none(self, tmp_path: Path, t5_files: dict[str, Path]) -> None:
        message = failure(open_t5, t5_files["folder"], tmp_path)
        assert message.startswith(f"model.t5_tokenizer: no tokenizer at {tmp_path} (")
        assert message.endswith("); give its folder")

    def test_the_published_tokenizer_cannot_be_fetched_offline(self, tmp_path: Path, t5_files: dict[str, Path]) -> None:
        for name in ("shared only.safetensors", "shared only.json"):
            shutil.copy(t5_files["shared only"].with_suffix(Path(name).suffix), tmp_path / name)
        message = failure(open_t5, tmp_path / "shared only.safetensors")
        assert message.startswith(f"model.t5_tokenizer: no tokenizer at {NO_HUB} (")


class TestTokenizerPlaces:
    def test_a_given_place_wins(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").touch()
        assert find_tokenizer(tmp_path, "owner/repo", NO_HUB) == "owner/repo"

    @pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "spiece.model"])
    @pytest.mark.parametrize("place", [".", "tokenizer", "../tokenizer"])
    def test_the_encoders_folder_then_tokenizer_in_it_then_beside_it(
        self, tmp_path: Path, place: str, name: str
    ) -> None:
        folder = tmp_path / "text_encoder"
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / name).touch()
        for encoder in (folder, folder / "model.safetensors"):
            (folder / "model.safetensors").touch()
            found = find_tokenizer(encoder, None, NO_HUB)
            assert Path(found).resolve() == (folder / place).resolve()

    def test_nothing_in_reach_means_the_published_one(self, tmp_path: Path) -> None:
        assert find_tokenizer(tmp_path, None, NO_HUB) == NO_HUB

    @pytest.mark.parametrize("kind", ["clip", "t5"])
    def test_tokenizers_load_offline_from_a_folder(self, request: pytest.FixtureRequest, kind: str) -> None:
        files, original = request.getfixturevalue(f"{kind}_files"), request.getfixturevalue(f"{kind}_tokenizer")
        loaded = load_tokenizer(files["folder"], len(original), "key")
        text = "A red circle, on the left."
        assert loaded(text)["input_ids"] == original(text)["input_ids"]

    def test_a_real_bpe_tokenizer_loads_offline_from_vocab_and_merges(self, tmp_path: Path) -> None:
        """The older layout of CLIP tokenizers: vocab.json and merges.txt without tokenizer.json."""
        alphabet = list("abcdefghijklmnopqrstuvwxyz")
        vocab = {token: index for index, token in enumerate([*alphabet, *(f"{letter}</w>" for letter in alphabet)])}
        for token in ("re", "red</w>", "<|startoftext|>", "<|endoftext|>"):
            vocab[token] = len(vocab)
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(tmp_path, len(vocab), "key")
        assert len(tokenizer) == len(vocab)
        assert tokenizer("RED a")["input_ids"] == [
            vocab[token] for token in ("<|startoftext|>", "red</w>", "a</w>", "<|endoftext|>")
        ]
