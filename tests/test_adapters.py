"""Networks with adapters of peft: an adapted layer is one layer, which moves as one."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import lowcal

from .networks import convnet, images, mlp, vectors
from .support import changed, hooks, reached, refused, same, sgd, train_epoch, train_step, weights

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # the host's own advice

CONFIGS = {
    "lora": lambda targets: peft.LoraConfig(target_modules=targets, r=2, lora_dropout=0.1),
    "dora": lambda targets: peft.LoraConfig(target_modules=targets, r=2, use_dora=True),
    "loha": lambda targets: peft.LoHaConfig(target_modules=targets, r=2),
    "ia3": lambda targets: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
    "vera": lambda targets: peft.VeraConfig(target_modules=targets, r=2),
}
NETWORKS = {
    "mlp": (mlp, vectors, ["two", "three", "four"], ["one", "two", "three", "four"]),
    "convnet": (lambda: convnet(norm=False), images, ["conv1", "conv3", "head"], ["conv1", "conv2", "conv3", "head"]),
}


def adapted(network="mlp", kind="lora", **options):
    torch.manual_seed(0)
    build, data, targets, layers = NETWORKS[network]
    config = CONFIGS[kind](targets)
    for name, value in options.items():
        setattr(config, name, value)
    model = peft.get_peft_model(build(), config)
    for name, parameter in model.named_parameters():  # B is zero at first, so that A would not move
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train(), data(4), [f"base_model.model.{name}" for name in layers]


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.01)


def control(model, optimizer, moves=None, **options):
    options = {"supervision": None, **options}
    return lowcal.LoCal(model, optimizer, epochs=9, schedule=lowcal.Fixed(moves or {1: 1}), **options)


@pytest.mark.parametrize("rule", [lowcal.Hebbian(), lowcal.Frozen()], ids=["hebbian", "frozen"])
@pytest.mark.parametrize(
    ("network", "kind"), [("mlp", kind) for kind in CONFIGS] + [("convnet", "lora"), ("convnet", "loha")]
)
def test_an_adapted_layer_moves_as_one(network, kind, rule):
    model, batches, layers = adapted(network, kind)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = optimizer_of(model)
    local = control(model, optimizer, rule=rule)
    train_epoch(model, optimizer, local, batches)
    assert list(local.layers) == layers
    for boundary in (1, 2, 3):
        local.move_to(boundary)
        after = {name for name in learning if name.startswith(tuple(layers[boundary:]))}
        assert reached(model, model(batches[0][0]).sum()) == after
        before = weights(model)
        train_epoch(model, optimizer, local, batches)
        assert changed(before, model) == after
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == after
    notes = [line for line in local.summary().splitlines() if "with adapters" in line]
    assert notes == [
        "local, with adapters, which make no local update: "
        + ", ".join(name for name in layers[:3] if any(key.startswith(name) for key in learning))
    ]


def test_boundary_0_is_bitwise_the_plain_loop():
    ends = []
    for controlled in (False, True):
        model, batches, _ = adapted()
        optimizer = optimizer_of(model)
        local = control(model, optimizer, {9: 1}) if controlled else None
        for _ in range(2):
            train_epoch(model, optimizer, local, batches)
        ends.append(weights(model))
    assert same(*ends)


def test_frozen_is_bitwise_the_loop_by_hand():
    ends = []
    for controlled in (False, True):
        model, batches, layers = adapted()
        optimizer = optimizer_of(model)
        local = control(model, optimizer, {1: 3}, rule=lowcal.Frozen()) if controlled else None
        train_epoch(model, optimizer, local, batches)
        if not controlled:
            for layer in layers[:3]:
                for parameter in model.get_submodule(layer).parameters():
                    parameter.requires_grad_(False).grad = None
        train_epoch(model, optimizer, local, batches)
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("measure", ["epoch", "step"])
def test_the_change_of_an_adapted_layer_is_that_of_its_adapters(measure):
    model, batches, layers = adapted()
    optimizer = optimizer_of(model)
    schedule = lowcal.NormTrend(shift=1, interval=9, measure=measure)
    local = lowcal.LoCal(model, optimizer, epochs=9, schedule=schedule, supervision=None)
    train_step(model, optimizer, batches[0])
    local.move_to(1)
    path = [weights(model)]
    for batch in batches[:2]:
        train_step(model, optimizer, batch)
        path.append(weights(model))
    norms = [
        float(torch.cat([(b[key] - a[key]).flatten() for key in a if key.startswith(layers[1])]).norm())
        for a, b in ([(path[0], path[-1])] if measure == "epoch" else pairwise(path))
    ]
    local.end_epoch(1.0)
    assert local.change == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    assert local.change > 0


@pytest.mark.parametrize("measure", ["epoch", "step"])
def test_a_resumed_run_is_the_run(measure):
    schedule = lowcal.NormTrend(shift=1, interval=1, measure=measure, max_fraction=0.9)
    ends = []
    for stop in (None, 1, 3, 5):
        model, batches, _ = adapted()
        optimizer = optimizer_of(model)
        local = lowcal.LoCal(model, optimizer, epochs=6, schedule=schedule, rule=lowcal.Frozen())
        for epoch in range(6):
            for index, batch in enumerate(batches):
                torch.manual_seed(100 * epoch + index)  # of the dropout
                train_step(model, optimizer, batch)
                if epoch == stop and index == 1:
                    kept = weights(model), optimizer.state_dict(), local.state_dict()
                    model, _, _ = adapted()
                    optimizer = optimizer_of(model)
                    local = lowcal.LoCal(model, optimizer, epochs=6, schedule=schedule, rule=lowcal.Frozen())
                    for part, state in zip((model, optimizer, local), kept, strict=True):
                        part.load_state_dict(state)
            local.end_epoch(2.0 - epoch / 10)
            optimizer.param_groups[0]["lr"] *= 0.5  # so that norms fall, and the boundary moves
        ends.append((weights(model), local.history))
    assert all(same(ends[0], end) for end in ends[1:])
    assert len(ends[0][1]) > 1


def test_a_state_with_adapters_of_another_rank_is_refused():
    model, batches, _ = adapted()
    local = control(model, optimizer_of(model), {1: 2})
    model(batches[0][0])
    local.move_to(1)
    other, _, _ = adapted(r=3)
    again = control(other, optimizer := optimizer_of(other), {1: 2})
    with refused("base_model.model.two", model=other, optimizer=optimizer, local=again):
        again.load_state_dict(local.state_dict())


def test_detached_adapters_are_merged():
    model, batches, _ = adapted()
    optimizer = optimizer_of(model)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = hooks(model, optimizer)
    local = control(model, optimizer, {1: 2})
    for _ in range(2):
        train_epoch(model, optimizer, local, batches)
    local.detach()
    model.zero_grad(set_to_none=True)
    assert {key: n for key, n in hooks(model, optimizer).items() if "hook" in key} == {
        key: n for key, n in before.items() if "hook" in key
    }
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == learning
    expected = model.eval()(batches[0][0])
    merged = model.merge_and_unload()
    assert type(merged.two) is nn.Linear
    torch.testing.assert_close(merged(batches[0][0]), expected)


def test_refresh_trains_adapters_in_its_steps():
    model, batches, layers = adapted()
    optimizer = optimizer_of(model)
    local = control(model, optimizer, rule=lowcal.Refresh(every=2))
    train_step(model, optimizer, batches[0])
    local.move_to(2)
    for opens in (True, False, True):
        before = weights(model)
        train_step(model, optimizer, batches[0])
        assert any(name.startswith(layers[1]) for name in changed(before, model)) is opens


def test_a_whole_layer_that_learns_next_to_adapters_learns_locally():
    """modules_to_save trains a copy of the layer itself."""
    model, batches, _ = adapted(modules_to_save=["one"])
    optimizer = optimizer_of(model)
    local = control(model, optimizer)
    train_step(model, optimizer, batches[0])
    first = "base_model.model.one.modules_to_save.default"
    assert local.layers[0] == first
    local.move_to(2)
    before = weights(model)
    train_step(model, optimizer, batches[0])
    after = changed(before, model)
    assert f"{first}.weight" in after
    assert all(".four." in name for name in after - {f"{first}.weight"} if ".three." not in name)
    change = model.get_parameter(f"{first}.weight") - before[f"{first}.weight"]
    assert float(change.norm()) == pytest.approx(0.01, rel=1e-4)


def test_an_optimizer_without_the_adapters_is_refused():
    base = mlp()
    optimizer = sgd(base)
    model = peft.get_peft_model(base, CONFIGS["lora"](["two", "three", "four"]))
    with refused("does not hold the adapters of layer 'base_model.model.two'", model=model, optimizer=optimizer):
        control(model, optimizer, {1: 2}, example_inputs=vectors(1)[0][0])


def test_a_step_ends_with_the_optimizer_of_the_last_layer():
    model, batches, layers = adapted()
    parts = [[], []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[name.startswith(layers[3])].append(parameter)
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in parts]
    local = control(model, optimizers)
    nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    optimizers[0].step()
    assert local.state_dict()["epoch_counts"][0] == 0
    optimizers[1].step()
    assert local.state_dict()["epoch_counts"][0] == 1


class Language(nn.Module):
    """The weight of the classifier is the embedding's, as in many language models."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.two(self.one(self.embedding(x)).relu()).relu())


