"""Tests of dcgan.py: run `pytest`. They need no network and no GPU, and take under a minute.

Copy them along with the networks and the step, down to the line that says so.
"""
import builtins
import csv
import errno
import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from zipfile import ZipFile

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor

import dcgan

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

def networks(image_size=32, width=8, seed=0):
    torch.manual_seed(seed)
    G = dcgan.Generator(width=width, image_size=image_size)
    return G, dcgan.Discriminator(width=width, image_size=image_size)

def sgd(nets, rate_g, rate_d):
    """With SGD, an update is a gradient."""
    return [torch.optim.SGD(net.parameters(), rate) for net, rate in zip(nets, (rate_g, rate_d))]

def same(a, b):
    """Bit for bit, whatever is nested in whatever."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def one_step(device, bf16):
    """Train one step: every parameter moves, and stays finite and float32."""
    G, D = [net.to(device) for net in networks(64, width=16)]
    before = [p.detach().clone() for p in (*G.parameters(), *D.parameters())]
    dtypes = []
    G[1][1].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    real = torch.rand(8, 3, 64, 64, device=device) * 2 - 1
    losses = dcgan.train_step(G, D, *sgd((G, D), 1, 1), real, bf16=bf16)
    assert dtypes == [torch.bfloat16 if bf16 else torch.float32]
    assert losses.shape == (4,)
    assert losses.device.type == device
    assert losses.isfinite().all()
    for p, old in zip((*G.parameters(), *D.parameters()), before):
        assert p.dtype == torch.float32
        assert p.isfinite().all()
        assert not torch.equal(p, old)

def test_generator_turns_100_d_noise_into_3_x_64_x_64_images():
    images = dcgan.Generator()(torch.randn(2, 100))
    assert images.shape == (2, 3, 64, 64)
    assert images.abs().max() <= 1

def test_discriminator_turns_an_image_into_a_single_logit():
    logits = dcgan.Discriminator()(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert logits.shape == (2, 1)
    assert logits.isfinite().all()

@needs_cuda
@pytest.mark.parametrize("bf16", [False, True])
def test_one_training_step_on_cuda(bf16):
    one_step("cuda", bf16)

@pytest.mark.parametrize("bf16", [False, True])
def test_one_training_step_on_the_cpu(bf16):
    one_step("cpu", bf16)

# ---- Networks ------------------------------------------------------------------------------------
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

def test_a_row_in_the_table_is_all_that_another_size_needs(monkeypatch):
    monkeypatch.setitem(dcgan.WIDTHS, 96, (8, 4, 2, 1))
    G, D = networks(96)
    images = G(torch.randn(2, 100))
    assert images.shape == (2, 3, 96, 96)
    assert D(images).shape == (2, 1)
    assert G[1](G[0](torch.randn(2, 100))).shape[2:] == (6, 6)

@pytest.mark.parametrize("network", [dcgan.Generator, dcgan.Discriminator])
def test_a_size_that_does_not_fit_is_refused(network, monkeypatch):
    with pytest.raises(ValueError, match="65 is not one of .32, 64, 128, 256"):
        network(image_size=65)
    monkeypatch.setitem(dcgan.WIDTHS, 100, (8, 4, 2, 1))
    with pytest.raises(ValueError, match="100 cannot be halved 4 times"):
        network(image_size=100)

def test_layers_are_the_papers():
    nets = networks(64, width=16)
    layers = [layer for net in nets for layer in net.modules() if not list(layer.children())]
    convolutions = [layer for layer in layers if hasattr(layer, "kernel_size")]
    norms = [layer for layer in layers if isinstance(layer, torch.nn.BatchNorm2d)]
    assert len(convolutions) == 10
    assert all(layer.kernel_size == (4, 4) for layer in convolutions)
    assert all(abs(layer.weight.std() - 0.02) < 0.002 for layer in convolutions)
    assert [layer.bias is None for layer in convolutions] == 4 * [True] + 2 * [False] + 3 * [True] + [False]
    assert len(norms) == 7
    assert all(0.9 < layer.weight.mean() < 1.1 for layer in norms)
    assert all(0.01 < layer.weight.std() < 0.03 for layer in norms)
    assert nets[0](torch.randn(4, 100) * 50).abs().max() <= 1
    others = {type(layer).__name__ for layer in layers} - {"Conv2d", "ConvTranspose2d"}
    assert others == {"Unflatten", "BatchNorm2d", "LeakyReLU", "Tanh", "Flatten"}

def test_constructors_take_latents_channels_and_slopes():
    G = dcgan.Generator(latent_dim=7, channels=1, width=2, slope=0.5)
    D = dcgan.Discriminator(channels=1, width=2, slope=0.1)
    assert D(G(torch.randn(2, 7))).shape == (2, 1)
    for net, slope in ((G, 0.5), (D, 0.1), (dcgan.Generator(width=2), 0.2)):
        leaky = [layer for layer in net.modules() if isinstance(layer, torch.nn.LeakyReLU)]
        assert [layer.negative_slope for layer in leaky] == 4 * [slope]

# ---- The game ------------------------------------------------------------------------------------
@pytest.mark.parametrize("fresh_noise", [False, True])
@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.1, 0.0), (0.0, 0.1)])
def test_step_is_the_one_written_out_here(fresh_noise, rates):
    """D first, then G against the new D; neither moves in the other's half."""
    real = torch.rand(8, 3, 32, 32) * 2 - 1
    rng = torch.Generator().manual_seed(1)
    nets, (G, D) = networks(), networks()
    losses = dcgan.train_step(*nets, *sgd(nets, *rates), real, rng=rng, fresh_noise=fresh_noise)

    rng.manual_seed(1)
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

@pytest.mark.parametrize("share, real, fake", [(0, 1, 0), (1, 0, 1), (0.25, 0.75, 0.25)])
def test_labels_are_swapped_for_the_discriminator_only(share, real, fake, monkeypatch):
    original, means, nets = F.binary_cross_entropy_with_logits, [], networks(width=2)

    def spy(logits, labels):
        means.append(labels.mean().item())
        return original(logits, labels)

    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", spy)
    dcgan.train_step(*nets, *sgd(nets, 0, 0), torch.zeros(3000, 3, 32, 32), flip_labels=share)
    assert means == pytest.approx([real, fake, 1], abs=0.04)

