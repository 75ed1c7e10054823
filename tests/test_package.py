"""The shape of the package: imports go one way, the core is light, the metadata says so."""

import ast
import subprocess
import sys
import tomllib
from importlib.util import resolve_name
from pathlib import Path

import pytest

import lowcal

SOURCE = Path(lowcal.__file__).parent
ROOT = SOURCE.parent.parent

# Each room stands on those before it: a module may import modules of its own room and of the rooms below.
LEVELS = [
    {"errors"},
    {"files", "settings"},
    {"activations", "layers", "program", "schedule", "strided", "supervision", "trainable"},
    {"budget", "fused", "overlap", "products", "state"},
    {"method_settings"},
    {"arguments", "hooks", "rules", "transition"},
    {"discovery", "drop_path", "dry_run", "norms", "pending", "step_times"},
    {"updates"},
    {"local_layers"},
    {"local"},
    {"cache", "parallel"},
    {"steps"},
    {"user_files"},
    {"models", "pretrained", "data"},
    {"integrations", "methods"},
    {"training"},
    {"report"},
    {"experiments"},
    {"console"},
    {"api"},
    {"commands"},
    {"cli", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
OPTIONAL = {
    "torchvision", "sklearn", "numpy", "PIL", "typer", "rich", "yaml", "matplotlib", "jinja2",
    "lightning", "accelerate", "transformers", "timm", "tensorboard", "mlflow", "wandb", "optuna", "scipy",
    "safetensors",
}  # fmt: skip


def imports_of(path):
    """The modules that a file imports, anywhere in it, with full names; those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = ".".join(["lowcal", *path.relative_to(SOURCE).parent.parts])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            yield module
            if module == "lowcal":
                yield from (f"lowcal.{alias.name}" for alias in node.names)


def room_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    room = room_of(path)
    assert room in LEVEL, f"{room} has no place in the order of rooms"
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "lowcal" or len(parts) == 1 or parts[1] not in LEVEL:
            continue
        assert parts[1] == room or LEVEL[parts[1]] <= LEVEL[room], f"{room} imports {name}"


@pytest.mark.parametrize("path", sorted((SOURCE / "report").rglob("*.py")), ids=lambda path: path.name)
def test_report_reads_run_folders_only(path):
    allowed = {"errors", "files", "report", "training"}
    for name in imports_of(path):
        parts = name.split(".")
        assert parts[0] not in ("torch", "torchvision"), f"report imports {name}"
        if parts[0] == "lowcal" and len(parts) > 1 and parts[1] in LEVEL:
            assert parts[1] in allowed, f"report imports {name}"
            assert parts[1] != "training" or name in ("lowcal.training", "lowcal.training.run_folder"), name


CORE = [path for path in MODULES if LEVEL.get(room_of(path), 99) <= LEVEL["steps"]] + [SOURCE / "__init__.py"]


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_core_needs_torch_alone(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & OPTIONAL


def test_importing_lowcal_loads_torch_and_nothing_heavier():
    code = (
        "import sys, torch; before = set(sys.modules); import lowcal;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(result.stdout.split())
    assert "lowcal" in loaded
    assert not loaded & OPTIONAL


def test_a_controller_has_no_members_but_the_documented_ones():
    members = {name for name in dir(lowcal.LoCal) if not name.startswith("_")}
    assert members == {
        "boundary", "detach", "end_epoch", "layers", "load_state_dict", "move_to", "paused", "state_dict", "summary",
    }  # fmt: skip


def test_metadata():
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("installed without its sources")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [requirement.partition(">")[0] for requirement in project["dependencies"]] == ["torch"]
    assert set(project["optional-dependencies"]) == {
        "cli", "lightning", "accelerate", "transformers", "timm", "tensorboard", "mlflow", "wandb", "sweep", "finetune",
        "docs", "dev",
    }  # fmt: skip
    assert project["scripts"] == {"lowcal": "lowcal.cli:main"}


def test_types_are_shipped():
    assert (SOURCE / "py.typed").exists()
