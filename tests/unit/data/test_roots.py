"""What has an id keeps it: lists that grow, shrink and move, and cache folders from before `cache.json`."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from musubi_tuner.caching.file_format import cache_path
from musubi_tuner.data.item import Item
from musubi_tuner.data.roots import NAME
from musubi_tuner.data.sources import ScannedItems, scan
from musubi_tuner.stamps import hashed_state

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def picture(path: str) -> str:
    """A picture whose colour is made of its path."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), tuple(hashlib.sha256(path.encode()).digest()[:3])).save(file)
    return path


@pytest.fixture
def listed(dataset: Callable[..., object]) -> Callable[..., ScannedItems]:
    """Scan a list of pictures that has its caches in ``cache``, or where ``cache`` says."""

    def look(paths: Sequence[str], cache: str = "cache", captions: str = "a caption") -> ScannedItems:
        rows = [json.dumps({"image_path": path, "caption": captions}) for path in paths]
        Path("list.jsonl").write_text("\n".join(rows))
        return scan([dataset(image_jsonl_file=Path("list.jsonl"), cache_directory=Path(cache))], "tf")  # type: ignore[list-item]

    return look


def ids(found: ScannedItems) -> dict[str, str]:
    """Path -> id."""
    return {item.path.as_posix(): item.id for item in found.items}


def write_caches(items: Sequence[Item], kinds: Sequence[str] = ("latents", "text")) -> None:
    """What jobs leave, as far as ids go."""
    for item in items:
        for kind in kinds:
            made = {"item": item.id} | (
                {"image": hashed_state(item.path)} if kind == "latents" else {"caption": item.caption}
            )
            path = cache_path(item, kind, "tf")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"x_float32": torch.zeros(1)}, path, metadata={"fingerprint": json.dumps(made)})


def fill(found: ScannedItems) -> dict[str, str]:
    """Make the caches, as a job does, and return the ids."""
    write_caches(found.items)
    for root in found.roots:
        root.keep()
    return ids(found)


A = [f"pics/a/p0{number}.png" for number in range(4)]
Listed = Callable[..., ScannedItems]


def has(found: ScannedItems, before: dict[str, str]) -> bool:
    """Whether all pictures that had an id still have it."""
    return {path: name for path, name in ids(found).items() if path in before} == before


def test_the_first_pictures_are_named_by_their_common_parent_which_is_kept(listed: Listed, tmp_path: Path) -> None:
    found = fill(listed([picture(path) for path in A]))
    assert list(found.values()) == ["p00", "p01", "p02", "p03"]
    assert json.loads(Path("cache", NAME).read_text()) == {"version": 1, "roots": [str(tmp_path / "pics" / "a")]}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "made before"])
@pytest.mark.parametrize(
    "new",
    [["pics/b/p01.png"], ["pics/p01.png"], ["other/b/x/p01.png"], [f"pics/b/p0{n}.png" for n in range(9)]],
    ids=str,
)
def test_pictures_of_other_folders_change_no_id(listed: Listed, new: list[str], kept: bool) -> None:
    """Their stems are those of pictures with caches, and there may be more of them."""
    before = fill(listed([picture(path) for path in A]))
    if not kept:
        Path("cache", NAME).unlink()
    found = listed([*[picture(path) for path in new], *A])
    assert has(found, before)
    later = ids(found)
    assert len(set(later.values())) == len(later)
    for path in new:
        folder, stem = later[path].split("/")
        assert stem == Path(path).stem
        assert folder.startswith(f"{Path(path).parent.name}-")
    fill(found)
    assert ids(listed([*A, *new, picture("third/q.png")])) | later == ids(listed([*A, *new, "third/q.png"]))
    assert has(listed([*new, *A]), later)


def test_a_picture_from_elsewhere_has_one_id_whatever_else_is_listed(listed: Listed) -> None:
    fill(listed([picture(path) for path in A]))
    one = ids(listed([*A, picture("pics/b/q.png")]))["pics/b/q.png"]
    assert ids(listed([A[0], "pics/b/q.png", picture("pics/c/q.png")]))["pics/b/q.png"] == one


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "made before"])
def test_a_list_that_shrinks_to_one_folder_keeps_its_ids(listed: Listed, kept: bool) -> None:
    before = fill(listed([picture(path) for path in [*A, "pics/b/p01.png"]]))
    assert before["pics/b/p01.png"] == "b/p01"
    if not kept:
        Path("cache", NAME).unlink()
    assert ids(listed(["pics/b/p01.png"])) == {"pics/b/p01.png": "b/p01"}


def test_a_folder_of_texts_alone_is_known_by_its_captions(listed: Listed) -> None:
    before = listed([picture(path) for path in A])
    write_caches(before.items, ["text"])
    assert has(listed([*A, picture("pics/b/q.png")]), ids(before))


