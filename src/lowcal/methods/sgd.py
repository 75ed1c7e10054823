"""Plain SGD on the whole network: what all other methods are measured against."""

from __future__ import annotations

from typing import ClassVar

from lowcal.methods.base import Method


class SGD(Method):
    """The whole network learns by SGD."""

    name: ClassVar[str] = "sgd"
