"""What several commands take."""

import argparse
import os
from collections.abc import Callable
from typing import Any

Add = Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]  # (name, function, summary) -> its parser

CONVERTED = {"bf16": "bfloat16", "fp8": "float8_e4m3fn", "fp32": "float32"}

path = os.path.expanduser  # shells leave the ~ of --workdir=~/run alone


def add_config(command: argparse.ArgumentParser, place: Any = None, example: str = "configs/tiny.py") -> None:
    """--config, required, or one of what `place` is a choice of; and --config.SECTION.FIELD."""
    (place or command).add_argument(
        "--config", required=place is None, type=path, metavar="FILE.py[:ARGUMENT]", help=f"a file like {example}"
    )
    command.add_argument("--config.SECTION.FIELD", metavar="VALUE", help="change one field of the configuration")


def add_devices(command: argparse.ArgumentParser) -> None:
    """--devices."""
    command.add_argument("--devices", type=int, metavar="N", help="simulate N devices on the CPU, in each process")


def add_processes(command: argparse.ArgumentParser) -> None:
    """--distributed, or the three flags that say the same."""
    command.add_argument(
        "--distributed", action="store_true", help="one of several processes; Slurm, Kubernetes, ... say which"
    )
    command.add_argument("--coordinator", metavar="HOST:PORT", help="or say it yourself: where process 0 listens,")
    command.add_argument("--processes", type=int, metavar="N", help="how many there are,")
    command.add_argument("--process", type=int, metavar="I", help="and which of them this is, from 0")
