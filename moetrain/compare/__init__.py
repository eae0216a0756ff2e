"""The comparison of runs: arms with their seeds, and which differences are outside the noise."""
