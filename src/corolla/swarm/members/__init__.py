"""Who may be in a private swarm. Knows nothing of servers, models or what is said once both sides are in.

``owner`` is the key and its folder; ``invite`` the line of text that lets others in; ``membership`` what a peer shows
and how it judges others; ``admission`` how two do so on a new stream; ``spreading`` how revoked invites get known.
"""
