"""Tests of dcgan.py: run `pytest`; under a minute on two cores, no network, no GPU needed."""
import signal
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import dcgan

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding")
SMALL = "--image-size 32 --width 8 --batch-size 8 --log-interval 2 --device cpu".split()
FILES = {"real.png", "samples.gif", "losses.png", "log.csv", "samples/epoch_001.png"}

@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Each test works in a folder of its own, and a run's signal handlers end with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(dcgan.__file__).parent))
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):     # 40 of them: 5 steps an epoch at batch 8
    folder = tmp_path_factory.mktemp("faces")
    for i, image in enumerate(dcgan.toy_faces(40, 32)):
        to_pil_image(image).save(folder / f"{i:03d}.png")
    return str(folder)

@pytest.fixture(scope="session")
def finished(pictures, tmp_path_factory):       # a run of three epochs without a break
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

def jpeg(image=None, color="red"):
    (image or Image.new("RGB", (178, 218), color)).save(data := BytesIO(), "JPEG", quality=90)
    return data.getvalue()

def networks(size=32, width=8, seed=0):
    torch.manual_seed(seed)
    return [net(image_size=size, width=width) for net in (dcgan.Generator, dcgan.Discriminator)]

def optimizers(nets, *rates, kind=torch.optim.SGD, **options):
    return [kind(net.parameters(), rate, **options) for net, rate in zip(nets, rates)]

# ---- Networks and step ---------------------------------------------------------------------------
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
    assert isinstance(G[-1], torch.nn.Tanh) and G(torch.randn(4, 100) * 50).abs().max() <= 1
    assert sum(isinstance(layer, torch.nn.ReLU) for layer in dcgan.Generator(relu=True)) == 4
    for layers, norms in ((list(G), 4), (list(D), 3)):
        assert not {torch.nn.Linear, torch.nn.MaxPool2d, torch.nn.ReLU} & set(map(type, layers))
        assert sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in layers) == norms
        for layer, following in zip(layers, layers[1:]):
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
                assert layer.kernel_size == (4, 4) and abs(layer.weight.std() - 0.02) < 0.002
                assert (layer.bias is None) == isinstance(following, torch.nn.BatchNorm2d)
            assert not isinstance(layer, torch.nn.BatchNorm2d) or 0.9 < layer.weight.mean() < 1.1

@pytest.mark.parametrize("fresh_noise, rates", [
    (False, (0.1, 0.1)), (True, (0.1, 0.1)), (False, (0.1, 0.0)), (False, (0.0, 0.1))])
def test_step_against_one_written_out(fresh_noise, rates):
    """With SGD an update is a gradient: D first, then G against the new D, neither the other's."""
    real, rng = dcgan.toy_faces(8, 32) / 127.5 - 1, torch.Generator().manual_seed(1)
    (G, D), nets = networks(), networks()
    losses = dcgan.train_step(*nets, *optimizers(nets, *rates), real, rng=rng,
                              fresh_noise=fresh_noise)
    torch.rand(2, 8, 1, generator=rng.manual_seed(1))       # which labels to flip: none
    optimizer_g, optimizer_d = optimizers((G, D), *rates)
    fake = G(torch.randn(8, 100, generator=rng))
    loss_d = (F.softplus(-D(real)).mean() + F.softplus(D(fake.detach())).mean()) / 2
    loss_d.backward()
    optimizer_d.step()
    loss_g = F.softplus(-D(G(torch.randn(8, 100, generator=rng)) if fresh_noise else fake)).mean()
    loss_g.backward()
    optimizer_g.step()
    torch.testing.assert_close(losses[:2], torch.stack([loss_d, loss_g]).detach())
    for net, expected in zip(nets, (G, D)):
        torch.testing.assert_close(list(net.parameters()), list(expected.parameters()))
    assert not losses.requires_grad and all(p.requires_grad for p in nets[1].parameters())

