"""Both kinds of loader: what a pass gives, its exact continuation, and the shards of several processes."""

from itertools import chain

import pytest
import torch
from torchvision.io import write_png

from lowcal.data import Augmentation, Batches, Images, Shard, load, make_loader
from lowcal.data.mixing import Mixing
from lowcal.errors import LowcalError

MEAN, STD = (0.2, 0.5, 0.7), (0.1, 0.2, 0.4)
CROP = Augmentation(pad=2, flip=True)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (23, 3, 8, 6), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(23))


def make(images, **settings):
    return Batches(images, **({"batch": 5, "mean": MEAN, "std": STD} | settings))


def grey_levels(x):
    """Undo the normalisation, in float64."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (x.double() * std + mean) * 255


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, second, strict=True)
    )


def test_plain_pass_gives_every_image_once_in_order(images):
    batches = make(images)
    seen = list(batches)
    assert len(batches) == len(seen) == 5
    assert batches.count == 23
    assert [len(y) for _, y in seen] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat([y for _, y in seen]), images.labels)
    x = torch.cat([x for x, _ in seen])
    assert x.dtype == torch.float32
    torch.testing.assert_close(grey_levels(x), images.pixels.double(), atol=1e-3, rtol=0)


def test_shuffle_is_a_new_permutation_each_epoch_and_images_stay_with_their_labels(images):
    batches = make(images, shuffle=True)
    before = images.pixels.clone()
    first, second = (list(batches) for _ in range(2))
    assert not same(first, second)
    for epoch in (first, second):
        assert torch.equal(torch.cat([y for _, y in epoch]).sort().values, images.labels)
        for x, y in epoch:
            torch.testing.assert_close(grey_levels(x), images.pixels[y].double(), atol=1e-3, rtol=0)
    assert torch.equal(before, images.pixels)
    assert batches.images.pixels.data_ptr() == images.pixels.data_ptr()


def candidates(image, augmentation):
    """All outcomes of crop and flip for one image, each cut out by slicing."""
    _, height, width = image.shape
    reach = augmentation.pad
    padded = torch.zeros(3, height + 2 * reach, width + 2 * reach, dtype=torch.float64)
    padded[:, reach : reach + height, reach : reach + width] = image
    for top in range(2 * reach + 1):
        for left in range(2 * reach + 1):
            window = padded[:, top : top + height, left : left + width]
            yield top, left, False, window
            if augmentation.flip:
                yield top, left, True, window.flip(2)


@pytest.mark.parametrize("augmentation", [CROP, Augmentation(pad=1, flip=False)])
def test_augmented_image_is_one_of_the_possible_crops(images, augmentation):
    outcomes = set()
    batches = make(images, augmentation=augmentation, shuffle=True)
    for x, y in chain(batches, batches, batches):
        for image, label in zip(grey_levels(x), y.tolist(), strict=True):
            places, windows = zip(
                *(
                    ((top, left, flip), window)
                    for top, left, flip, window in candidates(images.pixels[label], augmentation)
                ),
                strict=True,
            )
            ((match,),) = ((torch.stack(windows) - image).abs().amax((1, 2, 3)) < 1e-3).nonzero(as_tuple=True)
            outcomes.add(places[match])
    reach = 2 * augmentation.pad
    assert {top for top, _, _ in outcomes} == {left for _, left, _ in outcomes} == set(range(reach + 1))
    assert {flip for *_, flip in outcomes} == ({True, False} if augmentation.flip else {False})


def test_offsets_and_flips_are_uniform():
    """A picture with one bright pixel shows where it went."""
    count, reach = 6000, 2
    pixels = torch.zeros(count, 1, 9, 9, dtype=torch.uint8)
    pixels[:, :, 4, 3] = 255  # off the middle, so that a flip shows
    batches = Batches(
        Images(pixels, torch.zeros(count, dtype=torch.int64)),
        batch=count, mean=(0.0,), std=(1.0,), augmentation=Augmentation(reach, flip=True),
    )  # fmt: skip
    (x, _), = batches  # fmt: skip
    row, column = x.flatten(2).argmax(2).flatten() // 9, x.flatten(2).argmax(2).flatten() % 9
    rows = torch.bincount(row, minlength=9)[2:7] / count
    torch.testing.assert_close(rows, torch.full((5,), 0.2), atol=0.03, rtol=0)
    # Columns 1..5 unflipped and 3..7 flipped, each with probability 1/10.
    expected = torch.tensor([0, 1, 1, 2, 2, 2, 1, 1, 0]) / 10
    torch.testing.assert_close(torch.bincount(column, minlength=9) / count, expected, atol=0.03, rtol=0)


def test_the_seed_decides_what_an_image_gets_and_the_batch_does_not(images):
    first, second, other, *sizes = (
        list(make(images, shuffle=True, augmentation=CROP, seed=seed, batch=batch))
        for seed, batch in ((3, 5), (3, 5), (4, 5), (3, 7), (3, 23))
    )
    assert same(first, second)
    assert not same(first, other)
    for batches in sizes:
        assert len(batches) < len(first)
        assert torch.equal(torch.cat([x for x, _ in batches]), torch.cat([x for x, _ in first]))
    mixed = [list(make(images, shuffle=True, mixing=Mixing(23, 0.5, 1.0), batch=batch)) for batch in (5, 7)]
    for parts in zip(*(zip(*batches, strict=True) for batches in mixed), strict=True):
        assert torch.equal(*(torch.cat(part) for part in parts))


def test_a_raw_batch_can_be_collated_again_and_later(images):
    batches, other = (make(images, shuffle=True, augmentation=CROP) for _ in range(2))
    raw_batches = list(batches.raw_batches())
    before = batches.state_dict()
    made = [batches.collate(*raw) for raw in raw_batches]
    assert same(made, [batches.collate(*raw) for raw in raw_batches])
    assert same(made, list(other))
    assert torch.equal(before["random"], batches.state_dict()["random"])
    assert all(x.shape[1:] == batches.shape for x, _ in made)


def test_global_random_state_neither_moves_nor_matters(images):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = list(make(images, shuffle=True, augmentation=CROP))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert same(first, list(make(images, shuffle=True, augmentation=CROP)))


@pytest.mark.parametrize("mixing", [None, Mixing(23, 0.5, 1.0)])
@pytest.mark.parametrize("taken", [0, 1, 4, 5])
def test_resume_in_an_epoch_continues_exactly(images, taken, mixing):
    settings = {"shuffle": True, "augmentation": CROP, "mixing": mixing}
    original = make(images, **settings)
    list(original)  # an epoch before
    epoch = iter(original)
    for _ in range(taken):
        next(epoch)
    resumed = make(images, **settings, seed=99)
    resumed.load_state_dict(original.state_dict())
    if taken > 0:
        assert same(list(epoch), list(resumed))
    for _ in range(2):
        assert same(list(original), list(resumed))


def test_state_survives_a_safe_load_and_a_changed_batch(images, tmp_path):
    original = make(images, shuffle=True, augmentation=CROP)
    epoch = iter(original)
    next(epoch)
    original.batch = 7
    next(epoch)
    torch.save(original.state_dict(), tmp_path / "state.pt")
    resumed = make(images, shuffle=True, augmentation=CROP)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.batch == 7
    rest = list(resumed)
    assert [len(y) for _, y in rest] == [7, 4]
    assert same(list(epoch), rest)


def test_batch_set_in_an_epoch_leaves_no_image_out(images):
    batches = make(images, shuffle=True)
    labels = []
    for step, (_, y) in enumerate(batches):
        labels += y.tolist()
        if step == 0:
            batches.batch = 10
    assert sorted(labels) == list(range(23))
    assert len(batches) == 3


def test_sample_input_moves_nothing(images):
    batches = make(images, shuffle=True, augmentation=CROP)
    before = batches.state_dict()
    x = batches.sample_input(4)
    assert x.shape == (4, 3, 8, 6)
    torch.testing.assert_close(grey_levels(x), images.pixels[:4].double(), atol=1e-3, rtol=0)
    after = batches.state_dict()
    assert torch.equal(before["random"], after["random"])
    assert len(batches.sample_input(100)) == 23


def test_channels_last_is_only_a_layout(images):
    plain, last = (list(make(images, augmentation=CROP, channels_last=flag)) for flag in (False, True))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in last)
    assert same(plain, last)


@pytest.mark.parametrize(("batch", "message"), [(0, "at least 1"), (24, r"larger than the data \(23 images\)")])
def test_batch_out_of_range(images, batch, message):
    with pytest.raises(LowcalError, match=f"batch is {batch}.*{message}"):
        make(images, batch=batch)


def test_state_of_other_data_is_refused_and_changes_nothing(images):
    batches = make(images, shuffle=True)
    before = batches.state_dict()
    other = make(images.take(torch.arange(10)), shuffle=True, seed=8)
    with pytest.raises(LowcalError, match="of 10 images, the data has 23"):
        batches.load_state_dict(other.state_dict())
    with pytest.raises(LowcalError, match="lacks position, random"):
        batches.load_state_dict({"images": 23, "batch": 5})
    assert torch.equal(before["random"], batches.state_dict()["random"])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 64, 65])
def test_shares_are_all_images_once_and_alike_in_size(world, count):
    places = [list(range(count))[Shard(rank, world).of(count)] for rank in range(world)]
    assert list(chain(*places)) == list(range(count))
    sizes = [len(place) for place in places]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.fixture(params=["memory", "files", "mixed memory", "mixed files", "workers"])
def sharded(request, images, tmp_path):
    """A function from a shard to the training images' loader."""
    mixing = Mixing(23, 0.5, 1.0) if "mixed" in request.param else None
    if "memory" in request.param:
        return lambda shard: make(images, shuffle=True, augmentation=CROP, shard=shard, mixing=mixing)
    if request.param == "workers":
        settings = {"classes": 3, "train_images": 23, "image_size": 8, "workers": 0, "augment": "randaugment"}
        made = load("synthetic", **settings)
        return lambda shard: make_loader(made, training=True, batch=5, device="cpu", shard=shard)
    for split, count in (("train", 11), ("val", 1)):
        for label in "ab":
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                write_png(images.pixels[index], str(folder / f"{index}.png"))
    mixed = {"mixup": 0.5, "cutmix": 1.0} if mixing else {}
    data = load("imagenet", data_dir=tmp_path, image_size=8, classes=2, workers=0, **mixed)
    return lambda shard: make_loader(data, training=True, batch=5, device="cpu", shard=shard)


