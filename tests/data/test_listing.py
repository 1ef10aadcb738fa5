"""Image folders in the states in which users and operating systems leave them."""

import os
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from qat_runner.data import array_cache, listing
from qat_runner.data.folder import FolderSource
from qat_runner.data.listing import Listing, class_folders, list_images, printable

NAMES = st.text("ab-_. é🙂\n0", min_size=1, max_size=4).filter(lambda name: not name.startswith("."))


@given(
    files=st.sets(
        st.tuples(NAMES, st.lists(NAMES, max_size=2).map(tuple), NAMES, st.sampled_from([".JPEG", ".png", ".txt"]))
    )
)
def test_order_and_classes_are_those_of_torchvision(files: set[tuple[str, tuple[str, ...], str, str]]) -> None:
    with TemporaryDirectory() as place:
        for name, between, stem, suffix in [("one", (), "0", ".jpg"), *files]:
            folder = Path(place, name, *(f"{part}_" for part in between))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{stem}{suffix}").touch()
        theirs = ImageFolder(place, allow_empty=True)
        empty = set(range(len(theirs.classes))) - set(theirs.targets)
        if empty:
            with pytest.raises(ValueError, match="class folders without images"):
                list_images(Path(place))
        else:
            ours = list_images(Path(place))
            assert ours.classes == theirs.classes == class_folders(Path(place))
            assert [(ours.name(i), label) for i, label in enumerate(ours.labels)] == theirs.samples
            texts = sum(suffix == ".txt" for *_, suffix in files)
            assert ours.passed_over == (f"{texts} without an image suffix (.txt)" if texts else "")


