"""The on-disk format of the NVMe tier: layout, records, recovery. No payload I/O.

checksum   CRC-64/NVME of many rows          format, record   the bytes (docs/formats/nvme.md)
extent     one file and its record mirror    pool             slot ids of one size
directory  names, lock, durable create       writes           record pages for the engine
store      the directory under a quota       recovery         what survived a restart
inspect    read-only view for people
"""

from kvx.cache.disk.extent import Extent
from kvx.cache.disk.pool import DiskPool
from kvx.cache.disk.record import BlockRecords
from kvx.cache.disk.recovery import Recovered, RecoveredPool, RecoveryCounts
from kvx.cache.disk.store import DiskStore
from kvx.cache.disk.writes import RecordWrites

__all__ = [
    "BlockRecords",
    "DiskPool",
    "DiskStore",
    "Extent",
    "RecordWrites",
    "Recovered",
    "RecoveredPool",
    "RecoveryCounts",
]
