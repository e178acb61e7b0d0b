"""`python -m tasks.predict RUN IMAGE …`: what a trained network finds in images, as files and pictures.

Imports nothing heavy before the arguments are read, so that help and mistakes are answered at once.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.progress import Progress

    from tasks.prediction.arguments import Chosen
    from tasks.prediction.predictor import Predictor

PROGRAM = "python -m tasks.predict"
VIEWS = ("none", "flip", "flip_multiscale")  # the names of tasks.views.NAMED
EXAMPLES = f"""
examples:
  {PROGRAM} runs/X photo.jpg                    one image
  {PROGRAM} runs/X photos/ more/a.png           a folder with all below it, and a file
  {PROGRAM} runs/X 'photos/**/*.jpg' --score 0.7
  {PROGRAM} runs/X/checkpoints/last.ckpt photos --output found --device cpu
  {PROGRAM} runs/X photos --tta flip             a little better, at twice the time

In the folder DIR:
  pictures/         each image with what was found in it, in the folders that the images are in
  predictions.json  of detectors: all that the network reports, in COCO's results format: category ids of the
                    dataset it was trained on, boxes x, y, width, height in pixels of the image, masks as
                    run-length codes, keypoints flat, 0 the centre of a pixel; without regard to --score
  images.json       beside it: the images' numbers, names and sizes, and the categories, as a COCO file
                    without annotations: COCO("images.json").loadRes("predictions.json")
  predictions.csv   of classifiers: the five most probable classes of each image
  classes/          of semantic segmentation: PNG files of the images' size, whose values are the classes;
                    classes.txt has their names, from 0

Images are turned as their EXIF orientation says. Of folders all files with an image's ending are taken, but
hidden ones. Ctrl-C ends early and keeps what is done.

Exit codes: 0 done, 1 some images could not be read, the others are done, 2 a mistake in what was given,
130 Ctrl-C.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    args = _parser().parse_args(arguments)
    try:
        from resnext_backbones.errors import UsageError

        try:
            return _run(args)
        except UsageError as fault:
            return _end(str(fault).rpartition("resnext_backbones.errors.UsageError: ")[2], 2)
        except OSError as fault:  # a full disk, a folder that cannot be written to
            return _end(f"{fault.filename or args.output or 'output'}: {fault.strerror or fault}", 2)
    except KeyboardInterrupt:
        return _end("interrupted", 130)


def _run(args: argparse.Namespace) -> int:
    import logging
    import warnings

    from tasks.data.faults import counted
    from tasks.load import load_task
    from tasks.prediction.arguments import chosen_images
    from tasks.prediction.files import output_folder
    from tasks.views import NAMED

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.showwarning = _warn
    chosen = chosen_images(args.images)
    views = None if args.tta is None else NAMED[args.tta]
    predictor = load_task(args.run, args.device, trust=args.trust, views=views)
    folder = output_folder(args.output, args.run)
    began = time.monotonic()
    done, faults, stopped = _predict(args, predictor, chosen, folder)
    seconds = time.monotonic() - began
    for line in (*faults, *chosen.skipped):
        _end(line, 0)
    number = f"{done} of " * (done < len(chosen.files)) + counted(len(chosen.files), "image")
    unread = f", {len(faults)} could not be read" if faults else ""
    print(
        f"{'stopped: ' if stopped else ''}predicted {number} in {seconds:.1f} s "
        f"({done / max(seconds, 1e-9):.1f} a second){unread}; everything is in {folder}"
    )
    if isinstance(stopped, Exception):
        raise stopped
    return 130 if stopped else 1 if faults else 0


def _predict(
    args: argparse.Namespace, predictor: "Predictor", chosen: "Chosen", folder: Path
) -> tuple[int, list[str], BaseException | None]:
    """Writes results and pictures: of how many images, what was wrong with others, what ended it early."""
    from tasks.data.module import spare_cores
    from tasks.prediction.files import Pictures, results

    many = len(chosen.files) > args.batch_size
    workers = args.workers if args.workers is not None else spare_cores() if many else 0
    faults: list[str] = []
    done = 0
    stopped: BaseException | None = None
    pictures = None if args.no_pictures else Pictures(folder / "pictures", args.score, workers)
    with _progress(len(chosen.files)) as bar, results(predictor, folder, chosen) as write:

        def unreadable(_: int, reason: str) -> None:
            faults.append(reason)
            bar.advance(bar.task_ids[0])

        try:
            for found in predictor.iterate(
                chosen.files, args.batch_size, workers=workers, on_fault=unreadable
            ):
                with _whole():
                    write(found)
                    done += 1
                    if pictures is not None:
                        pictures.add(found, chosen)
                bar.advance(bar.task_ids[0])
        except (KeyboardInterrupt, Exception) as reason:  # whatever ended it, what is done is kept
            stopped = reason
        try:
            if pictures is not None:
                pictures.finish()
        except (KeyboardInterrupt, Exception) as reason:  # what led to it is told first
            stopped = stopped or reason
    return done, faults, stopped


@contextmanager
def _whole() -> Iterator[None]:
    """A Ctrl-C inside comes at the end, so that an image is in all files or in none."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _progress(total: int) -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.finished_speed or task.speed or 0:.1f} images/s")

    columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    progress.add_task("", total=total)
    return progress


def _end(message: str, code: int) -> int:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    _end(str(message), 0)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_end(f"{message} (--help tells more)", 2))


def _share(word: str) -> float:
    value = float(word)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{word} is not in 0…1")
    return value


def _whole_number(least: int) -> Callable[[str], int]:
    def read(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word!r}: a whole number of at least {least} is wanted")
        return int(word)

    return read


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} RUN IMAGE … [options]",
        description="What a trained network finds in images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder (its best checkpoint, else its last), or a checkpoint")
    add("images", nargs="+", metavar="IMAGE", help="files, folders, or patterns in quotes")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="a new or empty folder (predictions/<name of the run>, numbered where that exists)",
    )
    add("--score", type=_share, default=0.5, help="objects with at least this score are drawn (0.5)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps, or auto: an accelerator if there is one")
    add("--batch-size", type=_whole_number(1), default=8, metavar="N", help="images computed at once (8)")
    add(
        "--workers",
        type=_whole_number(0),
        metavar="N",
        help="processes that read images, and threads that draw (by the number of cores)",
    )
    add(
        "--tta",
        choices=VIEWS,
        help="merge what is found in each image and its mirror image (flip, twice the time), also at 0.75 "
        "and 1.25 times the size (flip_multiscale, six times); without it as in the run's test stage",
    )
    add("--no-pictures", action="store_true", help="write results only")
    add(
        "--trust",
        action="store_true",
        help="run code that the checkpoint names, and follow its limit on an image's pixels: only for files "
        "from where you would run a program, too",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
