"""Parts of a batch whose images need the same padding, so that none is judged by who is beside it."""

from collections import defaultdict
from collections.abc import Iterator

from tasks.data.batches import DetectionBatch

MULTIPLE = 32  # as `collate` pads


def alike(batch: DetectionBatch) -> Iterator[tuple[list[int], DetectionBatch]]:
    """Yields parts of a batch, each padded no further than its images need alone, with their places in it.

    Padding is zero at the input only: the first norm or bias fills it, later layers read it, and DeepLab
    pools over it. So an image padded to its neighbour's size gives other numbers than alone.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (height, width) in enumerate(batch.sizes.tolist()):
        groups[-(-height // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE].append(i)
    for (height, width), indices in groups.items():
        if len(groups) == 1 and batch.images.shape[-2:] == (height, width):
            yield indices, batch
            return
        yield (
            indices,
            DetectionBatch(
                images=batch.images[indices, :, :height, :width],
                sizes=batch.sizes[indices],
                original_sizes=batch.original_sizes[indices],
                image_ids=batch.image_ids[indices],
                targets=[batch.targets[i] for i in indices],
            ),
        )
