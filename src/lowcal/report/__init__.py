"""Tables, figures and one HTML page, made from run folders alone."""

from .page import Report, write_report

__all__ = ["Report", "write_report"]
