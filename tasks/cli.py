"""Mistakes on the command line are answered in one line that names the nearest valid word.

Imports nothing heavy: it is loaded before the configuration is composed.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.initialize import initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from tasks import plugins

SEARCH_PATH = "hydra.searchpath"
USAGE = 2  # exit code of a mistake that the user can mend


def end(message: str, code: int = USAGE) -> NoReturn:
    """Prints one line and exits."""
    print(f"train.py: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def guarded(main: Callable[[], Any], config_dir: str, config_name: str) -> None:
    """Runs Hydra's `main` with the configurations of installed plug-ins.

    What cannot be composed is explained in one line, with exit code 2.
    """
    plugins.register()
    sources, faults = plugins.installed()
    sources += config_dir_of(sys.argv[1:])
    shadowed = plugins.clashes(sources, config_dir)
    for line in [*faults, *(plugins.said(*clash) for clash in shadowed.items())]:
        print(f"train.py: warning: {line}", file=sys.stderr)
    known = {
        option
        for folder in (Path(config_dir), *(s.folder for s in sources))
        for option in plugins.options(folder)
    }
    sys.argv[1:] = with_kept_choices(sys.argv[1:], known)
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        end(explain(error, sys.argv[1:], config_dir, config_name))
    except ValueError:
        if reason := no_name(sys.argv[1:], known):
            end(reason)
        raise
    except KeyboardInterrupt:
        end("interrupted", 130)


def with_kept_choices(arguments: Sequence[str], known: Collection[tuple[str, str]]) -> list[str]:
    """The command line with what the run of `resume=FOLDER` chose in each group that is not chosen anew.

    So its overrides are composed and checked on top of the optimizer, the callbacks … which the run has.

    Args:
        known: each (group, option) there is. A choice that is there no more is left out: the folder's own
            configuration holds its settings.
    """
    given = list(arguments)
    try:
        words = OverridesParser.create().parse_overrides([a for a in given if _is_override(a)])
        resume = next(o for o in words if o.key_or_group == "resume" and not o.is_sweep_override())
        choices = dict(OmegaConf.load(Path(str(resume.value()), "config.yaml")).choices)
    except StopIteration:
        return given
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError):
        return given  # what is wrong is said where the words are composed and the folder is opened
    chosen = {o.key_or_group for o in words}
    named = [(group, str(option)) for group, option in choices.items() if group not in chosen]
    kept = [f"{group}={option}" for group, option in named if (group, option) in known]
    place = given.index(str(resume.input_line))  # among the words, not between a flag and its value
    return given[:place] + kept + given[place:]


def _is_override(argument: str) -> bool:
    return ("=" in argument or argument.startswith("~")) and not argument.startswith("-")


def no_name(arguments: Sequence[str], known: Collection[tuple[str, str]]) -> str | None:
    """What is wrong where a group is given something else than an option's name, such as `ema=null`."""
    for override in OverridesParser.create().parse_overrides([a for a in arguments if _is_override(a)]):
        options = sorted(option for group, option in known if group == override.key_or_group)
        if options and not override.is_delete() and not isinstance(override.value(), str | list):
            none = "" if "none" in options else "; to choose none, leave it out"
            return f"{override.input_line}: the name of an option is wanted: {', '.join(options)}{none}"
    return None


def refuse_clashes(choices: Mapping[str, Any], config_dir: str, config_name: str) -> None:
    """Ends the program if an option is chosen whose name more than one of us and the plug-ins has."""
    sources = [*plugins.installed()[0], *config_dir_of(sys.argv[1:])]
    if reason := plugins.refused(choices, config_name, plugins.clashes(sources, config_dir)):
        end(reason)


