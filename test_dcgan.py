# SPDX-License-Identifier: MIT
"""Tests of dcgan.py: run `pytest`; under a minute on two cores, no network, no GPU needed."""
import csv
import os
import signal
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import dcgan

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding")
HERE = {**os.environ, "PYTHONPATH": str(Path(dcgan.__file__).parent)}
SMALL = "--image-size 32 --width 8 --batch-size 8 --log-interval 2 --device cpu".split()
RUN_FILES = {"real.png", "samples.gif", "losses.png", "log.csv", "samples/epoch_001.png"}

@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Each test works in a folder of its own, and a run's signal handlers end with it."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 40 small pictures: 5 steps an epoch at batch 8."""
    folder = tmp_path_factory.mktemp("faces")
    for i, image in enumerate(dcgan.toy_faces(40, 32)):
        to_pil_image(image).save(folder / f"{i:03d}.png")
    return str(folder)

@pytest.fixture(scope="session")
def finished(pictures, tmp_path_factory):
    """The folder of a run of three epochs that nothing interrupted."""
    out = tmp_path_factory.mktemp("run") / "out"
    dcgan.main(["--data", pictures, "--epochs", "3", "--out", str(out), *SMALL])
    return out

def fails(capsys, *argv):
    """The one line on standard error with which a command fails, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        dcgan.main([str(a) for a in argv])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("dcgan.py: error: ")
    return lines[0]

def encode(image, kind="JPEG", **options):
    data = BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()

def celeba_like(color=(200, 100, 50)):
    return encode(Image.new("RGB", (178, 218), color))

def networks(image_size=32, width=8, seed=0):
    torch.manual_seed(seed)
    sizes = {"image_size": image_size, "width": width}
    return dcgan.Generator(**sizes), dcgan.Discriminator(**sizes)

def sgd(*rates_and_networks):
    return [torch.optim.SGD(net.parameters(), rate) for net, rate in rates_and_networks]

# ---- Networks ------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, of_G, of_D", [
    (32, 1_068_931, 663_361), (64, 3_576_707, 2_765_633),
    (128, 7_772_035, 6_960_961), (256, 11_967_363, 11_156_289)])
def test_shapes_and_parameter_counts(size, of_G, of_D):
    G, D = networks(size, width=64)
    images = G(torch.randn(2, 100))
    assert images.shape == (2, 3, size, size) and D(images).shape == (2, 1)
    assert [sum(p.numel() for p in net.parameters()) for net in (G, D)] == [of_G, of_D]

def test_layers_follow_the_paper():
    G, D = networks(64, width=16)
    assert isinstance(G[-1], nn.Tanh) and G(torch.randn(4, 100) * 50).abs().max() <= 1
    assert sum(isinstance(layer, nn.ReLU) for layer in dcgan.Generator(relu=True)) == 4
    for layers, norms in ((list(G), 4), (list(D), 3)):
        assert not any(isinstance(m, (nn.Linear, nn.MaxPool2d, nn.ReLU)) for m in layers)
        assert sum(isinstance(layer, nn.BatchNorm2d) for layer in layers) == norms
        for layer, following in zip(layers, layers[1:]):
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                assert layer.kernel_size == (4, 4) and abs(layer.weight.std() - 0.02) < 0.002
                assert (layer.bias is None) == isinstance(following, nn.BatchNorm2d)
            assert not isinstance(layer, nn.BatchNorm2d) or 0.9 < layer.weight.mean() < 1.1

# ---- The step ------------------------------------------------------------------------------------

@pytest.mark.parametrize("fresh_noise", [False, True])
def test_step_against_one_written_out(fresh_noise):
    """In fp32 with SGD, so that an update is a gradient: D first, then G against the new D."""
    real = dcgan.to_batch(dcgan.toy_faces(8, 32), torch.arange(8))
    (G, D), (plain_G, plain_D) = networks(), networks()
    rng = torch.Generator().manual_seed(1)
    torch.rand(2, 8, 1, generator=rng)      # the step draws first which labels to flip

    def descend(net, loss):
        parameters = list(net.parameters())
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            p.data -= 0.1 * gradient

    fake = plain_G(torch.randn(8, 100, generator=rng))
    loss_d = (F.softplus(-plain_D(real)).mean() + F.softplus(plain_D(fake.detach())).mean()) / 2
    descend(plain_D, loss_d)
    fake = plain_G(torch.randn(8, 100, generator=rng)) if fresh_noise else fake
    loss_g = F.softplus(-plain_D(fake)).mean()
    descend(plain_G, loss_g)

    losses = dcgan.train_step(G, D, *sgd((G, 0.1), (D, 0.1)), real, fresh_noise=fresh_noise,
                              rng=torch.Generator().manual_seed(1))
    torch.testing.assert_close(losses[:2], torch.stack([loss_d, loss_g]).detach())
    for net, plain in ((G, plain_G), (D, plain_D)):
        torch.testing.assert_close(list(net.parameters()), list(plain.parameters()))
    assert not losses.requires_grad and all(p.requires_grad for p in D.parameters())

@pytest.mark.parametrize("rates", [(0.1, 0.0), (0.0, 0.1)])
def test_an_update_leaves_the_other_network_alone(rates):
    G, D = networks()
    before = [[p.clone() for p in net.parameters()] for net in (G, D)]
    dcgan.train_step(G, D, *sgd((G, rates[0]), (D, rates[1])), torch.rand(8, 3, 32, 32) * 2 - 1)
    for net, old, rate in zip((G, D), before, rates):
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), old)) == (rate == 0)

@pytest.mark.parametrize("tricks, labels", [
    ({}, (1, 0)), ({"label_smoothing": 0.1}, (0.9, 0)), ({"flip_labels": 1.0}, (0, 1)),
    ({"flip_labels": 0.25}, (0.75, 0.25)),
    ({"flip_labels": 0.25, "label_smoothing": 0.2}, (0.6, 0.2))])
def test_labels_of_each_trick(tricks, labels):
    """The loss is linear in the mean label: a logit of 2 tells it, one of 0 costs log 2 always."""
    class Constant(nn.Linear):      # answers every batch with its weights, one after the other
        def forward(self, images):
            sizes.append(len(images))
            return self.weight[0, min(len(sizes) - 1, 1)] + 0 * images

    for logits, label in (((2.0, 0.0), labels[0]), ((0.0, 2.0), labels[1])):
        G, D, sizes = nn.Linear(4, 1), Constant(2, 1), []
        D.weight.data[0] = torch.tensor(logits)
        loss_d = dcgan.train_step(G, D, *sgd((G, 0), (D, 0)), torch.zeros(10_000, 1), 4, **tricks)[0]
        costs = F.softplus(torch.tensor([0.0, 2.0])).sum()
        assert (costs - 2 * loss_d).item() / 2 == pytest.approx(label, abs=0.03)
        assert sizes == [10_000] * 3        # real and fake never share a batch

def test_batches_and_their_mirror_images():
    images = torch.arange(4, dtype=torch.uint8).expand(200, 3, 4, 4)
    plain = dcgan.to_batch(images, torch.arange(200))
    flipped = dcgan.to_batch(images, torch.arange(200), flip=True)
    mirrored = flipped[:, 0, 0, 0] != plain[:, 0, 0, 0]
    assert 60 < mirrored.sum() < 140 and torch.equal(flipped[mirrored], plain[mirrored].flip(3))
    torch.testing.assert_close(plain[0, 0, 0], torch.arange(4) / 127.5 - 1)

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here"))])
def test_one_step_in_bf16(device):
    G, D = (n.to(device, memory_format=torch.channels_last) for n in networks(64, width=16))
    optimizers = [torch.optim.Adam(net.parameters(), fused=True) for net in (G, D)]
    parameters = [*G.parameters(), *D.parameters()]
    before = [p.clone() for p in parameters]
    batch = dcgan.to_batch(dcgan.toy_faces(8), torch.arange(8), device)
    losses = dcgan.train_step(G, D, *optimizers, batch, bf16=True)
    assert losses.device.type == device and losses.isfinite().all()
    for p, q in zip(parameters, before):
        assert p.dtype == torch.float32 and p.isfinite().all() and not torch.equal(p, q)

def test_a_small_network_learns_toy_faces():
    real, rng = dcgan.toy_faces(1024, 32), torch.Generator().manual_seed(0)
    G, D = networks(width=16)
    optimizers = [torch.optim.Adam(net.parameters(), 1e-3, (0.5, 0.999)) for net in (G, D)]
    latents = torch.randn(512, 100)
    before, _ = dcgan.compare(dcgan.sample(G.eval(), latents), real)
    G.train()
    for _ in range(120):
        batch = dcgan.to_batch(real, torch.randint(1024, (32,), generator=rng))
        dcgan.train_step(G, D, *optimizers, batch, rng=rng)
    after, diversity = dcgan.compare(dcgan.sample(G.eval(), latents), real)
    assert after < before / 2 and diversity > 0.6       # about a third and 1.0 on three seeds

def test_measures():
    a, b = dcgan.toy_faces(1024, 32).split(512)
    (near, wide), (far, none) = dcgan.compare(a, b), dcgan.compare(a[:1].expand(512, -1, -1, -1), b)
    assert dcgan.compare(a, a)[0] == 0 and near < 50 < 250 < far
    assert 0.9 < wide < 1.1 and none < 0.01

# ---- Data ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("decoder", ["torchvision", "Pillow"])
def test_preparation_is_the_lectures(monkeypatch, decoder):
    if decoder == "Pillow":
        monkeypatch.delattr(dcgan.io, "decode_jpeg", raising=False)
    noise = torch.randint(0, 256, (3, 27, 22), dtype=torch.uint8)
    data = encode(to_pil_image(noise).resize((178, 218)), quality=90)
    lecture = T.Compose([T.CenterCrop(160), T.Resize(64), pil_to_tensor])
    got, expected = dcgan.decode(data), lecture(Image.open(BytesIO(data)))
    assert got.dtype == torch.uint8 and (got.int() - expected.int()).abs().max() <= 3
    assert (dcgan.decode(data, crop=100).int() - got.int()).abs().float().mean() > 5
    wide = Image.new("RGB", (90, 30), "red")        # anything but CelebA: the largest square
    wide.paste("blue", (30, 0, 60, 30))
    assert (dcgan.decode(encode(wide, "PNG"), 32)[2] == 255).all()

def test_odd_pictures(capsys):
    folder, red, exif = Path("odd/a/b"), Image.new("RGB", (40, 40), "red"), Image.Exif()
    folder.mkdir(parents=True)
    grey16 = Image.fromarray(torch.full((40, 40), 32768).numpy().astype("uint16"))
    turned, exif[0x0112] = Image.new("RGB", (40, 40), "black"), 6      # 6: to be turned clockwise
    turned.paste("white", (0, 0, 40, 20))
    for name, image in {"grey.png": Image.new("L", (40, 50), 128), "palette.png": red.convert("P"),
                        "alpha.png": Image.new("RGBA", (40, 40), (255, 0, 0, 9)), "g.tif": grey16,
                        "white.jpg": Image.new("CMYK", (40, 40)), "dot.bmp": red.resize((1, 1)),
                        "g.png": grey16, "LONG.JPG": red.resize((300, 20))}.items():
        image.save(folder / name)
    turned.save(folder / "turned.jpg", exif=exif, quality=100)
    for bad in ("cut.jpg", "empty.png", ".hidden.png", "._grey.png", "notes.csv"):
        (folder / bad).write_bytes(celeba_like()[:500] if bad == "cut.jpg" else b"")
    names = [Path(name).name for name in dcgan.find_pictures(Path("odd"))[1]]
    images, err = dcgan.load_images("odd", 32), capsys.readouterr().err
    assert images.shape == (9, 3, 32, 32) and images.dtype == torch.uint8 and len(names) == 11
    assert err.count("skipped") == 2 and "cut.jpg" in err and "empty.png" in err
    got = dict(zip([name for name in names if name not in ("cut.jpg", "empty.png")], images))
    assert all((got[name] == 128).all() for name in ("grey.png", "g.tif", "g.png"))
    for name in ("palette.png", "alpha.png", "dot.bmp", "LONG.JPG"):
        assert (got[name][0] > 250).all() and (got[name][1:] < 5).all(), name
    assert (got["turned.jpg"][:, :, 18:] > 200).all() and (got["turned.jpg"][:, :, :14] < 50).all()

@pytest.fixture
def celeba(monkeypatch):
    """CelebA shrunk to ten pictures, of which the first six are for training."""
    monkeypatch.setattr(dcgan, "CELEBA_PICTURES", 10)
    monkeypatch.setattr(dcgan, "CELEBA_TRAIN", 6)
    return {f"{i:06d}.jpg": celeba_like((20 * i, 0, 0)) for i in range(1, 11)}

@pytest.mark.parametrize("place, count", [
    ("data/celeba/img_align_celeba", 10), ("data/celeba/x/img_align_celeba", 10), ("elsewhere", 9),
    ("data/celeba/img_align_celeba.zip", 10), ("elsewhere/archive.zip", 10)])
def test_celeba_as_it_is_found(celeba, place, count):
    (folder := Path(place).parent if "zip" in place else Path(place)).mkdir(parents=True)
    (folder / "list_attr_celeba.csv").write_text("a,b")
    for name, data in list(celeba.items())[:count]:
        if "zip" in place:
            with zipfile.ZipFile(place, "a") as archive:
                archive.writestr(f"img_align_celeba/{name}", data)
                archive.writestr(f"__MACOSX/img_align_celeba/._{name}", b"")
        else:
            (folder / name).write_bytes(data)
    images = dcgan.load_images(place if "elsewhere" in place else "data/celeba")
    assert len(images) == (6 if count == 10 else count)         # an incomplete one means all of it
    reds = images[:6, 0].float().mean((1, 2)).tolist()
    assert reds == pytest.approx(range(20, 121, 20), abs=3)

def test_cache_is_used_and_thrown_away(monkeypatch, capsys):
    folder, cache, calls, decode = Path("faces"), Path("faces.dcgan.pt"), [], dcgan.decode
    monkeypatch.setattr(dcgan, "decode", lambda *args: calls.append(1) or decode(*args))

    def decodes(*args):
        calls.clear()
        return len(dcgan.load_images(folder, *args)), len(calls)

    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(celeba_like((0, 60 * i, 0)))
    assert decodes(32) == (3, 3) and decodes(32) == (3, 0) and cache.exists()
    assert decodes(64) == (3, 3) and decodes(64, 100) == (3, 3)         # another size, crop
    (folder / "1.jpg").write_bytes(celeba_like((0, 0, 99)))
    assert decodes(64, 100) == (3, 3)                                   # a picture changed
    (folder / "3.jpg").write_bytes(celeba_like())
    assert decodes(64, 100) == (4, 4) and decodes(64, 100) == (4, 0)    # one came
    cache.write_bytes(cache.read_bytes()[:1000])
    assert decodes(64, 100) == (4, 4)                                   # damaged
    cache.unlink()
    cache.mkdir()                                                       # cannot be written
    assert decodes(64) == (4, 4) and "no cache" in capsys.readouterr().err
    assert {path.name for path in Path().iterdir()} == {"faces", "faces.dcgan.pt"}

@pytest.mark.parametrize("kind, told", [("no network", "unreachable"), ("html", "web page"),
                                        ("cut", "cut off"), ("md5", "MD5"), ("no gdown", "gdown"),
                                        ("good", "")])
def test_download(kind, told, monkeypatch, capsys, celeba):
    def download(file_id, root, filename, md5=None):
        assert (file_id, filename) == ("0B7EVK8r0v71pZjFTYXZWM3FlRnM", "img_align_celeba.zip")
        if kind == "no network":
            raise ConnectionError("Network is unreachable")
        with zipfile.ZipFile(archive := Path(root, filename), "w") as stream:
            stream.writestr("000001.jpg", celeba["000001.jpg"])
        if kind in ("html", "cut"):
            whole = archive.read_bytes() if kind == "cut" else b"<!DOCTYPE html>Quota exceeded" * 9
            archive.write_bytes(whole[:-30])

    if kind == "no gdown":
        monkeypatch.setitem(sys.modules, "gdown", None)
    else:
        monkeypatch.setattr(dcgan.datasets.utils, "download_file_from_google_drive", download)
    if kind == "good":
        monkeypatch.setattr(dcgan, "CELEBA_MD5", None)
        assert dcgan.load_images("data/celeba").shape == (1, 3, 64, 64)
        return
    line = fails(capsys, *SMALL)
    assert dcgan.CELEBA_MD5 == "00d2c5bc6d35e252742224ab0c1e8fcb"
    for text in (told, "img_align_celeba.zip", "data/celeba", "--data toy", "--data FOLDER"):
        assert text in line
    assert list(Path("data/celeba").iterdir()) == []

def test_a_bad_archive_of_the_users_is_kept(capsys):
    (archive := Path("data/celeba/img_align_celeba.zip")).parent.mkdir(parents=True)
    archive.write_text("  <html>Quota exceeded</html>")
    assert "web page" in fails(capsys, *SMALL) and archive.exists()

# ---- The run -------------------------------------------------------------------------------------

def same(a, b):
    """Whether two checkpoints, or parts of them, are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def checkpoint(out):
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)

