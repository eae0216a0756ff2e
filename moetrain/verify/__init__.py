"""`python -m moetrain.verify`: checks that several layouts train the same on the same batches."""
