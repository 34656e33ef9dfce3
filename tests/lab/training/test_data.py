import gzip
import hashlib
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from sparseopt_kernels.lab.training import fashion_mnist
from sparseopt_kernels.lab.training.data import Dataset, load_dataset, split_order, steps_per_epoch
from sparseopt_kernels.lab.training.errors import TrainingError

THREE_WAYS = ("apt install dataset-fashion-mnist", "downloaded", "--data-dir FOLDER")


def idx(*shape, fill=None):
    """An IDX file of unsigned bytes 0, 1, 2, ..."""
    count = 1
    for size in shape:
        count *= size
    values = bytes(i % 10 for i in range(count)) if fill is None else fill
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + values


@pytest.fixture
def files():
    """A tiny Fashion-MNIST: the content of the four files by name."""
    return {
        "train-images-idx3-ubyte.gz": gzip.compress(idx(20, 28, 28)),
        "train-labels-idx1-ubyte.gz": gzip.compress(idx(20)),
        "t10k-images-idx3-ubyte.gz": gzip.compress(idx(10, 28, 28)),
        "t10k-labels-idx1-ubyte.gz": gzip.compress(idx(10)),
    }


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No Debian package, an empty cache, and a network that refuses."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "MIRRORS", ("http://127.0.0.1:9/",))
    return tmp_path


def fill(folder, files, *, unpack=False):
    folder.mkdir(parents=True)
    for name, content in files.items():
        if unpack:
            name, content = name.removesuffix(".gz"), gzip.decompress(content)
        (folder / name).write_bytes(content)
    return folder


def test_digits_is_split_the_same_way_every_time_and_normalised():
    digits, again = load_dataset("digits"), load_dataset("digits")
    assert torch.equal(digits.train_images, again.train_images)
    assert digits.image_shape == (1, 8, 8)
    assert digits.num_classes == 10
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    assert digits.train_images.mean().abs() < 1e-5
    assert abs(digits.train_images.std() - 1) < 1e-5
    shares = digits.test_labels.bincount() / (digits.test_labels.bincount() + digits.train_labels.bincount())
    assert (shares - 1 / 3).abs().max() < 0.01


def test_batches_hold_every_example_once_and_differ_in_size_by_at_most_one():
    images, labels = torch.arange(65).view(65, 1, 1, 1), torch.arange(65)
    data = Dataset(images, labels, images, labels)
    made = list(data.train_batches(split_order(torch.randperm(65), 32), seed=0, epoch=0))
    assert len(made) == steps_per_epoch(65, 32) == 3
    assert {len(b) for _, b in made} == {21, 22}
    assert torch.equal(torch.cat([b for _, b in made]).sort().values, labels)
    assert all(torch.equal(i.flatten(), b) for i, b in made)


@pytest.mark.parametrize("unpack", [False, True], ids=["gz", "unpacked"])
def test_data_dir(nowhere, files, unpack):
    data = load_dataset("fashion-mnist", str(fill(nowhere / "mine", files, unpack=unpack)))
    assert data.train_images.shape == (20, 1, 28, 28)
    assert torch.equal(data.test_labels, torch.arange(10))
    assert data.train_images.dtype == torch.float32


def test_debian_folder_and_then_the_cache(nowhere, files):
    fill(nowhere / "debian", files)
    assert len(load_dataset("fashion-mnist").test_labels) == 10
    (nowhere / "debian" / "t10k-labels-idx1-ubyte.gz").unlink()
    fill(fashion_mnist.cache_folder(), files)
    assert len(load_dataset("fashion-mnist").test_labels) == 10


def test_found_nowhere_names_the_three_ways(nowhere):
    with pytest.raises(TrainingError) as error:
        load_dataset("fashion-mnist")
    assert all(way in str(error.value) for way in THREE_WAYS)
    assert "http://127.0.0.1:9/train-images" in str(error.value)


