"""The site of the documentation: built with warnings as errors, and opened in Chromium where there is one."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import lowcal

from . import browser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SCRIPTS = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(https?://[^"]*)"')


def nav(entries):
    """The pages that the navigation names."""
    for entry in entries:
        (value,) = entry.values()
        if isinstance(value, str):
            yield value
        else:
            yield from nav(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", built]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return built


def test_each_page_is_in_the_navigation():
    named = list(nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert len(named) == len(set(named))
    assert set(named) == pages, "list the page under nav in mkdocs.yml"


def test_each_public_name_is_in_the_reference(site):
    headings = set(re.findall(r'<h3 id="([^"]*)"', (site / "api.html").read_text()))
    assert {f"lowcal.{name}" for name in lowcal.__all__} <= headings


def test_no_page_loads_anything_from_the_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert not {url for page in pages for url in SCRIPTS.findall(page.read_text())}


def hook(markdown, repo_url):
    """The text of the page docs/methods/a.md after the hook."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("links", DOCS / "links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = SimpleNamespace(config_file_path=str(ROOT / "mkdocs.yml"), repo_url=repo_url)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="methods/a.md"))
    return module.on_page_markdown(markdown, page=page, config=config, files=None)


@pytest.mark.parametrize(
    ("link", "with_address", "without"),
    [
        ("[JSON](../../CHANGELOG.md)", "[JSON](https://x/blob/main/CHANGELOG.md)", "JSON (`CHANGELOG.md`)"),
        ("[all](../../results)", "[all](https://x/tree/main/results)", "all (`results`)"),
        ("[examples/ddp.py](../../examples/ddp.py)", "[examples/ddp.py](https://x/blob/main/examples/ddp.py)",
         "`examples/ddp.py`"),
        ("[a](../../README.md#b)", "[a](https://x/blob/main/README.md#b)", "a (`README.md`)"),
        ("[a](../log.md)", "[a](../log.md)", "[a](../log.md)"),
        ("[a](https://y/../z)", "[a](https://y/../z)", "[a](https://y/../z)"),
        ("`[a](../../README.md)`", "`[a](../../README.md)`", "`[a](../../README.md)`"),
    ],
)  # fmt: skip
def test_links_out_of_the_folder_become_addresses_or_names(link, with_address, without):
    assert hook(link, "https://x/") == with_address
    assert hook(link, None) == without


def test_a_picture_from_outside_comes_into_the_site(site):
    picture = "files/results/cifar10-jpeg-small/vgg13-cifar10.svg"
    assert f'src="{picture}"' in (site / "cifar10.html").read_text()
    assert (site / picture).exists()


@pytest.mark.skipif(browser.FOUND is None, reason="needs Chromium")
def test_pages_open_without_errors(site, tmp_path):
    chromium = browser.Browser(tmp_path)
    try:
        for page in ("index", "concepts", "api", "cifar10"):
            for width in (1280, 390):
                chromium.open(site / f"{page}.html", width=width)
                assert chromium.problems == []
                assert chromium.evaluate("document.documentElement.scrollWidth <= innerWidth")
                assert chromium.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    finally:
        chromium.close()
