"""The command line of rbee."""
