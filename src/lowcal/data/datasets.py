"""Datasets by name: bundled digits, synthetic images, CIFAR, folders of image files, and a person's own function."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import interpolate

from lowcal.data.augmenters import in_workers
from lowcal.data.dataset import Augmentation, Dataset, Images, Source, split, subset
from lowcal.data.folders import MEAN, Watcher, cache_folder, class_folders, read_folders, read_imagenet
from lowcal.data.images import OnError, fit_cropped, fit_exact
from lowcal.data.mixing import Mixing
from lowcal.data.own import read_own
from lowcal.data.policy import Policy
from lowcal.errors import LowcalError, nearest
from lowcal.user_files import is_in_file

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

DATASETS = ("cifar10", "cifar100", "digits", "image-folder", "imagenet", "synthetic")
# The published datasets: their classes, and their training and test images.
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
IMAGES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "imagenet": (1_281_167, 50_000)}

OWN = "FILE.py:FUNCTION"

# The datasets that have a setting, and the message for the others.
_OWNERS = {
    "data_dir": (("cifar10", "cifar100", "image-folder", "imagenet"),
                 "reads no folder: leave out --data-dir (found {!r})"),
    "channels": (("digits", OWN), "has images of 3 channels: leave out data.channels ({})"),
    "classes": (("image-folder", "imagenet", "synthetic"),
                "brings its own classes: leave out data.classes (found {})"),
}  # fmt: skip
_LEAST = {"train_images": 1, "test_images": 1, "image_size": 1, "channels": 3, "classes": 2, "workers": 0}
TEST_FRACTION = 0.25  # of the digits, which come without a split
SPLIT_SEED = 0  # the digits' test images are the same in every run, whatever its seed
NOISE = 48.0  # standard deviation of the synthetic images' noise, in grey levels; the patterns' is 64
POOL = 2**28  # bytes of different synthetic images in a split; more images than fit share their pixels
CIFAR_SIZE = 32


def load(
    name: str,
    *,
    data_dir: Path | None = None,
    seed: int = 0,
    train_images: int | None = None,
    test_images: int | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    augment: bool | Literal["randaugment", "trivial"] = True,
    ra_ops: int = 2,
    ra_magnitude: int = 9,
    random_erase: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    classes: int | None = None,
    evaluate: Literal["test", "validation"] = "test",
    validation_fraction: float = 0.2,
    on_error: OnError = "stop",
    download: bool = True,
    workers: int | None = None,
    watcher: Watcher | None = None,
) -> Dataset:
    """Load a dataset, into memory except for imagenet; the same arguments give the same images in the same order.

    Args:
        name: one of `DATASETS`, or `FILE.py:FUNCTION` for what a person's function loads (see `read_own`).
        data_dir: the folder of cifar10, cifar100, image-folder or imagenet.
        seed: decides subsets, the validation split, and the synthetic images.
        train_images: draw a stratified subset of this size, after the validation split.
        test_images: likewise.
        image_size: in pixels; digits and CIFAR are enlarged to it (default: their own size), image-folder needs it, the
            default of imagenet is 224, that of synthetic 32.
        channels: 3 repeats grey images of one channel, for networks that take colour images.
        augment: whether training images are cropped and flipped at random; "randaugment" and "trivial" also change
            their geometry and colours.
        ra_ops: operations of RandAugment on an image.
        ra_magnitude: their strength, 0 to 30.
        random_erase: the probability that a rectangle of a training image is erased.
        mixup: alpha of mixup; 0: no mixup.
        cutmix: alpha of CutMix; 0: no CutMix.
        classes: for synthetic (default 10); for imagenet (default 1000) and image-folder (default: any) the number
            that the folder must hold.
        evaluate: "validation" uses a stratified part of the training images instead of the test images, so that
            settings can be chosen without looking at those.
        validation_fraction: the size of that part.
        on_error: "skip" leaves out unreadable files and names them in `Dataset.skipped`.
        download: whether CIFAR may be downloaded if it is not found.
        workers: processes that decode imagenet's files, or that augment beyond a crop and a flip (default: one per
            processor, at most 16).
        watcher: is told how far the decoding of many files is.

    Raises:
        LowcalError: an unknown name, a setting that the dataset does not have, a folder with another number of
            classes, or unusable data.
    """
    if name not in DATASETS and not is_in_file(name):
        raise LowcalError(f"unknown data {name!r}{nearest(name, DATASETS)}")
    _check_settings(
        name,
        data_dir=None if data_dir is None else str(data_dir),
        train_images=train_images,
        test_images=test_images,
        image_size=image_size,
        channels=channels,
        classes=classes,
        workers=workers,
    )
    policy = Policy(
        crop=augment is not False,
        name=None if isinstance(augment, bool) else augment,
        ops=ra_ops,
        magnitude=ra_magnitude,
        erase=random_erase,
    )
    if workers is not None and name != "imagenet" and not policy.needs_workers:
        raise LowcalError(
            f"data {name!r} is held in memory and needs no workers: leave out data.workers ({workers}), or set "
            "data.augment=randaugment"
        )
    if data_dir is not None:
        _check_classes(name, data_dir, classes)
    if name == "digits":
        source = read_digits()
    elif name == "synthetic":
        source = make_synthetic(
            classes=classes or 10, image_size=image_size or 32,
            train=train_images or 2048, test=test_images or 512, seed=seed,
        )  # fmt: skip
    elif is_in_file(name):
        source = read_own(name)
    elif name in CIFAR:
        source = read_cifar(name, data_dir, on_error, download, watcher)
    elif data_dir is None:
        folders = "train/ and val/" if name == "imagenet" else "train/ and test/"
        raise LowcalError(f"data {name!r} needs a folder with {folders}: give it with --data-dir")
    elif name == "imagenet":
        source = read_imagenet(data_dir, image_size, on_error, workers, policy.erasing(MEAN), watcher)
    elif image_size is None:
        raise LowcalError("data 'image-folder' needs the images' side: --set data.image_size=64, for example")
    else:
        source = read_folders(data_dir, image_size, on_error, fit_cropped, watcher)
    train, test = source.train, source.test
    whole = IMAGES.get(name, (len(train), len(test)))
    if evaluate == "validation":
        train, test = split(train, validation_fraction, seed)
        if name == "synthetic":  # made in the requested numbers, so there is nothing left to draw
            train_images = test_images = None
    if train_images is not None:
        train = subset(train, train_images, seed, "data.train_images")
    if test_images is not None:
        test = subset(test, test_images, seed, "data.test_images")
    augmentation = source.augmentation
    if (name in ("digits", *CIFAR) or is_in_file(name)) and isinstance(train, Images) and isinstance(test, Images):
        scale = (image_size or train.shape[1]) / train.shape[1]
        if augmentation is not None:
            augmentation = replace(augmentation, pad=round(scale * augmentation.pad))
        train, test = (part.enlarged(image_size, channels) for part in (train, test))
    mean, std = train.statistics()
    folder = data_dir.resolve().name if data_dir is not None and name == "image-folder" else None
    augmentation, shape = augmentation if policy.crop else None, source.train.shape
    if policy.needs_workers and isinstance(train, Images):
        train = in_workers(train, augmentation, policy.erasing(mean), mean, std, workers)
    mixing = Mixing(len(source.classes), mixup, cutmix) if mixup or cutmix else None
    return Dataset(
        name, source.classes, train, test, mean, std, augmentation, source.skipped, whole, folder, policy.is_random,
        mixing, shape,
    )  # fmt: skip


def _check_settings(name: str, **settings: str | int | None) -> None:
    kind = OWN if is_in_file(name) else name
    for setting, value in settings.items():
        owners, message = _OWNERS.get(setting, ((*DATASETS, OWN), ""))
        if value is not None and kind not in owners:
            raise LowcalError(f"data {name!r} {message.format(value)}")
        if isinstance(value, int) and value < _LEAST[setting]:
            raise LowcalError(f"data.{setting} is {value}, but must be at least {_LEAST[setting]}")


def _check_classes(name: str, folder: Path, classes: int | None) -> None:
    """Refuse a folder that holds another number of classes than the dataset has, before any image is decoded."""
    wanted = classes or CLASSES.get(name)
    if wanted is None:
        return
    found = wanted
    if not (name in CIFAR and (folder / CIFAR[name].folder).is_dir()):
        for other, archive in CIFAR.items():
            if name in CIFAR and (folder / archive.folder).is_dir():
                raise LowcalError(
                    f"{str(folder)!r} holds {archive.title}, but this recipe's data is {name!r}: "
                    f"give another --data-dir, or --set data.name={other}"
                )
        with suppress(OSError):  # the reader says what is wrong with the folder
            found = len(class_folders(folder / "train"))
    if found == wanted or found < 2:  # the reader refuses fewer than two
        return
    remedy = f"--set data.classes={found}"
    if name in CIFAR:
        fitting = next((other for other in CIFAR if CLASSES[other] == found), None)
        remedy = f"--set data.name={fitting}" if fitting else "--set data.name=image-folder --set data.image_size=32"
    has = f"data.classes is {wanted}" if classes else f"data {name!r} has {wanted}"
    raise LowcalError(
        f"{str(folder)!r} holds {found} class folders, but {has}: give another --data-dir, or "
        f"train on this one with {remedy}"
    )


def read_digits() -> Source:
    """Read scikit-learn's handwritten digits, real grey images (N, 1, 8, 8): 1,348 to train on, 449 to test on."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    pixels = torch.from_numpy(bundled.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)  # 0 to 16
    images = Images(pixels, torch.from_numpy(bundled.target).long())
    train, test = split(images, TEST_FRACTION, SPLIT_SEED)
    return Source(tuple("0123456789"), train, test, Augmentation(pad=1, flip=False))


