"""Loss heads in blocks of seven words."""

import pytest

from gradfold.head import loss, online_softmax, term
from tests.modules.heads import KEPT


@pytest.fixture(params=KEPT)
def small_blocks(monkeypatch, request):
    """Logits are computed again, or what follows from them is kept, for two blocks or all; a block is seven words."""
    monkeypatch.setattr(loss, "KEEP_BYTES", {"again": 0, "part": 2600, "kept": 2**20}[request.param])
    for module in (online_softmax, term):
        for name in ("TILE_BYTES", "HEAD_BYTES", "ROW_BYTES"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 100)
    monkeypatch.setattr(term, "MIN_HEAD_ROWS", 7)