def test_data_dir_without_a_file_names_it_and_the_three_ways(nowhere, files):
    del files["t10k-labels-idx1-ubyte.gz"]
    with pytest.raises(TrainingError, match=r"does not have t10k-labels-idx1-ubyte\.gz") as error:
        load_dataset("fashion-mnist", str(fill(nowhere / "mine", files)))
    assert all(way in str(error.value) for way in THREE_WAYS)


@pytest.fixture
def server(nowhere, files, monkeypatch):
    """A mirror on this machine whose files have the right checksums; returns its folder."""
    folder = fill(nowhere / "mirror", files)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    refusing = fashion_mnist.MIRRORS[0]
    monkeypatch.setattr(fashion_mnist, "MIRRORS", (refusing, f"http://127.0.0.1:{httpd.server_port}/"))
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(fashion_mnist, "SHA256", sums)
    yield folder
    httpd.shutdown()
    httpd.server_close()


def test_download_from_the_second_mirror_is_kept(server, files):
    assert len(load_dataset("fashion-mnist").train_labels) == 20
    kept = {path.name: path.read_bytes() for path in fashion_mnist.cache_folder().iterdir()}
    assert kept == files
    for path in server.iterdir():
        path.unlink()
    assert len(load_dataset("fashion-mnist").train_labels) == 20  # not fetched again


def test_wrong_checksum_is_an_error_and_nothing_is_kept(server):
    (server / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(20, 28, 28), mtime=1))
    with pytest.raises(TrainingError, match="checksum is wrong"):
        load_dataset("fashion-mnist")
    assert not fashion_mnist.cache_folder().exists()


def test_the_published_checksums_are_of_the_files_that_debian_packages():
    """The package's files, with the gzip header that its build has stripped put back."""
    if not fashion_mnist.DEBIAN_FOLDER.exists():
        pytest.skip("the package dataset-fashion-mnist is not installed")
    for name, expected in fashion_mnist.SHA256.items():
        packed = (fashion_mnist.DEBIAN_FOLDER / name).read_bytes()
        written = 1504176627 if name.startswith("t10k") else 1504176606
        header = struct.pack("<4sIBB", b"\x1f\x8b\x08\x08", written, 0, 3)
        upstream = header + name.removesuffix(".gz").encode() + b"\0" + packed[10:]
        assert hashlib.sha256(upstream).hexdigest() == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00", "not an IDX file"),
        (b"\x89PNG\r\n", "not an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "not an IDX file"),
        (b"\x00\x00\x08\x03\x00\x00", "not an IDX file"),
        (idx(3, 4)[:-1], "damaged"),
        (idx(3, 4) + b"\x00", "damaged"),
        (idx(0), "empty"),
        (gzip.compress(idx(300))[:-20], "cannot read"),
        (gzip.compress(idx(300))[:-6] + b"123456", "cannot read"),
        (b"\x1f\x8b", "cannot read"),
    ],
    ids=["nothing", "short", "png", "floats", "header", "cut", "more", "empty", "cut-gz", "crc", "gz-header"],
)
def test_damaged_idx_names_the_file(tmp_path, content, message):
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=message) as error:
        fashion_mnist.read_idx(path)
    assert str(path) in str(error.value)


def test_files_that_do_not_fit_together(nowhere, files):
    files["train-labels-idx1-ubyte.gz"] = gzip.compress(idx(19))
    with pytest.raises(TrainingError, match="do not fit together"):
        load_dataset("fashion-mnist", str(fill(nowhere / "mine", files)))


def test_labels_beyond_the_training_set(nowhere, files):
    """A test label that no training example has is damage, not a class."""
    files["t10k-labels-idx1-ubyte.gz"] = gzip.compress(idx(10, fill=bytes([200] * 10)))
    with pytest.raises(TrainingError, match="label"):
        load_dataset("fashion-mnist", str(fill(nowhere / "mine", files)))
