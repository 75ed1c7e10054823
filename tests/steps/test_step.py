import copy

import pytest
import torch
from torch import nn

from lowcal import LowcalError
from lowcal.methods.base import SGD
from lowcal.steps.modes import build_step
from lowcal.steps.step import StepOptions, autocast, build_scaler

from ..networks import convnet, images
from ..support import same, sgd, train_step, weights

CPU = torch.device("cpu")


def built(precision="float32", method_class=SGD, model=None):
    model = convnet() if model is None else model
    optimizer = sgd(model)
    scaler = build_scaler(CPU, precision)
    method = method_class(model, optimizer, None, epochs=1, example_inputs=images(1)[0][0])
    step = build_step("eager", model, (optimizer,), method, StepOptions(CPU, precision, scaler))
    return model, optimizer, scaler, step


def test_it_is_bitwise_the_plain_loop():
    model, optimizer, _, step = built()
    plain = copy.deepcopy(model)
    plain_optimizer = sgd(plain)
    for batch in images(4):
        assert torch.equal(step(*batch), train_step(plain, plain_optimizer, batch))
        assert same(weights(model), weights(plain))
    assert same(optimizer.state_dict(), plain_optimizer.state_dict())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_bitwise_the_plain_loop(precision):
    model, _, scaler, step = built(precision)
    plain = copy.deepcopy(model)
    optimizer, plain_scaler = sgd(plain), torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    for inputs, labels in images(4):
        with torch.autocast("cpu", torch.bfloat16 if precision == "bf16" else torch.float16):
            loss = nn.functional.cross_entropy(plain(inputs), labels)
        optimizer.zero_grad()
        plain_scaler.scale(loss).backward()
        plain_scaler.step(optimizer)
        plain_scaler.update()
        assert torch.equal(step(inputs, labels), loss.detach())
    assert same(weights(model), weights(plain))
    assert (scaler is None) == (precision == "bf16")


def test_a_penalty_moves_the_weights_but_is_not_in_the_loss():
    class Decay(SGD):
        def penalty(self, loss):
            return 0.5 * sum(parameter.square().sum() for parameter in self.model.parameters())

    plain, _, _, plain_step = built()
    model, _, _, step = built(method_class=Decay, model=copy.deepcopy(plain))
    batch = images(1)[0]
    before = plain.conv1.weight.detach().clone()
    assert torch.equal(step(*batch), plain_step(*batch))
    torch.testing.assert_close(plain.conv1.weight - model.conv1.weight, before * 0.1 * 1.9)  # lr, Nesterov's factor


def test_its_loss_keeps_no_graph():
    _, _, _, step = built()
    assert step(*images(1)[0]).grad_fn is None


def test_what_does_not_exist_is_named_with_the_nearest():
    model, optimizer, _, _ = built()
    with pytest.raises(LowcalError, match="did you mean 'bf16'"):
        autocast(CPU, "bf61")
    with pytest.raises(LowcalError, match="no step 'eagr'; did you mean 'eager'"):
        build_step("eagr", model, (optimizer,), None, StepOptions(CPU))
