"""The Grafana dashboard asks only for metrics that there are, and for each of the important ones."""

import json
import random
import re
from collections import Counter
from pathlib import Path

from prometheus_client import CollectorRegistry

from corolla.gateway.metrics import GatewayMetrics
from corolla.monitor import MonitorConfig, Observer
from corolla.monitor.history import History
from corolla.monitor.metrics import observe_swarm
from corolla.server.metrics import ServerMetrics
from corolla.swarm import Contacts, Directory, Endpoint, Identity, Pings, SwarmConfig, Watcher
from corolla.telemetry.metrics import render

DASHBOARD = Path(__file__).parents[3] / "deploy" / "grafana" / "corolla.json"


def asked():
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return {
        name
        for panel in panels
        for target in panel.get("targets", ())
        for name in re.findall(r"\b(?:corolla|gen_ai)_[a-z_]+\b(?=[\[{)]|$| )", target["expr"])
        if not re.search(rf"(?:by|on) \([^)]*\b{name}\b", target["expr"])
    }


def told(registry):
    names = re.findall(r"^# TYPE (\S+) (\S+)", render(registry).decode(), flags=re.MULTILINE)
    endings = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",)}
    return {name + ending for name, kind in names for ending in endings.get(kind, ("",))}


def test_the_dashboard_asks_for_what_is_told():
    config = SwarmConfig()
    endpoint = Endpoint(Identity.generate(), [], config)
    watcher = Watcher(endpoint, Directory(config), Contacts(()), rng=random.Random(0))
    history = History(None, keep_s=1, max_changes=1)
    swarm = CollectorRegistry()
    observe_swarm(Observer(watcher, Pings(endpoint), history, MonitorConfig()), swarm)
    server = ServerMetrics(Counter(), lambda: None).registry
    gateway = GatewayMetrics(lambda: 0, lambda: 0).registry
    assert asked() - told(swarm) - told(server) - told(gateway) == set()
    assert len(asked()) > 25


def test_every_panel_has_a_place_of_its_own():
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids))
    cells = Counter(
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    )
    assert max(cells.values()) == 1
    assert max(x for x, _ in cells) < 24
