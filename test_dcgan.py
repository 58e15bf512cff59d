"""Tests of dcgan.py: run `pytest`; under a minute on two cores, no network, no GPU needed."""
import shutil
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T

import dcgan

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding")
SMALL = "--image-size 32 --width 8 --batch-size 8 --log-interval 2 --device cpu".split()
FILES = {"real.png", "samples.gif", "losses.png", "log.csv", "samples/epoch_001.png"}

@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Each test works in a folder of its own; the signal handlers of a run in it are left out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(dcgan.__file__).parent))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):     # 40 of them: 5 steps an epoch at batch 8
    folder = tmp_path_factory.mktemp("faces")
    for i, image in enumerate(dcgan.toy_faces(40, 32)):
        T.ToPILImage()(image).save(folder / f"{i:03d}.png")
    return str(folder)

@pytest.fixture(scope="session")
def finished(pictures, tmp_path_factory):       # a run of three epochs without a break
    out = tmp_path_factory.mktemp("run") / "out"
    argv = ["--data", pictures, "--epochs", "3", "--out", str(out), *SMALL]
    subprocess.run([sys.executable, dcgan.__file__, *argv], check=True)
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
    assert {type(layer).__name__ for layer in (*G, *D)} == {
        "Unflatten", "ConvTranspose2d", "BatchNorm2d", "LeakyReLU", "Tanh", "Conv2d", "Flatten"}
    for layer in (*G, *D):
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert 0.9 < layer.weight.mean() < 1.1
        elif hasattr(layer, "weight"):
            assert layer.kernel_size == (4, 4) and abs(layer.weight.std() - 0.02) < 0.002

@pytest.mark.parametrize("fresh, rates", [
    (False, (0.1, 0.1)), (True, (0.1, 0.1)), (False, (0.1, 0.0)), (False, (0.0, 0.1))])
def test_step_against_one_written_out(fresh, rates):
    """With SGD an update is a gradient: D first, then G against the new D, neither the other's."""
    real, rng = dcgan.toy_faces(8, 32) / 127.5 - 1, torch.Generator().manual_seed(1)
    (G, D), nets = networks(), networks()
    losses = dcgan.train_step(*nets, *optimizers(nets, *rates), real, rng=rng, fresh_noise=fresh)
    torch.rand(2, 8, 1, generator=rng.manual_seed(1))       # which labels to flip: none
    optimizer_g, optimizer_d = optimizers((G, D), *rates)
    fake = G(torch.randn(8, 100, generator=rng))
    loss_d = (F.softplus(-D(real)).mean() + F.softplus(D(fake.detach())).mean()) / 2
    loss_d.backward()
    optimizer_d.step()
    loss_g = F.softplus(-D(G(torch.randn(8, 100, generator=rng)) if fresh else fake)).mean()
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
    for _ in range(120):
        dcgan.train_step(G.train(), D, *adam, dcgan.to_batch(real, torch.randint(1024, (32,))))
    after, diversity = dcgan.compare(dcgan.sample(G.eval(), latents), real)
    near, wide = dcgan.compare(real[:512], real[512:])
    assert after < before / 2 and diversity > 0.6 and near < after and 0.9 < wide < 1.1
    assert dcgan.compare(real[:1].expand(512, -1, -1, -1), real)[1] < 0.01      # all the same

# ---- Data ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("missing", ["nothing", "decode_jpeg"])     # without it, Pillow decodes
def test_preparation_is_the_lectures(monkeypatch, missing):
    monkeypatch.delattr(dcgan.io, missing, raising=False)
    noise = torch.randint(0, 256, (3, 27, 22), dtype=torch.uint8)
    data = jpeg(T.ToPILImage()(noise).resize((178, 218)))
    lecture = T.Compose([T.CenterCrop(160), T.Resize(64), T.PILToTensor()])
    got, expected = dcgan.decode(data), lecture(Image.open(BytesIO(data)))
    assert got.dtype == torch.uint8 and (got.int() - expected.int()).abs().max() <= 3
    wide = Image.new("RGB", (96, 32), "red")        # anything but CelebA: the largest square
    wide.paste("blue", (32, 0, 64, 32))
    assert (dcgan.decode(jpeg(wide), 32)[2, :, 2:-2] > 240).all()