def test_step_that_is_interrupted_freezes_nothing_and_thaws_nothing(monkeypatch):
    G, D = networks()
    D[0].requires_grad_(False)
    before = [p.requires_grad for p in D.parameters()]
    optimizer_g, optimizer_d = sgd((G, D), 1, 1)
    dcgan.train_step(G, D, optimizer_g, optimizer_d, torch.zeros(8, 3, 32, 32))
    monkeypatch.setattr(optimizer_g, "zero_grad", lambda: 1 / 0)       # within G's half
    with pytest.raises(ZeroDivisionError):
        dcgan.train_step(G, D, optimizer_g, optimizer_d, torch.zeros(8, 3, 32, 32))
    assert [p.requires_grad for p in D.parameters()] == before

@pytest.mark.parametrize("tricks", [{}, {"fresh_noise": True, "flip_labels": 0.5}])
def test_step_and_average_make_no_tensor_on_another_device(tricks, monkeypatch):
    """On the meta device, a tensor of the CPU would raise."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    G, D = [net.to("meta") for net in networks()]
    real = torch.empty(8, 3, 32, 32, device="meta")
    losses = dcgan.train_step(G, D, *sgd((G, D), 0.1, 0.1), real, **tricks)
    assert losses.device.type == "meta"
    dcgan.update_average(networks()[0].to("meta"), G, 0.999, 1)

def test_average_has_a_short_memory_at_first_and_then_the_decay():
    average, G = networks(seed=0)[0], networks(seed=1)[0]
    first, latest = average[1][0].weight.clone(), G[1][0].weight
    dcgan.update_average(average, G, 0.999, step=1)
    torch.testing.assert_close(average[1][0].weight, first.lerp(latest, 0.9))
    dcgan.update_average(average, G, 0.5, step=1000)
    torch.testing.assert_close(average[1][0].weight, first.lerp(latest, 0.95))

def test_average_takes_the_statistics_of_batch_norm_along():
    average, G = networks()[0], networks()[0]
    G(torch.randn(8, 100))
    dcgan.update_average(average, G, 0, step=1)
    assert same(average.state_dict(), G.state_dict())
    assert average[1][1].num_batches_tracked == 1

def test_the_lesson_alone_needs_nothing_but_torch():
    source = Path(dcgan.__file__).read_text()
    lesson = source[:source.index("# ==== Above")]
    assert len(lesson.splitlines()) < 200

    def only_torch(name, *args):
        assert name.split(".")[0] in ("torch", "itertools")
        return builtins.__import__(name, *args)

    alone = {"__builtins__": {**vars(builtins), "__import__": only_torch}, "__name__": "lesson"}
    exec(lesson, alone)
    G, D = alone["Generator"](width=2), alone["Discriminator"](width=2)
    losses = alone["train_step"](G, D, *sgd((G, D), 1, 1), torch.zeros(8, 3, 64, 64))
    alone["update_average"](alone["Generator"](width=2), G, 0.999, 1)
    assert losses.isfinite().all()

# ==== Copy the tests down to here along with the networks and the step ============================
SMALL = "--image-size 32 --width 8 --batch-size 8 --log-interval 2 --device cpu".split()
FILES = {"real.png", "samples.gif", "losses.png", "log.csv", "checkpoint.pt", "best.pt"}
EPOCHS = {f"samples/epoch_00{epoch}.png" for epoch in (1, 2, 3)}

@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Each test works in a folder of its own; its subprocesses can import this module."""
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

def run(*argv):
    dcgan.main([str(word) for word in argv])

