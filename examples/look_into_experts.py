"""Shows to which experts of a run the bytes or tokens of a text are routed.

`python examples/look_into_experts.py runs/toy "def f(x):"`
"""

import sys

import torch

from moetrain import api


def main() -> None:
    """Prints each layer's load, and each token's first expert in the first and the last layer."""
    run, text = sys.argv[1:]
    model, tokenizer = api.load_model(run), api.load_tokenizer(run)
    ids = torch.as_tensor(tokenizer.encode(text).astype("int64"))
    layers = api.routing(model, ids)
    for found in layers:
        print(f"layer {found.layer}: {' '.join(f'{share:.0%}' for share in found.load)}")
    for number, token in enumerate(ids):
        first, last = (found.experts[number, 0] for found in (layers[0], layers[-1]))
        print(f"{tokenizer.decode([int(token)])!r:>8}  {int(first)}  {int(last)}")


if __name__ == "__main__":
    main()