def explain(error: Exception, arguments: list[str], config_dir: str, config_name: str) -> str:
    """One line about a configuration that could not be composed."""
    text = str(error)
    if missing := re.search(r"Could not find '([^']+)'", text):
        group, _, option = missing[1].rpartition("/")
        options = re.findall(r"^\t(\S+)", text, flags=re.MULTILINE)
        return f"{group}={option}: no such option; {_nearest(option, options)}"
    if key := re.search(r"Could not override '([^']+)'", text):
        known = list(_keys(_compose(arguments, config_dir, config_name)))
        part = re.match(r"(?:callbacks\.)?(ema|early_stopping)(?:\.|$)", key[1])
        if part and f"callbacks.{part[1]}._target_" not in known:
            return f"{key[1]}: add {part[1]}=default, which sets callbacks.{part[1]}"
        return f"{key[1]}: no such key; {_nearest(key[1], known)} (all keys: python train.py --cfg job)"
    if bad := re.search(r"Error parsing override '(.*?)'", text):
        return f"{bad[1]}: write key=value, and quote values with spaces, commas or brackets: 'key=\"a, b\"'"
    if "Additional config directory" in text:
        return f"{text}; give --config-dir a folder of configurations"
    return text


def check_types(cfg: DictConfig, overrides: Sequence[str], groups: Iterable[str], config_name: str) -> None:
    """Ends the program if an overridden value is of another kind than the default it replaces."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [override for override in parsed if override.key_or_group not in groups]
    if not values:
        return
    composing = {*groups, SEARCH_PATH}
    chosen = [o for o, override in zip(overrides, parsed, strict=True) if override.key_or_group in composing]
    defaults = compose(config_name, overrides=chosen)
    for override in values:
        key = override.key_or_group
        default, value = (OmegaConf.select(c, key, throw_on_missing=False) for c in (defaults, cfg))
        if default is None or value is None or override.is_delete():
            continue
        if (key, value) == ("data.batch_size", "auto"):  # the one number that a word may stand for
            continue
        if wanted := _mismatch(default, value):
            end(f"{key}={value}: {wanted} is wanted, as in {key}={default}")


def _mismatch(default: Any, value: Any) -> str | None:
    """What was wanted instead of `value`, None if it is of the default's kind."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return None if whole else "a whole number"
    if isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number else "a number"
    if OmegaConf.is_list(default):
        return None if OmegaConf.is_list(value) or isinstance(value, str) else "a list"
    if OmegaConf.is_dict(default):
        return None if OmegaConf.is_dict(value) else "a mapping"
    return None


def _compose(arguments: list[str], config_dir: str, config_name: str) -> DictConfig:
    """The configuration with the groups that were asked for, as far as they exist, and no other override."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir, version_base="1.3"):
        words = [a for a in arguments if _is_override(a)]
        always = [searched(source) for source in config_dir_of(arguments)]
        while words:
            try:
                return compose(config_name, overrides=[*always, *words])
            except HydraException as error:
                bad = re.search(r"Could not (?:override|find) '([^']+)'", str(error))
                culprit = bad[1].split("/")[0] if bad else ""
                kept = [w for w in words if not w.lstrip("+~").startswith(culprit)]
                words = kept if culprit and len(kept) < len(words) else []
        return compose(config_name, overrides=always)


def config_dir_of(arguments: Sequence[str]) -> list[plugins.Source]:
    """The folder that Hydra's `--config-dir` names, if it is given and there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config-dir", "-cd")
    try:
        folder = parser.parse_known_args(arguments)[0].config_dir
    except argparse.ArgumentError:  # Hydra says so
        return []
    if folder is None or not os.path.isdir(folder):
        return []
    return [plugins.Source(f"--config-dir {folder}", Path(folder).resolve())]


def searched(source: plugins.Source) -> str:
    """The word that adds a folder to Hydra's search path."""
    return f"{SEARCH_PATH}=['file://{source.folder}']"


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, config):
        name = f"{prefix}{key}"
        yield name
        if not OmegaConf.is_missing(config, key) and not OmegaConf.is_interpolation(config, key):
            child = config[key]
            if OmegaConf.is_dict(child):
                yield from _keys(child, f"{name}.")


def _nearest(word: str, options: list[str]) -> str:
    last = word.rpartition(".")[2]  # a right last part in the wrong place, such as lr for optimizer.lr
    close = [option for option in options if option.rpartition(".")[2] == last][:3]
    close = close or difflib.get_close_matches(word, options, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are: {', '.join(options)}" if len(options) <= 30 else "nothing is named like it"