def assert_same_run(out, finished):
    assert same(checkpoint(out), checkpoint(finished))
    a, b = ({str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")
             if file.name != "checkpoint.pt"} for folder in (Path(out), finished))
    assert a == b

def test_what_a_run_leaves(finished):
    assert {str(file.relative_to(finished)) for file in finished.rglob("*.*")} == RUN_FILES | {
        "samples/epoch_002.png", "samples/epoch_003.png", "checkpoint.pt"}
    rows = list(csv.DictReader((finished / "log.csv").open()))
    assert [row["step"] for row in rows] == "2 4 5 6 8 10 12 14 15".split()
    assert [row["step"] for row in rows if row["swd"] and row["diversity"]] == ["5", "10", "15"]
    last, history = rows[-1], checkpoint(finished)["history"]
    columns = ("loss_d", "loss_g", "D(x)", "D(G(z))")
    assert [float(last[c]) for c in columns] == pytest.approx(history[14].tolist(), abs=1e-4)
    assert history.shape == (15, 4) and Image.open(finished / "samples.gif").n_frames == 3
    curves = pil_to_tensor(Image.open(finished / "losses.png")).int()
    for blueness in (curves[2] - curves[0], curves[0] - curves[2]):     # both are drawn
        assert (blueness > 60).sum() > 100

