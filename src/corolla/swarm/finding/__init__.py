"""How a peer finds its first peers. Knows not what they say to each other.

``contacts`` are those it was told of or remembers; ``lan`` asks the local network, ``dht`` the BitTorrent Mainline DHT,
both for a ``rendezvous`` that strangers agree upon; ``meeting`` does all of it for a server.
"""
