"""`lowcal.Cached`: the same results, frozen layers computed once for each image, and what cannot be cached."""

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.functional import cross_entropy, relu
from torch.utils.data import TensorDataset

from lowcal import Cached, Fixed, Frozen, Hebbian, LoCal, LowcalError, Refresh
from lowcal.activations import FILE, Layout
from lowcal.models import build_model
from lowcal.program import record
from lowcal.strided import slice_inputs

from .support import same

COUNT = 22
MOVES = {0: 3, 2: 5}
FROZEN = Frozen()


class Watched:
    """Images that count how often each is asked for."""

    def __init__(self, images):
        self.images, self.asked = images, torch.zeros(len(images))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.asked += torch.bincount(index, minlength=len(self))
        return self.images[index]


class Net(nn.Module):
    """Residual, with several tensors across the boundary, a change in place, and random numbers behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(width, 6, 3, padding=1) for width in (2, 6, 6))
        self.head, self.drop = nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, 3)), nn.Dropout(0.4)

    def forward(self, x):
        a = self.first(x)
        b = self.second(relu(a))
        keep = torch.empty(len(x), 1, 1, 1).bernoulli_(0.8)  # a random mask that needs no gradient
        a += self.third(relu(b)) * keep
        return self.head(self.drop(a + b))


def convolutions():
    torch.manual_seed(0)
    model = build_model("resnet8", classes=3, in_channels=2, width=4)
    slice_inputs(model)  # for channels last
    return model


def images_of():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(COUNT, 2, 8, 8, generator=generator), torch.arange(COUNT) % 3


def controller(model, images, moves=MOVES, rule=FROZEN, norm_stats="running", epochs=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return LoCal(
        model, optimizer, epochs=epochs, rule=rule, schedule=Fixed(moves), norm_stats=norm_stats,
        example_inputs=images[:1],
    )  # fmt: skip


def train(model, call=None, moves=MOVES, precision=None, epochs=4, **options):
    """Losses and weights after a plain loop with smaller last batches; `call` makes the network from `local`."""
    images, labels = images_of()
    local = controller(model, images, moves)
    network = (lambda index: model(images[index])) if call is None else call(local, images, **options)
    order, losses = torch.Generator().manual_seed(0), []
    torch.manual_seed(2)
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(COUNT, generator=order).split(5):
            with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
                loss = cross_entropy(network(index).float(), labels[index])
            local.optimizer.zero_grad()
            loss.backward()
            local.optimizer.step()
            losses.append(loss.item())
        local.end_epoch(sum(losses[-5:]) / 5)
    local.detach()
    return losses, model.state_dict()


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", ["convolutions", "channels last", "bf16", "residual"])
def test_losses_and_weights_are_bitwise_those_without_the_cache(tmp_path, kind, where):
    """Over a move and smaller last batches, with batch statistics and random numbers behind the boundary."""
    torch.manual_seed(0)
    model, moves = (Net(), {0: 1, 2: 2}) if kind == "residual" else (convolutions(), MOVES)
    if kind == "channels last":
        model = model.to(memory_format=torch.channels_last)
    options = {"moves": moves, "precision": torch.bfloat16 if kind == "bf16" else None}
    wanted = train(copy.deepcopy(model), **options)
    found = train(model, Cached, folder=tmp_path / "new" if where == "disk" else None, **options)
    assert same(found, wanted)
    assert (tmp_path / "new" / FILE).exists() == (where == "disk")


def test_halved_activations_change_the_losses_a_little():
    wanted, found = train(convolutions())[0], train(convolutions(), Cached, half=True)[0]
    assert found != wanted
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0.01, atol=0.01)


def test_each_image_is_asked_for_once_at_a_boundary():
    model = convolutions()
    images, _ = images_of()
    watched = Watched(images)
    cached = Cached(controller(model, images), watched)
    orders = [torch.randperm(COUNT) for _ in range(3)]
    for order in orders:
        for index in order.split(11):
            cached(index)
    recorded = torch.bincount(orders[0][:11], minlength=COUNT)  # the pass that is recorded
    assert torch.equal(watched.asked, 1 + recorded)


def test_it_is_filled_again_after_a_move_and_after_other_weights():
    model = convolutions()
    images, _ = images_of()
    local = controller(model, images)
    cached, index = Cached(local, images), torch.arange(11)
    model.eval()
    assert torch.equal(cached(index), model(images[index]))  # the whole network
    model.train()
    before = cached.gather(index)
    local.move_to(5)
    assert [tensor.shape for tensor in before] != [tensor.shape for tensor in cached.gather(index)]
    torch.manual_seed(3)
    other = build_model("resnet8", classes=3, in_channels=2, width=4)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(cached(index), model(images[index]))


def test_a_dataset_gives_its_images():
    model = convolutions()
    images, labels = images_of()
    local = controller(model, images)
    one, other = (Cached(local, inputs)(torch.arange(4)) for inputs in (images, TensorDataset(images, labels)))
    assert torch.equal(one, other)


def test_a_later_process_uses_the_file_again(tmp_path):
    model = convolutions()
    images, _ = images_of()
    local = controller(model, images)
    first = Cached(local, images, folder=tmp_path, half=True).gather(torch.arange(6))
    with safe_open(tmp_path / FILE, framework="pt") as file:
        assert file.get_tensor("0").dtype == torch.float16
    before = (tmp_path / FILE).stat()
    again = Cached(local, images, folder=tmp_path, half=True).gather(torch.arange(6))
    assert same(first, again)
    assert (tmp_path / FILE).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("change", ["images", "number", "weights", "half", "boundary", "cut", "text"])
def test_a_file_of_something_else_is_refused(tmp_path, change):
    model = convolutions()
    images, _ = images_of()
    local = controller(model, images)
    Cached(local, images, folder=tmp_path).gather(torch.arange(6))
    if change == "images":
        images[7, 0, 0, 0] += 1
    elif change == "number":
        images = images[:-1]
    elif change == "weights":
        with torch.no_grad():
            model.get_parameter(f"{local.layers[0]}.weight").add_(1e-3)
    elif change == "boundary":
        local.move_to(5)
    elif change in ("cut", "text"):
        content = (tmp_path / FILE).read_bytes()
        (tmp_path / FILE).write_bytes(content[:-100] if change == "cut" else b"something")
    content = (tmp_path / FILE).read_bytes()
    with pytest.raises(LowcalError, match="remove") as error:
        Cached(local, images, folder=tmp_path, half=change == "half").gather(torch.arange(6))
    assert "\n" not in str(error.value)
    assert (tmp_path / FILE).read_bytes() == content


@pytest.mark.parametrize("folder", [None, "new"])
def test_a_limit_is_checked_before_anything_is_computed(tmp_path, folder):
    model = convolutions()
    images, _ = images_of()
    watched, local = Watched(images), controller(model, images)
    needed = COUNT * sum(tensor.nbytes for tensor in Cached(local, images).gather(torch.arange(1)))
    folder = folder and tmp_path / folder
    cached = Cached(local, watched, folder=folder, limit=needed - 1)
    with pytest.raises(LowcalError, match="are allowed") as error:
        cached(torch.arange(2))
    assert "\n" not in str(error.value)
    assert watched.asked.sum() == 2  # those of the pass that is recorded
    assert not list(tmp_path.iterdir())
    Cached(local, images, folder=folder, limit=needed)(torch.arange(2))


def test_more_than_is_free_is_refused(monkeypatch):
    model = convolutions()
    images, _ = images_of()
    monkeypatch.setattr("lowcal.cache.free_bytes", lambda device, folder: 1000)
    local = controller(model, images)
    for limit in (None, 2**30):
        with pytest.raises(LowcalError, match="but 1000 B are free"):
            Cached(local, images, limit=limit).check()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(28, "No space left on device")

    model = convolutions()
    images, _ = images_of()
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(LowcalError, match="No space left on device") as error:
        Cached(controller(model, images), images, folder=tmp_path)(torch.arange(4))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def views_of(images):
    """Images that differ from epoch to epoch, and the epochs that were asked for."""
    asked = []

    def at(epoch):
        asked.append(epoch)
        return images.roll(epoch, dims=-1) + epoch

    return at, asked


def test_views_are_stored_once_and_taken_in_turn(tmp_path):
    """Two at boundary 3 from epoch 0 on, and one at 5, for which one epoch is left."""
    model = convolutions()
    images, _ = images_of()
    at, asked = views_of(images)
    local = controller(model, images, {0: 3, 4: 5}, epochs=5)
    for folder in (None, tmp_path):
        cached, index = Cached(local, at, folder=folder, views=2), torch.arange(11)
        for epoch, view in enumerate([0, 1, 0, 1]):
            local.epoch = epoch
            assert torch.equal(cached(index), model(at(view)[index]))
        assert len(cached._store._tensors[0]) == 2 * COUNT
        local.epoch = 0
    asked.clear()
    local.epoch = 3
    Cached(local, at, folder=tmp_path, views=2).gather(index)  # the same file again
    assert set(asked) == {3, 0, 1}
    with pytest.raises(LowcalError, match="other images, weights or settings"):
        Cached(local, at, folder=tmp_path, views=3).gather(index)
    with pytest.raises(LowcalError, match="other images, weights or settings"):
        Cached(local, lambda epoch: at(epoch + 1), folder=tmp_path, views=2).gather(index)


def test_views_are_limited_beforehand(monkeypatch):
    model = convolutions()
    images, _ = images_of()
    local = controller(model, images)
    needed = COUNT * sum(tensor.nbytes for tensor in Cached(local, images).gather(torch.arange(1)))
    at, _ = views_of(images)
    Cached(local, at, views=3, limit=3 * needed).check()
    with pytest.raises(LowcalError, match=r"22 images in 3 views, but .* are allowed .* store fewer views") as error:
        Cached(local, at, views=3, limit=3 * needed - 1).check()
    assert "\n" not in str(error.value)
    for wrong in ((at, 0), (at, None), (images, 2)):
        with pytest.raises(LowcalError, match="views"):
            Cached(local, wrong[0], views=wrong[1])


class Mixing(Net):
    def forward(self, x):
        a = self.first(x)
        return self.head(self.second(a - a.mean(0)))


class Choosing(Net):
    def forward(self, x):
        a = self.first(x)
        return self.head(self.second(a) if a.sum() > 0 else a)


class Dropping(Net):
    def forward(self, x):
        return self.head(self.second(self.drop(self.first(x))))


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Mixing, "other images of its mini-batch"), (Choosing, "reads values"), (Dropping, "draw random numbers")],
)
def test_what_cannot_be_cached_is_refused(kind, message):
    torch.manual_seed(0)
    model = kind()
    images, _ = images_of()
    cached = Cached(controller(model, images, {0: 1}), images)
    with pytest.raises(LowcalError, match=message) as error:
        cached(torch.arange(4))
    assert "\n" not in str(error.value)


def test_batch_statistics_are_refused():
    model = convolutions()
    images, _ = images_of()
    with pytest.raises(LowcalError, match="set norm_stats to 'running'"):
        Cached(controller(model, images, norm_stats="batch"), images)(torch.arange(4))


@pytest.mark.parametrize("rule", [Hebbian(), Refresh()])
def test_layers_that_change_are_refused(rule):
    model = convolutions()
    images, _ = images_of()
    with pytest.raises(LowcalError, match=r"rule=lowcal\.Frozen"):
        Cached(controller(model, images, rule=rule), images)


def test_too_large_values_are_not_halved():
    model = Net()
    images = 1e6 * images_of()[0]
    with pytest.raises(LowcalError, match="too large for float16"):
        Cached(controller(model, images, {0: 1}), images, half=True)(torch.arange(4))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 1, 5, 1), (3, 4, 1, 1)])
def test_a_layout_restores_values_and_strides(shape, memory_format):
    tensor = torch.randn(shape).to(memory_format=memory_format)
    layout = Layout.of(tensor, half=False)
    stored = layout.lay(tensor).contiguous()
    restored = layout.restore(stored)
    assert torch.equal(restored, tensor)
    assert restored.is_contiguous(memory_format=memory_format)
    assert stored.shape == (3, *layout.shape)


def test_a_counter_stays_on_its_side_and_a_constant_goes_where_it_is_needed():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.norm(self.head(self.first(x)) * torch.full((4,), 2.0))

    torch.manual_seed(0)
    model, images = Counting(), torch.randn(3, 4)
    model.first.requires_grad_(False)
    program = record(model, images)
    (crossing,) = program.prefix({0: images}).values()
    assert torch.equal(crossing, model.first(images))
    assert model.norm.num_batches_tracked == 1
    program.suffix(dict.fromkeys(program.prefix.results, crossing))
    assert model.norm.num_batches_tracked == 2
