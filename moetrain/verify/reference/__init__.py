"""A plain reference of training: float64, one process, one sequence after another.

It is written out independently of `moetrain.model`, `parallel`, `train` and `optim`, and imports
none of them, so that what is wrong in the same way in every layout differs from it.
"""
