"""Tests of dcgan.py: run `pytest`; under a minute, no network, no GPU needed.
Copy them along with the networks and the step, down to the line that says so."""
import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dcgan

# Small networks need no more, and the tests run programs beside them.
torch.set_num_threads(1)
cuda = pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here"))

def networks(image_size=32, width=8):
    torch.manual_seed(0)
    G = dcgan.Generator(width=width, image_size=image_size)
    D = dcgan.Discriminator(width=width, image_size=image_size)
    return G, D

def parameters_of(*nets):
    return [p for net in nets for p in net.parameters()]

def sgd(*nets):
    """With SGD, an update is a share of a gradient."""
    return [torch.optim.SGD(net.parameters(), 0.1) for net in nets]

def step_of(G, D, **options):
    """Train one step on eight grey images."""
    size = D.image_shape[-1]
    return dcgan.train_step(G, D, *sgd(G, D), torch.zeros(8, 3, size, size), **options)

def test_generator_turns_100_d_noise_into_3_x_64_x_64_images():
    images = dcgan.Generator()(50 * torch.randn(2, 100))
    assert images.shape == (2, 3, 64, 64)
    assert images.abs().max() <= 1

def test_discriminator_turns_an_image_into_a_single_logit():
    logits = dcgan.Discriminator()(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 1)

@pytest.mark.parametrize("device", ["cpu", cuda])
@pytest.mark.parametrize("bf16", [False, True])
def test_one_training_step_moves_every_parameter(device, bf16):
    G, D = [net.to(device) for net in networks(64)]
    parameters = parameters_of(G, D)
    before = [p.clone() for p in parameters]
    real = torch.rand(8, 3, 64, 64, device=device)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        losses = dcgan.train_step(G, D, *sgd(G, D), real)
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    for p, old in zip(parameters, before):
        assert p.isfinite().all()
        assert not torch.equal(p, old)

# ---- Networks -------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [32, 96, 256])
def test_other_sizes(size):
    G, D = networks(size)
    images = G(torch.randn(2, 100))
    assert images.shape == (2, 3, size, size)
    assert D(images).shape == (2, 1)

def test_maps_have_8_times_the_width_at_most():
    channels, side = dcgan.plan_maps(256, width=1)
    assert channels == [8, 8, 8, 4, 2, 1]
    assert side == 4

@pytest.mark.parametrize("size", [4, 65, 100])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match=f"{size} is not 4 to 7 times 2, 4, 8"):
        networks(size)

def test_networks_have_as_many_parameters_as_the_lectures():
    assert sum(p.numel() for p in dcgan.Generator().parameters()) == 3_576_704
    assert sum(p.numel() for p in dcgan.Discriminator().parameters()) == 2_765_633

@pytest.mark.parametrize("network", [dcgan.Generator, dcgan.Discriminator])
def test_layers_begin_as_in_the_paper_but_for_the_slope(network):
    for layer in network().layers:
        assert getattr(layer, "negative_slope", 0.2) == 0.2
        if hasattr(layer, "weight"):
            normalises = isinstance(layer, torch.nn.BatchNorm2d)
            assert 0.01 < layer.weight.std() < 0.03
            assert layer.weight.mean().round() == normalises

def test_generator_also_takes_latents_as_maps_of_one_pixel():
    G = networks()[0].eval()
    latents = torch.randn(2, 100, 1, 1)
    assert torch.equal(G(latents), G(latents.flatten(1)))

@pytest.mark.parametrize("shape", [[2, 3, 64, 64], [2, 1, 32, 32], [3, 32, 32]])
def test_discriminator_refuses_images_of_another_shape(shape):
    G, D = networks(32)
    with pytest.raises(ValueError, match="D takes"):
        D(torch.zeros(shape))

def test_discriminator_can_be_cut_and_do_without_batch_norm():
    D = dcgan.Discriminator(norm=torch.nn.Identity)
    assert D.layers[:-2](torch.zeros(2, 3, 64, 64)).shape == (2, 512, 4, 4)
    assert len(D.state_dict()) == 10  # weights and biases of five convolutions

# ---- The game -------------------------------------------------------------------------------
@pytest.mark.parametrize("fresh_noise", [False, True])
def test_step_is_the_one_written_out_here(fresh_noise):
    real = torch.rand(8, 3, 32, 32) * 2 - 1
    nets = networks()
    torch.manual_seed(1)
    losses = dcgan.train_step(*nets, *sgd(*nets), real, fresh_noise=fresh_noise)

    G, D = networks()
    optimizer_g, optimizer_d = sgd(G, D)
    torch.manual_seed(1)
    fake = G(torch.randn(8, 100))
    real_logits = D(real)
    fake_logits = D(fake.detach())
    loss_real = F.softplus(-real_logits).mean()
    loss_fake = F.softplus(fake_logits).mean()
    loss_d = (loss_real + loss_fake) / 2
    loss_d.backward()
    optimizer_d.step()
    if fresh_noise:
        fake = G(torch.randn(8, 100))
    loss_g = F.softplus(-D(fake)).mean()
    loss_g.backward(inputs=parameters_of(G))
    optimizer_g.step()

    d_real = real_logits.sigmoid().mean()
    d_fake = fake_logits.sigmoid().mean()
    expected = torch.stack([loss_d, loss_g, d_real, d_fake]).detach()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(parameters_of(*nets), parameters_of(G, D))
    gradients = [net.layers[0].weight.grad for net in (nets[1], D)]
    torch.testing.assert_close(*gradients)

