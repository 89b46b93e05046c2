"""What the text encoders of a run lose of its captions and sample prompts: for the plan and the text job. Torch-free."""

from collections.abc import Sequence

from musubi_tuner.config import RunConfig
from musubi_tuner.config.prompts import Prompt
from musubi_tuner.data.item import Item
from musubi_tuner.encoders.locate import encoder_sources, find_tokenizer
from musubi_tuner.encoders.tokens import TokenLimit, open_tokenizer


def token_limits(config: RunConfig, *, download: bool) -> list[TokenLimit]:
    """The text encoders of a run, with their tokenizers where these are at hand.

    Args:
        download: what is on the hub.
    """
    sources = encoder_sources(config, "text")
    paths = sources.paths(download=download)
    found = []
    networks = config.spec.encoders
    for role, fallback in networks.tokenizers(config).items():
        encoder, given = paths.get(role), paths.get(f"{role}_tokenizer")
        tokenizer = None
        if encoder is not None and (given is not None or f"{role}_tokenizer" not in sources.sources):
            tokenizer = open_tokenizer(find_tokenizer(encoder, given, fallback), download=download)
        found.append(networks.token_limit(config, role, encoder, tokenizer))
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
