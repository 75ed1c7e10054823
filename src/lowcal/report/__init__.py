"""Tables, figures and one HTML page, made from run folders alone."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowcal.report.page import Report, write_report

__all__ = ["Report", "write_report"]


def __getattr__(name: str) -> Any:
    # Loaded when first used: the command's first line needs a title, and not matplotlib, which takes a second.
    if name not in __all__:
        raise AttributeError(f"module 'lowcal.report' has no attribute {name!r}")
    from lowcal.report import page

    return getattr(page, name)