def test_a_tied_weight_that_is_frozen_is_no_reason_to_refuse():
    tokens = torch.randint(7, (3, 5))
    model = peft.get_peft_model(Language(), CONFIGS["lora"](["one", "two"])).train()
    local = control(model, optimizer_of(model), {1: 2}, example_inputs=tokens)
    local.move_to(1)
    assert {name.split(".")[2] for name in reached(model, model(tokens).sum())} == {"two"}


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.two(self.one(self.two(x)).relu()))


def test_an_adapted_layer_that_runs_twice_is_refused():
    model = peft.get_peft_model(Shared(), CONFIGS["lora"](["one", "two"]))
    with pytest.raises(lowcal.LowcalError, match=r"'base_model.model.two' runs twice"):
        control(model, optimizer_of(model), example_inputs=vectors(1)[0][0])


def test_adapters_that_share_a_parameter_are_refused():
    config = peft.VBLoRAConfig(target_modules=["two", "three"], r=2, num_vectors=3, vector_length=1, topk=1)
    model = peft.get_peft_model(mlp(), config)
    with pytest.raises(lowcal.LowcalError, match=r"'base_model.model.two' and 'base_model.model.three' share one"):
        control(model, optimizer_of(model), {1: 2}, example_inputs=vectors(1)[0][0])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x)[None]
        return self.last(self.attention(x, x, x, need_weights=False)[0][0])


