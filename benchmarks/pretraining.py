"""The gain of pretraining: a detector of blood cells (BCCD), its body pretrained here or random.

    uv run python -m benchmarks.pretraining                     all that is missing, then table and pictures
    uv run python -m benchmarks.pretraining scratch shapes      these arms only
    uv run python -m benchmarks.pretraining --list              what is done, and how long the rest will take
    uv run python -m benchmarks.pretraining --smoke             some steps of everything, apart from the rest

A run that is complete in runs/pretraining/ is not done again, one that was broken off begins anew.
The data are read from REAL_DATA (default ../shared/data). Nothing else should run meanwhile.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.pretraining_report import report
from benchmarks.pretraining_runs import ARMS, Study
from benchmarks.runs import REAL_DATA, ROOT, listing, work

GUESS = 190.0  # seconds of a run, until one is done


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "arms", nargs="*", metavar="ARM", help=f"of {', '.join(ARMS)}; all of them by default"
    )
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    parser.add_argument("--smoke", action="store_true", help="some steps of everything, apart from the rest")
    args = parser.parse_args(words)
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"no arm is called {', '.join(sorted(unknown))}; there are: {', '.join(ARMS)}")
    study = Study(steps=4, seeds=(0,), fractions=(0.1, 1.0), smoke=True) if args.smoke else Study()
    jobs = study.jobs(args.arms or ARMS)
    if args.list:
        print(listing(jobs, GUESS))
        return
    if not (ROOT / REAL_DATA).is_dir():
        sys.exit(f"{ROOT / REAL_DATA} does not exist: set REAL_DATA to the folder of the datasets")
    work(jobs, GUESS, lambda: report(study))
    report(study)


if __name__ == "__main__":
    main()
