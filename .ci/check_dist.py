"""Checks the wheel and the sdist in a folder: metadata, content, import time, and a run in a fresh environment.

    python .ci/check_dist.py dist

The fresh environment has the wheel alone; torch and the other packages are those of the environment of this Python.
"""

import email
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

MOST_MS = 50.0  # that `import lowcal` may take when torch is loaded
ROUNDS = 7
SETTINGS = ["--set", "epochs=1", "--set", "model.width=4", "--method", "sgd", "--device", "cpu"]
OPTIONAL = ("torchvision", "sklearn", "typer", "rich", "yaml", "matplotlib", "jinja2", "PIL", "safetensors")
TIMED = f"""
import json, time, torch, sys
before = set(sys.modules)
start = time.perf_counter()
import lowcal
imported = time.perf_counter()
lowcal.LoCal
used = time.perf_counter()
loaded = sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & {set(OPTIONAL)})
print(json.dumps([imported - start, used - imported, loaded, lowcal.__version__, lowcal.__file__]))
"""


def main(folder: Path) -> None:
    """Check what is in `folder`; the first mistake ends with a line that names it."""
    (wheel,), (sdist,) = list(folder.glob("*.whl")), list(folder.glob("*.tar.gz"))
    version = check_metadata(wheel, sdist)
    with tempfile.TemporaryDirectory() as place:
        python = install(wheel, Path(place))
        check_import(python, version, Path(place))
        check_command(python, version, Path(place))
    print(f"{wheel.name}: whole, imports and runs")


def check_metadata(wheel: Path, sdist: Path) -> str:
    """Check names, versions, licence and README of both; return the version."""
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        one = email.message_from_bytes(file.read(metadata))
    with tarfile.open(sdist) as archive:
        (info,) = [name for name in archive.getnames() if name.count("/") == 1 and name.endswith("/PKG-INFO")]
        content = archive.extractfile(info)
        assert content is not None
        other = email.message_from_bytes(content.read())
    require(one["Version"] == other["Version"], f"versions {one['Version']} and {other['Version']}")
    require(one["Name"] == "lowcal" and one["License-Expression"] == "MIT", "name or licence")
    require(one["Description-Content-Type"] == "text/markdown" and "# lowcal" in str(one.get_payload()), "README")
    for needed in ("py.typed", "experiments/recipes/digits.yaml", "experiments/reproduce/paper.yaml"):
        require(f"lowcal/{needed}" in names, f"{needed} is missing in the wheel")
    strangers = [name for name in names if not name.startswith(("lowcal/", f"lowcal-{one['Version']}.dist-info/"))]
    require(not strangers, f"the wheel also holds {strangers}")
    try:
        import twine  # noqa: F401
    except ImportError:
        print("twine is not installed: how PyPI shows the README was not checked")
    else:
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], check=True)
    return str(one["Version"])


def install(wheel: Path, place: Path) -> str:
    """Make an environment with the wheel in `place`; return its Python."""
    venv.create(place / "venv", with_pip=True)
    python = str(place / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, wheel.absolute()], check=True)
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], place)
    # A line with a path adds its packages, but not what is installed there in editable form.
    (Path(site.strip()) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def check_import(python: str, version: str, place: Path) -> None:
    """Check the time of `import lowcal` beyond that of torch, and that neither it nor LoCal loads anything optional."""
    rounds = [json.loads(run([python, "-c", TIMED], place)) for _ in range(ROUNDS)]
    *_, loaded, found, file = rounds[0]
    require(found == version and str(place) in file, f"lowcal {found} of {file} was imported")
    require(not loaded, f"import lowcal loads {loaded}")
    imported, used = (statistics.median(1000 * one[part] for one in rounds) for part in (0, 1))
    print(f"import lowcal: {imported:.1f} ms after torch; first use of LoCal: {used:.0f} ms; medians of {ROUNDS}")
    require(imported < MOST_MS, f"import lowcal takes {imported:.0f} ms, more than {MOST_MS:.0f}")


def check_command(python: str, version: str, place: Path) -> None:
    """Check the version, the packaged recipes, and a run."""
    command = [str(Path(python).with_name("lowcal"))]
    require(run([*command, "--version"], place).split() == ["lowcal", version], "lowcal --version")
    require("digits" in run([*command, "list", "recipes"], place), "lowcal list recipes")
    require("top-1 error" in run([*command, "train", *SETTINGS, "--out", "run"], place), "lowcal train")


def run(command: list[str], place: Path) -> str:
    """Return what a program prints that runs outside the source tree."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=place, env=environment).stdout


def require(holds: bool, what: str) -> None:
    """End with a line if a check fails."""
    if not holds:
        sys.exit(f"check_dist: wrong: {what}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