def test_a_folder_of_pictures_that_becomes_a_list_keeps_its_ids(listed: Listed, dataset: Callable[..., object]) -> None:
    for path in ("pics/a/x/p00.png", "pics/a/p00.png"):
        Path(picture(path)).with_suffix(".txt").write_text("a caption")
    folder = dataset(image_directory=Path("pics"), cache_directory=Path("cache"), recursive=True)
    before = fill(scan([folder], "tf"))  # type: ignore[list-item]
    assert not Path("cache", NAME).exists()
    assert has(listed(["pics/a/p00.png", "pics/a/x/p00.png", picture("b/p00.png")]), before)
    assert ids(listed(["pics/a/x/p00.png"])) == {"pics/a/x/p00.png": "a/x/p00"}


@pytest.mark.parametrize("original", ["stays", "goes"])
def test_data_and_caches_that_are_moved_together_keep_their_ids(listed: Listed, original: str) -> None:
    fill(listed([picture(path) for path in A]))
    before = fill(listed([*A, picture("pics/b/p01.png")]))
    (shutil.copytree if original == "stays" else shutil.move)("pics", "moved/set/pics")
    (shutil.copytree if original == "stays" else shutil.move)("cache", "moved/cache")
    found = listed([f"moved/set/{path}" for path in before] + [picture("moved/set/pics/c/p01.png")], "moved/cache")
    assert has(found, {f"moved/set/{path}": name for path, name in before.items()})


def test_data_that_moves_below_its_own_root_keeps_its_ids(listed: Listed) -> None:
    """All pictures lie below the root that is kept, yet none has its id there."""
    before = fill(listed([picture("pics/a/p.png"), picture("pics/b/p.png")]))
    Path("pics/old").mkdir()
    for name in ("a", "b"):
        shutil.move(f"pics/{name}", f"pics/old/{name}")
    found = ids(listed(["pics/old/a/p.png", "pics/old/b/p.png"]))
    assert sorted(found.values()) == sorted(before.values()) == ["a/p", "b/p"]


def test_machines_with_the_data_at_places_of_their_own_agree_and_the_file_comes_to_rest(listed: Listed) -> None:
    first = listed([picture(path) for path in A])
    fill(first)
    shutil.copytree("pics", "mnt/pics")
    picture("mnt/pics/c/q.png")
    picture("pics/c/q.png")
    seen = []
    for _ in range(3):
        for place in ("", "mnt/"):
            found = listed([place + path for path in [*A, "pics/c/q.png"]])
            fill(found)
            seen.append((ids(found)[place + A[0]], ids(found)[f"{place}pics/c/q.png"]))
    assert len(set(seen)) == 1
    assert len(json.loads(Path("cache", NAME).read_text())["roots"]) == 2


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "made before"])
def test_another_list_of_equal_names_takes_no_ids_over(listed: Listed, kept: bool) -> None:
    """Two runs share a cache folder; both have a picture 0001. Only a folder without `cache.json` cannot tell."""
    before = fill(listed([picture("a/0001.png"), picture("a/0002.png")]))
    if not kept:
        Path("cache", NAME).unlink()
        assert has(listed(["a/0001.png", "a/0002.png", picture("b/0001.png")]), before)
        return
    other = fill(listed([picture("b/0001.png"), picture("b/0003.png")]))
    assert not set(other.values()) & set(before.values())
    assert ids(listed(["a/0001.png", "a/0002.png"])) == before
    assert ids(listed(["b/0001.png", "b/0003.png"])) == other


def test_spellings_of_a_path_make_no_difference(listed: Listed, tmp_path: Path) -> None:
    for path in A:
        picture(path)
    Path("lists").mkdir()
    spelled = [A[0], f"./{A[1]}", f"lists/../{A[2]}", str(tmp_path / A[3])]
    assert sorted(ids(listed(spelled)).values()) == ["p00", "p01", "p02", "p03"]


def test_scanning_writes_nothing(listed: Listed) -> None:
    listed([picture(path) for path in A])
    assert not Path("cache").exists()
    write_caches(listed(A).items)
    before = sorted(Path("cache").rglob("*"))
    listed([*A, picture("pics/b/p01.png")])
    assert sorted(Path("cache").rglob("*")) == before


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"version": 2, "roots": ["/x"]}', '{"version": 1}'])
def test_a_damaged_file_is_found_out_again(listed: Listed, content: str) -> None:
    before = fill(listed([picture(path) for path in A]))
    Path("cache", NAME).write_text(content)
    found = listed([*A, picture("pics/b/p01.png")])
    assert has(found, before)
    fill(found)
    assert json.loads(Path("cache", NAME).read_text())["version"] == 1


@pytest.mark.parametrize("name", ["x" * 60, "a b", "äöü"])
def test_folders_of_any_name_give_ids(listed: Listed, name: str) -> None:
    fill(listed([picture(path) for path in A]))
    found = ids(listed([*A, picture(f"{name}/p00.png")]))
    folder = found[f"{name}/p00.png"].partition("/")[0]
    assert folder.startswith(name[:40])
    assert len(folder) <= 51