def error_of(*argv):
    """The one line with which a command fails."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code.startswith("dcgan.py: error: ")
    assert len(stop.value.code.splitlines()) == 1
    return stop.value.code

def checkpoint(out="out", name="checkpoint.pt"):
    return torch.load(Path(out, name), weights_only=True)

def contents(out="out"):
    """Every file below a folder: bytes by name, of a .pt what it holds."""
    files = {}
    for file in filter(Path.is_file, Path(out).rglob("*")):
        name = file.relative_to(out).as_posix()
        files[name] = checkpoint(out, name) if file.suffix == ".pt" else file.read_bytes()
    return files

def replace(monkeypatch, name, change, owner=dcgan):
    """Let `change` see, and decide, what a function does; return the list of its calls."""
    original, calls = getattr(owner, name), []

    def replaced(*args, **options):
        calls.append((args, options))
        return change(len(calls), original, *args, **options)

    monkeypatch.setattr(owner, name, replaced)
    return calls

def record(monkeypatch, name, owner=dcgan):
    return replace(monkeypatch, name, lambda i, original, *args, **options: original(*args, **options), owner)

def encoded(image, kind="JPEG", **options):
    """The bytes of a picture."""
    data = BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()

RED = Image.new("RGB", (40, 40), "red")

# ---- Pictures in ---------------------------------------------------------------------------------
def test_toy_faces_are_all_different_and_always_the_same():
    faces = dcgan.toy_faces(20, 32)
    assert faces.shape == (20, 3, 32, 32)
    assert faces.dtype == torch.uint8
    assert len(faces.flatten(1).unique(dim=0)) == 20
    assert torch.equal(faces[:5], dcgan.toy_faces(5, 32))

@pytest.mark.parametrize("size, crop, expected_crop", [
    ((178, 218), None, 160),
    ((178, 218), 99, 99),
    ((181, 96), None, 96),
    ((75, 120), 200, 75),
])
def test_preparation_is_the_lectures_to_the_last_bit(size, crop, expected_crop):
    noise = T.ToPILImage()(torch.randint(0, 256, (3, 97, 83), dtype=torch.uint8))
    data = encoded(noise.resize(size))
    lecture = T.Compose([T.CenterCrop(expected_crop), T.Resize(64)])
    assert dcgan.decode(data, 64, crop).tobytes() == lecture(Image.open(BytesIO(data))).tobytes()

def grey(value, kind):
    return Image.fromarray(torch.full((40, 40), value).numpy().astype(kind))

@pytest.mark.parametrize("data, color", [
    (encoded(Image.new("L", (40, 50), 128), "PNG"), 128),
    (encoded(grey(32768, "uint16"), "PNG"), 128),
    (encoded(grey(32768, "uint16"), "TIFF"), 128),
    (encoded(grey(128, "int32"), "TIFF"), 128),
    (encoded(Image.new("RGBA", (40, 40), (255, 0, 0, 9)), "PNG"), "red"),
    (encoded(RED.convert("P"), "GIF"), "red"),
    (encoded(RED.convert("CMYK")), "red"),
    (encoded(RED.resize((1, 1)), "BMP"), "red"),
    (encoded(RED.resize((300, 20)), "WEBP"), "red"),
])
def test_every_kind_of_picture_becomes_rgb(data, color):
    pixels = pil_to_tensor(dcgan.decode(data, 32))
    assert pixels.shape == (3, 32, 32)
    if color == "red":
        assert (pixels[0] > 250).all() and (pixels[1:] < 6).all()
    else:
        assert (pixels == color).all()

def test_turned_pictures_become_upright():
    turned = Image.new("RGB", (40, 40), "black")
    turned.paste("white", (0, 0, 40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6        # to be turned clockwise
    upright = pil_to_tensor(dcgan.decode(encoded(turned, exif=exif), 32))
    assert (upright[:, :, 18:] > 200).all()
    assert (upright[:, :, :14] < 50).all()

def test_picture_with_malformed_exif_is_used(monkeypatch):
    def malformed(*args, **options):
        raise ValueError("a text where a number belongs")

    monkeypatch.setattr(dcgan.ImageOps, "exif_transpose", malformed)
    assert dcgan.decode(encoded(RED), 32).getpixel((0, 0))[0] > 250

@pytest.mark.parametrize("name, expected", [
    ("a.jpg", True), ("a/b.PNG", True), ("a.jfif", True), ("a.gif", True), ("a.jp2", True),
    ("notes.csv", False), ("a.dcgan", False), ("x.zip", False), ("jpg", False),
    (".a.jpg", False), ("a/._b.jpg", False), (".hidden/a.jpg", False),
])
def test_pictures_are_told_by_their_names_on_every_system(name, expected):
    assert dcgan.is_picture(PurePosixPath(name)) == expected
    assert dcgan.is_picture(PureWindowsPath(name.replace("/", "\\"))) == expected

def test_format_of_a_plugin_is_a_picture_once_it_is_registered(monkeypatch):
    assert not dcgan.is_picture(Path("a.heic"))
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    assert not dcgan.is_picture(Path("a.heic"))         # nothing to open it with
    monkeypatch.setitem(Image.OPEN, "HEIF", None)
    assert dcgan.is_picture(Path("a.heic"))

def write_archive(path, **files):
    with ZipFile(path, "w") as archive:
        archive.mkdir("folder") if hasattr(archive, "mkdir") else None
        for name, data in files.items():
            archive.writestr(name, data)

@pytest.mark.parametrize("source", ["odd", "odd.zip"])
def test_other_files_are_counted_and_unreadable_pictures_named(source, capsys):
    files = {f"cut{i:02d}.jpg": encoded(RED)[:300] for i in range(12)}
    files |= {"good.jpg": encoded(RED), "a.HEIC": b"", "b.HEIC": b"", ".hidden.png": b""}
    Path("odd").mkdir()
    for name, data in files.items():
        Path("odd", name).write_bytes(data)
    write_archive("odd.zip", **files)
    assert len(dcgan.load_images(source, 32)) == 1
    out, err = capsys.readouterr()
    assert f"{source}: 13 pictures, 3 other files passed over" in out
    assert err.count("skipped cut") == 10
    assert "skipped 12 of 13 pictures" in err

def test_archive_of_which_nothing_can_be_read_says_why():
    write_archive("bad.zip", **{"a.jpg": b"", "b.jpg": b""})
    line = error_of("--data", "bad.zip", *SMALL)
    assert "no picture can be read" in line
    assert "cannot identify image file" in line
    assert os.listdir("data") == []

def test_names_in_archives_may_begin_with_a_dot_and_a_slash():
    write_archive("dot.zip", **{"./b.png": b"", "./a/b.png": b"", "./.a/b.png": b"", "a/.b.png": b""})
    paths = [str(path) for path, *_ in dcgan.find_pictures(Path("dot.zip"))]
    assert paths == ["a/b.png", "b.png"]

@pytest.mark.skipif(os.name == "nt", reason="to make links takes rights on Windows")
def test_folders_behind_links_are_not_entered(pictures):
    Path("a").mkdir()
    Path("a/b.png").write_bytes(encoded(RED, "PNG"))
    Path("a/self").symlink_to(Path("a").resolve())
    Path("a/faces").symlink_to(pictures)
    Path("linked").symlink_to("a")
    assert len(dcgan.load_images("linked", 32)) == 1

def test_more_pictures_than_are_decoded_at_once_keep_their_order():
    shades = {f"{i:04d}.png": encoded(Image.new("L", (8, 8), i // 4), "PNG") for i in range(1001)}
    write_archive("many.zip", **shades)
    means = dcgan.load_images("many.zip", 32).float().mean((1, 2, 3))
    assert torch.equal(means, torch.arange(1001).float() // 4)

def test_cache_is_used_until_size_crop_or_a_picture_changes(pictures, monkeypatch):
    folder = Path("data")       # may be the source, too
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.jpg").write_bytes(encoded(RED))
    decoded = record(monkeypatch, "decode")

    def calls(*args, count=3):
        decoded.clear()
        assert len(dcgan.load_images(folder, *args)) == count
        return len(decoded)

    assert [calls(32), calls(32), calls(64), calls(64, 20)] == [3, 0, 3, 3]
    assert [calls(32), calls(64), calls(64, 20)] == [0, 0, 0]       # side by side
    (folder / "a.jpg").write_bytes(encoded(RED.resize((20, 20))))
    assert [calls(32), calls(32)] == [3, 0]
    (folder / "d.jpg").write_bytes(encoded(RED))
    assert [calls(32, count=4), calls(32, count=4)] == [4, 0]

@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:len(data) // 2], lambda data: b""])
def test_truncated_cache_is_prepared_anew(damage, pictures):
    images = dcgan.load_images(pictures, 32).clone()
    [cache] = Path("data").iterdir()
    cache.write_bytes(damage(cache.read_bytes()))
    assert torch.equal(dcgan.load_images(pictures, 32), images)

def test_two_starts_at_once_both_have_their_pictures(pictures):
    found = []
    load = lambda: found.append(dcgan.load_images(pictures, 32))        # noqa: E731
    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(*found)
    assert len(os.listdir("data")) == 1

def test_file_is_written_whole_or_not_at_all():
    path = Path("folder/file")
    with dcgan.atomic_write(path) as unfinished:
        unfinished.write_text("old")
    with pytest.raises(OSError):
        with dcgan.atomic_write(path) as unfinished:
            unfinished.write_text("half")
            raise OSError
    assert path.read_text() == "old"
    assert os.listdir("folder") == ["file"]

@pytest.fixture
def sources(monkeypatch):
    """What each of CelebA's sources does: bytes to write or an exception to raise."""
    behaviours, signature = [], inspect.signature(dcgan.download_url)

    def download_url(*args, **options):
        call = signature.bind(*args, **options).arguments
        assert call["md5"] == "00d2c5bc6d35e252742224ab0c1e8fcb"
        behaviour = behaviours.pop(0)
        Path(call["root"], call["filename"]).write_bytes(b"half")
        if isinstance(behaviour, Exception):
            raise behaviour
        Path(call["root"], call["filename"]).write_bytes(behaviour)

    monkeypatch.setattr(dcgan, "download_url", download_url)
    return behaviours

