import hashlib
import io
import shutil
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from miniatures import cifar100_bytes, make_cifar100

from sparseopt_kernels.lab.training import cifar100, download
from sparseopt_kernels.lab.training.data import load_dataset
from sparseopt_kernels.lab.training.errors import TrainingError


def archive(**files: bytes) -> bytes:
    """The official archive, in small."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"cifar-100-binary/{name}.bin")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture
def packed(monkeypatch):
    """An archive whose checksum is the published one."""
    content = archive(train=cifar100_bytes(8), test=cifar100_bytes(2))
    monkeypatch.setattr(cifar100, "MD5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(cifar100, "ARCHIVE_BYTES", len(content))
    return content


@pytest.fixture
def server(tmp_path, packed, monkeypatch):
    """The only mirror, on this machine; returns its folder. The cache is empty."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    (folder / cifar100.ARCHIVE).write_bytes(packed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(cifar100, "MIRRORS", (f"http://127.0.0.1:{httpd.server_port}/",))
    yield folder
    httpd.shutdown()
    httpd.server_close()


def test_records_are_read_as_the_format_has_them(tmp_path):
    """Coarse label, fine label, then the red, green and blue planes, row by row."""
    make_cifar100(tmp_path)
    image = torch.arange(3 * 32 * 32).remainder(251).byte()
    (tmp_path / "test.bin").write_bytes(bytes([5, 99]) + bytes(image.tolist()))
    _, train_labels, test_images, test_labels = cifar100.load(tmp_path)
    assert train_labels.tolist() == [0, 1] * 16
    assert test_labels.tolist() == [99]
    assert torch.equal(test_images, image.view(1, 3, 32, 32))


def test_the_data_set_is_normalised_in_each_channel(tmp_path):
    data = load_dataset("cifar-100", str(make_cifar100(tmp_path)))
    assert data.image_shape == (3, 32, 32)
    assert data.train_images.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (data.train_images.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-4
    assert data.augment is not None
    pixels, *_ = cifar100.load(tmp_path)
    darkest = (pixels == 0).nonzero()[0].tolist()
    assert data.train_images[tuple(darkest)].item() == pytest.approx(data.augment.fill[darkest[1]], abs=1e-5)


def test_a_folder_may_have_the_archive_or_its_unpacked_folder(tmp_path, packed):
    (tmp_path / cifar100.ARCHIVE).write_bytes(packed)
    assert len(load_dataset("cifar-100", str(tmp_path)).train_labels) == 16
    make_cifar100(tmp_path / "cifar-100-binary", train=3)
    assert len(load_dataset("cifar-100", str(tmp_path)).train_labels) == 6


def test_a_download_is_kept_and_not_fetched_again(server, packed):
    assert len(load_dataset("cifar-100").train_labels) == 16
    assert (download.cache_folder("cifar-100") / cifar100.ARCHIVE).read_bytes() == packed
    (server / cifar100.ARCHIVE).unlink()
    assert len(load_dataset("cifar-100").test_labels) == 4


def test_a_download_with_a_wrong_checksum_is_not_kept(server, packed):
    (server / cifar100.ARCHIVE).write_bytes(packed[:-1] + bytes([packed[-1] ^ 1]))
    with pytest.raises(TrainingError, match=r"the checksum is wrong \(MD5 .* nothing was kept"):
        load_dataset("cifar-100")
    assert not download.cache_folder("cifar-100").exists()


def test_a_disk_that_is_too_small_is_named_before_the_download(server, monkeypatch):
    usage = shutil.disk_usage(server)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (server / cifar100.ARCHIVE).unlink()  # it is not asked for
    with pytest.raises(TrainingError, match="the disk has 0 MB left: make room, or set XDG_CACHE_HOME"):
        load_dataset("cifar-100")


def test_without_a_network_it_is_said_how_else(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cifar100, "MIRRORS", ("http://127.0.0.1:9/",))
    with pytest.raises(TrainingError, match=r"(?s)cannot download .*--data-dir FOLDER"):
        load_dataset("cifar-100")


def test_a_damaged_archive_is_named(tmp_path, packed):
    (tmp_path / cifar100.ARCHIVE).write_bytes(packed[:-20])
    with pytest.raises(TrainingError, match=r"the checksum of .* is wrong \(MD5 .*: remove it"):
        load_dataset("cifar-100", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, it must be one or more records of 3,074"),
        (cifar100_bytes(1)[:-1], "6,147 bytes"),
        (bytes([0, 100]) + bytes(3072), "a label 100, it must be below 100"),
    ],
    ids=["empty", "cut", "label"],
)
def test_damaged_records_name_the_file(tmp_path, content, message):
    make_cifar100(tmp_path)
    (tmp_path / "test.bin").write_bytes(content)
    with pytest.raises(TrainingError, match=rf"test\.bin is damaged: it has {message}"):
        load_dataset("cifar-100", str(tmp_path))
