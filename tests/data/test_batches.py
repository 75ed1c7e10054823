import pytest
import torch

from lowcal.data import Augmentation, Batches, Images
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


def test_shuffle_is_a_new_permutation_each_epoch(images):
    batches = make(images, shuffle=True)
    first, second = (torch.cat([y for _, y in batches]) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, images.labels)
    assert torch.equal(second.sort().values, images.labels)


def test_images_stay_with_their_labels(images):
    for x, y in make(images, shuffle=True):
        torch.testing.assert_close(grey_levels(x), images.pixels[y].double(), atol=1e-3, rtol=0)


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
    for _ in range(4):
        for x, y in make_epochs(images, augmentation):
            for image, label in zip(grey_levels(x), y.tolist(), strict=True):
                matches = [
                    (top, left, flip)
                    for top, left, flip, window in candidates(images.pixels[label], augmentation)
                    if torch.allclose(window, image, atol=1e-3, rtol=0)
                ]
                assert len(matches) == 1
                outcomes.add(matches[0])
    reach = 2 * augmentation.pad
    assert {top for top, _, _ in outcomes} == {left for _, left, _ in outcomes} == set(range(reach + 1))
    assert {flip for *_, flip in outcomes} == ({True, False} if augmentation.flip else {False})


def make_epochs(images, augmentation):
    batches = make(images, augmentation=augmentation, shuffle=True)
    for _ in range(3):
        yield from batches


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


def test_same_seed_same_batches(images):
    first, second, other = (list(make(images, shuffle=True, augmentation=CROP, seed=seed)) for seed in (3, 3, 4))
    assert same(first, second)
    assert not same(first, other)


def test_what_an_image_gets_does_not_depend_on_the_batch(images):
    passes = [list(make(images, shuffle=True, augmentation=CROP, batch=batch)) for batch in (5, 7, 23)]
    assert len({len(batches) for batches in passes}) == 3
    images_of = [torch.cat([x for x, _ in batches]) for batches in passes]
    assert torch.equal(images_of[0], images_of[1])
    assert torch.equal(images_of[0], images_of[2])


def test_a_drawn_batch_can_be_made_again_and_later(images):
    batches, other = (make(images, shuffle=True, augmentation=CROP) for _ in range(2))
    drawn = list(batches.raw_batches())
    before = batches.state_dict()
    made = [batches.collate(*given) for given in drawn]
    assert same(made, [batches.collate(*given) for given in drawn])
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


@pytest.mark.parametrize("taken", range(6))
def test_resume_in_an_epoch_continues_exactly(images, taken):
    settings = {"shuffle": True, "augmentation": CROP}
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


def test_abandoned_epoch_is_not_continued(images):
    batches = make(images)
    next(iter(batches))
    assert torch.equal(torch.cat([y for _, y in batches]), images.labels)


def test_example_moves_nothing(images):
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


def test_images_are_shared_and_unchanged(images):
    before = images.pixels.clone()
    batches = make(images, augmentation=CROP)
    list(batches)
    assert batches.images.pixels.data_ptr() == images.pixels.data_ptr()
    assert torch.equal(before, images.pixels)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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
