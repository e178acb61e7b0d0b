"""What installed packages add: configurations for the command line, and builders that a checkpoint may name.

A package declares them as entry points (packaging.python.org, "Entry points specification"), as
docs/extending.md shows. Only the metadata of installed packages is read: nothing of a plug-in is imported
before something of it is built, so one that is broken is in nobody's way until it is asked for.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

CONFIGS = "resnext_backbones.configs"  # the package whose folder holds groups of YAML files
BUILDERS = "resnext_backbones.builders"  # a callable; its dotted path may be a checkpoint's `_target_`


@dataclass(frozen=True)
class Source:
    """A folder of configurations beside our own. name: whose it is, for messages."""

    name: str
    folder: Path


class InstalledConfigs(SearchPathPlugin):
    """Adds the folders of all plug-ins to Hydra's search path, behind our own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for source in installed()[0]:
            search_path.append(source.name, f"file://{source.folder}")


def register() -> None:
    """From now on, whatever Hydra composes in this process finds the plug-ins' configurations."""
    if InstalledConfigs not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(InstalledConfigs)


def installed() -> tuple[list[Source], list[str]]:
    """The folders that plug-ins declare, and a line about each declaration that leads to none."""
    sources, faults = [], []
    for entry in _entries(CONFIGS):
        folder = _folder(entry.value)
        if folder is not None:
            sources.append(Source(_plugin(entry), folder))
        else:
            faults.append(
                f"{_plugin(entry)}: its configurations are declared to be in {entry.value}, and there is no "
                "such folder; install it anew, or uninstall it"
            )
    return sources, faults


def clashes(sources: Sequence[Source], config_dir: str) -> dict[tuple[str, str], list[Source]]:
    """Each (group, option) of more than one origin, with those that come after the first one.

    Hydra takes the first: our own, then the plug-ins by name.
    """
    seen = set(options(Path(config_dir)))
    found: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        theirs = list(options(source.folder))
        for option in theirs:
            if option in seen:
                found.setdefault(option, []).append(source)
        seen |= set(theirs)
    return found


def said(option: tuple[str, str], shadowed: Sequence[Source]) -> str:
    """One line about an option of several origins."""
    file = "/".join(part for part in option if part) + ".yaml"
    names = " and ".join(source.name for source in shadowed)
    return f"{names}: {file} is the name of another's option, too, which comes first; give it another name"


def refused(
    choices: Mapping[str, Any], config_name: str, found: Mapping[tuple[str, str], Sequence[Source]]
) -> str | None:
    """What is wrong if a run chooses an option of which it cannot be said whose it is."""
    chosen = {("", config_name)}
    for group, named in choices.items():
        for option in named if isinstance(named, list | tuple) else [named]:
            chosen.add((group.partition("@")[0], str(option)))
    return next((said(option, found[option]) for option in found if option in chosen), None)


def builders() -> dict[str, str]:
    """The dotted paths that a checkpoint may name beside our own, each with the plug-in that declares it."""
    return {_module(entry).replace(":", "."): _plugin(entry) for entry in _entries(BUILDERS)}


def provider(target: object) -> str | None:
    """The plug-in that a dotted path belongs to, by the name of its package; None if it is no plug-in's."""
    package = str(target).partition(".")[0]
    entries = [*_entries(CONFIGS), *_entries(BUILDERS)]
    return next((_plugin(e) for e in entries if re.split(r"[.:]", _module(e))[0] == package), None)


def _entries(group: str) -> list[EntryPoint]:
    """In an order that does not depend on the file system's."""
    return sorted(entry_points(group=group), key=lambda entry: (_plugin(entry), entry.value))


def _plugin(entry: EntryPoint) -> str:
    return f"plug-in {entry.dist.name}" if entry.dist else f"plug-in {entry.value}"


def _module(entry: EntryPoint) -> str:
    """`module` or `module:name`, as it is declared; `EntryPoint.module` fails on what is no such thing."""
    return entry.value.partition("[")[0].strip()


def _folder(package: str) -> Path | None:
    """A package's folder, found without importing the package."""
    top, *below = package.strip().split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    places = (spec and spec.submodule_search_locations) or []
    folders = (Path(place, *below).resolve() for place in places)
    return next((folder for folder in folders if folder.is_dir()), None)


def options(folder: Path) -> Iterator[tuple[str, str]]:
    """(group, option) of each file in a folder of configurations."""
    for file in sorted(folder.rglob("*.yaml")):
        group = file.parent.relative_to(folder).as_posix()
        yield ("" if group == "." else group), file.stem