@pytest.mark.parametrize("tricks, real, fake", [
    ({}, 1, 0), ({"label_smoothing": 0.1}, 0.9, 0), ({"flip_labels": 1.0}, 0, 1),
    ({"flip_labels": 0.25}, 0.75, 0.25), ({"flip_labels": 0.2, "label_smoothing": 0.5}, 0.4, 0.1)])
def test_labels_of_each_trick(tricks, real, fake, monkeypatch):
    bce, nets, means = F.binary_cross_entropy_with_logits, networks(8, width=2), []
    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", lambda logits, labels: means.append(
        labels.mean().item()) or bce(logits, labels))
    dcgan.train_step(*nets, *optimizers(nets, 0, 0), torch.zeros(3000, 3, 8, 8), **tricks)
    assert means == pytest.approx([real, fake, 1], abs=0.04)

def test_batches_and_their_mirror_images():
    images = torch.arange(4, dtype=torch.uint8).expand(200, 3, 4, 4)
    plain, flipped = (dcgan.to_batch(images, torch.arange(200), flip=f) for f in (False, True))
    mirrored = flipped[:, 0, 0, 0] != plain[:, 0, 0, 0]
    assert 60 < mirrored.sum() < 140 and torch.equal(flipped[mirrored], plain[mirrored].flip(3))
    torch.testing.assert_close(plain[0, 0, 0], torch.arange(4) / 127.5 - 1)

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here"))])
def test_one_step_in_bf16(device):
    nets = [n.to(device, memory_format=torch.channels_last) for n in networks(64, width=16)]
    before = [p.clone() for net in nets for p in net.parameters()]
    batch = dcgan.to_batch(dcgan.toy_faces(8), torch.arange(8), device)
    adam = optimizers(nets, 1e-3, 1e-3, kind=torch.optim.Adam, fused=True)
    losses = dcgan.train_step(*nets, *adam, batch, bf16=True)
    assert losses.device.type == device and losses.isfinite().all()
    for p, q in zip([p for net in nets for p in net.parameters()], before):
        assert p.dtype == torch.float32 and p.isfinite().all() and not torch.equal(p, q)

def test_a_small_network_learns_toy_faces():
    real, (G, D) = dcgan.toy_faces(1024, 32), networks(width=16)
    adam = optimizers((G, D), 1e-3, 1e-3, kind=torch.optim.Adam, betas=(0.5, 0.999))
    latents = torch.randn(512, 100)
    before, _ = dcgan.compare(dcgan.sample(G.eval(), latents), real)
    G.train()
    for _ in range(120):
        dcgan.train_step(G, D, *adam, dcgan.to_batch(real, torch.randint(1024, (32,))))
    after, diversity = dcgan.compare(dcgan.sample(G.eval(), latents), real)
    near, wide = dcgan.compare(real[:512], real[512:])
    assert after < before / 2 and diversity > 0.6 and near < after and 0.9 < wide < 1.1
    assert dcgan.compare(real[:1].expand(512, -1, -1, -1), real)[1] < 0.01      # all the same

# ---- Data ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("decoder", ["torchvision", "Pillow"])
def test_preparation_is_the_lectures(monkeypatch, decoder):
    if decoder == "Pillow":
        monkeypatch.delattr(dcgan.io, "decode_jpeg", raising=False)
    noise = torch.randint(0, 256, (3, 27, 22), dtype=torch.uint8)
    data = jpeg(to_pil_image(noise).resize((178, 218)))
    lecture = T.Compose([T.CenterCrop(160), T.Resize(64), pil_to_tensor])
    got, expected = dcgan.decode(data), lecture(Image.open(BytesIO(data)))
    assert got.dtype == torch.uint8 and (got.int() - expected.int()).abs().max() <= 3
    wide = Image.new("RGB", (96, 32), "red")        # anything but CelebA: the largest square
    wide.paste("blue", (32, 0, 64, 32))
    assert (dcgan.decode(jpeg(wide), 32)[2, :, 2:-2] > 240).all()

