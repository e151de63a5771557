"""Versions of what a run works with: packages of this environment, and the driver that both builds of torch need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from mcore.devices import Gpu
from mcore.errors import Problem

PROJECT = "mcore-flows"
MIN_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""Oldest driver for Linux that runs what is built for a CUDA major version. Source: NVIDIA, CUDA compatibility."""


def package_problems() -> list[Problem]:
    """Packages of this environment that are missing, or outside of the range that the code is written for."""
    return [
        Problem(f"package {name}", wanted, found, "Run `make setup` again.")
        for name, wanted, found, fits in packages()
        if not fits
    ]


def packages() -> Iterator[tuple[str, str, str, bool]]:
    """Name, range that the code is written for, version that is there (or none), and whether that is in it."""
    for line in metadata.requires(PROJECT) or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "none"
        fits = version != "none" and requirement.specifier.contains(version, prereleases=True)
        yield requirement.name, str(requirement.specifier) or "any", version, fits


def driver_problems(gpus: Iterable[Gpu], cuda: str | None, subject: str) -> list[Problem]:
    """Whether the driver of these GPUs runs a build of torch.

    Args:
        gpus: GPUs that are to be used.
        cuda: CUDA version that torch is built for; None for a build without.
        subject: Whose torch, for people.
    """
    gpus = list(gpus)
    if not gpus:
        return []
    if cuda is None:
        fix = "Install the build for CUDA (requirements/gpu*.txt), or hide the GPUs (CUDA_VISIBLE_DEVICES=)."
        return [Problem(subject, "torch built for CUDA, as there are GPUs", "a build without", fix)]
    oldest = MIN_DRIVER.get(int(cuda.partition(".")[0]))
    found = min((gpu.driver for gpu in gpus), key=_order)
    if oldest is None or _order(found) >= _order(oldest):
        return []
    fix = "Update the driver, or install torch built for an older CUDA."
    return [Problem(f"{subject} (torch for CUDA {cuda})", f"NVIDIA driver {oldest} or newer", found, fix)]


def _order(driver: str) -> Version:
    try:
        return Version(driver)
    except InvalidVersion:
        return Version("0")
