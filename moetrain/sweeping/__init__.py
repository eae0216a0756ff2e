"""Sweeps: many trainings by one command line, also by the sweepers and launchers of others."""
