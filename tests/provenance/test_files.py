"""Files are read within bounds and written as a whole, or not at all."""

import os

import pytest

from gradfold.provenance import ProvenanceError, canonical_bytes, files, read_document, write_document


def test_what_is_written_is_read_back(tmp_path, bundle):
    path = tmp_path / "b.json"
    write_document(path, bundle)
    assert read_document(path) == bundle
    assert path.read_bytes() == canonical_bytes(bundle) + b"\n"
    assert os.listdir(tmp_path) == ["b.json"]


@pytest.mark.parametrize("moment", ["fsync", "replace", "open"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "b.json"
    path.write_text("old")
    real = getattr(os, moment)

    def fail(*words, **more):
        if moment == "open" and ".writing-" not in str(words[0]):
            return real(*words, **more)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, moment, fail)
    with pytest.raises(ProvenanceError, match="cannot be written \\(No space left on device\\)"):
        write_document(path, {"a": 1})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["b.json"]


def test_an_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    path.write_text("old")

    def interrupt(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_document(path, {"a": 1})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["b.json"]


def test_what_has_no_canonical_form_is_not_written(tmp_path):
    path = tmp_path / "b.json"
    path.write_text("old")
    with pytest.raises(ProvenanceError):
        write_document(path, {"a": float("nan")})
    assert path.read_text() == "old"


def test_links_are_followed(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    write_document(link, {"a": 1})
    assert link.is_symlink() and read_document(link) == read_document(target) == {"a": 1}
    target.unlink()
    with pytest.raises(ProvenanceError, match="no such file"):
        read_document(link)


def test_only_regular_files_are_replaced(tmp_path, monkeypatch):
    """Renaming onto a device, which the superuser may, would take it away from everyone."""
    import socket

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # the address of a socket is short
        listening.bind("socket")
        for name in ("pipe", "link", "loop", "socket"):
            before = os.lstat(tmp_path / name)
            with pytest.raises(ProvenanceError, match="is no regular file; name a file"):
                write_document(tmp_path / name, {})
            assert os.lstat(tmp_path / name) == before
    assert sorted(os.listdir(tmp_path)) == ["link", "loop", "pipe", "socket"]


def test_a_secret_is_not_written_through_a_link(tmp_path):
    link = tmp_path / "key.pem"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ProvenanceError, match="exists already"):
        files.write_secret(link, b"x")
    assert not (tmp_path / "elsewhere").exists()


def test_places_that_cannot_be_written(tmp_path):
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "b.json", "there is no folder"),
        (f"{tmp_path}/a\0b", "null byte"),
    ):
        with pytest.raises(ProvenanceError, match=message):
            write_document(path, {})
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "none", "no such file"),
        (tmp_path / "pipe", "is no regular file"),
        ("/dev/zero", "is no regular file"),
        (tmp_path / "loop", "cannot be read"),
        (f"{tmp_path}/a\0b", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(ProvenanceError, match=message):
            read_document(path)


def test_sizes(tmp_path):
    path = tmp_path / "b.json"
    path.write_bytes(b"[1]")
    assert files.read_bytes(path, 3) == b"[1]"
    with pytest.raises(ProvenanceError, match="is larger than"):
        files.read_bytes(path, 2)
    with pytest.raises(ProvenanceError, match="holds no JSON object"):
        read_document(path)
