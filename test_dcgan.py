"""Tests of dcgan.py: run `pytest`; under a minute, no network, no GPU needed.
Copy them along with the networks and the step, down to the line that says so."""
import copy

import pytest
import torch
from pytest import approx, fixture, mark, raises
from torch import nn
from torch.nn.functional import softplus
from torch.testing import assert_close

import dcgan
from dcgan import Discriminator, Generator

# Small networks need no more, and the tests run programs beside them.
torch.set_num_threads(1)
parametrize = mark.parametrize
IMAGES = torch.zeros(2, 3, 64, 64)
LATENTS = torch.eye(2, 100)

def networks(image_size=32, device="cpu"):
    torch.manual_seed(0)
    G = Generator(width=8, image_size=image_size)
    D = Discriminator(width=8, image_size=image_size)
    return nn.ModuleList([G, D]).to(device)

def sgd(network):
    """With SGD, an update is a share of a gradient."""
    return torch.optim.SGD(network.parameters(), 0.1)

def step_of(G, D, real, **options):
    return dcgan.train_step(G, D, sgd(G), sgd(D), real, **options)

def test_generator_turns_100_numbers_into_3_x_64_x_64_images():
    images = Generator()(50 * LATENTS)
    assert images.shape == IMAGES.shape
    assert images.abs().max() <= 1

def test_discriminator_turns_an_image_into_a_single_logit():
    assert Discriminator()(IMAGES).shape == (2, 1)

