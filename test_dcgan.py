"""Tests of dcgan.py: run `pytest`; under a minute, no network, no GPU needed.

Copy them along with the networks and the step, down to the line that says so.
"""
import csv
import errno
import hashlib
import inspect
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath, PureWindowsPath
from zipfile import ZipFile

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T
from torchvision.datasets import utils
from torchvision.transforms.functional import pil_to_tensor

import dcgan

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

def networks(image_size=32, width=8, seed=0):
    torch.manual_seed(seed)
    G = dcgan.Generator(width=width, image_size=image_size)
    return G, dcgan.Discriminator(width=width, image_size=image_size)

def parameters_of(*nets):
    return [p for net in nets for p in net.parameters()]

def sgd(G, D, rate_g=1, rate_d=1):
    """With SGD, an update is a gradient."""
    return torch.optim.SGD(G.parameters(), rate_g), torch.optim.SGD(D.parameters(), rate_d)

def one_step(device, bf16):
    """Train one step: every parameter moves, and stays finite and float32."""
    G, D = [net.to(device) for net in networks(64)]
    parameters = parameters_of(G, D)
    before = [p.clone() for p in parameters]
    computed = []
    G[1].register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
    real = torch.rand(8, 3, 64, 64, device=device)
    losses = dcgan.train_step(G, D, *sgd(G, D), real, bf16=bf16)
    assert computed == [torch.bfloat16 if bf16 else torch.float32]
    assert losses.isfinite().all()
    assert {p.dtype for p in parameters} == {torch.float32}
    for p, old in zip(parameters, before):
        assert p.isfinite().all()
        assert not torch.equal(p, old)

def test_generator_turns_100_d_noise_into_3_x_64_x_64_images():
    images = dcgan.Generator()(50 * torch.randn(2, 100))
    assert images.shape == (2, 3, 64, 64)
    assert images.abs().max() <= 1

def test_discriminator_turns_an_image_into_a_single_logit():
    assert dcgan.Discriminator()(torch.rand(2, 3, 64, 64)).shape == (2, 1)

@needs_cuda
@pytest.mark.parametrize("bf16", [False, True])
def test_one_training_step_on_cuda(bf16):
    one_step("cuda", bf16)

@pytest.mark.parametrize("bf16", [False, True])
def test_one_training_step_on_the_cpu(bf16):
    one_step("cpu", bf16)

# ---- Networks ------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [32, 64, 96, 128, 256])
def test_every_size_and_another_with_a_row_in_the_table(size, monkeypatch):
    monkeypatch.setitem(dcgan.WIDTHS, 96, (8, 4, 2, 1))         # from 6 x 6 on
    monkeypatch.setitem(dcgan.WIDTHS, 100, (8, 4, 2, 1))
    G, D = networks(size)
    images = G(torch.randn(2, 100))
    assert images.shape == (2, 3, size, size)
    assert D(images).shape == (2, 1)
    for network in dcgan.Generator, dcgan.Discriminator:
        with pytest.raises(ValueError, match="65 is not one of .32, 64"):
            network(image_size=65)
        with pytest.raises(ValueError, match="100 cannot be halved 4 times"):
            network(image_size=100)

@pytest.mark.parametrize("network, slope, parameters", [
    (dcgan.Generator(), 0.2, 3_576_707),
    (dcgan.Discriminator(), 0.2, 2_765_633),
    (dcgan.Generator(latent_dim=99, channels=1, slope=0.5), 0.5, 3_566_465),
    (dcgan.Discriminator(channels=1, slope=0.5), 0.5, 2_763_585),
])
def test_layers_are_the_papers_but_for_the_slope(network, slope, parameters):
    assert sum(p.numel() for p in network.parameters()) == parameters
    for layer in network.modules():
        assert getattr(layer, "negative_slope", slope) == slope
        if hasattr(layer, "weight"):
            assert 0.015 < layer.weight.std() < 0.025
            assert layer.weight.mean().round() == isinstance(layer, torch.nn.BatchNorm2d)

