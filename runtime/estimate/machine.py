"""What a machine does: constants of its GPU and links, from the table of this folder or from a calibration file."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from runtime.errors import ConfigError, require
from runtime.log.flops import peak_flops

Collective = Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce", "send"]
COLLECTIVES: tuple[Collective, ...] = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "send")
PASSES = (
    *("norm", "head_norm", "rotary", "latent", "cross_entropy", "embedding", "adamw", "grad_norm"),
    *("gather", "sum", "swiglu", "plain", "dequantise", "quantise", "swiglu_fp8", "swiglu_blocks"),
)
LINKS = ("nvlink", "network")
_TABLE = Path(__file__).with_name("machines.yaml")
_MAX_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Link:
    """What connects ranks: the time of a collective is the latency, and bytes over a rate that depends on the ranks."""

    latency: float
    """Seconds."""
    hop: float
    """Seconds more for each node that a collective passes."""
    rates: Mapping[Collective, Mapping[int, float]]
    """Bytes a second that a rank sends, by the number of ranks: the largest that is not above a group's counts."""

    def seconds(self, kind: Collective, num_bytes: float, ranks: int) -> float:
        """Give the time of a collective.

        Args:
            kind: which.
            num_bytes: what each rank sends over the link.
            ranks: of the group.

        Returns:
            Seconds; 0 where there is nothing to send.
        """
        return self.latency + num_bytes / self.rate(kind, ranks) if num_bytes > 0 else 0.0

    def rate(self, kind: Collective, ranks: int) -> float:
        """Give the bytes a second that each rank of a group sends."""
        rates = self.rates[kind]
        return rates[max((size for size in rates if size <= ranks), default=min(rates))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The constants of a GPU and its links; `machines.yaml` explains each."""

    gpu: str
    measured: bool
    source: str
    memory_gib: float
    reserve_gib: float
    hbm_tb_s: float
    dense_tflops: float
    grouped_tflops: float
    fp8_tflops: float
    fp8_blocks_share: float
    attention_tflops: float
    attention_cp_tflops: float
    attention_window_tflops: float
    attention_widths: Mapping[int, float]
    attention_forward_share: float
    overlap_exponent: float
    grouped_overlap_exponent: float
    grouped_tile_depth: float
    grouped_sum_tb_s: float
    row_alignment: int
    passes: Mapping[str, float]
    sum_bytes: float
    router_ms: float
    launch_us: float
    collective_gap_us: float
    layer_gap_us: float
    links: Mapping[str, Link]
    exchange_wait_us: float
    replayed_collective_us: float
    reduce_hidden: float
    gather_hidden: float
    imbalance: float
    gpus_per_node: int
    disk_gb_s: float
    pcie_gb_s: float
    host_gb_s: float
    host_memory_gb: float

    @property
    def memory(self) -> float:
        """Bytes that a run can use."""
        return (self.memory_gib - self.reserve_gib) * 2**30

    @property
    def peak(self) -> float | None:
        """Operations a second of dense bf16 products by the data sheet, of which a share is the utilisation."""
        return peak_flops(self.gpu)

    def replayed(self) -> Machine:
        """Give the machine as passes in CUDA graphs find it: no host between kernels, so that ranks don't wait for each other's."""
        nvlink = replace(
            self.links["nvlink"], latency=min(self.links["nvlink"].latency, self.replayed_collective_us * 1e-6)
        )
        return replace(self, links={**self.links, "nvlink": nvlink}, collective_gap_us=0.0, exchange_wait_us=0.0)

    def attention_width(self, width: int) -> float:
        """Give the share of attention's rate that heads of this width reach."""
        return next((share for known, share in sorted(self.attention_widths.items()) if width <= known), 1.0)

    def moving(self, num_bytes: float, kind: str = "adamw") -> float:
        """Give the seconds of a pass over memory."""
        return num_bytes / (self.hbm_tb_s * 1e12 * self.passes[kind])

    def over_the_link(self, num_bytes: float, ranks: int, *, ways: int = 2) -> float:
        """Give the seconds in which so many bytes travel between GPUs and the host's memory.

        Args:
            num_bytes: of each of the ranks, each way.
            ranks: of a machine, which share its memory.
            ways: 2: there and back at once; 1: in one direction.

        Returns:
            Seconds.
        """
        return max(num_bytes / self.pcie_gb_s, ways * ranks * num_bytes / self.host_gb_s) * 1e-9

    def together(self, computing: float, num_bytes: float) -> float:
        """Give the seconds of a product that streams weights or sums beside its arithmetic."""
        return _overlapped(computing, num_bytes / (self.hbm_tb_s * 1e12), self.overlap_exponent)

    def grouped(self, computing: float, depth: float, *, streamed: float = 0.0, summed: float = 0.0) -> float:
        """Give the seconds of a grouped product.

        Args:
            computing: seconds of its operations at the full rate.
            depth: elements that each of its results sums.
            streamed: bytes of weights.
            summed: bytes of sums that it adds to, read and written.

        Returns:
            Seconds.
        """
        moving = streamed / (self.hbm_tb_s * 1e12) + summed / (self.grouped_sum_tb_s * 1e12)
        tiles = computing * (1 + self.grouped_tile_depth / max(1.0, depth))
        return _overlapped(tiles, moving, self.grouped_overlap_exponent)

    def of_matrix(
        self, computing: float, sizes: tuple[int, int], rows: float, *, streamed: float, summed: float
    ) -> tuple[float, float, float]:
        """Give the seconds of the three grouped products of experts' matrices: forward, gradient of the rows, their own gradient.

        Args:
            computing: seconds of the operations of one of them at the full rate.
            sizes: of a matrix, width of what it gives and of what it takes.
            rows: of an expert.
            streamed: bytes of all matrices.
            summed: bytes of their gradient's sums, read and written.
        """
        wide, deep = sizes
        forward, back = (self.grouped(computing, depth, streamed=streamed) for depth in (deep, wide))
        return forward, back, self.grouped(computing, rows, summed=summed)


def _overlapped(computing: float, moving: float, power: float) -> float:
    return float((computing**power + moving**power) ** (1 / power))


@cache
def _table() -> dict[str, dict[str, Any]]:
    import yaml

    table: dict[str, dict[str, Any]] = yaml.safe_load(_TABLE.read_text(encoding="utf8"))
    return table


def known_machines() -> list[str]:
    """Give the names that `find_machine` knows."""
    return list(_table())


def find_machine(
    name: str,
    *,
    gpus_per_node: int | None = None,
    link_gb_s: float | None = None,
    host_memory_gb: float | None = None,
) -> Machine:
    """Find a machine.

    Args:
        name: one of the table's, or the path of a calibration file.
        gpus_per_node: GPUs that NVLink connects; None takes the machine's.
        link_gb_s: what a GPU can send to other nodes, GB/s; None takes the machine's.
        host_memory_gb: memory of a node that a run can use, GB; None takes the machine's, which may be unknown (0).

    Returns:
        The machine.

    Raises:
        ConfigError: there is no such machine or file, or the file says something else than the table's keys.
    """
    if name in _table():
        given: dict[str, Any] = _table()[name]
    elif name.endswith((".yaml", ".yml")):
        given = _read(Path(name))
    else:
        near = difflib.get_close_matches(name.lower(), known_machines(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"--gpu {name!r} is unknown{hint} Known are {', '.join(known_machines())}, or the path of a calibration "
            "file (.yaml) that `moeconv plan --calibrate` has written"
        )
    values = dict(_with_base(given, name))
    if gpus_per_node is not None:
        values["gpus_per_node"] = gpus_per_node
    if host_memory_gb is not None:
        values["host_memory_gb"] = host_memory_gb
    if link_gb_s is not None:
        network = values["links"]["network"]
        rates = {kind: {2: link_gb_s} for kind in COLLECTIVES}
        values["links"] = values["links"] | {"network": network | {"gb_s": rates}}
    return _machine(values, name)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"--gpu {path}: can't be read: {error.strerror}") from None
    require(len(raw) <= _MAX_FILE, f"--gpu {path}: is larger than a calibration file, {_MAX_FILE} bytes")
    try:
        value = yaml.safe_load(raw)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--gpu {path}: is no YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--gpu {path}: expected keys and values, as docs/planning.md shows")
    return {"like": "h100", **value}


def _with_base(given: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Fill in what is left out from the machine that `like` names."""
    like = given.get("like")
    if like is None:
        return given
    require(like in _table(), f"{where}: like is {like!r}; expected one of {', '.join(known_machines())}")
    base = dict(_with_base(_table()[like], like))
    known = {field.name for field in fields(Machine)} | {"like"}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise ConfigError(f"{where}: {key} is no constant of a machine{f'; nearest: {near[0]}' if near else ''}")
        if key in ("passes", "links", "attention_widths"):
            require(isinstance(value, dict), f"{where}: {key} is {value!r}; expected keys and values")
            base[key] = base[key] | value
        elif key != "like":
            base[key] = value
    return base


def _machine(values: Mapping[str, Any], where: str) -> Machine:
    out: dict[str, Any] = {}
    for field in fields(Machine):
        value = values.get(field.name)
        if field.name == "links":
            links = value or {}
            require(
                set(links) == set(LINKS),
                f"{where}: links are {', '.join(map(str, links))}; expected {', '.join(LINKS)}",
            )
            out["links"] = {name: _link(links[name], f"{where}: links.{name}") for name in LINKS}
        elif field.name == "passes":
            unknown = sorted(set(value or ()) ^ set(PASSES))
            require(
                not unknown, f"{where}: passes.{unknown[0] if unknown else ''} is unknown; known: {', '.join(PASSES)}"
            )
            out["passes"] = {name: _number(share, f"{where}: passes.{name}") for name, share in (value or {}).items()}
        elif field.name == "attention_widths":
            widths = value or {}
            right = all(type(width) is int and width > 0 for width in widths)
            require(right, f"{where}: {field.name} is {value!r}; expected shares by width, as {{64: 0.8, 128: 1}}")
            out[field.name] = {w: _number(share, f"{where}: {field.name}.{w}") for w, share in widths.items()}
        elif field.type == "str":
            out[field.name] = str(value)
        elif field.type == "bool":
            require(isinstance(value, bool), f"{where}: {field.name} is {value!r}; expected true or false")
            out[field.name] = value
        else:
            least = 0.0 if field.name.endswith(("_ms", "_us", "_gib", "memory_gb", "fp8_tflops")) else None
            number = _number(value, f"{where}: {field.name}", least)
            out[field.name] = int(number) if field.type == "int" else number
    for name in ("gpus_per_node", "row_alignment"):
        require(out[name] >= 1, f"{where}: {name} is {out[name]}; expected at least 1")
    return Machine(**out)


def _link(value: Any, where: str) -> Link:
    require(
        isinstance(value, dict) and set(value) == {"latency_us", "hop_us", "gb_s"},
        f"{where}: expected latency_us, hop_us and gb_s",
    )
    table = value["gb_s"]
    require(
        isinstance(table, dict) and set(table) == set(COLLECTIVES),
        f"{where}.gb_s: expected rates of {', '.join(COLLECTIVES)}",
    )
    rates: dict[Collective, dict[int, float]] = {}
    for kind in COLLECTIVES:
        rows = table[kind]
        right = isinstance(rows, dict) and rows and all(type(ranks) is int and ranks >= 2 for ranks in rows)
        require(bool(right), f"{where}.gb_s.{kind}: expected rates by number of ranks, as {{2: 250, 4: 300}}")
        rates[kind] = {ranks: _number(rate, f"{where}.gb_s.{kind}") * 1e9 for ranks, rate in rows.items()}
    latency, hop = (_number(value[key], f"{where}.{key}", 0.0) * 1e-6 for key in ("latency_us", "hop_us"))
    return Link(latency, hop, rates)


def _number(value: Any, where: str, least: float | None = None) -> float:
    """Read a finite number, above 0 or at least `least`."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    good = good and (value > 0 if least is None else value >= least)
    require(good, f"{where} is {value!r}; expected a number {'above 0' if least is None else f'of at least {least:g}'}")
    return float(value)
