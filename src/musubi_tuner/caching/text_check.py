"""What the text encoders of a run lose of its captions and sample prompts: for the plan and the text job. Torch-free."""

from collections.abc import Sequence

from musubi_tuner.config import RunConfig
from musubi_tuner.config.prompts import Prompt
from musubi_tuner.data.sources import Item
from musubi_tuner.encoders.locate import encoder_sources, find_tokenizer
from musubi_tuner.encoders.tokens import TokenLimit, clip_limit, open_tokenizer


def token_limits(config: RunConfig, *, download: bool) -> list[TokenLimit]:
    """T5 and CLIP of a run, with their tokenizers where these are at hand.

    Args:
        download: what is on the hub.
    """
    sources = encoder_sources(config, "text")
    paths = sources.paths(download=download)
    found = []
    for role, fallback in (("t5", config.spec.t5_tokenizer), ("clip", config.spec.clip_tokenizer)):
        encoder, given = paths.get(role), paths.get(f"{role}_tokenizer")
        tokenizer = None
        if encoder is not None and (given is not None or f"{role}_tokenizer" not in sources.sources):
            tokenizer = open_tokenizer(find_tokenizer(encoder, given, fallback), download=download)
        if role == "t5":
            limit, advice = config.model.t5_max_tokens, "shorten them, or raise model.t5_max_tokens"
            found.append(TokenLimit("T5", limit, advice, tokenizer))
        else:
            advice = "it never sees the rest, so begin with what matters"
            found.append(TokenLimit("CLIP", clip_limit(encoder) if encoder else 0, advice, tokenizer))
    return found


def caption_lines(limits: Sequence[TokenLimit], items: Sequence[Item]) -> list[str]:
    """What is lost of the captions of items, encoder by encoder."""
    several = len({item.dataset for item in items}) > 1
    captions = [
        (f"{item.key if several else item.id}{f' caption {number}' if item.more_captions else ''}", caption)
        for item in items
        for number, caption in enumerate(item.captions, start=1)
    ]
    return [line for limit in limits for line in limit.losses(captions, "captions")]


def prompt_lines(limits: Sequence[TokenLimit], prompts: Sequence[Prompt], negative: str | None) -> list[str]:
    """What is lost of prompts and negative prompts, encoder by encoder."""
    texts = [(f"prompt {number}", prompt.text) for number, prompt in enumerate(prompts, start=1)]
    texts += [
        (f"negative of prompt {number}", prompt.negative)
        for number, prompt in enumerate(prompts, start=1)
        if prompt.negative
    ]
    texts += [("negative prompt", negative)] if negative else []
    return [line for limit in limits for line in limit.losses(texts, "sample prompts")]
