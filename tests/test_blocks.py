"""Each code block of README and the pages: Python runs, commands are parsed with their settings, YAML is loaded.

The blocks of a page run in order with the same names. What a page leaves to its reader stands in SETUP; a line `...`
calls its `train`. A block that cannot run stands in NOT_RUN with the reason.
"""

import re
import shlex
import tomllib
import warnings
from pathlib import Path

import pytest
import typer
import yaml

from lowcal.cli import main
from lowcal.commands import cache, info, predict, runs, studies  # noqa: F401  (each adds its commands to `app`)
from lowcal.commands.common import app
from lowcal.experiments.recipe_text import apply_settings, load_recipe, parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
}
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

# By the first line of the block.
NOT_RUN = {
    "class LocalSettings(HebbianSettings):": "an excerpt of method_settings.py",
}
RUN_BY = {
    "README.md": "tests/test_readme.py",
    "docs/extending.md": "tests/methods/test_documentation.py",
    "docs/drop-path.md": "tests/test_drop_path.py",
    "docs/python.md": "tests/test_api.py",
    "docs/step.md": "tests/steps/test_make_step.py",
}

DEEP = """
import torch, lowcal
from torch import nn
from torch.nn import functional as F
model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(40)), nn.Linear(8, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
images, labels, epochs = torch.randn(64, 8), torch.randint(10, (64,)), 2
"""
SETUP = {
    "docs/cache.md": DEEP,
    "docs/finetuning.md": DEEP,
    "docs/integrations.md": f"""{DEEP}
import lightning as pl
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments
data = torch.utils.data.TensorDataset(images, labels)
loader, scheduler = torch.utils.data.DataLoader(data), torch.optim.lr_scheduler.ConstantLR(optimizer)
args = TrainingArguments("out", use_cpu=True, report_to=[])
accelerator, mean_loss = Accelerator(cpu=True), 1.0
def train():
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
""",
}
NEEDS = {"docs/integrations.md": ("lightning", "accelerate", "transformers")}

# Words of commands that a reader replaces.
STANDS_FOR = {"...": "--search local.lr=0.01,0.02", "$resume": "--resume"}
CHEAP = ("doctor", "layers", "list")


def blocks(*languages):
    """Page, language and text of all blocks in these languages."""
    found = [(page, match[2], match[3]) for page, text in PAGES.items() for match in BLOCK.finditer(text)]
    return [(page, language, text) for page, language, text in found if language in languages]


def commands(text):
    """The words of each command of a shell block."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        words = shlex.split(line.partition(" || ")[0], comments=True)
        words = [part for word in words for part in STANDS_FOR.get(word, word).split(" ")]
        if words and not re.match(r"\w+=", words[0]):
            yield words


def parsed(words):
    """The subcommand and the parameters of `lowcal ...`; fails if an option, a value or a setting is not known."""
    command = typer.main.get_command(app)
    context, names = command.make_context("lowcal", list(words)), []
    while hasattr(command, "resolve_command") and words and not words[0].startswith("-"):
        name, command, words = command.resolve_command(context, list(words))
        context = command.make_context(name, list(words), parent=context)
        names.append(name)
    name, parameters = names[0], context.params
    if "settings" in parameters and name != "sweep":  # whose commands tests/experiments/test_sweep.py tries
        apply_settings(load_recipe(parameters.get("recipe") or "digits"), parameters["settings"] or [])
    return name, parameters


def check(words):
    """Check one command; run it if it is cheap."""
    program, *rest = words
    if program in ("srun", "nice"):
        check(words[next(index for index, word in enumerate(words) if word in ("python", "torchrun")) :])
    elif Path(program).name == "lowcal":
        if parsed(rest)[0] in CHEAP:
            assert main(rest) == 0
    elif Path(program).name == "torchrun":
        assert parsed(rest[rest.index("lowcal") + 1 :])[0] == "train"
    elif program == "python":
        script = (ROOT / rest[0]).read_text() + (ROOT / "benchmarks" / "common.py").read_text()
        assert all(f'"{word}"' in script for word in rest[1:] if word.startswith("--"))
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert words[:2] == ["pip", "install"], f"{program}: say here how to check it"
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"\[(.*?)\]", rest[1]):
            assert set(extra.split(",")) <= set(extras)


def test_each_block_has_a_language_that_is_checked():
    every = {match[2] for text in PAGES.values() for match in BLOCK.finditer(text)}
    assert every <= {"", "bash", "python", "yaml", "diff", "text"}
    assert sum(text.count("```") for text in PAGES.values()) == 2 * sum(
        len(BLOCK.findall(text)) for text in PAGES.values()
    )


@pytest.mark.parametrize("page", sorted({page for page, _, _ in blocks("python")} - set(RUN_BY)))
def test_python_runs(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(SETUP.get(page, ""), names)
        for of, _, text in blocks("python"):
            if of == page and text.splitlines()[0] not in NOT_RUN:
                exec(compile(re.sub(r"^\.\.\.$", "train()", text, flags=re.MULTILINE), page, "exec"), names)


@pytest.mark.parametrize(("page", "test"), RUN_BY.items())
def test_pages_with_a_test_of_their_own_are_run_there(page, test):
    assert Path(page).name in (ROOT / test).read_text()


@pytest.mark.parametrize("page", sorted({page for page, _, _ in blocks("", "bash")}))
def test_commands_are_known_with_their_options(page, tmp_path, monkeypatch, capsys):
    """A Python block that starts with the name of a file is that file."""
    monkeypatch.chdir(tmp_path)
    for of, language, text in blocks("python", "", "bash"):
        if of != page:
            continue
        if language != "python":
            for words in commands(text):
                check(words)
        elif file := re.match(r"# (\w+\.py)\n", text):
            (tmp_path / file[1]).write_text(text)


@pytest.mark.parametrize(("page", "language", "text"), blocks("yaml"))
def test_yaml_is_a_recipe_or_an_object_of_kubernetes(page, language, text):
    content = yaml.safe_load(text)
    if "apiVersion" not in content:
        parse_recipe(text, page)
        return
    (container,) = content["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    check([*container["command"], *container["args"]])
