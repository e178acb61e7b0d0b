"""Starts a run: `python train.py task=detection`. `python train.py --help` tells the rest."""

from tasks.train import start

if __name__ == "__main__":
    start()
