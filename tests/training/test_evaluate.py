import pytest
import torch
from torch import nn

from lowcal.training.evaluate import evaluate

from ..networks import convnet, images
from ..support import same, weights

CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [(12,), (5, 5, 2), (1, 11)])
def test_it_is_the_mean_over_images_whatever_the_batches(sizes):
    model = convnet()
    inputs, labels = (torch.cat(part) for part in zip(*images(3, size=4), strict=True))
    model(inputs)
    batches = list(zip(inputs.split(sizes), labels.split(sizes), strict=True))
    before = weights(model)
    loss, error = evaluate(model, batches, device=CPU, precision="float32")
    scores = model(inputs).detach().double()
    log_odds = scores - scores.exp().sum(1, keepdim=True).log()
    expected = -sum(float(row[label]) for row, label in zip(log_odds, labels, strict=True)) / 12
    wrong = sum(int(row.argmax()) != int(label) for row, label in zip(scores, labels, strict=True))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert error == pytest.approx(100 * wrong / 12)
    assert 0 < wrong < 12
    assert same(weights(model), before)


def test_what_a_network_keeps_from_it_serves_in_training():
    class Caching(nn.Module):
        """Keeps its position embedding for the size it has seen last, as some networks do."""

        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[int, torch.Tensor] = {}
            self.head = nn.Linear(72, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            if len(x) not in self.kept:
                self.kept[len(x)] = torch.linspace(0, 1, x.shape[1]).expand_as(x).clone()
            return self.head(x * self.kept[len(x)])

    model = Caching()
    inputs, labels = images(1)[0]
    evaluate(model, [(inputs, labels)], device=CPU, precision="float32")
    nn.functional.cross_entropy(model(inputs), labels).backward()
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_near_single(precision):
    model = convnet().eval()
    batches = images(2)
    single, _ = evaluate(model, batches, device=CPU, precision="float32")
    mixed, _ = evaluate(model, batches, device=CPU, precision=precision)
    assert mixed == pytest.approx(single, rel=0.02)
    assert mixed != single
