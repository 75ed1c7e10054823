from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep the tests' decoded images away from the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "lowcal"


@pytest.fixture
def make_folder(tmp_path):
    """Return a function that writes a folder of random PNG files, `count` per class and split."""

    def make(*, classes=("cat", "dog"), splits=("train", "test"), count=4, size=(32, 32), name="images"):
        rng = np.random.default_rng(0)
        root: Path = tmp_path / name
        for split in splits:
            for label in classes:
                folder = root / split / label
                folder.mkdir(parents=True)
                for index in range(count):
                    array = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(array).save(folder / f"{index}.png")
        return root

    return make
