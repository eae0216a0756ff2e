"""Remote copies of checkpoints: in an object store, or on another disk."""
