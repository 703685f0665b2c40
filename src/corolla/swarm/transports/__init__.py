"""Bytes between two peers who have proved who they are: the seam, what is behind it, and nothing of messages.

``transport`` is the seam; ``tls`` over ``tcp`` is what real peers use, with the ``credentials`` it shows; ``tunnel``
is what TLS can run over; ``memory`` is a network in one process; ``race`` tries several addresses.
"""
