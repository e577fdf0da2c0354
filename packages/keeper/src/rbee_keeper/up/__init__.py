"""`rbee up`: a queen, a hive and a worker on this machine, in the foreground."""
