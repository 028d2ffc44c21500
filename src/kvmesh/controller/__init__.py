"""The controller: the directory service of a cluster, with its HTTP API and web page.

    registry    members, inventories, who is told what: a state machine without I/O
    downstream  how far one member has got with what it was sent (used by registry)
    formats     members that cannot share, and why
    activity    recent fetches and totals
    sockets     opening the ports
    feed        ZMQ frames in, frames out
    views       what API and page show, as typed records
    api         HTTP: health, metrics, /api/v1
    metrics     Prometheus
    ui          the web page
    process     all of it in one process

Everything runs in one thread, on one asyncio loop, so no state needs a lock. Nothing is kept on disk: after a restart
the nodes register again and send their inventories.
"""
