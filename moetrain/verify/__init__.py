"""`python -m moetrain.verify`: the same batches under several layouts, shown to train the same."""
