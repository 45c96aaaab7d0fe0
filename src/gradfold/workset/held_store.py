"""The store of one rotation: opened as the settings say, and held against every other user until it is closed."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

from gradfold._io import FolderLock
from gradfold.errors import FoldError

from .config import WorkingSet
from .disk import DiskStore
from .files import sole_user
from .host import HostStore
from .store import ResidentStore, Store

_HELD: weakref.WeakValueDictionary[int, HeldStore] = weakref.WeakValueDictionary()  # by id of a user's own Store


class HeldStore:
    """The store of a rotation, which no other one may use."""

    def __init__(self, config: WorkingSet, rank: int | None):
        self.config = config
        self._rank = rank
        self._lock: FolderLock | None = None
        self.store = self._open()

    def _open(self) -> Store:
        config = self.config
        if config.offload == "disk":
            assert config.folder is not None
            folder = Path(config.folder)
            if self._rank is not None:
                folder = folder / f"rank-{self._rank}"
            lock = self._hold(folder)
            try:
                store = DiskStore(folder, lock)
                store.prune()  # files of an earlier run are of no use: state_dict() holds the states themselves
            except FoldError:
                lock.close()
                raise
            return store
        if config.offload == "cpu":
            return HostStore()
        if config.offload is None:
            return ResidentStore()
        store = config.offload  # the user's
        if id(store) in _HELD:
            gc.collect()  # a fold that nobody refers to any more lives on until then
        if id(store) in _HELD:
            raise FoldError(
                f"WorkingSet(offload={store!r}): another fold keeps its states there, under the same names; give each "
                "fold a store of its own, or call remove() on the other one first"
            )
        if isinstance(store, DiskStore):
            self._hold(store.folder)
        _HELD[id(store)] = self
        return store

    def _hold(self, folder: Path) -> FolderLock:
        """Hold a folder as long as this lives, or until ``close()``."""
        self._lock = lock = sole_user(folder)
        weakref.finalize(self, lock.close)  # a fold may be collected without remove()
        return lock

    def close(self) -> None:
        """Release the folder, or the store, so that another fold can have it."""
        if self._lock is not None:
            self._lock.close()
        if _HELD.get(id(self.store)) is self:
            del _HELD[id(self.store)]
