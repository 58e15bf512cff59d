"""Tests of dcgan.py: run `pytest`; under a minute, no network, no GPU needed.
Copy them along with the networks and the step, down to the line that says so."""
import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dcgan

# Small networks need no more, and the tests run programs beside them.
torch.set_num_threads(1)

def networks(image_size=32):
    torch.manual_seed(0)
    G = dcgan.Generator(width=8, image_size=image_size)
    D = dcgan.Discriminator(width=8, image_size=image_size)
    return G, D

def sgd(network):
    """With SGD, an update is a share of a gradient."""
    return torch.optim.SGD(network.parameters(), 0.1)

def step_of(G, D, real, **options):
    optimizers = sgd(G), sgd(D)
    return dcgan.train_step(G, D, *optimizers, real, **options)

def parameters_of(G, D):
    return [*G.parameters(), *D.parameters()]

def test_generator_turns_100_d_noise_into_3_x_64_x_64_images():
    images = dcgan.Generator()(50 * torch.randn(2, 100))
    assert images.shape == (2, 3, 64, 64)
    assert images.abs().max() <= 1

def test_discriminator_turns_an_image_into_a_single_logit():
    D = dcgan.Discriminator()
    assert D(torch.rand(2, 3, 64, 64)).shape == (2, 1)

@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_training_step_moves_every_parameter(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    G, D = [network.to(device) for network in networks(64)]
    before = copy.deepcopy(parameters_of(G, D))
    real = torch.rand(8, 3, 64, 64, device=device)
    with torch.autocast(device, torch.bfloat16):
        losses = step_of(G, D, real)
    assert losses.isfinite().all()
    for p, old in zip(parameters_of(G, D), before):
        assert not torch.equal(p, old)

# ---- Networks -------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [32, 96, 256])
def test_other_sizes_and_latents_that_are_maps_of_one_pixel(size):
    G, D = networks(size)
    images = G(torch.randn(2, 100, 1, 1))
    assert images.shape == (2, 3, size, size)
    assert D(images).shape == (2, 1)
    assert G.layers[0].out_channels <= 64

@pytest.mark.parametrize("size", [4, 65, 100])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match=f"{size} is not 4 to 7 times 2, 4, 8"):
        networks(size)

def test_networks_have_as_many_parameters_as_the_lectures():
    counts = {dcgan.Generator(): 3_576_704, dcgan.Discriminator(): 2_765_633}
    for network, count in counts.items():
        assert sum(p.numel() for p in network.parameters()) == count

@pytest.mark.parametrize("network", networks())
def test_layers_begin_as_in_the_paper_but_for_the_slope(network):
    for layer in network.layers:
        if isinstance(layer, nn.LeakyReLU):
            assert layer.negative_slope == 0.2
        elif hasattr(layer, "weight"):
            assert 0.005 < layer.weight.std() < 0.04
            assert layer.weight.mean().round() == isinstance(layer, nn.BatchNorm2d)

def test_discriminator_refuses_images_of_another_shape():
    G, D = networks()
    with pytest.raises(ValueError, match="D takes N x .3, 32, 32., not .2, 3, 64, 64."):
        D(torch.zeros(2, 3, 64, 64))

def test_discriminator_can_be_cut_and_do_without_batch_norm():
    D = dcgan.Discriminator(norm=nn.Identity)
    features = D.layers[:-2]
    assert features(torch.zeros(2, 3, 64, 64)).shape == (2, 512, 4, 4)
    assert len(D.state_dict()) == 10  # weights and biases of five convolutions

# ---- The game -------------------------------------------------------------------------------
@pytest.mark.parametrize("fresh_noise", [False, True])
def test_step_is_the_one_written_out_here(fresh_noise):
    real = torch.rand(8, 3, 32, 32) * 2 - 1
    trained = networks()
    torch.manual_seed(1)
    losses = step_of(*trained, real, fresh_noise=fresh_noise)

    G, D = networks()
    torch.manual_seed(1)
    fake = G(torch.randn(8, 100))
    real_logits = D(real)
    fake_logits = D(fake.detach())
    loss_real = F.softplus(-real_logits).mean()
    loss_fake = F.softplus(fake_logits).mean()
    loss_d = (loss_real + loss_fake) / 2
    loss_d.backward()
    sgd(D).step()
    if fresh_noise:
        fake = G(torch.randn(8, 100))
    loss_g = F.softplus(-D(fake)).mean()
    loss_g.backward(inputs=list(G.parameters()))
    sgd(G).step()

    d_real = real_logits.sigmoid().mean()
    d_fake = fake_logits.sigmoid().mean()
    expected = torch.stack([loss_d, loss_g, d_real, d_fake]).detach()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(parameters_of(*trained), parameters_of(G, D))

