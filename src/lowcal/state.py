"""Validates a controller's saved state before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from lowcal.errors import LowcalError, is_count, is_number
from lowcal.layers import Order, weights_of

_KINDS: dict[str, tuple[type, ...]] = {
    "layers": (list,),
    "followers": (dict,),
    "norms": (dict,),
    "epoch": (int,),
    "boundary": (int,),
    "history": (list,),
    "sign": (int,),
    "change": (float, type(None)),
    "losses": (list,),
    "changes": (list,),
    "steps": (int,),
    "skipped": (int,),
    "start": (Tensor, type(None)),
    "limits": (dict,),
    "epoch_counts": (list,),
}
# Entries that states of earlier versions lack, with their defaults.
_ADDED: dict[str, Any] = {"limits": {}, "epoch_counts": [1, 0, 0]}


def completed(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """`state`, with defaults for entries that states of earlier versions lack."""
    return {**_ADDED, **state} if isinstance(state, Mapping) else state


def check_state(
    state: Mapping[str, Any],
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    known: tuple[str, ...],
    boundary: int,
    *,
    remembers: bool = False,
    by_step: bool = False,
    times: bool = False,
) -> Order:
    """Returns the order of layers in `state` after validating all of it.

    Args:
        state: what `LoCal.state_dict` returned.
        model: the network to load it into.
        layers: the network's possible layers by name.
        known: those that are known to run; the state may have more.
        boundary: the present boundary.
        remembers: whether norms of earlier transition layers are needed (`Schedule.remembers`).
        by_step: whether norms are those of steps (`Schedule.measure`).
        times: whether step times are needed (`Schedule.measures`).

    Raises:
        LowcalError: `state` is damaged, belongs to another network, is behind the present boundary, or lacks norms that
            the schedule needs.
    """
    if not isinstance(state, Mapping) or state.get("format") != 1:
        raise LowcalError(
            "load_state_dict: this is not a state of LoCal of format 1; give what LoCal.state_dict() returned"
        )
    for key, kinds in _KINDS.items():
        if not isinstance(state.get(key, _KINDS), kinds):
            raise LowcalError(f"load_state_dict: '{key}' is missing or damaged; give what LoCal.state_dict() returned")
    for key in ("losses", "changes"):
        if not all(is_number(value) for value in state[key]):
            raise LowcalError(f"load_state_dict: '{key}' holds something other than numbers; the state is damaged")
    names = state["layers"]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise LowcalError("load_state_dict: 'layers' holds something other than different names; the state is damaged")
    for name in names:
        if name not in layers:
            raise LowcalError(
                f"load_state_dict: the state's layer '{name}' is not in this {type(model).__name__}; "
                "load it into the network that it was saved from"
            )
    for name in known:
        if name not in names:
            raise LowcalError(
                f"load_state_dict: this {type(model).__name__} runs layer '{name}', which the state does not have; "
                "load it into the network that it was saved from"
            )
    parameters = {name for name, _ in model.named_parameters()}
    modules = {name for name, _ in model.named_modules()}
    for kind, own in (("followers", parameters), ("norms", modules)):
        for name, layer in state[kind].items():
            if name not in own or layer not in names:
                raise LowcalError(
                    f"load_state_dict: '{name}' ({kind}) is not in this {type(model).__name__}; "
                    "load the state into the network that it was saved from"
                )
    _check_numbers(state, boundary)
    _check_norms(state, remembers, by_step)
    if times and not _are_times(state.get("times")):
        raise LowcalError("load_state_dict: 'times' is missing or damaged, and this schedule plans with step times")
    if names:
        transition = names[state["boundary"]]
        start, weights = state["start"], weights_of(layers[transition])
        shape = weights[0].shape if len(weights) == 1 else (sum(weight.numel() for weight in weights),)
        if not isinstance(start, Tensor) or (weights and start.shape != shape):
            raise LowcalError(
                f"load_state_dict: the state's weight of layer '{transition}' does not fit this network's; "
                "load it into the network that it was saved from"
            )
    return Order(tuple(names), dict(state["followers"]), dict(state["norms"]), dict(state["limits"]))


def _check_numbers(state: Mapping[str, Any], boundary: int) -> None:
    last = max(len(state["layers"]) - 1, 0)
    moves = state["history"]
    sound = (
        0 <= state["boundary"] <= last
        and state["sign"] in (-1, 1)
        and len(state["losses"]) == state["epoch"]
        and min(state["epoch"], state["steps"], state["skipped"]) >= 0
        and all(isinstance(move, list) and len(move) == 2 and all(is_count(n, 0) for n in move) for move in moves)
        and all(a[1] < b[1] for a, b in pairwise(moves))
        and (moves[-1][1] if moves else 0) == state["boundary"]
        and len(state["epoch_counts"]) == 3
        and all(is_count(count, 0) for count in state["epoch_counts"])
        and all(name in state["layers"] and isinstance(reason, str) for name, reason in state["limits"].items())
    )
    if not sound:
        raise LowcalError("load_state_dict: boundary, sign, epoch or history is out of range; the state is damaged")
    if state["boundary"] < boundary:
        raise LowcalError(
            f"load_state_dict: the state's boundary is {state['boundary']} and the present one {boundary}, "
            "which never moves back; load it into a new LoCal"
        )


def _are_times(times: Any) -> bool:
    """Whether these are the step times of a schedule that plans with them."""
    return (
        isinstance(times, dict)
        and all(isinstance(times.get(key), list) for key in ("measured", "taken"))
        and all(
            isinstance(entry, list) and len(entry) == 2 and is_count(entry[0], 0)
            for entry in (*times["measured"], *times["taken"])
        )
        and all(is_number(seconds) and seconds > 0 for _, seconds in times["measured"])
        and all(seconds is None or is_number(seconds) for _, seconds in times["taken"])
    )


def _check_norms(state: Mapping[str, Any], remembers: bool, by_step: bool) -> None:
    """Checks the entries for other readings of Algorithm 1 than the default."""
    if ("step_norms" in state) != by_step:
        kept, needed = ("epoch", "step") if by_step else ("step", "epoch")
        raise LowcalError(
            f"load_state_dict: the state's norms were measured by {kept}, and this schedule measures by {needed}; "
            f"give LoCal a schedule of measure={kept!r}"
        )
    if remembers and state["boundary"] and "earlier" not in state:
        raise LowcalError(
            "load_state_dict: the state lacks the norms of earlier transition layers, which this schedule needs; "
            "go on with NormTrend(average='layer')"
        )
    sums, earlier = state.get("step_norms", [0.0, 0.0]), state.get("earlier", [])
    sound = (
        isinstance(sums, list)
        and len(sums) == 2
        and all(is_number(value) and value >= 0 for value in sums)
        and isinstance(earlier, list)
        and all(isinstance(e, list) and len(e) == 2 and is_count(e[0], 0) and is_number(e[1]) for e in earlier)
    )
    if not sound:
        raise LowcalError("load_state_dict: 'step_norms' or 'earlier' holds something else; the state is damaged")
