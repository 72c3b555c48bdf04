"""What the JSON documents about compiling and packing kernels say, and what came of one kernel."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal, get_args

from megamoe_jit._cache.cache import user_cache
from megamoe_jit._cache.metadata import Metadata
from megamoe_jit._documents import Count, Digest, Document, Figure, SpecData
from megamoe_jit._jit.pack import ImportReport, PackInfo
from megamoe_jit._jit.runtime import WarmupResult
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._spec.compilable import Compilable

KernelStatus = Literal["compiled", "cached", "failed", "skipped", "missing"]


def status_of(result: WarmupResult) -> KernelStatus:
    """What came of a kernel of a warmup."""
    if result.kernel is None:
        return "failed"
    return "compiled" if result.kernel.origin == "compiled" else "cached"


def stored(result: WarmupResult) -> bool:
    """Whether other processes will find the kernel."""
    if result.kernel is None:
        return False
    if result.kernel.origin != "compiled":
        return True
    return not get_settings().no_cache and user_cache().usable(result.kernel.key, result.spec.kernel_name)


@dataclass(frozen=True, slots=True)
class Kernel:
    """What came of one kernel.

    Attributes:
        kernel: its symbol
        stored: whether other processes will find it on disk
    """

    kernel: str
    spec: SpecData
    status: KernelStatus
    key: Digest | None
    registers: Count | None
    spill_bytes: Count | None
    shared_bytes: Count
    nvrtc: str | None
    seconds: Figure | None
    stored: bool
    error: str | None

    @classmethod
    def known(cls, spec: Compilable, status: KernelStatus, meta: Metadata | None = None) -> Kernel:
        """A kernel that nothing was done about, with what its cache entry says if it has one."""
        says: Metadata = {} if meta is None else meta
        return cls(
            kernel=spec.kernel_name,
            spec=spec.to_json(),
            status=status,
            key=None,
            registers=says.get("registers"),
            spill_bytes=says.get("spill_bytes"),
            shared_bytes=spec.shared_bytes,
            nvrtc=says.get("nvrtc", {}).get("version"),
            seconds=None,
            stored=False,
            error=None,
        )

    @classmethod
    def of(cls, result: WarmupResult) -> Kernel:
        """A kernel of a warmup."""
        made = result.kernel
        return replace(
            cls.known(result.spec, status_of(result), made.meta if made else None),
            key=made.key if made else None,
            seconds=result.seconds,
            stored=stored(result),
            error=str(result.error) if result.error else None,
        )


@dataclass(frozen=True, slots=True)
class Warmup(Document):
    """What a warmup did, kernel by kernel.

    Attributes:
        skipped: not begun after the first failure (--fail-fast)
        missing: would be compiled (--dry-run)
    """

    KIND = "warmup"

    dry_run: bool
    compiled: Count
    cached: Count
    failed: Count
    skipped: Count
    missing: Count
    seconds: Figure
    kernels: tuple[Kernel, ...]

    @classmethod
    def of(cls, kernels: tuple[Kernel, ...], seconds: float, dry_run: bool) -> Warmup:
        """With the kernels counted."""
        counts = Counter[KernelStatus](kernel.status for kernel in kernels)
        by_status = {status: counts[status] for status in get_args(KernelStatus)}
        return cls(dry_run=dry_run, **by_status, seconds=seconds, kernels=kernels)


@dataclass(frozen=True, slots=True)
class PackedKernel:
    """A kernel of a pack: its key and its symbol."""

    key: Digest
    kernel: str


@dataclass(frozen=True, slots=True)
class CacheExport(Document):
    """The pack that was written."""

    KIND = "cache-export"

    path: str
    bytes: Count
    sha256: Digest
    kernels: tuple[PackedKernel, ...]

    @classmethod
    def of(cls, pack: PackInfo) -> CacheExport:
        """The document of a pack."""
        kernels = tuple(map(PackedKernel, pack.keys, pack.kernels))
        return cls(str(pack.path), pack.bytes, pack.sha256, kernels)


@dataclass(frozen=True, slots=True)
class CacheImport(Document):
    """What came from a pack.

    Attributes:
        root: the cache that it was imported into
        present: there before, left as they were
    """

    KIND = "cache-import"

    path: str
    root: str
    imported: tuple[Digest, ...]
    present: tuple[Digest, ...]
    bytes: Count

    @classmethod
    def of(cls, path: str, report: ImportReport) -> CacheImport:
        """The document of an import of a file."""
        return cls(path, str(report.root), report.imported, report.present, report.bytes)
