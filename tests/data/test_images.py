import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat_runner.config import DatasetConfig
from qat_runner.data import AUGMENTATIONS, Delivery, ImageData, find_dataset, load_dataset
from qat_runner.data.images import augment, shrink
from qat_runner.data.seeding import epoch_seed
from qat_runner.errors import ConfigError, RunError

CPU = torch.device("cpu")


def config(name: str, **changes: object) -> DatasetConfig:
    made = DatasetConfig(name=name, num_classes=10, image_size=32, mean=[0.5], std=[0.25], workers=0)
    for key, value in changes.items():
        setattr(made, key, value)
    return made


def test_digits_are_the_real_ones() -> None:
    data = load_dataset(config("digits", image_size=8), "nowhere", Delivery(CPU, seed=0))
    assert (data.train_size, data.val_size, data.num_classes) == (1437, 360, 10)
    (images,), labels = next(data.val_batches(360))
    assert images.shape == (360, 3, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (-2.0, 2.0)  # (0 - 0.5) / 0.25, (1 - 0.5) / 0.25
    assert torch.bincount(labels).min() >= 30


def test_an_epoch_depends_on_seed_and_number_alone() -> None:
    data = load_dataset(config("digits", image_size=8, augment="crop"), "nowhere", Delivery(CPU, seed=3))
    first = [x.sum().item() for (x,), _ in data.train_batches(100, epoch=5)]
    list(data.train_batches(100, epoch=0))
    assert [x.sum().item() for (x,), _ in data.train_batches(100, epoch=5)] == first
    assert [x.sum().item() for (x,), _ in data.train_batches(100, epoch=6)] != first
    other = load_dataset(config("digits", image_size=8, augment="crop"), "nowhere", Delivery(CPU, seed=4))
    assert [x.sum().item() for (x,), _ in other.train_batches(100, epoch=5)] != first
    assert len(first) == data.train_steps(100) == 14
    assert len({epoch_seed(s, e) for s in range(30) for e in range(30)}) == 900


def test_every_image_once_an_epoch_in_full_batches() -> None:
    data = load_dataset(config("fake", fake_pictures=70), "nowhere", Delivery(CPU, seed=0))
    batches = list(data.train_batches(32, epoch=0))
    assert [len(y) for _, y in batches] == [32, 32]
    seen = torch.cat([x for (x,), _ in batches]).flatten(1)
    assert len(seen.unique(dim=0)) == 64
    assert [len(y) for _, y in data.train_batches(100, epoch=0)] == [70]  # fewer images than one batch: a smaller batch
    assert sum(len(y) for _, y in data.val_batches(8)) == data.val_size == 17


@pytest.mark.parametrize("how", AUGMENTATIONS)
def test_augmentation_moves_and_mirrors_whole_images(how: str) -> None:
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8)
    out = augment(image.expand(500, 1, 8, 8), how, torch.Generator().manual_seed(0))
    assert out.shape == (500, 1, 8, 8)
    assert out.dtype == torch.uint8
    mirrors = [image, image.flip(3)] if how == "crop_flip" else [image]
    margin = 0 if how == "none" else 1
    possible = set()
    for version in mirrors:
        padded = torch.nn.functional.pad(version, (margin,) * 4)
        for i in range(2 * margin + 1):
            for j in range(2 * margin + 1):
                possible.add(padded[0, 0, i : i + 8, j : j + 8].numpy().tobytes())
    assert {o[0].numpy().tobytes() for o in out} == possible


def test_cifar10_from_npz_and_from_torchvisions_folder(tmp_path: Path) -> None:
    arrays = {
        "x_train": np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8),
        "y_train": np.arange(20) % 10,
        "x_test": np.full((5, 32, 32, 3), [255, 0, 51], dtype=np.uint8),
        "y_test": np.arange(5),
    }
    np.savez(tmp_path / "cifar10.npz", **arrays)
    for root in (tmp_path, tmp_path.parent):  # data_dir itself, or its subfolder named after the data set
        (tmp_path.parent / "cifar10").mkdir(exist_ok=True)
        np.savez(tmp_path.parent / "cifar10" / "cifar10.npz", **arrays)
        data = load_dataset(config("cifar10", mean=[0.0] * 3, std=[1.0] * 3), str(root), Delivery(CPU, seed=0))
        (images,), labels = next(data.val_batches(5))
        torch.testing.assert_close(images[0, :, 7, 9], torch.tensor([1.0, 0.0, 0.2]))  # channels first, RGB
        assert labels.tolist() == [0, 1, 2, 3, 4]
        assert data.train_size == 20


