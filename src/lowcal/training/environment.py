"""What a measured figure must be read with: the device, the versions, the commit."""

import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["gather_environment"]


def gather_environment(device: str) -> dict[str, Any]:
    """Return the device and its name, the versions, the threads, the commit, and the present time (UTC)."""
    is_cuda = device.startswith("cuda")
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if is_cuda else _processor_name(),
        "torch": str(torch.__version__),
        "torchvision": _version("torchvision"),
        "lowcal": _version("lowcal"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of lowcal's own source tree ("-dirty" after changes); None if installed without one."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        _output([*git, "ls-files", "--error-unmatch", here.name])  # fails in a repository of someone else
        return _output([*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    except (OSError, subprocess.SubprocessError):
        return None


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
