"""What `benchmarks.pretraining` measured: a section of docs/results.md, a curve, the histories."""

import statistics
from pathlib import Path

from PIL import Image

from benchmarks.pretraining_runs import ARMS, FRACTIONS, SOURCES, TRAINING_IMAGES, VALIDATIONS, Study
from benchmarks.runs import ROOT, TrainRun
from benchmarks.tables import gain, provenance, spread, table, write_section
from tasks.drawing.figures import figure_at, styles
from tasks.drawing.pictures import contact_sheet, save_png

RESULTS = ROOT / "docs/results.md"
IMAGES = ROOT / "docs/images"
HEADING = "## The gain of pretraining on blood cells, on two CPU cores"


def section(study: Study) -> str:
    """What was measured, as docs/results.md has it."""
    bodies, rows = [], []
    for source in SOURCES:
        if summary := study.body(source).summary():
            top1 = summary["results"]["best val/top1"]
            recipe = summary["recipe"]
            steps = f"{recipe['total_steps']:,} steps of {recipe['batch_size']}"
            bodies.append([source, steps, f"{top1:.3f}", f"{summary['seconds']:.0f}"])
    for fraction in sorted(FRACTIONS, reverse=True):
        for name, arm in ARMS.items():
            if numbers := study.results(name, fraction):
                lead = "" if name == "scratch" else gain(numbers, study.results("scratch", fraction))
                seconds = statistics.mean(study.seconds(name, fraction))
                ap50 = spread(list(study.results(name, fraction, "test/AP50").values()))
                images = round(TRAINING_IMAGES * fraction)
                ap = spread(list(numbers.values()))
                rows.append([images, arm.says, len(numbers), f"{seconds:.0f}", ap, ap50, lead])
    columns = [
        "training images",
        "body's first weights",
        "runs",
        "seconds",
        "AP",
        "AP50",
        "AP against random weights",
    ]
    summaries = [s for job in study.jobs(ARMS) if isinstance(job, TrainRun) and (s := job.summary())]
    longest = max(summary["seconds"] for summary in summaries)
    return f"""    uv run python -m benchmarks.pretraining

The same Faster R-CNN (ResNeXt-26 32×4d-FPN, `experiment=small_data_cpu`, 320×240) on BCCD, {study.steps}
steps of four images each, whatever the share of the data, so that less data are not less training. The
pretraining is time on top of that: what random weights make of such time is in the row of 2.5 times as many
steps (the tables tell the seconds of the bodies and of the detectors, means over seeds). The best of
{VALIDATIONS} validations chose the checkpoint; AP is that on `test`: mean ± standard deviation (least … most)
over seeds. A seed is that of weights, order and augmentation, and of which images are in a share, the same
in every arm; the last column is the difference seed by seed. There is one pretrained body of each source, so
the spread does not hold what another pretraining would give. No run took more than {longest:.0f} s, start-up,
validations and test included.
{provenance(summaries)}

{table(["body", "pretrained, from random weights", "top-1 on its val", "seconds"], bodies)}
{table(columns, rows)}
{verdict(study)}

![AP over training images, with and without pretraining](images/pretraining.png)

Losses, learning rate and AP of seed 0, from the most data to the least, random weights beside pretrained
(`history.png` of the runs):

![Histories of the runs](images/pretraining_histories.png)"""


def verdict(study: Study) -> str:
    """The sign, whatever it is."""
    lines = []
    for name, arm in ARMS.items():
        for fraction in arm.fractions if name != "scratch" else ():
            ours, others = study.results(name, fraction), study.results("scratch", fraction)
            each = [ours[seed] - others[seed] for seed in ours.keys() & others.keys()]
            if not each:
                continue
            if min(each) > 0:
                word = "helped with every seed"
            elif max(each) < 0:
                word = "harmed with every seed"
            else:
                word = "made no difference with the same sign at every seed"
            images = round(TRAINING_IMAGES * fraction)
            lines.append(f"{arm.says}, {images} images: {word} ({len(each)} seed{'s' * (len(each) > 1)}).")
    pretrained, longer = study.results("shapes", 1.0), study.results("scratch_longer", 1.0)
    if pretrained and longer:
        lines.append(
            f"{ARMS['shapes'].says}, against {ARMS['scratch_longer'].says}: {gain(pretrained, longer)}."
        )
    return "\n".join(f"- {line[0].upper()}{line[1:]}" for line in lines)


def draw_curve(study: Study, path: Path) -> None:
    """AP over the number of training images: each run a dot, the mean a line, the seeds' range a band."""
    looks = styles(ARMS)
    with figure_at(6.4, 4.2, path) as figure:
        axes = figure.subplots()
        for name, arm in ARMS.items():
            found = [
                (round(TRAINING_IMAGES * f), list(study.results(name, f).values())) for f in arm.fractions
            ]
            found = [(images, values) for images, values in found if values]
            if not found:
                continue
            colour, line = looks[name]
            xs = [images for images, _ in found]
            axes.plot(xs, [sum(v) / len(v) for _, v in found], line, color=colour, marker="o", label=arm.says)
            axes.fill_between(
                xs, [min(v) for _, v in found], [max(v) for _, v in found], color=colour, alpha=0.15, lw=0
            )
            for images, values in found:
                axes.plot([images] * len(values), values, ".", color=colour, alpha=0.6)
        axes.set_xscale("log")
        ticks = [round(TRAINING_IMAGES * f) for f in FRACTIONS]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set(
            xlabel=f"training images ({study.steps} steps each)",
            ylabel="AP on test",
            title="BCCD, Faster R-CNN",
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def draw_histories(study: Study, path: Path) -> None:
    """The histories of the first seed: a row a share of the data, random weights left, pretrained right."""
    pictures = []
    for fraction in sorted(FRACTIONS, reverse=True):
        for arm in ("scratch", "shapes"):
            run = study.run(arm, fraction, study.seeds[0])
            if run.summary():
                with Image.open(run.path / "history.png") as picture:
                    small = picture.convert("RGB")
                    small.thumbnail((900, 900))
                    pictures.append(small)
    save_png(contact_sheet(pictures, columns=2), path)


def report(study: Study) -> None:
    if not any(study.results(arm, fraction) for arm in ARMS for fraction in ARMS[arm].fractions):
        return
    images = study.folder if study.smoke else IMAGES
    draw_curve(study, images / "pretraining.png")
    draw_histories(study, images / "pretraining_histories.png")
    if study.smoke:
        print(section(study))
    else:
        write_section(RESULTS, HEADING, section(study))
