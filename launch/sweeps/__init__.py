"""Many runs by one command: trials, the runs they are, their table."""
