"""`rbee install` and `rbee uninstall`: a queen or a hive as a service of this machine's systemd."""
