"""What one chip can do and costs: the table behind MFU, the cost meter and the planner. No JAX.

Peaks are the makers' dense figures; where the arithmetic units take no FP8, an FP8 peak is None. Links count one
direction, the makers' sums of both halved. Prices are dollars per chip and hour, for orientation only: what you really
pay goes into `config.hardware.price_per_chip_hour`. Whatever no maker states is named in `estimated`. A CPU has no row.
"""

from dataclasses import dataclass

from dsjax.sections import ConfigError, did_you_mean

GiB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One chip. `None` where the chip has no such unit, or nothing is known."""

    name: str
    device_kinds: tuple[str, ...]  # how JAX's `device.device_kind` starts on this chip
    peak_flops_bf16: float  # FLOP/s, dense
    peak_flops_fp8: float | None
    memory_bytes: float
    hbm_bytes_per_s: float
    fast_bytes_per_s: float  # into a chip over NVLink or a slice's own interconnect (ICI)
    fast_chips: int  # that share this link
    slow_bytes_per_s: float  # into a chip over InfiniBand or the data-centre network
    watts: float | None  # of one chip under load, without host, network and cooling
    watts_are: str  # what kind of figure that is
    price_per_chip_hour: float | None  # US dollars
    source: str
    price_source: str
    estimated: tuple[str, ...] = ()  # fields that no maker states
    torus_dimensions: int = 0  # of the fast link; 0: a switch, every chip reaches every other in one step
    devices_per_chip: int = 1  # how many devices JAX shows for one chip


_GPU_CLOUDS = "rounded on-demand price of GPU clouds, 2025"
_TPU_PRICES = "Google's list price on demand, cloud.google.com/tpu/pricing, 2025"
_TPU_DOCS = "docs.cloud.google.com/tpu/docs/"
_BOARD, _UNKNOWN = "board power, the most it may draw", "not published"
_V3 = "DeepSeek-V3 report (arXiv 2412.19437), section 3.2.2: 160 GB/s NVLink, 50 GB/s InfiniBand"
_NVIDIA_LINK = "400 Gb/s a GPU as in NVIDIA's DGX reference designs"

HARDWARE: dict[str, Hardware] = {
    row.name: row
    for row in (
        Hardware(
            name="H800",
            device_kinds=("NVIDIA H800",),
            peak_flops_bf16=989e12,
            peak_flops_fp8=1979e12,
            memory_bytes=80e9,
            hbm_bytes_per_s=3.35e12,
            fast_bytes_per_s=160e9,
            fast_chips=8,
            slow_bytes_per_s=50e9,
            watts=700,
            watts_are=_BOARD,
            price_per_chip_hour=2.0,
            source=f"{_V3}; peaks, memory and power: as the H100's, which it is but for its links",
            price_source="DeepSeek-V3 report, Table 1: assumed rental price",
            estimated=("watts",),
        ),
        Hardware(
            name="H100",
            device_kinds=("NVIDIA H100 80GB HBM3",),
            peak_flops_bf16=989e12,
            peak_flops_fp8=1979e12,
            memory_bytes=80e9,
            hbm_bytes_per_s=3.35e12,
            fast_bytes_per_s=450e9,
            fast_chips=8,
            slow_bytes_per_s=50e9,
            watts=700,
            watts_are=_BOARD,
            price_per_chip_hour=3.0,
            source=f"NVIDIA H100 data sheet, SXM; {_NVIDIA_LINK}",
            price_source=_GPU_CLOUDS,
            estimated=("price_per_chip_hour",),
        ),
        Hardware(
            name="H200",
            device_kinds=("NVIDIA H200",),
            peak_flops_bf16=989e12,
            peak_flops_fp8=1979e12,
            memory_bytes=141e9,
            hbm_bytes_per_s=4.8e12,
            fast_bytes_per_s=450e9,
            fast_chips=8,
            slow_bytes_per_s=50e9,
            watts=700,
            watts_are=_BOARD,
            price_per_chip_hour=3.5,
            source=f"NVIDIA H200 data sheet, SXM; {_NVIDIA_LINK}",
            price_source=_GPU_CLOUDS,
            estimated=("price_per_chip_hour",),
        ),
        Hardware(
            name="A100",
            device_kinds=("NVIDIA A100-SXM4-80GB",),
            peak_flops_bf16=312e12,
            peak_flops_fp8=None,
            memory_bytes=80e9,
            hbm_bytes_per_s=2.039e12,
            fast_bytes_per_s=300e9,
            fast_chips=8,
            slow_bytes_per_s=25e9,
            watts=400,
            watts_are=_BOARD,
            price_per_chip_hour=1.8,
            source="NVIDIA A100 data sheet, SXM; 200 Gb/s a GPU as in NVIDIA's DGX A100",
            price_source=_GPU_CLOUDS,
            estimated=("price_per_chip_hour",),
        ),
        Hardware(
            name="B200",
            device_kinds=("NVIDIA B200",),
            peak_flops_bf16=2250e12,
            peak_flops_fp8=4500e12,
            memory_bytes=180e9,
            hbm_bytes_per_s=8e12,
            fast_bytes_per_s=900e9,
            fast_chips=8,
            slow_bytes_per_s=50e9,
            watts=1000,
            watts_are=_BOARD,
            price_per_chip_hour=5.5,
            source=f"NVIDIA DGX B200 and HGX data sheets, an eighth of the system; {_NVIDIA_LINK}",
            price_source=_GPU_CLOUDS,
            estimated=("price_per_chip_hour",),
        ),
        Hardware(
            name="v4",
            device_kinds=("TPU v4",),
            peak_flops_bf16=275e12,
            peak_flops_fp8=None,
            memory_bytes=32 * GiB,
            hbm_bytes_per_s=1.2e12,
            fast_bytes_per_s=300e9,
            fast_chips=4096,
            slow_bytes_per_s=3.125e9,
            watts=170,
            watts_are="mean measured by Google, of the chip",
            price_per_chip_hour=3.22,
            source=f"{_TPU_DOCS}v4; six links of 50 GB/s (arXiv 2304.01433, Table 4)",
            price_source=_TPU_PRICES,
            estimated=("slow_bytes_per_s",),
            torus_dimensions=3,
        ),
        Hardware(
            name="v5e",
            device_kinds=("TPU v5 lite", "TPU v5e"),
            peak_flops_bf16=197e12,
            peak_flops_fp8=None,
            memory_bytes=16 * GiB,
            hbm_bytes_per_s=0.819e12,
            fast_bytes_per_s=200e9,
            fast_chips=256,
            slow_bytes_per_s=3.125e9,
            watts=None,
            watts_are=_UNKNOWN,
            price_per_chip_hour=1.2,
            source=f"{_TPU_DOCS}v5e; network: 6.4 Tb/s a pod of 256",
            price_source=_TPU_PRICES,
            torus_dimensions=2,
        ),
        Hardware(
            name="v5p",
            device_kinds=("TPU v5", "TPU v5p"),
            peak_flops_bf16=459e12,
            peak_flops_fp8=None,
            memory_bytes=95 * GiB,
            hbm_bytes_per_s=2.765e12,
            fast_bytes_per_s=600e9,
            fast_chips=8960,
            slow_bytes_per_s=6.25e9,
            watts=None,
            watts_are=_UNKNOWN,
            price_per_chip_hour=4.2,
            source=f"{_TPU_DOCS}v5p",
            price_source=_TPU_PRICES,
            torus_dimensions=3,
        ),
        Hardware(
            name="v6e",
            device_kinds=("TPU v6 lite", "TPU v6e"),
            peak_flops_bf16=918e12,
            peak_flops_fp8=None,
            memory_bytes=32 * GiB,
            hbm_bytes_per_s=1.638e12,
            fast_bytes_per_s=400e9,
            fast_chips=256,
            slow_bytes_per_s=12.5e9,
            watts=None,
            watts_are=_UNKNOWN,
            price_per_chip_hour=2.7,
            source=f"{_TPU_DOCS}v6e",
            price_source=_TPU_PRICES,
            estimated=("slow_bytes_per_s",),
            torus_dimensions=2,
        ),
        Hardware(
            name="tpu7x",
            device_kinds=("TPU7x", "TPU v7x"),
            peak_flops_bf16=2307e12,
            peak_flops_fp8=4614e12,
            memory_bytes=192 * GiB,
            hbm_bytes_per_s=7.38e12,
            fast_bytes_per_s=600e9,
            fast_chips=9216,
            slow_bytes_per_s=12.5e9,
            watts=None,
            watts_are=_UNKNOWN,
            price_per_chip_hour=None,
            source=f"{_TPU_DOCS}tpu7x",
            price_source="no list price",
            estimated=("slow_bytes_per_s",),
            devices_per_chip=2,
            torus_dimensions=3,
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


def get(name: str) -> Hardware:
    """The row of this name or device kind; raises ConfigError where there is none."""
    row = find(name)
    if row is None:
        raise ConfigError(f'unknown hardware "{name}"{did_you_mean(name, HARDWARE)}')
    return row


def check_name(name: str | None) -> None:
    """Raises ConfigError for a `config.hardware.name` that has no row; None is fine."""
    if name is not None and find(name) is None:
        raise ConfigError(f'unknown hardware.name "{name}"{did_you_mean(name, HARDWARE)}')
