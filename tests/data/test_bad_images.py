"""Unusual and unusable image files, met by each loader that reads files."""

from dataclasses import replace

import pytest
from PIL import ImageFile

from fault_trials.pictures import KINDS, LOADERS, check

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python 3.12 on
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a single processor
]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_used_as_what_it_shows_or_named_or_left_out(tmp_path, kind, loader):
    check(tmp_path / "images", loader, KINDS[kind])


def test_the_check_tells_right_from_wrong(tmp_path, monkeypatch):
    """A reader that takes what it can from a truncated file, and a colour that is another."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(AssertionError, match="it was used"):
        check(tmp_path / "cut", "image-folder", KINDS["truncated JPEG"])
    with pytest.raises(AssertionError):
        check(tmp_path / "other", "image-folder", replace(KINDS["CMYK"], colour=(0, 254, 0)))
