"""Every key of the configuration, with its type, default, aliases, meaning and allowed values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from kvmesh.config.keys import KeyInfo, key, read_key
from kvmesh.config.redis_url import parse_redis_url
from kvmesh.config.values import PORT_MAX, parse_host, parse_host_port, parse_tcp_url, split_list

TransferChannel = Literal["auto", "tcp", "shm", "nixl"]
CachePolicyName = Literal["lru", "arc"]
IndexMode = Literal["replica", "query", "auto"]
WireCodec = Literal["none", "lossless", "int8", "auto"]
FetchGate = Literal["latency", "throughput", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]
Port = Annotated[int, Field(ge=0, le=PORT_MAX)]

PORT_KEYS = ("peer_port", "lookup_port", "admin_port")
"""Keys that take one port, or a list with one port per data-parallel rank."""

CONTROLLER_URLS = ("controller_pull_url", "controller_reply_url", "controller_heartbeat_url")
"""Keys that take one address, or one for each of several controllers."""

TLS_KEYS = ("tls_cert_file", "tls_key_file", "tls_ca_file")

PEER_LOCATIONS = frozenset({"p2pbackend", "peers"})
POOL_LOCATIONS = frozenset({"localcpubackend", "pool"})

ID_MAX_CHARACTERS = 128
_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:@/-]*$"

_BOOL = "true or false"
_PORT = f"a port from 0 to {PORT_MAX} (0: any free one), or a list of them, one per data-parallel rank"
_TCP_URL = "host:port or tcp://host:port"
_TCP_URLS = f"{_TCP_URL}, or several of them"
_SECONDS = "a number of seconds above 0"


class DeclaredKeys(BaseModel):
    """What a person can set, with checks of single values. `KVMeshConfig` is what the program works with."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Who we are
    instance_id: str | None = key(
        None,
        "Name of this instance, unique in the cluster.",
        allowed=f"letters, digits and . _ : @ / -, at most {ID_MAX_CHARACTERS}, starting with a letter or digit",
        aliases=("lmcache_instance_id",),
        shown_default="host name, process id and a random part",
        pattern=_ID_PATTERN,
        max_length=ID_MAX_CHARACTERS,
    )

    # What is cached
    chunk_tokens: int = key(
        256,
        "Tokens per chunk, the unit of sharing. A multiple of vLLM's block size, equal on all instances that share.",
        allowed="a whole number of tokens from 1 to 1048576",
        aliases=("chunk_size",),
        ge=1,
        le=1 << 20,
    )
    pool_enabled: bool = key(
        True,
        "Keep KV in the host pool. Sharing needs it: peers read from the pool.",
        allowed=_BOOL,
        aliases=("local_cpu",),
    )
    pool_size_gb: float = key(
        5.0,
        "Size of the host pool, in units of 1024**3 bytes (as LMCache counts them).",
        allowed="a number above 0 and at most 1048576, in units of 1024**3 bytes",
        aliases=("max_local_cpu_size",),
        gt=0,
        le=1 << 20,
    )
    cache_policy: CachePolicyName = key("lru", "Which chunk leaves a full pool first.", allowed="lru or arc")
    save_decode_cache: bool = key(
        False, "Also keep (and share) the KV of generated tokens, not only of prompts.", allowed=_BOOL
    )
    async_loading: bool = key(
        True,
        "Loads never block the scheduler. Always so; the key exists so that LMCache's files load.",
        allowed="true",
        aliases=("enable_async_loading",),
    )

    # Sharing: where peers find us
    share: bool = key(
        True,
        "Share with peers. false: the host pool serves this instance alone.",
        allowed=_BOOL,
        aliases=("enable_p2p",),
    )
    distributed_url: str | None = key(
        None,
        "Address and port of the node in one, as LMCache's files with a lookup server have it: the default of host and "
        "peer_port.",
        allowed=_TCP_URL,
        shown_default="none",
    )
    host: str = key(
        lambda data: _host_and_port(data)[0],
        "Address the node binds.",
        allowed="a host name or an IP address",
        aliases=("p2p_host",),
        shown_default="that of distributed_url, else 127.0.0.1",
    )
    advertise_host: str = key(
        lambda data: data.get("host", "127.0.0.1"),
        "Address that peers are told to connect to; set it when it differs from the bound one.",
        allowed="a host name or an IP address that peers can reach",
        shown_default="the value of host",
    )
    peer_port: Port = key(
        lambda data: _host_and_port(data)[1],
        "Port for peers: handshake and chunks.",
        allowed=_PORT,
        aliases=("p2p_init_ports", "p2p_init_port", "peer_init_ports"),
        shown_default="that of distributed_url, else any free one",
    )
    lookup_port: Port | None = key(
        None,
        "Port for lookups asked directly, when no directory can be reached. Not bound unless set.",
        allowed=_PORT,
        aliases=("p2p_lookup_ports", "p2p_lookup_port", "peer_lookup_ports"),
        shown_default="not bound",
    )
    admin_port: Port | None = key(
        None,
        "Port of the node's health and metrics pages. Not bound unless set.",
        allowed=_PORT,
        aliases=("lmcache_worker_ports", "lmcache_worker_port"),
        shown_default="not bound",
    )
    insecure: bool = key(
        False,
        "Says that binding beyond loopback without a cluster key is meant: whoever reaches the ports can read KV.",
        allowed=_BOOL,
    )
    cluster_key_file: str | None = key(
        None,
        "File with the key that all members of the cluster share, readable by its owner only (`kvmesh key new FILE` "
        "makes one). Or put the key itself into the variable KVMESH_CLUSTER_KEY.",
        allowed="the path of a file",
        shown_default="none",
        min_length=1,
    )
    tls_cert_file: str | None = key(
        None,
        "Certificate of this instance (PEM), for TLS between peers and on the admin port. The three TLS files go "
        "together, on all instances of a cluster.",
        allowed="the path of a file",
        shown_default="none: no TLS",
        min_length=1,
    )
    tls_key_file: str | None = key(
        None,
        "Private key of that certificate (PEM), without a password.",
        allowed="the path of a file",
        shown_default="none",
        min_length=1,
    )
    tls_ca_file: str | None = key(
        None,
        "Certificates of the CA (PEM). Whoever has a certificate of this CA counts as a peer, so it must serve this "
        "cluster only.",
        allowed="the path of a file",
        shown_default="none",
        min_length=1,
    )

    # Sharing: how we find peers
    controller_pull_url: str | None = key(
        None,
        "The controller's event socket (`pull` of its --monitor-ports). Several controllers: a list; all of them are "
        "told everything, and losing one loses nothing.",
        allowed=_TCP_URLS,
        aliases=("controller_url",),
        shown_default="none",
    )
    controller_reply_url: str | None = key(
        None,
        "The controller's request socket (`reply` of its --monitor-ports); as many as controller_pull_url has.",
        allowed=_TCP_URLS,
        shown_default="none",
    )
    controller_heartbeat_url: str | None = key(
        None,
        "The controller's heartbeat socket, if it has one; else heartbeats go to the request socket.",
        allowed=_TCP_URLS,
        shown_default="none",
    )
    enable_controller: bool = key(
        lambda data: data.get("controller_pull_url") is not None,
        "Use the controller as directory.",
        allowed=_BOOL,
        shown_default="true if controller_pull_url is set",
    )
    lookup_url: str | None = key(
        None,
        "Redis or Valkey as directory (docs/directory.md has all forms of the address).",
        allowed="host:port, redis://, rediss://, redis+cluster:// or redis+sentinel://...",
        shown_default="none",
        repr=False,  # may hold a password
    )
    cluster_name: str = key(
        "default",
        "Name of this cluster in a Redis that others use too. Instances see only those of the same cluster_name.",
        allowed="letters, digits and . _ -, at most 64",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
    )
    static_peers: tuple[str, ...] = key(
        (),
        "Peers to follow without any directory, by their peer_port; one name may stand for several. With a directory: "
        "whom to follow when it is gone for long.",
        allowed=f"a list of {_TCP_URL}",
        shown_default="none",
    )
    index_mode: IndexMode = key(
        "auto",
        "How this instance knows who holds what. replica: it is told everything, and a lookup reads its own memory. "
        "query: it asks the directory once per request, which suits thousands of instances. auto: replica, until "
        "others hold more chunks than replica_max_chunks.",
        allowed="replica, query or auto",
    )
    replica_max_chunks: int = key(
        2_000_000,
        "With index_mode auto: beyond so many chunks of others the directory is asked. A chunk takes about 0.3 kB in "
        "node and engine together.",
        allowed="a whole number of chunks above 0",
        gt=0,
    )
    heartbeat_interval_s: float = key(
        2.0,
        "Seconds between two heartbeats of the node to the directory.",
        allowed=_SECONDS,
        aliases=("lmcache_worker_heartbeat_time",),
        gt=0,
    )
    instance_timeout_s: float = key(
        lambda data: 3 * data.get("heartbeat_interval_s", 2.0) + 1,
        "An instance not heard of for so many seconds is taken for dead, and its chunks are forgotten.",
        allowed="a number of seconds, at least twice heartbeat_interval_s",
        shown_default="3 * heartbeat_interval_s + 1",
        gt=0,
    )
    lookup_timeout_s: float = key(
        3.0,
        "Longest wait of the node for one answer of the directory. Nothing in the engine waits for it: there, a lookup "
        "reads the local replica. (lookup_timeout_ms: the same in milliseconds.)",
        allowed=_SECONDS,
        aliases=("lookup_timeout_ms",),
        gt=0,
    )

    # Sharing: how chunks move
    transfer_channel: TransferChannel = key(
        "auto",
        "How chunks move between nodes. auto: shm within one host, nixl where there is RDMA, else tcp.",
        allowed="auto, tcp, shm or nixl",
    )
    wire_codec: WireCodec = key(
        "none",
        "Make chunks smaller on their way over tcp, for slow links. lossless: always, with peers that have it too. "
        "auto: lossless, while that is faster, by rates measured while running. int8: half the bytes, rounded; such "
        "instances share among themselves only, by tcp.",
        allowed="none, lossless, int8 or auto",
    )
    fetch_gate: FetchGate = key(
        "latency",
        "Fetch only what is predicted to come sooner than it could be computed, by rates measured while running. "
        "throughput: count only the time that the link is busy. off: fetch whatever is there.",
        allowed="latency, throughput or off",
    )
    fetch_gate_margin: float = key(
        0.15,
        "With fetch_gate latency: how much sooner it must come, as a share of the time to compute.",
        allowed="a number from 0 to 0.9",
        ge=0,
        le=0.9,
    )
    fetch_timeout_s: float = key(
        10.0, "Longest time for one request's fetch; what has arrived by then is used.", allowed=_SECONDS, gt=0
    )
    stall_timeout_s: float = key(
        1.0, "A peer that sends no byte for so many seconds is given up.", allowed=_SECONDS, gt=0
    )
    fetch_connections: int = key(
        2,
        "TCP connections that one fetch spreads over at most: one for every 128 MiB.",
        allowed="a whole number from 1 to 64",
        ge=1,
        le=64,
    )
    verify_checksum: bool = key(
        True, "Compare every chunk that arrives with the checksum of its holder.", allowed=_BOOL
    )
    min_retrieve_tokens: int = key(
        0, "Do not fetch for fewer tokens than this.", allowed="a whole number of tokens, 0 or more", ge=0
    )
    retrieve_locations: tuple[str, ...] = key(
        (),
        "Where hits may come from: pool, peers (LMCache's LocalCPUBackend, P2PBackend). Without peers this instance "
        "publishes, and fetches nothing.",
        allowed="a list of: pool, peers, LocalCPUBackend, P2PBackend",
        shown_default="everywhere",
    )
    pin_max_share: float = key(
        0.5,
        "Share of the host pool's slots that pinned chunks may hold together.",
        allowed="a number from 0 to 0.9",
        ge=0,
        le=0.9,
    )
    negative_cache_s: float = key(
        2.0,
        "A chunk that could not be fetched is not tried again for so many seconds.",
        allowed="a number of seconds, 0 or more",
        ge=0,
    )
    nixl_backends: tuple[str, ...] = key(
        ("UCX",),
        "NIXL backends, in order of preference.",
        allowed="a list of NIXL backend names",
        shown_default="UCX",
        min_length=1,
    )

    log_level: LogLevel = key("info", "How much engine side and node log.", allowed="debug, info, warning or error")

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: object, info: ValidationInfo) -> object:
        # Python counts True as 1, so `chunk_size: True` would pass as one token.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false mean nothing for this key")
        return value

    @field_validator(
        "cache_policy", "transfer_channel", "wire_codec", "index_mode", "fetch_gate", "log_level", mode="before"
    )
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("static_peers", "retrieve_locations", "nixl_backends", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return split_list(value)

    @field_validator("async_loading")
    @classmethod
    def _only_async(cls, value: bool) -> bool:
        if not value:
            raise ValueError("remove the key: loads never block the scheduler here, there is no other mode")
        return value

    @field_validator("host", "advertise_host")
    @classmethod
    def _host(cls, value: str) -> str:
        return parse_host(value)

    @field_validator("distributed_url")
    @classmethod
    def _tcp_url(cls, value: str | None) -> str | None:
        return None if value is None else parse_tcp_url(value)

    @field_validator(*CONTROLLER_URLS, mode="before")
    @classmethod
    def _join(cls, value: object) -> object:
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) and value else value

    @field_validator(*CONTROLLER_URLS)
    @classmethod
    def _tcp_urls(cls, value: str | None) -> str | None:
        return None if value is None else ",".join(parse_tcp_url(url) for url in split_urls(value))

    @field_validator("lookup_url")
    @classmethod
    def _redis_url(cls, value: str | None) -> str | None:
        return None if value is None else parse_redis_url(value)

    @field_validator("static_peers")
    @classmethod
    def _peers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(parse_tcp_url(peer) for peer in value))


def _host_and_port(data: Mapping[str, object]) -> tuple[str, int]:
    """Where the node binds unless told: where `distributed_url` says, else on loopback on any free port."""
    url = data.get("distributed_url")
    return parse_host_port(url.removeprefix("tcp://")) if isinstance(url, str) else ("127.0.0.1", 0)


def split_urls(value: str) -> list[str]:
    """The addresses in a value, in order."""
    found = split_list(value)
    return [str(url) for url in found] if isinstance(found, list) else []


KEYS: Mapping[str, KeyInfo] = {
    name: info for name, field in DeclaredKeys.model_fields.items() if (info := read_key(name, field)) is not None
}
"""Every key by its own name, in the order of the documentation."""

OWN_NAMES: Mapping[str, str] = {written: info.name for info in KEYS.values() for written in (info.name, *info.aliases)}
"""The own name of every key, by each name it may be written with."""
