"""Tests of dcgan.py: run `pytest`; under a minute, no network, no GPU needed.
Copy them along with the networks and the step, down to the line that says so."""
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dcgan

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

def networks(image_size=32, width=8):
    torch.manual_seed(0)
    G = dcgan.Generator(width=width, image_size=image_size)
    return G, dcgan.Discriminator(width=width, image_size=image_size)

def parameters_of(*nets):
    return [p for net in nets for p in net.parameters()]

def sgd(*nets):
    """With SGD, an update is a share of a gradient."""
    return [torch.optim.SGD(net.parameters(), 0.1) for net in nets]

def one_step(device, bf16):
    """Train one step: every parameter moves, and stays finite."""
    G, D = [net.to(device) for net in networks(64)]
    parameters = parameters_of(G, D)
    before = [p.clone() for p in parameters]
    computed = []
    G.register_forward_hook(lambda module, inputs, images: computed.append(images.dtype))
    real = torch.rand(8, 3, 64, 64, device=device)
    losses = dcgan.train_step(G, D, *sgd(G, D), real, bf16=bf16)
    assert computed == [torch.bfloat16 if bf16 else torch.float32]
    assert losses.isfinite().all()
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
@pytest.mark.parametrize("size", [32, 96, 128, 256])
def test_every_size_and_another_with_a_row_in_the_table(size, monkeypatch):
    monkeypatch.setitem(dcgan.WIDTHS, 96, (8, 4, 2, 1))         # from 6 x 6 on
    G, D = networks(size)
    images = G(torch.randn(2, 100))
    assert images.shape == (2, 3, size, size)
    assert D(images).shape == (2, 1)

def test_a_size_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setitem(dcgan.WIDTHS, 100, (8, 4, 2, 1))
    for size, told in (65, "65 is not one of .32, 64"), (100, "100 cannot be halved 4 times"):
        with pytest.raises(ValueError, match=told):
            networks(size)

@pytest.mark.parametrize("network", [dcgan.Generator, dcgan.Discriminator])
def test_layers_begin_as_in_the_paper_but_for_the_slope(network):
    for layer in network(slope=0.5).modules():
        assert getattr(layer, "negative_slope", 0.5) == 0.5
        if hasattr(layer, "weight"):
            assert 0.01 < layer.weight.std() < 0.03
            assert layer.weight.mean().round() == isinstance(layer, torch.nn.BatchNorm2d)