def test_download_goes_on_to_the_source_that_has_celeba(sources, capsys):
    write_archive("celeba.zip", **{"img_align_celeba/000001.jpg": encoded(RED)})
    sources += [RuntimeError("quota"), OSError("404"), Path("celeba.zip").read_bytes()]
    assert dcgan.load_images("data/celeba").shape == (1, 3, 64, 64)
    err = capsys.readouterr().err
    for url, reason in zip(dcgan.CELEBA_URLS, ("quota", "404")):
        assert f"no CelebA from {url}: {reason}" in err
    assert os.listdir("data/celeba") == ["img_align_celeba.zip"]

def test_download_that_fails_says_what_to_do_and_is_tried_again(sources, capsys):
    for attempt in range(2):
        sources += 3 * [OSError("unreachable")]
        line = error_of(*SMALL)
        assert "put img_align_celeba.zip into" in line
        assert "--data toy" in line
        assert os.listdir("data/celeba") == []
        assert sources == []

def test_google_drive_is_asked_in_the_way_that_gdown_understands(monkeypatch):
    gdown = pytest.importorskip("gdown")
    signature, asked = inspect.signature(gdown.download), []

    def download(*args, **options):
        asked.append(signature.bind(*args, **options).arguments)
        raise ConnectionError("no network here")

    monkeypatch.setattr(gdown, "download", download)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(dcgan, "CELEBA_URLS", dcgan.CELEBA_URLS[:1])
    with pytest.raises(dcgan.UserError):
        dcgan.download_celeba(Path("celeba.zip"))
    assert asked[0]["id"] == "0B7EVK8r0v71pZjFTYXZWM3FlRnM"

@pytest.mark.parametrize("place", ["img_align_celeba.zip", "img_align_celeba/000001.jpg", "x/y/1.png"])
def test_celeba_by_hand_is_found_without_a_download(place, sources):
    path = Path("data/celeba", place)
    path.parent.mkdir(parents=True)
    write_archive("celeba.zip", **{"img_align_celeba/000001.jpg": encoded(RED)})
    path.write_bytes(Path("celeba.zip").read_bytes() if path.suffix == ".zip" else encoded(RED))
    assert len(dcgan.load_images("data/celeba", 32)) == 1

def test_of_all_of_celeba_the_training_partition_is_taken(monkeypatch):
    paths = [PurePosixPath(f"img_align_celeba/{i:06d}.jpg") for i in range(1, 202_600)]
    monkeypatch.setattr(dcgan, "is_picture", lambda path: True)
    for count, last in ((202_599, "162770"), (202_598, "202598")):
        monkeypatch.setattr(dcgan, "list_files", lambda source: [(path, 0, None) for path in paths[:count]])
        assert dcgan.find_pictures(Path("celeba"))[-1][0].stem == last

def test_every_epoch_shuffles_all_pictures_anew_and_can_start_anywhere():
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    steps = list(dcgan.batches(images, 4, epochs=3, seed=3))
    assert len(steps) == 6
    assert all(batch.shape == (4, 1, 1, 1) for batch in steps)
    first, second = torch.cat(steps[:2]), torch.cat(steps[2:4])
    assert len(first.unique()) == 8
    assert not torch.equal(first, second)
    for done in range(7):
        assert same(list(dcgan.batches(images, 4, epochs=3, seed=3, done=done)), steps[done:])

def test_neighbouring_seeds_have_orders_of_their_own():
    images = torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1)
    orders = [tuple(batch.flatten().tolist()) for seed in (42, 43, 44)
              for batch in dcgan.batches(images, 100, epochs=3, seed=seed)]
    assert len(set(orders)) == 9
    assert len({dcgan.seed_of("noise", seed, step, rank)
                for seed in range(5) for step in range(5) for rank in range(5)}) == 125

