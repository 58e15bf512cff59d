"""Tests of dcgan.py: run `pytest`; under a minute on two cores, no network, no GPU needed."""
import csv
import http.server
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T

import dcgan

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

def test_generator_turns_100_d_noise_into_3_x_64_x_64_images():
    images = dcgan.Generator()(torch.randn(2, 100))
    assert images.shape == (2, 3, 64, 64)
    assert images.abs().max() <= 1

def test_discriminator_turns_an_image_into_a_single_logit():
    logits = dcgan.Discriminator()(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert logits.shape == (2, 1)
    assert logits.isfinite().all()

def one_step(device, bf16):
    """Train one step: every parameter moves, and stays finite and float32."""
    nets = [net.to(device, memory_format=torch.channels_last) for net in networks(64, width=16)]
    parameters = [p for net in nets for p in net.parameters()]
    before = [p.detach().clone() for p in parameters]
    dtypes = []
    nets[0][1].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    real = dcgan.to_batch(dcgan.toy_faces(8), torch.arange(8), device)
    losses = dcgan.train_step(*nets, *adam(nets), real, bf16=bf16)
    assert dtypes == [torch.bfloat16 if bf16 else torch.float32]
    assert losses.device.type == device
    assert losses.isfinite().all()
    for p, old in zip(parameters, before):
        assert p.dtype == torch.float32
        assert p.isfinite().all()
        assert not torch.equal(p, old)

@needs_cuda
@pytest.mark.parametrize("bf16", [False, True])
def test_one_training_step_on_cuda(bf16):
    one_step("cuda", bf16)

@pytest.mark.parametrize("bf16", [False, True])
def test_one_training_step_on_the_cpu(bf16):
    one_step("cpu", bf16)

# ---- What the tests share ------------------------------------------------------------------------
SMALL = "--image-size 32 --width 8 --batch-size 8 --log-interval 2 --device cpu".split()
GRIDS = {"samples/epoch_001.png", "samples/epoch_002.png", "samples/epoch_003.png"}
FILES = {"real.png", "samples.gif", "losses.png", "log.csv", "samples/epoch_001.png"}

@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Each test works in a folder of its own, and its subprocesses can import dcgan."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(dcgan.__file__).parent))

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 40 pictures: 5 steps an epoch at batch 8."""
    folder = tmp_path_factory.mktemp("data") / "faces"
    folder.mkdir()
    for i, image in enumerate(dcgan.toy_faces(40, 32)):
        T.ToPILImage()(image).save(folder / f"{i:03d}.png")
    return str(folder)

@pytest.fixture(scope="session")
def finished(pictures, tmp_path_factory):
    """The folder of a run of three epochs without a break."""
    out = tmp_path_factory.mktemp("run") / "out"
    dcgan.main(["--data", pictures, "--epochs", "3", "--out", str(out), *SMALL])
    return out

def networks(size=32, width=8, seed=0):
    torch.manual_seed(seed)
    G = dcgan.Generator(image_size=size, width=width)
    D = dcgan.Discriminator(image_size=size, width=width)
    return G, D

def sgd(nets, rate_g, rate_d):
    """With SGD, an update is a gradient."""
    rates = zip(nets, (rate_g, rate_d))
    return [torch.optim.SGD(net.parameters(), rate) for net, rate in rates]

def adam(nets):
    return [torch.optim.Adam(net.parameters(), 1e-3, (0.5, 0.999)) for net in nets]

def error_of(capsys, *argv):
    """The one line on standard error with which a command fails, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        dcgan.main([str(word) for word in argv])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("dcgan.py: error: ")
    return lines[0]

def jpeg(image=None, color="red"):
    """The bytes of a JPEG of CelebA's size, or of `image`."""
    data = BytesIO()
    image = image or Image.new("RGB", (178, 218), color)
    image.save(data, "JPEG", quality=90)
    return data.getvalue()

def checkpoint(out, name="checkpoint.pt"):
    return torch.load(Path(out, name), weights_only=True)

def contents(out):
    """Every file below a folder: bytes by name, of a .pt what it holds."""
    files = {}
    for file in Path(out).rglob("*.*"):
        name = str(file.relative_to(out))
        files[name] = checkpoint(out, name) if file.suffix == ".pt" else file.read_bytes()
    return files

def same(a, b):
    """Bit for bit, whatever is nested in whatever."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

# ---- What the networks promise -------------------------------------------------------------------

@pytest.mark.parametrize("size, parameters_of_G, parameters_of_D", [
    (32, 1_068_931, 663_361),
    (64, 3_576_707, 2_765_633),
    (128, 7_772_035, 6_960_961),
    (256, 11_967_363, 11_156_289),
])
def test_every_image_size(size, parameters_of_G, parameters_of_D):
    G, D = networks(size, width=64)
    images = G(torch.randn(2, 100))
    assert images.shape == (2, 3, size, size)
    assert D(images).shape == (2, 1)
    assert sum(p.numel() for p in G.parameters()) == parameters_of_G
    assert sum(p.numel() for p in D.parameters()) == parameters_of_D

@pytest.mark.parametrize("size", [4, 65])
@pytest.mark.parametrize("network", [dcgan.Generator, dcgan.Discriminator])
def test_another_image_size_is_refused(network, size):
    with pytest.raises(ValueError, match=f"{size}.*32, 64, 128, 256"):
        network(image_size=size)

def test_layers_are_the_papers():
    G, D = networks(64, width=16)
    layers = [layer for net in (G, D) for layer in net.modules() if not list(layer.children())]
    convolutions = [layer for layer in layers if hasattr(layer, "kernel_size")]
    norms = [layer for layer in layers if isinstance(layer, torch.nn.BatchNorm2d)]
    assert len(convolutions) == 10
    assert all(layer.kernel_size == (4, 4) for layer in convolutions)
    assert all(abs(layer.weight.std() - 0.02) < 0.002 for layer in convolutions)
    assert len(norms) == 7
    assert all(0.9 < layer.weight.mean() < 1.1 for layer in norms)
    assert all(0.01 < layer.weight.std() < 0.03 for layer in norms)
    assert G(torch.randn(4, 100) * 50).abs().max() <= 1
    others = {type(layer).__name__ for layer in layers} - {"Conv2d", "ConvTranspose2d"}
    assert others == {"Unflatten", "BatchNorm2d", "LeakyReLU", "Tanh", "Flatten"}
    assert {getattr(layer, "negative_slope", 0.2) for layer in layers} == {0.2}
    relus = [m for m in dcgan.Generator(relu=True).modules() if isinstance(m, torch.nn.ReLU)]
    assert len(relus) == 4

# ---- The step ------------------------------------------------------------------------------------

@pytest.mark.parametrize("fresh_noise", [False, True])
@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.1, 0.0), (0.0, 0.1)])
def test_step_is_the_one_written_out_here(fresh_noise, rates):
    """D first, then G against the new D; neither moves in the other's half."""
    real = dcgan.toy_faces(8, 32) / 127.5 - 1
    rng = torch.Generator().manual_seed(1)
    nets, (G, D) = networks(), networks()
    losses = dcgan.train_step(*nets, *sgd(nets, *rates), real, rng=rng, fresh_noise=fresh_noise)

    rng.manual_seed(1)
    torch.rand(2, 8, 1, generator=rng)      # which labels to flip: none
    optimizer_g, optimizer_d = sgd((G, D), *rates)
    fake = G(torch.randn(8, 100, generator=rng))
    real_logits, fake_logits = D(real), D(fake.detach())
    loss_d = (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2
    loss_d.backward()
    gradients_of_D = [p.grad.clone() for p in D.parameters()]
    optimizer_d.step()
    if fresh_noise:
        fake = G(torch.randn(8, 100, generator=rng))
    loss_g = F.softplus(-D(fake)).mean()
    loss_g.backward()
    optimizer_g.step()

    scores = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
    torch.testing.assert_close(losses, torch.stack([loss_d, loss_g, *scores]).detach())
    for net, expected in zip(nets, (G, D)):
        torch.testing.assert_close(list(net.parameters()), list(expected.parameters()))
    torch.testing.assert_close([p.grad for p in nets[1].parameters()], gradients_of_D)
    assert not losses.requires_grad
    assert all(p.requires_grad for p in nets[1].parameters())

@pytest.mark.parametrize("tricks, real, fake", [
    ({}, 1, 0),
    ({"label_smoothing": 0.1}, 0.9, 0),
    ({"flip_labels": 1.0}, 0, 1),
    ({"flip_labels": 0.25}, 0.75, 0.25),
    ({"flip_labels": 0.2, "label_smoothing": 0.5}, 0.4, 0.1),
])
def test_labels_of_each_trick(tricks, real, fake, monkeypatch):
    original, means, nets = F.binary_cross_entropy_with_logits, [], networks(width=2)

    def spy(logits, labels):
        means.append(labels.mean().item())
        return original(logits, labels)

    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", spy)
    dcgan.train_step(*nets, *sgd(nets, 0, 0), torch.zeros(3000, 3, 32, 32), **tricks)
    assert means == pytest.approx([real, fake, 1], abs=0.04)

def test_batches_and_their_mirror_images():
    images = torch.arange(4, dtype=torch.uint8).expand(200, 3, 4, 4)
    plain = dcgan.to_batch(images, torch.arange(200))
    flipped = dcgan.to_batch(images, torch.arange(200), flip=True)
    mirrored = flipped[:, 0, 0, 0] != plain[:, 0, 0, 0]
    assert 60 < mirrored.sum() < 140
    assert torch.equal(flipped[mirrored], plain[mirrored].flip(3))
    torch.testing.assert_close(plain[0, 0, 0], torch.arange(4) / 127.5 - 1)

def test_batch_is_where_the_pictures_are():
    images = torch.empty(4, 3, 8, 8, dtype=torch.uint8, device="meta")
    assert dcgan.to_batch(images, torch.arange(2, device="meta")).device.type == "meta"

def test_every_epoch_shuffles_all_pictures_anew_and_can_start_anywhere():
    steps = dict(dcgan.shuffled(10, 4, 0, 6, seed=3))
    assert list(steps) == [1, 2, 3, 4, 5, 6]
    assert all(len(index) == 4 for index in steps.values())
    first, second = torch.cat([steps[1], steps[2]]), torch.cat([steps[3], steps[4]])
    assert len(first.unique()) == 8
    assert not torch.equal(first, second)
    for step, index in dcgan.shuffled(10, 4, 3, 6, seed=3):
        assert torch.equal(index, steps[step])

def test_a_small_network_learns_toy_faces():
    real, (G, D) = dcgan.toy_faces(1024, 32), networks(width=16)
    optimizers, latents = adam((G, D)), torch.randn(512, 100)
    before, _ = dcgan.compare(dcgan.sample(G.eval(), latents), real)
    for _ in range(120):
        batch = dcgan.to_batch(real, torch.randint(1024, (32,)))
        dcgan.train_step(G.train(), D, *optimizers, batch)
    after, diversity = dcgan.compare(dcgan.sample(G.eval(), latents), real)
    assert after < 0.75 * before
    assert diversity > 0.6

def test_frechet_distance_of_distributions_for_which_it_is_known():
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (2048, 3, 16, 16)).byte()
    assert dcgan.compare(noise, noise)[0] == pytest.approx(0, abs=1e-6)
    narrow = noise // 2 + 64        # half the deviation, which is (1 / 3) ** 0.5
    assert dcgan.compare(narrow, noise)[0] == pytest.approx(128 / 3 / 4, rel=0.1)
    black, white = torch.zeros_like(noise), torch.full_like(noise, 255)
    assert dcgan.compare(black, white)[0] == pytest.approx(128 * 2**2, rel=0.2)

def test_measures_know_the_real_from_the_collapsed():
    real = dcgan.toy_faces(1024, 32)
    near, wide = dcgan.compare(real[:512], real[512:])
    far, _ = dcgan.compare(255 - real[:512], real[512:])
    _, collapsed = dcgan.compare(real[:1].expand(512, -1, -1, -1), real)
    assert near < far / 4
    assert 0.9 < wide < 1.1
    assert collapsed < 0.01

# ---- Data ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, crop, expected_crop", [
    ((178, 218), None, 160),
    ((178, 218), 99, 99),
    ((181, 96), None, 96),
    ((75, 120), 200, 75),
])
def test_preparation_is_the_lectures_to_the_last_bit(size, crop, expected_crop):
    noise = T.ToPILImage()(torch.randint(0, 256, (3, 97, 83), dtype=torch.uint8))
    data = jpeg(noise.resize(size))
    lecture = T.Compose([T.CenterCrop(expected_crop), T.Resize(64)])
    assert dcgan.decode(data, 64, crop).tobytes() == lecture(Image.open(BytesIO(data))).tobytes()

