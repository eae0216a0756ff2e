"""Hydra's command line, its files and its errors, shared by the commands of both packages."""