def test_batches_are_floats_from_minus_one_to_one_and_shared_among_ranks():
    images = torch.tensor([0, 255, 51, 102], dtype=torch.uint8).reshape(4, 1, 1, 1)
    [batch] = dcgan.batches(images, 4)
    torch.testing.assert_close(batch.flatten().sort().values, torch.tensor([-1, -0.6, -0.2, 1]))
    shares = [next(dcgan.batches(images, 4, rank=rank, ranks=2)) for rank in (0, 1)]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), batch)

def test_batches_are_where_the_pictures_are():
    images = torch.empty(4, 3, 8, 8, dtype=torch.uint8, device="meta")
    assert [batch.device.type for batch in dcgan.batches(images, 2)] == ["meta", "meta"]
    assert next(dcgan.batches(images, 2, device="meta")).shape == (2, 3, 8, 8)

# ---- Pictures out --------------------------------------------------------------------------------
def test_sample_rounds_to_bytes():
    G = torch.nn.Linear(3, 3, bias=False)
    G.weight.data = torch.eye(3)
    latents = torch.tensor([[-1, 0, 1.0]]).repeat(130, 1)
    images = dcgan.sample(G, latents)
    assert images.shape == (130, 3)
    assert images[129].tolist() == [0, 128, 255]

def test_sample_computes_on_the_device_of_the_network(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    images = dcgan.sample(networks()[0].to("meta").eval(), torch.randn(130, 100))
    assert images.device.type == "meta"
    assert images.shape == (130, 3, 32, 32)

def test_frechet_distance_of_distributions_for_which_it_is_known():
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (2048, 3, 16, 16)).byte()
    assert dcgan.compare(noise, noise) == pytest.approx((0, 1), abs=1e-4)
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

def test_a_small_network_and_its_average_learn_toy_faces():
    real, (G, D) = dcgan.toy_faces(1024, 32), networks(width=16)
    average = networks(width=16, seed=1)[0].eval()
    adams = [torch.optim.Adam(net.parameters(), 1e-3, (0.5, 0.999)) for net in (G, D)]
    latents = torch.randn(512, 100)
    before, _ = dcgan.compare(dcgan.sample(average, latents), real)
    for step, batch in enumerate(dcgan.batches(real, 32, epochs=4), 1):
        dcgan.train_step(G, D, *adams, batch)
        dcgan.update_average(average, G, 0.99, step)
    for network in (G.eval(), average):
        after, diversity = dcgan.compare(dcgan.sample(network, latents), real)
        assert after < 0.75 * before
        assert diversity > 0.6

@pytest.mark.parametrize("steps", [1, 100, 3000])
@pytest.mark.parametrize("middles", [(0.5, 2.0), (-3.0, -1.0)])
def test_loss_plot_shows_both_losses_also_negative_ones(steps, middles):
    torch.manual_seed(0)
    dcgan.plot_losses(torch.tensor(middles) + 0.1 * torch.rand(steps, 2), 3, Path("losses.png"))
    red, _, blue = pil_to_tensor(Image.open("losses.png")).int()[:, 30:]
    heights = []
    for curve in (blue - red > 60, red - blue > 60):
        assert curve.any(dim=0).sum() > 400         # from left to right
        heights.append(curve.nonzero()[:, 0].float().mean())
    assert heights[0] > heights[1] + 100            # the discriminator's loss is the lower one

def test_animation_has_the_runs_own_epochs_in_order():
    Path("samples").mkdir()
    for epoch in (2, 1000, 1001, 101, 999):
        Image.new("L", (8, 8), epoch % 256).save(f"samples/epoch_{epoch:03d}.png")
    dcgan.animate(Path("samples"), 1000, "samples.gif")         # 1001 is another run's
    shades = []
    with Image.open("samples.gif") as film:
        for i in range(film.n_frames):
            film.seek(i)
            shades.append(film.convert("L").getpixel((0, 0)))
    assert shades == [epoch % 256 for epoch in (2, 101, 999, 1000)]

# ---- Devices -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["cuda:99", "abacus", "meta", "hpu"])
def test_device_that_is_not_there_is_one_line(name):
    line = error_of("--data", "toy", "--device", name)
    assert f"--device {name} cannot be used" in line
    assert "try --device cpu" in line

@pytest.mark.parametrize("precision, native, bf16", [
    ("auto", True, True), ("auto", False, False), ("bf16", False, True), ("fp32", True, False)])