def write_odd_pictures(folder):
    """Write good pictures, all red or mid-grey, and bad ones; return how many are good."""
    folder.mkdir(parents=True)
    red = Image.new("RGB", (40, 40), "red")
    grey16 = Image.fromarray(torch.full((40, 40), 32768).numpy().astype("uint16"))
    odd = {
        "grey.png": Image.new("L", (40, 50), 128),
        "grey16.png": grey16,
        "grey16.tif": grey16,
        "alpha.png": Image.new("RGBA", (40, 40), (255, 0, 0, 9)),
        "palette.png": red.convert("P"),
        "cmyk.jpg": red.convert("CMYK"),
        "dot.bmp": red.resize((1, 1)),
        "LONG.JPG": red.resize((300, 20)),
    }
    for name, image in odd.items():
        image.save(folder / name)
    (folder / "cut.jpg").write_bytes(jpeg()[:500])
    for name in ("empty.png", ".hidden.png", "._grey.png", "notes.csv"):
        (folder / name).write_bytes(b"")
    return len(odd)

def test_odd_pictures_become_rgb_or_are_named(capsys):
    good = write_odd_pictures(Path("odd/a/b"))
    images, err = dcgan.load_images("odd", 32), capsys.readouterr().err
    assert images.shape == (good, 3, 32, 32)
    assert images.dtype == torch.uint8
    for image in images:
        red = (image[0] > 250).all() and (image[1:] < 6).all()
        assert red or (image == 128).all()
    assert len(err.splitlines()) == 2
    assert "skipped odd/a/b/cut.jpg: " in err
    assert "skipped odd/a/b/empty.png: cannot identify image file\n" in err