def test_step_takes_other_losses():
    losses = step_of(
        *networks(),
        loss_for_d=lambda real, fake: 3 + 0 * (real + fake).mean(),
        loss_for_g=lambda fake: 4 + 0 * fake.mean(),
    )
    assert losses[:2].tolist() == [3, 4]

def test_step_trains_fully_connected_networks():
    to_pixels = torch.nn.Linear(100, 192)
    G = torch.nn.Sequential(to_pixels, torch.nn.Unflatten(1, [3, 8, 8]))
    D = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 1))
    D.image_shape = [3, 8, 8]
    assert step_of(G, D).isfinite().all()

@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_a_swapped_label_is_a_negated_logit(share):
    """For cross-entropy that is the same: bce(x, 0) = bce(-x, 1)."""
    logits = torch.ones(4000, 1)
    swapped = dcgan.swap_labels(logits, share)
    assert torch.equal(swapped.abs(), logits)
    assert swapped.mean() == pytest.approx(1 - 2 * share, abs=0.05)

def test_labels_are_swapped_for_the_discriminator_only(monkeypatch):
    shares = []

    def remember(logits, share):
        shares.append(share)
        return logits

    monkeypatch.setattr(dcgan, "swap_labels", remember)
    step_of(*networks(), flip_labels=0.25)
    assert shares == [0.25, 0.25]

def test_step_freezes_nothing_and_thaws_nothing():
    def broken_loss(logits):
        raise ArithmeticError

    G, D = networks()
    D.layers[0].requires_grad_(False)
    before = [p.requires_grad for p in D.parameters()]
    with pytest.raises(ArithmeticError):
        step_of(G, D, loss_for_g=broken_loss)
    assert [p.requires_grad for p in D.parameters()] == before

def test_nothing_in_the_lesson_makes_a_tensor_on_another_device():
    """On the meta device, where a tensor made on the CPU raises."""
    G, D = [net.to("meta") for net in networks()]
    optimizers = sgd(G, D)
    average = copy.deepcopy(G).eval()
    batches = torch.zeros(2, 8, 3, 32, 32, device="meta")
    for step, losses in dcgan.train_steps(
            G, D, average, *optimizers, batches, fresh_noise=True, flip_labels=0.5):
        assert losses.device.type == "meta"

@pytest.mark.parametrize("decay, step, share", [[0.999, 1, 0.9], [0.5, 99, 0.5], [0, 9, 1]])
def test_average_has_a_short_memory_at_first(decay, step, share):
    average, G = networks()[0], networks()[0]
    G(torch.randn(8, 100))  # for the statistics of batch norm
    old = average.layers[1].running_var.clone()
    expected = old.lerp(G.layers[1].running_var, share)
    dcgan.update_average(average, G, decay, step)
    torch.testing.assert_close(average.layers[1].running_var, expected)

def test_the_lesson_needs_nothing_but_torch():
    source = Path(dcgan.__file__).read_text(encoding="utf-8")
    lesson = source.partition("# ==== Above")[0]
    assert len(lesson.splitlines()) < 200
    assert "torchvision" not in lesson
    names = {}
    exec(lesson, names)
    G = names["Generator"](width=2)
    D = names["Discriminator"](width=2)
    optimizers = names["adam"](G), names["adam"](D)
    average = copy.deepcopy(G)
    batches = torch.zeros(2, 8, 3, 64, 64)
    steps = names["train_steps"](G, D, average, *optimizers, batches, done=5, decay=0)
    assert [step for step, losses in steps] == [6, 7]
    assert torch.equal(average.layers[0].weight, G.layers[0].weight)
    assert optimizers[0].defaults["lr"] == 4e-4
    assert optimizers[0].defaults["betas"] == (0.25, 0.999)

# ==== Copy the tests down to here along with the networks and the step =======================
# ruff: noqa: E402
import csv
import hashlib
import io
import math
import os
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from zipfile import ZipFile

from PIL import Image
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

SMALL = """--data faces.zip --image-size 32 --width 4 --batch-size 8 --flip-labels 0.1
    --log-interval 2 --device cpu""".split()
FACES = dcgan.toy_faces(40, 32)  # 5 steps an epoch
FILES = {
    "real.png", "samples.gif", "losses.png", "log.csv", "checkpoint.pt", "best.pt",
    "samples/epoch_001.png", "samples/epoch_002.png", "samples/epoch_003.png",
}

