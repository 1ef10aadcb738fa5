"""ILSVRC2012 from its official tar files to class folders: checked, and restartable after an interruption.

    DATA_DIR/ILSVRC2012_img_train.tar         ->  DATA_DIR/train/n01440764/*.JPEG ...
    DATA_DIR/ILSVRC2012_img_val.tar           ->  DATA_DIR/val/n01440764/*.JPEG ...
    DATA_DIR/ILSVRC2012_devkit_t12.tar.gz     the classes of the validation pictures

Class folders sorted by name are in the order of torchvision's published weights.
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
"""The official files and their sums."""

PICTURES = {"train": 1_281_167, "val": 50_000}
FIRST_CLASS, LAST_CLASS = "n01440764", "n15075141"
"""tench and toilet tissue: classes 0 and 999."""


def prepare_imagenet(folder: Path) -> None:
    """Make the class folders; what an earlier call has finished is skipped.

    Raises:
        ValueError: a tar file is missing or damaged, or does not hold what it should.
    """
    for name in MD5:
        _check(folder / name)
    classes, wnid_of_val = read_devkit(folder / "ILSVRC2012_devkit_t12.tar.gz")
    _unpack_val(folder / "ILSVRC2012_img_val.tar", folder / "val", wnid_of_val)
    _unpack_train(folder / "ILSVRC2012_img_train.tar", folder / "train")
    check_order(class_folders(folder / "train"), classes)
    for split, wanted in PICTURES.items():
        found = sum(1 for _ in (folder / split).glob("*/*.JPEG"))
        if found != wanted:
            raise ValueError(f"{folder / split} holds {found} pictures, not {wanted}")


def _check(path: Path) -> None:
    """Compare a file's sum with the official one, once: a note beside it says that it was right."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; it comes from image-net.org")
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
        raise ValueError(f"{path} is damaged: its MD5 sum is {digest.hexdigest()}, not {MD5[path.name]}")
    note.write_text(seal, encoding="utf-8")


def read_devkit(path: Path) -> tuple[dict[str, str], list[str]]:
    """WordNet id -> words of the 1000 classes, and the id of each validation picture in order."""
    with tarfile.open(path) as tar:
        from scipy.io import loadmat  # for this alone

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
        raise ValueError(f"{tar.name!r} holds no {ending}")
    return file


def _unpack_val(archive: Path, folder: Path, wnids: Sequence[str]) -> None:
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda member: member.name)
        if len(members) != len(wnids):
            raise ValueError(f"{archive} holds {len(members)} pictures, the devkit knows {len(wnids)}")
        for member, wnid in tqdm(list(zip(members, wnids, strict=True)), desc="val"):
            picture = folder / wnid / Path(member.name).name
            if picture.is_file():
                continue
            picture.parent.mkdir(parents=True, exist_ok=True)
            part = picture.with_suffix(".part")
            source = tar.extractfile(member)
            assert source is not None
            with open(part, "wb") as file:
                shutil.copyfileobj(source, file)
            part.rename(picture)  # whole or not at all


def _unpack_train(archive: Path, folder: Path) -> None:
    """Each class is unpacked beside its place and moved there when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tqdm([m for m in tar.getmembers() if m.name.endswith(".tar")], desc="train"):
            target = folder / Path(member.name).stem
            if target.is_dir():
                continue
            part = folder.parent / f"{target.name}.part"
            shutil.rmtree(part, ignore_errors=True)
            with tarfile.open(fileobj=tar.extractfile(member)) as pictures:
                pictures.extractall(part, filter="data")  # nothing leaves the folder
            part.rename(target)


def check_order(wnids: Sequence[str], words: dict[str, str]) -> None:
    """Class folders against the names that torchvision's weights have for their outputs.

    Raises:
        ValueError: most names differ, so the folders are others or in another order.
    """
    from torchvision.models._meta import _IMAGENET_CATEGORIES as CATEGORIES  # which takes a second

    right = np.array(
        [name.split()[0] in words.get(wnid, "") for wnid, name in zip(wnids, CATEGORIES, strict=False)], dtype=bool
    )
    if len(wnids) != len(CATEGORIES) or right.mean() < 0.95:
        raise ValueError(
            f"{len(wnids)} class folders, {int(right.sum())} of them where torchvision's weights expect them: "
            f"they must be the {len(CATEGORIES)} of ILSVRC2012"
        )
