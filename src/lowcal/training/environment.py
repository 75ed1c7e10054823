"""The environment of a measurement: the device, the versions, the code."""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lowcal

__all__ = ["code_digest", "gather_environment", "training_command"]

PACKAGE = Path(__file__).parents[1]


@cache
def code_digest(package: Path = PACKAGE) -> str:
    """Twelve hexadecimal digits that tell versions of the code apart: of SHA-256 over the package's .py files.

    Names and contents count, the folder that the package is installed in does not. Read once in a process.
    """
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(package).as_posix(), file) for file in package.rglob("*.py")):
        digest.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def gather_environment(device: str) -> dict[str, Any]:
    """Return the device, the processor, the versions, the threads, the code, the commit, and the present time (UTC)."""
    is_cuda = device.startswith("cuda")
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if is_cuda else _processor_name(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "torch": str(torch.__version__),
        "torchvision": _version("torchvision"),
        "lowcal": lowcal.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "code": code_digest(),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def training_command() -> str | None:
    """Return the command line of `lowcal compare` or `train`; None in another program, whose arguments are its own."""
    program, *arguments = sys.argv
    is_ours = Path(program).name == "lowcal" or Path(program).parts[-2:] == ("lowcal", "__main__.py")
    return shlex.join(["lowcal", *arguments]) if is_ours and arguments[:1] in (["compare"], ["train"]) else None


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