# ---- The game ------------------------------------------------------------------------------------
@pytest.mark.parametrize("fresh_noise", [False, True])
@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.1, 0.0), (0.0, 0.1)])
def test_step_is_the_one_written_out_here(fresh_noise, rates):
    """D first, then G against the new D; neither moves in the other's half."""
    real = torch.rand(8, 3, 32, 32) * 2 - 1
    rng = torch.Generator().manual_seed(1)
    nets, (G, D) = networks(), networks()
    losses = dcgan.train_step(*nets, *sgd(*nets, *rates), real, rng=rng, fresh_noise=fresh_noise)

    rng.manual_seed(1)
    optimizer_g, optimizer_d = sgd(G, D, *rates)
    fake = G(torch.randn(8, 100, generator=rng))
    real_logits, fake_logits = D(real), D(fake.detach())
    loss_d = (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2
    loss_d.backward()
    optimizer_d.step()
    optimizer_d.zero_grad()
    if fresh_noise:
        fake = G(torch.randn(8, 100, generator=rng))
    loss_g = F.softplus(-D(fake)).mean()
    loss_g.backward()
    optimizer_g.step()

    scores = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
    torch.testing.assert_close(losses, torch.stack([loss_d, loss_g, *scores]).detach())
    torch.testing.assert_close(parameters_of(*nets), parameters_of(G, D))
    assert not losses.requires_grad

@pytest.mark.parametrize("share, real, fake", [(0, 1, 0), (1, 0, 1), (0.25, 0.75, 0.25)])
def test_labels_are_swapped_for_the_discriminator_only(share, real, fake, monkeypatch):
    losses = replace(monkeypatch, "binary_cross_entropy_with_logits", owner=F)
    nets = networks(width=2)
    dcgan.train_step(*nets, *sgd(*nets), torch.zeros(3000, 3, 32, 32), flip_labels=share)
    means = [labels.mean().item() for (_, labels), _ in losses]
    assert means == pytest.approx([real, fake, 1], abs=0.04)

def test_step_freezes_nothing_and_thaws_nothing():
    G, D = networks()
    optimizer_g, optimizer_d = sgd(G, D)
    D[0].requires_grad_(False)
    before = [p.requires_grad for p in D.parameters()]
    optimizer_g.zero_grad = None        # raises in G's half
    with pytest.raises(TypeError):
        dcgan.train_step(G, D, optimizer_g, optimizer_d, torch.zeros(8, 3, 32, 32))
    assert [p.requires_grad for p in D.parameters()] == before

def test_step_average_and_sample_make_no_tensor_on_another_device(monkeypatch):
    """On the meta device, where a tensor made on the CPU raises."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    G, D, average = [net.to("meta") for net in (*networks(), networks()[0])]
    real = torch.empty(8, 3, 32, 32, device="meta")
    for tricks in {}, {"fresh_noise": True, "flip_labels": 0.5}:
        losses = dcgan.train_step(G, D, *sgd(G, D), real, **tricks)
        assert losses.device.type == "meta"
    dcgan.update_average(average, G, 0.999, 1)
    images = dcgan.sample(average.eval(), torch.randn(130, 100))
    assert (images.device.type, images.dtype) == ("meta", torch.uint8)
    assert images.shape == (130, 3, 32, 32)

@pytest.mark.parametrize("decay, step, share", [(0.999, 1, 0.9), (0.5, 99, 0.5), (0, 9, 1)])
def test_average_has_a_short_memory_at_first(decay, step, share):
    (average, _), (G, _) = networks(seed=0), networks(seed=1)
    G(torch.randn(8, 100))          # for the statistics of batch norm
    before, latest = average[1][1].running_var.clone(), G[1][1].running_var
    dcgan.update_average(average, G, decay, step)
    torch.testing.assert_close(average[1][1].running_var, before.lerp(latest, share))
    assert average[1][1].num_batches_tracked == 1

def test_the_lesson_needs_nothing_but_torch(monkeypatch):
    lesson, line, _ = Path(dcgan.__file__).read_text(encoding="utf-8").partition("# ==== Above")
    assert line
    assert len(lesson.splitlines()) < 200
    for name in "torchvision", "PIL", "tqdm", "numpy":
        monkeypatch.setitem(sys.modules, name, None)        # to import it raises
    names = {"__name__": "lesson"}
    exec(lesson, names)
    G, D = names["Generator"](width=2), names["Discriminator"](width=2)
    names["train_step"](G, D, *sgd(G, D), torch.zeros(8, 3, 64, 64))
    names["update_average"](G, G, 0.999, 1)

# ==== Copy the tests down to here along with the networks and the step ============================
SMALL = "--data toy --image-size 32 --width 8 --batch-size 8 --log-interval 2 --device cpu".split()
FACES = dcgan.toy_faces(40, 32)         # 5 steps an epoch
FILES = {"real.png", "samples.gif", "losses.png", "log.csv", "checkpoint.pt", "best.pt",
         "samples/epoch_001.png", "samples/epoch_002.png", "samples/epoch_003.png"}
RED = Image.new("RGB", (40, 40), "red")

@pytest.fixture(autouse=True)
def few_faces_and_an_own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dcgan, "toy_faces", lambda image_size: FACES)

def run(*argv):
    dcgan.main([str(word) for word in argv])

def train(*argv):
    run(*SMALL, *argv)

@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run of three epochs without a break."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan, "toy_faces", lambda image_size: FACES)
        train("--epochs", 3, "--out", out)
    return out

def error_of(*argv):
    """The one line with which a command fails."""
    with pytest.raises(SystemExit, match="dcgan.py: error: ") as stop:
        run(*argv)
    assert "\n" not in stop.value.code
    return stop.value.code

def checkpoint(out="out", name="checkpoint.pt"):
    return torch.load(Path(out, name), weights_only=True)

def contents(out="out"):
    """Every file below a folder: bytes by name, of a .pt what it holds."""
    files = {}
    for file in Path(out).rglob("*.*"):
        name = file.relative_to(out).as_posix()
        files[name] = checkpoint(out, name) if file.suffix == ".pt" else file.read_bytes()
    return files

def same(a, b):
    """Bit for bit, whatever is nested in whatever."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def replace(monkeypatch, name, change=None, owner=dcgan):
    """Let change(number of the call, function, ...) take a function's place; return its calls."""
    original, calls = getattr(owner, name), []
    change = change or (lambda i, original, *args, **options: original(*args, **options))

    def replaced(*args, **options):
        calls.append((args, options))
        return change(len(calls), original, *args, **options)

    monkeypatch.setattr(owner, name, replaced)
    return calls

def encoded(image=RED, kind="JPEG", **options):
    data = BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()

def archive(path, files):
    """Write a .zip, and the same files into a folder of that name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ZipFile(path, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    with ZipFile(path) as file:
        file.extractall(path.with_suffix(""))
    return path

# ---- Pictures in ---------------------------------------------------------------------------------
@pytest.mark.parametrize("size, crop, expected", [
    ((178, 218), None, 160),
    ((178, 218), 99, 99),
    ((75, 120), 200, 75),
])
def test_preparation_is_the_lectures_to_the_last_bit(size, crop, expected):
    image = Image.effect_noise(size, 99)
    prepared = dcgan.decode(encoded(image, "PNG"), 64, crop)
    lecture = T.Compose([T.CenterCrop(expected), T.Resize(64)])
    assert prepared.tobytes() == lecture(image.convert("RGB")).tobytes()

@pytest.mark.parametrize("mode, value, kind, color", [
    ("L", 128, "PNG", (128, 128, 128)),
    ("I;16", 32768, "PNG", (128, 128, 128)),
    ("I", 128, "TIFF", (128, 128, 128)),
    ("RGBA", (255, 0, 0, 9), "PNG", (255, 0, 0)),
    ("P", (255, 0, 0), "GIF", (255, 0, 0)),
    ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
])
def test_every_kind_of_picture_becomes_rgb(mode, value, kind, color):
    data = encoded(Image.new(mode, (40, 50), value), kind)
    assert dcgan.decode(data, 32).getcolors() == [(32 * 32, color)]

def test_turned_pictures_become_upright_and_malformed_exif_is_ignored(monkeypatch):
    turned = Image.new("L", (40, 40), 0)
    turned.paste(255, (0, 0, 40, 20))
    turned.getexif()[0x0112] = 6        # to be turned clockwise
    data = encoded(turned, exif=turned.getexif())
    assert dcgan.decode(data, 40).getpixel((35, 35)) > (250, 250, 250)
    monkeypatch.setattr(dcgan.ImageOps, "exif_transpose", None)         # raises
    assert dcgan.decode(data, 40).getpixel((35, 35)) < (5, 5, 5)

@pytest.mark.parametrize("kind", [PurePosixPath, PureWindowsPath])
def test_pictures_are_told_by_their_names_on_every_system(kind, monkeypatch):
    pictures = "a.jpg ./a/b.PNG a.jfif a.gif a.jp2"
    others = "a.dcgan jpg .a.jpg a/._b.jpg ./.hidden/a.jpg a.heic"
    assert all(dcgan.is_picture(kind(name)) for name in pictures.split())
    assert not any(dcgan.is_picture(kind(name)) for name in others.split())
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")       # as a plugin does
    monkeypatch.setitem(Image.OPEN, "HEIF", None)
    assert dcgan.is_picture(kind("a.heic"))

@pytest.mark.parametrize("source", ["odd", "odd.zip"])
def test_other_files_are_counted_and_ten_unreadable_pictures_named(source, capsys):
    files = {f"./cut{i:02d}.jpg": encoded()[:300] for i in range(12)}
    archive("odd.zip", files | {"good.jpg": encoded(), "a.HEIC": b"", ".hidden.png": b""})
    assert len(dcgan.load_images(source, 32)) == 1
    out, err = capsys.readouterr()
    assert f"{source}: 13 pictures, passed over 2 files" in out
    assert err.count("skipped cut") == 10
    assert "skipped 12 of 13 pictures" in err

def test_more_pictures_than_are_decoded_at_once_keep_their_order():
    shades = {f"{i:04d}.png": encoded(Image.new("L", (8, 8), i // 4), "PNG") for i in range(1001)}
    archive("many.zip", dict(reversed(shades.items())))
    means = dcgan.load_images("many.zip", 32).float().mean((1, 2, 3))
    assert torch.equal(means, torch.arange(1001).float() // 4)

@pytest.mark.parametrize("source", ["data", "data.zip"])        # data/ has the caches, too
def test_cache_serves_until_size_crop_or_a_picture_changes(source, monkeypatch):
    red, blue = [encoded(Image.new("RGB", (9, 9), color), "BMP") for color in ("red", "blue")]
    archive("data.zip", {"a.png": red, "b.png": red})
    decoded = replace(monkeypatch, "decode")
    for settings in (32,), (64,), (32,), (64, 5), (64,), (64, 5):
        dcgan.load_images(source, *settings)
    assert [args[1:] for args, _ in decoded[::2]] == [(32, None), (64, None), (64, 5)]
    archive("data.zip", {"a.png": blue, "b.png": red})      # as many bytes
    os.utime("data/b.png", (0, 0))
    dcgan.load_images(source, 32)
    assert len(decoded) == 8

@pytest.mark.parametrize("kept", [-1, 61440, 0])
def test_truncated_cache_is_prepared_anew(kept):
    images = dcgan.load_images(archive("a.zip", {"a.jpg": encoded()}), 64).clone()
    [cache] = Path("data").iterdir()
    cache.write_bytes(cache.read_bytes()[:kept])
    assert torch.equal(dcgan.load_images("a.zip", 64), images)

def test_two_starts_at_once_both_have_their_pictures():
    faces = archive("faces.zip", {f"{i}.jpg": encoded() for i in range(100)})
    first, second = ThreadPool(2).map(dcgan.load_images, [faces, faces])
    assert torch.equal(first, second)
    assert len(os.listdir("data")) == 1

def test_file_is_written_whole_or_not_at_all():
    with dcgan.atomic_write(Path("folder/file")) as unfinished:
        unfinished.write_text("old")
    with pytest.raises(KeyboardInterrupt), dcgan.atomic_write(Path("folder/file")) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert Path("folder/file").read_text() == "old"
    assert os.listdir("folder") == ["file"]

@pytest.fixture
def sources(monkeypatch):
    """What Google Drive and the two copies give in turn: bytes, or None, which fails."""
    given = []

    def give(i, original, *args, **options):
        call = inspect.signature(original).bind(*args, **options).arguments
        Path(call.get("output") or call["filename"]).write_bytes(given.pop(0))

    replace(monkeypatch, "download", give, owner=pytest.importorskip("gdown"))
    replace(monkeypatch, "_urlretrieve", give, owner=utils)
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, max_hops: url)
    return given

def test_celeba_is_downloaded_from_the_source_that_has_it(sources, monkeypatch, capsys):
    celeba = archive("celeba.zip", {"img_align_celeba/000001.jpg": encoded()}).read_bytes()
    monkeypatch.setattr(dcgan, "CELEBA_MD5", hashlib.md5(celeba).hexdigest())
    sources += [b"a page", None, celeba]
    for attempt in range(2):        # the second finds it there
        assert dcgan.load_images("data/celeba").shape == (1, 3, 64, 64)
        assert os.listdir("data/celeba") == ["img_align_celeba.zip"]
    assert capsys.readouterr().err.count("no CelebA from https://") == 2

def test_download_that_fails_says_what_to_do_and_is_tried_again(sources):
    for attempt in range(2):
        sources += [None, None, None]
        assert "put img_align_celeba.zip into" in error_of("--device", "cpu")
        assert os.listdir("data/celeba") == sources == []
    Path("data/celeba/x").mkdir()
    Path("data/celeba/x/1.PNG").write_bytes(encoded())
    assert len(dcgan.load_images("data/celeba", 32)) == 1

@pytest.mark.parametrize("count, taken", [(202_599, 162_770), (202_598, 202_598)])
def test_of_all_of_celeba_the_training_partition_is_taken(count, taken, monkeypatch):
    files = [(PurePosixPath(f"{i:06d}.jpg"),) for i in range(1, count + 1)]
    monkeypatch.setattr(dcgan, "list_files", lambda source: reversed(files))
    assert dcgan.find_pictures(Path("celeba")) == files[:taken]

def test_every_epoch_of_a_seed_has_an_own_order_and_can_start_anywhere():
    images = torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1)
    steps = list(dcgan.batches(images, 40, epochs=3, seed=42))
    others = list(dcgan.batches(images, 40, epochs=3, seed=43))
    assert len(torch.cat(steps[:2]).unique()) == 80
    assert len(torch.stack(steps + others).unique(dim=0)) == 12
    assert all(same(list(dcgan.batches(images, 40, 3, done=i)), steps[i:]) for i in range(7))

def test_batches_are_shared_floats_from_minus_one_to_one_where_they_are_to_be():
    images = torch.tensor([0, 255, 51, 102], dtype=torch.uint8).reshape(4, 1, 1, 1)
    [batch] = dcgan.batches(images, 4)
    assert batch.flatten().sort().values.tolist() == pytest.approx([-1, -0.6, -0.2, 1])
    shares = [next(dcgan.batches(images, 4, rank=rank, ranks=2)) for rank in (0, 1)]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), batch)
    assert next(dcgan.batches(images.to("meta"), 4)).device.type == "meta"
    assert next(dcgan.batches(images, 4, device="meta")).device.type == "meta"

# ---- Pictures out --------------------------------------------------------------------------------
def test_frechet_distance_is_the_known_one_and_diversity_shows_collapse():
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (2048, 3, 16, 16)).byte()
    narrow = noise // 2 + 64        # half the deviation, which is (1 / 3) ** 0.5
    black, white = torch.zeros_like(noise), torch.full_like(noise, 255)
    assert dcgan.compare(noise, noise) == pytest.approx((0, 1), abs=1e-4)
    assert dcgan.compare(narrow, noise) == pytest.approx((128 / 3 / 4, 0.5), rel=0.1)
    assert dcgan.compare(black, white)[0] == pytest.approx(128 * 2**2, rel=0.2)
    assert dcgan.compare(black, noise)[1] == 0

def test_a_small_network_learns_toy_faces(monkeypatch):
    monkeypatch.undo()          # back to all toy faces
    real, (G, D), (average, _) = dcgan.toy_faces(1024, 32), networks(width=16), networks(width=16)
    optimizers = [torch.optim.Adam(net.parameters(), 1e-3, (0.5, 0.999)) for net in (G, D)]
    latents = torch.randn(512, 100)
    before, _ = dcgan.compare(dcgan.sample(average.eval(), latents), real)
    for step, batch in enumerate(dcgan.batches(real, 32, epochs=4), 1):
        dcgan.train_step(G, D, *optimizers, batch)
        dcgan.update_average(average, G, 0.99, step)
    after, diversity = dcgan.compare(dcgan.sample(average, latents), real)
    assert after < 0.75 * before
    assert diversity > 0.6

@pytest.mark.parametrize("means", [(0.5, 2.0), (-3.0, -1.0)])
@pytest.mark.parametrize("steps", [1, 3000])
def test_loss_plot_shows_both_losses_also_negative_ones(means, steps):
    dcgan.plot_losses(torch.tensor(means) + 0.1 * torch.rand(steps, 2), 3, "losses.png")
    red, _, blue = pil_to_tensor(Image.open("losses.png")).int()
    lower, higher = (blue - red > 60).nonzero(), (red - blue > 60).nonzero()
    assert lower[:, 0].min() > higher[:, 0].max() + 100         # in pixels from the top
    assert len(lower[:, 1].unique()) > 400
    assert len(higher[:, 1].unique()) > 400

# ---- Devices -------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision, native, bf16", [
    ("auto", True, True),
    ("auto", False, False),
    ("bf16", False, True),
    ("fp32", True, False),
])
def test_each_process_has_its_gpu_and_bf16_where_it_is_native(precision, native, bf16, monkeypatch):
    monkeypatch.setattr(dcgan, "LOCAL_RANK", 2)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7 + native, 5))
    replace(monkeypatch, "zeros", lambda i, zeros, count, device: zeros(count), owner=torch)
    for name, device in ("cpu", "cpu"), ("cuda", "cuda:2"), ("cuda:1", "cuda:1"):
        assert dcgan.find_device(name, precision) == (torch.device(device), bf16)

# ---- The run -------------------------------------------------------------------------------------
def test_files_rows_lines_and_warnings_of_a_run(finished, monkeypatch, capsys):
    assert contents(finished).keys() == FILES
    [*_, row] = csv.DictReader(open(finished / "log.csv"))
    assert (row["epoch"], row["step"]) == ("3", "15")
    mean = checkpoint(finished)["losses"][10:, 1].mean().item()
    assert float(row["loss_g"]) == pytest.approx(mean, rel=1e-3)
    scores = iter([0.5] + 9 * [0.01])           # D has not won in the first epoch
    replace(monkeypatch, "train_step",
            lambda *args, **options: torch.tensor([0.00012345, 1, 0.5, next(scores)]))
    train("--epochs", 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" not in line[:9]]
    steps = [line.split()[3] for line in lines if " loss_d 0.0001234 loss_g 1.0 D(x) 0.5 " in line]
    assert steps == ["2", "4", "5", "6", "8", "10"]
    assert [line.split()[3] for line in lines if "frechet" in line] == ["5", "10"]
    assert lines[-1].startswith("warning: the discriminator has won")
    assert len(lines) == 8

def test_flags_reach_what_they_are_for(monkeypatch):
    names = "decode", "batches", "train_step", "update_average"
    decoded, batches, steps, averages = [replace(monkeypatch, name) for name in names]
    archive("a.zip", {f"{i}.jpg": encoded() for i in range(8)})
    train(*"""--data a.zip --epochs 1 --crop 30 --seed 7 --slope-g 0 --ema 0.5 --lr-g 0.1 --lr-d 0.2
        --beta1 0.3 --precision bf16 --fresh-noise --flip-labels 0.5""".split())
    assert decoded[0][0][1:] == (32, 30)
    assert batches[0][0][1:] == (8, 1, 7, 0, torch.device("cpu"), 0, 1)
    [((G, D, *optimizers, _), options)] = steps
    assert (G[1][2].negative_slope, D[1].negative_slope) == (0, 0.2)
    for optimizer, net, rate in zip(optimizers, (G, D), (0.1, 0.2)):
        assert isinstance(optimizer, torch.optim.Adam)
        [group] = optimizer.param_groups
        assert same(group.pop("params"), list(net.parameters()))
        assert (group["lr"], group["betas"], group["fused"]) == (rate, (0.3, 0.999), True)
    assert options.pop("rng").initial_seed() == dcgan.seed_of("noise", 7, 1, 0)
    assert options == {"bf16": True, "fresh_noise": True, "flip_labels": 0.5}
    assert averages[0][0][1:] == (G, 0.5, 1)

def test_a_run_begins_with_the_weights_of_its_seed_and_may_use_sgd(monkeypatch):
    steps = replace(monkeypatch, "train_step")
    train("--epochs", 1, "--seed", 7, "--optimizer-d", "sgd", "--lr-g", 0, "--lr-d", 0)
    G, D, _, optimizer_d, _ = steps[0][0]
    assert isinstance(optimizer_d, torch.optim.SGD)
    assert same(parameters_of(G, D), parameters_of(*networks(seed=7)))

def test_the_average_is_kept_drawn_and_measured(finished):
    saved = checkpoint(finished)
    assert not same(saved["ema"], saved["G"])
    G = dcgan.Generator(**saved["config"]).eval()
    G.load_state_dict(saved["ema"])
    fakes = dcgan.sample(G, saved["fixed_noise"])
    dcgan.save_image(fakes[:64] / 255, "grid.png")
    assert Path("grid.png").read_bytes() == (finished / "samples/epoch_003.png").read_bytes()
    assert saved["rows"][-1]["frechet"] == pytest.approx(dcgan.compare(fakes, FACES)[0], rel=1e-3)

def raise_in_step(monkeypatch, number, *signals):
    """Let these signals come in the middle of a run, and nobody read its output any longer."""
    def step(i, original, *args, **options):
        if i == number:
            monkeypatch.setattr(sys, "stdout", None)        # as Ctrl-C does to `dcgan.py | tee log`
            for signum in signals:
                signal.raise_signal(signum)
        return original(*args, **options)

    replace(monkeypatch, "train_step", step)

@pytest.mark.parametrize("step", [3, 6, 10])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_and_resume_as_if_nothing_had_been(step, signum, finished, monkeypatch):
    handler = signal.getsignal(signum)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        raise_in_step(patch, step, signum)
        train("--epochs", 2)
    assert stop.value.code == 128 + signum
    assert handler == signal.getsignal(signum)
    assert checkpoint()["step"] == step
    run("--resume", "--epochs", 3)
    assert same(contents(), contents(finished))         # bit for bit

def test_second_interrupt_ends_at_once(monkeypatch):
    raise_in_step(monkeypatch, 7, signal.SIGINT, signal.SIGINT)
    assert "interrupted" in error_of(*SMALL, "--epochs", 2)
    assert checkpoint()["step"] == 5

KILLED_IN_STEP_7 = """if True:
    import os, runpy, sys, torch
    backward, calls = torch.Tensor.backward, iter(range(12))
    torch.Tensor.backward = lambda *args, **options: (
        os.kill(os.getpid(), 9) if next(calls, None) is None else backward(*args, **options))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")"""

@pytest.mark.skipif(os.name == "nt", reason="no such signal on Windows")
def test_kill_and_resume_also_with_names_that_cannot_be_printed(finished, monkeypatch):
    archive("人脸.zip", {f"{i:02d}.png": encoded(T.ToPILImage()(face), "PNG") for i, face in enumerate(FACES)})
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    argv = [sys.executable, "-c", KILLED_IN_STEP_7, dcgan.__file__, *SMALL, "--data", "人脸"]
    ended = subprocess.run([*argv, "--epochs", "2"], capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert b"??: 40 pictures" in ended.stdout
    assert checkpoint()["step"] == 5
    run("--resume", "--epochs", 3, "--data", "toy")         # the same faces
    assert same(contents(), contents(finished))

@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_ends_the_run_and_is_not_saved(where, monkeypatch):
    def broken(i, original, G, D, *args, **options):
        losses = original(G, D, *args, **options)
        if i == 10:         # the last of an epoch
            (losses, next(G.parameters()), next(D.parameters()))[where].detach().fill_(torch.nan)
        return losses

    replace(monkeypatch, "train_step", broken)
    assert "not finite at step 10" in error_of(*SMALL, "--epochs", 3)
    assert checkpoint()["step"] == 5

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
])
def test_full_memory_or_disk_is_one_line_and_what_is_saved_stays(error, monkeypatch, finished):
    def full(i, original, *args):
        if i == 2:      # checkpoint.pt, after best.pt
            raise error
        original(*args)

    with monkeypatch.context() as patch:
        replace(patch, "save", full, owner=torch)
        assert error.args[-1] in error_of(*SMALL, "--epochs", 3)
    assert [path.name for path in Path("out").glob("*.pt*")] == ["best.pt"]
    train("--epochs", 3)        # a folder without a checkpoint is no run
    assert same(contents(), contents(finished))

