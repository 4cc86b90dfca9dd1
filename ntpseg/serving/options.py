"""The settings of ``ntpseg serve``."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields

from ntpseg.data.pixels import MAX_PIXELS
from ntpseg.utils.checks import check_integer


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens, and how much of anything it takes.

    Attributes:
        host: address to listen on; all but loopback addresses can be reached by others.
        port: TCP port.
        allowed_hosts: names beside the address itself by which browsers may call the server, such as that of a proxy.
        max_upload_bytes: of one upload.
        max_unpacked_bytes: of one upload's files after decompression.
        max_files: of one upload, those inside an archive included.
        max_pixels: of a picture.
        max_voxels: of a volume.
        max_text: characters of a sentence.
        max_masks: kept of one image; the oldest goes first.
        max_images: kept; the least recently used goes first.
        max_stored_bytes: of all images and masks kept.
        expire_seconds: after which an image that nobody asks for is forgotten.
        max_waiting: requests that wait while another is decoded; further ones are refused with 503.

    Raises:
        ValueError: a number out of range, or an empty host.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    max_upload_bytes: int = 2**30
    max_unpacked_bytes: int = 2**31
    max_files: int = 4096
    max_pixels: int = MAX_PIXELS
    max_voxels: int = 2**28
    max_text: int = 500
    max_masks: int = 64
    max_images: int = 16
    max_stored_bytes: int = 2**32
    expire_seconds: int = 3600
    max_waiting: int = 8

    def __post_init__(self) -> None:
        if not self.host or not isinstance(self.host, str):
            raise ValueError(f"host must be an address to listen on, got {self.host!r}")
        check_integer("port", self.port, 0, 65535)
        for field in fields(self):
            if field.name.startswith("max_") or field.name == "expire_seconds":
                check_integer(field.name, getattr(self, field.name), 0 if field.name == "max_waiting" else 1)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
