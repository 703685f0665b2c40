"""What a swarm promises about its directory, by the code of real servers under simulated time; clocks are wrong."""

import statistics

import pytest

from corolla.testing import SimulatedSwarm

SERVERS = 30
CLOCK_ERROR_S = 300.0


@pytest.fixture
def swarm():
    swarm = SimulatedSwarm(SERVERS, clock_error_s=CLOCK_ERROR_S, seed=7)
    swarm.run(0.001)
    swarm.acquaint()
    swarm.run(20)
    return swarm


def seen(swarm, server):
    return {entry.announcement.peer for entry in server.directory.live(swarm.now_s)}


def peers(servers):
    return {server.identity.peer_id for server in servers}


def time_until(swarm, predicate, within_s):
    """Let time pass until something is so; say how long it took."""
    began_s = swarm.now_s
    while not predicate():
        assert swarm.now_s - began_s < within_s
        swarm.run(0.1)
    return swarm.now_s - began_s


def test_a_change_reaches_all_within_two_seconds(swarm):
    for number in range(5):
        before_s = swarm.now_s
        changed = swarm.servers[number]
        assert swarm.change(changed, sessions=8)
        record_id = swarm.watch(changed)
        swarm.run(3)
        assert len(swarm.arrivals[record_id]) == SERVERS - 1
        assert max(swarm.arrivals[record_id]) - before_s < 2.0


def test_a_load_that_changes_all_the_time_is_told_now_and_then(swarm):
    told = 0
    for number in range(120):
        told += swarm.change(swarm.servers[0], sessions=8 * (number % 2))
        swarm.run(0.5)
    assert 3 <= told <= 3 + 60 / 5


def test_a_newcomer_knows_all_and_is_known_within_two_seconds(swarm):
    others = list(swarm.servers)
    newcomer = swarm.add(contacts=others[3].contact.addresses)
    everyone = peers(swarm.servers)
    time_until(swarm, lambda: seen(swarm, newcomer) == everyone, 2.0)
    time_until(swarm, lambda: all(newcomer.identity.peer_id in seen(swarm, other) for other in others), 2.0)


def test_the_dead_are_gone_within_thirty_seconds_and_the_living_stay(swarm):
    dead, living = swarm.servers[: SERVERS // 3], swarm.servers[SERVERS // 3 :]
    for server in dead:
        swarm.kill(server)
    time_until(swarm, lambda: all(seen(swarm, server) == peers(living) for server in living), 30.0)
    swarm.run(60)
    assert all(seen(swarm, server) == peers(living) for server in living)


def test_parts_that_were_cut_off_unite(swarm):
    part, rest = swarm.servers[:10], swarm.servers[10:]
    swarm.part(peers(part))
    time_until(swarm, lambda: all(seen(swarm, server) == peers(part) for server in part), 30.0)
    time_until(swarm, lambda: all(seen(swarm, server) == peers(rest) for server in rest), 30.0)
    swarm.run(120)
    swarm.part(set())
    time_until(swarm, lambda: all(seen(swarm, server) == peers(swarm.servers) for server in swarm.servers), 20.0)


@pytest.mark.parametrize("clock_error_s", [-600.0, 0.0, 600.0])
@pytest.mark.parametrize("after_s", [0.0, 120.0])
def test_a_restarted_server_overrules_its_former_self_whatever_its_clock_shows(swarm, clock_error_s, after_s):
    former = swarm.servers[5]
    swarm.kill(former)
    swarm.run(after_s)
    restarted = swarm.add(
        identity=former.identity, contacts=swarm.servers[0].contact.addresses, clock_error_s=clock_error_s
    )
    living = [server for server in swarm.servers if server is not former]
    address = restarted.contact.addresses

    def is_known():
        entries = [server.directory.entry(former.identity.peer_id) for server in living]
        return all(entry.announcement.addresses == address and entry.expires_s > swarm.now_s for entry in entries)

    time_until(swarm, is_known, 10.0)


def test_what_one_server_sends_is_bounded():
    swarm = SimulatedSwarm(200, tracked=40, seed=1)
    swarm.run(0.001)
    swarm.acquaint()
    swarm.run(10)
    for server in swarm.servers:
        server.traffic.said = server.traffic.spent = 0
    swarm.run(10)
    said = statistics.mean(server.traffic.said for server in swarm.servers) * swarm.share
    spent = statistics.mean(server.traffic.spent for server in swarm.servers)
    assert (said + spent) / 10 < 10_000
