"""Checks that a host is installed, and new enough."""

from importlib.metadata import PackageNotFoundError, version

from torch.torch_version import TorchVersion

from lowcal.errors import LowcalError


def check_host(package: str, least: str) -> None:
    """Checks that `package` is installed in version `least` or later; there is an extra of the same name.

    Raises:
        LowcalError: it is not.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        raise LowcalError(
            f"lowcal.integrations.{package} needs {package}, which is not installed; pip install 'lowcal[{package}]'"
        ) from None
    if TorchVersion(found) < least:
        raise LowcalError(
            f"lowcal.integrations.{package} needs {package} {least} or later, and {found} is installed; "
            f"pip install --upgrade {package}"
        )
