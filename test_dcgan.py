# SPDX-License-Identifier: MIT
"""Tests of dcgan.py: `pytest`, under a minute on two cores, no network, no GPU needed."""
import csv
import io
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms

import dcgan

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
SCRIPT = Path(dcgan.__file__)
SMALL = ["--image-size", "32", "--width", "8", "--batch-size", "8", "--log-interval", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def restore(monkeypatch, tmp_path):
    """Every test works in a folder of its own; train() leaves signal handlers behind, put them back."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 40 small pictures: 5 steps an epoch at batch 8."""
    folder = tmp_path_factory.mktemp("data") / "faces"
    folder.mkdir()
    for i, image in enumerate(dcgan.toy_faces(40, 32)):
        transforms.functional.to_pil_image(image).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def finished(pictures, tmp_path_factory):
    """The folder of a run of three epochs that nothing interrupted."""
    out = tmp_path_factory.mktemp("run") / "out"
    dcgan.main(["--data", str(pictures), "--epochs", "3", "--out", str(out), *SMALL])
    return out


def fails(capsys, *argv):
    """The one line on standard error with which a command line fails with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        dcgan.main([str(a) for a in argv])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith("dcgan.py: error: ")
    return lines[0]


def jpeg(size=(178, 218), color=(200, 100, 50), mode="RGB", **options):
    data = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(data, "JPEG", **options)
    return data.getvalue()


def networks(image_size=32, width=8, seed=0):
    torch.manual_seed(seed)
    return (dcgan.Generator(width=width, image_size=image_size),
            dcgan.Discriminator(width=width, image_size=image_size))


# ---- networks ------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, G_count, D_count", [
    (32, 1_068_931, 663_361), (64, 3_576_707, 2_765_633),
    (128, 7_772_035, 6_960_961), (256, 11_967_363, 11_156_289)])
def test_shapes_and_parameter_counts(size, G_count, D_count):
    G, D = networks(size, width=64)
    images = G(torch.randn(2, 100))
    assert images.shape == (2, 3, size, size) and D(images).shape == (2, 1)
    assert sum(p.numel() for p in G.parameters()) == G_count
    assert sum(p.numel() for p in D.parameters()) == D_count


def test_layers_follow_the_paper():
    G, D = networks(64, width=16)
    assert -1 <= G(torch.randn(4, 100) * 50).min() and G(torch.randn(4, 100) * 50).max() <= 1
    assert isinstance(list(G)[-1], nn.Tanh)
    for net, norms in ((G, 4), (D, 3)):
        layers = list(net)
        assert not any(isinstance(m, (nn.Linear, nn.MaxPool2d, nn.AvgPool2d)) for m in layers)
        assert sum(isinstance(m, nn.BatchNorm2d) for m in layers) == norms
        for layer, after in zip(layers, layers[1:]):
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                assert layer.kernel_size == (4, 4)
                assert (layer.bias is None) == isinstance(after, nn.BatchNorm2d)
                assert abs(layer.weight.std() - 0.02) < 0.002
            if isinstance(layer, nn.BatchNorm2d):
                assert 0.9 < layer.weight.mean() < 1.1 and 0 < layer.weight.std() < 0.04
            if isinstance(layer, nn.LeakyReLU):
                assert layer.negative_slope == 0.2
    assert any(isinstance(m, nn.ReLU) for m in dcgan.Generator(relu=True))
    assert not any(isinstance(m, nn.ReLU) for m in G)


# ---- the step ------------------------------------------------------------------------------------

@pytest.mark.parametrize("fresh_noise", [False, True])
def test_step_is_the_two_gradient_steps_of_the_lecture(fresh_noise):
    """Against a step written out plainly, in eager fp32, with SGD so that updates are gradients."""
    G, D = networks()
    real = dcgan.to_batch(dcgan.toy_faces(8, 32), torch.arange(8))
    expected_G, expected_D = networks()
    rng = torch.Generator().manual_seed(1)
    torch.rand(2, 8, 1, generator=rng)      # the step draws the labels to flip first
    fake = expected_G(torch.randn(8, 100, generator=rng))
    loss_d = (F.softplus(-expected_D(real)).mean() + F.softplus(expected_D(fake.detach())).mean()) / 2
    for p, grad in zip(list(expected_D.parameters()), torch.autograd.grad(loss_d, [*expected_D.parameters()])):
        p.data -= 0.1 * grad
    if fresh_noise:
        fake = expected_G(torch.randn(8, 100, generator=rng))
    loss_g = F.softplus(-expected_D(fake)).mean()
    for p, grad in zip(list(expected_G.parameters()), torch.autograd.grad(loss_g, [*expected_G.parameters()])):
        p.data -= 0.1 * grad

    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (G, D)]
    losses = dcgan.train_step(G, D, *optimizers, real, rng=torch.Generator().manual_seed(1), fresh_noise=fresh_noise)
    torch.testing.assert_close(losses[:2], torch.stack([loss_d, loss_g]).detach())
    for net, expected in ((G, expected_G), (D, expected_D)):
        for p, q in zip(net.parameters(), expected.parameters()):
            torch.testing.assert_close(p, q)
    assert not losses.requires_grad and all(p.requires_grad for p in D.parameters())


@pytest.mark.parametrize("learns", ["generator", "discriminator"])
def test_an_update_leaves_the_other_network_alone(learns):
    G, D = networks()
    before = [[p.clone() for p in net.parameters()] for net in (G, D)]
    rates = (0.1, 0.0) if learns == "generator" else (0.0, 0.1)
    optimizers = [torch.optim.SGD(net.parameters(), rate) for net, rate in zip((G, D), rates)]
    dcgan.train_step(G, D, *optimizers, torch.rand(8, 3, 32, 32) * 2 - 1)
    for net, old, rate in zip((G, D), before, rates):
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), old)) == (rate == 0)


def mean_labels(n=10_000, **tricks):
    """Mean label of the real and of the fake images, read off the loss: linear in the label."""
    class D(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits, self.calls = nn.Parameter(torch.tensor([2.0, -3.0])), []

        def forward(self, images):
            self.calls.append(len(images))
            return self.logits[len(self.calls) % 2 - 1].expand(len(images), 1) + 0 * images

    labels = []
    for logits in ([2.0, 0.0], [0.0, 2.0]):     # a logit of 0 costs log 2 whatever the label
        G, D_ = nn.Linear(4, 1), D()
        D_.logits.data = torch.tensor(logits)
        loss_d = dcgan.train_step(G, D_, torch.optim.SGD(G.parameters(), 0), torch.optim.SGD(D_.parameters(), 0),
                                  torch.zeros(n, 1), 4, rng=torch.Generator().manual_seed(0), **tricks)[0]
        assert D_.calls == [n, n, n]            # real and fake never share a batch
        labels.append(((2 * loss_d - torch.log(torch.tensor(2.0)) - F.softplus(torch.tensor(2.0))) / -2).item())
    return labels


@pytest.mark.parametrize("tricks, real, fake", [
    ({}, 1, 0), ({"label_smoothing": 0.1}, 0.9, 0), ({"flip_labels": 1.0}, 0, 1),
    ({"flip_labels": 0.25}, 0.75, 0.25), ({"flip_labels": 0.25, "label_smoothing": 0.2}, 0.6, 0.2)])
def test_labels_of_each_trick(tricks, real, fake):
    assert mean_labels(**tricks) == pytest.approx([real, fake], abs=0.02 if "flip_labels" in tricks else 1e-5)


def test_flip_mirrors_about_half():
    images = torch.arange(4, dtype=torch.uint8).expand(200, 3, 4, 4).contiguous()
    plain = dcgan.to_batch(images, torch.arange(200))
    flipped = dcgan.to_batch(images, torch.arange(200), flip=True, rng=torch.Generator().manual_seed(0))
    mirrored = (flipped[:, 0, 0, 0] != plain[:, 0, 0, 0])
    assert 70 < mirrored.sum() < 130
    torch.testing.assert_close(flipped[mirrored], plain[mirrored].flip(3))
    torch.testing.assert_close(plain[0, 0, 0], torch.arange(4) / 127.5 - 1)


@pytest.mark.parametrize("device, bf16", [("cpu", True), pytest.param("cuda", True, marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here"))])
def test_one_training_step_smoke(device, bf16):
    G, D = (net.to(device, memory_format=torch.channels_last) for net in networks(64, width=16))
    optimizers = [torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999), fused=True) for net in (G, D)]
    batch = dcgan.to_batch(dcgan.toy_faces(8), torch.arange(8), device)
    before = [p.clone() for p in (*G.parameters(), *D.parameters())]
    losses = dcgan.train_step(G, D, *optimizers, batch, bf16=bf16)
    assert losses.device.type == device and losses.isfinite().all()
    for p, q in zip((*G.parameters(), *D.parameters()), before):
        assert p.dtype == torch.float32 and p.isfinite().all() and not torch.equal(p, q)


def test_a_small_network_learns_toy_faces():
    real = dcgan.toy_faces(1024, 32)
    G, D = networks(width=16)
    optimizers = [torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.999)) for net in (G, D)]
    latents, rng = torch.randn(512, 100), torch.Generator().manual_seed(0)
    before, _ = dcgan.compare(dcgan.sample(G.eval(), latents), real)
    G.train()
    for _ in range(120):
        dcgan.train_step(G, D, *optimizers, dcgan.to_batch(real, torch.randint(1024, (32,), generator=rng)), rng=rng)
    after, spread = dcgan.compare(dcgan.sample(G.eval(), latents), real)
    assert after < before / 2 and spread > 0.6      # measured: 117 to 131 of 400, and 1.0


def test_measures():
    a, b = dcgan.toy_faces(1024, 32).split(512)
    near, spread = dcgan.compare(a, b)
    far, none = dcgan.compare(a[:1].expand(512, -1, -1, -1), b)
    assert dcgan.compare(a, a)[0] == 0 and near < 50 < 300 < far
    assert 0.9 < spread < 1.1 and none < 0.01


# ---- data ----------------------------------------------------------------------------------------

def test_preparation_equals_the_lectures(monkeypatch):
    """CelebA's 178 x 218: CenterCrop(160), then an antialiased resize, as torchvision does it."""
    noise = torch.randint(0, 256, (27, 22, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = io.BytesIO()
    Image.fromarray(noise.numpy()).resize((178, 218)).save(data, "JPEG", quality=90)
    lecture = transforms.Compose([transforms.CenterCrop(160), transforms.Resize(64), transforms.PILToTensor()])
    expected = lecture(Image.open(data).convert("RGB"))
    for decoder in ("torchvision", "Pillow"):
        if decoder == "Pillow":
            monkeypatch.delattr(dcgan.io, "decode_jpeg", raising=False)
        got = dcgan.decode(data.getvalue())
        assert got.dtype == torch.uint8 and (got.int() - expected.int()).abs().max() <= 3
        assert (dcgan.decode(data.getvalue(), crop=100).int() - got.int()).abs().float().mean() > 5
    wide = Image.new("RGB", (90, 30), "red")        # anything else: the largest centred square
    wide.paste("blue", (30, 0, 60, 30))
    data = io.BytesIO()
    wide.save(data, "PNG")
    assert (dcgan.decode(data.getvalue(), 32) == torch.tensor([0, 0, 255]).view(3, 1, 1)).all()


def test_folder_of_odd_pictures(tmp_path, capsys):
    folder = tmp_path / "odd" / "a" / "b"
    folder.mkdir(parents=True)
    grey16 = Image.fromarray((torch.full((40, 40), 32768, dtype=torch.int32)).numpy().astype("uint16"))
    for name, image in {
            "grey.png": Image.new("L", (40, 50), 128), "palette.png": Image.new("RGB", (40, 40), "red").convert("P"),
            "alpha.png": Image.new("RGBA", (40, 40), (9, 8, 7, 128)), "cmyk.jpg": Image.new("CMYK", (40, 40)),
            "grey16.png": grey16, "grey16.tif": grey16, "dot.png": Image.new("RGB", (1, 1), "red"),
            "UPPER.JPG": Image.new("RGB", (300, 20), "green"), "bits.bmp": Image.new("1", (40, 40), 1)}.items():
        image.save(folder / name)
    rotated, exif = Image.new("RGB", (40, 40), "black"), Image.Exif()
    rotated.paste("white", (0, 0, 40, 20))          # white above; the tag says: turn by 90 degrees
    exif[0x0112] = 6
    rotated.save(folder / "rotated.jpg", exif=exif, quality=100)
    (folder / "broken.jpg").write_bytes(jpeg()[:500])
    (folder / "empty.png").write_bytes(b"")
    for junk in (".hidden.png", "._grey.png", "notes.csv"):
        (folder / junk).write_bytes(jpeg())
    (tmp_path / "odd" / ".cache").mkdir()
    (tmp_path / "odd" / ".cache" / "x.jpg").write_bytes(jpeg())
    source, names = dcgan.find_pictures(tmp_path / "odd")
    images = dcgan.load_images(tmp_path / "odd", 32)
    err = capsys.readouterr().err
    assert images.shape == (10, 3, 32, 32) and images.dtype == torch.uint8
    assert len(names) == 12 and err.count("skipped") == 2 and "broken.jpg" in err and "empty.png" in err
    by_name = dict(zip([Path(n).name for n in names if not n.endswith(("broken.jpg", "empty.png"))], images))
    for name in ("grey16.png", "grey16.tif", "grey.png"):
        assert (by_name[name] == 128).all(), name
    assert (by_name["palette.png"][0] > 200).all() and (by_name["palette.png"][1:] < 50).all()
    assert by_name["alpha.png"].flatten(1).float().mean(1).tolist() == [9, 8, 7]
    assert (by_name["cmyk.jpg"] > 250).all() and (by_name["dot.png"][0] == 255).all()
    assert (by_name["rotated.jpg"][:, :, 20:] > 200).all() and (by_name["rotated.jpg"][:, :, :12] < 50).all()


@pytest.fixture
def celeba(monkeypatch):
    """CelebA shrunk: ten pictures of which the first six are for training."""
    monkeypatch.setattr(dcgan, "CELEBA_PICTURES", 10)
    monkeypatch.setattr(dcgan, "CELEBA_TRAIN", 6)
    return {f"{i:06d}.jpg": jpeg(color=(20 * i, 0, 0)) for i in range(1, 11)}


@pytest.mark.parametrize("layout", ["folder", "nested folder", "zip", "zip elsewhere"])
def test_celeba_as_it_is_found(celeba, layout):
    folder = Path("data/celeba")
    if "zip" in layout:
        path = folder / "img_align_celeba.zip" if layout == "zip" else Path("archive.zip")
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in celeba.items():
                archive.writestr(f"img_align_celeba/img_align_celeba/{name}", data)
                archive.writestr(f"__MACOSX/img_align_celeba/._{name}", b"junk")
            archive.writestr("list_attr_celeba.csv", "a,b")
    else:
        path = folder / ("x/img_align_celeba" if "nested" in layout else "img_align_celeba")
        path.mkdir(parents=True)
        (folder / "list_eval_partition.csv").write_text("a,b")
        for name, data in celeba.items():
            (path / name).write_bytes(data)
    images = dcgan.load_images(path if "elsewhere" in layout else "data/celeba")
    assert images.shape == (6, 3, 64, 64)
    assert images[:, 0].float().mean((1, 2)).tolist() == pytest.approx([20 * i for i in range(1, 7)], abs=3)


def test_incomplete_celeba_means_all_pictures(celeba):
    Path("some").mkdir()
    for name in list(celeba)[:9]:
        Path("some", name).write_bytes(celeba[name])
    assert len(dcgan.load_images("some")) == 9


def test_celebas_numbers():
    assert (dcgan.CELEBA_PICTURES, dcgan.CELEBA_TRAIN) == (202_599, 162_770)
    assert dcgan.CELEBA_MD5 == "00d2c5bc6d35e252742224ab0c1e8fcb" and dcgan.CELEBA_ZIP == "img_align_celeba.zip"


def test_cache_is_used_and_thrown_away(monkeypatch, capsys):
    folder, cache = Path("faces"), Path("faces.dcgan.pt")
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(jpeg(color=(0, 60 * i, 0)))
    first, decoded = dcgan.load_images(folder, 32), []
    decode = dcgan.decode
    monkeypatch.setattr(dcgan, "decode", lambda *args: decoded.append(1) or decode(*args))

    def decodes(*args):
        decoded.clear()
        return dcgan.load_images(folder, *args), len(decoded)

    again, count = decodes(32)
    assert count == 0 and torch.equal(again, first) and cache.exists()
    assert decodes(64)[1] == 3 and decodes(64)[1] == 0 and decodes(64, 100)[1] == 3      # size, crop
    (folder / "1.jpg").write_bytes(jpeg(color=(0, 0, 99)))
    assert decodes(64, 100)[1] == 3                                             # a picture changed
    (folder / "3.jpg").write_bytes(jpeg())
    assert len(decodes(64, 100)[0]) == 4                                        # one came
    cache.write_bytes(cache.read_bytes()[:1000])
    assert decodes(64, 100)[1] == 4                                             # damaged
    cache.unlink()
    cache.mkdir()                                                               # cannot be written
    capsys.readouterr()
    assert decodes(64)[0].shape == (4, 3, 64, 64) and "no cache" in capsys.readouterr().err
    assert [p.name for p in Path().iterdir() if "tmp" in p.name] == []


def broken_download(kind):
    def download(file_id, root, filename, md5=None):
        assert file_id == "0B7EVK8r0v71pZjFTYXZWM3FlRnM"
        if kind == "no network":
            raise ConnectionError("Network is unreachable")
        with zipfile.ZipFile(Path(root, filename), "w") as archive:
            archive.writestr("000001.jpg", jpeg())
        if kind == "html":
            Path(root, filename).write_text("<!DOCTYPE html><title>Google Drive - Quota exceeded</title>")
        if kind == "cut off":
            Path(root, filename).write_bytes(Path(root, filename).read_bytes()[:-30])
    return download


@pytest.mark.parametrize("kind, told", [("no network", "Network is unreachable"), ("html", "web page"),
                                        ("cut off", "cut off"), ("wrong md5", "MD5"), ("no gdown", "gdown")])
def test_download_that_fails(kind, told, monkeypatch, capsys):
    if kind == "no gdown":
        monkeypatch.setitem(sys.modules, "gdown", None)
    else:
        monkeypatch.setattr(dcgan.datasets.utils, "download_file_from_google_drive", broken_download(kind))
    line = fails(capsys, *SMALL)
    for text in (told, "img_align_celeba.zip", "data/celeba", "--data toy", "--data FOLDER"):
        assert text in line
    assert list(Path("data/celeba").iterdir()) == []


def test_download_that_works(monkeypatch, celeba):
    monkeypatch.setattr(dcgan.datasets.utils, "download_file_from_google_drive", broken_download("none"))
    monkeypatch.setattr(dcgan.datasets.utils, "check_integrity", lambda path, md5: md5 == dcgan.CELEBA_MD5)
    assert dcgan.load_images("data/celeba").shape == (1, 3, 64, 64)


def test_a_bad_archive_of_the_users_is_told_and_kept(capsys):
    archive = Path("data/celeba/img_align_celeba.zip")
    archive.parent.mkdir(parents=True)
    archive.write_text("  <html>Quota exceeded</html>")
    line = fails(capsys, *SMALL)
    assert "web page" in line and str(archive) in line and "--data toy" in line and archive.exists()


def test_toy_faces_differ_and_repeat():
    faces = dcgan.toy_faces(64, 128)
    assert faces.shape == (64, 3, 128, 128) and torch.equal(faces, dcgan.toy_faces(64, 128))
    assert torch.pdist(faces.flatten(1).float()).min() > 1000


# ---- the run -------------------------------------------------------------------------------------

def same(a, b):
    """Whether two nested checkpoints hold the same numbers, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(out, finished):
    assert same(*(torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (out, finished)))
    files = {file.relative_to(finished) for file in finished.rglob("*.*")} - {Path("checkpoint.pt")}
    assert {file.relative_to(out) for file in out.rglob("*.*")} - {Path("checkpoint.pt")} == files
    for file in files:
        assert (out / file).read_bytes() == (finished / file).read_bytes(), file


def test_what_a_run_leaves(finished, pictures, capsys):
    names = {str(file.relative_to(finished)) for file in finished.rglob("*.*")}
    assert names == {"real.png", "samples/epoch_001.png", "samples/epoch_002.png", "samples/epoch_003.png",
                     "samples.gif", "losses.png", "log.csv", "checkpoint.pt"}
    with open(finished / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    assert [row["step"] for row in rows if row["swd"]] == ["5", "10", "15"] and float(rows[-1]["diversity"]) >= 0
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert checkpoint["history"].shape == (15, 4) and checkpoint["step"] == 15
    assert [float(rows[-1][c]) for c in ("loss_d", "loss_g")] == pytest.approx(checkpoint["history"][-1, :2].tolist(), abs=1e-4)
    assert Image.open(finished / "samples.gif").n_frames == 3
    assert Image.open(finished / "samples/epoch_001.png").size == (8 * 34 + 2, 8 * 34 + 2)
    curves = Image.open(finished / "losses.png").convert("RGB").getcolors(1 << 24)
    assert sum(n for n, (r, g, b) in curves if b > r + 60) > 100 < sum(n for n, (r, g, b) in curves if r > b + 60)


def test_ctrl_c_in_an_epoch_and_resume(finished, pictures, monkeypatch, capsys):
    step, calls = dcgan.train_step, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 8:     # in the second epoch, off the logged steps by one
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **options)

    monkeypatch.setattr(dcgan, "train_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        dcgan.main(["--data", str(pictures), "--epochs", "3", *SMALL])
    assert stop.value.code == 130 and torch.load("out/checkpoint.pt", weights_only=True)["step"] in (7, 8)
    assert "--resume" in capsys.readouterr().out
    dcgan.main(["--resume", "--device", "cpu"])
    assert_same_run(Path("out"), finished)


def test_kill_and_resume(finished, pictures):
    command = [sys.executable, str(SCRIPT), "--data", str(pictures), "--epochs", "3", *SMALL]
    slowly = "import dcgan, time, sys; step = dcgan.train_step; dcgan.train_step = lambda *a, **k: " \
             "time.sleep(0.2) or step(*a, **k); dcgan.main(sys.argv[1:])"
    process = subprocess.Popen([command[0], "-c", slowly, *command[2:]], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)})
    for line in process.stdout:
        if "step 8 " in line:       # past the first checkpoint, in the middle of the second epoch
            process.kill()
    assert process.wait() == -signal.SIGKILL and torch.load("out/checkpoint.pt", weights_only=True)["step"] == 5
    dcgan.main(["--resume", "--device", "cpu"])
    assert_same_run(Path("out"), finished)


def test_resume_with_more_epochs(finished, pictures):
    dcgan.main(["--data", str(pictures), "--epochs", "2", *SMALL])
    dcgan.main(["--resume", "--epochs", "3", "--device", "cpu"])
    assert_same_run(Path("out"), finished)


def test_ema(pictures):
    """Off, it is the generator; on, it has forgotten the first weights but smooths."""
    for decay, out in (("0", "off"), ("0.999", "on")):
        dcgan.main(["--data", str(pictures), "--epochs", "4", "--ema", decay, "--lr-g", "0.01", "--out", out, *SMALL])
    off, on = (torch.load(f"{out}/checkpoint.pt", weights_only=True) for out in ("off", "on"))
    assert same(off["generator"], on["generator"])
    assert all(torch.equal(off["ema"]["module." + name], value) for name, value in off["generator"].items())
    start = networks(seed=42)[0].state_dict()
    last, mean = (on[k][p + "1.weight"] for k, p in (("generator", ""), ("ema", "module.")))
    assert 0.05 < (mean - last).norm() / (start["1.weight"] - last).norm() < 0.6


def test_generate(finished, capsys):
    def generate(*more):
        dcgan.main(["--out", str(finished), "--generate", *more, "--device", "cpu"])
        files = sorted((finished / "generated").iterdir())
        images = torch.stack([transforms.functional.pil_to_tensor(Image.open(file)) for file in files])
        return files, images

    try:
        files, first = generate("70")
        assert len(files) == 70 and first.shape == (70, 3, 32, 32) and (finished / "generated.png").exists()
        assert torch.equal(generate("70")[1], first)
        assert not torch.equal(generate("70", "--seed", "7")[1], first)
        assert len(generate("5")[0]) == 5
    finally:
        for file in [finished / "generated.png", *(finished / "generated").iterdir(), finished / "generated"]:
            file.rmdir() if file.is_dir() else file.unlink()


def test_dry_run(pictures):
    dcgan.main(["--data", str(pictures), "--dry-run", *SMALL])
    assert {str(f.relative_to("out")) for f in Path("out").rglob("*.*")} == {
        "real.png", "samples/epoch_001.png", "samples.gif", "losses.png", "log.csv"}


@pytest.mark.parametrize("what, told", [("collapse", "collapses"), ("win", "has won"), ("nothing", "")])
def test_warnings(pictures, monkeypatch, capsys, what, told):
    measures = (torch.tensor(100.0), torch.tensor(0.1 if what == "collapse" else 0.9))
    monkeypatch.setattr(dcgan, "compare", lambda fake, real: measures)
    if what == "win":
        monkeypatch.setattr(dcgan, "train_step", lambda *args, **options: torch.tensor([0.01, 9, 1, 0]))
    dcgan.main(["--data", str(pictures), "--epochs", "1", *SMALL])
    output = capsys.readouterr().out
    assert (f"the {'generator' if what == 'collapse' else 'discriminator'} {told}" in output) == (told != "")
    assert output.count("warning") == (told != "") and output.count("--lr-d") == (told != "")


def test_a_loss_that_is_not_finite(pictures, monkeypatch, capsys):
    step, calls = dcgan.train_step, []

    def broken(*args, **options):
        calls.append(1)
        losses = step(*args, **options)
        return losses * float("nan") if len(calls) == 7 else losses

    monkeypatch.setattr(dcgan, "train_step", broken)
    line = fails(capsys, "--data", pictures, "--epochs", 3, *SMALL)
    assert "not finite" in line and "--lr-d" in line
    assert torch.load("out/checkpoint.pt", weights_only=True)["step"] == 5


# ---- what a person types wrong -------------------------------------------------------------------

@pytest.mark.parametrize("argv, told", [
    (["--image-size", "65"], "65"), (["--batch-size", "0"], "0"), (["--epochs", "0"], "0"), (["--epochs", "x"], "x"),
    (["--flip-labels", "1.5"], "1.5"), (["--label-smoothing", "-0.1"], "-0.1"), (["--ema", "nan"], "nan"),
    (["--device", "cuda:99"], "cuda:99"), (["--device", "abacus"], "abacus"), (["--lr-d", "-1"], "-1"),
    (["--data", "nowhere"], "nowhere"), (["--data", "empty"], "empty"), (["--data", "page.zip"], "web page"),
    (["--data", "text.zip"], "text.zip"), (["--data", "broken"], "broken"), (["--batch-size", "41"], "40 "),
    (["--resume"], "holds no checkpoint"), (["--generate", "3", "--out", "bad"], "bad"), (["--nonsense"], "--nonsense")])
def test_bad_input(argv, told, pictures, capsys):
    Path("empty").mkdir()
    for folder, file in (("broken", "x.png"), ("bad", "checkpoint.pt")):
        Path(folder).mkdir()
        Path(folder, file).write_text("nothing of the kind")
    Path("page.zip").write_text("<html>")
    Path("text.zip").write_text("hello")
    if "broken" in argv:
        dcgan.load_images("broken", 32)             # says what it skips; the second time it is cached
    line = fails(capsys, "--data", pictures, *SMALL, *argv)
    assert told in line and not Path("out").exists()


def test_a_finished_run_is_not_overwritten(finished, pictures, capsys):
    assert "--resume" in fails(capsys, "--data", pictures, "--out", finished, *SMALL)
    line = fails(capsys, "--resume", "--out", finished, "--batch-size", 4, "--device", "cpu")
    assert "--batch-size 8" in line


def test_import_does_nothing():
    code = "import sys; sys.argv = ['x', '--nonsense']; import dcgan; dcgan.Generator()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)})
    assert list(Path().iterdir()) == []