@pytest.mark.parametrize("world", [2, 4])
def test_shares_together_are_the_batches_of_one_process(sharded, world):
    whole, shards = sharded(Shard()), [sharded(Shard(rank, world)) for rank in range(world)]
    for _ in range(2):
        seen = 0
        for (x, y), *parts in zip(whole, *shards, strict=True):
            assert torch.equal(torch.cat([part[0] for part in parts]), x)
            assert torch.equal(torch.cat([part[1] for part in parts]), y)
            assert {loader.global_batch for loader in (whole, *shards)} == {len(y)}
            assert all(str(loader.state_dict()) == str(whole.state_dict()) for loader in shards)
            seen += len(y)
        assert seen > 20


def test_a_pass_goes_on_with_another_number_of_processes(sharded):
    whole, first = sharded(Shard()), sharded(Shard(1, 3))
    expected = list(whole)
    passing = iter(first)
    for _ in range(2):
        next(passing)
    alone = sharded(Shard())
    alone.load_state_dict(first.state_dict())
    assert same(list(alone), expected[2:])


@pytest.mark.gpu
def test_cuda_makes_batches_without_waiting_for_the_device(images):
    batches = make(images, device="cuda", shuffle=True, augmentation=CROP)
    epoch = iter(batches)
    next(epoch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x, y = next(epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.device.type == y.device.type == "cuda"
