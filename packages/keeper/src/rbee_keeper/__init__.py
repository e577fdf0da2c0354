"""The keeper: the command line tool `rbee`."""
