"""A body, a task and a dataset of one's own for resnext-backbones: numbers read off images."""
