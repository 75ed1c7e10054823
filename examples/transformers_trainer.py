"""The Trainer of transformers with LoCal: only the callback is new (marked +)."""

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import lowcal
from lowcal.integrations.transformers import LoCalTrainerCallback  # +

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
samples = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, digits.target, strict=True)]

model = ResNetForImageClassification(  # random weights
    ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
    )
)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=6, per_device_train_batch_size=50, learning_rate=0.005,
        save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        train_dataset=samples[:1500],
        callbacks=[LoCalTrainerCallback(rule=lowcal.Hebbian(lr=0.001), schedule=lowcal.Fixed({2: 1, 4: 2}))],  # +
    )
    trainer.train()

model.eval()
with torch.no_grad():
    outputs = model(images[1500:].to(model.device)).logits
correct = (outputs.argmax(1).cpu() == torch.tensor(digits.target[1500:])).float().mean()
boundary = [entry["lowcal/boundary"] for entry in trainer.state.log_history if "lowcal/boundary" in entry][-1]
print(f"accuracy {correct:.1%}  boundary {boundary}")