@pytest.mark.parametrize("flip_labels, loss_d", [[0, 3], [1, -3]])
def test_step_takes_other_losses_and_swaps_only_the_labels_of_d(flip_labels, loss_d):
    """With fully connected networks; D takes everything for real."""
    G = nn.Sequential(nn.Linear(100, 12), nn.Unflatten(1, [3, 2, 2]))
    D = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    nn.init.zeros_(D[1].weight)
    nn.init.ones_(D[1].bias)
    losses = step_of(
        G, D, torch.zeros(8, 3, 2, 2),
        flip_labels=flip_labels,
        loss_for_d=lambda real, fake: (real + 2 * fake).mean(),
        loss_for_g=lambda fake: fake.mean().sign(),
    )
    assert losses[:2].tolist() == [loss_d, 1]

def test_loop_counts_its_steps_and_makes_no_tensor_on_another_device():
    """On the meta device, where a tensor made on the CPU raises."""
    G, D = [network.to("meta") for network in networks()]
    average = copy.deepcopy(G)
    batches = torch.zeros(2, 8, 3, 32, 32, device="meta")
    steps = dcgan.train_steps(
        G, D, average, sgd(G), sgd(D), batches,
        done=5, fresh_noise=True, flip_labels=0.5,
    )
    assert [step for step, losses in steps] == [6, 7]

@pytest.mark.parametrize("decay, step, share", [[0.999, 1, 0.9], [0.5, 99, 0.5]])
def test_average_has_a_short_memory_at_first(decay, step, share):
    average, D = networks()
    G = copy.deepcopy(average)
    G(torch.randn(8, 100))  # for the statistics of batch norm
    expected = average.layers[1].running_var.lerp(G.layers[1].running_var, share)
    dcgan.update_average(average, G, decay, step)
    torch.testing.assert_close(average.layers[1].running_var, expected)

def test_the_lesson_needs_nothing_but_torch():
    source = Path(dcgan.__file__).read_text(encoding="utf-8")
    lesson = source.partition("# ==== Above")[0]
    assert len(lesson.splitlines()) < 200
    assert "torchvision" not in lesson
    exec(lesson, {})

# ==== Copy the tests down to here along with the networks and the step =======================
# ruff: noqa: E402
import hashlib
import io
import os
import subprocess
import sys
import threading
import time
from http.server import HTTPServer, SimpleHTTPRequestHandler
from types import SimpleNamespace
from zipfile import ZipFile

from PIL import Image
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

def encoded(image, kind="PNG"):
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()

SMALL = """--data faces.zip --image-size 32 --width 4 --batch-size 8 --flip-labels 0.1
    --log-interval 2 --device cpu""".split()
FACES = [  # five steps an epoch
    encoded(to_pil_image(face))
    for face in dcgan.toy_faces(40, 32)
]

def write_zip(path, files):
    with ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)

def write_faces(path="faces.zip"):
    write_zip(path, {f"{i:02d}.png": face for i, face in enumerate(FACES)})

@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Each test runs in a folder of its own, with 40 faces in it, and downloads no CelebA."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dcgan, "CELEBA_URLS", ["nowhere"])
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

def checkpoint(folder="out", name="checkpoint.pt"):
    return torch.load(Path(folder, name), weights_only=True)

def assert_same_run(folder, other):
    """Bit for bit. Settings are texts, which assert_close does not take."""
    for name in "log.csv", "losses.png", "samples.gif":
        written = Path(folder, name).read_bytes()
        assert written == Path(other, name).read_bytes()
    for name in "checkpoint.pt", "best.pt":
        saved, expected = checkpoint(folder, name), checkpoint(other, name)
        assert saved.pop("settings") == expected.pop("settings")
        torch.testing.assert_close(saved, expected, rtol=0, atol=0)

@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run of three epochs without a break."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_faces()
        train("--epochs", 3)
    return folder / "out"

# ---- Pictures in ----------------------------------------------------------------------------
@pytest.mark.parametrize("size, crop, expected", [
    [(178, 218), None, 160],
    [(75, 120), None, 75],
    [(75, 120), 200, 75],
])
def test_preparation_is_the_lectures_to_the_last_bit(size, crop, expected):
    image = Image.effect_noise(size, 99)
    prepared = dcgan.decode(encoded(image), 64, crop)
    lecture = nn.Sequential(T.CenterCrop(expected), T.Resize(64))
    assert prepared.tobytes() == lecture(image.convert("RGB")).tobytes()

