"""Writes `rules.yaml` beside this file: the alerts of `deploy/monitoring/alerts.yml` for Prometheus' operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ALERTS = HERE.parents[2] / "deploy" / "monitoring" / "alerts.yml"
RULES = HERE / "rules.yaml"

HEADER = "# Made by build.py from deploy/monitoring/alerts.yml: change it there.\n"


def rule(alerts: dict[str, Any]) -> dict[str, Any]:
    """The PrometheusRule with the groups of a rule file."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "vidgen"},
        "spec": {"groups": alerts["groups"]},
    }


if __name__ == "__main__":
    built = rule(yaml.safe_load(ALERTS.read_text(encoding="utf-8")))
    RULES.write_text(HEADER + yaml.safe_dump(built, sort_keys=False, width=120), encoding="utf-8")