def test_ctrl_c_and_resume(finished, pictures, monkeypatch):
    step, calls = dcgan.train_step, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 7:     # in the second epoch, and not where a row is logged
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **options)

    monkeypatch.setattr(dcgan, "train_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        dcgan.main(["--data", pictures, "--epochs", "3", *SMALL])
    assert stop.value.code == 130 and checkpoint("out")["step"] == 7
    dcgan.main(["--resume", "--device", "cpu"])
    assert_same_run("out", finished)

def test_kill_and_resume(finished, pictures):
    slowly = ("import dcgan, sys, time; step = dcgan.train_step; dcgan.train_step = lambda *a, **k:"
              " time.sleep(0.2) or step(*a, **k); dcgan.main(sys.argv[1:])")
    command = [sys.executable, "-c", slowly, "--data", pictures, "--epochs", "3", *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=HERE)
    for line in process.stdout:
        if "step 8 " in line:
            process.kill()
    assert process.wait() == -signal.SIGKILL and checkpoint("out")["step"] == 5
    dcgan.main(["--resume", "--device", "cpu"])
    assert_same_run("out", finished)

def test_resume_with_more_epochs(finished, pictures):
    dcgan.main(["--data", pictures, "--epochs", "2", *SMALL])
    dcgan.main(["--resume", "--epochs", "3", "--device", "cpu"])
    assert_same_run("out", finished)

def test_ema(pictures):
    """Off, it is the generator; on, it follows that and has forgotten the first weights."""
    for out, decay in (("off", "0"), ("on", "0.999")):
        dcgan.main(["--data", pictures, "--epochs", "4", "--ema", decay, "--out", out, *SMALL])
    off, on = checkpoint("off"), checkpoint("on")
    assert same(off["generator"], on["generator"])
    assert all(torch.equal(off["ema"][f"module.{k}"], v) for k, v in off["generator"].items())
    first, last = networks(seed=42)[0][1].weight, on["generator"]["1.weight"]
    assert 0 < (on["ema"]["module.1.weight"] - last).norm() < 0.7 * (first - last).norm()

def test_generate(finished, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes())

    def generate(*argv):
        dcgan.main(["--out", str(tmp_path), "--device", "cpu", "--generate", *argv])
        return torch.stack([pil_to_tensor(Image.open(file)) for file in sorted(
            (tmp_path / "generated").iterdir())])

    first = generate("70")
    assert first.shape == (70, 3, 32, 32) and (tmp_path / "generated.png").exists()
    assert torch.equal(generate("70"), first) and len(generate("5")) == 5
    assert not torch.equal(generate("70", "--seed", "7"), first)

def test_dry_run(pictures):
    dcgan.main(["--data", pictures, "--dry-run", *SMALL])
    assert {str(file.relative_to("out")) for file in Path("out").rglob("*.*")} == RUN_FILES

@pytest.mark.parametrize("diversity, loss_d, told", [
    (0.1, 0.5, "collapses"), (0.9, 0.01, "has won"), (0.9, 0.5, None)])
def test_warnings(pictures, monkeypatch, capsys, diversity, loss_d, told):
    measures, losses = torch.tensor([100, diversity]), torch.tensor([loss_d, 1, 0.5, 0.5])
    monkeypatch.setattr(dcgan, "compare", lambda fake, real: measures)
    monkeypatch.setattr(dcgan, "train_step", lambda *args, **options: losses)
    dcgan.main(["--data", pictures, *SMALL, "--epochs", "8", "--batch-size", "1"])
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert bool(warnings) == bool(told) and all(told in w and "--lr-d" in w for w in warnings)

def test_a_loss_that_is_not_finite(pictures, monkeypatch, capsys):
    step, calls = dcgan.train_step, []
    monkeypatch.setattr(dcgan, "train_step", lambda *args, **options: calls.append(1) or step(
        *args, **options) * (float("nan") if len(calls) == 7 else 1))
    line = fails(capsys, "--data", pictures, "--epochs", 3, *SMALL)
    assert "not finite" in line and "--lr-d" in line and checkpoint("out")["step"] == 5

# ---- What a person types wrong -------------------------------------------------------------------

@pytest.mark.parametrize("argv, told", [
    ("--image-size 65", "65"), ("--batch-size 0", "0"), ("--epochs 0", "0"), ("--epochs x", "x"),
    ("--flip-labels 1.5", "1.5"), ("--label-smoothing -0.1", "-0.1"), ("--ema nan", "nan"),
    ("--lr-d -1", "-1"), ("--device cuda:99", "cuda:99"), ("--device abacus", "abacus"),
    ("--data nowhere", "nowhere"), ("--data empty", "empty"), ("--data page.zip", "web page"),
    ("--data bad", "bad"), ("--batch-size 41", "40 "), ("--resume", "holds no checkpoint"),
    ("--generate 3 --out bad", "holds no checkpoint"), ("--nonsense", "--nonsense")])
def test_bad_input(argv, told, pictures, capsys):
    Path("empty").mkdir()
    Path("bad").mkdir()
    for file in ("bad/x.csv", "bad/checkpoint.pt", "page.zip"):
        Path(file).write_text("<html>")
    assert told in fails(capsys, "--data", pictures, *SMALL, *argv.split())
    assert not Path("out").exists()

def test_a_run_is_not_overwritten(finished, pictures, capsys):
    assert "--resume" in fails(capsys, "--data", pictures, "--out", finished, *SMALL)
    assert "--width 8" in fails(capsys, "--resume", "--out", finished, "--width", 4, *SMALL[-2:])

def test_import_does_nothing():
    code = "import sys; sys.argv = ['x', '--nonsense']; import dcgan; dcgan.Generator()"
    subprocess.run([sys.executable, "-c", code], check=True, env=HERE)
    assert list(Path().iterdir()) == []