@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_more_than_8_bits_are_refused(mode):
    data = encoded(Image.new(mode, [40, 50]), "TIFF")
    with pytest.raises(ValueError, match=f"more than 8 bits a channel .mode {mode}"):
        dcgan.decode(data)

def test_pictures_are_told_by_their_names():
    pictures = "a.jpg ./a/b.PNG ../a.gif a.jfif a.mpo"
    others = "a.txt jpg a.dcgan .a.jpg a/._b.jpg ./.hidden/a.jpg"
    assert all(map(dcgan.is_picture, pictures.split()))
    assert not any(map(dcgan.is_picture, others.split()))

def test_broken_pictures_are_skipped_and_ten_of_them_named(capsys):
    files = {f"odd{i}.png": FACES[0].replace(b"IDAT", b"IDAT ") for i in range(12)}
    write_zip("odd.zip", files | {"good.png": FACES[0], "a.txt": b""})
    for named in 10, 0:  # the second start finds the cache
        assert len(dcgan.load_images("odd.zip", 32)) == 1
        printed = capsys.readouterr().out
        assert "odd.zip: 1 of 13 pictures can be read" in printed
        assert printed.count("skipped odd") == named

@pytest.mark.parametrize("error", [OSError(24, "too many files"), MemoryError("full")])
def test_pictures_that_the_system_cannot_read_end_the_start(error, monkeypatch):
    """Skipped, they would be missing in the cache for good."""
    def fail(*args):
        raise error

    monkeypatch.setattr(ZipFile, "read", fail)
    assert str(error) in error_of(*SMALL)
    assert os.listdir("data") == []

@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_links_are_followed():
    Path("far").mkdir()
    Path("far/a.png").write_bytes(FACES[0])
    Path("faces").mkdir()
    Path("faces/near").symlink_to(Path("far").absolute())
    assert len(dcgan.load_images("faces", 32)) == 1

@pytest.mark.parametrize("source", ["data", "data.zip"])
def test_cache_serves_until_size_crop_or_a_picture_changes(source):
    """data/ may be the source, too: the caches in it are not pictures."""
    for face, caches in (FACES[0], 3), (FACES[1], 6):
        write_zip("data.zip", {"a.png": face})
        ZipFile("data.zip").extractall("data")
        for settings in [32], [64], [64, 5]:
            dcgan.load_images(source, *settings).zero_()  # changes no cache
        assert dcgan.load_images(source, 32).any()
        assert len(list(Path("data").glob("*.dcgan"))) == caches

def test_celebas_training_part_comes_from_the_first_source_that_has_it(monkeypatch, capsys):
    write_zip("right", {"faces/1.png": FACES[0], "faces/2.png": FACES[1]})
    Path("wrong").write_text("a page that says no")
    md5 = hashlib.md5(Path("right").read_bytes()).hexdigest()
    monkeypatch.setattr(dcgan, "CELEBA_MD5", md5)
    monkeypatch.setattr(dcgan, "CELEBA_COUNT", 2)
    monkeypatch.setattr(dcgan, "CELEBA_TRAINING_COUNT", 1)
    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever).start()
        site = f"http://127.0.0.1:{server.server_port}"
        urls = [f"{site}/missing", f"{site}/wrong", f"{site}/right"]
        monkeypatch.setattr(dcgan, "CELEBA_URLS", urls)
        for start in range(2):
            assert len(dcgan.load_images("data/celeba")) == 1
            assert os.listdir("data/celeba") == ["img_align_celeba.zip"]
        server.shutdown()
    assert capsys.readouterr().out.count("no CelebA from") == 2

def draws(**options):
    """The pictures and the noise of each step, two steps an epoch."""
    images = torch.arange(100).byte().reshape(100, 1, 1, 1)
    steps = dcgan.batches(images, batch_size=40, epochs=2, **options)
    return [(tuple(batch.flatten().tolist()), torch.rand(1).item()) for batch in steps]

def test_seed_and_epoch_decide_the_order_seed_step_and_rank_the_noise():
    steps = draws()
    pictures, noise = zip(*steps, *draws(seed=43))
    assert len({*pictures[0], *pictures[1]}) == 80
    assert len({*pictures}) == 8
    assert len({*noise, draws(rank=1)[0][1]}) == 9
    for done in range(5):
        assert draws(done=done) == steps[done:]

