"""The least time of a step at a boundary: its unavoidable parts, each timed by itself (docs/method.md).

The prefix and the suffix of a network are timed apart, as parts of a recorded forward pass (`lowcal.program`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lowcal.discovery import trace
from lowcal.experiments.bench.timing import Work
from lowcal.layers import own_parameters
from lowcal.program import record
from lowcal.rules import hebbian_update
from lowcal.steps.graphed import Graphs
from lowcal.steps.step import autocast


class Parts:
    """The parts of a training step at `boundary`, as works to be timed.

    Attributes:
        prefix: the prefix's forward pass without a graph.
        suffix: the full step of the suffix, on the prefix's output.
        products: the weight-gradient products of the layers before the boundary.

    Args:
        model: the network, in training mode; this object changes it.
        build_optimizer: builds the optimizer of the suffix's parameters.
        images: one mini-batch, (N, C, H, W).
        labels: its class numbers, (N,).
        graphs: records each part, for comparison with recorded steps; None: the parts run eagerly.
    """

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[list[Tensor]], Optimizer],
        images: Tensor,
        labels: Tensor,
        *,
        boundary: int,
        precision: str,
        graphs: Graphs | None = None,
    ) -> None:
        self._model, self._images, self._labels = model, images, labels
        self._precision = precision
        order = trace(model, images[:1])
        own = own_parameters(order, model)
        for layer in order.layers[:boundary]:
            for parameter in own[layer]:
                parameter.requires_grad_(False)
        self._optimizer = build_optimizer([p for p in model.parameters() if p.requires_grad])
        self._layers: list[tuple[nn.Module, Tensor, Tensor]] = []
        handles = [model.get_submodule(layer).register_forward_hook(self._keep) for layer in order.layers[:boundary]]
        with autocast(images.device, precision):
            self._program = record(model, images)
        for handle in handles:
            handle.remove()
        self._crossing = self._run_prefix()
        self._fed: list[dict[int, Tensor]] = []
        self.prefix = Work(self._run_prefix)
        self.suffix = Work(self._run_suffix, self._feed)
        self.products = Work(self._run_products)
        if graphs is not None:
            self._record(graphs)

    def _record(self, graphs: Graphs) -> None:
        def recorded(run: Callable[[], object]) -> Callable[[], None]:
            with graphs.aside():
                run()
            return graphs.record(lambda: [run()].clear())

        self.prefix = Work(recorded(self._run_prefix))
        self._feed(2)
        given = self._fed[0]  # the input of the recorded run, which is the second one

        def restore(runs: int) -> None:
            # Within a sample, a tensor that is changed in place keeps the value of the previous run.
            for slot in self._program.suffix.overwrites:
                given[slot].copy_(self._crossing[slot])

        self.suffix = Work(recorded(self._run_suffix), restore)
        self.products = Work(recorded(self._run_products))

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._layers.append((module, inputs[0].detach(), output.detach()))

    def _run_prefix(self) -> dict[int, Tensor]:
        with torch.no_grad(), autocast(self._images.device, self._precision):
            return self._program.prefix({0: self._images})

    def _feed(self, runs: int) -> None:
        fresh = self._program.suffix.overwrites
        self._fed = [
            {slot: tensor.clone() if slot in fresh else tensor for slot, tensor in self._crossing.items()}
            for _ in range(runs)
        ]

    def _run_suffix(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self._images.device, self._precision):
            (logits,) = self._program.suffix(self._fed.pop()).values()
            loss = F.cross_entropy(logits, self._labels)
        loss.backward()
        self._optimizer.step()

    def _run_products(self) -> None:
        for module, inputs, outputs in self._layers:
            hebbian_update(module, inputs, outputs)
