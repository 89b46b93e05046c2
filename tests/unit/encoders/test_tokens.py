"""Tokens that are counted for the plan are those that transformers would make; what is lost is named."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from musubi_tuner.encoders.tokens import TokenLimit, clip_limit, count_tokens, open_tokenizer


def pieces() -> Tokenizer:
    """SentencePiece's way, as the published T5 has it: words begin with a mark, unknown characters become <unk>."""
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁red", -3.0), ("▁a", -3.0), ("b", -4.0)]
    made = Tokenizer(models.Unigram(scores, 2, False))
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.enable_truncation(3)
    made.enable_padding(length=3)
    return made


def byte_pairs() -> Tokenizer:
    """CLIP's way: every byte is known, and the unknown token is the mark at the end."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*bytes_, "re", "red", "<|startoftext|>", "<|endoftext|>"])}
    made = Tokenizer(models.BPE(vocabulary, [("r", "e"), ("re", "d")], unk_token="<|endoftext|>"))
    made.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = [(name, vocabulary[name]) for name in ("<|startoftext|>", "<|endoftext|>")]
    made.post_processor = processors.TemplateProcessing(single=f"{marks[0][0]} $A {marks[1][0]}", special_tokens=marks)
    return made


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, clip_tokenizer: Any, t5_tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    found = {name: root / name for name in ("words of clip", "words of t5", "pieces", "byte pairs")}
    for path in found.values():
        path.mkdir()
    clip_tokenizer.save_pretrained(found["words of clip"])
    t5_tokenizer.save_pretrained(found["words of t5"])
    for name, made in (("pieces", pieces()), ("byte pairs", byte_pairs())):
        made.save(str(found[name] / "tokenizer.json"))
        marks = {"eos_token": "</s>"} if name == "pieces" else {"eos_token": "<|endoftext|>"}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **marks}
        (found[name] / "tokenizer_config.json").write_text(json.dumps(config))
    return found


@pytest.mark.parametrize("name", ["words of clip", "words of t5", "pieces", "byte pairs"])
def test_lengths_are_those_of_transformers(places: dict[str, Path], texts: list[str], name: str) -> None:
    from transformers import AutoTokenizer

    given = [*texts, "red " * 50, "a\nb", "été 青い 😀"]
    tokenizer = open_tokenizer(places[name], download=False)
    assert tokenizer is not None
    expected = AutoTokenizer.from_pretrained(str(places[name]))(given, verbose=False)["input_ids"]
    assert [counted.tokens for counted in count_tokens(tokenizer, given)] == [len(ids) for ids in expected]


def test_unknown_words_are_counted_and_marks_are_no_words(places: dict[str, Path]) -> None:
    def counted(name: str, *texts: str) -> list[tuple[int, int]]:
        tokenizer = open_tokenizer(places[name], download=False)
        assert tokenizer is not None
        return [(one.words, one.unknown) for one in count_tokens(tokenizer, texts)]

    assert counted("words of t5", "red", "rot", "red rot", "") == [(1, 0), (1, 1), (2, 1), (0, 0)]
    assert counted("pieces", "red", "青い", "red 青い", "") == [(1, 0), (1, 1), (2, 1), (0, 0)]
    assert counted("byte pairs", "red", "青", "") == [(1, 0), (3, 0), (0, 0)]


def reds(count: int) -> str:
    return " ".join(["red"] * count)


@pytest.fixture
def t5(places: dict[str, Path]) -> TokenLimit:
    return TokenLimit("T5", 5, "shorten them", open_tokenizer(places["pieces"], download=False))


def test_what_is_cut_is_named_longest_first(t5: TokenLimit) -> None:
    texts = [("fits", reds(4)), ("long", reds(5)), ("longer", reds(9)), ("again", reds(9)), ("none", "")]
    assert t5.losses(texts, "captions") == [
        "note: T5 takes 5 tokens; 3 of 5 captions have more and are cut (longer: 10, again: 10, long: 6); shorten them"
    ]
    (line,) = t5.losses([(f"p{number:02d}", reds(9)) for number in range(14)], "captions")
    assert "14 of 14" in line and "p09: 10, and 4 more)" in line


def test_what_is_unknown_is_named_with_its_text(t5: TokenLimit) -> None:
    (line,) = t5.losses([("a", "青い"), ("b", "red"), ("c", "red 青い"), ("d", "")], "sample prompts")
    assert line.startswith(
        'warning: T5 knows no word of 1 of 4 sample prompts, so they are all the same to it (a "青い")'
    )
    assert "of 1 more it knows only a part" in line
    assert t5.losses([("b", "red"), ("c", "red 青い"), ("d", "")], "captions") == []


def test_a_tokenizer_that_is_not_here_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the hub was asked"))
    assert open_tokenizer("owner/repository", download=False) is None
    (tmp_path / "tokenizer.json").write_text("{")
    assert open_tokenizer(tmp_path, download=False) is None
    assert TokenLimit("T5", 5, "", None).losses([("a", "red " * 50)], "captions") == []


def test_positions_of_clip_come_from_its_config(tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(1)}
    plain, stated, beside = (tmp_path / name / "clip.safetensors" for name in ("plain", "stated", "beside"))
    for path in (plain, stated, beside):
        path.parent.mkdir()
    save_file(tensors, plain)
    save_file(tensors, stated, metadata={"config_json": json.dumps({"max_position_embeddings": 20})})
    save_file(tensors, beside)
    beside.with_suffix(".json").write_text(json.dumps({"text_config": {"max_position_embeddings": 30}}))
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 40}))
    assert [clip_limit(path) for path in (plain, stated, beside, tmp_path)] == [77, 20, 30, 40]
    (tmp_path / "config.json").write_text("{")
    plain.write_bytes(b"no weights")
    assert clip_limit(tmp_path) == clip_limit(plain) == 77


def test_a_tokenizer_file_needs_neither_torch_nor_transformers(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take seconds to import, and the plan comes first."""
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    for place in places.values():
        assert open_tokenizer(place, download=False) is not None
