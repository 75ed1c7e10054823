"""A network and images from a person's own file: trained as built-in ones, and refused in one line."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from lowcal import user_files
from lowcal.cli import main
from lowcal.data import load
from lowcal.data.datasets import read_digits
from lowcal.errors import LowcalError
from lowcal.models import build_model

from .commands import interrupted, lines, refused, small

pytestmark = pytest.mark.usefixtures("undrawn", "here")

NETS = """
from torch import nn

def build(classes, channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(64, classes))

def sized(classes, channels, image_size, width=3):
    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.Flatten(), nn.Linear(width * (image_size - 2) ** 2, classes))

def wrong_classes(classes, channels):
    return build(classes + 1, channels)

def no_network(classes, channels):
    return 3

def without(classes):
    return 3

def failing(classes, channels):
    raise KeyError("conv9")

def large_images(classes, channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 9), nn.Flatten(), nn.LazyLinear(classes))

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
    def forward(self, x):
        return x, x

def pair(classes, channels):
    return Pair()
"""
DATA = """
import torch
from PIL import Image

random = torch.Generator().manual_seed(0)
pixels = torch.randint(256, (48, 1, 8, 8), generator=random, dtype=torch.uint8)
labels = torch.arange(48) % 3

class Pictures:
    classes = ["cat", "cow", "dog"]
    def __init__(self, first, last):
        self.at = range(first, last)
    def __len__(self):
        return len(self.at)
    def __getitem__(self, index):
        return Image.fromarray(pixels[self.at[index], 0].numpy()), int(labels[self.at[index]])

def load():
    return (pixels[:36], labels[:36]), (pixels[36:], labels[36:])

def pictures():
    return Pictures(0, 36), Pictures(36, 48)

def pairs():
    return [(image, label) for image, label in zip(pixels[:36], labels)], list(zip(pixels[36:], labels))

def floats():
    return (pixels / 255, labels), (pixels, labels)

def float_pairs():
    return [(image / 255, 0) for image in pixels], []

def one():
    return Pictures(0, 36)

def no_class_0():
    return (pixels, labels + 1), (pixels, labels + 1)

def unknown_label():
    return (pixels, labels), (pixels, labels + 1)

def sizes():
    return [(pixels[0], 0), (pixels[1, :, 1:], 1)], [(pixels[0], 0)]

def far():
    return (pixels, labels + 10**12), (pixels, labels)

def short():
    return (pixels, labels[1:]), (pixels, labels)

def half_labels():
    return [(pixels[0], 0.5)], [(pixels[0], 0)]

def failing():
    return open("no_such_file")
