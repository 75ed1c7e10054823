"""What other code does to a network under LoCal: handled correctly, or refused in one line."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowcal

from .networks import convnet, images, mlp, vectors
from .support import changed, hooks, same, train_step, weights

KINDS = {
    "convnet, sgd": (
        lambda: convnet(norm=False),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        images,
    ),
    "mlp, adamw": (mlp, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), vectors),
}
RULES = {"hebbian": lowcal.Hebbian(), "frozen": lowcal.Frozen()}


both_kinds = pytest.mark.parametrize("kind", KINDS, indirect=True)


@pytest.fixture
def kind(request):
    """The convolutional network with SGD, unless a test takes both kinds."""
    return KINDS[getattr(request, "param", "convnet, sgd")]


class Setup:
    """A network two of whose layers become local after the first of its epochs of one step."""

    def __init__(self, kind, rule=None, moves=None, **options):
        torch.manual_seed(3)
        build, self.build_optimizer, self.data = kind
        self.model = build()
        self.optimizer = self.build_optimizer(self.model.parameters())
        self.local = lowcal.LoCal(
            self.model,
            self.optimizer,
            epochs=9,
            rule=rule or lowcal.Hebbian(),
            schedule=lowcal.Fixed(moves or {1: 2}),
            supervision=None,
            **options,
        )

    def step(self, seed=1, **options):
        train_step(self.model, self.optimizer, self.data(1, seed=seed)[0], **options)

    def epoch(self):
        self.step()
        return self.local.end_epoch(1.0)

    @property
    def prefix(self):
        return [self.model.get_submodule(name).weight for name in self.local.layers[: self.local.boundary]]

    def moves_in(self, do):
        """How far each local layer's weight moves while `do` runs."""
        before = [weight.detach().clone() for weight in self.prefix]
        do()
        return [float((weight.detach() - b).norm()) for weight, b in zip(self.prefix, before, strict=True)]


@both_kinds
@pytest.mark.parametrize("rule", RULES)
def test_requires_grad_switched_on_by_someone_else(kind, rule):
    plain, meddled = Setup(kind, RULES[rule]), Setup(kind, RULES[rule])
    for setup in (plain, meddled):
        setup.epoch()
        for seed in (4, 5):
            if setup is meddled:
                setup.model.requires_grad_(True)
            setup.step(seed)
            assert not any(weight.requires_grad for weight in setup.prefix)
    assert same(weights(plain.model), weights(meddled.model))


@both_kinds
def test_gradients_that_reach_local_layers_nevertheless_are_dropped(kind):
    plain, meddled = Setup(kind), Setup(kind)
    for setup in (plain, meddled):
        setup.epoch()
        inputs, labels = setup.data(1)[0]
        setup.optimizer.zero_grad()
        F.cross_entropy(setup.model(inputs), labels).backward()
        if setup is meddled:
            for weight in setup.prefix:
                weight.grad = torch.ones_like(weight)
        setup.optimizer.step()
    assert same(weights(plain.model), weights(meddled.model))


@both_kinds
def test_a_discriminator_that_is_off_in_the_generators_turn(kind):
    """The idiom of pix2pix: neither the move at such a moment nor the pass through it leaves a trace."""
    plain, gan = Setup(kind), Setup(kind)
    for setup in (plain, gan):
        for seed in (4, 5, 6):
            if setup is gan:
                setup.model.requires_grad_(True)
            setup.step(seed)
            if setup is gan:
                setup.model.requires_grad_(False)
                setup.model(setup.data(1, seed=9)[0][0].requires_grad_()).sum().backward()
            setup.local.end_epoch(1.0)
    assert gan.local.history == ((1, 2),)
    assert same(weights(plain.model), weights(gan.model))


def test_what_the_user_froze_between_steps_stays_frozen(kind):
    setup = Setup(kind)
    setup.step()
    first = setup.model.get_submodule(setup.local.layers[0])
    first.requires_grad_(False)
    setup.step()
    setup.local.end_epoch(1.0)
    moved = setup.moves_in(setup.step)
    assert moved[0] == 0
    assert moved[1] == pytest.approx(0.01, rel=1e-4)
    setup.local.detach()
    assert not first.weight.requires_grad


def test_an_optimizer_made_anew(kind):
    setup = Setup(kind, moves={1: 1, 3: 2})
    setup.epoch()
    setup.epoch()
    setup.optimizer = setup.build_optimizer(setup.model.parameters())
    with pytest.raises(lowcal.LowcalError, match="no step of the optimizer given to LoCal was seen"):
        setup.epoch()
    assert setup.local.boundary == 1