def test_batches_are_shared_floats_from_minus_one_to_one():
    images = torch.tensor([0, 51, 102, 255]).byte().reshape(4, 1, 1, 1)
    [batch] = dcgan.batches(images, 4)
    levels = batch.flatten().sort().values
    assert levels.tolist() == pytest.approx([-1, -0.6, -0.2, 1])
    [part] = dcgan.batches(images, 4, rank=1, ranks=2)
    assert torch.equal(part, batch[1::2])

def test_pictures_do_not_depend_on_the_default_device():
    with torch.device("meta"):
        images = dcgan.load_images("faces.zip", 32)
        batch = next(dcgan.batches(images, 8))
        distance, diversity = dcgan.compare(images, images)
    assert batch.device.type == "cpu"
    assert diversity == 1

# ---- Pictures out ---------------------------------------------------------------------------
def test_frechet_distance_is_the_known_one():
    """From N(m, s) to N(m - 1/2, s / 2) in 128 dimensions: 128 (1/4 + s^2 / 4). Uniform noise has
    s^2 = 1/3."""
    torch.manual_seed(0)
    uniform = torch.randint(0, 256, (2048, 3, 16, 16)).byte()
    distance, diversity = dcgan.compare(uniform // 2, uniform)
    assert distance == pytest.approx(128 * (1 / 4 + 1 / 12), rel=0.05)
    assert diversity == pytest.approx(0.5, rel=0.05)

def faces(distinct):
    """Of 512 pictures, so many have different faces; each has a background of its own."""
    torch.manual_seed(distinct)
    patterns = torch.rand(distinct, 3, 16, 16)
    brightness = torch.rand(512, 1, 1, 1)
    repeated = patterns[torch.arange(512) % distinct]
    return ((repeated + brightness) * 127).byte()

@pytest.mark.parametrize("distinct, low, high", [[511, 0.95, 1.05], [20, 0.1, 0.7]])
def test_diversity_sees_a_collapse_before_changing_backgrounds(distinct, low, high):
    distance, diversity = dcgan.compare(faces(distinct), faces(512))
    assert low < diversity < high

def test_equal_pictures_can_be_compared():
    two = torch.zeros(2, 3, 8, 8).byte()
    assert dcgan.compare(two, two) == pytest.approx((0, 1))

def test_loss_plot_keeps_a_late_peak_below_the_title_and_cuts_the_first():
    losses = torch.rand(3000, 2)
    losses[2100:2120, 1] += 50
    losses[:10] += 999
    dcgan.plot_losses(losses, 3, "losses.png")
    red, green, blue = pil_to_tensor(Image.open("losses.png")).int()
    rows, columns = (red - blue > 60).nonzero().T  # of the orange curve, from the top left
    assert rows.min() > 35
    assert 435 < columns[rows < 80].max() < 450
    assert rows[columns > 500].min() > 250

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

# ---- The run --------------------------------------------------------------------------------
def test_a_run_prints_steps_epochs_and_warnings(monkeypatch, capsys):
    monkeypatch.setattr(dcgan.Run, "find_troubles", lambda run: ["look out"])
    train("--epochs", 2)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if " step " in line]
    steps = [line.split()[3] for line in lines]
    assert " ".join(steps) == "2 4 5 6 8 10"
    assert lines[0].startswith("epoch 1 step 2 loss_d ")
    assert " time 0:00:0" in lines[2]
    assert printed.count("warning: look out") == 2

def test_log_has_the_means_of_each_epoch(finished):
    names, *rows = (finished / "log.csv").read_text().splitlines()
    assert names == "epoch,step,loss_d,loss_g,D(x),D(G(z)),frechet,diversity"
    loss_d = rows[2].split(",")[2]
    mean = checkpoint(finished)["losses"][10:, 0].mean()
    assert float(loss_d) == pytest.approx(mean.item(), rel=1e-3)

def test_a_row_has_a_name_for_each_number():
    with pytest.raises(ValueError):
        dcgan.Run.make_row(None, torch.ones(5))

@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_flags_reach_the_networks_and_the_optimisers(optimizer):
    train(*"""--epochs 1 --slope-g 0 --slope-d 0.5 --lr-g 0.1 --lr-d 0.03 --beta1 0.3 --ema 0
        --seed 7 --optimizer-d""".split(), optimizer)
    saved = checkpoint()
    assert saved["G_arguments"]["slope"] == 0
    assert saved["D_arguments"]["slope"] == 0.5
    [of_g] = saved["optimizer_g"]["param_groups"]
    [of_d] = saved["optimizer_d"]["param_groups"]
    assert of_g["lr"] == 0.1
    assert of_d["lr"] == 0.03
    assert of_g["betas"] == (0.3, 0.999)
    assert ("betas" in of_d) == (optimizer == "adam")
    weights = "layers.0.weight"
    assert torch.equal(saved["average"][weights], saved["G"][weights])