def encoded(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()

def picture(color="red"):
    return encoded(Image.new("RGB", (40, 40), color))

def write_zip(path, files):
    with ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)

def write_faces(path="faces.zip"):
    faces = map(to_pil_image, FACES)
    write_zip(path, {f"{i:02d}.png": encoded(face) for i, face in enumerate(faces)})

@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Each test runs in a folder of its own, with 40 faces in it."""
    monkeypatch.chdir(tmp_path)
    write_faces()

def run(*argv):
    dcgan.main([str(word) for word in argv])

def train(*argv):
    run(*SMALL, *argv)

def error_of(*argv):
    """The one line that a run ends with."""
    with pytest.raises(SystemExit, match="^dcgan.py: error: ") as stop:
        run(*argv)
    assert "\n" not in stop.value.code
    return stop.value.code

def checkpoint(out="out", name="checkpoint.pt"):
    return torch.load(Path(out, name), weights_only=True)

def contents(out="out"):
    """Every file below a folder: bytes by name; of a .pt, what it holds."""
    files = {}
    for file in Path(out).rglob("*.*"):
        name = file.relative_to(out).as_posix()
        files[name] = file.read_bytes()
        if file.suffix == ".pt":
            files[name] = checkpoint(out, name)
    return files

def same(a, b):
    """Whether two nested structures of tensors are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and same(list(a.values()), list(b.values()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b

@pytest.fixture(scope="session", autouse=True)
def programs(tmp_path_factory):
    """Two programs of their own. They start first, as to import torch takes them long."""
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    commands = {
        "torchrun": [*torchrun, __file__, "train_and_record"],
        "killed": [__file__, "die_in_step_7"],
    }
    started = {}
    for name, command in commands.items():
        folder = tmp_path_factory.mktemp(name)
        write_faces(folder / "faces.zip")
        started[name] = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment,
            stdout=subprocess.PIPE, text=True,
        )
        started[name].folder = folder
    yield started
    for program in started.values():
        program.kill()

@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run of three epochs without a break."""
    folder = tmp_path_factory.mktemp("finished")
    write_faces(folder / "faces.zip")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train("--epochs", 3)
    return folder / "out"

# ---- Pictures in ----------------------------------------------------------------------------
@pytest.mark.parametrize("size, crop, expected", [
    [(178, 218), None, 160], [(178, 218), 99, 99], [(75, 120), None, 75], [(75, 120), 200, 75],
])
def test_preparation_is_the_lectures_to_the_last_bit(size, crop, expected):
    image = Image.effect_noise(size, 99)
    prepared = dcgan.decode(encoded(image), 64, crop)
    lecture = T.Compose([T.CenterCrop(expected), T.Resize(64)])
    assert prepared.tobytes() == lecture(image.convert("RGB")).tobytes()

@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_more_than_8_bits_are_refused(mode):
    with pytest.raises(ValueError, match=f"more than 8 bits a channel .mode {mode}"):
        dcgan.decode(encoded(Image.new(mode, [40, 50]), "TIFF"))

def test_turned_grey_pictures_become_upright_rgb():
    turned = Image.new("L", (40, 40), "black")
    turned.paste("white", (0, 0, 40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    image = dcgan.decode(encoded(turned, exif=exif), 40)
    assert image.getpixel((35, 35)) == (255, 255, 255)

def test_pictures_are_told_by_their_names():
    pictures = "a.jpg ./a/b.PNG ../a.gif a.jfif"
    others = "a.txt jpg a.pdf a.dcgan .a.jpg a/._b.jpg ./.hidden/a.jpg"
    assert all(map(dcgan.is_picture, pictures.split()))
    assert not any(map(dcgan.is_picture, others.split()))

@pytest.mark.parametrize("source", ["odd", "odd.zip"])
def test_broken_pictures_are_skipped_and_ten_of_them_named(source, capsys):
    files = {f"cut{i}.png": picture()[:60] for i in range(12)}
    files |= {"a/good.png": picture(), "a.txt": b"", ".hidden.png": b""}
    write_zip("odd.zip", files)
    ZipFile("odd.zip").extractall("odd")
    for skipped in 10, 0:  # the second start finds the cache
        assert len(dcgan.load_images(source, 32)) == 1
        printed = capsys.readouterr().out
        assert "13 pictures, 2 other files ignored" in printed
        assert "1 of these 13 pictures can be read" in printed
        assert printed.count("skipped cut") == skipped

@pytest.mark.parametrize("error", [OSError(24, "too many open files"), MemoryError()])
def test_pictures_that_the_system_cannot_read_end_the_start(error, monkeypatch):
    """Skipped, they would be missing in the cache for good."""
    def fail(path):
        raise error

    told = str(error) or "MemoryError()"
    Path("faces").mkdir()
    Path("faces/a.png").write_bytes(picture())
    monkeypatch.setattr(Path, "read_bytes", fail)
    assert told in error_of(*SMALL, "--data", "faces")
    assert os.listdir("data") == []

def test_links_are_followed():
    Path("far").mkdir()
    Path("far/a.png").write_bytes(picture())
    Path("faces").mkdir()
    try:
        Path("faces/near").symlink_to(Path("far").absolute())
        assert len(dcgan.load_images("faces", 32)) == 1
        Path("faces/gone.png").symlink_to("nowhere.png")
    except OSError:
        pytest.skip("no right to make links here")
    assert "gone.png" in error_of(*SMALL, "--data", "faces")

@pytest.mark.parametrize("source", ["data", "data.zip"])
def test_cache_serves_until_size_crop_or_a_picture_changes(source):
    """data/ may be the source, too: the caches in it are not pictures."""
    for color, caches in ("red", 3), ("blue", 6):
        write_zip("data.zip", {"a.png": picture(color)})
        ZipFile("data.zip").extractall("data")
        for settings in [32], [64], [64, 5], [32]:
            dcgan.load_images(source, *settings).zero_()  # changes no cache
        assert dcgan.load_images(source, 32).max() == 255
        assert len(list(Path("data").glob("*.dcgan"))) == caches

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
def site(monkeypatch):
    """The address of a web server with the files of the test's folder."""
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()

def test_celeba_comes_from_the_source_that_has_it(site, monkeypatch, capsys):
    write_zip("right", {"img_align_celeba/1.png": picture()})
    Path("wrong").write_text("a page that says no")
    md5 = hashlib.md5(Path("right").read_bytes()).hexdigest()
    monkeypatch.setattr(dcgan, "CELEBA_MD5", md5)
    urls = [f"{site}/{name}" for name in ("missing", "wrong", "right")]
    monkeypatch.setattr(dcgan, "CELEBA_URLS", urls)
    for start in range(2):
        assert len(dcgan.load_images("data/celeba")) == 1
        assert os.listdir("data/celeba") == ["img_align_celeba.zip"]
    assert capsys.readouterr().out.count("no CelebA from") == 2

def test_download_that_fails_says_what_to_do_and_is_tried_again(site, monkeypatch):
    monkeypatch.setattr(dcgan, "CELEBA_URLS", [f"{site}/missing"])
    Path("data/celeba").mkdir(parents=True)
    Path("data/celeba/left-by-a-kill.zip.part").touch()
    for start in range(2):
        assert "no source of CelebA could be used; use --data toy" in error_of()
        assert os.listdir("data/celeba") == ["left-by-a-kill.zip.part"]

@pytest.mark.parametrize("count, taken", [(9, 6), (8, 8)])
def test_of_all_of_celeba_the_training_partition_is_taken(count, taken, monkeypatch):
    assert dcgan.CELEBA_COUNT == 202_599
    assert dcgan.CELEBA_TRAINING_COUNT == 162_770
    monkeypatch.setattr(dcgan, "CELEBA_COUNT", 9)
    monkeypatch.setattr(dcgan, "CELEBA_TRAINING_COUNT", 6)
    names = [f"{i}.jpg" for i in range(count)]
    write_zip("celeba.zip", {name: b"" for name in reversed(names)})
    pictures = dcgan.find_pictures(Path("celeba.zip"))
    assert [file.name for file in pictures] == names[:taken]

def test_every_epoch_of_a_seed_has_its_own_order_and_can_start_anywhere():
    images = torch.arange(100).byte().reshape(100, 1, 1, 1)
    steps = list(dcgan.batches(images, 40, 3, 42))
    others = list(dcgan.batches(images, 40, 3, 43))
    assert len(torch.cat(steps[:2]).unique()) == 80
    assert len(torch.stack(steps + others).unique(dim=0)) == 12
    for done in range(7):
        rest = list(dcgan.batches(images, 40, 3, 42, done))
        assert same(rest, steps[done:])

def test_batches_are_shared_floats_from_minus_one_to_one():
    images = torch.tensor([0, 255, 51, 102]).byte().reshape(4, 1, 1, 1)
    [batch] = dcgan.batches(images, 4)
    assert sorted(batch.flatten().tolist()) == pytest.approx([-1, -0.6, -0.2, 1])
    with pytest.raises(ValueError, match="takes uint8 images, not torch.float32"):
        next(dcgan.batches(images / 255, 4))
    for rank in 0, 1:
        [part] = dcgan.batches(images, 4, rank=rank, ranks=2)
        assert torch.equal(part, batch[rank::2])

def noise(**options):
    """What torch draws in each of four steps."""
    images = torch.zeros(4, 1, 1, 1).byte()
    return [torch.randn(1).item() for batch in dcgan.batches(images, 2, 2, **options)]

def test_noise_is_decided_by_seed_step_and_rank():
    assert noise(done=1) == noise()[1:]
    assert len({*noise(), *noise(seed=43), *noise(rank=1)}) == 12

def test_pictures_do_not_depend_on_the_default_device():
    with torch.device("meta"):
        images = dcgan.load_images("faces.zip", 32)
        batch = next(dcgan.batches(images, 8))
        distance, diversity = dcgan.compare(images, images)
    assert batch.device.type == "cpu"
    assert diversity == 1

# ---- Pictures out ---------------------------------------------------------------------------
def test_sample_draws_every_latent():
    G = networks()[0].eval()
    latents = torch.randn(130, 100)
    images = dcgan.sample(G, latents)
    expected = (G(latents[129:]) + 1) * 127.5
    assert len(images) == 130
    assert (images[129] - expected).abs().max() <= 0.51

def test_frechet_distance_is_the_known_one():
    """Between N(0, s) and N(0, s / 2) in 128 dimensions it is 128 (s / 2)^2, where s is the
    deviation of uniform noise, (1 / 3)^0.5; between black and white, 128 * 2^2."""
    torch.manual_seed(0)
    uniform = torch.randint(0, 256, (2048, 3, 16, 16)).byte()
    distance, diversity = dcgan.compare(uniform // 2 + 64, uniform)
    assert distance == pytest.approx(128 / 3 / 4, rel=0.1)
    assert diversity == pytest.approx(0.5, rel=0.05)
    distance, _ = dcgan.compare(uniform * 0, uniform * 0 + 255)
    assert distance == pytest.approx(128 * 2**2, rel=0.2)

def faces(distinct):
    """Of 512 pictures, so many have different faces; each has a background of its own."""
    torch.manual_seed(distinct)
    patterns = torch.rand(distinct, 3, 16, 16)
    brightness = torch.rand(512, 1, 1, 1)
    repeated = patterns[torch.arange(512) % distinct]
    return ((repeated + brightness) * 127).byte()

@pytest.mark.parametrize("distinct, low, high", [[511, 0.95, 1.05], [20, 0.1, 0.7], [1, 0, 0.1]])
def test_diversity_sees_a_collapse_before_changing_backgrounds(distinct, low, high):
    _, diversity = dcgan.compare(faces(distinct), faces(512))
    assert low < diversity < high

def test_measures_are_numbers_whatever_the_pictures():
    many = faces(512)
    grey = many[:, :1].repeat(1, 3, 1, 1)
    for fake, real in (many, many[:2]), (many[:2], grey), (many * 0, many), (many * 0, many * 0):
        assert all(map(math.isfinite, dcgan.compare(fake, real)))

def curves(losses):
    """Rows and columns, from the top left, of the blue and of the orange curve."""
    dcgan.plot_losses(losses, 3, "losses.png")
    red, _, blue = pil_to_tensor(Image.open("losses.png")).int()
    contrast = blue - red
    return (contrast > 60).nonzero().T, (contrast < -60).nonzero().T

def test_loss_plot_shows_both_losses_also_negative_ones():
    blue, orange = curves(torch.rand(3000, 2) + torch.tensor([-9, 1]))
    assert blue[0].min() > orange[0].max() + 100
    assert len(blue[1].unique()) > 500
    assert len(orange[1].unique()) > 500

def test_loss_plot_keeps_a_late_peak_below_the_title_and_cuts_the_first():
    losses = torch.rand(3000, 2)
    losses[2100:2120, 1] += 50
    losses[:10] += 999
    blue, orange = curves(losses)
    assert orange[0].min() > 35
    assert 435 < orange[1, orange[0] < 80].max() < 450
    assert blue[0, blue[1] > 100].min() > 290

def test_gif_has_100_frames_at_most_and_ends_with_the_last_grid():
    Path("samples").mkdir()
    for epoch in range(900, 1051):
        grid = Image.new("L", (8, 8), epoch - 850)
        grid.save(f"samples/epoch_{epoch}.png")
    dcgan.animate(Path("samples"), Path("samples.gif"))
    gif = Image.open("samples.gif")
    assert 50 < gif.n_frames <= 100
    gif.seek(gif.n_frames - 1)
    assert gif.convert("L").getpixel((0, 0)) == 200

# ---- Devices --------------------------------------------------------------------------------
def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(dcgan, "LOCAL_RANK", 99)
    with pytest.raises(dcgan.UserError, match="--device cuda:99 cannot be used"):
        dcgan.find_device("cuda")

@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux tells it")
def test_bf16_is_used_where_it_is_native():
    flags = Path("/proc/cpuinfo").read_text()
    native = "bf16" if "avx512_bf16" in flags else "fp32"
    assert dcgan.find_device("cpu") == (torch.device("cpu"), native)
    assert dcgan.find_device("cpu", "bf16")[1] == "bf16"
    assert dcgan.find_device("cpu", "fp32")[1] == "fp32"

# ---- The run --------------------------------------------------------------------------------
def test_a_run_leaves_its_files_and_a_row_an_epoch(finished):
    assert contents(finished).keys() == FILES
    rows = list(csv.DictReader(open(finished / "log.csv")))
    assert [row["step"] for row in rows] == ["5", "10", "15"]
    means = checkpoint(finished)["losses"][10:].mean(0)
    assert float(rows[2]["loss_g"]) == pytest.approx(means[1].item(), rel=1e-3)

def test_a_run_prints_steps_and_epochs(monkeypatch, capsys):
    losses = torch.tensor([0.00012345, 1, 0.5, 0.001])
    monkeypatch.setattr(dcgan, "train_step", lambda *args, **options: losses)
    monkeypatch.setattr(dcgan.Run, "find_troubles", lambda run: ["look out"])
    train("--epochs", 2)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if " step " in line]
    assert [line.split()[3] for line in lines] == ["2", "4", "5", "6", "8", "10"]
    assert lines[0] == "epoch 1 step 2 loss_d 0.0001234 loss_g 1.0 D(x) 0.5 D(G(z)) 0.001"
    assert " frechet " in lines[2]
    assert " time 0:00:0" in lines[2]
    assert printed.count("warning: look out") == 2

def test_a_row_has_a_name_for_each_number():
    state = SimpleNamespace(step=11, epoch_steps=5)
    row = dcgan.Run.make_row(state, torch.ones(4), frechet=1.23456)
    assert row["epoch"] == 3
    assert row["frechet"] == 1.235
    with pytest.raises(ValueError):
        dcgan.Run.make_row(state, torch.ones(5))

@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_flags_reach_the_networks_and_the_optimisers(optimizer):
    train(*"""--epochs 1 --slope-g 0 --slope-d 0.5 --lr-g 0.1 --lr-d 0.03 --beta1 0.3 --ema 0
        --seed 7 --optimizer-d""".split(), optimizer)
    saved = checkpoint()
    assert saved["G_arguments"] == dict(latent_dim=100, slope=0, width=4, image_size=32)
    assert saved["D_arguments"] == dict(slope=0.5, width=4, image_size=32)
    [of_g] = saved["optimizer_g"]["param_groups"]
    [of_d] = saved["optimizer_d"]["param_groups"]
    assert (of_g["lr"], of_d["lr"]) == (0.1, 0.03)
    assert of_g["betas"] == (0.3, 0.999)
    assert of_d.get("betas") == {"adam": (0.3, 0.999), "sgd": None}[optimizer]
    weights = "layers.0.weight"
    assert torch.equal(saved["average"][weights], saved["G"][weights])

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flags_reach_the_step(precision, monkeypatch):
    given = []

    def step(G, D, optimizer_g, optimizer_d, real, **options):
        assert D(real).dtype == torch.float32
        given.append((G(torch.zeros(2, 100)).dtype, options))
        return torch.ones(4)

    monkeypatch.setattr(dcgan, "train_step", step)
    train("--epochs", 1, "--fresh-noise", "--flip-labels", 0.3, "--precision", precision)
    dtype, options = given[0]
    assert options == dict(latent_dim=100, fresh_noise=True, flip_labels=0.3)
    assert (dtype == torch.bfloat16) == (precision == "bf16")

def is_drawn_by_the_average(path, saved, latents):
    """Whether a picture shows these latents, but for a level of rounding."""
    average = dcgan.Generator(**saved["G_arguments"]).eval()
    average.load_state_dict(saved["average"])
    dcgan.save_image(dcgan.sample(average, latents) / 255, "expected.png")
    drawn, expected = [pil_to_tensor(Image.open(file)).int() for file in (path, "expected.png")]
    return (drawn - expected).abs().max() <= 1

def test_each_epoch_draws_the_fixed_noise_with_the_average(finished):
    saved = checkpoint(finished)
    grid = finished / "samples/epoch_003.png"
    assert is_drawn_by_the_average(grid, saved, saved["fixed_noise"][:64])
    assert not same(saved["average"], saved["G"])

@pytest.mark.parametrize("step, diversity, d_fake, distances, told", [
    [501, 0.71, 0.011, [30], []],
    [501, 0.69, 0.011, [30], ["the generator collapses"]],
    [500, 0.69, 0.009, [30], []],  # too early to tell
    [501, 0.71, 0.009, [30], ["the discriminator has won"]],
    [501, 0.71, 1, [40, 20, 30, 30, 30, 30], []],  # not for long enough
    [501, 0.71, 1, [40, 20] + 5 * [23], ["past its best, epoch 2, kept in best.pt"]],
    [501, 0.71, 1, [40, 20, 30, 30, 30, 30, 21], []],  # not clearly
])
def test_troubles(step, diversity, d_fake, distances, told):
    row = {"step": step, "diversity": diversity}
    losses = torch.zeros(9, 4)
    losses[0, 3] = 1  # of an earlier epoch
    losses[-3, 3] = d_fake
    rows = [{**row, "frechet": distance} for distance in distances]
    state = SimpleNamespace(rows=rows, losses=losses, epoch_steps=5)
    troubles = dcgan.Run.find_troubles(state)
    assert [trouble.split(":")[0] for trouble in troubles] == told

def test_the_best_epoch_is_kept_and_drawn(monkeypatch, capsys):
    distances = iter([30, 20, 25, 20])
    monkeypatch.setattr(dcgan, "compare", lambda *args: (next(distances), 1.0))
    train("--epochs", 3)
    run("--resume", "--epochs", 4)
    assert checkpoint(name="best.pt")["step"] == 10  # of equal ones, the first
    run("--generate", 3)
    assert "epoch 2: 3 pictures in " in capsys.readouterr().out

def generate(finished, *argv):
    """Draw with a run's last convolution made stronger, or its first pictures are all grey."""
    saved = checkpoint(finished, "best.pt")
    saved["average"]["layers.9.weight"] *= 50
    torch.save(saved, "best.pt")
    run("--out", ".", "--data", "faces.zip", "--generate", *argv)
    return contents("generated")

def test_generate_draws_the_same_again_and_removes_only_its_own(finished):
    first = generate(finished, 9)
    Path("generated/mine.png").write_text("precious")
    second = generate(finished, 5, "--seed", 7)
    assert len(second) == 6
    assert not first.items() & second.items()
    assert generate(finished, 9) == first | {"mine.png": b"precious"}

def test_generate_draws_with_the_average(finished):
    generate(finished, 1)
    torch.manual_seed(42)
    latents = torch.randn(1, 100)
    saved = checkpoint(".", "best.pt")
    assert is_drawn_by_the_average("generated/000001.png", saved, latents)

# ---- However a run ends ---------------------------------------------------------------------
def end_in_step(number, end):
    """Return a train_step that calls `end` in the program's step of this number."""
    original = dcgan.train_step
    steps = iter(range(1, 99))

    def step(*args, **options):
        losses = original(*args, **options)
        if next(steps) == number:
            end(losses, *args)
        return losses

    return step

def interrupt(*args):
    raise KeyboardInterrupt

@pytest.mark.parametrize("save_seconds, number, saved", [
    [0, 1, 0], [0, 9, 8], [60, 4, 0], [60, 11, 10],
])
def test_interrupt_and_resume_as_if_nothing_had_been(
        save_seconds, number, saved, finished, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^130$"):
        patch.setattr(dcgan, "SAVE_SECONDS", save_seconds)
        patch.setattr(dcgan, "train_step", end_in_step(number, interrupt))
        train("--epochs", 3)
    line = f"dcgan.py: interrupted; --resume goes on after step {saved}\n"
    assert line in capsys.readouterr().err
    assert checkpoint()["step"] == saved
    assert "holds a run" in error_of(*SMALL)
    run("--resume")
    assert same(contents(), contents(finished))

def die_in_step_7():
    """End at once, as by SIGKILL or a power cut."""
    def die(*args):
        sys.stdout.flush()
        os._exit(9)

    dcgan.train_step = end_in_step(7, die)
    dcgan.SAVE_SECONDS = 0
    train("--epochs", 3)

def test_kill_and_resume_as_if_nothing_had_been(programs, finished):
    killed = programs["killed"]
    assert killed.wait(60) == 9
    os.chdir(killed.folder)
    assert checkpoint()["step"] == 6
    run("--resume")
    assert same(contents(), contents(finished))

def test_ranks_count_in_torchrun_only(programs):
    """Others set RANK and WORLD_SIZE, too: the killed program had them, and printed."""
    printed, _ = programs["killed"].communicate()
    assert "epoch 1 step 5 " in printed

def test_a_longer_run_is_the_shorter_one_and_more(finished, capsys):
    train("--epochs", 2)
    run("--resume")
    assert " 0 steps left of --epochs 2" in capsys.readouterr().out
    run("--resume", "--epochs", 3)
    assert same(checkpoint(), checkpoint(finished))

def test_interrupt_before_the_first_checkpoint_promises_nothing(monkeypatch, capsys):
    monkeypatch.setattr(dcgan, "load_images", interrupt)
    with pytest.raises(SystemExit, match="^130$"):
        train()
    assert capsys.readouterr().err == "dcgan.py: interrupted\n"

@pytest.mark.parametrize("where", ["losses", "weights"])
def test_what_is_not_finite_ends_the_run_and_is_not_saved(where, monkeypatch):
    def spoil(losses, G, D, *args):
        broken = losses if where == "losses" else next(D.parameters())
        broken.detach().fill_(torch.nan)

    monkeypatch.setattr(dcgan, "train_step", end_in_step(10, spoil))
    assert "not finite at step 10" in error_of(*SMALL, "--epochs", 3)
    assert checkpoint()["step"] == 5

def test_full_memory_is_one_line_and_what_is_saved_stays(monkeypatch):
    def fill(*args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(dcgan, "train_step", end_in_step(7, fill))
    assert "no room" in error_of(*SMALL)
    assert checkpoint()["step"] == 5

def test_files_that_cannot_be_replaced(capsys):
    """log.csv may be open in Excel: the run goes on. Without best.pt it stops."""
    Path("out/log.csv").mkdir(parents=True)
    train("--epochs", 1)
    assert "log.csv stays as it is" in capsys.readouterr().out
    assert len(checkpoint()["rows"]) == 1
    Path("full/best.pt").mkdir(parents=True)
    assert "best.pt" in error_of(*SMALL, "--out", "full")
    assert checkpoint("full")["step"] == 0

def test_a_run_is_not_resumed_as_another(finished):
    before = contents(finished)
    write_zip("more.zip", {f"{i}.png": picture() for i in range(41)})
    resume = "--resume", "--out", finished
    for flag, value in {"--width": 4, "--batch-size": 8, "--seed": 42}.items():
        assert f"started with {flag} {value}" in error_of(*resume, flag, 6)
    line = error_of(*resume, "--data", "more.zip")
    assert "41 pictures, but the run began with 40" in line
    assert same(contents(finished), before)

# ---- Places to run in -----------------------------------------------------------------------
def test_names_that_standard_output_cannot_show(monkeypatch):
    """The output of a Windows console, in another program that cannot reconfigure it."""
    name = "\u0444\u043e\u0442\u043e.zip"
    write_faces(name)
    console = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    train("--data", name, "--epochs", 1)
    assert b"????.zip: 40 pictures" in console.buffer.getvalue()

def test_a_run_in_a_thread_with_captured_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    thread = threading.Thread(target=train, args=["--epochs", 1])
    thread.start()
    thread.join(60)
    assert checkpoint()["step"] == 5

def test_processes_share_a_batch_evenly(monkeypatch):
    monkeypatch.setattr(dcgan, "RANKS", 3)
    assert "3 processes cannot share --batch-size 8 evenly" in error_of(*SMALL)

def test_average_over_processes_is_a_mean(monkeypatch):
    monkeypatch.setattr(dcgan, "RANKS", 2)
    monkeypatch.setattr(dcgan.dist, "all_reduce", lambda tensor: tensor.add_(3))
    tensor = torch.ones(1)
    dcgan.average_ranks(tensor)
    assert tensor == 2

def train_and_record():
    """Train as one process of torchrun, and keep what each step had and made."""
    original = dcgan.train_step
    steps = []

    def step(G, D, *args, **options):
        seed = torch.initial_seed()
        losses = original(G, D, *args, **options)
        weights = [p.detach().clone() for p in parameters_of(G, D)]
        gradients = [p.grad.clone() for p in parameters_of(G, D)]
        steps.append([seed, weights, gradients])
        return losses

    dcgan.train_step = step
    train("--epochs", 2)
    torch.save(steps, f"rank{dcgan.RANK}.pt")

def test_two_processes_share_a_run_that_one_resumes(programs):
    printed, _ = programs["torchrun"].communicate(timeout=60)
    os.chdir(programs["torchrun"].folder)
    assert printed.count("epoch 1 step 5 ") == 1
    assert len(os.listdir("data")) == 1
    first, second = torch.load("rank0.pt"), torch.load("rank1.pt")
    assert len(first) == 10
    for mine, other in zip(first, second):
        assert mine[0] != other[0]  # the seeds of the noise
        assert same(mine[1:], other[1:])
    run("--resume", "--epochs", 3)
    assert contents().keys() == FILES
    assert checkpoint()["step"] == 15

# ---- The command line -----------------------------------------------------------------------
@pytest.mark.parametrize("flag", [
    "--image-size 65", "--batch-size 0", "--beta1 1", "--ema nan", "--lr-g -1", "--epochs x",
])
def test_wrong_flag_is_argparses_error(flag):
    with pytest.raises(SystemExit, match="^2$"):
        train(*flag.split())

@pytest.mark.parametrize("flags, told", [
    ["--batch-size 41", "40 pictures do not fill --batch-size 41"],
    ["--device abacus", "--device abacus cannot be used"],
    ["--device meta", "--device meta cannot be used"],
    ["--generate 3", "No such file"],
    ["--resume --out old", "KeyError('settings')"],
    ["--resume --out other", "the checkpoint is of another version"],
    ["--resume --out code", "Weights only load failed"],
    ["--data page.zip", "not a zip file"],
    ["--data nowhere", "use --data toy"],
    ["--data old", "no pictures in old"],
    ["--data bad.zip", "all 1 pictures are broken"],
    ["--data . --out inside", "--out inside lies in --data"],
])
def test_bad_input_is_one_line(flags, told):
    write_zip("bad.zip", {"x.jpg": b""})
    Path("page.zip").write_text("<html>")
    checkpoints = {"old": {}, "other": {"settings": {}}, "code": {"settings": Path()}}
    for folder, saved in checkpoints.items():
        Path(folder).mkdir()
        torch.save(saved, f"{folder}/checkpoint.pt")
    assert told in error_of(*SMALL, *flags.split())

if __name__ == "__main__":
    globals()[sys.argv[1]]()
