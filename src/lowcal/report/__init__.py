"""Tables, figures and one HTML page, made from run folders alone."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowcal.report.page import Report, write_report

__all__ = ["Report", "write_report"]


def __getattr__(name: str) -> Any:
    # Loaded at first use: matplotlib takes a second, and the command's first line only needs a title.
    if name not in __all__:
        raise AttributeError(f"module 'lowcal.report' has no attribute {name!r}")
    from lowcal.report import page

    return getattr(page, name)
