"""``undercroft doctor``: what this machine has, how fast its disk is, and what fits.

It describes the machine and promises nothing: what fits is arithmetic over what is free now.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from undercroft import machine
from undercroft.machine import Device, Disk, DiskRates, Ram
from undercroft.units import format_rate, format_size

_PACKAGES = ("undercroft", "torch", "transformers", "peft", "kvikio-cu12", "triton")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fits:
    """What fits into some bytes of fast memory, beside the activations.

    Attributes:
        where: the memory meant, such as "cuda:0" or "RAM".
        full: parameters trained whole with AdamW in float32: weight, gradient and two moments, 16 bytes each.
        adapter: parameters of a frozen bfloat16 model that carries a small adapter, 2 bytes each.
    """

    where: str
    full: int
    adapter: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All that ``undercroft doctor`` prints.

    Attributes:
        versions: of the packages that matter, those that are installed.
        devices: what computes.
        ram: memory of the machine and of this process's control group.
        huge_pages: the kernel's setting for transparent huge pages; with "never", direct I/O costs more CPU.
        disk: the file system that activations would spill to.
        rates: how fast it is.
        carried: bytes of activations that the disk can take and give back per second of a training step.
        fits: what fits into each fast memory.
    """

    versions: dict[str, str]
    devices: tuple[Device, ...]
    ram: Ram
    huge_pages: str
    disk: Disk
    rates: DiskRates
    carried: float
    fits: tuple[Fits, ...]


def diagnose(directory: Path, *, remeasure: bool = False) -> Diagnosis:
    """Look at this machine; measures the disk under `directory` unless that was done before.

    Raises:
        UnsafeDirectory, TierFull, TransferFailed: the disk cannot be measured.
    """
    from undercroft.store.probe import disk_rates

    rates = disk_rates(directory, remeasure=remeasure)
    devices, ram = machine.devices(), machine.ram()
    return Diagnosis(
        versions={name: found for name in _PACKAGES if (found := _version(name))},
        devices=devices,
        ram=ram,
        huge_pages=_huge_pages(),
        disk=machine.disk(directory),
        rates=rates,
        carried=1 / (1 / rates.read + 1 / rates.write),
        fits=(
            *(_fits(gpu.name, gpu.nbytes) for gpu in devices if gpu.name != "cpu"),
            _fits("RAM", ram.usable),
        ),
    )


def _fits(where: str, nbytes: int) -> Fits:
    return Fits(where=where, full=nbytes // 16, adapter=nbytes // 2)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _huge_pages() -> str:
    try:
        return _HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return "absent"


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    remeasure: Annotated[bool, typer.Option(help="Measure the disk again.")] = False,
    disk: Annotated[
        Path | None, typer.Option(help="Directory on the disk to spill to.", show_default="Undercroft's own")
    ] = None,
) -> None:
    """Show devices, memory, the disk's measured rates, and what fits."""
    typer.echo("looking at devices and disk; a disk not yet known is measured for a few seconds", err=True)
    found = diagnose(disk or machine.home(), remeasure=remeasure)
    typer.echo(json.dumps(asdict(found), default=str, indent=2) if as_json else describe(found))


def describe(found: Diagnosis) -> str:
    """The diagnosis for people: one fact a line, name and value."""
    rows = [
        ("versions", ", ".join(f"{name} {number}" for name, number in found.versions.items())),
        *((device.name, _device_text(device)) for device in found.devices),
        ("RAM", _ram_text(found.ram)),
        ("huge pages", found.huge_pages),
        ("disk", _disk_text(found.disk)),
        *_rate_rows(found.rates),
        ("carries", f"{format_rate(found.carried)} of activations, out and back, while a step computes"),
        *((f"fits {fits.where}", _fits_text(fits)) for fits in found.fits),
    ]
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


def _device_text(device: Device) -> str:
    size = f"{device.threads} threads" if device.threads else format_size(device.nbytes)
    return f"{device.label}, {size}"


def _ram_text(ram: Ram) -> str:
    limit = f", limited to {format_size(ram.limit)} by a control group" if ram.limit is not None else ""
    return f"{format_size(ram.total)}{limit}, {format_size(ram.usable)} usable now"


def _disk_text(disk: Disk) -> str:
    warning = "; lies in RAM, so spilling there saves none: choose another with --disk" if disk.in_ram else ""
    return f"{disk.directory} ({disk.file_system}), {format_size(disk.free)} free{warning}"


def _rate_rows(rates: DiskRates) -> list[tuple[str, str]]:
    how = "past the page cache" if rates.direct else "through the page cache: O_DIRECT is refused"
    rows = [
        (f"  {entry.depth} in flight", f"reads {format_rate(entry.read)}, writes {format_rate(entry.write)}")
        for entry in rates.depths
    ]
    return [("measured", f"{rates.measured}, {how}"), *rows]


def _fits_text(fits: Fits) -> str:
    return (
        f"training {fits.full / 1e9:.2f} billion parameters whole (float32, AdamW), "
        f"or an adapter on {fits.adapter / 1e9:.1f} billion (bfloat16), beside the activations"
    )
