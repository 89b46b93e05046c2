"""What T5 and CLIP lose of a text: tokens beyond their limit, and words that their tokenizer does not know. Torch-free.

Only the tokenizers are opened, so that the plan can say it before anything is encoded.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musubi_tuner.encoders.locate import stated_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLIP_TOKENS = 77
"""Positions of the published CLIP-L."""
_CHUNK = 1000
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece puts before a word; alone it says nothing."""


@dataclass(frozen=True)
class Counted:
    """A text in tokens.

    Attributes:
        tokens: its length with the marks around it. words: tokens that say something. unknown: those of them that the tokenizer does
            not know.
    """

    tokens: int
    words: int
    unknown: int


@dataclass(frozen=True)
class TokenLimit:
    """A text encoder as far as lengths go.

    Attributes:
        name: for messages. limit: tokens that it takes, with the marks around a text. advice: what helps where that is too few.
        tokenizer: None where it is not at hand.
    """

    name: str
    limit: int
    advice: str
    tokenizer: "Tokenizer | None"

    def losses(self, texts: Iterable[tuple[str, str]], what: str) -> list[str]:
        """Lines for a person: which texts are cut, and which are unknown to the tokenizer.

        Args:
            texts: (name, text) pairs. what: what they are, in the plural.
        """
        if self.tokenizer is None:
            return []
        named = list(texts)
        unique = list(dict.fromkeys(text for _, text in named))
        counts = dict(zip(unique, count_tokens(self.tokenizer, unique), strict=True))
        cut = [(name, counts[text].tokens) for name, text in named if counts[text].tokens > self.limit]
        unknown = [
            (name, text) for name, text in named if counts[text].words and counts[text].unknown == counts[text].words
        ]
        partly = sum(0 < counts[text].unknown < counts[text].words for _, text in named)
        lines = []
        if cut:
            shown = _listed([f"{name}: {tokens}" for name, tokens in sorted(cut, key=lambda pair: -pair[1])])
            lines.append(
                f"note: {self.name} takes {self.limit} tokens; {len(cut)} of {len(named)} {what} have more and are cut "
                f"({shown}); {self.advice}"
            )
        if unknown:
            shown = _listed([f'{name} "{_short(text)}"' for name, text in unknown])
            more = f"; of {partly} more it knows only a part" if partly else ""
            lines.append(
                f"warning: {self.name} knows no word of {len(unknown)} of {len(named)} {what}, so they are all the same to it "
                f"({shown}){more}; write them in the language that its tokenizer was made for"
            )
        return lines


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else f"{line[:37]}..."


def count_tokens(tokenizer: "Tokenizer", texts: Sequence[str]) -> Iterator[Counted]:
    """Count the tokens of texts, uncut."""
    unknown = _unknown_id(tokenizer)
    start = tokenizer.token_to_id(_WORD_START)
    for begin in range(0, len(texts), _CHUNK):
        for encoding in tokenizer.encode_batch_fast(list(texts[begin : begin + _CHUNK])):
            ids: list[int] = encoding.ids
            words = [i for i, mark in zip(ids, encoding.special_tokens_mask, strict=True) if not mark and i != start]
            yield Counted(len(ids), len(words), 0 if unknown is None else words.count(unknown))


def _unknown_id(tokenizer: "Tokenizer") -> int | None:
    """Token that stands for what the tokenizer does not know; None if it knows every byte."""
    model: Any = tokenizer.model
    token = getattr(model, "unk_token", None)
    if token is not None:
        return tokenizer.token_to_id(token)
    stated = json.loads(tokenizer.to_str())["model"].get("unk_id")  # a Unigram model does not show it otherwise
    return None if stated is None else int(stated)


def open_tokenizer(place: Path | str, *, download: bool) -> "Tokenizer | None":
    """The tokenizer of a folder or hub id, without limits of its own.

    Args:
        download: fetch it from the hub; otherwise only what is here is opened.

    Returns:
        None if it is not here, or cannot be read: loading the encoder says why.
    """
    # Threads of its own would make each later fork of this process print a warning, and hang if the fork counts too.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    file = place / "tokenizer.json" if isinstance(place, Path) else _on_hub(place, "tokenizer.json")
    try:
        if file is not None and file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif (
            isinstance(place, str)
            and not download
            and not any(_on_hub(place, n) for n in ("spiece.model", "vocab.json"))
        ):
            return None
        else:  # files of another kind are converted, which takes seconds to import
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(place), local_files_only=not download).backend_tokenizer
    except Exception:  # the libraries raise anything, bare Exception too
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _on_hub(repository: str, name: str) -> Path | None:
    """A file of a repository in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def clip_limit(encoder: Path) -> int:
    """Tokens that a CLIP text model takes, as its config says; without one it is the published model."""
    config = stated_config(encoder) or {}
    stated = config.get("text_config", config)
    found = stated.get("max_position_embeddings", CLIP_TOKENS) if isinstance(stated, dict) else CLIP_TOKENS
    return found if isinstance(found, int) else CLIP_TOKENS
