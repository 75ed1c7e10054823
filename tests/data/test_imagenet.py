"""ImageNet's layout: files decoded during training, in processes that change nothing."""

import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lowcal.data import FileBatches, Files, available_workers, images, load, make_loader
from lowcal.data.images import Decoders, Decoding
from lowcal.data.policy import Policy
from lowcal.errors import LowcalError

SIZE = 32

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python 3.12 on
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a single processor
]


@pytest.fixture
def root(tmp_path):
    """ImageNet's layout: two classes, JPEG files of different sizes, in colour and in grey."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 3)):
        for label in ("n01440764", "n01443537"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                coarse = rng.integers(0, 256, (5, 6, 3) if index else (5, 6), dtype=np.uint8)
                size = (60 + 5 * index, 50) if index % 2 else (45, 70 + index)
                Image.fromarray(coarse).resize(size).save(folder / f"{index}.JPEG")
    return tmp_path / "images"


def read(root, *, workers=0, **settings):
    return load("imagenet", data_dir=root, **{"image_size": SIZE, "classes": 2, "workers": workers} | settings)


def passes(loader, count=1):
    return [[(x.clone(), y.clone()) for x, y in loader] for _ in range(count)]


def same(left, right):
    """Whether two lists of passes are bitwise the same."""
    batches = [pair for one, two in zip(left, right, strict=True) for pair in zip(one, two, strict=True)]
    return all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in batches)


def train_loader(data, **settings):
    return make_loader(data, training=True, **{"batch": 4, "device": "cpu", "seed": 3, **settings})


def test_what_is_read(root):
    data = read(root)
    assert data.classes == ("n01440764", "n01443537")
    assert (len(data.train), len(data.test)) == (14, 6)
    assert data.image_shape == (3, SIZE, SIZE)
    assert data.mean == (0.485, 0.456, 0.406)
    assert data.std == (0.229, 0.224, 0.225)
    assert isinstance(data.train, Files)
    assert data.to("meta").train is data.train
    assert load("imagenet", data_dir=root, classes=2).image_shape == (3, 224, 224)


def test_evaluation_scales_the_shorter_side_to_8_7ths_and_cuts_the_middle_out(root):
    data = read(root)
    ((x, y),) = make_loader(data, training=False, batch=6, device="cpu")
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    transform = v2.Compose(
        [
            v2.Resize(37),
            v2.CenterCrop(SIZE),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.mean, data.std),
        ]
    )
    expected = [transform(Image.open(path).convert("RGB")) for path in sorted(root.glob("val/*/*.JPEG"))]
    torch.testing.assert_close(x, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_a_pass_gives_each_training_image_once_in_a_new_order_and_newly_cropped(root):
    loader = train_loader(read(root))
    assert len(loader) == 4
    first, second = passes(loader, 2)
    assert [len(y) for _, y in first] == [4, 4, 4, 2]
    assert torch.cat([y for _, y in first]).bincount().tolist() == [7, 7]
    assert [y.tolist() for _, y in first] != [y.tolist() for _, y in second]
    assert not torch.equal(first[0][0], second[0][0])


def test_a_crop_has_nothing_from_outside_its_file(root):
    for path in root.glob("train/*/*.JPEG"):
        Image.new("RGB", (50, 40), (200, 30, 90)).save(path)
    data = read(root)
    ((x, _),) = train_loader(data, batch=14)
    colour = (torch.tensor([200, 30, 90]) / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    torch.testing.assert_close(x, colour.view(3, 1, 1).expand_as(x), atol=0.06, rtol=0)


def test_about_half_are_mirrored_and_crops_differ(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 64, 3))
    for split in ("train", "val"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(50 if split == "train" else 1):
                Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / split / label / f"{index}.png")
    ((x, _),) = train_loader(read(tmp_path), batch=100)
    rises = x[:, 0, :, -1].mean(1) > x[:, 0, :, 0].mean(1)
    assert 30 <= int(rises.sum()) <= 70
    assert len(x[:, 0].mean((1, 2)).unique()) > 90


def test_workers_change_nothing(root):
    assert same(*(passes(train_loader(read(root, workers=workers)), 2) for workers in (0, 2)))
    evaluations = [passes(make_loader(read(root, workers=n), training=False, batch=4, device="cpu")) for n in (0, 2)]
    assert same(*evaluations)


def test_the_seed_decides_order_and_crops_and_no_other_random_state_does_or_moves(root):
    data = read(root)
    plain, other, last = (passes(train_loader(data, **some), 2) for some in ({}, {"seed": 4}, {"channels_last": True}))
    assert not same(plain, other)
    assert same(plain, last)
    assert last[0][0][0].is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    assert same(plain, passes(train_loader(data), 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("stop", "workers"), [(0, 0), (1, 0), (4, 0), (1, 2)])
def test_resuming_is_exact_at_an_epochs_end_and_inside_one(root, workers, stop):
    whole = passes(train_loader(read(root)), 3)
    data = read(root, workers=workers)
    first = train_loader(data)
    passes(first)
    for _ in zip(range(stop), first, strict=False):
        pass
    second = train_loader(data, seed=99, batch=2)
    torch.save(first.state_dict(), root / "state.pt")
    second.load_state_dict(torch.load(root / "state.pt", weights_only=True))
    assert second.state_dict() == first.state_dict()
    ends = [whole[1][stop:], whole[2]] if stop else whole[1:]
    assert same(ends, passes(second, len(ends)))


def test_a_pass_given_up_is_no_trouble_for_the_next(root):
    data = read(root, workers=2)
    loader, plain = train_loader(data), passes(train_loader(data), 2)
    state = loader.state_dict()
    next(iter(loader))
    loader.load_state_dict(state)
    assert same(plain, passes(loader, 2))


def test_loaders_of_a_dataset_share_workers_unless_their_passes_overlap(root):
    data = read(root, workers=1)
    train, test = train_loader(data), make_loader(data, training=False, batch=2, device="cpu")
    plain, held = passes(train), passes(test)
    idle = data.train.decoders._idle[False]
    assert len(idle) == 1
    train = train_loader(data)
    for (x, _), expected in zip(train, plain[0], strict=True):
        assert torch.equal(x, expected[0])
        assert same(passes(test), held)
    assert len(idle) == 2


def test_sample_input_is_what_evaluation_sees_and_moves_nothing(root):
    data = read(root)
    loader = train_loader(data)
    state = loader.state_dict()
    example = loader.sample_input(3)
    assert loader.state_dict() == state
    plain = FileBatches(data.train, batch=3, mean=data.mean, std=data.std)
    torch.testing.assert_close(example, next(iter(plain))[0])
    assert len(loader.sample_input(100)) == 14


def test_batch_can_grow_between_passes(root):
    loader = train_loader(read(root))
    passes(loader)
    loader.batch = 7
    assert [len(y) for _, y in passes(loader)[0]] == [7, 7]
    with pytest.raises(LowcalError, match=r"batch is 15, larger than the data \(14 images\)"):
        loader.batch = 15


def test_subsets_and_validation(root):
    data = read(root, train_images=6, evaluate="validation", validation_fraction=0.3)
    assert (len(data.train), len(data.test)) == (6, 4)
    assert data.train.labels.bincount().tolist() == [3, 3]
    assert not set(data.train.paths) & set(data.test.paths)
    assert all("/train/" in path for path in data.test.paths)


def test_state_of_other_data_is_refused_and_changes_nothing(root):
    loader = train_loader(read(root))
    next(iter(loader))
    before = loader.state_dict()
    with pytest.raises(LowcalError, match="of 6 images, the data has 14"):
        loader.load_state_dict(train_loader(read(root, train_images=6)).state_dict())
    with pytest.raises(LowcalError, match="lacks epoch, seed"):
        loader.load_state_dict({"images": 14, "batch": 4, "position": 0, "order": None, "draws": None})
    assert loader.state_dict() == before


@pytest.fixture
def damaged(root):
    whole = (root / "train/n01440764/1.JPEG").read_bytes()
    (root / "train/n01440764/1.JPEG").write_bytes(whole[: len(whole) // 2])
    (root / "val/n01443537/0.JPEG").write_bytes(b"")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_file_stops_the_pass_and_is_named(damaged, workers):
    data = read(damaged, workers=workers)
    for training, file in ((True, "train/n01440764/1.JPEG"), (False, "val/n01443537/0.JPEG: the file is empty")):
        with pytest.raises(LowcalError, match=f"cannot read image .*{file}.*data.on_error=skip") as caught:
            passes(make_loader(data, training=training, batch=2, device="cpu"))
        assert "\n" not in str(caught.value)


def test_corrupt_files_are_skipped_and_counted(damaged):
    data = read(damaged, on_error="skip")
    assert [text.partition(": ")[0] for text in data.skipped] == [
        str(damaged / "train/n01440764/1.JPEG"), str(damaged / "val/n01443537/0.JPEG"),
    ]  # fmt: skip
    assert (len(data.train), len(data.test)) == (13, 5)
    assert data.train.labels.bincount().tolist() == [6, 7]
    assert [len(y) for _, y in passes(train_loader(data))[0]] == [4, 4, 4, 1]


def test_files_are_tried_once_and_again_when_one_changes(damaged, monkeypatch):
    tried = []
    original = images.read_rgb
    monkeypatch.setattr(images, "read_rgb", lambda path, **kw: tried.append(path) or original(path, **kw))
    first = read(damaged, on_error="skip")
    assert len(tried) == 20
    assert read(damaged, on_error="skip").skipped == first.skipped
    assert len(tried) == 20
    Image.new("RGB", (50, 50)).save(damaged / "val/n01443537/0.JPEG")
    assert len(read(damaged, on_error="skip").skipped) == 1
    assert len(tried) == 26


def test_class_whose_files_are_all_bad(root):
    for path in (root / "train/n01443537").iterdir():
        path.write_text("no image")
    with pytest.raises(LowcalError, match="without one readable image: n01443537"):
        read(root, on_error="skip")


def test_a_killed_worker_is_one_line_and_the_next_pass_has_new_ones(root):
    data = read(root, workers=1)
    loader = train_loader(data, batch=1)
    plain = passes(loader)
    ((_, idle),) = data.train.decoders._idle[False]
    os.kill(idle._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(LowcalError, match=r"decoding images failed: .*set fewer data.workers \(1\)") as caught:
        passes(loader)
    assert "\n" not in str(caught.value)
    assert same(plain, passes(train_loader(data, batch=1)))


def test_available_workers():
    assert 1 <= available_workers() <= 16
    make = partial(Decoding, 8, Policy())
    assert Decoders((3, 8, 8), make).workers == available_workers()
    assert Decoders((3, 8, 8), make, 3).workers == 3


def test_layout_mistakes(root, tmp_path):
    def message(folder):
        with pytest.raises(LowcalError) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no data folder" in message(tmp_path / "nowhere")
    (root / "val/n01443537").rename(root / "val/n01443538")
    assert "only in train/: n01443537; only in val/: n01443538" in message(root)
    (root / "val").rename(root / "test")
    assert "must hold train/ and val/; it holds test, train" in message(root)
    (tmp_path / "one/train/a").mkdir(parents=True)
    (tmp_path / "one/val").mkdir()
    assert "two or more classes; found only 'a'" in message(tmp_path / "one")


@pytest.mark.gpu
def test_cuda_gets_what_the_cpu_gets(root):
    plain = passes(train_loader(read(root)))
    for workers in (0, 2):
        on_device = passes(train_loader(read(root, workers=workers), device="cuda"))
        for (x, y), (expected, labels) in zip(on_device[0], plain[0], strict=True):
            assert x.device.type == y.device.type == "cuda"
            torch.testing.assert_close(x.cpu(), expected)
            assert torch.equal(y.cpu(), labels)