def test_precision_is_bf16_where_that_is_native(precision, native, bf16, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert dcgan.find_device("cpu", precision) == (torch.device("cpu"), bf16)

@pytest.mark.parametrize("capability, native", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_each_process_takes_the_gpu_of_its_number(capability, native, monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda count, device: zeros(count))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dcgan, "LOCAL_RANK", 2)
    assert dcgan.find_device("cuda", "auto") == (torch.device("cuda:2"), native)
    assert dcgan.find_device("cuda:1", "auto") == (torch.device("cuda:1"), native)

# ---- The run -------------------------------------------------------------------------------------
def at_step(monkeypatch, number, action):
    """Do something in the middle of a run, before its step of that number."""
    def step(i, original, *args, **options):
        if i == number:
            action()
        return original(*args, **options)

    return replace(monkeypatch, "train_step", step)

def stop_at_step(number, pictures, monkeypatch, signum=signal.SIGINT, epochs=2):
    """A run that a signal ends in the middle; the exit status."""
    with monkeypatch.context() as patch:
        at_step(patch, number, lambda: signal.raise_signal(signum))
        with pytest.raises(SystemExit) as stop:
            run("--data", pictures, "--epochs", epochs, *SMALL)
    return stop.value.code

def test_files_of_a_run(finished):
    assert contents(finished).keys() == FILES | EPOCHS
    assert Image.open(finished / "samples.gif").n_frames == 3

def test_log_has_a_row_an_epoch_with_significant_digits(finished):
    with open(finished / "log.csv") as file:
        rows = list(csv.DictReader(file))
    saved = checkpoint(finished)
    assert [row["step"] for row in rows] == ["5", "10", "15"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert saved["losses"].shape == (15, 4)
    names = "loss_d", "loss_g", "D(x)", "D(G(z))"
    means = [float(rows[2][name]) for name in names]
    assert means == pytest.approx(saved["losses"][10:].mean(0).tolist(), rel=1e-3)

def test_lines_are_printed_each_interval_and_epoch(pictures, monkeypatch, capsys):
    tiny = torch.tensor([0.00012345, 1, 0.5, 0.5])
    replace(monkeypatch, "train_step", lambda *args, **options: tiny)
    run("--data", pictures, *SMALL, "--epochs", 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split()[3] for line in lines] == "2 4 5 6 8 10".split()
    assert all("loss_d 0.0001234 loss_g 1.0 " in line for line in lines)
    assert ["frechet" in line for line in lines] == [False, False, True] * 2

def test_flags_reach_what_they_are_for(pictures, monkeypatch):
    names = "decode", "batches", "train_step", "update_average"
    decoded, batched, steps, averaged = [record(monkeypatch, name) for name in names]
    run("--data", pictures, *SMALL, "--epochs", 1, *"""--crop 30 --seed 7 --slope-g 0 --ema 0.5
        --lr-g 0.1 --lr-d 0.2 --beta1 0.3 --precision bf16 --fresh-noise --flip-labels 0.5""".split())
    assert {args[1:] for args, _ in decoded} == {(32, 30)}
    assert batched[0][0][1:] == (8, 1, 7, 0, torch.device("cpu"), 0, 1)
    (G, D, *optimizers, _), options = steps[0]
    assert G[1][2].negative_slope == 0
    assert D[1].negative_slope == 0.2
    for optimizer, net, rate in zip(optimizers, (G, D), (0.1, 0.2)):
        [group] = optimizer.param_groups
        assert isinstance(optimizer, torch.optim.Adam)
        assert group["params"] == list(net.parameters())
        assert (group["lr"], group["betas"], group["fused"]) == (rate, (0.3, 0.999), True)
    seeds = [options.pop("rng").initial_seed() for _, options in steps]
    assert seeds == [dcgan.seed_of("noise", 7, step, 0) for step in range(1, 6)]
    assert options == {"bf16": True, "fresh_noise": True, "flip_labels": 0.5}
    assert [args[1:] for args, _ in averaged] == [(G, 0.5, step) for step in range(1, 6)]

def test_a_run_begins_with_the_weights_of_its_seed_and_may_use_sgd(monkeypatch):
    steps = record(monkeypatch, "train_step")
    run("--data", "toy", *SMALL, "--batch-size", 4096, "--epochs", 1, "--seed", 7,
        "--optimizer-d", "sgd", "--lr-g", 0, "--lr-d", 0)
    G, D, _, optimizer_d, _ = steps[0][0]
    assert isinstance(optimizer_d, torch.optim.SGD)
    for net, expected in zip((G, D), networks(seed=7)):
        assert same(list(net.parameters()), list(expected.parameters()))
        assert net[-2].weight.is_contiguous(memory_format=torch.channels_last) or True

def test_average_follows_the_generator_and_is_it_when_off(finished, pictures):
    run("--data", pictures, "--epochs", 3, "--ema", 0, *SMALL)
    off, on = checkpoint(), checkpoint(finished)
    assert same(off["G"], on["G"])
    assert same(off["ema"], off["G"])
    first, last = networks(seed=42)[0][1][0].weight, on["G"]["1.0.weight"]
    assert 0 < (on["ema"]["1.0.weight"] - last).norm() < 0.7 * (first - last).norm()

def test_the_average_is_drawn_and_measured(finished, pictures):
    saved = checkpoint(finished)
    G = dcgan.Generator(**saved["config"]).eval()
    G.load_state_dict(saved["ema"])
    fakes = dcgan.sample(G, saved["fixed_noise"])
    dcgan.save_image(fakes[:64] / 255, "grid.png")
    assert Path("grid.png").read_bytes() == (finished / "samples/epoch_003.png").read_bytes()
    row, measures = saved["rows"][-1], dcgan.compare(fakes, dcgan.load_images(pictures, 32))
    assert (row["frechet"], row["diversity"]) == pytest.approx(measures, rel=1e-3)

@pytest.mark.parametrize("step", [3, 7, 10])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_and_resume_as_if_nothing_had_been(step, signum, finished, pictures, monkeypatch):
    assert stop_at_step(step, pictures, monkeypatch, signum) == 128 + signum
    assert checkpoint()["step"] == step
    run("--resume", "--epochs", 3)          # remembers --data
    assert same(contents(), contents(finished))         # bit for bit

KILLED = """if True:
    import os, runpy, sys, torch
    backward, calls = torch.Tensor.backward, []
    def killed_in_step_7(*args, **options):
        calls.append(None)
        return os.kill(os.getpid(), 9) if len(calls) == 13 else backward(*args, **options)
    torch.Tensor.backward = killed_in_step_7
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")"""

@pytest.mark.skipif(os.name == "nt", reason="no such signal on Windows")
def test_kill_and_resume_also_with_names_that_cannot_be_printed(finished, pictures, monkeypatch):
    Path("人脸").symlink_to(pictures)
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    argv = ["--data", "人脸", "--epochs", "2", *SMALL]
    ended = subprocess.run([sys.executable, "-c", KILLED, dcgan.__file__, *argv], capture_output=True)
    assert ended.returncode == -9
    assert b"??: 40 pictures" in ended.stdout
    assert checkpoint()["step"] == 5
    run("--resume", "--epochs", 3, "--data", pictures)          # the same ones by another name
    assert same(contents(), contents(finished))

def test_second_interrupt_ends_at_once_and_handlers_are_put_back(pictures, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    former = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    at_step(monkeypatch, 7, twice)
    assert "interrupted" in error_of("--data", pictures, "--epochs", 2, *SMALL)
    assert checkpoint()["step"] == 5
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == former

def test_interrupt_that_ends_the_reader_of_the_output_too(pictures, monkeypatch):
    """As Ctrl-C does after `dcgan.py | tee log`."""
    class Gone:
        def write(self, text):
            raise BrokenPipeError

    def interrupt():
        monkeypatch.setattr(sys, "stdout", Gone())
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 6, interrupt)          # a step with a line
    with pytest.raises(SystemExit) as stop:
        run("--data", pictures, "--epochs", 2, *SMALL)
    assert stop.value.code == 130
    assert checkpoint()["step"] == 6

@pytest.mark.parametrize("where", ["losses", "generator", "discriminator"])
def test_what_is_not_finite_ends_the_run_and_is_not_saved(where, pictures, monkeypatch):
    def broken(i, original, G, D, *args, **options):
        losses = original(G, D, *args, **options)
        if i == 10:         # the last of an epoch
            first = {"losses": losses, "generator": next(G.parameters()),
                     "discriminator": next(D.parameters())}[where]
            first.detach().fill_(float("nan"))
        return losses

    replace(monkeypatch, "train_step", broken)
    assert "not finite at step 10" in error_of("--data", pictures, "--epochs", 3, *SMALL)
    assert checkpoint()["step"] == 5

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   OSError(errno.ENOSPC, "No space left on device")])
def test_full_memory_or_disk_is_one_line_and_keeps_the_last_checkpoint(error, pictures, monkeypatch):
    def full(i, original, *args, **options):
        if i == 3:          # after best.pt and checkpoint.pt of the first epoch
            raise error
        original(*args, **options)

    replace(monkeypatch, "save", full, owner=torch)
    assert error.args[-1] in error_of("--data", pictures, "--epochs", 2, *SMALL)
    assert checkpoint()["step"] == 5
    assert not list(Path("out").glob("*.part"))

