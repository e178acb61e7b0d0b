"""Draws a small dataset to try the example with: `python -m resnext_backbones_example.dots FOLDER`."""

import csv
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 64


def write_dots(root: Path, images: dict[str, int]) -> None:
    """root/{split}/0000.png … with one to ten dots each, and root/{split}.csv with `file` and `dots`."""
    for split, number in images.items():
        draw = random.Random(split)
        (root / split).mkdir(parents=True, exist_ok=True)
        with (root / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file", "dots"])
            for index in range(number):
                dots = draw.randint(1, 10)
                name = f"{split}/{index:04}.png"
                picture(draw, dots).save(root / name)
                table.writerow([name, dots])


def picture(draw: random.Random, dots: int) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), (230, 225, 215))
    pen = ImageDraw.Draw(image)
    cells = draw.sample([(x, y) for x in range(4) for y in range(4)], dots)  # apart from each other
    for x, y in cells:
        centre = (16 * x + draw.randint(6, 10), 16 * y + draw.randint(6, 10))
        pen.circle(centre, draw.randint(3, 5), fill=tuple(draw.randint(0, 160) for _ in range(3)))
    return image


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m resnext_backbones_example.dots FOLDER")
    write_dots(Path(sys.argv[1]), {"train": 500, "val": 100})
    print(f"600 images in {sys.argv[1]}: data=csv_regression data.root={sys.argv[1]} data.column=dots")
