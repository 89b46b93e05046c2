"""The demo's pictures: what they show, what is held out, and a folder of them that can be made again."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from musubi_tuner.demo.pictures import (
    BACKGROUNDS,
    COLOURS,
    MAX_HELD_OUT,
    PLACES,
    SHAPES,
    Combination,
    combinations,
    draw,
    held_out,
    training_order,
    vocabulary,
    write_dataset,
)
from musubi_tuner.errors import DataError

pytestmark = pytest.mark.long

FIELDS = {"shape": SHAPES, "colour": COLOURS, "place": PLACES, "background": BACKGROUNDS}
RED_CIRCLE = Combination("circle", "red", "left", "white")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder except the lock, which is empty or names a process."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".dataset-lock"}


def test_there_are_216_different_combinations_in_a_fixed_order() -> None:
    assert len(set(combinations())) == len(combinations()) == 216
    assert combinations() == combinations()
    assert combinations()[0] == RED_CIRCLE


@pytest.mark.parametrize(
    ("place", "caption"),
    [
        ("left", "a red circle on the left of a white background"),
        ("middle", "a red circle in the middle of a white background"),
        ("right", "a red circle on the right of a white background"),
    ],
)
def test_captions_are_plain_sentences(place: str, caption: str) -> None:
    assert Combination("circle", "red", place, "white").caption == caption


def test_captions_tell_all_combinations_apart() -> None:
    assert len({combination.caption for combination in combinations()}) == 216


def test_vocabulary_is_small_and_holds_every_word_of_every_caption_once() -> None:
    words = vocabulary()
    assert words == sorted(set(words))
    assert len(words) <= 33
    assert {word for combination in combinations() for word in combination.caption.split()} == set(words)


def test_tones_of_colours_and_backgrounds_are_at_least_120_apart() -> None:
    tones = np.array([*COLOURS.values(), *BACKGROUNDS.values()], float)
    distance = np.linalg.norm(tones[:, None] - tones[None], axis=-1)
    backgrounds = slice(len(COLOURS), None)
    distance[backgrounds, backgrounds] = np.inf  # the greys differ in brightness only, so they are compared below
    assert distance[~np.eye(len(tones), dtype=bool)].min() >= 120
    assert np.diff(sorted(rgb[0] for rgb in BACKGROUNDS.values())).min() >= 100


def test_jitter_never_clips_a_tone() -> None:
    tones = np.array([*COLOURS.values(), *BACKGROUNDS.values()])
    assert tones.min() >= 8
    assert tones.max() <= 247


def test_same_generator_state_draws_the_same_picture() -> None:
    first, second = (draw(RED_CIRCLE, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_pictures_of_one_combination_differ() -> None:
    rng = np.random.default_rng(0)
    assert not np.array_equal(draw(RED_CIRCLE, rng), draw(RED_CIRCLE, rng))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64), (64, 96), (32, 32), (80, 48)])
def test_a_picture_has_the_size_that_was_asked_for(width: int, height: int) -> None:
    picture = draw(RED_CIRCLE, np.random.default_rng(0), width, height)
    assert picture.shape == (height, width, 3)
    assert picture.dtype == np.uint8


@pytest.mark.parametrize("combination", combinations()[::5], ids=lambda combination: combination.caption)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64), (64, 96)])
def test_shape_lies_at_its_place_inside_the_picture(combination: Combination, width: int, height: int) -> None:
    side = min(width, height)
    for seed in range(3):
        picture = draw(combination, np.random.default_rng(seed), width, height).astype(float)
        background = picture[0, 0]
        drawn = abs(picture - background).sum(axis=-1)
        rows, columns = np.nonzero(drawn > 0)
        # Jitter is 1 and 1.2 pixels of 64; half a pixel more for rounding. Shapes are placed by their centroid.
        assert (drawn.sum(0) * (np.arange(width) + 0.5)).sum() / drawn.sum() == pytest.approx(
            width * PLACES[combination.place], abs=side * 1 / 64 + 0.5
        )
        assert (drawn.sum(1) * (np.arange(height) + 0.5)).sum() / drawn.sum() == pytest.approx(
            height / 2, abs=side * 1.2 / 64 + 0.5
        )
        # Two radii wide (1.8 for a square), within a pixel on each side; no part is cut off.
        extent = columns.max() - columns.min() + 1
        assert 0.40 * side <= extent <= 0.49 * side + 2
        assert rows.min() > 0 and rows.max() < height - 1


def test_flat_parts_have_their_tone_within_the_jitter() -> None:
    for index, combination in enumerate(combinations()):
        picture = draw(combination, np.random.default_rng(index)).astype(int)
        centre = picture[32, round(64 * PLACES[combination.place])]
        assert abs(centre - COLOURS[combination.colour]).max() <= 8
        assert abs(picture[0, 32] - BACKGROUNDS[combination.background]).max() <= 5


def test_edges_are_smooth() -> None:
    picture = draw(Combination("circle", "red", "middle", "black"), np.random.default_rng(0))
    assert len(np.unique(picture[..., 0])) > 5


@pytest.mark.parametrize("seed", [0, 7])
def test_held_out_combinations_spread_over_all_values(seed: int) -> None:
    everything = held_out(MAX_HELD_OUT, seed)
    for count in range(MAX_HELD_OUT + 1):
        chosen = everything[:count]
        assert len(set(chosen)) == count
        for field, table in FIELDS.items():
            taken = Counter(getattr(combination, field) for combination in chosen)
            counts = [taken[value] for value in table]
            # The choice is greedy: where the values do not divide the count evenly, it may be off by one more.
            assert max(counts) - min(counts) <= 2, (field, count)


@pytest.mark.parametrize("seed", range(5))
def test_24_held_out_combinations_take_every_value_equally_often(seed: int) -> None:
    for field, table in FIELDS.items():
        taken = Counter(getattr(combination, field) for combination in held_out(24, seed))
        assert taken == dict.fromkeys(table, 24 // len(table))


@pytest.mark.parametrize("count", [24, MAX_HELD_OUT])
def test_every_value_and_every_pair_of_values_still_occurs_in_training(count: int) -> None:
    trained = set(combinations()) - set(held_out(count, 0))
    for first in FIELDS:
        for second in FIELDS:
            wanted = {(a, b) for a in FIELDS[first] for b in FIELDS[second] if first != second or a == b}
            assert {(getattr(c, first), getattr(c, second)) for c in trained} == wanted


def test_24_held_out_combinations_take_each_shape_in_each_colour_once() -> None:
    pairs = Counter((combination.shape, combination.colour) for combination in held_out(24, 0))
    assert set(pairs.values()) == {1}
    assert len(pairs) == 24


def test_held_out_combinations_follow_the_seed() -> None:
    assert held_out(24, 5) == held_out(24, 5)
    assert held_out(24, 5) != held_out(24, 6)


def test_a_larger_held_out_set_begins_with_the_smaller_one() -> None:
    for count in (0, 1, 24, 60):
        assert held_out(MAX_HELD_OUT, 1)[:count] == held_out(count, 1)


@pytest.mark.parametrize("count", [-1, MAX_HELD_OUT + 1])
def test_an_impossible_held_out_count_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"^cannot hold out {count} of 216 combinations; give 0 to 108$"):
        held_out(count, 0)


@pytest.mark.parametrize("count", [1, 191, 192, 500, 1536])
def test_training_uses_every_trained_combination_equally_often(count: int) -> None:
    order = training_order(count, 24, 0)
    used = Counter(order)
    assert len(order) == count
    assert not used.keys() & set(held_out(24, 0))
    counts = [used[combination] for combination in set(combinations()) - set(held_out(24, 0))]
    assert max(counts) - min(counts) <= 1


def test_training_order_is_shuffled_anew_every_round() -> None:
    order = training_order(2 * 192, 24, 0)
    unshuffled = [combination for combination in combinations() if combination in set(order)]
    assert order[:192] != order[192:]
    assert order[:192] != unshuffled


def test_written_folder_holds_pictures_captions_and_a_manifest(tmp_path: Path) -> None:
    assert write_dataset(tmp_path / "pictures", 20, 64, 24, 3) == 20
    order = training_order(20, 24, 3)
    names = {f"{index:05d}{suffix}" for index in range(20) for suffix in (".png", ".txt")}
    assert set(contents(tmp_path / "pictures")) == names | {"dataset.json"}
    for index, combination in enumerate(order):
        path = tmp_path / "pictures" / f"{index:05d}.png"
        assert path.with_suffix(".txt").read_text(encoding="utf-8") == combination.caption + "\n"
        rng = np.random.default_rng(np.random.SeedSequence([3, index]))
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(picture), draw(combination, rng))
    manifest = json.loads((tmp_path / "pictures" / "dataset.json").read_text(encoding="utf-8"))
    assert manifest == {"version": 1, "count": 20, "size": 64, "held": 24, "seed": 3, "complete": True}


def test_two_folders_of_one_seed_are_equal_byte_for_byte(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_dataset(tmp_path / name, 30, 64, 24, 0)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_a_longer_set_begins_with_the_shorter_one(tmp_path: Path) -> None:
    write_dataset(tmp_path / "short", 10, 64, 24, 0)
    write_dataset(tmp_path / "long", 20, 64, 24, 0)
    short, long = contents(tmp_path / "short"), contents(tmp_path / "long")
    del short["dataset.json"]
    assert short.items() <= long.items()


def test_another_seed_writes_other_pictures(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_dataset(tmp_path / str(seed), 5, 64, 24, seed)
    assert contents(tmp_path / "0")["00000.png"] != contents(tmp_path / "1")["00000.png"]


def test_a_complete_folder_is_left_alone(tmp_path: Path) -> None:
    write_dataset(tmp_path, 10, 64, 24, 0)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write_dataset(tmp_path, 10, 64, 24, 0) == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["00003.png", "00007.txt"])
def test_a_missing_file_is_made_again(tmp_path: Path, name: str) -> None:
    write_dataset(tmp_path, 10, 64, 24, 0)
    whole = contents(tmp_path)
    (tmp_path / name).unlink()
    assert write_dataset(tmp_path, 10, 64, 24, 0) == 10
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("changes", [{"size": 32}, {"held": 12}, {"seed": 1}, {"count": 4}, {"count": 14}])
def test_another_request_replaces_the_set_without_remains(tmp_path: Path, changes: dict[str, int]) -> None:
    wanted = {"count": 10, "size": 64, "held": 24, "seed": 0}
    write_dataset(tmp_path / "reused", **wanted)
    wanted |= changes
    assert write_dataset(tmp_path / "reused", **wanted) == wanted["count"]
    write_dataset(tmp_path / "fresh", **wanted)
    assert contents(tmp_path / "reused") == contents(tmp_path / "fresh")


def write_and_die(folder: Path, seed: int, fault: str) -> None:
    """Begin to write ten pictures in another process, which kills itself at the named point."""
    code = (
        "import sys; from pathlib import Path; from musubi_tuner.demo.pictures import write_dataset; "
        "write_dataset(Path(sys.argv[1]), 10, 64, 24, int(sys.argv[2]))"
    )
    environment = {**os.environ, "MUSUBI_FAULT": fault}
    killed = subprocess.run([sys.executable, "-c", code, str(folder), str(seed)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL


@pytest.mark.parametrize("fault", ["file.written:1", "file.written:2", "file.renamed:2", "file.written:15"])
def test_a_killed_writer_can_be_continued(tmp_path: Path, fault: str) -> None:
    write_and_die(tmp_path / "killed", 0, fault)
    assert write_dataset(tmp_path / "killed", 10, 64, 24, 0) == 10
    write_dataset(tmp_path / "whole", 10, 64, 24, 0)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_half_replaced_set_is_not_taken_for_a_complete_one(tmp_path: Path) -> None:
    write_dataset(tmp_path / "killed", 10, 64, 24, 0)
    write_and_die(tmp_path / "killed", 1, "file.written:12")
    assert write_dataset(tmp_path / "killed", 10, 64, 24, 1) == 10
    write_dataset(tmp_path / "whole", 10, 64, 24, 1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["00001.png", "holiday.png", "notes.txt"])
def test_a_folder_with_other_pictures_is_refused_and_untouched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(DataError, match=rf"holds {name} but no readable dataset\.json.*give demo\.folder an empty"):
        write_dataset(tmp_path, 5, 64, 24, 0)
    assert contents(tmp_path) == {name: b"precious"}


def test_a_folder_that_another_process_writes_to_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from musubi_tuner.files import folder_lock\n"
        "with folder_lock(Path(sys.argv[1]), RuntimeError, '.dataset-lock'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            DataError, match=rf"process {holder.pid} on .* is drawing the demo's pictures here; wait for it"
        ):
            write_dataset(tmp_path, 5, 64, 24, 0)
        holder.communicate("")
    assert write_dataset(tmp_path, 5, 64, 24, 0) == 5


def test_pictures_and_checker_import_without_torch() -> None:
    code = "import sys, musubi_tuner.demo.pictures, musubi_tuner.demo.checker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
