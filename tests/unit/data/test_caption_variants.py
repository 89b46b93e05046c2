"""What becomes of a caption before it is encoded: order of the operations, and statistics over 10,000 draws."""

import random
from collections import Counter

import pytest

from musubi_tuner.config.captions import CaptionSettings
from musubi_tuner.data.caption_variants import draw, fixed, unread_wildcard, variants
from musubi_tuner.data.plan import caption_of

MANY = 10_000


def drawn(caption: str, count: int = MANY, **settings: object) -> Counter[str]:
    own = CaptionSettings(**settings)  # type: ignore[arg-type]
    source = random.Random(0)
    return Counter(draw(caption, own, source) for _ in range(count))


@pytest.mark.parametrize(
    ("caption", "settings", "expected"),
    [
        ("a cat", {"caption_prefix": "photo of", "caption_suffix": "at night"}, "photo of a cat at night"),
        ("", {"caption_prefix": "photo"}, "photo"),
        ("a [trigger] cat", {"trigger_word": "ohwx"}, "a ohwx cat"),
        ("a cat", {"trigger_word": "ohwx"}, "ohwx, a cat"),
        ("", {"trigger_word": "ohwx"}, "ohwx"),
        ("a;;;b, c|||d", {"secondary_separator": ";;;", "keep_tokens_separator": "|||"}, "a,b, c, d"),
        ("{a|b} cat", {}, "{a|b} cat"),
    ],
)
def test_what_is_the_same_every_time(caption: str, settings: dict[str, str], expected: str) -> None:
    assert fixed(caption, CaptionSettings(**settings)) == expected  # type: ignore[arg-type]


def test_parts_are_shuffled_evenly_and_joined_by_the_separator() -> None:
    found = drawn("a,b ,  c", shuffle_caption=True)
    assert set(found) == {"a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"}
    assert all(count == pytest.approx(MANY / 6, rel=0.1) for count in found.values())
    assert set(drawn("a. b", 50, shuffle_caption=True, caption_separator=".")) == {"a. b", "b. a"}
    assert set(drawn("a b", 50, shuffle_caption=True, caption_separator=" ")) == {"a b", "b a"}


def test_kept_parts_stay_in_front() -> None:
    assert set(drawn("x, a, b", shuffle_caption=True, keep_tokens=1)) == {"x, a, b", "x, b, a"}
    marked = drawn("x, y ||| a, b ||| z", shuffle_caption=True, keep_tokens=1, keep_tokens_separator="|||")
    assert set(marked) == {"x, y, a, b, z", "x, y, b, a, z"}
    assert set(drawn("x, a, b", shuffle_caption=True, keep_tokens=1, keep_tokens_separator="|||")) == {
        "x, a, b",
        "x, b, a",
    }


def test_parts_are_dropped_independently_but_for_kept_ones() -> None:
    found = drawn("x, a, b", caption_tag_dropout_rate=0.25, keep_tokens=1)
    expected = {"x, a, b": 0.75**2, "x, a": 0.75 * 0.25, "x, b": 0.25 * 0.75, "x": 0.25**2}
    assert {text: count / MANY for text, count in found.items()} == pytest.approx(expected, abs=0.015)


def test_parts_joined_by_the_secondary_separator_move_as_one() -> None:
    found = drawn("a;;;b, c", shuffle_caption=True, secondary_separator=";;;")
    assert set(found) == {"a,b, c", "c, a,b"}


def test_wildcards_take_one_of_their_words_and_one_of_the_lines() -> None:
    found = drawn("a {red|green| blue } {{cat}}", enable_wildcard=True)
    assert set(found) == {"a red {cat}", "a green {cat}", "a blue {cat}"}
    assert all(count == pytest.approx(MANY / 3, rel=0.1) for count in found.values())
    assert set(drawn("one\n\ntwo\n", 100, enable_wildcard=True)) == {"one", "two"}


@pytest.mark.parametrize(
    ("caption", "found"),
    [("{a|b} {{c}}", None), ("{a|{b|c}}", "braces"), ("a } b", "braces"), ("{2$$a|b}", "N$$"), ("{2::a|b}", "N::"), ("a __color__", "file")],
)  # fmt: skip
def test_what_is_no_wildcard_is_told(caption: str, found: str | None) -> None:
    assert (found is None) == (unread_wildcard(caption) is None) and (found or "") in (unread_wildcard(caption) or "")


def test_the_trigger_is_not_shuffled() -> None:
    assert set(drawn("a, b", shuffle_caption=True, trigger_word="ohwx")) == {"ohwx, a, b", "ohwx, b, a"}


def test_variants_are_keyed_by_item_and_seed_and_use_all_written_captions() -> None:
    settings = CaptionSettings(shuffle_caption=True, text_variants=6, seed=1)
    words = "a, b, c, d, e, f"
    made = variants((words, "x"), settings, "cat")
    assert len(made) == 6 and made[1::2] == ("x",) * 3 and len(set(made[::2])) > 1
    assert made == variants((words, "x"), settings, "cat")
    assert made != variants((words, "x"), settings, "dog")
    assert made[:2] == variants((words, "x"), CaptionSettings(shuffle_caption=True, text_variants=1, seed=1), "cat")


def test_dropped_captions_are_the_empty_one_at_the_end_where_the_family_wants_it() -> None:
    settings = CaptionSettings(caption_dropout_rate=0.2, drop_as_empty=True)
    assert variants(("a",), settings, "cat") == ("a", "")
    assert variants(("a",), CaptionSettings(caption_dropout_rate=0.2), "cat") == ("a",)
    taken = Counter(caption_of(2, 1, 0, n, settings) for n in range(MANY))
    assert taken[1] / MANY == pytest.approx(0.2, abs=0.01)
    assert {caption_of(2, 1, 0, n, settings, dropping=False) for n in range(100)} == {0}


def test_captions_grow_during_token_warm_up() -> None:
    settings = CaptionSettings(token_warmup_step=0.5, token_warmup_min=2, keep_tokens=1, text_variants=4, drop_as_empty=True,
                               caption_dropout_rate=0.1)  # fmt: skip
    made = variants(("k, a, b, c, d, e, f",), settings, "cat")
    lengths = [len(text.split(", ")) for text in made]
    assert lengths == [7, 7, 7, 7, 3, 4, 5, 6, 1] and made[-1] == ""
    assert all("k, a, b, c, d, e, f".startswith(text) for text in made)
    timed = settings.timed(updates_per_epoch=10, total_updates=80)  # half of the run: four epochs
    for epoch, stages in ((0, {4}), (1, {5}), (3, {7}), (4, {0, 1, 2, 3})):
        taken = {caption_of(9, 1, epoch, n, timed, of_epoch=50) for n in range(50)}
        assert taken - {8} == stages
    assert max(caption_of(9, 1, 0, n, timed, of_epoch=50, dropping=False) for n in range(50)) < 4
    assert settings.timed(10, 80).warmup_epochs == 4
    assert CaptionSettings(token_warmup_step=25).timed(10, 80).warmup_epochs == 2.5


def test_every_nth_epoch_has_no_captions() -> None:
    settings = CaptionSettings(caption_dropout_every_n_epochs=3, drop_as_empty=True)
    assert [{caption_of(2, 1, epoch, n, settings) for n in range(50)} for epoch in range(6)] == [{0}, {0}, {1}] * 2
