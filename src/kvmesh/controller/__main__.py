"""`python -m kvmesh.controller`: the controller without the rest of the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kvmesh.config import make_controller_config
from kvmesh.controller.process import run_controller
from kvmesh.errors import ConfigError, StartupError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a controller from command line arguments. Returns the exit status: 0, 1 (start failed) or 2 (bad flags)."""
    parser = argparse.ArgumentParser(
        prog="python -m kvmesh.controller", description="The directory of a kvmesh cluster."
    )
    parser.add_argument("--host", default="localhost", help="address to bind (default: localhost)")
    parser.add_argument("--port", type=int, default=9000, help="HTTP: page, API, metrics (default: 9000; 0: any)")
    parser.add_argument(
        "--monitor-ports",
        default='{"pull": 8300, "reply": 8400}',
        metavar="JSON",
        help='ZMQ ports, such as {"pull": 8300, "reply": 8400, "heartbeat": 8082} (0: any)',
    )
    parser.add_argument("--heartbeat-interval", type=float, default=2.0, metavar="SECONDS")
    parser.add_argument("--instance-timeout", type=float, default=None, metavar="SECONDS")
    parser.add_argument("--lookup-url", metavar="URL", help="show the directory in this Redis (reads only)")
    parser.add_argument("--cluster-name", default="default", help="whose part of that Redis (default: default)")
    parser.add_argument("--insecure", action="store_true", help="bind beyond this machine without a cluster key")
    parser.add_argument("--cluster-key-file", metavar="FILE", help="the key of the cluster (or KVMESH_CLUSTER_KEY)")
    parser.add_argument("--tls-cert-file", metavar="FILE", help="certificate (PEM): HTTPS instead of HTTP")
    parser.add_argument("--tls-key-file", metavar="FILE", help="the certificate's private key (PEM)")
    parser.add_argument("--tls-ca-file", metavar="FILE", help="with --lookup-url: CA (PEM) of nodes that use TLS")
    given = parser.parse_args(argv)
    try:
        run_controller(
            make_controller_config(
                host=given.host,
                port=given.port,
                monitor_ports=given.monitor_ports,
                heartbeat_interval_s=given.heartbeat_interval,
                instance_timeout_s=given.instance_timeout,
                lookup_url=given.lookup_url,
                cluster_name=given.cluster_name,
                insecure=given.insecure,
                cluster_key_file=given.cluster_key_file,
                tls_cert_file=given.tls_cert_file,
                tls_key_file=given.tls_key_file,
                tls_ca_file=given.tls_ca_file,
            )
        )
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except StartupError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
