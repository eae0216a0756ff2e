"""`moetrain doctor`: tests what this machine can train with."""