def test_odd_pictures(capsys):
    folder, red, exif = Path("odd/a/b"), Image.new("RGB", (40, 40), "red"), Image.Exif()
    folder.mkdir(parents=True)
    grey16 = Image.fromarray(torch.full((40, 40), 32768).numpy().astype("uint16"))
    turned, exif[0x0112] = Image.new("RGB", (40, 40), "black"), 6      # 6: to be turned clockwise
    turned.paste("white", (0, 0, 40, 20))
    turned.save(folder / "turned.jpg", exif=exif, quality=100)
    for name, image in {"grey.png": Image.new("L", (40, 50), 128), "g.png": grey16, "g.tif": grey16,
                        "alpha.png": Image.new("RGBA", (40, 40), (255, 0, 0, 9)),
                        "palette.png": red.convert("P"), "cmyk.jpg": red.convert("CMYK"),
                        "dot.bmp": red.resize((1, 1)), "LONG.JPG": red.resize((300, 20))}.items():
        image.save(folder / name)
    for bad in ("cut.jpg", "empty.png", ".hidden.png", "._grey.png", "notes.csv"):
        (folder / bad).write_bytes(jpeg()[:500] if bad == "cut.jpg" else b"")
    names = [Path(name).name for name in dcgan.find_pictures(Path("odd"))[1]]
    images, err = dcgan.load_images("odd", 32), capsys.readouterr().err
    assert images.shape == (9, 3, 32, 32) and images.dtype == torch.uint8 and len(names) == 11
    assert err.count("skipped") == 2 and "cut.jpg" in err and "empty.png" in err
    for name, image in zip([n for n in names if n not in ("cut.jpg", "empty.png")], images):
        if name == "turned.jpg":
            assert (image[:, :, 18:] > 200).all() and (image[:, :, :14] < 50).all()
        else:
            grey = name.startswith("g")
            assert (image == 128).all() if grey else (image[0] > 250).all() > (image[1:] > 5).any()

@pytest.mark.parametrize("place, count", [
    ("data/celeba/img_align_celeba", 10), ("data/celeba/x/img_align_celeba", 10), ("elsewhere", 9),
    ("data/celeba/img_align_celeba.zip", 10), ("elsewhere/archive.zip", 10)])
def test_celeba_as_it_is_found(monkeypatch, place, count):
    monkeypatch.setattr(dcgan, "CELEBA_PICTURES", 10)
    monkeypatch.setattr(dcgan, "CELEBA_TRAIN", 6)
    (folder := Path(place).parent if "zip" in place else Path(place)).mkdir(parents=True)
    for i in range(1, count + 1):
        name, data = f"{i:06d}.jpg", jpeg(color=(20 * i, 0, 0))
        if "zip" in place:
            with zipfile.ZipFile(place, "a") as archive:
                archive.writestr(f"img_align_celeba/{name}", data)
                archive.writestr(f"__MACOSX/img_align_celeba/._{name}", b"")
        else:
            (folder / name).write_bytes(data)
    images = dcgan.load_images(place if "elsewhere" in place else "data/celeba")
    assert len(images) == (6 if count == 10 else count)         # an incomplete one means all of it
    assert images[5, 0].float().mean().item() == pytest.approx(120, abs=3)

def test_cache_is_used_and_thrown_away(monkeypatch, capsys):
    folder, cache, calls, decode = Path("faces"), Path("faces.dcgan.pt"), [], dcgan.decode
    monkeypatch.setattr(dcgan, "decode", lambda *args: calls.append(1) or decode(*args))
    def decoded(*args, **files):        # how many, after some files were written
        for name, color in files.items():
            (folder / f"{name}.jpg").write_bytes(jpeg(color=color))
        calls.clear()
        dcgan.load_images(folder, *args)
        return len(calls)
    folder.mkdir()
    assert decoded(32, a="red", b="lime", c="blue") == 3 and decoded(32) == 0 and cache.exists()
    assert decoded(64) == 3 and decoded(64, 100) == 3                   # another size, crop
    assert decoded(64, 100, a="yellow") == 3                            # a picture changed
    assert decoded(64, 100, d="red") == 4 and decoded(64, 100) == 0     # one came
    cache.write_bytes(cache.read_bytes()[:1000])
    assert decoded(64, 100) == 4                                        # damaged
    cache.unlink()
    cache.mkdir()
    assert decoded(64) == 4 and "no cache" in capsys.readouterr().err   # cannot be written
    assert {path.name for path in Path().iterdir()} == {"faces", "faces.dcgan.pt"}