class FillsInZeros(torch.optim.Optimizer):
    """Takes a missing gradient for zeros, as many copies of Muon do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.02})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.mul_(0.99).sub_(gradient, alpha=group["lr"])


def test_an_optimizer_that_moves_what_has_no_gradient(kind):
    setup = Setup((kind[0], FillsInZeros, kind[2]))
    setup.epoch()
    with pytest.raises(lowcal.LowcalError, match=r"FillsInZeros changed '\w+.weight'.*pass over parameters whose grad"):
        setup.step()


def test_training_in_evaluation_mode(kind):
    setup = Setup(kind)
    setup.epoch()
    setup.model.eval()
    with pytest.raises(lowcal.LowcalError, match=r"made no update in epoch 1.*evaluation mode"):
        setup.epoch()
    setup.model.train()
    setup.epoch()


def test_reentrant_checkpointing(kind):
    setup = Setup(kind)
    setup.epoch()
    inputs, labels = setup.data(1)[0]
    F.cross_entropy(checkpoint(setup.model, inputs.requires_grad_(), use_reentrant=True), labels).backward()
    setup.optimizer.step()
    with pytest.raises(lowcal.LowcalError, match="reentrant checkpointing"):
        setup.local.end_epoch(1.0)


def test_a_boundary_set_by_hand_and_an_epoch_without_a_step(kind):
    setup = Setup(kind)
    setup.step()
    setup.local.move_to(1)
    setup.local.end_epoch(1.0)  # the layer became local after the last step, so that nothing was to be updated
    with pytest.raises(lowcal.LowcalError, match="made no update"):
        setup.local.end_epoch(1.0)


def test_the_counts_of_an_epoch_are_resumed(kind):
    setup = Setup(kind)
    setup.epoch()
    setup.step()
    state = setup.local.state_dict()
    twin = Setup(kind)
    twin.local.load_state_dict(state)
    twin.local.end_epoch(1.0)
    early = {key: value for key, value in state.items() if key not in ("epoch_counts", "limits")}  # of a version before
    twin = Setup(kind)
    twin.local.load_state_dict(early)
    twin.local.end_epoch(1.0)


def test_a_controller_is_neither_copied_nor_pickled(kind):
    setup = Setup(kind)
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(lowcal.LowcalError, match=r"save local.state_dict\(\)"):
            way(setup.local)


# A pass that is not back-propagated


@both_kinds
@pytest.mark.parametrize("extra", ["skipped batch", "for logging", "kept output"])
def test_a_pass_that_is_not_back_propagated_counts_for_nothing(kind, extra):
    plain, meddled = Setup(kind), Setup(kind)
    for setup in (plain, meddled):
        setup.epoch()
        kept = []
        for seed in (4, 5):
            if setup is meddled:
                inputs, labels = setup.data(1, seed=8)[0]
                outputs = setup.model(inputs * (torch.nan if extra == "skipped batch" else 5.0))
                if extra == "kept output":
                    kept.append(outputs)
                loss = F.cross_entropy(outputs, labels)
                del outputs
                float(loss.detach())
            setup.step(seed)
    assert same(weights(plain.model), weights(meddled.model))
    assert meddled.local._local_layers.updates.skipped == 0


def test_paused_passes_count_for_nothing_even_with_a_backward_pass(kind):
    plain, paused = Setup(kind), Setup(kind)
    for setup in (plain, paused):
        setup.epoch()
        if setup is paused:
            with setup.local.paused(), setup.local.paused():
                setup.model(setup.data(1, seed=8)[0][0]).sum().backward()
        setup.step(order="before")
    assert same(weights(plain.model), weights(paused.model))


def test_an_epoch_of_paused_passes_is_an_error(kind):
    setup = Setup(kind)
    setup.epoch()
    with setup.local.paused():
        moved = setup.moves_in(setup.step)
    assert moved == [0.0, 0.0]
    with pytest.raises(lowcal.LowcalError, match=r"paused\(\)"):
        setup.local.end_epoch(1.0)


# What is handed to the constructor


def test_optimizers_in_wrappers_are_found(kind):
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    setup = Setup((kind[0], lambda p: Wrapper(Wrapper(kind[1](p))), kind[2]))
    setup.optimizer = setup.optimizer.optimizer.optimizer
    setup.epoch()
    assert setup.moves_in(setup.step) == pytest.approx([0.01, 0.01], rel=1e-4)


def test_a_group_of_optimizers_that_is_none_itself(kind):
    class Group:
        def __init__(self, parameters):
            self.param_groups = kind[1](parameters).param_groups

    with pytest.raises(lowcal.LowcalError, match=r"Group is not a torch optimizer.*\[first, second\]"):
        Setup((kind[0], Group, kind[2]))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda m, o: lowcal.LoCal(o, m, epochs=9), "give the network first"),
        (lambda m, o: lowcal.LoCal(m, [], epochs=9), "list of optimizers is empty"),
        (lambda m, o: lowcal.LoCal(m, None, epochs=9), "NoneType is not a torch optimizer"),
        (lambda m, o: lowcal.LoCal(m, o, epochs=9, rule=lowcal.Frozen), "rule is <class"),
        (lambda m, o: lowcal.LoCal(m, o, epochs=9, schedule=lowcal.NormTrend), "schedule is <class"),
        (lambda m, o: lowcal.LoCal(m, o, epochs=9, supervision=lowcal.LossTrend), "supervision is <class"),
        (lambda m, o: lowcal.LoCal(nn.DataParallel(m), o, epochs=9), "wrapped in DataParallel"),
    ],
)
def test_things_that_are_none_of_what_is_asked_for(wrong, match):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = hooks(model, optimizer)
    with pytest.raises(lowcal.LowcalError, match=match) as error:
        wrong(model, optimizer)
    assert "\n" not in str(error.value)
    assert hooks(model, optimizer) == before


def test_more_epochs_than_announced_are_said_once():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = lowcal.LoCal(model, optimizer, epochs=1, schedule=lowcal.Fixed({}), example_inputs=vectors(1)[0][0])
    local.end_epoch(1.0)
    with pytest.warns(UserWarning, match="epochs=1"):
        local.end_epoch(1.0)
    local.end_epoch(1.0)


# Several optimizers


def split(model, last, *kinds):
    """Optimizers of all but the last `last` parameters, and of those."""
    parameters = list(model.parameters())
    return kinds[0](parameters[:-last]), kinds[1](parameters[-last:])


@pytest.mark.parametrize(("given", "order"), [("all", (0, 1)), ("all", (1, 0)), ("the first", (0, 1))])
def test_two_optimizers_of_one_network(kind, given, order):
    """A step of both is one training step, in either order; one that no boundary reaches need not be given."""
    build, optimizer, data = kind
    model = build()
    both = split(model, 2, optimizer, torch.optim.AdamW)
    local = lowcal.LoCal(
        model, list(both) if given == "all" else both[0], epochs=9, schedule=lowcal.Fixed({1: 2}), supervision=None
    )
    moved = []
    for epoch in range(4):
        before = weights(model)
        inputs, labels = data(1, seed=epoch)[0]
        for each in both:
            each.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        for index in order:
            both[index].step()
        first = model.get_submodule(local.layers[0]).weight.detach()
        moved.append(float((first - before[f"{local.layers[0]}.weight"]).norm()))
        local.end_epoch(1.0)
    assert moved[2:] == pytest.approx([0.01, 0.01], rel=1e-4)
    assert local._local_layers.updates.steps == 3


def test_an_optimizer_of_layers_that_a_boundary_reaches_is_missing(kind):
    build, optimizer, data = kind
    model = build()
    _, last = split(model, 2, optimizer, optimizer)
    with pytest.raises(lowcal.LowcalError, match="several optimizers as a list"):
        lowcal.LoCal(model, last, epochs=9, example_inputs=data(1)[0][0])


# Compiled networks


@pytest.mark.parametrize(
    ("kind", "rule", "fullgraph", "example", "compiled_first"),
    [
        ("convnet, sgd", "hebbian", False, False, False),
        ("convnet, sgd", "hebbian", True, True, True),
        ("mlp, adamw", "hebbian", True, False, True),
        ("mlp, adamw", "hebbian", False, True, False),
        ("mlp, adamw", "frozen", False, False, True),
    ],
    indirect=["kind"],
)
def test_a_network_compiled_as_a_whole_is_the_eager_one(kind, rule, fullgraph, example, compiled_first, monkeypatch):
    torch._dynamo.reset()
    if torch.torch_version.TorchVersion(torch.__version__) < "2.13":  # as the error of `end_epoch` advises
        monkeypatch.setattr(torch._dynamo.config, "skip_nnmodule_hook_guards", False)
    inputs = kind[2](1)[0][0]
    options = {"example_inputs": inputs} if example else {}
    eager, compiled = Setup(kind, RULES[rule]), Setup(kind, RULES[rule], **options)
    code = torch.compile(compiled.model, backend="eager", fullgraph=fullgraph)
    if compiled_first:
        compiled.local.detach()
        compiled.local = lowcal.LoCal(
            code,
            compiled.optimizer,
            epochs=9,
            rule=RULES[rule],
            schedule=lowcal.Fixed({1: 2}),
            supervision=None,
            **options,
        )
    for seed in (1, 4, 5, 6):
        eager.step(seed)
        train_step(code, compiled.optimizer, kind[2](1, seed=seed)[0])
        for setup in (eager, compiled):
            setup.local.end_epoch(1.0)
    assert compiled.local.layers == eager.local.layers
    assert compiled.local.history == ((1, 2),)
    for a, b in zip(eager.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_running_statistics_in_a_compiled_network():
    torch._dynamo.reset()
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = lowcal.LoCal(model, optimizer, epochs=9, norm_stats="running", example_inputs=images(1)[0][0])
    local.move_to(2)
    before = weights(model)
    train_step(torch.compile(model, backend="eager", fullgraph=True), optimizer, images(1)[0])
    assert not [name for name in changed(before, model) if name.startswith(("norm1", "norm2"))]
