"""Captions after prefix, trigger, shuffle, tag dropout and wildcards. Torch-free.

Order: prefix and suffix, wildcards, tags that are kept, shuffled or dropped, the secondary separator, the trigger. A tag is the text
between two separators.
"""

import random
import re

from musubi_tuner.config.captions import CaptionSettings
from musubi_tuner.randomness import keyed_random

TRIGGER = "[trigger]"
_WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def variants(captions: tuple[str, ...], settings: CaptionSettings, item: str) -> tuple[str, ...]:
    """The captions that an item is trained with, made from its written captions.

    With settings that change captions at random there are ``text_variants`` versions (at least one of each written caption), drawn by
    (cache.seed, item, number). With token warm-up as many follow that have only their first tags, ever more of them. Where a dropped
    caption is an empty one, it comes last.

    Args:
        item: key of the draws.
    """
    made = [fixed(caption, settings) for caption in captions]
    if settings.dynamic:
        count = max(settings.text_variants, len(captions))  # each written caption is in it
        draws = [keyed_random(settings.seed, "caption variant", item, number) for number in range(count)]
        made = [draw(captions[number % len(captions)], settings, each) for number, each in enumerate(draws)]
        if settings.token_warmup_step:
            grown = [keyed_random(settings.seed, "caption warm-up", item, number) for number in range(count)]
            made += [draw(captions[n % len(captions)], settings, each, n / count) for n, each in enumerate(grown)]
    return (*made, "") if settings.drops and settings.drop_as_empty else tuple(made)


def fixed(caption: str, settings: CaptionSettings) -> str:
    """A caption without random changes: prefix, suffix, separators, trigger."""
    return _triggered(_framed(_separated(caption, settings), settings), settings)


def draw(caption: str, settings: CaptionSettings, source: random.Random, progress: float = 1.0) -> str:
    """One random version of a caption.

    Args:
        progress: of token warm-up, from 0 to 1 at its end.
    """
    if settings.enable_wildcard:
        lines = [line.strip() for line in caption.splitlines() if line.strip()]
        caption = source.choice(lines) if lines else ""
    caption = _framed(caption, settings)
    if settings.enable_wildcard:
        caption = _WILDCARD.sub(lambda match: _chosen(match, source), caption)
    if settings.shuffle_caption or settings.caption_tag_dropout_rate or progress < 1:
        caption = _rearranged(caption, settings, source, progress)
    return _triggered(_separated(caption, settings), settings)


def unread_wildcard(caption: str) -> str | None:
    """What of a caption looks like a wildcard and stays in the text, in words that follow "have captions with"; None = nothing."""
    left = _WILDCARD.sub("", caption)
    if "{" in left or "}" in left:
        return "braces that are not closed or lie inside others, which stay in the text"
    if any(re.search(r"\$\$|::", choice) for choice in _WILDCARD.findall(caption)):
        return "N$$ or N:: in a wildcard, which stays in the text: one of the choices is taken, each as often"
    if re.search(r"__\w[\w/*-]*__", left):
        return "the name of a wildcard file, __name__, which stays in the text"
    return None


def _separated(caption: str, settings: CaptionSettings) -> str:
    """A caption with caption_separator in place of the other separators."""
    if settings.keep_tokens_separator:
        pieces = [piece.strip() for piece in caption.split(settings.keep_tokens_separator)]
        caption = _joined([piece for piece in pieces if piece], settings.caption_separator)
    if settings.secondary_separator:
        caption = caption.replace(settings.secondary_separator, settings.caption_separator)
    return caption


def _framed(caption: str, settings: CaptionSettings) -> str:
    """A caption with prefix and suffix; an empty caption too."""
    return " ".join(part for part in (settings.caption_prefix, caption, settings.caption_suffix) if part)


def _triggered(caption: str, settings: CaptionSettings) -> str:
    word = settings.trigger_word
    if not word:
        return caption
    if TRIGGER in caption:
        return caption.replace(TRIGGER, word)
    return _joined([word, caption], settings.caption_separator) if caption else word


def _chosen(match: re.Match[str], source: random.Random) -> str:
    if match[0] in ("{{", "}}"):
        return match[0][0]
    return source.choice(match[1].split("|")).strip()


def _joined(parts: list[str], separator: str) -> str:
    """Parts with the separator between them, and one space."""
    return f"{separator.rstrip()} ".join(parts)


def _parts(text: str, separator: str) -> list[str]:
    return [part for piece in text.split(separator) if (part := piece.strip())]


def _rearranged(caption: str, settings: CaptionSettings, source: random.Random, progress: float) -> str:
    """Tags that are kept, then the others as far as warm-up is, shuffled and dropped, then the fixed end."""
    separator, marker = settings.caption_separator, settings.keep_tokens_separator
    end: list[str] = []
    if marker and marker in caption:
        begin, _, rest = caption.partition(marker)
        rest, _, last = rest.partition(marker)
        kept, others, end = _parts(begin, separator), _parts(rest, separator), _parts(last, separator)
    else:
        parts = _parts(caption, separator)
        kept, others = parts[: settings.keep_tokens], parts[settings.keep_tokens :]
    if progress < 1:
        least = settings.token_warmup_min
        others = others[: least + max(0, int(progress * (len(others) - least)))]
    if settings.shuffle_caption:
        source.shuffle(others)
    if settings.caption_tag_dropout_rate:
        others = [part for part in others if source.random() >= settings.caption_tag_dropout_rate]
    return _joined([*kept, *others, *end], separator)