def test_odd_pictures(capsys):
    red, turned = (Image.new("RGB", (40, 40), color) for color in ("red", "black"))
    turned.paste("white", (0, 0, 40, 20))
    turned.getexif()[0x0112] = 6                # to be turned clockwise
    (folder := Path("odd/a/b")).mkdir(parents=True)
    grey16 = Image.fromarray(torch.full((40, 40), 32768).numpy().astype("uint16"))
    for name, image in {"grey.png": Image.new("L", (40, 50), 128), "g.png": grey16, "g.tif": grey16,
                        "alpha.png": Image.new("RGBA", (40, 40), (255, 0, 0, 9)),
                        "palette.png": red.convert("P"), "cmyk.jpg": red.convert("CMYK"),
                        "dot.bmp": red.resize((1, 1)), "LONG.JPG": red.resize((300, 20)),
                        "turned.jpg": turned}.items():
        image.save(folder / name, exif=image.getexif())
        got = dcgan.decode((folder / name).read_bytes(), 32)
        if name == "turned.jpg":
            assert (got[:, :, 18:] > 200).all() and (got[:, :, :14] < 50).all()
        elif name.startswith("g"):
            assert (got == 128).all()
        else:
            assert (got[0] > 250).all() and (got[1:] < 6).all()
    for bad in ("cut.jpg", "empty.png", ".hidden.png", "._grey.png", "notes.csv"):
        (folder / bad).write_bytes(jpeg()[:500] if bad == "cut.jpg" else b"")
    images, err = dcgan.load_images("odd", 32), capsys.readouterr().err
    assert images.shape == (9, 3, 32, 32) and images.dtype == torch.uint8
    assert err.count("skipped") == 2 and "cut.jpg" in err and "empty.png" in err

@pytest.mark.parametrize("place, count", [
    ("data/celeba/img_align_celeba", 10), ("data/celeba/x/img_align_celeba", 10), ("elsewhere", 9),
    ("data/celeba/img_align_celeba.zip", 10), ("elsewhere/archive.zip", 10)])
def test_celeba_as_it_is_found(monkeypatch, place, count):
    monkeypatch.setattr(dcgan, "CELEBA_PICTURES", 10)
    monkeypatch.setattr(dcgan, "CELEBA_TRAIN", 6)
    folder = Path("unpacked/img_align_celeba" if "zip" in place else place)
    (folder / "__MACOSX").mkdir(parents=True)
    for i in range(1, count + 1):
        (folder / f"{i:06d}.jpg").write_bytes(jpeg(color=(20 * i, 0, 0)))
        (folder / "__MACOSX" / f"._{i:06d}.jpg").write_bytes(b"")
    if "zip" in place:
        shutil.make_archive(place[:-4], "zip", "unpacked")
    images = dcgan.load_images(place if "elsewhere" in place else "data/celeba")
    assert len(images) == (6 if count == 10 else count)         # an incomplete one means all of it
    assert images[5, 0].float().mean().item() == pytest.approx(120, abs=3)

def test_cache_is_used_and_thrown_away(capsys):
    folder, cache = Path("faces"), Path("faces.dcgan.pt")
    def load(*args, **files):       # after some files were written
        for name, color in files.items():
            (folder / f"{name}.jpg").write_bytes(jpeg(color=color))
        dcgan.load_images(folder, *args)
        return "".join(capsys.readouterr())
    folder.mkdir()
    assert "decoded 3 of 3" in load(32, a="red", b="lime", c="blue") and load(32) == ""
    assert "decoded 3" in load(64) and "decoded 3" in load(64, 100)             # size, crop
    assert "decoded 3" in load(64, 100, a="lime") and "decoded 4" in load(64, 100, d="red")
    cache.write_bytes(cache.read_bytes()[:1000])
    assert "decoded 4" in load(64, 100) and load(64, 100) == ""                 # damaged
    cache.unlink()
    cache.mkdir()
    assert "no cache" in load(64, 100) and "decoded 4" in load(64, 100)         # unwritable
    assert {path.name for path in Path().iterdir()} == {"faces", "faces.dcgan.pt"}

@pytest.mark.parametrize("kind, told", [("offline", "unreachable"), ("html", "web page"), ("", ""),
                                        ("cut", "cut off"), ("md5", "MD5"), ("no gdown", "gdown")])
def test_download(kind, told, monkeypatch, capsys):
    with dcgan.ZipFile(data := BytesIO(), "w") as archive:
        archive.writestr("000001.jpg", jpeg())
    sent = {"html": b"<!DOCTYPE html>", "cut": jpeg()}.get(kind, data.getvalue())
    class gdown:
        def download(output, **options):
            if kind == "offline":
                raise ConnectionError("Network is unreachable")
            Path(output).write_bytes(sent)
    monkeypatch.setitem(sys.modules, "gdown", None if kind == "no gdown" else gdown)
    assert dcgan.CELEBA_MD5 == "00d2c5bc6d35e252742224ab0c1e8fcb"
    if not kind:
        monkeypatch.setattr(dcgan, "CELEBA_MD5", None)
        assert dcgan.load_images("data/celeba").shape == (1, 3, 64, 64)
        return
    line = fails(capsys, *SMALL)
    assert told in line and "zip into data/celeba" in line and "--data toy or --data FOLDER" in line
    assert list(Path("data/celeba").iterdir()) == []
    (archive := Path("data/celeba/img_align_celeba.zip")).write_text(" <html>")
    assert "web page" in fails(capsys, *SMALL) and archive.exists()     # the user's own is kept