def test_turned_pictures_become_upright():
    turned = Image.new("RGB", (40, 40), "black")
    turned.paste("white", (0, 0, 40, 20))
    turned.getexif()[0x0112] = 6        # to be turned clockwise
    data = BytesIO()
    turned.save(data, "JPEG", exif=turned.getexif())
    upright = T.PILToTensor()(dcgan.decode(data.getvalue(), 32))
    assert (upright[:, :, 18:] > 200).all()
    assert (upright[:, :, :14] < 50).all()

@pytest.mark.parametrize("place, count, taken", [
    ("data/celeba/img_align_celeba", 10, 6),
    ("data/celeba/x/img_align_celeba", 10, 6),
    ("data/celeba/img_align_celeba.zip", 10, 6),
    ("elsewhere", 10, 6),
    ("elsewhere", 9, 9),                # an incomplete one means all of it
    ("elsewhere/archive.zip", 10, 6),
])
def test_celeba_is_found_and_its_training_part_taken(monkeypatch, place, count, taken):
    monkeypatch.setattr(dcgan, "CELEBA_PICTURES", 10)
    monkeypatch.setattr(dcgan, "CELEBA_TRAIN", 6)
    archived = place.endswith(".zip")
    folder = Path("unpacked/img_align_celeba" if archived else place)
    (folder / "__MACOSX").mkdir(parents=True)
    for i in range(1, count + 1):
        (folder / f"{i:02d}.jpg").write_bytes(jpeg(color=(20 * i, 0, 0)))
        (folder / "__MACOSX" / f"._{i:02d}.jpg").write_bytes(b"")
    if archived:
        shutil.make_archive(place.removesuffix(".zip"), "zip", "unpacked")
    images = dcgan.load_images("data/celeba" if place.startswith("data") else place)
    assert len(images) == taken
    assert images[5, 0].float().mean().item() == pytest.approx(120, abs=3)

def test_archive_whose_names_begin_with_its_own_folder():
    with dcgan.ZipFile("dot.zip", "w") as archive:
        for name in ("./b.png", "./a/b.png", "./.hidden/b.png", "./a/.hidden.png"):
            archive.writestr(name, b"")
    assert dcgan.list_pictures("dot.zip") == ["./a/b.png", "./b.png"]

def test_each_real_folder_is_visited_once(pictures):
    folder = shutil.copytree(pictures, "a/faces")
    for link in ("a/self", "a/faces/up", "a/faces/again"):
        os.symlink(Path("a").resolve(), link)
    os.symlink(Path(folder).resolve(), "linked")
    assert len(dcgan.load_images("a", 32)) == 40
    assert len(dcgan.load_images("linked", 32)) == 40

