"""The same images as class folders, as tar shards and as parquet files."""

import gzip
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from qat_runner.cli import _OF_EXTRAS
from qat_runner.config import DatasetConfig
from qat_runner.data import Delivery, load_dataset, shards
from qat_runner.data import parquet as parquet_files
from qat_runner.data.batches import Shard
from qat_runner.data.folder import FolderSource
from qat_runner.data.layouts import CONTENT, find_layout, read_images
from qat_runner.data.registry import find_dataset
from qat_runner.errors import ConfigError

CONFIG = DatasetConfig(name="imagefolder", image_size=8, mean=[0.5], std=[0.25], workers=0)
CLASSES = ["ant", "bee", "cat"]
COLUMNS = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
Samples = list[tuple[str, bytes, int]]


def samples(folder: Path, split: str) -> Samples:
    """Return the name, content and label of each image in class folders, in shuffled order."""
    found = [(path.name, path.read_bytes(), CLASSES.index(path.parent.name)) for path in folder.glob(f"{split}/*/*")]
    order = np.random.default_rng(1).permutation(len(found))
    return [sorted(found)[i] for i in order]


def members(some: Samples, *, suffix: str = "cls") -> Iterator[tuple[str, bytes]]:
    for name, content, label in some:
        yield name, content
        text = str(label) if suffix == "cls" else json.dumps({"label": label, "width": 9})
        yield f"{name.partition('.')[0]}.{suffix}", text.encode()


