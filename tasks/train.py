"""Starts a run: `python -m tasks.train task=detection`, and `python train.py …` in a clone of the project.

Only Hydra is imported until the configuration is composed, so that help and mistakes are answered at once.
"""

import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach `guarded`, which prints them in one line

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tasks.cli import check_types, end, guarded, refuse_clashes

CONFIGS = str(Path(__file__).resolve().parents[1] / "configs")  # in a clone as in an installed wheel


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(cfg: DictConfig) -> None:
    hydra_cfg = HydraConfig.get()
    overrides, choices = list(hydra_cfg.overrides.task), dict(hydra_cfg.runtime.choices)
    refuse_clashes(choices, CONFIGS, "train")
    check_types(cfg, overrides, choices, "train")

    from resnext_backbones.errors import UsageError  # imports torch
    from tasks.run import run
    from tasks.stopping import Interrupted

    try:
        run(cfg, overrides, choices)
    except UsageError as error:
        end(str(error).rpartition("resnext_backbones.errors.UsageError: ")[2])  # without a worker's traceback
    except Interrupted as stop:
        end(str(stop), stop.exit_code)
    except Exception:  # not a mistake in the configuration, which `guarded` would take it for
        traceback.print_exc()
        sys.exit(1)


def start() -> None:
    """What the command line does."""
    guarded(main, CONFIGS, "train")


if __name__ == "__main__":
    start()
