"""Keys, formats, ledger, replica, planner: pure state, without sockets and without vLLM."""