@pytest.mark.parametrize("precision, dtype", [
    ["fp32", torch.float32],
    ["bf16", torch.bfloat16],
])
def test_flags_reach_the_step(precision, dtype, monkeypatch):
    def step(G, D, optimizer_g, optimizer_d, real, **options):
        assert options == dict(latent_dim=100, fresh_noise=True, flip_labels=0.3)
        assert D(real).dtype == torch.float32
        assert G(torch.zeros(2, 100)).dtype == dtype
        return torch.ones(4)

    monkeypatch.setattr(dcgan, "train_step", step)
    train("--epochs", 1, "--fresh-noise", "--flip-labels", 0.3, "--precision", precision)

@pytest.mark.parametrize("step, diversity, d_fake, distances, told", [
    [500, 0.69, 0.009, [30], []],  # too early to tell
    [501, 0.69, 0.011, [30], ["the generator collapses"]],
    [501, 0.71, 0.009, [30], ["the discriminator has won"]],
    [501, 0.71, 0.011, [40, 20] + 5 * [23], ["past its best, which was epoch 2 (best.pt)"]],
    [501, 0.71, 0.011, [40, 20] + 4 * [30], []],
])
def test_troubles(step, diversity, d_fake, distances, told):
    row = {"step": step, "diversity": diversity}
    losses = torch.zeros(9, 4)
    losses[0, 3] = 1  # of an earlier epoch
    losses[-3, 3] = d_fake
    rows = [row | {"frechet": distance} for distance in distances]
    state = SimpleNamespace(rows=rows, losses=losses, epoch_steps=5)
    troubles = dcgan.Run.find_troubles(state)
    assert [trouble.split(":")[0] for trouble in troubles] == told

def test_the_best_epoch_is_kept_and_draws_what_is_generated(monkeypatch, capsys):
    distances = iter([30, 20, 25, 20])
    monkeypatch.setattr(dcgan, "compare", lambda *args: (next(distances), 1.0))
    train("--epochs", 4)
    assert checkpoint(name="best.pt")["step"] == 10  # of equal ones, the first
    for count in 130, 3:
        run("--generate", count, "--seed", 7)
        Path("out/generated/mine.png").write_text("to be kept")
        assert len(os.listdir("out/generated")) == count + 1
    assert "epoch 2: 3 pictures in " in capsys.readouterr().out

def test_pictures_are_drawn_by_the_average(monkeypatch):
    """Of the networks, only the average is in eval mode."""
    def sample(G, latents):
        assert not G.training
        return torch.zeros(40, 3, 32, 32).byte()

    monkeypatch.setattr(dcgan, "sample", sample)
    train("--epochs", 1)
    run("--generate", 3)

# ---- However a run ends ---------------------------------------------------------------------
def end_in_step(number, end):
    """Return a train_step that calls `end` in the run's step of this number."""
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

