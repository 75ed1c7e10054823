"""What a controller does at present, in a few lines for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowcal.layers import weight_layers, weight_of
from lowcal.schedule import reach

if TYPE_CHECKING:
    from lowcal.local import LoCal


def summary(local: LoCal) -> str:
    """Which layers of `local` learn how, which parameters follow them, and what is left out and why."""
    order, boundary = local._local_layers.discovery.order, local.boundary
    name = type(local.model).__name__
    if not order.layers:
        return f"{name}: the order of layers is not known yet; it shows in the next forward pass"
    depth = len(order.layers)
    lines = [
        f"{name}: boundary {boundary} of {depth} layers after {local.epoch} of {local.epochs} epochs; "
        f"the schedule can move it to {reach(local.schedule, depth)}"
    ]
    wants = local._local_layers.trainable.wants
    weights = {layer: weight_of(local.model.get_submodule(layer)) for layer in order.layers[:boundary]}
    kept = [layer for layer, weight in weights.items() if weight is not None and not wants(weight)]
    if boundary:
        lines.append(f"local, by {local.rule}: {_span(order.layers[:boundary])}")
    lines.append(f"by the optimizer: {_span(order.layers[boundary:])}")
    if kept:
        lines.append(f"local, but with a weight that you froze: {', '.join(kept)}")
    local_layers = set(order.layers[:boundary])
    followers = sum(layer in local_layers for layer in order.followers.values())
    lines.append(
        f"other parameters: {followers} of {len(order.followers)} follow local layers and keep their values; "
        f"normalisation before the boundary uses {local.norm_stats} statistics"
    )
    lines += [f"cannot become local: {reason}" for reason in order.limits.values()]
    absent = [layer for layer in weight_layers(local.model) if layer not in order.layers]
    if absent:
        lines.append(f"not run so far, so not numbered: {', '.join(absent)}")
    return "\n".join(lines)


def _span(layers: tuple[str, ...]) -> str:
    """The first and the last of `layers`, and how many there are.

    >>> _span(("a", "b", "c")), _span(("a",))
    ('a to c (3 layers)', 'a (1 layer)')
    """
    ends = layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
    return f"{ends} ({len(layers)} layer{'s' * (len(layers) > 1)})"
