"""How much of its time a run would train for on a cluster that fails: expected, and simulated."""
