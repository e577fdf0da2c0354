"""The page about metrics is written from the code, and what is deployed asks for metrics that there are."""

import json
import re
import subprocess
import sys

from rbee_processes import REPOSITORY

PAGE = REPOSITORY / "docs/operations/metrics.md"
DEPLOY = REPOSITORY / "deploy"


def test_the_tables_are_up_to_date() -> None:
    command = [sys.executable, "scripts/metrics_reference.py", "--check"]

    assert subprocess.run(command, cwd=REPOSITORY).returncode == 0, "run: python scripts/metrics_reference.py"


def test_alerts_and_dashboard_ask_for_metrics_that_the_page_tells() -> None:
    told = set(re.findall(r"`(rbee_\w+)`", PAGE.read_text()))
    dashboard = json.loads((DEPLOY / "grafana/dashboards/rbee.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    rules = (DEPLOY / "prometheus/rules.yml").read_text()
    asked = set(re.findall(r"\brbee_\w+", "\n".join([rules, *queries])))

    suffix = re.compile(r"_(?:bucket|sum|count)\Z")
    assert len(asked) > 40
    assert {name for name in asked if suffix.sub("", name) not in told} == set()


def test_the_page_shows_the_configuration_that_comes_with_rbee() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    config = (DEPLOY / "prometheus/prometheus.yml").read_text()

    assert shown.strip() in re.sub(r"^ *#.*\n| +#.*$", "", config, flags=re.MULTILINE)
