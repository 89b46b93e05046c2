"""Rules of [general] and [[datasets]] beside other settings."""

from collections.abc import Iterator
from typing import Any

from musubi_tuner.config.diagnostics import Diagnostic, error, info, warning
from musubi_tuner.config.rules.rule import Rules
from musubi_tuner.config.run_config import RunConfig

ITEMS = Rules()
rule = ITEMS.rule
_CODES = {"shuffle_caption": "V01"}


def _place(config: RunConfig, name: str, key: str) -> str:
    """Where a key of a data set is written."""
    own: dict[str, Any] = {}
    for number, entry in enumerate(config.dataset_tables.get("datasets", [])):
        if entry.get("name", f"datasets[{number}]") == name:
            own = entry
    return f"{name}.{key}" if key in own else f"general.{key}"


@rule("V01 V05", "cache.text_variants")
def _captions_that_change(config: RunConfig) -> Iterator[Diagnostic]:
    count, said = config.cache.text_variants, set[str]()
    facts = config.spec.task(config)
    if "text" not in facts.caches and not facts.pixels:
        return
    for dataset in config.datasets:
        for key in dataset.text.dynamic:
            place = _place(config, dataset.name, key)
            if place in said:
                continue
            said.add(place)
            if count == 1:
                text = (
                    "changes captions at random, and their versions are made before training. Set cache.text_variants to the number of "
                    "versions, for example 8"
                )
                fix = [("cache.text_variants", 8)]
                yield error(_CODES.get(key, "V05"), place, text, "cache.text_variants", fix=fix)
    if count > 1 and not any(dataset.text.dynamic for dataset in config.datasets):
        if "cache.text_variants" in config.set_keys():
            text = "has no effect because no data set shuffles or drops parts of captions, or has wildcards"
            yield warning("NA03", "cache.text_variants", text)
    elif count > 1:
        text = f"{count} variants of every caption are made; each presentation takes one"
        yield info("V05", "cache.text_variants", text)


@rule("V03 V04 NA03", "cache.latent_variants")
def _pictures_that_change(config: RunConfig) -> Iterator[Diagnostic]:
    count, said = config.cache.latent_variants, set[str]()
    facts = config.spec.task(config)
    if "latents" not in facts.caches and not facts.pixels:
        return
    for dataset in config.datasets:
        for key in dataset.views.drawn if count == 1 else ():
            place = _place(config, dataset.name, key)
            if place not in said:
                said.add(place)
                text = (
                    "changes pictures at random, and their versions are made before training. Set cache.latent_variants to the number of "
                    "versions, for example 4"
                )
                code = "V03" if key == "random_crop" else "V04"
                yield error(code, place, text, "cache.latent_variants", fix=[("cache.latent_variants", 4)])
    if count > 1 and not any(dataset.views.drawn for dataset in config.datasets):
        text = "has no effect because no data set crops or colours its pictures at random"
        yield warning("NA03", "cache.latent_variants", text)


@rule("V58")
def _kept_parts(config: RunConfig) -> Iterator[Diagnostic]:
    said = set[str]()
    for dataset in config.datasets:
        text, moves = dataset.text, dataset.text.shuffle_caption or dataset.text.caption_tag_dropout_rate
        for key in ("keep_tokens", "keep_tokens_separator"):
            place = _place(config, dataset.name, key)
            if getattr(text, key) and not moves and place not in said:
                said.add(place)
                reason = "keeps nothing in its place because no parts are shuffled or dropped"
                yield warning("V58", place, reason, _place(config, dataset.name, "shuffle_caption"))
        place = _place(config, dataset.name, "keep_tokens")
        if text.keep_tokens and text.keep_tokens_separator and moves and place not in said:
            said.add(place)
            reason = f"is {text.keep_tokens}, but applies only to captions without {text.keep_tokens_separator!r}"
            yield warning("V58", place, reason, _place(config, dataset.name, "keep_tokens_separator"))


@rule("V59")
def _captions_are_seen(config: RunConfig) -> Iterator[Diagnostic]:
    said = set[str]()
    for dataset in config.datasets:
        for key, value in (
            ("caption_dropout_rate", dataset.text.caption_dropout_rate),
            ("caption_dropout_every_n_epochs", dataset.text.caption_dropout_every_n_epochs),
        ):
            place = _place(config, dataset.name, key)
            if value == 1 and place not in said:
                said.add(place)
                reason = "is 1, so captions would be dropped in every epoch"
                if key == "caption_dropout_rate":
                    reason = "is 1, so all captions would be dropped; 0.1 is usual"
                yield error("V59", place, reason)


@rule("V92", "train.prior_loss_weight")
def _regularisation(config: RunConfig) -> Iterator[Diagnostic]:
    regular = [dataset.is_reg for dataset in config.datasets]
    if any(regular) and not config.spec.task(config).denoises:
        place = _place(config, config.datasets[regular.index(True)].name, "is_reg")
        yield error("NA01", place, f"acts on a denoiser, and this run of {config.spec.title} trains none")
    if config.train.prior_loss_weight != 1 and not any(regular):
        text = "has no effect because no data set has is_reg"
        yield warning("NA03", "train.prior_loss_weight", text)
    if regular and all(regular):
        yield error("V92", "datasets", "all have is_reg = true; at least one data set must be without it")
