"""Measurements, run by `make bench-jobs` and `make bench-relay`; never a test."""
