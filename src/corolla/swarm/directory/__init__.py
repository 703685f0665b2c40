"""Where the swarm's announcements live, and how every copy of it stays the same.

``directory`` is the table, and ``entry`` its row, made of a record that ``stamps`` signs and checks. Servers gossip:
``exchange`` decides what is said on each ``link`` to their ``neighbours``, at a ``pace`` that the size of the swarm
allows; ``voice`` is what a server says of itself; ``gossip`` runs it all. Clients subscribe: ``watcher``. A ``view``
wakes whoever waits for a change.
"""