def test_a_run_is_not_trained_over_nor_resumed_as_another(finished):
    before = contents(finished)
    archive("more.zip", {f"{i}.jpg": encoded() for i in range(41)})
    assert "holds a run" in error_of(*SMALL, "--out", finished)
    for flag, value in {"--width": 8, "--batch-size": 8, "--seed": 42}.items():
        assert f"has {flag} {value}" in error_of("--resume", "--out", finished, flag, 4)
    line = error_of("--resume", "--out", finished, "--data", "more.zip")
    assert "41 readable pictures, but the run began with 40" in line
    assert same(contents(finished), before)

def test_the_best_epoch_is_kept_and_drawn(monkeypatch, capsys):
    distances = iter([30, 20, 25, 20])
    monkeypatch.setattr(dcgan, "compare", lambda *args: (next(distances), 1.0))
    train("--epochs", 3)
    run("--resume", "--epochs", 4)
    assert checkpoint(name="best.pt")["step"] == 10             # of equal ones, the first
    run("--generate", 3)
    assert "epoch 2: 3 pictures in " in capsys.readouterr().out

def generate(finished, *argv):
    Path("best.pt").write_bytes((finished / "best.pt").read_bytes())
    run("--out", ".", "--generate", *argv)
    return contents("generated")

def test_generate_draws_the_same_again_and_removes_only_its_own(finished, monkeypatch):
    first = generate(finished, 70)
    image = pil_to_tensor(Image.open("generated/000064.png"))
    cell = pil_to_tensor(Image.open("generated.png"))[:, -34:-2, -34:-2]
    torch.testing.assert_close(image, cell, atol=1, rtol=0)
    Path("generated/mine.png").write_text("precious")
    assert len(generate(finished, 5, "--seed", 7).items() - first.items()) == 6
    assert generate(finished, 70) == first | {"mine.png": b"precious"}
    monkeypatch.setattr(dcgan, "RANK", 1)
    assert len(generate(finished, 9)) == 71     # of several processes, only the first one writes

