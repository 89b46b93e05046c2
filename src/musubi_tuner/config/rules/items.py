"""Rules between [general], [[datasets]] and other settings."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.config.diagnostics import Diagnostic, error, info, warning
from musubi_tuner.config.rules.rule import Rules
from musubi_tuner.config.run_config import RunConfig

ITEMS = Rules()
rule = ITEMS.rule


def _place(config: RunConfig, name: str, key: str) -> str:
    """Where a key of a data set is written."""
    own: dict[str, Any] = {}
    for number, entry in enumerate(config.dataset_tables.get("datasets", [])):
        if isinstance(entry, dict) and (entry.get("name") or f"datasets[{number}]") == name:
            own = entry
    return f"{name}.{key}" if key in own else f"general.{key}"


@rule("V01 V05 NA03", "cache.text_variants")
def _captions_that_change(config: RunConfig) -> Iterator[Diagnostic]:
    yield from _versions(
        config, "text", "captions", {name: dataset.text.dynamic for name, dataset in _named(config)}, 8
    )


@rule("V03 V04 V05 NA03", "cache.latent_variants")
def _pictures_that_change(config: RunConfig) -> Iterator[Diagnostic]:
    yield from _versions(
        config, "latents", "pictures", {name: dataset.views.drawn for name, dataset in _named(config)}, 4
    )


_CODES = {"shuffle_caption": "V01", "random_crop": "V03", "color_aug": "V04"}
_CHANGES = {
    "captions": "shuffles or drops tags, or has wildcards",
    "pictures": "uses random_crop or color_aug",
}


def _named(config: RunConfig) -> list[tuple[str, DatasetConfig]]:
    return [(dataset.name, dataset) for dataset in config.datasets]


def _versions(
    config: RunConfig, kind: str, what: str, changing: Mapping[str, Sequence[str]], usual: int
) -> Iterator[Diagnostic]:
    """What changes at random needs versions, and versions need something that changes.

    Args:
        kind: of the cache that holds them. changing: keys that change them at random, by data set. usual: number of versions.
    """
    facts, key = config.spec.task(config), "cache.text_variants" if what == "captions" else "cache.latent_variants"
    count = config.get(key)
    if kind not in facts.caches and not facts.pixels:
        return
    places = {_place(config, name, own): own for name, keys in changing.items() for own in keys}
    if count == 1:
        for place, own in places.items():
            text = f"changes {what} at random, and their versions are cached before training. Set {key} to the number of versions, for "
            yield error(_CODES.get(own, "V05"), place, f"{text}example {usual}", key, fix=[(key, usual)])
    elif not places:
        yield warning("NA03", key, f"has no effect because no data set {_CHANGES[what]}")
    else:
        yield info("V05", key, f"{count} versions of the {what} are cached; one is chosen each time an image is used")


@rule("V58")
def _separators_differ(config: RunConfig) -> Iterator[Diagnostic]:
    said = set[str]()
    for dataset in config.datasets:
        names: dict[str, str] = {}
        for key in ("caption_separator", "secondary_separator", "keep_tokens_separator"):
            value, place = getattr(dataset.text, key), _place(config, dataset.name, key)
            first = names.setdefault(value, key)
            if value and first != key and place not in said:
                said.add(place)
                yield error("V58", place, f"is {value!r}, as {first} is; give it another", f"general.{first}")


@rule("V58")
def _kept_parts(config: RunConfig) -> Iterator[Diagnostic]:
    found = list[Diagnostic]()
    for dataset in config.datasets:
        text, moves = dataset.text, dataset.text.shuffle_caption or dataset.text.caption_tag_dropout_rate
        for key in ("keep_tokens", "keep_tokens_separator"):
            place = _place(config, dataset.name, key)
            if getattr(text, key) and not moves:
                reason = "has no effect because no tags are shuffled or dropped"
                found.append(warning("V58", place, reason, "general.shuffle_caption"))
        apart = text.trigger_word or text.secondary_separator or text.keep_tokens_separator
        place = _place(config, dataset.name, "caption_separator")
        if text.caption_separator != "," and not moves and not apart:
            reason = "has no effect because no setting splits or joins tags"
            found.append(warning("V58", place, reason, "general.shuffle_caption"))
        place = _place(config, dataset.name, "keep_tokens")
        if text.keep_tokens and text.keep_tokens_separator and moves:
            reason = f"is {text.keep_tokens}, but applies only to captions without {text.keep_tokens_separator!r}"
            found.append(warning("V58", place, reason, "general.keep_tokens_separator"))
    for each, count in Counter(found).items():
        name = each.key.removeprefix("general.")
        takers = [dataset for dataset in config.datasets if _place(config, dataset.name, name) == each.key]
        if count == len(takers) or not each.key.startswith("general."):  # it may act in another data set
            yield each


@rule("V59", "objective.text_dropout")
def _captions_are_seen(config: RunConfig) -> Iterator[Diagnostic]:
    said = set[str]()
    for dataset in config.datasets:
        for key, value in (
            ("caption_dropout_rate", dataset.text.caption_dropout_rate),
            ("caption_tag_dropout_rate", dataset.text.caption_tag_dropout_rate),
            ("caption_dropout_every_n_epochs", dataset.text.caption_dropout_every_n_epochs),
        ):
            place = _place(config, dataset.name, key)
            if value == 1 and place not in said:
                said.add(place)
                reason = "is 1, so captions would be dropped in every epoch; set a larger number, or 0 for off"
                if key != "caption_dropout_every_n_epochs":
                    what = "captions" if key == "caption_dropout_rate" else "tags that are not kept"
                    reason = f"is 1, so all {what} would be dropped; 0.1 is usual"
                yield error("V59", place, reason)
    key, own = "objective.text_dropout", [dataset.text.caption_dropout_rate is not None for dataset in config.datasets]
    if own and all(own) and key in config.set_keys():
        yield warning("NA03", key, "has no effect because every data set has its own caption_dropout_rate")


@rule("V94")
def _streams(config: RunConfig) -> Iterator[Diagnostic]:
    live = config.spec.task(config).pixels
    for dataset in config.datasets:
        if dataset.stream is None:
            continue
        place = f"{dataset.name}.{'dataset_name' if dataset.stream.dataset_name else 'shards'}"
        if live and len(config.datasets) > 1:
            text = (
                "is a stream, beside which a run reads nothing else; give it a run or a step of its own (use = [...])"
            )
            yield error("V94", place, text)
        if live and dataset.stream.cached:
            text = f"is for cached latents, and this run of {config.spec.title} reads pictures as they come; remove it"
            yield error("V94", f"{dataset.name}.cache_directory", text, place)
        if not live and not dataset.stream.cached:
            text = f"is read once, since this run of {config.spec.title} trains from cached latents; set cache_directory to a folder for them"
            yield error("V94", place, text, f"{dataset.name}.cache_directory")


@rule("V92", "train.prior_loss_weight")
def _regularisation(config: RunConfig) -> Iterator[Diagnostic]:
    regular = [dataset.is_reg for dataset in config.datasets]
    if any(regular) and not config.spec.task(config).denoises:
        place = _place(config, config.datasets[regular.index(True)].name, "is_reg")
        yield error("NA01", place, f"applies to denoisers, and this run of {config.spec.title} trains none; remove it")
    if config.train.prior_loss_weight != 1 and not any(regular):
        text = "has no effect because no data set has is_reg"
        yield warning("NA03", "train.prior_loss_weight", text)
    if regular and all(regular):
        yield error(
            "V92", "datasets", "all have is_reg = true; at least one data set must not be regularisation images"
        )