def write_tar(path: Path, files: Iterator[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_parquet(path: Path, some: Samples, names: list[str] | None = CLASSES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"image": {"bytes": content, "path": name}, "label": label} for name, content, label in some]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    text = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    parquet.write_table(pa.Table.from_pylist(rows, COLUMNS.with_metadata(text)), path, row_group_size=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Nine training and six validation images, JPEGs and PNGs, in the three layouts."""
    root, random = tmp_path_factory.mktemp("layouts"), np.random.default_rng(0)
    plain, tars, hub = (root / name for name in ("plain", "tars", "hub"))
    for split, count in (("train", 3), ("val", 2)):
        for name in CLASSES:
            (plain / split / name).mkdir(parents=True)
            for i in range(count):
                smooth = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((40, 30 + i))
                smooth.save(plain / split / name / f"{name}_{9 + i}{'.JPEG' if i else '.png'}")
    for split, word in (("train", "train"), ("val", "validation")):
        some = samples(plain, split)
        write_tar(tars / f"things-{word}-0000.tar", members(some[:4]))
        write_tar(tars / f"things-{word}-0001.tar", members(some[4:], suffix="json"))
        write_parquet(hub / "data" / f"{word}-00000-of-00002.parquet", some[:5])
        write_parquet(hub / "data" / f"{word}-00001-of-00002.parquet", some[5:])
    return {"class folders": plain, "tar shards": tars, "parquet files": hub}


def batches(folder: Path, workers: int, shard: Shard, start: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = FolderSource(folder, 16, workers)
    return [
        *source.train(4, 3, 0, range(start, 2), shard),
        *source.train(4, 3, 1, range(2), shard),
        *source.val(4, range(2), shard),
    ]


@pytest.mark.parametrize("layout", ["tar shards", "parquet files"])
@pytest.mark.parametrize(("workers", "shard", "start"), [(0, Shard(), 1), (2, Shard(), 0), (0, Shard(1, 2), 0)])
def test_batches_are_the_same_in_every_layout(
    folders: dict[str, Path], layout: str, workers: int, shard: Shard, start: int
) -> None:
    usual = batches(folders["class folders"], 0, shard, start)
    for (images, labels), (same, kinds) in zip(usual, batches(folders[layout], workers, shard, start), strict=True):
        assert images.equal(same) and labels.equal(kinds)


def test_layouts_are_found_by_looking(folders: dict[str, Path], tmp_path: Path) -> None:
    for layout, folder in folders.items():
        assert find_layout(folder) == layout
    assert find_layout(tmp_path) is None
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "train/n01440764.tar", "train-0000.tar.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_layout(tmp_path) is None
    for name in ("train/00000.tar", "validation/00000.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_layout(tmp_path) == "tar shards"


def test_two_layouts_or_none_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found in data_dir=") as none:
        find_dataset(CONFIG, str(tmp_path))
    shutil.copytree(folders["tar shards"], tmp_path, dirs_exist_ok=True)
    shutil.copytree(folders["parquet files"], tmp_path, dirs_exist_ok=True)
    with pytest.raises(
        ConfigError, match="the folder contains tar shards and parquet files; remove all but one"
    ) as both:
        find_dataset(CONFIG, str(tmp_path))
    for refused in (none, both):
        assert CONTENT in str(refused.value) and "\n" not in str(refused.value)


def test_parquet_files_need_an_extra(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat_runner.data.layouts.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as missing:
        find_layout(folders["parquet files"])
    assert _OF_EXTRAS[missing.value.name] == "parquet"
    assert find_layout(folders["tar shards"]) == "tar shards"


def test_names_of_classes(folders: dict[str, Path], tmp_path: Path) -> None:
    assert read_images(folders["class folders"]).classes == CLASSES
    assert read_images(folders["tar shards"]).classes == ["0", "1", "2"]
    assert read_images(folders["parquet files"]).classes == CLASSES
    for layout in ("tar shards", "parquet files"):
        named = tmp_path / layout
        shutil.copytree(folders[layout], named)
        (named / "classes.txt").write_text("Ameise\nBiene\nKatze\n")
        assert read_images(named).classes == ["Ameise", "Biene", "Katze"]
        (named / "classes.txt").write_text("Ameise\nBiene\n")
        with pytest.raises(ValueError, match=r"train: an image has class 2, but classes\.txt lists classes 0 to 1"):
            read_images(named)
        (named / "classes.txt").write_text("Ameise\nBiene\nKatze\nDachs\n")
        with pytest.raises(ValueError, match=r"train: class 3 has no images; each of the classes 0 to 3 must"):
            read_images(named)


def test_an_index_is_kept_until_a_shard_changes(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in folders["tar shards"].glob("*train*"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr("qat_runner.data.array_cache.TIMESTAMP_MARGIN", -(10**12))
    paths = sorted(tmp_path.glob("*.tar"))
    first = shards.read_shards(paths)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        again = shards.read_shards(paths)
    assert [again.content(i) for i in range(9)] == [first.content(i) for i in range(9)]
    write_tar(paths[1], members([("z.png", b"new", 1)]))
    changed = shards.read_shards(paths)
    (new,) = (i for i in range(5) if changed.name(i) == f"{paths[1]}/z.png")
    assert (len(changed.labels), changed.labels[new], changed.content(new)) == (5, 1, b"new")
    copy = pickle.loads(pickle.dumps(changed))
    assert not copy._open and changed._open and copy.content(new) == b"new"


def test_few_shards_are_open_at_a_time(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN", 1)
    images = read_images(folders["tar shards"]).splits["train"]
    plain = read_images(folders["class folders"]).splits["train"]
    for i in range(9):
        assert images.content(i) == plain.content(i)
        assert len(images._open) == 1


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_sets_that_are_not_whole_are_refused(suffix: str, folders: dict[str, Path], tmp_path: Path) -> None:
    kind = "tar shards" if suffix == "tar" else "parquet files"
    data = Path(shutil.copytree(folders[kind], tmp_path / "all"))
    (data / "train").mkdir()
    some = [path for path in sorted(data.rglob(f"*.{suffix}")) if "train" in path.name]
    for number, path in enumerate(some):
        path.rename(path.with_name(f"train-0000{number}-of-0000{len(some)}.{suffix}"))
    some = [path.with_name(f"train-0000{number}-of-0000{len(some)}.{suffix}") for number, path in enumerate(some)]
    read_images(data)
    other = some[0].with_name(some[0].name.replace(f"-of-0000{len(some)}", "-of-00009"))
    shutil.copy(some[0], other)
    with pytest.raises(ValueError, match=rf"train: there are sets of {len(some)} and 9 files; remove"):
        read_images(data)
    other.rename(data / "train" / some[0].name)
    with pytest.raises(ValueError, match=r"train: .* and .* have the same name; remove one of them"):
        read_images(data)
    (data / "train" / some[0].name).unlink()
    some[0].unlink()
    with pytest.raises(
        ValueError, match=rf"train: only {len(some) - 1} of {len(some)} files are there, such as train-0"
    ):
        read_images(data)


def _cut(at: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:at])


BAD_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "compressed": (
        lambda p: p.write_bytes(gzip.compress(p.read_bytes())),
        r"train-0\.tar is compressed by gzip, which does not allow random access; shards must be plain tar",
    ),
    "compressed by name": (
        lambda p: p.with_name("train-1.tar.gz").write_bytes(gzip.compress(p.read_bytes())),
        r"train-1\.tar\.gz is compressed by gzip",
    ),
    "empty": (lambda p: p.write_bytes(b""), "is not a tar file, or is damaged"),
    "text": (lambda p: p.write_text("<html>404 Not Found</html>" * 99), "is not a tar file, or is damaged"),
    "cut in an image": (_cut(600), r"train-0\.tar is (truncated or|not a tar file, or is) damaged"),
    "cut in a head": (_cut(1100), r"train-0\.tar is (truncated or|not a tar file, or is) damaged"),
    "cut between members": (_cut(1024), r"train-0\.tar is truncated or damaged: no end-of-archive mark at byte"),
    "a hole": (
        lambda p: p.write_bytes(p.read_bytes()[:2048] + bytes(1024) + p.read_bytes()[3072:]),
        "is damaged or contains several tar files: data follow the end of one at byte 2048",
    ),
    "zeros to the end": (
        lambda p: p.write_bytes(p.read_bytes()[:2048] + bytes(2 << 20)),
        "is damaged or contains several tar files: data follow the end of one at byte 2048",
    ),
    "two in one": (lambda p: p.write_bytes(2 * p.read_bytes()), "is damaged or contains several tar files"),
    "damaged": (
        lambda p: p.write_bytes(p.read_bytes()[:1024] + b"x" * 512 + p.read_bytes()[1536:]),
        "is truncated or damaged",
    ),
    "no label": (
        lambda p: write_tar(p, iter([("a.jpg", b"")])),
        r'a\.jpg has no class: there must be a\.cls with its index, or a\.json with a "label"',
    ),
    "no number": (
        lambda p: write_tar(p, iter([("a.jpg", b""), ("a.cls", b"cat")])),
        r"a\.cls contains 'cat'; must be a class index, 0 to 99999",
    ),
    "negative": (lambda p: write_tar(p, iter([("a.jpg", b""), ("a.cls", b"-1")])), "contains '-1'"),
    "another json": (lambda p: write_tar(p, iter([("a.jpg", b""), ("a.json", b"[1]")])), "has no class"),
    "two images": (
        lambda p: write_tar(p, iter([("a.jpg", b""), ("a.png", b""), ("a.cls", b"0")])),
        "two images have the name a",
    ),
    "no images": (
        lambda p: write_tar(p, iter([("a.txt", b""), ("._b", b"")])),
        r"contain no images \(skipped 1 hidden; 1 without an image suffix \(\.txt\)\)",
    ),
    "classes from 1": (
        lambda p: write_tar(p, iter([("a.jpg", b""), ("a.cls", b"1")])),
        "train: class 0 has no images; each of the classes 0 to 1 must have some",
    ),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_bad_shards_are_told_in_a_sentence(tmp_path: Path, name: str) -> None:
    change, message = BAD_SHARDS[name]
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}-0.tar", members([("a.jpg", b"a", 0), ("b.jpg", b"b", 0)]))
    change(tmp_path / "train-0.tar")
    with pytest.raises(ConfigError, match=message) as caught:
        load_dataset(CONFIG, str(tmp_path), Delivery(torch.device("cpu"), seed=0))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("layout", ["class folders", "tar shards", "parquet files"])
def test_a_single_class_is_refused(layout: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for split in ("train", "val"):
        only = [sample for sample in samples(folders["class folders"], split) if sample[2] == 0]
        if layout == "class folders":
            shutil.copytree(folders[layout] / split / "ant", tmp_path / split / "ant")
        elif layout == "tar shards":
            write_tar(tmp_path / f"{split}-0.tar", members(only))
        else:
            write_parquet(tmp_path / f"{split}-0.parquet", only, ["ant"])
    with pytest.raises(ConfigError, match="has images of one class only; two or more are needed"):
        load_dataset(CONFIG, str(tmp_path), Delivery(torch.device("cpu"), seed=0))


def test_hidden_shards_are_passed_over(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["tar shards"], tmp_path, dirs_exist_ok=True)
    count = len(read_images(tmp_path).splits["train"].labels)
    for path in [*tmp_path.glob("*.tar")]:
        shutil.copy(path, path.with_name(f".{path.name}"))
        path.with_name(f"._{path.name}").write_bytes(b"of another system")
    assert len(read_images(tmp_path).splits["train"].labels) == count


def test_what_is_passed_over_in_shards_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["tar shards"], tmp_path, dirs_exist_ok=True)
    write_tar(tmp_path / "things-train-0002.tar", iter([("a.heic", b""), ("a.cls", b"0"), ("b/.DS_Store", b"")]))
    with tarfile.open(tmp_path / "things-train-0002.tar", "a") as tar:
        info = tarfile.TarInfo("c.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(info)
    text = "train/: skipped 1 hidden; 2 without an image suffix (.cls, .heic); 1 that are neither files nor folders"
    assert any(note.startswith(text) for note in FolderSource(tmp_path, 8, 0).notes)


def test_parquet_files_are_made_into_shards_once(
    folders: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = parquet_files._rows, []

    def broken(path: Path) -> Iterator[tuple[str, bytes, int]]:
        calls.append(path.name)
        for number, row in enumerate(original(path)):
            if len(calls) == 2 and number == 2:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(parquet_files, "_rows", broken)
    with pytest.raises(KeyboardInterrupt):
        read_images(folders["parquet files"])
    (made,) = cache.glob("parquet_*")
    assert sorted(path.name for path in made.iterdir()) == ["classes.txt", "lock", "train-00000.tar"]
    (made / "train-00001.tar.elsewhere.7.part").write_bytes(b"of a process that was killed")
    stored = read_images(folders["parquet files"])
    assert len(calls) == 5  # the complete shard is not made again
    assert not [*made.glob("*.part")]
    assert stored.note == f"read from the tar shards in {made}, which were made from the parquet files"
    read_images(folders["parquet files"])
    assert len(calls) == 5
    assert find_layout(made) == "tar shards"  # the shards can also be used directly


def test_names_of_the_hub_are_those_of_imagenet(tmp_path: Path) -> None:
    """Names are also sorted like ImageNet's: n01440764_1002.JPEG comes before n01440764_10026.JPEG."""
    hub = ["n01440764_10026_n01440764.JPEG", "n01440764_1002_n01440764.JPEG"]
    assert sorted(parquet_files._names(hub)) == ["n01440764_1002.JPEG", "n01440764_10026.JPEG"]
    assert parquet_files._names(["a.jpg", "x/a.jpg"]) == ["00000000.jpg", "00000001.jpg"]
    assert parquet_files._names([None, "a.b.png"]) == ["00000000.jpg", "00000001.png"]
    assert parquet_files._names(["a.b.png", "c"]) == ["a_b.png", "c.jpg"]
    assert parquet_files._names([]) == []


BAD_PARQUET: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (_cut(300), "is not a parquet file, or is damaged"),
    "other columns": (
        lambda p: parquet.write_table(pa.table({"image": ["a"]}), p),
        r"must have the columns image \(struct<bytes: binary, path: string>\) and label \(an integer\), but has "
        r"image \(string\) and label \(missing\)",
    ),
    "no image": (
        lambda p: parquet.write_table(pa.table({"image": [{"path": "a"}], "label": [0]}, COLUMNS), p),
        "row 0 has no image",
    ),
    "no label": (lambda p: write_parquet(p, [("a", b"", 0), ("b", b"", -1)]), "row 1 has no label"),
}


@pytest.mark.parametrize("name", BAD_PARQUET)
def test_bad_parquet_files_are_told_in_a_sentence(tmp_path: Path, cache: Path, name: str) -> None:
    change, message = BAD_PARQUET[name]
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"{split}-0.parquet", [("a.jpg", b"a", 0)])
    change(tmp_path / "train-0.parquet")
    with pytest.raises(ConfigError, match=message):
        load_dataset(CONFIG, str(tmp_path), Delivery(torch.device("cpu"), seed=0))
    assert not [*cache.glob("*/*.part")]


def test_a_cache_folder_that_is_too_small_or_closed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        ValueError, match=r"GB are needed, but only 0\.0 GB are free\); set QAT_CACHE_DIR to use another"
    ):
        read_images(folders["parquet files"])
    (tmp_path / "file").touch()
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        ValueError, match=r"cannot be converted to tar shards in .*file/cache/parquet_.*; set QAT_CACHE_DIR"
    ):
        read_images(folders["parquet files"])