def test_walk_goes_in_small_steps_from_one_picture_to_another(finished):
    generate(finished, 1)
    walk = pil_to_tensor(Image.open("walk.png")).float()[0, 2:34, 2:].unfold(1, 32, 34)
    steps, way = walk.diff(dim=1).norm(dim=(0, 2)), (walk[:, 7] - walk[:, 0]).norm()
    assert ((0 < steps) & (1.5 * steps < way)).all()

@pytest.mark.parametrize("step, diversity, fake_score, distances, told", [
    (301, 0.51, 0.051, [30], ""),
    (301, 0.49, 0.051, [30], "the generator collapses"),
    (300, 0.49, 0.051, [30], ""),           # too early to tell
    (301, 0.51, 0.049, [30], "the discriminator has won"),
    (301, 0.51, 1, [40, 20, 30, 30, 30, 30], ""),           # not for long enough
    (301, 0.51, 1, [40, 20, 23, 23, 23, 23, 23], "past its best, epoch 2,"),
    (301, 0.51, 1, [40, 20, 30, 30, 30, 30, 21], ""),       # not clearly
])
def test_troubles(step, diversity, fake_score, distances, told):
    rows = [{"epoch": epoch, "step": step, "frechet": distance, "diversity": diversity}
            for epoch, distance in enumerate(distances, 1)]
    troubles = list(dcgan.find_troubles(rows, fake_score))
    assert [trouble[:len(told)] for trouble in troubles] == [told] * bool(told)

