"""What a service counts and measures, told at `GET /metrics` in Prometheus' text format.

Every label has a bound: operations, states and error codes come from closed tables, routes are templates,
models are those that were loaded, peers are the services below. What callers make up is `other`.
"""

from rbee_job_server.metrics.jobs import JOB_METRICS, JobMetrics
from rbee_job_server.metrics.relay import FIREHOSE_METRICS, RELAY_METRICS, Handed, Line, relay_families
from rbee_job_server.metrics.requests import REQUEST_METRICS, CountRequests, RequestMetrics
from rbee_job_server.metrics.service import (
    SERVICE_METRICS,
    build_registry,
    metrics_response,
    metrics_route,
)
from rbee_job_server.metrics.spec import OTHER, Metric, Sample

__all__ = [
    "FIREHOSE_METRICS",
    "JOB_METRICS",
    "OTHER",
    "RELAY_METRICS",
    "REQUEST_METRICS",
    "SERVICE_METRICS",
    "CountRequests",
    "Handed",
    "JobMetrics",
    "Line",
    "Metric",
    "RequestMetrics",
    "Sample",
    "build_registry",
    "metrics_response",
    "metrics_route",
    "relay_families",
]