def test_adapted_attention_is_one_layer():
    model = peft.get_peft_model(Attentive(), CONFIGS["lora"](["attention", "first", "last"])).train()
    model.peft_config["default"].lora_dropout = 0.0
    batch = vectors(1)[0]
    local = control(model, optimizer := optimizer_of(model), {1: 2}, example_inputs=batch[0])
    assert [name.split(".")[-1] for name in local.layers] == ["first", "attention", "last"]
    local.move_to(2)
    assert {name.split(".")[2] for name in reached(model, model(batch[0]).sum())} == {"last"}
    before = weights(model)
    train_step(model, optimizer, batch)
    assert {name.split(".")[2] for name in changed(before, model)} == {"last"}


def test_a_vision_transformer_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    base = transformers.ViTForImageClassification(config)
    targets = peft.LoraConfig(target_modules=r".*(q_proj|v_proj|query|value)", r=2, modules_to_save=["classifier"])
    model = peft.get_peft_model(base, targets).train()
    pictures = torch.randn(2, 1, 8, 8)
    local = control(
        model, optimizer_of(model), {1: 12}, rule=lowcal.Frozen(), example_inputs={"pixel_values": pictures}
    )
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(wrapped) == 4
    assert set(wrapped) < set(local.layers)
    assert not any("lora" in name or "base_layer" in name for name in local.layers)
    half = local.layers.index(wrapped[2])
    local.move_to(half)
    found = reached(model, model(pixel_values=pictures).logits.sum())
    assert {name for name in found if name.startswith(tuple(wrapped[:2]))} == set()
    assert {name for name in found if name.startswith(tuple(wrapped[2:]))}