# ---- The game ------------------------------------------------------------------------------------
@pytest.mark.parametrize("fresh_noise", [False, True])
def test_step_is_the_one_written_out_here(fresh_noise):
    real = torch.rand(8, 3, 32, 32) * 2 - 1
    rng = torch.Generator().manual_seed(1)
    nets = networks()
    losses = dcgan.train_step(*nets, *sgd(*nets), real, rng=rng, fresh_noise=fresh_noise)
    rng.manual_seed(1)
    G, D = networks()
    optimizers = sgd(G, D)
    fake = G(torch.randn(8, 100, generator=rng))
    real_logits, fake_logits = D(real), D(fake.detach())
    loss_d = (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2
    loss_d.backward()
    optimizers[1].step()
    if fresh_noise:
        fake = G(torch.randn(8, 100, generator=rng))
    loss_g = F.softplus(-D(fake)).mean()
    loss_g.backward(inputs=parameters_of(G))
    optimizers[0].step()
    torch.testing.assert_close(losses, torch.stack([
        loss_d, loss_g, real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()]).detach())
    torch.testing.assert_close(parameters_of(*nets), parameters_of(G, D))
    torch.testing.assert_close(nets[1][0].weight.grad, D[0].weight.grad)

@pytest.mark.parametrize("share, real, fake", [(0, 1, 0), (1, 0, 1), (0.25, 0.75, 0.25)])
def test_labels_are_swapped_for_the_discriminator_only(share, real, fake, monkeypatch):
    means = []
    def remember(logits, labels):
        assert logits.dtype == torch.float32
        means.append(labels.mean().item())
        return logits.mean()
    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", remember)
    nets, images = networks(width=2), torch.zeros(2000, 3, 32, 32)
    dcgan.train_step(*nets, *sgd(*nets), images, bf16=True, flip_labels=share)
    assert means == pytest.approx([real, fake, 1], abs=0.05)

def test_step_freezes_nothing_and_thaws_nothing():
    G, D = networks()
    optimizer_g, optimizer_d = sgd(G, D)
    D[0].requires_grad_(False)
    before = [p.requires_grad for p in D.parameters()]
    optimizer_g.zero_grad = None        # raises in G's half
    with pytest.raises(TypeError):
        dcgan.train_step(G, D, optimizer_g, optimizer_d, torch.zeros(8, 3, 32, 32))
    assert [p.requires_grad for p in D.parameters()] == before

def test_nothing_makes_a_tensor_on_another_device(monkeypatch):
    """On the meta device, where a tensor made on the CPU raises."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    G, D = [net.to("meta") for net in networks()]
    images = dcgan.sample(G, torch.randn(130, 100))
    for batch in dcgan.batches(images, 65), dcgan.batches(FACES, 8, device="meta"):
        losses = dcgan.train_step(G, D, *sgd(G, D), next(batch), fresh_noise=True, flip_labels=0.5)
        assert losses.device.type == "meta"
    dcgan.update_average(G, G, 0.999, 1)

@pytest.mark.parametrize("decay, step, share", [(0.999, 1, 0.9), (0.5, 99, 0.5), (0, 9, 1)])
def test_average_has_a_short_memory_at_first(decay, step, share):
    average, G = networks()[0], networks()[0]
    G(torch.randn(8, 100))          # for the statistics of batch norm
    before, latest = average[1][1].running_var.clone(), G[1][1].running_var
    dcgan.update_average(average, G, decay, step)
    torch.testing.assert_close(average[1][1].running_var, before.lerp(latest, share))
    assert average[1][1].num_batches_tracked == 1

def test_the_lesson_needs_nothing_but_torch(monkeypatch):
    lesson = Path(dcgan.__file__).read_text(encoding="utf-8").partition("# ==== Above")[0]
    assert len(lesson.splitlines()) < 200
    for name in "torchvision", "PIL", "tqdm", "numpy":
        monkeypatch.setitem(sys.modules, name, None)        # to import it raises
    names = {"__name__": "lesson"}
    exec(lesson, names)
    G, D = names["Generator"](width=2), names["Discriminator"](width=2)
    names["train_step"](G, D, *sgd(G, D), torch.zeros(8, 3, 64, 64))
    names["update_average"](G, G, 0.999, 1)

# ==== Copy the tests down to here along with the networks and the step ============================
# ruff: noqa: E402
import csv
import hashlib
import inspect
import os
import signal
import subprocess
from argparse import Namespace
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import PurePosixPath, PureWindowsPath
from zipfile import ZipFile
from PIL import Image
from torchvision import transforms as T
from torchvision.datasets import utils
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

SMALL = """--data toy --image-size 32 --width 8 --batch-size 8 --flip-labels 0.1 --log-interval 2
    --device cpu""".split()
FACES = dcgan.toy_faces(40, 32)
dcgan.toy_faces = lambda image_size: FACES          # 5 steps an epoch
FILES = {"real.png", "samples.gif", "losses.png", "log.csv", "checkpoint.pt", "best.pt",
         "samples/epoch_001.png", "samples/epoch_002.png", "samples/epoch_003.png"}

@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

def run(*argv):
    dcgan.main([str(word) for word in argv])

def train(*argv):
    run(*SMALL, *argv)

@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run of three epochs without a break."""
    out = tmp_path_factory.mktemp("run") / "out"
    train("--epochs", 3, "--out", out)
    return out

def error_of(*argv):
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

def same(a, b):         # bit for bit
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

def encoded(image, kind="PNG", **options):
    data = BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()

def picture(color="red"):
    return encoded(Image.new("RGB", (40, 40), color), "BMP")        # of as many bytes each

def archive(path, files):
    """Write a .zip, and the same files into a folder of that name."""
    with ZipFile(path, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
        file.extractall(path.removesuffix(".zip"))
    return path

# ---- Pictures in ---------------------------------------------------------------------------------
@pytest.mark.parametrize("size, crop, expected", [
    ((178, 218), None, 160), ((178, 218), 99, 99), ((75, 120), 200, 75),
])
def test_preparation_is_the_lectures_to_the_last_bit(size, crop, expected):
    image = Image.effect_noise(size, 99)
    prepared = dcgan.decode(encoded(image), 64, crop)
    lecture = T.Compose([T.CenterCrop(expected), T.Resize(64)])
    assert prepared.tobytes() == lecture(image.convert("RGB")).tobytes()

@pytest.mark.parametrize("mode, value, color", [
    ("L", 128, (128, 128, 128)),
    ("I", 128, (128, 128, 128)),
    ("I;16", 32768, (128, 128, 128)),
    ("RGBA", (255, 0, 0, 9), (255, 0, 0)),
])
def test_every_kind_of_picture_becomes_rgb(mode, value, color):
    data = encoded(Image.new(mode, (40, 50), value), "TIFF")
    assert dcgan.decode(data, 32).getcolors() == [(1024, color)]

def test_turned_pictures_become_upright_and_malformed_exif_is_ignored(monkeypatch):
    turned = Image.new("L", (40, 40), "black")
    turned.paste("white", (0, 0, 40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6        # to be turned clockwise
    data = encoded(turned, exif=exif)
    assert dcgan.decode(data, 40).getpixel((35, 35)) == (255, 255, 255)
    monkeypatch.setattr(dcgan.ImageOps, "exif_transpose", None)         # raises
    assert dcgan.decode(data, 40).getpixel((35, 35)) == (0, 0, 0)

@pytest.mark.parametrize("kind", [PurePosixPath, PureWindowsPath])
def test_pictures_are_told_by_their_names_on_every_system(kind, monkeypatch):
    pictures = "a.jpg ./a/b.PNG a.jfif a.gif"
    others = "a.dcgan jpg .a.jpg a/._b.jpg ./.hidden/a.jpg a.pdf a.heic"    # PDF is only written
    assert all(dcgan.is_picture(kind(name)) for name in pictures.split())
    assert not any(dcgan.is_picture(kind(name)) for name in others.split())
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")       # as its plugin does
    monkeypatch.setitem(Image.OPEN, "HEIF", None)
    assert dcgan.is_picture(kind("a.heic"))

@pytest.mark.parametrize("source", ["odd", "odd.zip"])
def test_other_files_are_counted_and_ten_unreadable_pictures_named(source, capsys):
    files = {f"./cut{i:02d}.bmp": picture()[:300] for i in range(12)}
    archive("odd.zip", files | {"good.bmp": picture(), "a.txt": b"", ".hidden.png": b""})
    assert len(dcgan.load_images(source, 32)) == 1
    out, err = capsys.readouterr()
    assert f"{source}: 13 pictures, passed over 2 files" in out
    assert err.count("skipped cut") == 10
    assert "skipped 12 of 13 pictures" in err

@pytest.mark.parametrize("source", ["data", "data.zip"])        # data/ has the caches, too
def test_cache_serves_until_size_crop_or_a_picture_changes(source, monkeypatch):
    archive("data.zip", {"a.bmp": picture()})
    decoded = replace(monkeypatch, "decode")
    for settings in (32,), (64,), (32,), (64, 5), (64,), (64, 5):
        dcgan.load_images(source, *settings)
    assert [args[1:] for args, _ in decoded] == [(32, None), (64, None), (64, 5)]
    archive("data.zip", {"a.bmp": picture("blue")})
    dcgan.load_images(source, 32)
    assert len(decoded) == 4

@pytest.mark.parametrize("kept", [0, 32 * 32 * 3, -1])
def test_truncated_cache_is_prepared_anew(kept):
    faces = archive("a.zip", {"1.bmp": picture(), "2.bmp": picture("blue")})
    images = dcgan.load_images(faces, 32).clone()
    [cache] = Path("data").iterdir()
    cache.write_bytes(cache.read_bytes()[:kept])
    assert torch.equal(dcgan.load_images(faces, 32), images)

def test_two_starts_at_once_both_have_their_pictures():
    faces = archive("faces.zip", {f"{i}.bmp": picture() for i in range(100)})
    first, second = ThreadPool(2).map(dcgan.load_images, [faces, faces])
    assert torch.equal(first, second)
    assert len(os.listdir("data")) == 1

def test_file_is_written_whole_or_not_at_all():
    file = Path("folder/file")
    with dcgan.atomic_write(file) as unfinished:
        unfinished.write_text("old")
    with pytest.raises(KeyboardInterrupt), dcgan.atomic_write(file) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
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

def test_celeba_is_downloaded_from_the_source_that_has_it(sources, monkeypatch):
    celeba = Path(archive("a.zip", {"img_align_celeba/1.bmp": picture()})).read_bytes()
    monkeypatch.setattr(dcgan, "CELEBA_MD5", hashlib.md5(celeba).hexdigest())
    sources += [b"a page", None, celeba]
    for attempt in range(2):        # the second finds it there
        assert len(dcgan.load_images("data/celeba")) == 1
        assert os.listdir("data/celeba") == ["img_align_celeba.zip"]

def test_download_that_fails_says_what_to_do_and_is_tried_again(sources):
    for attempt in range(2):
        sources += [None, None, None]
        assert "put img_align_celeba.zip into" in error_of("--device", "cpu")
        assert os.listdir("data/celeba") == sources == []

@pytest.mark.parametrize("count, taken", [(202_599, 162_770), (202_598, 202_598)])
def test_of_all_of_celeba_the_training_partition_is_taken(count, taken, monkeypatch):
    files = [(i,) for i in range(count)]
    monkeypatch.setattr(dcgan, "list_files", lambda source: reversed(files))
    monkeypatch.setattr(dcgan, "is_picture", lambda path: True)
    assert dcgan.find_pictures(Path("celeba")) == files[:taken]

def test_every_epoch_of_a_seed_has_an_own_order_and_can_start_anywhere():
    images = torch.arange(100).byte().reshape(100, 1, 1, 1)
    steps = list(dcgan.batches(images, 40, 3, 42))
    others = list(dcgan.batches(images, 40, 3, 43))
    assert len(torch.cat(steps[:2]).unique()) == 80
    assert len(torch.stack(steps + others).unique(dim=0)) == 12
    for done in range(7):
        assert same(list(dcgan.batches(images, 40, 3, 42, done)), steps[done:])

def test_batches_are_shared_floats_from_minus_one_to_one():
    images = torch.tensor([0, 255, 51, 102]).byte().reshape(4, 1, 1, 1)
    [batch] = dcgan.batches(images, 4)
    assert batch.flatten().sort().values.tolist() == pytest.approx([-1, -0.6, -0.2, 1])
    for rank in 0, 1:
        [share] = dcgan.batches(images, 4, rank=rank, ranks=2)
        assert torch.equal(share, batch[rank::2])

# ---- Pictures out --------------------------------------------------------------------------------
def test_frechet_distance_is_the_known_one_and_diversity_shows_collapse():
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (2048, 3, 16, 16)).byte()
    narrow = noise // 2 + 64        # half the deviation, which is (1 / 3) ** 0.5
    black, white = torch.zeros_like(noise), torch.full_like(noise, 255)
    assert dcgan.compare(narrow, noise) == pytest.approx((128 / 3 / 4, 0.5), rel=0.1)
    assert dcgan.compare(black, white)[0] == pytest.approx(128 * 2**2, rel=0.2)
    assert dcgan.compare(black, noise)[1] == 0

def test_loss_plot_shows_both_losses_also_negative_ones():
    dcgan.plot_losses(torch.rand(3000, 2) + torch.tensor([-9, 1]), 3, "losses.png")
    red, _, blue = pil_to_tensor(Image.open("losses.png")).int()
    lower, higher = (blue - red > 60).nonzero(), (red - blue > 60).nonzero()
    assert lower[:, 0].min() > higher[:, 0].max() + 100         # in pixels from the top
    assert min(len(lower[:, 1].unique()), len(higher[:, 1].unique())) > 400

# ---- Devices -------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision, native, bf16", [
    ("auto", True, True), ("auto", False, False), ("bf16", False, True), ("fp32", True, False),
])
def test_each_process_has_its_gpu_and_bf16_where_it_is_native(precision, native, bf16, monkeypatch):
    monkeypatch.setattr(dcgan, "LOCAL_RANK", 2)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native == (name == "cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native == (name != "cpu"))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: Namespace(device=torch.device(device)))
    for name, device in ("cpu", "cpu"), ("cuda", "cuda:2"), ("cuda:1", "cuda:1"):
        assert dcgan.find_device(name, precision) == (torch.device(device), bf16)

# ---- The run -------------------------------------------------------------------------------------
def test_a_run_leaves_its_files_and_a_row_an_epoch(finished):
    assert contents(finished).keys() == FILES
    assert Image.open(finished / "samples.gif").n_frames == 3
    rows = list(csv.DictReader((finished / "log.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["5", "10", "15"]
    losses = checkpoint(finished)["losses"]
    assert float(rows[2]["loss_g"]) == pytest.approx(losses[10:, 1].mean().item(), rel=1e-3)

def test_a_run_prints_steps_epochs_and_warnings(monkeypatch, capsys):
    scores = iter([0.5] + 9 * [0.01])           # D has not won in the first epoch
    replace(monkeypatch, "train_step",
            lambda *args, **options: torch.tensor([0.00012345, 1, 0.5, next(scores)]))
    train("--epochs", 2)
    printed = capsys.readouterr().out
    steps = [line.split()[3] for line in printed.splitlines() if " step " in line]
    assert steps == ["2", "4", "5", "6", "8", "10"]
    assert printed.count(" loss_d 0.0001234 loss_g 1.0 D(x) 0.5 D(G(z)) ") == 6
    assert printed.count(" frechet ") == 2
    assert printed.count("warning: the discriminator has won") == 1

def test_flags_reach_what_they_are_for(monkeypatch):
    names = "decode", "batches", "train_step", "update_average"
    decoded, batches, steps, averages = [replace(monkeypatch, name) for name in names]
    archive("a.zip", {f"{i}.bmp": picture() for i in range(8)})
    train(*"""--data a.zip --epochs 1 --crop 30 --seed 7 --slope-g 0 --ema 0.5 --lr-g 0.1 --lr-d 0.2
        --beta1 0.3 --optimizer-d sgd --precision bf16 --fresh-noise --flip-labels 0.5""".split())
    assert decoded[0][0][1:] == (32, 30)
    assert batches[0][0][1:] == (8, 1, 7, 0, torch.device("cpu"), 0, 1)
    [((G, _, adam, plain, _), options)] = steps
    assert G[1][2].negative_slope == 0
    assert (adam.defaults["lr"], adam.defaults["betas"]) == (0.1, (0.3, 0.999))
    assert isinstance(plain, torch.optim.SGD)
    assert plain.defaults["lr"] == 0.2
    assert options.pop("rng").initial_seed() == dcgan.seed_of("noise", 7, 1, 0)
    assert options == {"bf16": True, "fresh_noise": True, "flip_labels": 0.5}
    assert averages[0][0][1:] == (G, 0.5, 1)

def test_each_epoch_draws_the_noise_of_the_seed_with_the_average(finished, monkeypatch):
    samples = replace(monkeypatch, "sample")
    train("--epochs", 1, "--seed", 7)
    saved, (G, noise) = checkpoint(), samples[0][0]
    assert same([G.state_dict(), noise], [saved["ema"], saved["fixed_noise"]])
    assert not same(saved["ema"]["1.0.weight"], saved["G"]["1.0.weight"])
    assert not same(noise, checkpoint(finished)["fixed_noise"])

def raise_in_step(monkeypatch, number, *signals):
    """Let these signals come in the middle of a run, and nobody read its output any longer."""
    def step(i, original, *args, **options):
        if i == number:
            monkeypatch.setattr(sys, "stdout", open(os.devnull))    # to write is an OSError
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
    run("--resume", "--epochs", 3)          # and all else as before
    assert same(contents(), contents(finished))         # bit for bit

def test_second_interrupt_ends_at_once(monkeypatch):
    raise_in_step(monkeypatch, 7, signal.SIGINT, signal.SIGINT)
    assert "interrupted" in error_of(*SMALL, "--epochs", 2)
    assert checkpoint()["step"] == 5

KILLED_IN_STEP_7 = f"""if True:
    import os, runpy, torch
    backward, calls = torch.Tensor.backward, iter(range(12))
    torch.Tensor.backward = lambda *args, **options: (
        os.kill(os.getpid(), 9) if next(calls, None) is None else backward(*args, **options))
    runpy.run_path({dcgan.__file__!r}, run_name="__main__")"""

@pytest.mark.skipif(os.name == "nt", reason="no such signal on Windows")
def test_kill_and_resume_also_with_names_that_cannot_be_printed(finished, monkeypatch):
    faces = {f"{i:02d}.png": encoded(to_pil_image(face)) for i, face in enumerate(FACES)}
    archive("人脸.zip", faces)
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    argv = [sys.executable, "-c", KILLED_IN_STEP_7, *SMALL, "--data", "人脸", "--epochs", "2"]
    ended = subprocess.run(argv, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert b"??: 40 pictures" in ended.stdout
    assert checkpoint()["step"] == 5
    run("--resume", "--epochs", 3, "--data", "toy")         # the same faces
    assert same(contents(), contents(finished))

@pytest.mark.parametrize("where", ["losses", "weights"])
def test_what_is_not_finite_ends_the_run_and_is_not_saved(where, monkeypatch):
    def step(i, original, G, D, *args, **options):
        losses = original(G, D, *args, **options)
        if i == 10:         # the last of an epoch
            broken = losses if where == "losses" else next(D.parameters())
            broken.detach().fill_(torch.nan)
        return losses
    replace(monkeypatch, "train_step", step)
    assert "not finite at step 10" in error_of(*SMALL, "--epochs", 3)
    assert checkpoint()["step"] == 5

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), OSError("full")])
def test_full_memory_or_disk_is_one_line_and_what_is_saved_stays(error, monkeypatch):
    def full(i, original, *args):
        if i == 2:      # checkpoint.pt, after best.pt
            raise error
        original(*args)
    replace(monkeypatch, "write_bytes", full, owner=Path)
    assert "full" in error_of(*SMALL, "--epochs", 1)
    assert [path.name for path in Path("out").glob("*.pt*")] == ["best.pt"]

def test_a_run_is_not_trained_over_nor_resumed_as_another(finished):
    before = contents(finished)
    archive("more.zip", {f"{i}.bmp": picture() for i in range(41)})
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
    samples = replace(monkeypatch, "sample")
    first = generate(finished, 9)
    (G, walk), (_, latents), *_ = [args for args, _ in samples]
    assert same(G.state_dict(), checkpoint(finished, "best.pt")["ema"])
    torch.manual_seed(42)
    assert same(torch.cat([walk[::8], walk[7::8], latents]), torch.randn(25, 100))
    Path("generated/mine.png").write_text("precious")
    second = generate(finished, 5, "--seed", 7)
    assert len(second) == len(second.items() - first.items()) == 6
    assert generate(finished, 9) == first | {"mine.png": b"precious"}

@pytest.mark.parametrize("step, diversity, d_fake, distances, told", [
    (301, 0.51, 0.051, [30], []),
    (301, 0.49, 0.051, [30], ["the generator collapses"]),
    (300, 0.49, 0.051, [30], []),           # too early to tell
    (301, 0.51, 0.049, [30], ["the discriminator has won"]),
    (301, 0.51, 1, [40, 20, 30, 30, 30, 30], []),           # not for long enough
    (301, 0.51, 1, [40, 20, 23, 23, 23, 23, 23], ["past its best, epoch 2, kept in best.pt"]),
    (301, 0.51, 1, [40, 20, 30, 30, 30, 30, 21], []),       # not clearly
])
def test_troubles(step, diversity, d_fake, distances, told):
    rows = [{"epoch": epoch, "step": step, "frechet": distance, "diversity": diversity}
            for epoch, distance in enumerate(distances, 1)]
    troubles = dcgan.find_troubles(rows, d_fake)
    assert [trouble.split(";")[0] for trouble in troubles] == told

# ---- Several processes ---------------------------------------------------------------------------
def watched_run(*argv):
    """Keep what each step had and made; of several processes, only the first one may write."""
    torch.set_num_threads(1)
    steps = []
    def step(i, original, *nets, **options):
        losses = original(*nets, **options)
        weights = parameters_of(*nets[:2])
        made = [p.clone() for p in weights], [p.grad.clone() for p in weights]
        steps.append([options["rng"].initial_seed(), *made])
        return losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
        replace(patch, "train_step", step)
        if dcgan.RANK > 0:
            dcgan.save_image = dcgan.csv = dcgan.animate = dcgan.Run.save = None
        train("--epochs", 2, *argv)
    assert not torch.distributed.is_initialized()
    torch.save(steps, f"rank{dcgan.RANK}")

def test_two_processes_share_a_run_that_one_resumes(monkeypatch):
    watched_run("--out", "alone")
    [alone, *_] = torch.load("rank0")
    context, processes = torch.multiprocessing.get_context("spawn"), []
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29517")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "0", "1":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        processes.append(context.Process(target=watched_run))
        processes[-1].start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for first, second in zip(torch.load("rank0"), torch.load("rank1"), strict=True):
        assert first[0] != second[0]            # the seeds of the noise
        assert same(first[1:], second[1:])      # networks and gradients
    first = torch.load("rank0")[0]
    norms = [torch.nn.utils.get_total_norm(step[2]) for step in (alone, first)]
    assert norms[0] / norms[1] == pytest.approx(1, abs=0.3)         # a mean, no sum
    run("--resume", "--epochs", 3)
    assert contents().keys() == FILES
    assert checkpoint()["step"] == 15

# ---- The command line ----------------------------------------------------------------------------
@pytest.mark.parametrize("argv", ["--image-size 65", "--batch-size 1", "--beta1 1", "--ema nan"])
def test_wrong_flag_is_argparses_error(argv):
    with pytest.raises(SystemExit, match="^2$"):
        train(*argv.split())

@pytest.mark.parametrize("argv, told", [
    ("--batch-size 41", "40 readable pictures, fewer than --batch-size 41"),
    ("--device abacus", "--device abacus cannot be used"),
    ("--generate 3", "No such file"),
    ("--resume --out older", "KeyError('config')"),
    ("--resume --out code", "Weights only load failed"),
    ("--data page.zip", "not a zip file"),
    ("--data nowhere", "use --data toy"),
    ("--data bad", "no picture can be read; skipped x.jpg: cannot identify image file"),
])
def test_bad_input_is_one_line(argv, told):
    archive("bad.zip", {"x.jpg": b""})
    Path("page.zip").write_text("<html>")
    for folder, content in ("older", {"settings": {}}), ("code", {"settings": Path()}):
        Path(folder).mkdir()
        torch.save(content, f"{folder}/checkpoint.pt")
    assert told in error_of(*SMALL, *argv.split())