# ---- Several processes ---------------------------------------------------------------------------
def watched_run(*argv):
    """Keep what each step had and made; of several processes, only the first one may write."""
    torch.set_num_threads(1)
    seen = []

    def step(i, original, G, D, *args, **options):
        losses = original(G, D, *args, **options)
        weights = [p.clone() for p in parameters_of(G, D)]
        seen.append((options["rng"].initial_seed(), D[0].weight.grad.norm(), weights))
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan, "toy_faces", lambda image_size: FACES)
        replace(patch, "train_step", step)
        if dcgan.RANK > 0:
            dcgan.save_image = dcgan.csv = dcgan.animate = dcgan.Run.save = None
        train("--epochs", 2, *argv)
    torch.save(seen, f"seen{dcgan.RANK}")

def test_two_processes_share_a_run_that_one_resumes(monkeypatch):
    watched_run("--out", "alone")
    alone = torch.load("seen0")[0][1]
    context, processes = torch.multiprocessing.get_context("spawn"), []
    for name, value in ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29517"), ("WORLD_SIZE", "2"):
        monkeypatch.setenv(name, value)
    for rank in "0", "1":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        processes.append(context.Process(target=watched_run))
        processes[-1].start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for first, second in zip(torch.load("seen0"), torch.load("seen1"), strict=True):
        assert first[0] != second[0]            # the seeds of the noise
        assert same(first[1:], second[1:])      # gradients and networks
    assert alone / torch.load("seen0")[0][1] == pytest.approx(1, abs=0.5)       # a mean, no sum
    run("--resume", "--epochs", 3)
    assert contents().keys() == FILES
    assert checkpoint()["step"] == 15

