"""What LoCal's checks cost in an eager step: `checks.py`, some minutes on an idle CPU.

The hooks of a controller with frozen local layers do nothing but look after the method: their time is that of the
checks. It is taken around each hook in steps of training, compared with the median step. Writes results/checks.json.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import lowcal
from lowcal.files import write_json
from lowcal.hooks import Hook
from lowcal.models import build_model
from lowcal.training.environment import gather_environment

OUT = Path(__file__).parents[1] / "results" / "checks.json"
STEPS, WARM_UP = 40, 5
NETWORKS = {
    "resnet8 of width 16, 8x8, batch 50": ("resnet8", 16, 50, 8),
    "resnet18 of width 8, 32x32, batch 32": ("resnet18", 8, 32, 32),
}


def measure(name: str, width: int, batch: int, size: int, fraction: float) -> dict[str, Any]:
    """Medians over the steps: the step and the hooks in it, in seconds."""
    torch.manual_seed(0)
    model = build_model(name, classes=10, width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    spent = 0.0
    call = Hook.__call__

    def timed(hook: Hook, *args: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        try:
            return call(hook, *args)
        finally:
            spent += time.perf_counter() - start

    with lowcal.LoCal(model, optimizer, epochs=9, rule=lowcal.Frozen(), example_inputs=images) as local:
        local.move_to(int(fraction * len(local.layers)))
        Hook.__call__ = timed  # type: ignore[method-assign]
        try:
            steps, hooks = [], []
            for _ in range(WARM_UP + STEPS):
                spent, start = 0.0, time.perf_counter()
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
                steps.append(time.perf_counter() - start)
                hooks.append(spent)
        finally:
            Hook.__call__ = call  # type: ignore[method-assign]
        shares = [hook / step for hook, step in zip(hooks[WARM_UP:], steps[WARM_UP:], strict=True)]
        return {
            "boundary": local.boundary,
            "layers": len(local.layers),
            "step_seconds": statistics.median(steps[WARM_UP:]),
            "checks_seconds": statistics.median(hooks[WARM_UP:]),
            "share": statistics.median(shares),
            "share_quartiles": statistics.quantiles(shares, n=4)[::2],
            "steps": STEPS,
        }


def main() -> None:
    """Measures each network at three boundaries."""
    torch.set_num_threads(1)
    rows = []
    for title, settings in NETWORKS.items():
        for fraction in (0.0, 0.5, 0.75):
            rows.append({"network": title, **measure(*settings, fraction)})
            print(rows[-1])
    write_json(OUT, {"environment": gather_environment("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