def test_more_pictures_than_are_decoded_at_once():
    with dcgan.ZipFile("many.zip", "w") as archive:
        for i in range(1001):
            archive.writestr(f"{i:04d}.jpg", jpeg(Image.new("L", (8, 8), i // 4)))
    shades = dcgan.load_images("many.zip", 32).float().mean((1, 2, 3))
    torch.testing.assert_close(shades, torch.arange(1001).float() // 4, atol=3, rtol=0)

class Cache:
    """A folder of three pictures, and what loading it prints."""

    def __init__(self, capsys):
        self.capsys, self.file = capsys, Path("faces.dcgan")
        Path("faces").mkdir()
        self.write(a="red", b="lime", c="blue")

    def write(self, **colors):
        for name, color in colors.items():
            Path(f"faces/{name}.jpg").write_bytes(jpeg(color=color))

    def is_used(self, *args, count=3):
        """Load; whether the pictures came from the cache: then no picture is decoded."""
        decode, calls = dcgan.decode, []
        dcgan.decode = lambda *args: calls.append(args) or decode(*args)
        try:
            assert len(dcgan.load_images("faces", *args)) == count
        finally:
            dcgan.decode = decode
        return not calls

@pytest.fixture
def cache(capsys):
    return Cache(capsys)

def test_cache_is_used_while_nothing_changes(cache):
    assert not cache.is_used(32)
    assert cache.is_used(32)
    assert cache.file.stat().st_size == 3 * 32 * 32 * 3 + 32
    assert {path.name for path in Path().iterdir()} == {"faces", "faces.dcgan"}

def test_cache_of_other_settings_or_pictures_is_thrown_away(cache):
    assert not cache.is_used(32)
    assert not cache.is_used(64)
    assert not cache.is_used(64, 100)
    assert cache.is_used(64, 100)
    cache.write(a="yellow")
    assert not cache.is_used(64, 100)
    cache.write(d="red")
    assert not cache.is_used(64, 100, count=4)
    assert cache.is_used(64, 100, count=4)

@pytest.mark.parametrize("damage", [
    lambda content: content[:1000],
    lambda content: content[:-32] + b"x" * 32,
    lambda content: b"",
])
def test_damaged_cache_is_thrown_away(cache, damage):
    assert not cache.is_used(32)
    cache.file.write_bytes(damage(cache.file.read_bytes()))
    assert not cache.is_used(32)
    assert cache.is_used(32)

def test_cache_sees_through_symbolic_links(cache):
    shutil.move("faces/a.jpg", "one.jpg")
    os.symlink("../one.jpg", "faces/a.jpg")
    assert not cache.is_used(32)
    assert cache.is_used(32)
    Path("one.jpg").write_bytes(jpeg(color="yellow"))
    assert not cache.is_used(32)
    os.symlink("nowhere", "faces/dangling.jpg")
    assert not cache.is_used(32)

def test_cache_goes_to_the_temporary_folder_where_nothing_can_be_written(cache, monkeypatch):
    monkeypatch.setattr(dcgan.os, "access", lambda path, mode: False)
    monkeypatch.setattr(dcgan.tempfile, "gettempdir", lambda: "elsewhere")
    Path("elsewhere").mkdir()
    assert not cache.is_used(32)
    assert str(next(Path("elsewhere").glob("*.dcgan"))) in cache.capsys.readouterr().out
    assert cache.is_used(32)
    assert not cache.file.exists()
    monkeypatch.setenv("HOME", "/home/other")       # who may not write into the first one's file
    assert not cache.is_used(32)

def test_cache_that_cannot_be_mapped_is_made_anew_but_once(cache, monkeypatch):
    assert not cache.is_used(32)
    from_file, calls = torch.from_file, []

    def refused_once(*args, **options):
        calls.append(None)
        if len(calls) == 1:
            raise RuntimeError("unable to open file in read-write mode: Permission denied (13)")
        return from_file(*args, **options)

    monkeypatch.setattr(torch, "from_file", refused_once)
    assert not cache.is_used(32)
    assert cache.is_used(32)
    monkeypatch.setattr(dcgan, "map_cache", lambda *args: None)
    assert "cannot be mapped" in error_of(cache.capsys, "--data", "faces", *SMALL)

def test_full_disk_is_told_with_the_bytes_needed(cache, monkeypatch):
    monkeypatch.setattr(dcgan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    assert f"{3 * 32 * 32 * 3:,} bytes" in error_of(cache.capsys, "--data", "faces", *SMALL)
    assert {path.name for path in Path().iterdir()} == {"faces"}

def test_writing_that_fails_leaves_the_old_file_and_nothing_else():
    path = Path("file")
    path.write_text("old")
    with pytest.raises(dcgan.UserError, match="disk full"):
        with dcgan.atomic_write(path.resolve()) as partial:
            partial.write_text("half")
            raise OSError("disk full")
    assert path.read_text() == "old"
    assert os.listdir() == ["file"]

def test_what_a_killed_process_left_is_removed_but_nothing_else():
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = dcgan.platform.node()
    others = [f".dcgan-{os.getppid()}-x@{host}", f".dcgan-{dead.pid}-x@another"]
    for folder in (*others, f".dcgan-{dead.pid}-x@{host}"):
        Path(folder).mkdir()
    with dcgan.atomic_write(Path("file").resolve()) as partial:
        partial.write_text("new")
    assert set(os.listdir()) == {*others, "file"}

class Archives(http.server.BaseHTTPRequestHandler):
    """A server of one archive: the path says what is wrong with the answer."""
    right = None

    def do_GET(self):
        if self.path == "/silent":
            time.sleep(20)
            return
        body = {"/page": b"<!DOCTYPE html>", "/wrong": jpeg()}.get(self.path, self.right)
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if self.path == "/half" else body)

    def log_message(self, *args):
        pass

@pytest.fixture
def server(monkeypatch):
    """Its address; what it has is taken for CelebA, and its silence is noticed in a second."""
    data = BytesIO()
    with dcgan.ZipFile(data, "w") as archive:
        archive.writestr("img_align_celeba/000001.jpg", jpeg())
    Archives.right = data.getvalue()
    monkeypatch.setattr(dcgan, "CELEBA_BYTES", len(Archives.right))
    monkeypatch.setattr(dcgan, "CELEBA_MD5", dcgan.hashlib.md5(Archives.right).hexdigest())
    monkeypatch.setattr(dcgan, "SILENCE", 1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Archives) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        httpd.block_on_close = False

def test_celebas_sources():
    assert dcgan.CELEBA_MD5 == "00d2c5bc6d35e252742224ab0c1e8fcb"
    assert dcgan.CELEBA_ZIP == "img_align_celeba.zip"
    drive, *others = dcgan.CELEBA_URLS
    assert drive.startswith("https://drive.google.com/")
    assert len(others) == 2
    assert all(url.endswith("/img_align_celeba.zip") for url in others)

BAD_SOURCES = ["missing", "page", "wrong", "half", "silent"]

def test_download_goes_on_to_the_source_that_has_it(server, monkeypatch, capsys):
    urls = [f"{server}/{kind}" for kind in (*BAD_SOURCES, "right", "never asked")]
    monkeypatch.setattr(dcgan, "CELEBA_URLS", urls)
    start = time.time()
    assert dcgan.load_images("data/celeba").shape == (1, 3, 64, 64)
    assert time.time() - start < 15
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no CelebA")]
    assert len(lines) == len(BAD_SOURCES)
    for line, url in zip(lines, urls):
        assert line.startswith(f"no CelebA from {url}: ")
    assert set(os.listdir("data/celeba")) == {dcgan.CELEBA_ZIP, f"{dcgan.CELEBA_ZIP}.dcgan"}
    assert socket.getdefaulttimeout() is None

def test_download_that_fails_everywhere_says_why_and_what_to_do(server, monkeypatch):
    monkeypatch.setattr(dcgan, "CELEBA_URLS", [f"{server}/missing", f"{server}/page"])
    with pytest.raises(dcgan.UserError) as error:
        dcgan.load_images("data/celeba")
    for words in ("404", "MD5", "zip into data/celeba", "--data toy or --data FOLDER"):
        assert words in str(error.value)
    assert os.listdir("data/celeba") == []

@pytest.mark.parametrize("state, told", [
    ("well", ""),
    ("offline", "Network is unreachable"),
    ("not installed", "gdown"),
])
def test_google_drive(state, told, server, monkeypatch, capsys):
    class Drive:
        def download(url, output, timeout):
            assert url == f"https://drive.google.com/uc?id={dcgan.CelebA.file_list[0][0]}"
            assert timeout == dcgan.SILENCE
            if state == "offline":
                raise ConnectionError("Network is unreachable")
            Path(output).write_bytes(Archives.right)

    monkeypatch.setitem(sys.modules, "gdown", None if state == "not installed" else Drive)
    monkeypatch.setattr(dcgan, "CELEBA_URLS", (dcgan.CELEBA_URLS[0], f"{server}/right"))
    assert len(dcgan.load_images("data/celeba")) == 1
    err = capsys.readouterr().err
    assert told in err
    assert ("no CelebA from" in err) == bool(told)

def test_an_archive_of_the_users_own_is_kept(capsys):
    archive = Path("data/celeba/img_align_celeba.zip")
    archive.parent.mkdir(parents=True)
    archive.write_text(" <html>")
    assert "web page" in error_of(capsys, *SMALL)
    assert archive.read_text() == " <html>"

def test_no_room_is_said_before_anything_is_fetched(monkeypatch, capsys):
    monkeypatch.setattr(dcgan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    monkeypatch.setattr(dcgan, "fetch", None)
    assert "1,443,490,838 bytes" in error_of(capsys, *SMALL)

# ---- The run -------------------------------------------------------------------------------------

def run(*argv):
    dcgan.main([str(word) for word in argv])

def record(monkeypatch, name):
    """The list to which each call of this function of dcgan's adds its arguments and options."""
    original, calls = getattr(dcgan, name), []

    def recorded(*args, **options):
        calls.append((args, options))
        return original(*args, **options)

    monkeypatch.setattr(dcgan, name, recorded)
    return calls

def do_at_step(monkeypatch, number, action):
    """Call `action` in the middle of a run, before the step of that number, counted from 1."""
    step, calls = dcgan.train_step, []

    def train_step(*args, **options):
        calls.append(None)
        if len(calls) == number:
            action()
        return step(*args, **options)

    monkeypatch.setattr(dcgan, "train_step", train_step)

def stop_at_step(number, monkeypatch, pictures, signum=signal.SIGINT, epochs=2):
    """A run of two epochs, interrupted in its second; the exit status."""
    with monkeypatch.context() as patch:
        do_at_step(patch, number, lambda: signal.raise_signal(signum))
        with pytest.raises(SystemExit) as stop:
            run("--data", pictures, "--epochs", epochs, *SMALL)
    return stop.value.code

def test_files_of_a_run(finished, pictures):
    assert contents(finished).keys() == FILES | GRIDS | {"checkpoint.pt", "best.pt"}
    run("--data", pictures, "--dry-run", *SMALL)
    assert contents("out").keys() == FILES
    assert Image.open(finished / "samples.gif").n_frames == 3

def test_flags_reach_what_they_are_for(finished, pictures, monkeypatch):
    names = "decode", "to_batch", "train_step"
    decoded, batches, steps = [record(monkeypatch, name) for name in names]
    run("--data", pictures, *SMALL, "--dry-run", *"""--crop 32 --flip --seed 7 --activation relu
        --lr-g 0.1 --lr-d 0.2 --beta1 0.3 --precision bf16
        --fresh-noise --label-smoothing 0.4 --flip-labels 0.5""".split())
    assert {args[1:] for args, _ in decoded} == {(32, 32)}
    [(args, _)] = batches
    assert torch.equal(args[1], next(dcgan.shuffled(40, 8, 0, 1, seed=7))[1])
    assert args[3]      # flip
    [((G, D, optimizer_g, optimizer_d, _), options)] = steps
    assert isinstance(G[1][2], torch.nn.ReLU)
    for optimizer, rate in ((optimizer_g, 0.1), (optimizer_d, 0.2)):
        [group] = optimizer.param_groups
        assert isinstance(optimizer, torch.optim.Adam)
        assert (group["lr"], group["betas"]) == (rate, (0.3, 0.999))
    assert options.pop("rng").initial_seed() == 7
    assert options == {"bf16": True, "fresh_noise": True, "label_smoothing": 0.4,
                       "flip_labels": 0.5}
    assert Path("out/real.png").read_bytes() != (finished / "real.png").read_bytes()

    run("--data", "toy", *SMALL, "--dry-run", "--optimizer-d", "sgd", "--lr-g", 0, "--lr-d", 0,
        "--seed", 7, "--out", "sgd")
    G, D, _, optimizer_d, _ = steps[1][0]
    assert isinstance(optimizer_d, torch.optim.SGD)
    for net, expected in zip((G, D), networks(seed=7)):
        assert same(list(net.parameters()), list(expected.parameters()))

def test_log_has_a_row_per_interval_and_the_measures_per_epoch(finished):
    with open(finished / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == "2 4 5 6 8 10 12 14 15".split()
    assert [row["step"] for row in rows if row["frechet"]] == ["5", "10", "15"]
    assert [row["epoch"] for row in rows] == list("111222333")
    history = checkpoint(finished)["history"]
    assert history.shape == (15, 4)
    losses = [float(rows[-1][name]) for name in ("loss_d", "loss_g", "D(x)", "D(G(z))")]
    assert losses == pytest.approx(history[14].tolist(), abs=1e-4)

@pytest.mark.parametrize("steps", [2, 100, 3000])
def test_loss_plot_shows_both_means_and_every_step(steps):
    losses = torch.tensor([0.5, 2.0]) + 0.3 * torch.rand(steps, 2)
    dcgan.plot_losses(losses, 10, Path("losses.png"))
    red, _, blue = T.PILToTensor()(Image.open("losses.png")).int()[:, 60:420]
    middles = []        # of the discriminator's mean, then of the generator's
    for strong, weak in ((blue, red), (red, blue)):
        bold = strong - weak > 60
        assert bold.any(dim=0).sum() > 600          # from left to right
        middles.append(bold.nonzero()[:, 0].float().mean())
    assert middles[0] > middles[1] + 100            # a loss of 0.5 is lower than one of 2
    lightly = (red - blue > 20) & (red - blue < 60)
    assert (lightly.sum() > 5000) == (steps == 3000)

def test_a_folder_with_a_run_is_not_trained_over(finished, pictures, capsys):
    before = contents(finished)
    assert "--resume" in error_of(capsys, "--data", pictures, "--out", finished, *SMALL)
    for flag in ("--width", "--batch-size"):
        line = error_of(capsys, "--resume", "--out", finished, "--device", "cpu", flag, 4)
        assert f"has {flag} 8" in line
    assert same(contents(finished), before)
    Path("best").mkdir()
    shutil.copy(finished / "best.pt", "best")
    assert "--out best holds a run" in error_of(capsys, "--data", pictures, "--out", "best", *SMALL)

@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_and_resume(signum, status, finished, pictures, monkeypatch):
    assert stop_at_step(7, monkeypatch, pictures, signum) == status
    assert checkpoint("out")["step"] == 7
    run("--resume", "--epochs", 3, "--device", "cpu")
    assert same(contents("out"), contents(finished))        # bit for bit

def test_interrupt_that_ends_the_reader_of_the_output_too(pictures, monkeypatch):
    """As Ctrl-C does after `dcgan.py | tee log`."""
    class Gone:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    assert stop_at_step(6, monkeypatch, pictures) == 130        # a step with a row
    assert checkpoint("out")["step"] == 6

def test_kill_and_resume(finished, pictures):
    code = """if True:
        import dcgan, os, sys
        step, calls = dcgan.train_step, []
        def train_step(*args, **options):
            calls.append(None)
            return os.kill(os.getpid(), 9) if len(calls) == 7 else step(*args, **options)
        dcgan.train_step = train_step
        dcgan.main(sys.argv[1:])"""
    argv = [sys.executable, "-c", code, "--data", pictures, "--epochs", "2", *SMALL]
    assert subprocess.run(argv).returncode == -9
    assert checkpoint("out")["step"] == 5
    run("--resume", "--epochs", 3, "--device", "cpu")
    assert same(contents("out"), contents(finished))

def test_second_interrupt_ends_at_once_and_handlers_are_put_back(pictures, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    former = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    do_at_step(monkeypatch, 7, twice)
    with pytest.raises(SystemExit) as stop:
        run("--data", pictures, "--epochs", 2, *SMALL)
    assert stop.value.code == 130
    assert checkpoint("out")["step"] == 5
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == former

def test_signal_while_decoding_leaves_nothing(cache, monkeypatch):
    decode, pending = dcgan.decode, [signal.SIGTERM]

    def interrupted(*args):
        if pending:
            os.kill(os.getpid(), pending.pop())
        return decode(*args)

    monkeypatch.setattr(dcgan, "decode", interrupted)
    with pytest.raises(SystemExit) as stop:
        run("--data", "faces", *SMALL)
    assert stop.value.code == 143
    assert os.listdir() == ["faces"]

def test_training_outside_the_main_thread(pictures):
    argv = ["--data", pictures, "--dry-run", *SMALL]
    thread = threading.Thread(target=dcgan.main, args=(argv,))
    thread.start()
    thread.join()
    assert Path("out/samples.gif").exists()

def test_resume_with_the_pictures_moved(finished, pictures, monkeypatch, capsys):
    assert stop_at_step(7, monkeypatch, pictures) == 130
    shutil.copytree(pictures, "moved")
    run("--resume", "--epochs", 3, "--data", "moved", "--device", "cpu")
    assert "warning" not in capsys.readouterr().out
    assert same(checkpoint("out")["G"], checkpoint(finished)["G"])

def test_resume_with_other_pictures_warns_and_with_another_number_ends(pictures, monkeypatch,
                                                                       capsys):
    folder = shutil.copytree(pictures, "faces")
    assert stop_at_step(7, monkeypatch, folder) == 130
    shutil.copy("faces/001.png", "faces/000.png")
    run("--resume", "--device", "cpu")
    assert "warning: these are not the pictures" in capsys.readouterr().out
    shutil.copy("faces/001.png", "faces/one_more.png")
    line = error_of(capsys, "--resume", "--device", "cpu")
    assert "41 readable pictures, but the run has 40" in line

def test_resume_on_another_kind_of_device(pictures, monkeypatch, capsys):
    assert stop_at_step(7, monkeypatch, pictures) == 130
    content = checkpoint("out")
    assert "device" not in content["settings"]
    content["rng"] = torch.zeros(16, dtype=torch.uint8)         # as long as a GPU's
    torch.save(content, "out/checkpoint.pt")
    run("--resume", "--device", "cpu")
    assert "another kind of device" in capsys.readouterr().out
    assert checkpoint("out")["step"] == 10

def test_checkpoint_alone_in_a_new_folder_is_resumed(finished, pictures, monkeypatch):
    stop_at_step(7, monkeypatch, pictures)
    for out, source in (("unfinished", "out"), ("finished", finished)):
        Path(out).mkdir()
        shutil.copy(Path(source, "checkpoint.pt"), out)
        run("--resume", "--out", out, "--device", "cpu", "--precision", "fp32",
            "--log-interval", 3)
    assert Image.open("unfinished/samples.gif").n_frames == 1
    assert not Path("finished/samples.gif").exists()

def test_animation_has_the_runs_own_epochs_in_order():
    Path("samples").mkdir()
    for epoch in (2, 1000, 1001, 101, 999):
        Image.new("L", (8, 8), epoch % 256).save(f"samples/epoch_{epoch:03d}.png")
    dcgan.animate(Path("samples"), 1000, "samples.gif")         # 1001 is another run's
    with Image.open("samples.gif") as film:
        shades = []
        for i in range(film.n_frames):
            film.seek(i)
            shades.append(film.convert("L").getpixel((0, 0)))
    assert shades == [epoch % 256 for epoch in (2, 101, 999, 1000)]

def test_full_disk_at_a_checkpoint_keeps_the_last_one(pictures, monkeypatch, capsys):
    save = torch.save

    def full_the_second_time(content, path):
        if content.get("step") == 10:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0")
        save(content, path)

    monkeypatch.setattr(torch, "save", full_the_second_time)
    line = error_of(capsys, "--data", pictures, "--epochs", 2, *SMALL)
    assert "out/checkpoint.pt cannot be written" in line
    assert checkpoint("out")["step"] == 5
    assert not list(Path("out").glob(".dcgan-*"))

def test_average_follows_the_generator_and_is_it_when_off(finished, pictures):
    run("--data", pictures, "--epochs", 3, "--ema", 0, *SMALL)
    off, on = checkpoint("out"), checkpoint(finished)
    assert same(off["G"], on["G"])
    assert same(off["ema"], off["G"])
    first, last = networks(seed=42)[0][1][0].weight, on["G"]["1.0.weight"]
    assert 0 < (on["ema"]["1.0.weight"] - last).norm() < 0.7 * (first - last).norm()

def test_the_averaged_generator_is_drawn_and_measured(finished, pictures):
    G = dcgan.Generator(image_size=32, width=8).eval()
    G.load_state_dict(checkpoint(finished)["ema"])
    fakes = dcgan.sample(G, torch.randn(1024, 100, generator=torch.Generator().manual_seed(42)))
    dcgan.save_image(fakes[:64] / 255, "grid.png")
    assert Path("grid.png").read_bytes() == (finished / "samples/epoch_003.png").read_bytes()
    row = checkpoint(finished)["log"][-1]
    measures = dcgan.compare(fakes, dcgan.load_images(pictures, 32))
    assert (row["frechet"], row["diversity"]) == pytest.approx(measures, abs=1e-4)

def generate(*argv):
    run("--out", ".", "--device", "cpu", "--generate", *argv)
    return contents("generated")

def test_generate(finished):
    shutil.copy(finished / "best.pt", ".")
    first = generate(130)
    assert len(first) == 130
    assert generate(130) == first
    assert generate(130, "--seed", 7) != first
    generate(130)

    G = dcgan.build_generator(checkpoint(".", "best.pt")["settings"]).eval()
    G.load_state_dict(checkpoint(".", "best.pt")["ema"])
    rng = torch.Generator().manual_seed(42)
    torch.randn(16, 100, generator=rng)         # where the walk begins and ends
    images = dcgan.sample(G, torch.randn(130, 100, generator=rng))
    for i, image in enumerate(images, 1):
        assert torch.equal(T.PILToTensor()(Image.open(f"generated/{i:06d}.png")), image)
    dcgan.save_image(images[:64] / 255, "grid.png")
    assert Path("grid.png").read_bytes() == Path("generated.png").read_bytes()

def test_walk_goes_in_small_steps_from_one_picture_to_another(finished):
    shutil.copy(finished / "best.pt", ".")
    generate(1)
    walk = T.PILToTensor()(Image.open("walk.png")).float()[:, 2:, 2:]
    rows = walk.unfold(1, 32, 34).unfold(2, 32, 34).permute(1, 2, 0, 3, 4).flatten(2)
    assert rows.shape == (8, 8, 3 * 32 * 32)
    way = (rows[:, 7] - rows[:, 0]).norm(dim=1)
    steps = (rows[:, 1:] - rows[:, :-1]).norm(dim=2)
    assert (way > 1.5 * steps.max(dim=1).values).all()
    assert (steps > 0).all()
    assert (torch.cdist(rows[:, 0], rows[:, 0]) > 0).sum() == 8 * 7
    same_walk = Path("walk.png").read_bytes()
    generate(5)
    assert Path("walk.png").read_bytes() == same_walk

def measure(monkeypatch, *distances):
    """Let the epochs' ends find these, whatever the pictures."""
    values = iter(distances)
    monkeypatch.setattr(dcgan, "compare", lambda *args: (next(values), 1.0))

def test_the_best_epoch_is_kept_and_drawn(finished, pictures, monkeypatch, capsys):
    measure(monkeypatch, 30, 20, 25)
    saved = record(monkeypatch, "atomic_write")
    stop_at_step(12, monkeypatch, pictures, epochs=3)
    run("--resume", "--device", "cpu")
    names = [args[0].name for args, _ in saved if args[0].suffix == ".pt"]
    assert names == ["best.pt", "checkpoint.pt"] * 2 + ["checkpoint.pt"] * 2    # the best first
    assert same(checkpoint("out")["ema"], checkpoint(finished)["ema"])
    best = checkpoint("out", "best.pt")
    assert best["epoch"] == 2
    few = {"width": 8, "image_size": 32, "activation": "leaky_relu", "seed": 42}
    assert best["settings"] == few
    measure(monkeypatch, 0, 0)
    run("--data", pictures, "--epochs", 2, "--out", "two", *SMALL)
    assert same(best["ema"], checkpoint("two")["ema"])
    assert checkpoint("two", "best.pt")["epoch"] == 1           # of equal ones, the first
    capsys.readouterr()

    run("--out", "out", "--device", "cpu", "--generate", 3)
    assert capsys.readouterr().out.startswith("epoch 2: 3 pictures in out/generated")
    drawn = contents("out/generated")
    run("--out", "two", "--device", "cpu", "--generate", 3, "--last")
    assert contents("two/generated") == drawn
    run("--out", "out", "--device", "cpu", "--generate", 3, "--last")
    assert capsys.readouterr().out.splitlines()[-1].startswith("epoch 3: ")
    assert contents("out/generated") != drawn

def test_generate_replaces_its_own_pictures_and_nobody_elses(finished, monkeypatch):
    shutil.copy(finished / "best.pt", ".")
    generate(7)
    Path("generated/mine.png").write_text("precious")
    assert len(generate(5)) == 6
    monkeypatch.setenv("RANK", "1")
    assert len(generate(9)) == 6        # of several processes, only the first one writes

def rows(*distances, step=301, diversity=0.9):
    """The log's rows of epochs with these measures."""
    return [{"epoch": epoch, "step": step, "frechet": distance, "diversity": diversity}
            for epoch, distance in enumerate(distances, 1)]

@pytest.mark.parametrize("diversity, fake_score, told", [
    (0.49, 0.5, ["collapses"]),
    (0.9, 0.049, ["has won"]),
    (0.49, 0.049, ["collapses", "has won"]),
    (0.51, 0.051, []),
])
def test_warnings(capsys, diversity, fake_score, told):
    fake_scores = torch.full((20,), 0.01)
    fake_scores[7] = fake_score
    dcgan.warn(rows(30, diversity=diversity), fake_scores)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(told)
    for line, words in zip(lines, told):
        assert line.startswith("warning: ")
        assert words in line
        assert "--lr-d" in line
    dcgan.warn(rows(30, step=300, diversity=0.1), torch.ones(20))       # too early to tell
    assert capsys.readouterr().out == ""

@pytest.mark.parametrize("distances, told", [
    ([40, 20] + 4 * [30], False),           # not for long enough
    ([40, 20] + 5 * [23], True),
    ([40, 20] + 4 * [30] + [21], False),    # not clearly
    ([40, 20] + 8 * [21], False),
    ([40, 20] + 5 * [30] + [19], False),
])
def test_warning_past_the_best(distances, told, capsys):
    dcgan.warn(rows(*distances), torch.ones(20))
    out = capsys.readouterr().out
    assert ("past its best, epoch 2," in out) == told
    assert bool(out) == told

def test_run_warns_after_each_epoch(pictures, monkeypatch, capsys):
    fake_scores = iter([0.5] * 40 + [0.01] * 280)         # has not won in the first epoch
    monkeypatch.setattr(dcgan, "compare", lambda *args: (100, 0.1))
    monkeypatch.setattr(dcgan, "train_step", lambda *args, **options:
                        torch.tensor([0.5, 1, 0.5, next(fake_scores)]))
    run("--data", pictures, *SMALL, "--epochs", 8, "--batch-size", 1)
    out = capsys.readouterr().out
    assert out.count("has won") == 7
    assert out.count("collapses") == 1

def test_a_gpu_that_is_too_small_is_one_line(pictures, monkeypatch, capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
    do_at_step(monkeypatch, 7, full)
    assert "out of memory" in error_of(capsys, "--data", pictures, "--epochs", 2, *SMALL)
    assert checkpoint("out")["step"] == 5

@pytest.mark.parametrize("where", ["losses", "generator", "discriminator"])
def test_what_is_not_finite_ends_the_run_and_keeps_the_checkpoint(where, pictures, monkeypatch,
                                                                  capsys):
    step, calls = dcgan.train_step, []

    def broken(G, D, *args, **options):
        losses = step(G, D, *args, **options)
        calls.append(None)
        if len(calls) == 10:        # the last of an epoch
            first = {"losses": losses, "generator": next(G.parameters()),
                     "discriminator": next(D.parameters())}[where]
            first.detach().fill_(float("nan"))
        return losses

    monkeypatch.setattr(dcgan, "train_step", broken)
    assert "not finite" in error_of(capsys, "--data", pictures, "--epochs", 3, *SMALL)
    assert checkpoint("out")["step"] == 5

# ---- Several processes ---------------------------------------------------------------------------

SPY = """
import os, sys, dcgan, torch
step, seen = dcgan.train_step, []
def train_step(G, D, *args, **options):
    losses = step(G, D, *args, **options)
    seen.append([args[2], options["rng"].initial_seed(), D[0].weight.grad.clone(),
                 *map(torch.clone, G.parameters())])
    if "--resume" in sys.argv and len(seen) == 2:
        os.kill(os.getpid(), 2)         # Ctrl-C goes to every process
    return losses
dcgan.train_step = train_step
if os.environ.get("RANK") == "1":
    dcgan.csv = dcgan.save_image = dcgan.save_checkpoint = None         # it must not write
try:
    dcgan.main()
finally:
    torch.save(seen, "seen" + os.environ.get("RANK", ""))
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

def test_two_processes_share_a_run(finished, pictures, monkeypatch, capfd):
    Path("spy.py").write_text(SPY)
    argv = ["spy.py", "--data", pictures, "--epochs", "2", *SMALL]
    monkeypatch.setattr(dcgan, "train_step", dcgan.train_step)      # to be put back at the end
    monkeypatch.setattr(sys, "argv", [*argv, "--out", "one"])
    runpy.run_path("spy.py")
    subprocess.run([*TORCHRUN, *argv, "--out", "two"], check=True, timeout=50)
    assert capfd.readouterr().out.count(" parameters") == 2         # rank 1 is silent

    one, first, second = torch.load("seen"), torch.load("seen0"), torch.load("seen1")
    mean_gradient = first[0][2]
    assert one[0][2].norm() / mean_gradient.norm() == pytest.approx(1, abs=0.3)
    for (batch, *_), (a, seed_a, *state_a), (b, seed_b, *state_b) in zip(one, first, second,
                                                                         strict=True):
        assert torch.equal(torch.stack([a, b], 1).flatten(0, 1), batch)
        assert seed_a != seed_b         # of the noise
        assert same(state_a, state_b)

    resume = ["--resume", "--epochs", "3", "--out", "two", "--device", "cpu"]
    assert subprocess.run([*TORCHRUN, "spy.py", *resume], timeout=50).returncode != 0
    assert checkpoint("two")["step"] == 12
    first, second = torch.load("seen0"), torch.load("seen1")
    assert same(first[1][2:], second[1][2:])
    run(*resume)
    assert contents("two").keys() == contents(finished).keys()

def test_an_error_in_torchrun_is_one_line_and_ends_all_at_once():
    argv = [dcgan.__file__, "--data", "nowhere", *SMALL]
    start = time.time()
    ended = subprocess.run([*TORCHRUN, *argv], capture_output=True, text=True, timeout=50)
    assert ended.returncode != 0
    assert time.time() - start < 30         # where one hangs, torchrun waits for 30 seconds
    lines = [line for line in ended.stderr.splitlines() if line.startswith("dcgan.py: error: ")]
    assert len(lines) == 1

def test_processes_must_share_the_batch_evenly(pictures, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 processes" in error_of(capsys, "--data", pictures, *SMALL)

def test_more_processes_than_gpus(pictures, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "99")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    monkeypatch.setenv("LOCAL_RANK", "98")      # errors come from every process
    line = error_of(capsys, "--data", pictures, "--device", "cuda")
    assert f"99 processes, but {torch.cuda.device_count()} GPUs" in line

def test_each_process_takes_the_gpu_of_its_number(monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda count, device: zeros(count))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert dcgan.existing_device("cuda") == torch.device("cuda:2")
    assert dcgan.existing_device("cuda:1") == torch.device("cuda:1")

# ---- The command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("argv, told", [
    ("--device cuda:99", "cuda:99"),
    ("--device abacus", "abacus"),
    ("--device meta", "meta"),
    ("--device hpu", "; try --device cpu"),
    ("--generate 3 --out bad", "bad/best.pt is not there, damaged or of an older version; --last"),
    ("--generate 3 --last --out bad", "bad/checkpoint.pt is not there"),
    ("--resume", "out/checkpoint.pt is not there"),
    ("--resume --out older", "older version"),
    ("--resume --out code", "damaged"),         # only weights are loaded
    ("--image-size 65", "65"),
    ("--batch-size 0", ": 0"),
    ("--batch-size 41", "40 readable pictures, fewer than --batch-size 41"),
    ("--beta1 1", ": 1"),
    ("--seed 18446744073709551616", "18446744073709551616"),
    ("--ema nan", "nan"),
    ("--epochs 0", ": 0"),
    ("--epochs x", "'x'"),
    ("--lr-d -1", "-1"),
    ("--flip-labels 1.5", "1.5"),
    ("--nonsense", "--no"),
    ("--out page.zip/out", "Not a directory"),
    ("--data page.zip", "web page"),
    ("--data broken.zip", "Bad magic number"),
    ("--data .", "--out out is inside --data"),
    ("--data bad", "bad: 0 readable"),
    ("--data nowhere", "nowhere"),
])
def test_bad_input_is_one_line(argv, told, pictures, capsys):
    for folder in ("bad", "older", "code"):
        Path(folder).mkdir()
    torch.save({"settings": {}, "generator": {}}, "older/checkpoint.pt")
    torch.save({"settings": {}, "epoch": 1, "code": Path()}, "code/checkpoint.pt")
    for file in ("bad/x.csv", "bad/checkpoint.pt", "page.zip"):
        Path(file).write_text("<html>")
    with dcgan.ZipFile("broken.zip", "w") as archive:
        archive.writestr("a.jpg", jpeg())
    broken = Path("broken.zip").read_bytes().replace(b"PK\x01\x02", b"PK\0\0")
    Path("broken.zip").write_bytes(broken)
    assert told in error_of(capsys, "--data", pictures, *SMALL, *argv.split())
    assert set(os.listdir()) == {"bad", "older", "code", "page.zip", "broken.zip"}

@pytest.mark.parametrize("precision, native, bf16, named", [
    ("auto", True, True, "bf16"),
    ("auto", False, False, "fp32 (bf16 is not native here)"),
    ("bf16", False, True, "bf16"),
    ("fp32", True, False, "fp32"),
])
def test_precision(precision, native, bf16, named, pictures, monkeypatch, capsys):
    steps = record(monkeypatch, "train_step")
    monkeypatch.setattr(dcgan, "native_bf16", lambda device: native)
    run("--data", pictures, "--dry-run", *SMALL, "--precision", precision)
    assert [options["bf16"] for _, options in steps] == [bf16]
    assert f"cpu, {named};" in capsys.readouterr().out

@pytest.mark.parametrize("capability, native", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_bf16_is_native_from_ampere_on(capability, native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dcgan.native_bf16(torch.device("cuda")) == native

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_train_resume_and_generate(device, pictures):
    run("--data", pictures, "--epochs", 1, *SMALL, "--device", device)
    run("--resume", "--epochs", 2, "--device", device)
    run("--generate", 3, "--device", device)
    assert checkpoint("out")["step"] == 10
    assert len(contents("out/generated")) == 3
