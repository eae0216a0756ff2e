"""A Hydra command line, its files and its errors: what both packages with commands share."""