def make_synthetic(*, classes: int, image_size: int, train: int, test: int, seed: int) -> Source:
    """Make `train` and `test` colour images, 3 x image_size x image_size: one smooth pattern per class, with noise.

    The classes are equally frequent. Any number of images is possible: those that would take over 256 MiB repeat, with
    at least one for each class.
    """
    for what, count in (("train_images", train), ("test_images", test)):
        if count < classes:
            raise LowcalError(f"data.{what} is {count}, fewer than the {classes} classes: set it to at least {classes}")
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(classes, 3, 4, 4, generator=generator)
    bytes_each = 3 * image_size**2
    most = max(1, POOL // bytes_each // classes) * classes
    at_once = max(1, min(1024, POOL // bytes_each // 8))

    def draw(count: int) -> Images:
        labels = torch.arange(count) % classes
        different = min(count, most)
        pixels = torch.empty(different, 3, image_size, image_size, dtype=torch.uint8)
        for part, label in zip(pixels.split(at_once), labels[:different].split(at_once), strict=True):
            patterns = interpolate(coarse[label], size=(image_size, image_size), mode="bilinear") * 64 + 128
            part.copy_((patterns + NOISE * torch.randn(part.shape, generator=generator)).clamp(0, 255).round())
        return Images(pixels, labels, torch.arange(count) % different if different < count else None)

    names = tuple(f"class {label}" for label in range(classes))
    return Source(names, draw(train), draw(test), Augmentation(pad=image_size // 8, flip=True))


@dataclass(frozen=True)
class Archive:
    """One of the two CIFAR sets: its title, torchvision's class for it, and the folder of that class's files."""

    title: str
    reader: str
    folder: str


CIFAR = {
    "cifar10": Archive("CIFAR-10", "CIFAR10", "cifar-10-batches-py"),
    "cifar100": Archive("CIFAR-100", "CIFAR100", "cifar-100-python"),
}


def read_cifar(
    name: str, folder: Path | None, on_error: OnError, download: bool, watcher: Watcher | None = None
) -> Source:
    """Read `cifar10` or `cifar100` (the fine classes), (N, 3, 32, 32): 50,000 images to train on, 10,000 to test on.

    `folder` holds cifar-10-batches-py or cifar-100-python, or train/<class>/* and test/<class>/*. Without a folder,
    torchvision's files are read from the cache folder, to which they are downloaded (170 MB, checked by their MD5) if
    they are absent.
    """
    archive = CIFAR[name]
    if folder is None:
        remedy = "check the network" if download else "set data.download=true"
        return _read_archive(archive, cache_folder() / name, download, f"{remedy}, or give a folder with --data-dir")
    if (folder / archive.folder).is_dir():
        return _read_archive(
            archive, folder, False, "replace it, or leave out --data-dir to have whole files downloaded"
        )
    if folder.is_dir() and not (folder / "train").is_dir() and not (folder / "test").is_dir():
        raise LowcalError(
            f"{str(folder)!r} holds neither {archive.folder}/ nor train/ and test/: correct --data-dir, or leave it "
            f"out to have {archive.title} downloaded"
        )
    return read_folders(folder, CIFAR_SIZE, on_error, fit_exact, watcher)


def _read_archive(archive: Archive, root: Path, download: bool, remedy: str) -> Source:
    from torchvision import datasets

    reader = getattr(datasets, archive.reader)
    try:
        train = reader(root, train=True, download=download)
        test = reader(root, train=False)
    except (OSError, RuntimeError) as error:  # no network, no space, or files that fail their checksum
        found = None if download else _faulty(reader, root)
        reason = found or str(error).partition("\n")[0]
        raise LowcalError(f"cannot read {archive.title} from {str(root)!r}: {reason}; {remedy}") from error
    return Source(tuple(train.classes), _images(train), _images(test), Augmentation(pad=4, flip=True))


def _faulty(reader: Any, root: Path) -> str | None:
    """The first file that is absent or fails its checksum, and how; None if all are whole."""
    from torchvision.datasets.utils import check_integrity

    for file, md5 in (*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])):
        path = root / reader.base_folder / file
        if not path.is_file():
            return f"{reader.base_folder}/{file} is missing"
        if not check_integrity(path, md5):
            return f"{reader.base_folder}/{file} is damaged: its MD5 checksum is not {md5}"
    return None


def _images(part: "CIFAR10") -> Images:
    pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(part.targets))