# ---- The command line ----------------------------------------------------------------------------
@pytest.mark.parametrize("argv, told", [
    ("--image-size 65", "invalid choice: 65"),
    ("--batch-size 0", "0 is not from 1"),
    ("--beta1 1", "1 is not from 0 to 0.999"),
    ("--ema nan", "nan is not"),
])
def test_wrong_flag_is_argparses_error(argv, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(*argv.split())
    assert told in capsys.readouterr().err

@pytest.mark.parametrize("argv, told", [
    ("--batch-size 41", "40 readable pictures, fewer than --batch-size 41"),
    ("--device abacus", "--device abacus cannot be used"),
    ("--device cuda:99", "try --device cpu"),
    ("--generate 3", "No such file"),
    ("--resume --out older", "KeyError('config')"),
    ("--resume --out code", "Weights only load failed"),
    ("--data page.zip", "not a zip file"),
    ("--data bad", "no picture can be read; skipped x.jpg: cannot identify image file"),
    ("--data nowhere", "put img_align_celeba.zip into"),
])
def test_bad_input_is_one_line(argv, told):
    archive("bad.zip", {"x.jpg": b""})
    Path("page.zip").write_text("<html>")
    for folder, content in ("older", {"settings": {}}), ("code", {"settings": Path()}):
        Path(folder).mkdir()
        torch.save(content, f"{folder}/checkpoint.pt")
    assert told in error_of(*SMALL, *argv.split())

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_train_resume_and_generate_remember_the_run(device):
    train("--epochs", 1, "--device", device)
    run("--resume", "--epochs", 2)
    run("--generate", 3)
    assert checkpoint()["step"] == 10
    assert checkpoint()["settings"]["device"] == device
