"""What is installed: versions of packages, optional ones, and the HTTP library of huggingface_hub.

In: names of packages, or a recipe. Out: versions, an error for a package that is required and missing, a module.
Cost: reading a package's metadata, a millisecond; no package is imported, but huggingface_hub for `hub_http`.
"""

from __future__ import annotations

import sys
from importlib import metadata
from types import ModuleType

from rmtool.config import Recipe
from rmtool.errors import RmtoolError


def version_of(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def require_package(package: str, setting: str, instead: str) -> None:
    """Check that a package that a setting needs is installed.

    Args:
        instead: the setting that does not need it, for the hint.

    Raises:
        RmtoolError: E0507 it is not.
    """
    if version_of(package) is None:  # not find_spec: a folder named wandb counts as a package there
        what = f"{setting} requires {package}, but it is not installed"
        raise RmtoolError("E0507", what, f"run pip install {package}, or {instead}")


def require_packages(recipe: Recipe) -> None:
    """Check that the packages of trackers and adapters are installed; the engine's are only needed where it runs.

    Raises:
        RmtoolError: E0507 one is not.
    """
    for name in ("wandb", "tensorboard"):
        if getattr(recipe.track, name):
            require_package(name, f"track.{name}=true", f"set track.{name}=false")
    if recipe.lora.rank:
        require_package("peft", f"lora.rank={recipe.lora.rank}", "set lora.rank=0")


def hub_http() -> ModuleType:
    """Return the HTTP library whose exceptions huggingface_hub raises: httpx before its version 2, httpx2 since."""
    from huggingface_hub.errors import HfHubHTTPError

    modules = (base.__module__.partition(".")[0] for base in HfHubHTTPError.__mro__)
    return sys.modules[next(module for module in modules if module.startswith("httpx"))]
