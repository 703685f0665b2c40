"""How peers behind routers are reached. Knows streams and a few messages, and not what is carried.

``reachability`` finds out whether this peer can be dialled; ``relay`` joins the streams of two that cannot dial each
other, and ``relayed`` are its two ends; ``punch`` makes a direct path of a relayed one; ``reach`` holds all of that.
"""