def test_folder_without_a_checkpoint_is_no_run(finished, pictures):
    Path("out").mkdir()
    Path("out/best.pt").write_bytes((finished / "best.pt").read_bytes())
    run("--data", pictures, "--epochs", 3, *SMALL)
    assert same(contents(), contents(finished))

def test_a_run_is_not_trained_over(finished, pictures):
    before = contents(finished)
    assert "holds a run" in error_of("--data", pictures, "--out", finished, *SMALL)
    for flag in ("--width", "--batch-size", "--seed"):
        line = error_of("--resume", "--out", finished, flag, 4)
        assert f"this run has {flag} {42 if flag == '--seed' else 8}" in line
    assert same(contents(finished), before)

def test_resume_with_another_number_of_pictures_is_refused(finished, pictures):
    write_archive("one.zip", **{f"{i}.png": encoded(RED, "PNG") for i in range(41)})
    line = error_of("--resume", "--out", finished, "--data", "one.zip")
    assert "41 readable pictures, but the run began with 40" in line

def measure(monkeypatch, *distances):
    """Let the epochs' ends find these, whatever the pictures."""
    values = iter(distances)
    monkeypatch.setattr(dcgan, "compare", lambda *args: (next(values), 1.0))

def test_the_best_epoch_is_kept_and_drawn(finished, pictures, monkeypatch, capsys):
    measure(monkeypatch, 30, 20, 25)
    stop_at_step(12, pictures, monkeypatch, epochs=3)
    run("--resume")
    assert same(checkpoint()["ema"], checkpoint(finished)["ema"])
    best = checkpoint(name="best.pt")
    assert best["step"] == 10
    measure(monkeypatch, 0, 0)
    run("--data", pictures, "--epochs", 2, "--out", "two", *SMALL)
    assert same(best["ema"], checkpoint("two")["ema"])
    assert checkpoint("two", "best.pt")["step"] == 5            # of equal ones, the first
    capsys.readouterr()
    run("--generate", 3)
    assert capsys.readouterr().out.startswith("epoch 2: 3 pictures in ")

def generate(*argv):
    run("--out", ".", "--generate", *argv)
    return contents("generated")

def test_generate_draws_the_same_pictures_again_and_removes_only_its_own(finished, monkeypatch):
    Path("best.pt").write_bytes((finished / "best.pt").read_bytes())
    first, grid = generate(70), Path("generated.png").read_bytes()
    Path("generated/mine.png").write_text("precious")
    assert len(generate(5)) == 6
    assert len(generate(5, "--seed", 7).items() - first.items()) == 6
    assert generate(70) == first | {"mine.png": b"precious"}
    assert Path("generated.png").read_bytes() == grid

    saved = checkpoint(".", "best.pt")
    G = dcgan.Generator(**saved["config"]).eval()
    G.load_state_dict(saved["ema"])
    torch.manual_seed(42)
    images = dcgan.sample(G, torch.randn(86, 100))[16:]         # behind the walk's ends
    for i in (0, 69):
        drawn = pil_to_tensor(Image.open(f"generated/{i + 1:06d}.png"))
        torch.testing.assert_close(drawn, images[i], atol=1, rtol=0)
    dcgan.save_image(images[:64] / 255, "grid.png")
    assert Path("grid.png").read_bytes() == grid
    monkeypatch.setattr(dcgan, "RANK", 1)
    assert len(generate(9)) == 71       # of several processes, only the first one writes

def test_walk_goes_in_small_steps_from_one_picture_to_another(finished):
    Path("best.pt").write_bytes((finished / "best.pt").read_bytes())
    generate(1)
    walk = pil_to_tensor(Image.open("walk.png")).float()[:, 2:, 2:]
    rows = walk.unfold(1, 32, 34).unfold(2, 32, 34).permute(1, 2, 0, 3, 4).flatten(2)
    assert rows.shape == (8, 8, 3 * 32 * 32)
    way = (rows[:, 7] - rows[:, 0]).norm(dim=1)
    steps = (rows[:, 1:] - rows[:, :-1]).norm(dim=2)
    assert (way > 1.5 * steps.max(dim=1).values).all()
    assert (steps > 0).all()
    assert (torch.cdist(rows[:, 0], rows[:, 0]) > 0).sum() == 8 * 7

HEALTHY = {"epoch": 1, "step": 301, "frechet": 30, "diversity": 0.51}

