"""Compares three ways to train a small network on real digits, from Python. Runs on a CPU in seconds."""

import sys

import lowcal


def main(out):
    result = lowcal.compare(
        recipe="digits",
        methods=["sgd", "local", "freeze"],
        settings={"epochs": 3, "model.width": 8, "local.schedule": {"name": "fixed", "epochs": {1: 3, 2: 6}}},
        out=out,
    )
    print(result)  # a notebook shows a table and a figure
    for row in result.table:  # a row for each method
        print(f"{row['method']}: error {row['top1_error']:.1f} %, {row['speedup']:.2f} times as fast as sgd")
    for record in result.epochs:  # a row for each epoch of each run, for pandas.DataFrame(result.epochs) say
        if record["method"] == "local":
            print(f"epoch {record['epoch'] + 1}: boundary {record['boundary']} of {record['layers']}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