@pytest.mark.parametrize("save_seconds, number, saved", [[0, 9, 8], [60, 4, 0]])
def test_interrupt_and_resume_as_if_nothing_had_been(
        save_seconds, number, saved, finished, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^130$"):
        patch.setattr(dcgan, "SAVE_SECONDS", save_seconds)
        patch.setattr(dcgan, "train_step", end_in_step(number, interrupt))
        train("--epochs", 3)
    line = f"dcgan.py: interrupted (--resume goes on after step {saved})\n"
    assert line in capsys.readouterr().err
    assert "holds a run" in error_of(*SMALL)
    run("--resume")
    assert_same_run("out", finished)

def test_a_killed_run_is_resumed_as_if_nothing_had_been(finished):
    """Killed anywhere after the first epoch. RANK counts in torchrun only."""
    environment = os.environ | {"RANK": "1"}
    command = [sys.executable, dcgan.__file__, *SMALL, "--epochs", "3"]
    with subprocess.Popen(command, env=environment) as program:
        while program.poll() is None and not Path("out/samples/epoch_001.png").exists():
            time.sleep(0.01)
        program.kill()
    run("--resume")
    assert_same_run("out", finished)

def test_a_longer_run_is_the_shorter_one_and_more(finished, capsys):
    train("--epochs", 2)
    run("--resume")
    assert " 0 steps left of --epochs 2" in capsys.readouterr().out
    run("--resume", "--epochs", 3)
    assert_same_run("out", finished)

def spoil(losses, G, D, *args):
    D.layers[0].weight.detach().fill_(torch.nan)

def test_weights_that_are_not_finite_end_the_run_and_are_not_saved(monkeypatch):
    monkeypatch.setattr(dcgan, "train_step", end_in_step(10, spoil))
    assert "not finite at step 10" in error_of(*SMALL)
    assert checkpoint()["step"] == 5

def test_a_log_that_is_open_in_excel_does_not_end_the_run(capsys):
    Path("out/log.csv").mkdir(parents=True)
    train("--epochs", 1)
    assert "log.csv stays as it is" in capsys.readouterr().out

def test_a_run_is_not_continued_as_another(finished):
    for start in "--resume", "--generate=1":
        line = error_of(start, "--out", finished, "--slope-g", 0)
        assert "this run's slope_g is 0.2 and cannot change" in line
    write_zip("more.zip", {f"{i}.png": FACES[0] for i in range(48)})
    line = error_of("--resume", "--out", finished, "--data", "more.zip")
    assert "--data has 6 batches, but the run had 5" in line

# ---- Places to run in -----------------------------------------------------------------------
@pytest.mark.parametrize("console", [
    io.StringIO(),
    io.TextIOWrapper(io.BytesIO(), "cp1252"),
])
def test_a_run_in_a_thread_with_another_standard_output(console, monkeypatch):
    """As in a notebook, or on Windows, which cannot show the name of these pictures."""
    name = "\u0444\u043e\u0442\u043e.zip"
    write_faces(name)
    monkeypatch.setattr(sys, "stdout", console)
    words = ["--data", name, "--epochs", 1]
    thread = threading.Thread(target=train, args=words)
    thread.start()
    thread.join()
    assert checkpoint()["step"] == 5

def keep_weights(average, G, decay, step):
    """In place of update_average: one file for each step of each process."""
    torch.save(list(G.parameters()), f"step{step}-rank{dcgan.RANK}.pt")

def test_two_processes_share_a_run_that_one_resumes(two_processes):
    program, folder = two_processes
    os.chdir(folder)
    printed, _ = program.communicate(timeout=60)
    assert printed.count("epoch 1 step 5 ") == 1
    for step in range(1, 11):
        first = torch.load(f"step{step}-rank0.pt")
        second = torch.load(f"step{step}-rank1.pt")
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    run("--resume", "--epochs", 3)
    assert checkpoint()["step"] == 15

@pytest.fixture(scope="session", autouse=True)
def two_processes(tmp_path_factory):
    """A program of its own. It starts first, as to import torch takes it long."""
    folder = tmp_path_factory.mktemp("two")
    write_faces(folder / "faces.zip")
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    command = [sys.executable, *torchrun, __file__]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as program:
        yield program, folder
        program.terminate()

# ---- The command line -----------------------------------------------------------------------
@pytest.mark.parametrize("flag", [
    "--image-size 65", "--batch-size 0", "--beta1 1", "--ema nan", "--lr-g -1",
])
def test_wrong_flag_is_argparses_error(flag):
    with pytest.raises(SystemExit, match="^2$"):
        train(*flag.split())

@pytest.mark.parametrize("flags, told", [
    ["--batch-size 41", "40 pictures do not fill --batch-size 41"],
    ["--data toy --out toy --device meta", "--device meta cannot be used"],
    ["--generate 3", "No such file"],
    ["--resume --out other", "the checkpoint does not fit this version"],
    ["--resume --out code", "Weights only load failed"],
    ["--data page.zip", "not a zip file"],
    ["--data data/celeba", "no source of CelebA could be used; use --data toy"],
    ["--data other", "no pictures in other"],
    ["--data bad.zip", "all 1 pictures are broken"],
    ["--data . --out inside", "--out inside lies in --data"],
])
def test_bad_input_is_one_line(flags, told):
    write_zip("bad.zip", {"x.jpg": b""})
    Path("page.zip").write_text("<html>")
    for folder, settings in {"other": {}, "code": Path()}.items():
        Path(folder).mkdir()
        torch.save({"settings": settings}, f"{folder}/checkpoint.pt")
    assert told in error_of(*SMALL, *flags.split())

if __name__ == "__main__":
    dcgan.update_average = keep_weights
    train("--epochs", 2)
