"""Run folders with chosen numbers, for the report's tests."""

from lowcal.training.run_folder import RunFolder

MACHINE = {
    "device": "cpu",
    "device_name": "Some, Processor",
    "processor": "Some, Processor",
    "cores": 4,
    "torch": "2.15.0",
    "torchvision": "0.30.0",
    "lowcal": "0.1.0",
    "code": None,
    "python": "3.11.2",
    "platform": "Linux",
    "threads": 2,
    "commit": "e1a58719",
    "started": "2025-01-01T00:00:00+00:00",
}
RECIPE = "name: digits\nepochs: {epochs}\nseed: {seed}\noptimizer: {{lr: 0.05}}\n"


def write_run(
    root,
    method,
    seed=0,
    *,
    error=10.0,
    seconds=12.0,
    flops=1000,
    memory=2**20,
    boundary=0,
    epochs=3,
    done=None,
    name=None,
    machine=None,
    recipe=RECIPE,
    summary=None,
    batches=None,
    refused=None,
    **identity,
):
    """A run whose last epoch has these results; `done` epochs are there, all and a summary if None."""
    who = {
        "method": method,
        "recipe": "digits",
        "seed": seed,
        "epochs": epochs,
        "model": "resnet8",
        "dataset": "digits",
        "label": None,
        **identity,
    }
    folder = RunFolder.create(
        root / (name or f"{method}-seed{seed}"),
        recipe=recipe.format(epochs=epochs, seed=seed),
        environment=machine or MACHINE,
        identity=who,
    )
    for epoch in range(epochs if done is None else done):
        last = epoch == epochs - 1
        folder.append(
            {
                "epoch": epoch,
                "boundary": boundary if last else 0,
                "layers": 9,
                "train_loss": 2.0 / (epoch + 1),
                "test_loss": 2.5 / (epoch + 1),
                "top1_error": error if last else 50.0,
                "seconds": seconds / epochs,
                "total_seconds": seconds * (epoch + 1) / epochs,
                "steps": 10,
                "step_ms": 100.0 * seconds / epochs,
                "flops": flops // epochs,
                "peak_memory_bytes": memory,
                "batch": batches[epoch] if batches else 32,
                "refused_batch": refused[epoch] if refused else None,
            }
        )
    if done is None:
        results = {
            "top1_error": error,
            "best_top1_error": error,
            "seconds": seconds,
            "flops": flops,
            "peak_memory_bytes": memory,
            "boundary": boundary,
            "layers": 9,
        }
        folder.write_summary({**who, **results, **(summary or {})})
    return folder
