"""The uploads that are kept: in memory, under names that cannot be guessed, for a while."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from ntpseg.serving.images import StoredImage, StoredMask
from ntpseg.serving.options import ServerOptions
from ntpseg.serving.refusal import Refused


class ImageStore:
    """Images by their ids; the least recently used goes first when there are too many or they are too large.

    Args:
        options: limits and expiry.
        clock: seconds.
    """

    def __init__(self, options: ServerOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self.options, self.clock = options, clock
        self._images: OrderedDict[str, StoredImage] = OrderedDict()
        self._used: dict[str, float] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    def add(self, image: StoredImage) -> str:
        """Keep an image; its id.

        Raises:
            Refused: it alone is larger than all that may be kept.
        """
        if image.nbytes > self.options.max_stored_bytes:
            raise Refused(413, "the image must fit into the server's memory limit, got a larger one; cut it")
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._images[name], self._used[name] = image, self.clock()
            self._make_room()
        return name

    def get(self, name: str) -> StoredImage:
        """The image of this id, which counts as used.

        Raises:
            Refused: there is none, or no longer.
        """
        self.expire()
        with self._lock:
            if name not in self._images:
                raise Refused(404, "there is no such image, or no longer; drop it again")
            self._images.move_to_end(name)
            self._used[name] = self.clock()
            return self._images[name]

    def add_mask(self, image: StoredImage, mask: StoredMask) -> str:
        """Keep a mask of an image; its id."""
        with self._lock:
            name = image.add(mask, self.options.max_masks)
            self._make_room()
        return name

    def remove(self, name: str) -> None:
        """Forget an image, if it is there."""
        with self._lock:
            self._images.pop(name, None)
            self._used.pop(name, None)

    def expire(self) -> None:
        """Forget what nobody has asked for in a while."""
        with self._lock:
            oldest = self.clock() - self.options.expire_seconds
            for name in [name for name, used in self._used.items() if used <= oldest]:
                del self._images[name], self._used[name]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._images.clear()
            self._used.clear()

    def _make_room(self) -> None:
        def full() -> bool:
            size = sum(image.nbytes for image in self._images.values())
            return len(self._images) > self.options.max_images or size > self.options.max_stored_bytes

        while len(self._images) > 1 and full():
            name, _ = self._images.popitem(last=False)
            del self._used[name]
        # The one that is left may have outgrown the limit by its masks.
        for image in self._images.values():
            while len(image.masks) > 1 and full():
                image.masks.popitem(last=False)