def make(root: Path) -> None:
    """Create train/ and val/ with the classes a and b, each with 0.jpg."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(root / split / name / "0.jpg")


def _in_both(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        for split in ("train", "val"):
            change(root / split)

    return apply


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def _raw(split: Path) -> None:
    os.rename(split / "b", os.fsencode(split) + b"/b\xff")


def _crowd(split: Path) -> None:
    """Create folders that all link to each other, with millions of paths through them."""
    for i in range(12):
        (split / "a" / f"f{i}").mkdir()
        for j in range(12):
            (split / "a" / f"f{i}" / f"to{j}").symlink_to(split / "a" / f"f{j}")


CARELESS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    # what is done to the folder, number of images in val/ afterwards, note about val/
    "nothing": (lambda r: None, 2, ""),
    "Jupyter's copies": (_in_both(lambda h: (h / ".ipynb_checkpoints").mkdir()), 2, "1 hidden"),
    "Jupyter's copies in a class": (lambda r: (r / "val/a/.ipynb_checkpoints").mkdir(), 2, "1 hidden"),
    "macOS": (lambda r: [(r / "val" / name).touch() for name in (".DS_Store", "a/._0.jpg")], 2, "2 hidden"),
    "a zip of macOS": (_in_both(lambda h: (h / "__MACOSX" / "a").mkdir(parents=True)), 2, "1 hidden"),
    "Windows": (lambda r: (r / "val/a/Thumbs.db").touch(), 2, "1 hidden"),
    "other files": (
        lambda r: [(r / "val/a" / name).touch() for name in ("x.txt", "y.txt", "z.xml", "LICENSE", "0.jpg.part")],
        2,
        "5 without an image suffix (.txt, .part, .xml, no suffix)",
    ),
    "a pipe": (lambda r: os.mkfifo(r / "val/a/1.jpg"), 2, "1 that are neither files nor folders (the first is "),
    "a socket": (lambda r: _socket(r / "val/a/1.jpg"), 2, "1 that are neither"),
    "a device": (lambda r: (r / "val/a/1.jpg").symlink_to("/dev/zero"), 2, "1 that are neither"),
    "a link to nothing": (lambda r: (r / "val/a/1.jpg").symlink_to("gone.jpg"), 2, "1 that are neither"),
    "a link to itself": (lambda r: (r / "val/a/1.jpg").symlink_to("1.jpg"), 2, "1 that are neither"),
    "an image beside the classes": (lambda r: (r / "val/1.jpg").touch(), 2, "1 images outside the class folders"),
    "a link to an image": (lambda r: (r / "val/a/1.jpg").symlink_to(r / "val/b/0.jpg"), 3, ""),
    "a link to a folder": (lambda r: (r / "val/a/more").symlink_to(r / "val/b"), 3, ""),
    "a class that is a link": (
        lambda r: ((r / "val/b").rename(r / "elsewhere"), (r / "val/b").symlink_to(r / "elsewhere")),
        2,
        "",
    ),
    "a loop": (lambda r: (r / "val/a/loop").symlink_to(r / "val/a"), 2, "1 links to folders already read"),
    "a loop over both": (lambda r: (r / "val/a/up").symlink_to(r), 2, "1 links to folders already read"),
    "folders that link to each other": (lambda r: _crowd(r / "val"), 2, "144 links to folders already read"),
    "folders in folders": (lambda r: (r / "val/a/0.jpg").rename(_made(r / "val/a/images") / "0.jpg"), 2, ""),
    "a deep folder": (lambda r: _made(r / "val/a" / "/".join("x" * 300)), 2, ""),
    "a newline": (lambda r: (r / "val/a/0.jpg").rename(r / "val/a/0\n1.jpg"), 2, ""),
    "a name of bytes": (_in_both(_raw), 2, ""),
    "an emoji and spaces": (_in_both(lambda h: (h / "b").rename(h / "b 🙂 x ")), 2, ""),
    "capitals": (lambda r: (r / "val/a/0.jpg").rename(r / "val/a/0.JPEG"), 2, ""),
    "another kind of image": (lambda r: Image.new("P", (9, 9)).save(r / "val/a/1.gif"), 3, ""),
}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", CARELESS)
def test_careless_folders(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    change, images, line = CARELESS[name]
    change(tmp_path)
    source = FolderSource(tmp_path, 8, 0)
    assert (len(source.classes), source.val_size) == (2, images)
    notes = [note for note in source.notes if note.startswith("val/: skipped ")]
    assert len(notes) == bool(line)
    assert line in "".join(notes)
    assert all(note.isprintable() for note in source.notes)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty class": (
        _in_both(lambda h: _made(h / "c")),
        "train: class folders without images: c; images must end in .jpg",
    ),
    "only other files": (
        _in_both(lambda h: (_made(h / "c") / "0.heic").touch()),
        r"train: class folders without images: c \(skipped 1 without an image suffix \(\.heic\)\)",
    ),
    "many empty classes": (
        lambda r: [_made(r / f"val/c{i}") for i in range(9)],
        r"val: class folders without images: c0, c1, c2, c3, c4 and 4 more",
    ),
    "a class of train alone": (
        lambda r: (_made(r / "train/c") / "0.jpg").touch(),
        "must have the same class folders: train/ has c, but val/ does not",
    ),
    "a class of val alone": (
        lambda r: [(_made(r / f"val/{name}") / "0.jpg").touch() for name in ("A", "c")],
        "must have the same class folders: val/ has A, but train/ does not",
    ),
    "no classes": (
        lambda r: [(r / "val" / n).rename(r / n) for n in "ab"],
        "the folder must contain train/ and val/ with a folder of images for each class, or tar shards",
    ),
    "a class that leads upwards": (lambda r: (r / "val/c").symlink_to(r / "val"), "without images: c"),
    "a class that leads to everything": (lambda r: (r / "val/c").symlink_to("/"), "without images: c"),
    "a name of bytes": (lambda r: _raw(r / "val"), r"train/ has b, but val/ does not"),
    "a name of bytes alone": (
        lambda r: os.makedirs(os.fsencode(r) + b"/val/z\xff\n"),
        r"without images: 'z\\udcff\\n'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_folders(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    change, message = REFUSED[name]
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        FolderSource(tmp_path, 8, 0)
    assert str(caught.value).isprintable()


def test_a_folder_that_is_closed_to_us_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    scandir = os.scandir

    def closed(folder: str) -> object:
        if folder.endswith("b"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match=r"train/b cannot be read \(Permission denied\)"):
        list_images(tmp_path / "train")


def fields(listing: Listing) -> dict[str, object]:
    return {key: array.tolist() for key, array in listing.arrays().items()}


CHANGED = CARELESS | {
    "an image is gone": (lambda r: (r / "val/a/1.png").unlink(), 2, ""),
    "a link leads to nothing": (lambda r: (r / "to").unlink(), 2, ""),
    "a link leads elsewhere": (lambda r: ((r / "to").unlink(), (r / "to").symlink_to("val")), 2, ""),
    "an image behind a link is gone": (lambda r: (r / "one.jpg").unlink(), 2, ""),
    "an image behind a link is there": (lambda r: (r / "two.jpg").touch(), 2, ""),
    "a link that led in a circle leads to others": (
        lambda r: ((r / "back").unlink(), (r / "back").symlink_to(r / "to")),
        2,
        "",
    ),
    "a folder with the name of an image": (
        lambda r: (r / "val/a/0.jpg").rename(_made(r / "val/a/2.jpg") / "x"),
        2,
        "",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_kept_listing_holds_until_something_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Every change to a folder is noticed: the listing equals one without a cache."""
    monkeypatch.setattr(array_cache, "TIMESTAMP_MARGIN", 0)
    make(tmp_path)
    split, far = tmp_path / "val", _made(tmp_path / "far")
    for path in (far / "x.jpg", tmp_path / "one.jpg", split / "a" / "1.png"):
        path.touch()
    links = {"to": far, "back": split / "a", "val/a/far": "../../to", "val/a/circle": "../../back"}
    links |= {"val/a/one.jpg": "../../one.jpg", "val/a/two.jpg": "../../two.jpg"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    tick()
    first = fields(list_images(split))
    assert len([*cache.iterdir()]) == 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", None)  # no folder is read
        assert fields(list_images(split)) == first
    CHANGED[name][0](tmp_path)
    tick()
    seen = fields(list_images(split))
    for file in cache.iterdir():
        file.unlink()
    assert seen == fields(list_images(split))


def tick() -> None:
    """Wait until the timestamps of the file system have advanced."""
    time.sleep(0.01)


def test_what_has_just_changed_is_not_kept(tmp_path: Path, cache: Path) -> None:
    """A folder that has just changed might change again with the same timestamp."""
    make(tmp_path)
    list_images(tmp_path / "val")
    assert not [*cache.iterdir()]


@pytest.mark.parametrize("damage", ["cut", "empty", "a byte", "other arrays", "labels", "firsts", "pickled"])
def test_a_damaged_listing_is_made_anew(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(array_cache, "TIMESTAMP_MARGIN", 0)
    make(tmp_path)
    tick()
    first = fields(list_images(tmp_path / "val"))
    (file,) = cache.iterdir()
    content, arrays = file.read_bytes(), array_cache.load_arrays(file)
    match damage:
        case "cut" | "empty":
            file.write_bytes(content[: 0 if damage == "empty" else -100])
        case "a byte":
            at = content.index(b"0.jpg")
            file.write_bytes(content[:at] + b"1" + content[at + 1 :])
        case "other arrays":
            np.savez(file, names=np.zeros(3))
        case "pickled":
            np.savez(file, **arrays | {"labels": np.array([print, None])})
        case _:
            np.savez(file, **arrays | {damage: arrays[damage] + 7})
    assert fields(list_images(tmp_path / "val")) == first
    assert fields(Listing.from_arrays("val", array_cache.load_arrays(file))) == first


def test_without_a_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_cache, "TIMESTAMP_MARGIN", 0)
    monkeypatch.setattr(listing, "cache_folder", lambda: tmp_path / "train" / "a" / "0.jpg" / "cache")
    make(tmp_path)
    tick()
    assert len(list_images(tmp_path / "val").labels) == 2


def test_a_listing_is_flat(tmp_path: Path) -> None:
    """A listing needs little more memory than its names: no Python object per image, which every worker would copy."""
    for name in ("a", "b"):
        _made(tmp_path / name)
        for i in range(300):
            (tmp_path / name / f"{i:030}.jpg").touch()
    assert len(pickle.dumps(list_images(tmp_path))) < 600 * (34 + 8 + 4) + 2000


def test_names_on_one_line() -> None:
    assert printable("a b 🙂/0.jpg") == "a b 🙂/0.jpg"
    assert printable("a\nb") == r"'a\nb'"
    assert printable(os.fsdecode(b"b\xff")) == r"'b\udcff'"
