"""What the queen counts and measures of herself, and where Prometheus finds the whole cluster."""
