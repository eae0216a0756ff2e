"""Trains a toy mixture of experts for some steps, without a run folder.

`python examples/train_in_twenty_lines.py train.num_steps=20` takes overrides like `moetrain`.
"""

import sys

from moetrain import api


def main() -> None:
    """Trains, and prints the loss and the busiest expert's load."""
    config = api.compose("+model=toy", *sys.argv[1:])
    with api.training(config) as training:
        for batch in training.batches():
            report = training.step(batch)
            counts = report.expert_counts  # [MoE layers, experts]
            busiest = (counts / counts.sum(1, keepdim=True)).max()
            print(f"step {training.num_steps}  loss {report.loss:.4f}  busiest {busiest:.1%}")


if __name__ == "__main__":
    main()