"""


@pytest.fixture
def files(here):
    (here / "my_nets.py").write_text(NETS)
    (here / "my_data.py").write_text(DATA)
    (here / "broken.py").write_text("import no_such_module\n")
    (here / "syntax.py").write_text("def build(:\n")
    return here


OWN = ["epochs=2", "batch=12", "local.schedule={name: fixed, epochs: {1: 1}}", "data={name: my_data.py:load}"]
OWN = [part for setting in (*OWN, "model={name: my_nets.py:build}") for part in ("--set", setting)]


def test_compare_trains_an_own_network_on_own_images(files, capsys):
    assert main(["compare", *OWN, "--methods", "sgd,local", "--out", "out"]) == 0
    assert "my_nets.py:build on my_data.py:load (3 classes), 2 epochs, 36 images" in capsys.readouterr().out
    assert [record["boundary"] for record in lines(files / "out" / "local-seed0")] == [0, 1]
    kept = json.loads((files / "out" / "local-seed0" / "environment.json").read_text())["files"]
    assert set(kept) == {"my_nets.py:build", "my_data.py:load"}


@pytest.mark.parametrize("name", ["load", "pictures", "pairs"])
def test_all_forms_of_own_images_are_the_same_images(files, name):
    data, form = load("my_data.py:load"), load(f"my_data.py:{name}")
    assert torch.equal(data.train.pixels, form.train.pixels)
    assert torch.equal(data.test.pixels, form.test.pixels)
    assert torch.equal(data.test.labels, form.test.labels)
    assert (data.mean, data.std) == (form.mean, form.std)
    assert form.classes == (("cat", "cow", "dog") if name == "pictures" else ("0", "1", "2"))
    assert form.whole == (36, 12)


def test_own_images_take_the_settings_of_images_in_memory(files):
    data = load("my_data.py:load", train_images=9, image_size=16, channels=3, evaluate="validation", augment=False)
    assert data.image_shape == (3, 16, 16)
    assert len(data.train) == 9
    assert data.augmentation is None


def test_an_own_network_equals_the_same_network_by_name(files):
    """The file names a built-in network and the built-in images: every record is the same."""
    (files / "same.py").write_text(
        "from lowcal.models import build_model\n"
        "def build(classes, channels, width): "
        "return build_model('resnet8', classes=classes, in_channels=channels, width=width)\n"
    )
    options = ["--method", "local", "--quiet"]
    assert main(["train", *small(), *options, "--out", "named"]) == 0
    assert main(["train", *small("model.name=same.py:build"), *options, "--out", "own"]) == 0
    assert lines(files / "named") == lines(files / "own")


def test_layers_and_bench_take_a_file(files, capsys):
    assert main(["layers", "--model", "my_nets.py:sized", "--image-size", "8", "--width", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["weight"] == [5, 3, 3, 3]
    options = "--image-size 8 --batch 2 --rounds 1 --boundaries 0 --no-layer-times --every 1"
    assert main(["bench", "--model", "my_nets.py:build", *options.split()]) == 0
    assert "my_nets.py:build" in capsys.readouterr().out


def test_a_sweep_may_search_networks(files, capsys):
    pytest.importorskip("optuna")
    search = ["--search", "model.name=my_nets.py:build,my_nets.py:sized", "--sampler", "grid", "--quiet"]
    assert main(["sweep", "--method", "sgd", *OWN[:-2], *search, "--out", "out"]) == 0
    assert "my_nets.py:sized" in capsys.readouterr().out
    (files / "my_nets.py").write_text(NETS + "\n# changed\n")
    refused(["sweep", "--method", "sgd", *OWN[:-2], *search, "--out", "out"], "its files is my_nets.py:build (", capsys)


def test_a_run_is_not_resumed_with_a_changed_file(files, monkeypatch, capsys):
    command = ["train", *OWN, "--method", "sgd", "--out", "out"]
    assert interrupted(command, 1, monkeypatch) == 130
    (files / "my_nets.py").write_text(NETS + "\n# changed\n")
    capsys.readouterr()
    refused([*command, "--resume"], "my_nets.py has changed since out was started (digest", capsys)
    (files / "my_nets.py").write_text(NETS)
    assert main([*command, "--resume", "--quiet"]) == 0


def test_a_comparison_does_not_go_on_with_a_changed_file(files, capsys):
    assert main(["compare", *OWN, "--methods", "sgd", "--out", "out", "--quiet"]) == 0
    (files / "my_data.py").write_text(DATA + "\n# changed\n")
    refused(["compare", *OWN, "--methods", "sgd,freeze", "--out", "out"], "my_data.py has changed since", capsys)


def test_a_file_runs_once_and_again_when_it_has_changed(files):
    code = "import torch\nruns = torch.rand(1)\ndef build(classes, channels): return torch.nn.Linear(classes, {})\n"
    (files / "once.py").write_text(code.format(1))
    before = torch.random.get_rng_state()
    first, again = (user_files._function("once.py:build")[1] for _ in range(2))
    assert first is again
    assert torch.equal(before, torch.random.get_rng_state())
    assert build_model("once.py:build", classes=2).out_features == 1
    (files / "once.py").write_text(code.format(7))
    assert build_model("once.py:build", classes=2).out_features == 7


def test_a_file_imports_its_neighbours_and_its_classes_can_be_pickled(files):
    import pickle

    (files / "neighbour.py").write_text("def layer(n): return __import__('torch').nn.Linear(n, n)\n")
    (files / "with_neighbour.py").write_text(
        "import neighbour\nfrom torch import nn\nclass Net(nn.Sequential): pass\n"
        "def build(classes, channels): return Net(neighbour.layer(classes))\n"
    )
    model = build_model("with_neighbour.py:build", classes=3)
    assert isinstance(model, nn.Sequential)
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


WRONG = {
    "no file": ("model.name=none.py:build", "file none.py does not exist"),
    "no function": ("model.name=my_nets.py:bild", "my_nets.py has no function 'bild'; did you mean 'build'?"),
    "does not import": (
        "model.name=broken.py:build",
        "broken.py does not import: ModuleNotFoundError: No",
    ),
    "no Python": ("model.name=syntax.py:build", "syntax.py does not import: SyntaxError"),
    "fails": ("model.name=my_nets.py:failing", "my_nets.py:failing failed: KeyError: 'conv9' (line 21); correct"),
    "no network": ("model.name=my_nets.py:no_network", "no_network returned a int; it must return the network"),
    "no argument": ("model.name=my_nets.py:without", "without takes no argument 'channels'"),
    "other classes": ("model.name=my_nets.py:wrong_classes", "returns shape (2, 4) for 2 images of 1x8x8"),
    "a pair": ("model.name=my_nets.py:pair", "returns a tuple for 2 images"),
    "larger images": ("model.name=my_nets.py:large_images", "does not take images of 1x8x8"),
    "width": ("model={name: my_nets.py:build, width: 8}", "'my_nets.py:build' has no settable width (found 8)"),
    "no data": ("data.name=my_data.py:lod", "my_data.py has no function 'lod'; did you mean 'load'?"),
    "no form": ("data.name=my_data.py", "or text, as in my_data.py:load"),
    "data fails": ("data.name=my_data.py:failing", "my_data.py:failing failed: FileNotFoundError"),
    "floats": ("data.name=my_data.py:floats", "the tensor is float32 of shape (48, 1, 8, 8); give uint8"),
    "float pairs": (
        "data.name=my_data.py:float_pairs",
        "item 0 is no pair of an image and a label (the image is a",
    ),
    "one part": ("data.name=my_data.py:one", "returned a Pictures; it must return (train, test)"),
    "no class 0": ("data.name=my_data.py:no_class_0", "no training image has the label 0"),
    "unknown label": ("data.name=my_data.py:unknown_label", "no training image has the label 3, and"),
    "sizes": ("data.name=my_data.py:sizes", "image 1 is 1x7x8, the first 1x8x8"),
    "far labels": ("data.name=my_data.py:far", "has the label 0, and the highest label is 1000000000002"),
    "labels": ("data.name=my_data.py:short", "the labels must be 48 whole numbers"),
    "half labels": ("data.name=my_data.py:half_labels", "item 0 is no pair"),
    "classes": ("data={name: my_data.py:load, classes: 3}", "brings its own classes"),
}


@pytest.mark.parametrize(("setting", "expected"), WRONG.values(), ids=list(WRONG))
def test_a_mistake_is_one_line_and_nothing_is_written(files, setting, expected, capsys):
    refused(["train", *OWN, "--set", setting, "--out", "out"], expected, capsys)
    assert not (files / "out").exists()


def test_own_images_without_a_folder(files, capsys):
    refused(["train", *OWN, "--data-dir", "x"], "reads no folder", capsys)


def test_grey_pictures_of_16_bits_are_scaled(files):
    (files / "deep.py").write_text(
        "import numpy as np\nfrom PIL import Image\n"
        "images = [(Image.fromarray(np.full((8, 8), 256 * n, dtype=np.uint16)), n) for n in (0, 1, 2)]\n"
        "def load(): return images, images\n"
    )
    assert load("deep.py:load").train.pixels[:, :, 0, 0].tolist() == [[n] * 3 for n in (0, 1, 2)]


def test_the_files_digits_train_as_the_built_in_digits(files):
    """Own images in the order of the built-in ones are the same mini-batches."""
    source = read_digits()
    (files / "digits.py").write_text(
        "from lowcal.data.datasets import read_digits\n"
        "def load():\n    s = read_digits()\n"
        "    return (s.train.pixels, s.train.labels), (s.test.pixels, s.test.labels)\n"
    )
    own, named = load("digits.py:load"), load("digits")
    assert torch.equal(own.train.pixels, source.train.pixels)
    assert replace(own, name="digits", augmentation=named.augmentation, train=named.train, test=named.test) == named


def test_an_own_error_is_passed_on(files):
    (files / "own.py").write_text("import lowcal\ndef build(classes, channels): raise lowcal.LowcalError('use less')\n")
    with pytest.raises(LowcalError, match=r"^use less$"):
        build_model("own.py:build", classes=2)
