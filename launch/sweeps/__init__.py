"""Many runs with one command: trials, their runs, their table."""