@pytest.mark.parametrize("kind, told", [("offline", "unreachable"), ("html", "web page"), ("", ""),
                                        ("cut", "cut off"), ("md5", "MD5"), ("no gdown", "gdown")])
def test_download(kind, told, monkeypatch, capsys):
    def download(output, **options):
        if kind == "offline":
            raise ConnectionError("Network is unreachable")
        with zipfile.ZipFile(output, "w") as stream:
            stream.writestr("000001.jpg", jpeg())
        if kind in ("html", "cut"):
            Path(output).write_bytes(b"<!DOCTYPE html>" * 9 if kind == "html" else jpeg())
    gdown = None if kind == "no gdown" else SimpleNamespace(download=download)
    monkeypatch.setitem(sys.modules, "gdown", gdown)
    assert dcgan.CELEBA_MD5 == "00d2c5bc6d35e252742224ab0c1e8fcb"
    if not kind:
        monkeypatch.setattr(dcgan, "CELEBA_MD5", None)
        assert dcgan.load_images("data/celeba").shape == (1, 3, 64, 64)
        return
    line = fails(capsys, *SMALL)
    for text in (told, "img_align_celeba.zip", "data/celeba", "--data toy", "--data FOLDER"):
        assert text in line
    assert list(Path("data/celeba").iterdir()) == []
    (archive := Path("data/celeba/img_align_celeba.zip")).write_text(" <html>")
    assert "web page" in fails(capsys, *SMALL) and archive.exists()     # the user's own is kept

# ---- The run -------------------------------------------------------------------------------------
def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def contents(out):
    return {str(file.relative_to(out)): file.read_bytes() if file.suffix != ".pt" else torch.load(
        file, weights_only=True) for file in Path(out).rglob("*.*")}

def test_what_a_run_leaves(finished, pictures, capsys):
    assert "--resume" in fails(capsys, "--data", pictures, "--out", finished, *SMALL)
    assert "--width 8" in fails(capsys, "--resume", "--out", finished, "--width", 4, *SMALL[-2:])
    files, more = contents(finished), {f"samples/epoch_00{i}.png" for i in (2, 3)}
    assert files.keys() == FILES | more | {"checkpoint.pt"}
    dcgan.main(["--data", pictures, "--dry-run", *SMALL])
    assert contents("out").keys() == FILES
    rows = [line.split(",") for line in files["log.csv"].decode().splitlines()]
    history = files["checkpoint.pt"]["history"]
    assert [row[1] for row in rows[1:]] == "2 4 5 6 8 10 12 14 15".split()
    assert [row[1] for row in rows[1:] if all(row)] == ["5", "10", "15"]
    assert [float(x) for x in rows[-1][2:6]] == pytest.approx(history[14].tolist(), abs=1e-4)
    assert history.shape == (15, 4) and Image.open(finished / "samples.gif").n_frames == 3
    red, _, blue = pil_to_tensor(Image.open(finished / "losses.png")).int()
    assert (blue - red > 60).sum() > 100 and (red - blue > 60).sum() > 100      # both curves

@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143),
                                            (signal.SIGKILL, -9)])
def test_interrupt_and_resume(number, status, finished, pictures):
    code = ("import dcgan, os, sys; step, calls = dcgan.train_step, []; dcgan.train_step = lambda "
            "*a, **k: calls.append(1) or (len(calls) == 7 and os.kill(os.getpid(), int(n))) or "
            "step(*a, **k); n = sys.argv.pop(); dcgan.main(sys.argv[1:])")
    command = [sys.executable, "-c", code, "--data", pictures, "--epochs", "2", *SMALL,
               str(int(number))]        # in the second epoch, after a step that is not logged
    assert subprocess.run(command).returncode == status
    last_step = torch.load("out/checkpoint.pt")["step"]
    assert last_step == (5 if number == signal.SIGKILL else 7)
    dcgan.main(["--resume", "--epochs", "3", "--device", "cpu"])
    assert same(contents("out"), contents(finished))        # bit for bit