@parametrize("device", ["cpu", "cuda"])
def test_one_training_step_moves_every_parameter(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    trained = networks(64, device)
    before = copy.deepcopy(trained)
    step_of(*trained, IMAGES.to(device))
    for p, old in zip(trained.parameters(), before.parameters()):
        assert not torch.equal(p, old)

def test_the_same_step_makes_no_tensor_on_another_device():
    """On the meta device, where a tensor made on the CPU raises."""
    assert step_of(*networks(64, "meta"), IMAGES.to("meta")).is_meta

# ---- Networks -------------------------------------------------------------------------------
@parametrize("size", [32, 96, 256])
def test_other_sizes_and_latents_that_are_maps_of_one_pixel(size):
    G, D = networks(size)
    images = G(torch.randn(2, 100, 1, 1))
    assert images.shape == (2, 3, size, size)
    assert D(images).shape == (2, 1)

def test_weights_begin_as_in_the_paper_and_the_slope_is_0_2():
    assert repr(networks()).count("slope=0.2") == 6
    for p in networks().parameters():
        if p.dim() == 4:
            assert 0.01 < p.std() < 0.03

@parametrize("norm, low", [[nn.InstanceNorm2d, 0.01], [nn.Identity, 0.03]])
def test_without_batch_norm_all_convolutions_have_biases(norm, low):
    """With no norm at all, weights are torch's own."""
    parameters = list(Discriminator(width=2, norm=norm).parameters())
    assert len(parameters) == 10
    for weights in parameters[::2]:
        assert low < weights.std() < 4 * low

def test_features_are_the_last_maps_in_float32_even_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        features = Discriminator()(IMAGES, features=True)
    assert features.dtype == torch.float32
    assert features.shape == (2, 512, 4, 4)

def test_generator_is_exported_for_any_number_of_latents():
    G = Generator(width=1, image_size=8)
    torch.export.export(G, (LATENTS,), dynamic_shapes=[{0: torch.export.Dim("n")}])

# ---- The game -------------------------------------------------------------------------------
@parametrize("fresh_noise", [False, True])
def test_step_is_the_one_written_out_here(fresh_noise):
    real = torch.rand(8, 3, 32, 32)
    trained = networks()
    torch.manual_seed(1)
    losses = step_of(*trained, real, fresh_noise=fresh_noise)

    expected = networks()
    G, D = expected
    torch.manual_seed(1)
    fake = G(torch.randn(8, 100))
    real_logits = D(real)
    fake_logits = D(fake.detach())
    loss_d = (softplus(-real_logits) + softplus(fake_logits)).mean() / 2
    loss_d.backward()
    sgd(D).step()
    if fresh_noise:
        fake = G(torch.randn(8, 100))
    loss_g = softplus(-D(fake)).mean()
    loss_g.backward()
    sgd(G).step()
    means = [logits.sigmoid().mean() for logits in (real_logits, fake_logits)]
    assert_close(list(losses), [loss_d, loss_g, *means])
    assert_close(trained.state_dict(), expected.state_dict())

def test_autocast_around_steps_sees_each_update():
    """It caches bfloat16 copies. G's half needs the new D; after fresh noise, D the new G."""
    losses = []
    for cache in False, True:
        G, D = networks(64)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            losses.append(step_of(G, D, torch.rand(8, 3, 64, 64), fresh_noise=True))
            images = G(LATENTS)
    assert_close(*losses, rtol=0.05, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(images, G(LATENTS))

@parametrize("decay, step, share", [[0.999, 1, 0.9], [0.5, 99, 0.5]])
def test_average_has_a_short_memory_at_first(decay, step, share):
    """G may be wrapped, so that the names of its weights have a prefix."""
    average, G = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
    G.running_mean += 1
    dcgan.update_average(average, nn.Sequential(G), decay, step)
    assert average.running_mean.item() == approx(share)

# ==== Copy the tests down to here along with the networks and the step =======================
# ruff: noqa: E402
import faulthandler
import hashlib
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from unittest.mock import DEFAULT, Mock
from zipfile import ZipFile
from zlib import crc32

from PIL import Image
from torchvision import transforms as T
from torchvision.transforms.functional import gaussian_blur, to_pil_image
from dcgan import animate, batches, compare, decode, load_images, parse_args, sample, toy_faces

PAGE = Path(dcgan.__file__).with_name("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall("```python\n(.*?)```", PAGE, re.S)

def encoded(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()

SMALL = """--data faces.zip --image-size 32 --width 4 --batch-size 8 --device cpu
    --flip-labels 0.1""".split()
FACES = [encoded(to_pil_image(face)) for face in toy_faces(40, 32)]  # five steps an epoch

def write_zip(path, files):
    with ZipFile(path, "w") as archive:
        for item in files.items():
            archive.writestr(*item)

def write_faces():
    write_zip("faces.zip", {f"{i:02d}.png": face for i, face in enumerate(FACES)})

@fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Each test runs in a folder of its own, with 40 faces in it, and downloads no CelebA."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dcgan.CELEBA_URLS", ["nowhere"])
    write_faces()

def train(*argv):
    dcgan.main([*SMALL, *argv])

def error_of(*argv):
    with raises(SystemExit, match=r"^dcgan.py: error: .{1,400}\Z") as stop:
        dcgan.main(argv)
    return stop.value.code

def checkpoint(folder="out", name="checkpoint.pt"):
    saved = torch.load(Path(folder, name), weights_only=True)
    del saved["settings"]  # texts, which assert_close does not take
    return saved

def assert_same_run(folder, other):
    for name in "checkpoint.pt", "best.pt":
        assert_close(checkpoint(folder, name), checkpoint(other, name), rtol=0, atol=0)

@fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run of three epochs without a break."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_faces()
        train("--epochs=3")
    return folder / "out"

not_on_windows = mark.skipif(os.name == "nt", reason="no fork, and links need a right")

# ---- Pictures in ----------------------------------------------------------------------------
@parametrize("size, crop, side", [[(178, 218), None, 160], [(75, 120), 200, 75]])
def test_preparation_is_the_lectures_to_the_last_bit(size, crop, side):
    image = Image.effect_noise(size, 99)
    prepared = decode(encoded(image), 64, crop)
    lecture = nn.Sequential(T.CenterCrop(side), T.Resize(64))
    assert prepared.tobytes() == lecture(image.convert("RGB")).tobytes()

def test_pictures_of_phones_are_turned_upright_and_malformed_exif_is_ignored():
    upright = Image.linear_gradient("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: its top is at the left
    turned = encoded(upright.rotate(90), exif=exif)
    assert decode(turned).tobytes() == decode(encoded(upright, exif=b"Exif\0\0broken")).tobytes()

def test_a_flipped_bit_in_a_png_is_seen_wherever_it_is():
    data = FACES[0]
    for position in range(data.index(b"IDAT"), len(data) - 12, 9):
        damaged = bytearray(data)
        damaged[position] ^= 1
        with raises(Exception):
            decode(bytes(damaged))

def test_broken_pictures_are_skipped_and_ten_of_them_named(capsys):
    """As a console may obey an escape code, names are printed as Python writes them."""
    jpeg = encoded(Image.effect_noise([64, 64], 99), "JPEG")
    files = {f"\x1b{i}.jpg": jpeg[:-99] for i in range(12)}
    write_zip("odd.zip", files | {"good.jpg": jpeg})
    for named in 10, 0:  # the second start finds the cache
        load_images("odd.zip")
        printed = capsys.readouterr().out
        assert "odd.zip: 1 of 13 pictures can be read" in printed
        assert printed.count(r"\x1b") == named
        assert "\x1b" not in printed

@parametrize("source", ["mixed", "mixed.zip"])
def test_only_pictures_that_are_not_hidden_are_read(source, capsys):
    files = """deep/.x/a.jpg deep/@eaDir/a.jpg #recycle/a.jpg $RECYCLE.BIN/a.jpg ._a.jpg
        a.pdf a.h5 a.mpg a.txt a.dcgan jpg deep/a.PNG deep/b.jfif"""
    write_zip("mixed.zip", dict.fromkeys(files.split(), FACES[0]))
    ZipFile("mixed.zip").extractall("mixed")
    load_images(source)
    assert ": 2 of 2 pictures" in capsys.readouterr().out

@not_on_windows
def test_links_are_followed_but_pipes_are_not_opened():
    ZipFile("faces.zip").extractall("far")
    Path("faces").mkdir()
    Path("faces/near").symlink_to("../far")
    Path("faces/notes.txt").symlink_to("nowhere")
    os.mkfifo("faces/x.jpg")
    assert len(load_images("faces")) == 40

def test_a_damaged_file_in_a_zip_costs_no_other():
    data = Path("faces.zip").read_bytes()
    Path("faces.zip").write_bytes(data.replace(FACES[7], FACES[7][::-1]))
    assert len(load_images("faces.zip")) == 39

@parametrize("function", ["zipfile.Path.read_bytes", "dcgan.decode"])
def test_pictures_that_the_system_cannot_read_end_the_start(function, monkeypatch):
    monkeypatch.setattr(function, Mock(side_effect=MemoryError("full")))
    assert error_of(*SMALL).endswith("full")
    assert not os.listdir("data")

def test_whatever_a_zip_cannot_be_opened_for_ends_in_one_line(monkeypatch):
    monkeypatch.setattr("dcgan.ZipFile", Mock(side_effect=NotImplementedError("\n" + 999 * "x")))
    assert "is neither a folder nor a readable .zip ( xxx" in error_of(*SMALL)

@not_on_windows
def test_cache_serves_until_size_crop_or_a_picture_changes():
    """Even to one of the same name, size and time. Caches, in the source here, are no pictures."""
    Path("data").mkdir()
    for level, files in (50, 4), (60, 7):
        Image.new("L", [8, 8], level).save("data/a.bmp")
        os.utime("data/a.bmp", (9, 9))
        for settings in [32], [64], [64, 5], [32]:
            assert load_images("data", *settings).unique() == level
        assert len(os.listdir("data")) == files

@not_on_windows
def test_writing_to_the_cached_pictures_is_a_crash():
    images = load_images("faces.zip")
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        images.zero_()
        os._exit(0)
    assert os.waitpid(child, 0)[1] != 0

def test_celebas_training_part_comes_from_the_first_source_that_has_it(monkeypatch, capsys):
    """The first source takes the call, but never answers; the second has another file."""
    write_zip("right", {"faces/1.jpg": FACES[0], "faces/2.jpg": FACES[1]})
    md5 = hashlib.md5(Path("right").read_bytes())
    monkeypatch.setattr("dcgan.CELEBA_MD5", md5.hexdigest())
    monkeypatch.setattr("dcgan.CELEBA_COUNT", 2)
    monkeypatch.setattr("dcgan.CELEBA_TRAINING_COUNT", 1)
    monkeypatch.setenv("no_proxy", "*")
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr("socket.setdefaulttimeout", lambda seconds: set_timeout(0.5))
    here = "127.0.0.1", 0
    with HTTPServer(here, None) as mute, HTTPServer(here, SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever).start()
        first, site = [f"http://127.0.0.1:{s.server_port}" for s in (mute, server)]
        monkeypatch.setattr("dcgan.CELEBA_URLS", [first, f"{site}/faces.zip", f"{site}/right"])
        load_images(Path("data/celeba").absolute())
        server.shutdown()
    set_timeout(None)
    load_images("data/celeba")
    assert capsys.readouterr().out.count("no CelebA from") == 2
    ZipFile(dcgan.CELEBA).extractall("data/celeba")
    dcgan.CELEBA.unlink()
    assert len(load_images("data/celeba")) == 1

def test_seed_and_epoch_decide_the_order_seed_and_step_the_noise():
    """By texts that may not change, so that old runs can be resumed. Here, two steps an epoch."""
    images = torch.arange(100).byte()[:, None, None, None]
    for step, batch in enumerate(batches(images, batch_size=40, epochs=2, seed=7)):
        noise = torch.rand(1)
        torch.manual_seed(crc32(f"order 7 {step // 2}".encode()))
        order = torch.randperm(100).split(40)[step % 2]
        assert_close(batch.flatten(), order / 127.5 - 1)
        torch.manual_seed(crc32(f"noise 7 {step + 1} 0".encode()))
        assert torch.rand(1) == noise
    assert step == 3

# ---- Pictures out ---------------------------------------------------------------------------
def test_sample_turns_minus_one_to_one_into_0_to_255():
    """PReLU divides negative numbers by four."""
    images = sample(nn.PReLU().eval(), torch.tensor([[-4, 0.206, 1]]))
    assert images.tolist() == [[0, 154, 255]]

@parametrize("call, told", [
    [lambda: networks(4), "image_size 4 is not 4, 5, 6 or 7 times"],
    [lambda: networks(100), "image_size 100 is not"],
    [lambda: networks()[1](IMAGES), "N x .3, 32, 32., not .2, 3, 64, 64."],
    [lambda: sample(nn.PReLU(), IMAGES), "call G.eval.. first"],
    [lambda: compare(IMAGES, IMAGES[:1]), "at least two"],
    [lambda: next(batches(IMAGES.numpy(), 2)), "uint8 .* in <class 'numpy.ndarray'>"],
    [lambda: decode(encoded(Image.new("I;16", [8, 8]))), "more than 8 bits"],
])
def test_what_cannot_be_done_is_told(call, told):
    with raises(ValueError, match=told):
        call()

def test_equal_pictures_of_any_shape_are_at_no_distance():
    images = torch.randint(256, (2, 4, 256, 256)).byte()
    assert compare(images, images) == approx((0, 1), abs=0.001)

def test_distance_sees_blur_rather_than_brightness():
    faces = toy_faces(64, 32).clamp(12, 243)
    brighter, diversity = compare(faces + 12, faces)
    blurred, diversity = compare(gaussian_blur(faces, 3), faces)
    assert 90 * brighter < 1.4 < blurred

def test_diversity_is_1_in_health_and_small_after_a_collapse_for_16_pictures_too():
    real, few = toy_faces(528, 32).split(512)
    # Pinned, or figures measured before would not compare.
    assert compare(few, real) == approx((3.042, 1.061), rel=0.01)
    assert compare(few[:8].repeat(2, 1, 1, 1), real)[1] < 0.5

def test_loss_plot_shows_a_short_peak_and_a_low_loss_in_their_colours():
    """Pixels, from the top left: x is 50 to 650, y is 190 at a loss of 1."""
    losses = torch.tensor([0.01, 1]).repeat(3000, 1)
    losses[1500:1520, 1] = 50
    dcgan.plot_losses(losses, 3, "losses.png")
    plot = Image.open("losses.png")
    assert plot.getpixel((352, 54)) == (210, 105, 30)
    assert plot.getpixel((352, 350)) == (31, 95, 168)

def test_gif_has_at_most_100_of_the_grids_that_can_be_read_and_ends_with_the_last():
    animate(Path("nowhere"), 3, "samples.gif")
    Path("epoch_001.png").touch()
    for epoch in range(2, 251):
        Image.new("L", [8, 8], epoch).save(f"epoch_{epoch:03d}.png")
    animate(Path(), 250, "samples.gif")
    gif = Image.open("samples.gif")
    assert gif.n_frames == 83
    gif.seek(82)
    assert gif.convert("L").getpixel((0, 0)) == 250

# ---- The run --------------------------------------------------------------------------------
def test_the_best_epoch_is_told_and_kept_and_draws_what_is_generated(monkeypatch, capsys):
    distances = iter([30, 20, 25, 20])
    monkeypatch.setattr("dcgan.compare", lambda *args: (next(distances), 1.0))
    monkeypatch.setattr("dcgan.LOG_STEPS", 2)
    train("--epochs=4")
    lines = re.findall("^epoch.*", capsys.readouterr().out, re.M)
    assert [line.split()[3] for line in lines] == "2 4 5 6 8 10 12 14 15 16 18 20".split()
    assert re.search(r" frechet 20 diversity 1.0 best 2 minutes 0\.\d$", lines[-1])
    names = "epoch,step,loss_d,loss_g,D(x),D(G(z)),frechet,diversity,best"
    assert Path("out/log.csv").read_text().startswith(f"{names}\n1,5,")
    assert len(checkpoint(name="best.pt")["losses"]) == 10
    dcgan.main(["--generate=130"])
    assert "epoch 2: 130 pictures in " in capsys.readouterr().out
    assert len(os.listdir("out/generated-130")) == 130

@parametrize("flags, kind, dtype", [
    ["--precision fp32 --optimizer-d adam", "Adam", torch.float32],
    ["--precision bf16 --optimizer-d sgd", "SGD", torch.bfloat16],
])
def test_flags_reach_the_step(flags, kind, dtype, monkeypatch):
    def step(G, D, optimizer_g, optimizer_d, real, fresh_noise, loss_for_d):
        assert fresh_noise
        assert "slope=0.0" in repr(G)
        assert "slope=0.5" in repr(D)
        assert "lr: 0.1\n" in repr(optimizer_g)
        assert "lr: 0.03\n" in repr(optimizer_d)
        assert "betas: (0.3, 0.999)" in repr(optimizer_g)
        assert kind in repr(optimizer_d)
        assert D(real).dtype == torch.float32
        assert G(LATENTS).dtype == dtype
        ones = torch.ones(9999, 1)
        assert 0.6 < loss_for_d(ones, -ones) < 0.8  # 0.4 more than without swapped labels
        twin = copy.deepcopy(G)
        assert twin.forward.__self__ is twin
        nn.init.ones_(G.layers[0].weight)
        return torch.ones(4)
    monkeypatch.setattr("dcgan.train_step", step)
    flags += """ --epochs 1 --slope-g 0 --slope-d 0.5 --lr-g 0.1 --lr-d 0.03 --beta1 0.3
        --flip-labels 0.4 --fresh-noise --ema 0"""
    train(*flags.split())
    assert checkpoint()["average"]["layers.0.weight"].min() == 1

def test_the_end_of_an_epoch_tells_its_means_and_after_500_steps_a_collapse(monkeypatch, capsys):
    monkeypatch.setattr("dcgan.compare", lambda *args: (30, 0.69))
    Path("samples").mkdir()
    args = parse_args([*SMALL, "--out=."])
    args.epoch_steps = 5
    run = dcgan.Run(args, torch.device("cpu"))
    for steps in 500, 501:
        run.losses = torch.arange(4.0).repeat(steps, 1)
        run.losses[-5:] += 2
        dcgan.end_epoch(run, args, None, 90)
        printed = capsys.readouterr().out
        assert " loss_d 2.0 loss_g 3.0 D(x) 4.0 " in printed
        assert ("the generator is collapsing" in printed) == (steps > 500)

# ---- However a run ends ---------------------------------------------------------------------
@parametrize("seconds, number, saved", [[-1, 8, 8], [60, 3, 0]])
def test_interrupt_and_resume_as_if_nothing_had_been(seconds, number, saved, finished, monkeypatch):
    ends = Mock(wraps=dcgan.update_average)
    ends.side_effect = [*number * [DEFAULT], KeyboardInterrupt]
    with monkeypatch.context() as patch, raises(SystemExit, match="^130$"):
        patch.setattr("dcgan.SAVE_SECONDS", seconds)
        patch.setattr("dcgan.update_average", ends)
        train("--epochs=3")
    assert len(checkpoint()["losses"]) == saved
    assert "holds a run" in error_of(*SMALL)
    dcgan.main(["--resume"])
    assert_same_run("out", finished)

def test_a_killed_run_is_resumed_as_if_nothing_had_been(finished):
    """Killed anywhere after the first epoch, in a folder whose name the console cannot show."""
    out = "\u0444\u043e\u0442\u043e"
    command = [sys.executable, dcgan.__file__, *SMALL, "--epochs", "3", "--out", out]
    with subprocess.Popen(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}) as program:
        while not Path(out, "samples/epoch_001.png").exists():
            assert program.poll() is None
            time.sleep(0.01)
        program.kill()
    dcgan.main(["--resume", "--out", out])
    assert_same_run(out, finished)

def test_a_longer_run_is_the_shorter_one_and_more(finished):
    train("--epochs=2")
    dcgan.main(["--resume"])
    dcgan.main(["--resume", "--epochs=3"])
    assert_same_run("out", finished)

def test_weights_that_are_not_finite_end_the_run_and_are_not_saved(monkeypatch):
    def spoil(average, G, decay, step):
        nn.init.constant_(G.layers[0].weight, torch.nan)
    monkeypatch.setattr("dcgan.update_average", spoil)
    assert "not finite at step 5" in error_of(*SMALL)
    assert len(checkpoint()["losses"]) == 0

def test_a_log_that_is_open_in_excel_does_not_end_the_run(capsys):
    Path("out/log.csv").mkdir(parents=True)
    train("--epochs=1")
    assert "log.csv was not updated" in capsys.readouterr().out

@parametrize("flag, told", [["--width=5", "width is 4"], ["--data=toy", "epoch_steps is 5"]])
def test_a_run_is_not_continued_as_another(flag, told, finished):
    assert f"run's {told} and cannot change" in error_of("--resume", f"--out={finished}", flag)

def test_a_file_is_replaced_when_the_new_one_is_on_the_disk_or_stays(monkeypatch):
    def fsync(file):
        assert os.fstat(file.fileno()).st_size == 3
        raise OSError("the disk is full")
    monkeypatch.setattr("os.fsync", fsync)
    with raises(OSError), dcgan.atomic_write(Path("faces.zip")) as file:
        file.write(b"new")
    assert os.listdir() == ["faces.zip"]
    assert os.path.getsize("faces.zip") > 3

# ---- The command line -----------------------------------------------------------------------
@parametrize("flags", ["--epochs 0", "--beta1 1", "--ema nan", "--resume --generate 3"])
def test_wrong_flags_are_argparses_error(flags):
    with raises(SystemExit, match="^2$"):
        train(*flags.split())

@parametrize("line", """
    --batch-size 41: --data has 40 pictures, a batch needs 41
    --data . --batch-size 1: --data has 1 pictures, a batch needs 2
    --device nowhere: --device nowhere cannot be used, try --device cpu
    --generate 3: best.pt (FileNotFoundError): train first, or check --out
    --generate 3 --out .: best.pt (UnpicklingError): train first, or check --out
    --resume --out .: checkpoint.pt (KeyError): train first, or check --out
    --data data/celeba: img_align_celeba.zip is neither a folder nor a readable .zip
    --data checkpoint.pt: no picture that can be read
""".strip().splitlines())
def test_bad_input_is_one_line_and_saves_nothing(line):
    for name in "one.png", "best.pt":
        Path(name).write_bytes(FACES[0])
    torch.save({}, "checkpoint.pt")
    flags, told = line.split(": ", 1)
    assert told in error_of(*SMALL, *flags.split())
    assert not Path("out").exists()

# ---- README.md ------------------------------------------------------------------------------
def test_commands_on_the_page_are_understood():
    for command in re.findall("^    python dcgan.py (.*)", PAGE.replace("\\\n", ""), re.M):
        parse_args(shlex.split(command, comments=True))

def test_code_on_the_page_runs(finished):
    shutil.copytree(finished, "out-toy")
    os.makedirs("data/celeba")
    names = [f"img_align_celeba/{i:06d}.jpg" for i in range(1, 11)]
    write_zip("data/celeba/img_align_celeba.zip", dict.fromkeys(names, FACES[0]))
    for block in BLOCKS:
        if "init_process_group" not in block:
            exec(block.replace("10_001", "11"), {})  # ten pictures of CelebA

def test_code_for_several_processes_trains_equal_weights_on_different_pictures(several):
    program, folder = several
    assert program.wait(timeout=120) == 0
    weights, pictures, noise = zip(*[torch.load(folder / f"{rank}.pt") for rank in range(2)])
    assert_close(*weights, rtol=0, atol=0)
    assert not torch.equal(*pictures)
    assert not torch.equal(*noise)

@fixture(scope="session", autouse=True)
def several(tmp_path_factory):
    """Started first, as to import torch takes long. Random numbers that follow tell the noise."""
    folder = tmp_path_factory.mktemp("several")
    block = "".join(block for block in BLOCKS if "init_process_group" in block)
    keep = "import torch; kept = [*G.parameters(), *D.parameters()], images[0], torch.rand(9)\n"
    keep += 'torch.save(kept, f"{rank}.pt")'
    Path(folder, "several.py").write_text(block + keep)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 several.py"
    command = [sys.executable, *torchrun.split()]
    shutil.copy(dcgan.__file__, folder)
    with subprocess.Popen(command, cwd=folder) as program:
        yield program, folder
        program.terminate()
