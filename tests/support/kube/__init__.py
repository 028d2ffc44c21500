"""A small Kubernetes on loopback: an API server that Helm and kubectl talk to (`api`), and pods as local processes
(`kubelet`).
"""
