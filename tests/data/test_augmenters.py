"""Random operations in worker processes: those of torchvision, and the same for any number of workers."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from lowcal.data import Batches, FileBatches, Images, batches, load, make_loader
from lowcal.data.augmenters import in_workers
from lowcal.data.policy import Policy
from lowcal.errors import LowcalError

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python 3.12 on
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a single processor
]
COLOUR = {"name": "synthetic", "classes": 3, "train_images": 12, "test_images": 6, "image_size": 16}
GREY = {"name": "digits", "train_images": 20}


def read(settings, **more):
    return load(**{"workers": 0, **settings, **more})


def loader(data, **settings):
    return make_loader(data, training=True, device="cpu", **{"batch": 5, **settings})


def pixels(made, data):
    """The grey levels of an epoch, and the labels."""
    x, y = (torch.cat(parts) for parts in zip(*made, strict=True))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
    return (255 * (x * std + mean)).round().to(torch.uint8), y


def expected(operations, image, position, epoch):
    """By torchvision alone, from the seed that the loader documents: (seed, epoch, position)."""
    with torch.random.fork_rng([]):
        torch.manual_seed(batches._mixed(0, epoch, position))
        return v2.Compose(operations)(to_pil_image(image))


@pytest.mark.parametrize(
    ("settings", "operations"),
    [
        (
            {"augment": "randaugment", "ra_ops": 3, "ra_magnitude": 12},
            [v2.RandomCrop(16, padding=2), v2.RandomHorizontalFlip(), v2.RandAugment(3, 12), v2.PILToTensor()],
        ),
        (
            {"augment": "trivial"},
            [v2.RandomCrop(16, padding=2), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide(), v2.PILToTensor()],
        ),
        ({"augment": False, "random_erase": 1.0}, None),
    ],
)
def test_operations_are_torchvision_s_in_every_epoch(settings, operations):
    data, plain = read(COLOUR, **settings), load(**COLOUR).train
    made = loader(data, batch=12)
    operations = operations or [
        v2.PILToTensor(),
        v2.RandomErasing(1.0, value=[round(255 * value) for value in data.mean]),
    ]
    for epoch in range(2):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(batches._mixed(0, epoch)))
        images, labels = pixels(list(made), data)
        assert torch.equal(labels, plain.labels[order])
        for image, position in zip(images, order.tolist(), strict=True):
            assert torch.equal(image, expected(operations, plain.pixels[position], position, epoch))


@pytest.mark.parametrize("augment", ["randaugment", "trivial"])
def test_grey_images_are_augmented_too(augment):
    data = read(GREY, augment=augment, random_erase=0.5)
    made = loader(data)
    images, labels = pixels([batch for _ in range(10) for batch in made], data)
    assert images.shape == (200, 1, 8, 8)
    assert torch.equal(labels.bincount(), 10 * load(**GREY).train.labels.bincount())
    assert len(images.unique(dim=0)) > 100


def test_the_number_of_workers_and_the_batch_change_no_image():
    settings = {"augment": "randaugment", "random_erase": 0.3, "mixup": 0.4, "cutmix": 1.0}
    alone = read(COLOUR, **settings)
    two = read(COLOUR, **settings, workers=2)
    first, second, third = (list(loader(data, batch=n)) for data, n in ((alone, 5), (two, 5), (alone, 4)))
    for others in (second, third):
        for ours, theirs in zip(zip(*first, strict=True), zip(*others, strict=True), strict=True):
            assert torch.equal(torch.cat(ours), torch.cat(theirs))


def test_a_part_of_the_images_has_a_rectangle_of_the_mean_colour():
    data = read({**GREY, "train_images": 1000}, augment=False, random_erase=0.25)
    made = loader(data, batch=1000)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(batches._mixed(0, 0)))
    images, _ = pixels(list(made), data)
    changed = images != load(**GREY | {"train_images": 1000}).train.pixels[order]
    is_erased = changed.flatten(1).any(1)
    assert float(is_erased.float().mean()) == pytest.approx(0.25, abs=0.05)
    assert set(images[changed].tolist()) == {round(255 * data.mean[0])}


def test_a_plain_crop_stays_on_the_device_and_evaluation_is_as_ever():
    assert isinstance(loader(load(**COLOUR)), Batches)
    data = read(COLOUR, augment="trivial", random_erase=1.0, mixup=1.0)
    assert isinstance(loader(data), FileBatches)
    plain, test = (make_loader(d, training=False, batch=6, device="cpu") for d in (load(**COLOUR), data))
    (x, y), (other_x, other_y) = next(iter(plain)), next(iter(test))
    assert torch.equal(x, other_x)
    assert torch.equal(y, other_y)
    sample = loader(data).sample_input(3)
    torch.testing.assert_close(sample, loader(load(**COLOUR)).sample_input(3))


def test_images_that_are_neither_grey_nor_in_colour_are_refused():
    images = Images(torch.zeros(4, 2, 6, 6, dtype=torch.uint8), torch.arange(4))
    with pytest.raises(LowcalError, match="images of 1 or 3 channels, these have 2; --set data"):
        in_workers(images, None, Policy(name="trivial"), (0.5,) * 2, (0.5,) * 2, 0)


def test_workers_without_work_for_them_are_refused():
    with pytest.raises(LowcalError, match=r"needs no workers: leave out data\.workers \(2\), or set data\.augment"):
        load(**COLOUR, workers=2)