def class_folders(root: Path, classes: int = 3, images: int = 4, size: int = 40) -> None:
    for split in ("train", "val"):
        for c in range(classes):
            (root / split / f"class{c}").mkdir(parents=True)
            for i in range(images):
                colour = (80 * c, 10 * i, 255 - 80 * c)
                Image.new("RGB", (size, size + i), colour).save(root / split / f"class{c}" / f"{i}.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_of_images(tmp_path: Path, workers: int) -> None:
    class_folders(tmp_path)
    settings = config("imagefolder", num_classes=None, workers=workers, mean=[0.0], std=[1.0])
    data = load_dataset(settings, str(tmp_path), Delivery(CPU, seed=0))
    assert (data.num_classes, data.train_size, data.val_size) == (3, 12, 12)
    (images,), labels = next(data.val_batches(12))
    assert images.shape == (12, 3, 32, 32)
    assert labels.tolist() == [c for c in range(3) for _ in range(4)]
    torch.testing.assert_close(images[5].mean((1, 2)), torch.tensor([80, 10, 175]) / 255)
    first = [(x.sum().item(), y.tolist()) for (x,), y in data.train_batches(5, epoch=1)]
    assert [len(y) for _, y in first] == [5, 5]
    assert [(x.sum().item(), y.tolist()) for (x,), y in data.train_batches(5, epoch=1)] == first


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "val" / "class1" / "0.png").write_bytes(b"no image")
    data = load_dataset(config("imagefolder", num_classes=3), str(tmp_path), Delivery(CPU, seed=0))
    with pytest.raises(RunError, match=r"class1/0\.png cannot be decoded"):
        list(data.val_batches(12))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cifar10",
            r"cifar10\.npz or torchvision's cifar-10-batches-py/ \('python -m qat_runner\.data\.prepare cifar10",
        ),
        ("fashion_mnist", "prepare fashion_mnist DATA_DIR"),
        ("imagenet", "train/ and val/ with a folder of images for each class"),
        ("imagefolder", "train/ and val/"),
        ("mnist", "must be one of cifar10, digits"),
    ],
)
def test_absent_data_says_what_to_put_where(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_dataset(config(name), str(tmp_path))


def test_damaged_data(tmp_path: Path) -> None:
    (tmp_path / "cifar10.npz").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_dataset(config("cifar10"), str(tmp_path), Delivery(CPU, seed=0))
    class_folders(tmp_path)
    with pytest.raises(ConfigError, match=r"first and last class folders are class0 and class2"):
        load_dataset(config("imagenet", num_classes=1000), str(tmp_path), Delivery(CPU, seed=0))


def test_classes_of_both_halves_must_agree(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "train" / "aardvark").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "aardvark" / "0.png")
    with pytest.raises(ConfigError, match="must have the same class folders: train/ has aardvark, but val/ does not"):
        load_dataset(config("imagefolder", num_classes=None), str(tmp_path), Delivery(CPU, seed=0))


def test_images_in_memory_are_averaged_down() -> None:
    whole = load_dataset(config("fake"), "nowhere", Delivery(CPU, seed=0))
    split = load_dataset(config("fake", image_size=16), "nowhere", Delivery(CPU, seed=0))
    assert next(split.val_batches(2)).inputs[0].shape == (2, 3, 16, 16)
    assert whole.image_size == 32
    images = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4) * 4
    assert shrink(images, 2).tolist() == [[[[10, 18], [42, 50]]]]
    assert shrink(images, 4) is images


@pytest.mark.parametrize("workers", [0, 1])
def test_a_limit_and_a_bad_image_in_a_worker(tmp_path: Path, workers: int) -> None:
    class_folders(tmp_path)
    (tmp_path / "val" / "class2" / "3.png").write_bytes(b"no image")
    data = load_dataset(config("imagefolder", num_classes=3, workers=workers), str(tmp_path), Delivery(CPU, seed=0))
    assert len(list(data.val_batches(4, limit=2))) == 2  # the last batch is never decoded
    with pytest.raises(
        RunError,
        match=r"^image .*class2/3\.png cannot be decoded \(not one of .*\); set dataset\.skip_corrupt=true",
    ):
        list(data.val_batches(4))


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_left_out_and_counted(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path)
    for name in ("0", "3"):
        (tmp_path / "val" / "class2" / f"{name}.png").write_bytes(b"no image")
    tolerant = config("imagefolder", num_classes=3, workers=workers, skip_corrupt=True)
    data = load_dataset(tolerant, str(tmp_path), Delivery(CPU, seed=0))
    assert isinstance(data, ImageData)
    for _ in range(2):
        assert sum(batch.size for batch in data.val_batches(5)) == data.val_size - 2
    assert data.corrupt is not None and len(data.corrupt) == 2
    assert caplog.text.count("): left out") == 2  # each of them once
    assert len(list(data.val_batches(1))) == data.val_size - 2  # although some batches have no image left
    for path in (tmp_path / "val").glob("*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(RunError, match=r"no image of val can be decoded; image .*png cannot be decoded"):
        list(data.val_batches(4))
    for path in (tmp_path / "train").glob("*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(RunError, match=r"none of the 4 images of a batch can be decoded; image"):
        next(data.train_batches(4, epoch=0))


def test_fashion_mnist_from_torchvisions_files(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 6), ("t10k", 3)):
        images = np.full((count, 28, 28), 51, dtype=np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + bytes(range(count)))
    settings = config("fashion_mnist", image_size=28, mean=[0.0], std=[1.0])
    data = load_dataset(settings, str(tmp_path), Delivery(CPU, seed=0))
    (images,), labels = next(data.val_batches(3))
    torch.testing.assert_close(images, torch.full((3, 3, 28, 28), 0.2))
    assert labels.tolist() == [0, 1, 2]
    assert data.train_size == 6
