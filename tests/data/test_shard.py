"""The shards of a mini-batch: every image in one of them, drawn as if one process had the whole batch."""

from itertools import chain

import pytest
import torch

from lowcal.data import Augmentation, Batches, Images, Shard, load, make_loader


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 64, 65])
def test_shares_are_all_images_once_and_alike_in_size(world, count):
    places = [list(range(count))[Shard(rank, world).of(count)] for rank in range(world)]
    assert list(chain(*places)) == list(range(count))
    sizes = [len(place) for place in places]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def images(count=23):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 8, 6), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count))


def in_memory(shard):
    crop = Augmentation(pad=2, flip=True)
    return Batches(images(), batch=5, mean=(0.5,) * 3, std=(0.2,) * 3, shuffle=True, augmentation=crop, shard=shard)


@pytest.fixture(params=["memory", "files"])
def make(request, tmp_path):
    """A function from a shard to the training images' loader."""
    if request.param == "memory":
        return in_memory
    write_png = pytest.importorskip("torchvision.io").write_png
    for split, count in (("train", 11), ("val", 1)):
        for label in "ab":
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                write_png(images().pixels[index], str(folder / f"{index}.png"))
    data = load("imagenet", data_dir=tmp_path, image_size=8, classes=2, workers=0)
    return lambda shard: make_loader(data, training=True, batch=5, device="cpu", shard=shard)


@pytest.mark.parametrize("world", [2, 4])
def test_shares_together_are_the_batches_of_one_process(make, world):
    whole, shards = make(Shard()), [make(Shard(rank, world)) for rank in range(world)]
    for _ in range(2):
        seen = 0
        for (x, y), *parts in zip(whole, *shards, strict=True):
            assert torch.equal(torch.cat([part[0] for part in parts]), x)
            assert torch.equal(torch.cat([part[1] for part in parts]), y)
            assert {loader.global_batch for loader in (whole, *shards)} == {len(y)}
            assert all(str(loader.state_dict()) == str(whole.state_dict()) for loader in shards)
            seen += len(y)
        assert seen > 20


def test_a_pass_goes_on_with_another_number_of_processes(make):
    whole, first = make(Shard()), make(Shard(1, 3))
    expected = [y for _, y in whole]
    passing = iter(first)
    for _ in range(2):
        next(passing)
    alone = make(Shard())
    alone.load_state_dict(first.state_dict())
    rest = [y for _, y in alone]
    assert len(rest) == len(expected) - 2
    assert all(torch.equal(one, two) for one, two in zip(rest, expected[2:], strict=True))
