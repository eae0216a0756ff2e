"""Sweeps: many trainings by one command line, also by third-party sweepers and launchers."""
