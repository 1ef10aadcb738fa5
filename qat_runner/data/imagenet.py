"""Unpack ILSVRC2012 from its official tar files to class folders.

The files are checked, and an interrupted call can be repeated.

    DATA_DIR/ILSVRC2012_img_train.tar         ->  DATA_DIR/train/n01440764/*.JPEG ...
    DATA_DIR/ILSVRC2012_img_val.tar           ->  DATA_DIR/val/n01440764/*.JPEG ...
    DATA_DIR/ILSVRC2012_devkit_t12.tar.gz     the classes of the validation images

The class folders, sorted by name, are in the order of the outputs of torchvision's published weights.
"""

import hashlib
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from qat_runner.data.listing import class_folders

MD5 = {
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
}
"""The official files and their MD5 sums."""

IMAGES = {"train": 1_281_167, "val": 50_000}
FIRST_CLASS, LAST_CLASS = "n01440764", "n15075141"
"""Tench and toilet tissue: classes 0 and 999."""


def prepare_imagenet(folder: Path) -> None:
    """Create the class folders; parts that an earlier call has finished are skipped.

    Raises:
        ValueError: a tar file is missing or damaged, or does not have the expected content.
    """
    for name in MD5:
        _check(folder / name)
    classes, wnid_of_val = read_devkit(folder / "ILSVRC2012_devkit_t12.tar.gz")
    _unpack_val(folder / "ILSVRC2012_img_val.tar", folder / "val", wnid_of_val)
    _unpack_train(folder / "ILSVRC2012_img_train.tar", folder / "train")
    check_order(class_folders(folder / "train"), classes)
    for split, wanted in IMAGES.items():
        found = sum(1 for _ in (folder / split).glob("*/*.JPEG"))
        if found != wanted:
            raise ValueError(f"{folder / split} contains {found} images; must be {wanted}")


def _check(path: Path) -> None:
    """Compare the MD5 sum of a file with the official one, once: a file beside it records that it was right."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; download it from image-net.org")
    stat = path.stat()
    note, seal = path.with_name(f"{path.name}.checked"), f"{stat.st_size} {stat.st_mtime_ns}"
    if note.is_file() and note.read_text(encoding="utf-8") == seal:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with (
        open(path, "rb") as file,
        tqdm(total=stat.st_size, unit="B", unit_scale=True, desc=f"checking {path.name}") as bar,
    ):
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != MD5[path.name]:
        raise ValueError(f"{path} is damaged: its MD5 sum is {digest.hexdigest()}; must be {MD5[path.name]}")
    note.write_text(seal, encoding="utf-8")


def read_devkit(path: Path) -> tuple[dict[str, str], list[str]]:
    """Return a dict from WordNet id to words for the 1000 classes, and the id of each validation image in order."""
    with tarfile.open(path) as tar:
        from scipy.io import loadmat  # deferred: only used here

        meta = loadmat(_member(tar, "data/meta.mat"), squeeze_me=True)["synsets"]
        truth = _member(tar, "data/ILSVRC2012_validation_ground_truth.txt").read().decode()
    leaves = [record for record in meta if int(record["num_children"]) == 0]
    wnid_of = {int(record["ILSVRC2012_ID"]): str(record["WNID"]) for record in leaves}
    words = {str(record["WNID"]): str(record["words"]) for record in leaves}
    return words, [wnid_of[int(line)] for line in truth.split()]


def _member(tar: tarfile.TarFile, ending: str) -> IO[bytes]:
    name = next((name for name in tar.getnames() if name.endswith(ending)), None)
    file = None if name is None else tar.extractfile(name)
    if file is None:
        raise ValueError(f"{tar.name!r} does not contain {ending}")
    return file


def _unpack_val(archive: Path, folder: Path, wnids: Sequence[str]) -> None:
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda member: member.name)
        if len(members) != len(wnids):
            raise ValueError(f"{archive} contains {len(members)} images, but the devkit lists {len(wnids)}")
        for member, wnid in tqdm(list(zip(members, wnids, strict=True)), desc="val"):
            image = folder / wnid / Path(member.name).name
            if image.is_file():
                continue
            image.parent.mkdir(parents=True, exist_ok=True)
            part = image.with_suffix(".part")
            source = tar.extractfile(member)
            assert source is not None
            with open(part, "wb") as file:
                shutil.copyfileobj(source, file)
            part.rename(image)  # atomic: the file is complete or absent


def _unpack_train(archive: Path, folder: Path) -> None:
    """Unpack each class beside its final place, and move it there when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tqdm([m for m in tar.getmembers() if m.name.endswith(".tar")], desc="train"):
            target = folder / Path(member.name).stem
            if target.is_dir():
                continue
            part = folder.parent / f"{target.name}.part"
            shutil.rmtree(part, ignore_errors=True)
            with tarfile.open(fileobj=tar.extractfile(member)) as images:
                images.extractall(part, filter="data")  # no member can be written outside the folder
            part.rename(target)


def check_order(wnids: Sequence[str], words: dict[str, str]) -> None:
    """Check class folders against the names of the outputs of torchvision's weights.

    Raises:
        ValueError: the number of folders or more than 5 % of the names differ, so the classes or their order are wrong.
    """
    from torchvision.models._meta import _IMAGENET_CATEGORIES as CATEGORIES  # deferred: the import takes a second

    right = np.array(
        [name.split()[0] in words.get(wnid, "") for wnid, name in zip(wnids, CATEGORIES, strict=False)], dtype=bool
    )
    if len(wnids) != len(CATEGORIES) or right.mean() < 0.95:
        raise ValueError(
            f"{int(right.sum())} of {len(wnids)} class folders are where torchvision's weights expect them; "
            f"must be the {len(CATEGORIES)} class folders of ILSVRC2012"
        )
