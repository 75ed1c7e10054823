"""The callback for the Trainer: the weights of a plain loop, exact resume, and mistakes."""

import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import lowcal
from lowcal.integrations.transformers import LoCalTrainerCallback

from ..support import refused, same, weights

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's own advice

EPOCHS = 5
OPTIONS = {"rule": lowcal.Hebbian(lr=0.05), "schedule": lowcal.Fixed({1: 1, 3: 2})}  # two moves


def vit():
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=2, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(1)
    return ViTForImageClassification(config)


def resnet():
    config = ResNetConfig(
        num_channels=2, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    torch.manual_seed(1)
    return ResNetForImageClassification(config)


def convnext():
    config = ConvNextConfig(
        num_channels=2, patch_size=2, num_stages=2, hidden_sizes=[4, 8], depths=[1, 1], image_size=8, num_labels=3
    )
    torch.manual_seed(1)
    return ConvNextForImageClassification(config)


def bert():
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(1)
    return BertForSequenceClassification(config)


def data(model, size=12):
    generator = torch.Generator().manual_seed(3)
    if model.main_input_name == "input_ids":
        inputs = torch.randint(20, (size, 6), generator=generator)
    else:
        inputs = torch.randn(size, 2, 8, 8, generator=generator)
    return [{model.main_input_name: x, "labels": int(index % 3)} for index, x in enumerate(inputs)]


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(folder, model, own, resume=None, **options):
    args = TrainingArguments(**{
        "output_dir": str(folder), "num_train_epochs": EPOCHS, "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant", "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_strategy": "no", **options,
    })  # fmt: skip
    trainer = InOrder(model, args, train_dataset=data(model), callbacks=[own], optimizers=(sgd(model), None))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def plain(model, *, accumulate=1, bf16=False, **options):
    optimizer = sgd(model)
    local = lowcal.LoCal(model, optimizer, epochs=EPOCHS, **{**OPTIONS, **options})
    samples, name = data(model), model.main_input_name
    model.train()
    for _ in range(EPOCHS):
        losses = []
        for start in range(0, 12, 4):
            part = samples[start : start + 4]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                inputs = torch.stack([sample[name] for sample in part])
                loss = model(**{name: inputs}, labels=torch.tensor([sample["labels"] for sample in part])).loss
            (loss / accumulate).backward()
            if start // 4 % accumulate == accumulate - 1:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                model.zero_grad()
            losses.append(loss.detach())
        local.end_epoch(torch.stack(losses).mean())
    return local


@pytest.mark.parametrize("network", [vit, resnet, convnext, bert])
@pytest.mark.parametrize("rule", [lowcal.Hebbian(lr=0.05), lowcal.Frozen(), lowcal.Refresh(every=2)], ids=str)
def test_trains_as_a_plain_loop_does(network, rule, tmp_path):
    model, own = network(), LoCalTrainerCallback(**{**OPTIONS, "rule": rule})
    trainer = train(tmp_path, model, own)
    expected = network()
    local = plain(expected, rule=rule)
    assert same(weights(model), weights(expected))
    assert own.local.history == local.history == ((1, 1), (3, 2))
    logged = [entry for entry in trainer.state.log_history if "lowcal/boundary" in entry]
    assert [entry["lowcal/boundary"] for entry in logged] == [0, 1, 1, 2, 2]
    assert logged[-1]["lowcal/change"] == local.change
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.modules())


def test_bf16(tmp_path):
    model, expected = vit(), vit()
    train(tmp_path, model, LoCalTrainerCallback(**OPTIONS), bf16=True)
    plain(expected, bf16=True)
    assert same(weights(model), weights(expected))


def test_accumulation(tmp_path):
    model, expected = vit(), vit()
    train(tmp_path, model, LoCalTrainerCallback(**OPTIONS), gradient_accumulation_steps=3)
    plain(expected, accumulate=3)
    for name, value in weights(expected).items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_a_run_that_stops_in_the_middle_of_an_epoch_goes_on(tmp_path):
    model, expected = resnet(), resnet()
    options = {"save_strategy": "steps", "save_steps": 1}
    train(tmp_path, resnet(), LoCalTrainerCallback(**OPTIONS), max_steps=3 * EPOCHS - 4, **options)
    own = LoCalTrainerCallback(**OPTIONS)
    train(tmp_path, model, own, True, **options)
    plain(expected)
    assert own.local.epoch == EPOCHS
    assert same(weights(model), weights(expected))


@pytest.mark.parametrize("saves", ["epoch", "steps"])
def test_resumes_exactly_from_each_checkpoint(saves, tmp_path):
    def run(resume=None):
        model = resnet()
        own = LoCalTrainerCallback(rule=lowcal.Hebbian(lr=0.05), schedule=lowcal.NormTrend(1.5, 1, interval=1))
        train(tmp_path, model, own, resume, save_strategy=saves, save_steps=1)
        return weights(model), own.local.state_dict()

    whole = run()
    assert len(whole[1]["history"]) >= 2
    folders = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(folders) == (3 * EPOCHS if saves == "steps" else EPOCHS)
    for folder in folders[:-1]:
        assert same(run(str(folder)), whole), folder.name


def test_mistakes(tmp_path, monkeypatch):
    own = LoCalTrainerCallback()
    train(tmp_path, resnet(), own, num_train_epochs=1, save_strategy="epoch")
    with refused("callback of its own"):
        train(tmp_path, resnet(), own)
    folder = tmp_path / "checkpoint-3"
    other = tmp_path / "other"
    shutil.copytree(folder, other / "checkpoint-3")
    (other / "checkpoint-3" / "lowcal.pt").unlink()
    with refused("lowcal.pt", "saved with this callback"):
        train(other, resnet(), LoCalTrainerCallback(), str(folder))
    train(other, vit(), LoCalTrainerCallback(), num_train_epochs=1, save_strategy="epoch")
    with refused("other weights", "whole checkpoint"):
        train(other, resnet(), LoCalTrainerCallback(), str(folder))
    with refused("no loss", "label_smoothing_factor"):
        train(tmp_path, resnet(), LoCalTrainerCallback(), label_smoothing_factor=0.1)
    with refused("torch_compile"):
        train(tmp_path, resnet(), LoCalTrainerCallback(), torch_compile=True)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with refused("2 GPUs", "one device"):
        train(tmp_path, resnet(), LoCalTrainerCallback())
