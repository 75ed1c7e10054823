"""Which output folders are free."""

import pytest

from lowcal import LowcalError
from lowcal.experiments.folders import refuse_used


def test_an_absent_an_empty_and_a_crashed_one_are_free_and_others_not(tmp_path):
    folder = tmp_path / "out"
    refuse_used(folder, "a sweep")
    folder.mkdir()
    refuse_used(folder, "a sweep")
    (folder / ".mark.json.tmp").write_text("{")  # a crash while the first file was written
    refuse_used(folder, "a sweep")
    (folder / "thesis.txt").touch()
    with pytest.raises(LowcalError, match=r"exists and is not a sweep \(it holds 'thesis.txt'\)"):
        refuse_used(folder, "a sweep")
    with pytest.raises(LowcalError, match="is not a folder"):
        refuse_used(folder / "thesis.txt", "a sweep")