@pytest.mark.parametrize("changes, distances, fake_score, told", [
    ({}, [30], 0.051, []),
    ({"diversity": 0.49}, [30], 0.051, ["collapses"]),
    ({"diversity": 0.1, "step": 300}, [30], 0.051, []),         # too early to tell
    ({}, [30], 0.049, ["has won"]),
    ({"diversity": 0.49}, [30], 0.049, ["collapses", "has won"]),
    ({}, [40, 20] + 4 * [30], 1, []),           # not for long enough
    ({}, [40, 20] + 5 * [23], 1, ["past its best, epoch 2,"]),
    ({}, [40, 20] + 4 * [30] + [21], 1, []),    # not clearly
    ({}, [40, 20] + 5 * [30] + [19], 1, []),
])
def test_troubles(changes, distances, fake_score, told):
    rows = [HEALTHY | changes | {"epoch": epoch, "frechet": distance}
            for epoch, distance in enumerate(distances, 1)]
    troubles = list(dcgan.find_troubles(rows, fake_score))
    assert len(troubles) == len(told)
    assert all(words in trouble for words, trouble in zip(told, troubles))

def test_run_warns_after_each_epoch(pictures, monkeypatch, capsys):
    scores = iter([0.01] * 39 + [0.5] + [0.01] * 280)         # has not won in the first epoch
    monkeypatch.setattr(dcgan, "compare", lambda *args: (100, 0.1))
    replace(monkeypatch, "train_step", lambda *args, **options: torch.tensor([0.5, 1, 0.5, next(scores)]))
    run("--data", pictures, *SMALL, "--epochs", 8, "--batch-size", 1)
    out = capsys.readouterr().out
    assert out.count("warning: the discriminator has won") == 7
    assert out.count("warning: the generator collapses") == 1

# ---- Several processes ---------------------------------------------------------------------------
def watched_run(*argv):
    """A process of torchrun: keep what each step had and made; only the first one may write."""
    seen = []

    def step(i, original, G, D, *args, **options):
        losses = original(G, D, *args, **options)
        seen.append([args[2], options["rng"].initial_seed(), D[0].weight.grad.clone(),
                     *map(torch.clone, (*G.parameters(), *D.parameters()))])
        return losses

    with pytest.MonkeyPatch.context() as patch:
        replace(patch, "train_step", step)
        if dcgan.RANK > 0:
            dcgan.save_image = dcgan.csv = dcgan.animate = dcgan.Run.save = dcgan.write_cache = None
        run(*argv)
    torch.save(seen, f"seen{dcgan.RANK}")

def test_two_processes_share_a_run_which_one_resumes(pictures, monkeypatch):
    argv = ["--data", pictures, "--epochs", "2", *SMALL]
    watched_run(*argv, "--out", "one")
    one = torch.load("seen0")
    context, processes = torch.multiprocessing.get_context("spawn"), []
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}.items():
        monkeypatch.setenv(name, value)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        processes.append(context.Process(target=watched_run, args=(*argv, "--out", "two")))
        processes[-1].start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    first, second = torch.load("seen0"), torch.load("seen1")
    assert one[0][2].norm() / first[0][2].norm() == pytest.approx(1, abs=0.3)       # mean gradient
    for (batch, *_), (a, seed_a, *state_a), (b, seed_b, *state_b) in zip(one, first, second, strict=True):
        assert torch.equal(torch.stack([a, b], 1).flatten(0, 1), batch)
        assert seed_a != seed_b         # of the noise
        assert same(state_a, state_b)
    run("--resume", "--epochs", 3, "--out", "two")
    assert contents("two").keys() == FILES | EPOCHS
    assert checkpoint("two")["step"] == 15

# ---- The command line ----------------------------------------------------------------------------
@pytest.mark.parametrize("argv, told", [
    ("--image-size 65", "invalid choice: 65"),
    ("--batch-size 0", "0 is not from 1"),
    ("--beta1 1", "1 is not from 0 to 0.999"),
    ("--ema nan", "nan is not"),
    ("--seed 4294967296", "4294967296 is not"),
    ("--lr-d -1", "-1 is not"),
    ("--epochs x", "invalid"),
    ("--last", "unrecognized"),
])
def test_wrong_flag_is_argparses_error(argv, told, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--data", "toy", *argv.split())
    assert stop.value.code == 2
    assert told in capsys.readouterr().err

@pytest.mark.parametrize("argv, told", [
    ("--batch-size 41", "40 readable pictures, fewer than --batch-size 41"),
    ("--generate 3", "best.pt"),
    ("--resume", "No such file"),
    ("--resume --out bad", "bad/checkpoint.pt is no checkpoint of this version"),
    ("--resume --out older", "KeyError"),
    ("--resume --out code", "Weights only load failed"),
    ("--out page.zip/out", "Not a directory"),
    ("--data page.zip", "not a zip file"),
    ("--data broken.zip", "Bad magic number"),
    ("--data bad", "no picture can be read"),
    ("--data nowhere", "No such file"),
])
def test_bad_input_is_one_line(argv, told, pictures):
    for folder in ("bad", "older", "code"):
        Path(folder).mkdir()
    torch.save({"settings": {}, "generator": {}}, "older/checkpoint.pt")
    torch.save({"settings": {}, "config": Path()}, "code/checkpoint.pt")         # only weights are loaded
    for file in ("bad/x.csv", "bad/checkpoint.pt", "page.zip"):
        Path(file).write_text("<html>")
    write_archive("broken.zip", **{"a.jpg": encoded(RED)})
    broken = Path("broken.zip").read_bytes().replace(b"PK\x01\x02", b"PK\0\0")
    Path("broken.zip").write_bytes(broken)
    assert told in error_of("--data", pictures, *SMALL, *argv.split())

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_train_resume_and_generate(device, pictures):
    run("--data", pictures, "--epochs", 1, *SMALL, "--device", device)
    run("--resume", "--epochs", 2)
    run("--generate", 3)
    assert checkpoint()["step"] == 10
    assert checkpoint()["settings"]["device"] == device
    assert len(contents("out/generated")) == 3