def test_ema(pictures):
    """Off, it is the generator; on, it follows that and has forgotten the first weights."""
    for out, decay in (("off", "0"), ("on", "0.999")):
        dcgan.main(["--data", pictures, "--epochs", "4", "--ema", decay, "--out", out, *SMALL])
    off, on = (contents(out)["checkpoint.pt"] for out in ("off", "on"))
    assert same(off["generator"], on["generator"])
    assert all(torch.equal(off["ema"][f"module.{k}"], v) for k, v in off["generator"].items())
    first, last = networks(seed=42)[0][1].weight, on["generator"]["1.weight"]
    assert 0 < (on["ema"]["module.1.weight"] - last).norm() < 0.7 * (first - last).norm()

def test_generate(finished):
    def generate(*argv):
        dcgan.main(["--out", ".", "--device", "cpu", "--generate", *argv])
        return contents("generated")
    Path("checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes())
    first = generate("70")
    assert len(first) == 70 and Image.open("generated/000070.png").size == (32, 32)
    assert generate("70") == first and len(generate("5")) == 5 and Path("generated.png").exists()
    assert generate("70", "--seed", "7") != first

@pytest.mark.parametrize("diversity, loss_d, told", [
    (0.1, 0.5, "collapses"), (0.9, 0.01, "has won"), (0.9, 0.5, None)])
def test_warnings(pictures, monkeypatch, capsys, diversity, loss_d, told):
    monkeypatch.setattr(dcgan, "compare", lambda *args: torch.tensor([100, diversity]))
    monkeypatch.setattr(dcgan, "train_step", lambda *a, **k: torch.tensor([loss_d, 1, 0.5, 0.5]))
    dcgan.main(["--data", pictures, *SMALL, "--epochs", "8", "--batch-size", "1"])
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert bool(warnings) == bool(told) and all(told in w and "--lr-d" in w for w in warnings)

def test_a_loss_that_is_not_finite(pictures, monkeypatch, capsys):
    step, calls = dcgan.train_step, []
    monkeypatch.setattr(dcgan, "train_step", lambda *args, **options: calls.append(1) or step(
        *args, **options) * (float("nan") if len(calls) == 7 else 1))
    assert "not finite" in fails(capsys, "--data", pictures, "--epochs", 3, *SMALL)
    assert torch.load("out/checkpoint.pt")["step"] == 5

@pytest.mark.parametrize("argv, told", [
    ("--image-size 65", "65"), ("--batch-size 0", ": 0"), ("--epochs 0", ": 0"),
    ("--epochs x", "'x"), ("--flip-labels 1.5", "1.5"), ("--ema nan", "nan"), ("--lr-d -1", "-1"),
    ("--nonsense", "--no"), ("--device cuda:99", "cuda:99"), ("--device abacus", "abacus"),
    ("--data nowhere", "nowhere"), ("--data .", "0 readable"), ("--data page.zip", "web page"),
    ("--data bad", "bad"), ("--batch-size 41", "40 "), ("--resume", "no checkpoint"),
    ("--generate 3 --out bad", "bad")])
def test_bad_input(argv, told, pictures, capsys):
    Path("bad").mkdir()
    for file in ("bad/x.csv", "bad/checkpoint.pt", "page.zip"):
        Path(file).write_text("<html>")
    line = fails(capsys, "--data", pictures, *SMALL, *argv.split())
    assert told in line and not Path("out").exists()

def test_import_does_nothing():
    subprocess.run([sys.executable, "-c", "import dcgan", "--nonsense"], check=True)
    assert list(Path().iterdir()) == []