# ---- The run -------------------------------------------------------------------------------------
def same(a, b):
    if isinstance(a, (dict, list, tuple)):
        a, b = (sorted(x.items()) if isinstance(x, dict) else x for x in (a, b))
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
    red, _, blue = T.PILToTensor()(Image.open(finished / "losses.png")).int()
    assert (blue - red > 60).sum() > 100 and (red - blue > 60).sum() > 100      # both curves

@pytest.mark.parametrize("number, status", [(2, 130), (15, 143), (9, -9)])     # 9: SIGKILL
def test_interrupt_and_resume(number, status, finished, pictures):
    code = ("import dcgan, os, sys; step, calls = dcgan.train_step, []; dcgan.train_step = lambda "
            "*a, **k: calls.append(1) or (len(calls) == 7 and os.kill(os.getpid(), int(n))) or "
            "step(*a, **k); n = sys.argv.pop(); dcgan.main(sys.argv[1:])")
    argv = ["--data", pictures, "--epochs", "2", *SMALL, str(number)]
    assert subprocess.run([sys.executable, "-c", code, *argv]).returncode == status
    assert torch.load("out/checkpoint.pt")["step"] == (5 if number == 9 else 7)     # epoch 2's 2nd
    dcgan.main(["--resume", "--epochs", "3", "--device", "cpu"])
    assert same(contents("out"), contents(finished))        # bit for bit

def test_two_processes_share_a_run(finished, pictures, monkeypatch, capfd):
    Path("spy.py").write_text(
        "import dcgan, os, torch; step, seen = dcgan.train_step, []\n"
        "dcgan.train_step = lambda G, D, *a, **k: (step(G, D, *a, **k), seen.append([a[2],"
        "D[0].weight.grad.clone(), *map(torch.clone, G.parameters())]))[0]\n"
        "dcgan.main(); torch.save(seen, os.environ.get('RANK', 'x'))")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for out, launcher in (("one", []), ("two", torchrun)):
        argv = ["spy.py", "--data", pictures, "--epochs", "2", "--out", out, *SMALL]
        subprocess.run([sys.executable, *launcher, *argv], check=True)
    assert capfd.readouterr().out.count("epoch 2 step 10 ") == 2        # rank 1 is silent
    one, *two = map(torch.load, "x01")
    assert one[0][1].norm() / two[0][0][1].norm() == pytest.approx(1, abs=0.3)      # the mean
    for (batch, *_), (a, *state_a), (b, *state_b) in zip(one, *two, strict=True):
        assert same(torch.stack([a, b], 1).flatten(0, 1), batch) and same(state_a, state_b)
    dcgan.main(["--resume", "--epochs", "3", "--out", "two", "--device", "cpu"])
    assert contents("two").keys() == contents(finished).keys()
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 processes" in fails(capfd, "--data", pictures, *SMALL)

def test_ema_follows_the_generator_and_is_it_when_off(finished, pictures):
    dcgan.main(["--data", pictures, "--epochs", "3", "--ema", "0", *SMALL])
    off, on = (contents(out)["checkpoint.pt"] for out in ("out", finished))
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
    ("--device cuda:99", "cuda:99"), ("--generate 3 --out bad", "bad"), ("--image-size 65", "65"),
    ("--device abacus", "abacus"), ("--data page.zip", "web page"), ("--flip-labels 1.5", "1.5"),
    ("--data .", "0 readable"), ("--epochs 0", ": 0"), ("--nonsense", "--no"), ("--lr-d -1", "-1"),
    ("--batch-size 0", ": 0"), ("--epochs x", "'x"), ("--ema nan", "nan"), ("--data bad", "bad"),
    ("--data nowhere", "nowhere"), ("--resume", "no checkpoint"), ("--batch-size 41", "40 ")])
def test_bad_input(argv, told, pictures, capsys):
    Path("bad").mkdir()
    for file in ("bad/x.csv", "bad/checkpoint.pt", "page.zip"):
        Path(file).write_text("<html>")
    line = fails(capsys, "--data", pictures, *SMALL, *argv.split())
    assert told in line and not Path("out").exists()

def test_import_does_nothing(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dcgan.py", "--nonsense"])
    exec(Path(dcgan.__file__).read_text(), {"__name__": "dcgan"})
    assert list(Path().iterdir()) == []
