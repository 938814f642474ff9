"""What one chip can do and costs: the table behind MFU and the cost meter. No JAX.

Peaks are the makers' dense figures. Prices are dollars per chip and hour, for orientation only: rounded on-demand
prices for GPUs, Google's on-demand list prices for TPUs. What you really pay goes into
`config.hardware.price_per_chip_hour`. A CPU has no row.
"""

from dataclasses import dataclass

from dsjax.sections import ConfigError, did_you_mean


@dataclass(frozen=True)
class Hardware:
    """One chip. `None` where the chip has no such unit, or no price is known."""

    name: str
    device_kinds: tuple[str, ...]  # how JAX's `device.device_kind` starts on this chip
    peak_flops_bf16: float  # FLOP/s, dense
    peak_flops_fp8: float | None
    memory_bytes: float
    hbm_bytes_per_s: float
    price_per_chip_hour: float | None  # US dollars
    source: str
    devices_per_chip: int = 1  # how many devices JAX shows for one chip


HARDWARE: dict[str, Hardware] = {
    row.name: row
    for row in (
        Hardware("H800", ("NVIDIA H800",), 989e12, 1979e12, 80e9, 3.35e12, 2.0, "price: DeepSeek-V3 report, Table 1"),
        Hardware("H100", ("NVIDIA H100 80GB HBM3",), 989e12, 1979e12, 80e9, 3.35e12, 3.0, "SXM data sheet"),
        Hardware("H200", ("NVIDIA H200",), 989e12, 1979e12, 141e9, 4.8e12, 3.5, "SXM data sheet"),
        Hardware("A100", ("NVIDIA A100-SXM4-80GB",), 312e12, None, 80e9, 2.039e12, 1.8, "SXM data sheet"),
        Hardware("B200", ("NVIDIA B200",), 2250e12, 4500e12, 180e9, 7.7e12, 5.5, "HGX data sheet"),
        Hardware("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, None, 16e9, 0.819e12, 1.2, "Google Cloud documentation"),
        Hardware("v5p", ("TPU v5", "TPU v5p"), 459e12, None, 95e9, 2.765e12, 4.2, "Google Cloud documentation"),
        Hardware("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, None, 32e9, 1.64e12, 2.7, "Google Cloud documentation"),
        Hardware(
            "tpu7x",
            ("TPU7x", "TPU v7x"),
            2307e12,
            4614e12,
            192e9,
            7.38e12,
            None,
            "Google Cloud documentation; no list price",
            devices_per_chip=2,
        ),
    )
}


def find(name_or_device_kind: str) -> Hardware | None:
    """The row with this name, in any case, or whose device kind `name_or_device_kind` starts with; else None.

    Where several kinds fit ("TPU v5 lite" also starts with "TPU v5"), the longest wins.
    """
    for name, row in HARDWARE.items():
        if name.lower() == name_or_device_kind.lower():
            return row
    fitting = [
        (len(kind), name)
        for name, row in HARDWARE.items()
        for kind in row.device_kinds
        if name_or_device_kind.startswith(kind)
    ]
    return HARDWARE[max(fitting)[1]] if fitting else None


def check_name(name: str | None) -> None:
    """Raises ConfigError for a `config.hardware.name` that has no row; None is fine."""
    if name is not None and find(name) is None:
        raise ConfigError(f'unknown hardware.name "{name}"{did_you_mean(name, HARDWARE)}')
