# SPDX-License-Identifier: MIT
"""DCGAN in one file: train it on pictures of faces, get faces of people who never were.

    python dcgan.py --data toy --epochs 3 --out out-toy     drawn faces, no download
    python dcgan.py --epochs 20                             CelebA, as in the lecture
    python dcgan.py --generate 1000                         pictures from its best epoch

Read train_step first, it is the whole game; then from top to bottom: pictures, networks, the step,
measures, the run, the command line, where main is. What is not about GANs may be skipped:
list_pictures to find_pictures, map_cache to write_cache, signals to load_shared.

Sources: Radford et al. 2016, arXiv:1511.06434; Raschka 2021, STAT 453, lecture 18.6; Chintala et
al. 2016, ganhacks; Heusel et al. 2017, arXiv:1706.08500; Liu et al. 2015, CelebA.
"""
import argparse
import copy
import csv
import hashlib
import os
import platform
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed as dist, nn
from torch.optim import SGD, Adam
from torchvision.datasets import CelebA
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, download_url
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

# ---- Messages ------------------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can mend: main prints it as one line and exits with status 2."""

def from_torchrun(name, default=0):
    """RANK, WORLD_SIZE and such: what torchrun tells each of its processes; else `default`."""
    return int(os.environ.get(name, default))

def report(text, file=None):
    """Print one line, above a progress bar if there is one.

    With `file`, for errors, from every process; else from the first on each machine."""
    if file or from_torchrun("LOCAL_RANK") == 0:
        with suppress(BrokenPipeError):     # Ctrl-C ends a `| tee`, too, but the run must be saved
            tqdm.write(" ".join(str(text).split()), file)
            sys.stdout.flush()

# ---- Data: from a path to one uint8 tensor, from that tensor to a batch in [-1, 1] ---------------
CELEBA_FOLDER = Path("data/celeba")
CELEBA_ID, CELEBA_MD5, CELEBA_ZIP = CelebA.file_list[0]
CELEBA_BYTES = 1_443_490_838
CELEBA_PICTURES, CELEBA_TRAIN = 202_599, 162_770    # all of them; the official training partition
CELEBA_SIZE, CELEBA_CROP = (178, 218), 160          # width x height; the lecture's centre crop
CELEBA_HELP = f"put {CELEBA_ZIP} into {CELEBA_FOLDER} by hand, or use --data toy or --data FOLDER"
CELEBA_URLS = (
    f"https://drive.google.com/uc?id={CELEBA_ID}",
    f"https://cseweb.ucsd.edu/~weijian/static/datasets/celeba/{CELEBA_ZIP}",
    f"https://graal.ift.ulaval.ca/public/celeba/{CELEBA_ZIP}",
)
SILENCE = 30        # seconds without a byte after which a source is given up

def toy_faces(count=4096, image_size=64):
    """Draw simple faces, all different: uint8, count x 3 x image_size x image_size."""
    rng = random.Random(0)
    faces = []
    side = 2 * image_size       # drawn at twice the size, then reduced: smooth edges
    for _ in range(count):
        size, skin = side * rng.uniform(0.7, 1), rng.randint(45, 85)
        corner = rng.uniform(0, side - size)
        image = Image.new("RGB", (side, side), f"hsl({rng.randint(0, 360)}, 30%, 60%)")
        draw = ImageDraw.Draw(image)
        for color, *box in (        # left, top, right, bottom
                (f"hsl(30, 50%, {rng.randint(5, 50)}%)", 0.15, 0.05, 0.85, 0.85),           # hair
                (f"hsl(25, 50%, {skin}%)", 0.22, 0.15, 0.78, 0.95),                         # face
                (f"hsl(0, 60%, {skin - 20}%)", 0.35, 0.7, rng.uniform(0.5, 0.65), 0.77),    # mouth
                ("#123", 0.32, 0.42, 0.42, 0.5),                                            # eyes
                ("#123", 0.58, 0.42, 0.68, 0.5)):
            draw.ellipse([corner + size * edge for edge in box], color)
        faces.append(pil_to_tensor(image.reduce(2)))
    return torch.stack(faces)

def list_pictures(source):
    """The sorted names of the pictures in a folder or .zip, without hidden ones."""
    names = []
    visited = set()
    if is_zipfile(source):
        with ZipFile(source) as archive:
            names = archive.namelist()
    for parent, folders, files in os.walk(source, followlinks=True):
        folders.sort()
        real = os.path.realpath(parent)
        if real in visited:     # a link, which may lead in circles
            folders.clear()
            continue
        visited.add(real)
        names += [os.path.join(parent, file).removeprefix(f"{source}{os.sep}") for file in files]
    # no part begins with a dot, but some archives call all that they hold ./NAME
    names = [name for name in names if "/." not in f"/{name.removeprefix('./')}"]
    return sorted(name for name in names if name.lower().endswith(IMG_EXTENSIONS))

@contextmanager
def atomic_write(path, needed=0):
    """Yield a path to write to; at the end the file moves to `path`, or goes if the block failed.

    UserError if fewer than `needed` bytes are free, or if writing fails."""
    host = platform.node()
    for folder in path.parent.glob(f".dcgan-*@{host}"):
        try:
            os.kill(int(folder.name.split("-")[1]), 0)      # is its process still running?
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:     # yes, and it is somebody else's
            pass
    try:
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError("no room")
        name = f".dcgan-{os.getpid()}-"
        with tempfile.TemporaryDirectory(f"@{host}", name, path.parent) as folder:
            yield Path(folder, path.name)
            os.replace(Path(folder, path.name), path)
    except (OSError, RuntimeError) as error:        # the latter is torch.save's
        size = f" ({needed:,} bytes)" if needed else ""
        raise UserError(f"{path}{size} cannot be written: {error}")

def fetch(url, path):
    """Download CelebA's archive from one source; raises whatever the source does, or UserError."""
    if "drive.google.com" in url:
        import gdown
        gdown.download(url, str(path), timeout=SILENCE)
    else:
        download_url(url, path.parent, path.name)
    if not check_integrity(path, CELEBA_MD5):
        raise UserError(f"what came is not CelebA: its MD5 is not {CELEBA_MD5}")

def download_celeba(archive):
    """Fetch CelebA's aligned faces, 1.4 GB, from the first source that has them: all or nothing."""
    reasons = []
    usual_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        with atomic_write(archive, CELEBA_BYTES) as unfinished:
            for url in CELEBA_URLS:
                try:
                    return fetch(url, unfinished)
                except Exception as error:      # gdown, the network and the disk fail in many ways
                    reasons.append(f"{url}: {error}")
                    report(f"no CelebA from {reasons[-1]}", sys.stderr)
                    unfinished.unlink(missing_ok=True)
            raise UserError(f"CelebA's download failed ({'; '.join(reasons)}); {CELEBA_HELP}")
    finally:
        socket.setdefaulttimeout(usual_timeout)

def find_pictures(path):
    """Where --data has its pictures, a folder or a .zip, and their names; may download CelebA."""
    archive = path / CELEBA_ZIP
    names = list_pictures(path)
    if path == CELEBA_FOLDER and not names and not archive.exists():
        path.mkdir(parents=True, exist_ok=True)
        download_celeba(archive)
    if not names and archive.exists():
        path, names = archive, list_pictures(archive)
    if not path.is_dir() and not is_zipfile(path):
        what = "cut off, a web page or no archive at all" if path.exists() else "not there"
        raise UserError(f"{path} is {what}; {CELEBA_HELP}")
    if len(names) == CELEBA_PICTURES and Path(names[-1]).stem == str(CELEBA_PICTURES):
        names = names[:CELEBA_TRAIN]
    return path, names

def decode(data, image_size=64, crop=None):
    """An encoded picture (bytes) -> RGB (PIL), image_size x image_size, prepared as in the lecture.

    Cut to the centred square of `crop` pixels, by default 160 for CelebA, else the largest."""
    picture = Image.open(BytesIO(data))
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):        # 16 bit: Pillow would clip all above 255 to white
        picture = picture.convert("I").point(lambda value: value / 256).convert("L")
    usual = CELEBA_CROP if picture.size == CELEBA_SIZE else min(picture.size)
    side = min(*picture.size, crop or usual)
    left, top = [round((edge - side) / 2) for edge in picture.size]
    square = picture.crop((left, top, left + side, top + side)).convert("RGB")
    return square.resize((image_size, image_size), Image.Resampling.BILINEAR)

def map_cache(cache, key, image_size=64):
    """The pictures in a cache file, mapped into memory; None if absent, cut or of another key."""
    try:
        size = os.path.getsize(cache) - len(key)        # of the pictures
        with open(cache, "rb") as file:
            file.seek(size)
            if file.read() != key:
                return None
        # shared, so it may be larger than memory; to write to the pictures would change the file
        pixels = torch.from_file(str(cache), shared=True, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError):     # absent, too short or somebody else's
        return None
    return pixels.unflatten(0, (-1, image_size, image_size, 3)).permute(0, 3, 1, 2)

def stamp(path):
    """What changes when a file does: its size and time of change; None for a dangling link."""
    try:
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    except OSError:
        return None

def write_cache(cache, key, source, names, image_size=64, crop=None):
    """Decode these pictures of a folder or .zip into a cache file; UserError if none is readable.

    It holds the RGB bytes of one picture after another, then the key."""
    archive = ZipFile(source) if source.is_file() else None

    def prepare(name):
        try:
            data = archive.read(name) if archive else (source / name).read_bytes()
            return decode(data, image_size, crop).tobytes()
        except Exception as error:      # a broken picture may raise anything; returns None
            reason = str(error).partition(" <_io")[0]       # without an address in memory
            report(f"skipped {source / name}: {reason}", sys.stderr)

    chunks = range(0, len(names), 1000)         # so few pictures wait in memory
    with atomic_write(cache, len(names) * image_size**2 * 3) as unfinished, ThreadPool() as pool:
        with open(unfinished, "wb") as file:
            for start in tqdm(chunks, "decoding", unit=" thousand pictures", disable=None):
                pixels = pool.imap(prepare, names[start:start + 1000], chunksize=32)
                file.writelines(filter(None, pixels))       # without the skipped
            if file.tell() == 0:
                raise UserError(f"{source}: 0 readable pictures")
            file.write(key)

def load_images(path, image_size=64, crop=None):
    """A folder, a .zip or "toy" as one tensor: uint8, N x 3 x image_size x image_size.

    What was decoded is mapped from a cache file, so there may be more than memory holds.
    UserError if no picture can be read."""
    if str(path) == "toy":
        return toy_faces(image_size=image_size)
    source, names = find_pictures(Path(path))
    files = [source / name for name in names] if source.is_dir() else [source]
    stamps = [stamp(file) for file in files]
    key = hashlib.sha256(f"{image_size} {crop} {names} {stamps}".encode()).digest()
    cache = Path(f"{os.path.abspath(source)}.dcgan")
    if not os.access(cache.parent, os.W_OK):
        cache = Path(tempfile.gettempdir(), f"{key.hex()}-{Path.home().name}.dcgan")
        report(f"beside {source} nothing can be written: the prepared pictures are in {cache}")
    images = map_cache(cache, key, image_size)
    if images is None:
        write_cache(cache, key, source, names, image_size, crop)
        images = map_cache(cache, key, image_size)
    if images is None:
        raise UserError(f"{cache} cannot be mapped: put the pictures on another disk")
    return images

def shuffled(count, batch_size, done, last, seed=42, device="cpu"):
    """Yield (step, indices of its batch) for the steps after `done`, up to `last`.

    Each epoch has an order of its own, which its number and the seed decide; what does not fill
    a batch at its end is left out."""
    batches = count // batch_size
    for step in range(done + 1, last + 1):
        epoch, i = divmod(step - 1, batches)
        if i == 0 or step == done + 1:
            rng = torch.Generator().manual_seed(seed + epoch)
            order = torch.randperm(count, generator=rng).to(device)
        yield step, order[i * batch_size:(i + 1) * batch_size]

def to_batch(images, index, device=None, flip=False, rng=None):
    """Rows `index` of a uint8 tensor -> float batch in [-1, 1]; `flip` mirrors half of them.

    The index is on the images' device or the CPU; the batch on `device`, by default the images'."""
    batch = images[index].to(device or images.device) / 127.5 - 1
    if flip:
        mirror = torch.rand(len(batch), 1, 1, 1, device=batch.device, generator=rng) < 0.5
        batch = torch.where(mirror, batch.flip(3), batch)
    return batch.contiguous(memory_format=torch.channels_last)

# ---- Networks (Radford et al. 2016, section 3); shapes are those at the defaults -----------------
LATENT_DIM, LEAKY_SLOPE = 100, 0.2
# for each image size the channels of the maps at 4 x 4, 8 x 8 and so on, as multiples of the width
WIDTHS = {32: (4, 2, 1), 64: (8, 4, 2, 1), 128: (8, 8, 4, 2, 1), 256: (8, 8, 8, 4, 2, 1)}

def map_widths(image_size, width):
    """The channels of the maps between latent and image, from 4 x 4 on; ValueError if unknown."""
    if image_size not in WIDTHS:
        raise ValueError(f"image_size {image_size} is not one of {list(WIDTHS)}")
    return [factor * width for factor in WIDTHS[image_size]]

def init_weights(module):
    """Normal weights of deviation 0.02 (Radford et al. 2016, section 4), batch norm's around 1."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)

def up(inputs, outputs, relu=False, stride=2, padding=1):
    """The generator's block: it doubles the side, by default."""
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(True) if relu else nn.LeakyReLU(LEAKY_SLOPE, True),
    )

def down(inputs, outputs):
    """The discriminator's block: it halves the side."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(LEAKY_SLOPE, True),
    )

class Generator(nn.Sequential):
    """Latents N x latent_dim -> images N x channels x image_size x image_size in [-1, 1].

    With LeakyReLU, as in the lecture; `relu` is the paper's."""

    def __init__(self, latent_dim=LATENT_DIM, channels=3, width=64, image_size=64, relu=False):
        widths = map_widths(image_size, width)
        super().__init__(
            nn.Unflatten(1, (latent_dim, 1, 1)),                    # 100 x  1 x  1
            up(latent_dim, widths[0], relu, stride=1, padding=0),   # 512 x  4 x  4
            *[up(a, b, relu) for a, b in pairwise(widths)],         # 256 x  8 x  8
                                                                    # 128 x 16 x 16
                                                                    #  64 x 32 x 32
            nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1),      #   3 x 64 x 64
            nn.Tanh(),
        )
        self.apply(init_weights)

class Discriminator(nn.Sequential):
    """Images N x channels x image_size x image_size in [-1, 1] -> logits N x 1, positive: real."""

    def __init__(self, channels=3, width=64, image_size=64):
        widths = map_widths(image_size, width)[::-1]
        super().__init__(                                           #   3 x 64 x 64
            nn.Conv2d(channels, widths[0], 4, 2, 1),                #  64 x 32 x 32
            nn.LeakyReLU(LEAKY_SLOPE, True),
            *[down(a, b) for a, b in pairwise(widths)],             # 128 x 16 x 16
                                                                    # 256 x  8 x  8
                                                                    # 512 x  4 x  4
            nn.Conv2d(widths[-1], 1, 4),                            #   1 x  1 x  1
            nn.Flatten(),                                           #   1
        )
        self.apply(init_weights)

# ---- The step: one round of the game (Goodfellow et al. 2014; lecture 18.6) ----------------------

def train_step(G, D, optimizer_g, optimizer_d, real, latent_dim=LATENT_DIM, *, bf16=False,
               fresh_noise=False, label_smoothing=0.0, flip_labels=0.0, rng=None):
    """Update D, then G, on one batch of real images, N x channels x S x S in [-1, 1].

    G maps latents z, random numbers N x latent_dim, to images; D maps images to logits N x 1, whose
    sigmoid is D(x): how probably x is real. Returns loss_d, loss_g and the means of D(x) and
    D(G(z)), all but loss_g from before D's update, as a tensor of four on the device."""
    n, device = len(real), real.device
    bce = F.binary_cross_entropy_with_logits
    # with `bf16` the networks compute in 16 bits; the losses, after float(), in 32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    # two masks, n x 1: True where a label is swapped, by default nowhere
    swap_real, swap_fake = torch.rand(2, n, 1, device=device, generator=rng) < flip_labels
    one = 1.0 - label_smoothing         # the label for "real"; that for "fake" is 0
    real_labels = torch.where(swap_real, 0.0, one)
    fake_labels = torch.where(swap_fake, one, 0.0)

    # Discriminator: maximise log D(x) + log(1 - D(G(z))); loss_d is its negative, halved. Real and
    # fake make a batch each, or batch norm would mix their statistics
    with autocast:
        fake = G(torch.randn(n, latent_dim, device=device, generator=rng))
        real_logits = D(real).float()
        fake_logits = D(fake.detach()).float()      # detached: this half leaves G alone
    loss_d = (bce(real_logits, real_labels) + bce(fake_logits, fake_labels)) / 2
    optimizer_d.zero_grad()
    loss_d.backward()
    optimizer_d.step()

    # Generator: maximise log D(G(z)), the non-saturating loss, whose negative is bce with labels 1.
    # log(1 - D(G(z))), minimised, has the same aim, but hardly a gradient when D knows every fake
    D.requires_grad_(False)         # D only passes the gradient on
    with autocast:
        if fresh_noise:
            fake = G(torch.randn(n, latent_dim, device=device, generator=rng))
        logits = D(fake).float()        # anew, for D has changed; the gradient goes on to G
    loss_g = bce(logits, torch.ones_like(logits))
    optimizer_g.zero_grad()
    loss_g.backward()
    optimizer_g.step()
    D.requires_grad_(True)

    scores = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
    return torch.stack([loss_d, loss_g, *scores]).detach()

@torch.no_grad()
def update_average(average, G, decay):
    """Move `average`, a copy of G, towards G: averaged weights draw better than the latest."""
    # a state dict has the tensors themselves, no copies: to write into them changes the network
    for mean, latest in zip(average.state_dict().values(), G.state_dict().values()):
        if mean.is_floating_point():        # weights, and batch norm's statistics
            mean.lerp_(latest, 1 - decay)
        else:       # batch norm's number of batches
            mean.copy_(latest)

# ---- Measures and pictures -----------------------------------------------------------------------

@torch.no_grad()
def sample(G, latents):
    """Latents N x latent_dim -> uint8 N x channels x S x S, on the CPU; G must be in eval mode."""
    return torch.cat([(G(z) * 127.5 + 127.5).round().byte().cpu() for z in latents.split(128)])

def project(images):
    """uint8 images, N x C x S x S -> where they lie along 128 random directions, N x 128."""
    rng = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(images[0].numel(), 128, generator=rng), dim=0)
    return torch.cat([(part / 127.5 - 1).flatten(1) @ directions for part in images.split(128)])

def compare(fake, real):
    """uint8 images, N x C x S x S -> Frechet distance (lower is better), diversity (1 is healthy).

    The distance is FID's (Heusel et al. 2017), between two normal distributions with the means and
    covariances of each set, but of projections of the pixels instead of Inception's features.
    Diversity is the mean distance between two fakes over that between two reals."""
    fake, real = project(fake).double(), project(real).double()
    cov_fake, cov_real = fake.T.cov(correction=0), real.T.cov(correction=0)
    # trace(sqrt(A)) is the sum of the square roots of A's eigenvalues
    trace_sqrt = torch.linalg.eigvals(cov_fake @ cov_real).real.clamp(min=0).sqrt().sum()
    gap = (fake.mean(0) - real.mean(0)).square().sum()
    distance = gap + cov_fake.trace() + cov_real.trace() - 2 * trace_sqrt
    return distance.item(), (torch.pdist(fake).mean() / torch.pdist(real).mean()).item()

def plot_losses(losses, epoch_steps, path):
    """Draw loss_d and loss_g (steps x 2) over epochs: every step light, a moving mean bold."""
    image = Image.new("RGB", (800, 450), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    highest = int(losses.quantile(0.995) + 1.1)         # cuts off rare peaks
    epochs = len(losses) / epoch_steps
    for fifth in range(6):
        x, y = 60 + 140 * fifth, 410 - 70 * fifth
        draw.line((60, y, 760, y), "#ddd")
        draw.text((50, y), f"{highest * fifth / 5:.3g}", "#444", font, "rm")
        draw.text((x, 420), f"epoch {epochs * fifth / 5:.3g}", "#444", font, "mt")
    x = torch.linspace(60, 760, len(losses)).tolist()
    y = 410 - 350 * losses.T.clamp(max=highest) / highest       # 2 x steps, pixels from the top
    side = len(losses) // 100       # steps on either side over which the mean goes
    means = F.avg_pool1d(y, 2 * side + 1, 1, side, count_include_pad=False)
    for curve, light in zip(y.tolist(), ("#c5d5ea", "#f5d5c0")):
        draw.line(list(zip(x, curve)), light)
    legend = ("discriminator loss", "#1f5fa8"), ("generator loss", "#d2691e")
    for i, (name, color) in enumerate(legend):
        draw.line(list(zip(x, means[i].tolist())), color, 3)
        draw.text((60 + 200 * i, 30), name, color, font, "lm")
    image.save(path)

def animate(folder, epochs, path):
    """Make a GIF of the grids in `folder` that epochs 1 to `epochs` have left."""
    grids = [folder / f"epoch_{epoch:03d}.png" for epoch in range(1, epochs + 1)]
    frames = map(Image.open, filter(Path.exists, grids))        # opened one at a time
    first = next(frames, None)
    if first:
        first.save(path, save_all=True, append_images=frames, duration=500, loop=0)

# ---- The run -------------------------------------------------------------------------------------
RECORDED = "loss_d", "loss_g", "D(x)", "D(G(z))"

def native_bf16(device):
    """Whether the device itself computes in bfloat16, rather than by emulation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()

def share_gradients(network):
    """Average each gradient over all processes as soon as backward has it."""
    def average(p):
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()

    for p in network.parameters():
        p.register_post_accumulate_grad_hook(average)

def build_generator(settings):
    """The generator of these settings, as a checkpoint has them."""
    relu = settings["activation"] == "relu"
    return Generator(width=settings["width"], image_size=settings["image_size"], relu=relu)

class Run:
    """What lives from step to step; a checkpoint holds what is named here, and the random state."""
    MODULES = "G", "D", "ema", "optimizer_g", "optimizer_d"
    VALUES = "step", "history", "log", "pictures", "fingerprint"

    def __init__(self, args, images):
        torch.manual_seed(args.seed)
        self.G = build_generator(vars(args)).to(args.device, memory_format=torch.channels_last)
        D = Discriminator(width=args.width, image_size=args.image_size)
        self.D = D.to(args.device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.G).eval()
        adam = partial(Adam, betas=(args.beta1, 0.999), fused=True)
        self.optimizer_g = adam(self.G.parameters(), args.lr_g)
        optimizer = adam if args.optimizer_d == "adam" else SGD
        self.optimizer_d = optimizer(self.D.parameters(), args.lr_d)
        self.rng = torch.Generator(args.device).manual_seed(args.seed)
        self.epoch_steps = len(images) // args.batch_size
        epochs = args.epochs
        if args.dry_run:
            self.epoch_steps, epochs = 1, 1
        self.last_step = self.epoch_steps * epochs
        self.step = 0
        self.log = []                           # the rows of log.csv
        self.history = torch.empty(0, 4)        # a row of RECORDED a step
        self.unread = []        # rows still on the device: the host would have to wait for each

        # what each epoch's end draws from and compares with; on any device the same
        fixed_rng = torch.Generator().manual_seed(args.seed)
        self.latents = torch.randn(1024, LATENT_DIM, generator=fixed_rng).to(args.device)
        order = torch.randperm(len(images), generator=fixed_rng)
        self.real = images[order[:1024].to(images.device)].cpu()
        self.pictures = len(images)
        self.fingerprint = hashlib.sha256(self.real.numpy().tobytes()).hexdigest()

    @property
    def epoch(self):
        """The number, from 1, of the epoch to which the latest step belongs."""
        return (self.step - 1) // self.epoch_steps + 1

    @property
    def epoch_done(self):
        return self.step % self.epoch_steps == 0

    def measured(self):
        """The rows of the log that end an epoch, with both measures."""
        return [row for row in self.log if "frechet" in row]

    def state_dict(self):
        state = {name: getattr(self, name).state_dict() for name in self.MODULES}
        values = {name: getattr(self, name) for name in self.VALUES}
        return {**state, **values, "rng": self.rng.get_state()}

    def load_state_dict(self, state):
        if self.fingerprint != state["fingerprint"]:
            report("warning: these are not the pictures with which the run began")
        for name in self.MODULES:
            getattr(self, name).load_state_dict(state[name])
        for name in self.VALUES:
            setattr(self, name, state[name])
        if len(state["rng"]) == len(self.rng.get_state()):
            self.rng.set_state(state["rng"])
        else:
            self.rng.manual_seed(self.rng.initial_seed() + self.step)
            report("the checkpoint is from another kind of device: from here on the noise differs")

    def read_losses(self):
        """Bring the unread losses to the host, which has to wait for the device.

        UserError if a loss or a weight is not finite."""
        rows = torch.stack(self.unread)
        parameters = [*self.G.parameters(), *self.D.parameters()]
        finite = [values.isfinite().all() for values in (rows, *parameters)]
        if not torch.stack(finite).all():
            raise UserError(f"not finite at step {self.step}, checkpoint kept: "
                            "try lower --lr-g and --lr-d in a new --out")
        self.history = torch.cat([self.history, rows.cpu()])
        self.unread = []

STOP_SIGNALS = signal.SIGINT, signal.SIGTERM       # Ctrl-C, and what kill and schedulers send

@contextmanager
def signals(handler):
    """Let handler(number, frame) take STOP_SIGNALS in this block; only a main thread can."""
    usual = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            usual[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, usual_handler in usual.items():
            signal.signal(number, usual_handler)

def fail(message, status=2):
    """End the program with one line on standard error."""
    report(f"dcgan.py: error: {message}", sys.stderr)
    raise SystemExit(status)

def leave(number, frame=None):
    """Handle a signal: end the program at once, but let every block clean up after itself."""
    fail("interrupted", 128 + number)

@contextmanager
def stop_requests():
    """Yield a list to which the first Ctrl-C or SIGTERM is added; the second ends the program."""
    received = []

    def remember(number, frame):
        if received:
            leave(number)
        received.append(number)

    with signals(remember):
        yield received

def load_shared(args, checkpoint):
    """The pictures of --data; with torchrun, one process on each machine prepares them.

    UserError if they are fewer than a batch, or not as many as the checkpoint's run has."""
    # the others wait for the first in init_process_group, where Python's handlers do not run
    if from_torchrun("LOCAL_RANK") > 0:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        dist.init_process_group()
    images = load_images(args.data, args.image_size, args.crop)
    if from_torchrun("LOCAL_RANK") == 0 and from_torchrun("WORLD_SIZE", 1) > 1:
        dist.init_process_group()       # the cache is there: the others may go on
    found = f"--data {args.data}: {len(images)} readable pictures"
    if checkpoint and len(images) != checkpoint["pictures"]:
        raise UserError(f"{found}, but the run has {checkpoint['pictures']}")
    if len(images) < args.batch_size:
        raise UserError(f"{found}, fewer than --batch-size {args.batch_size}")
    if args.device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(args.device)[0] / 2:
        images = images.to(args.device)
    return images

def best_epoch(rows):
    """Of these rows, one an epoch, that with the lowest Frechet distance; None without rows."""
    return min(rows, key=lambda row: row["frechet"], default=None)

def warn(rows, fake_scores):
    """Say what goes wrong, if anything, in the latest epoch; `rows` has one row an epoch.

    `fake_scores`, the D(G(z)) of that epoch's steps, are near 0 if D has won; with smoothed labels,
    loss_d is not."""
    latest, best = rows[-1], best_epoch(rows)
    if latest["step"] > 300 and latest["diversity"] < 0.5:      # early on, all fakes are alike
        report("warning: the generator collapses; try equal, lower --lr-g and --lr-d, "
               "or a lower --beta1")
    if fake_scores.max() < 0.05:
        report("warning: the discriminator has won; try a lower --lr-d or a higher --lr-g")
    if best_epoch(rows[-5:])["frechet"] > 1.1 * best["frechet"]:        # all five are worse
        report(f"warning: past its best, epoch {best['epoch']}, which best.pt keeps; "
               "more pictures last longer")

def log_losses(run, out):
    """Print a row and write log.csv; at an epoch's end with measures, pictures and warnings."""
    row = {"epoch": run.epoch, "step": run.step}
    row.update(zip(RECORDED, run.history[-1].tolist()))
    if run.epoch_done:
        fakes = sample(run.ema, run.latents)
        row["frechet"], row["diversity"] = compare(fakes, run.real)
        save_image(fakes[:64] / 255, out / "samples" / f"epoch_{run.epoch:03d}.png")
        plot_losses(run.history[:, :2], run.epoch_steps, out / "losses.png")
    report(" ".join(f"{name} {round(value, 2)}" for name, value in row.items()))
    run.log.append({name: round(value, 4) for name, value in row.items()})
    if run.epoch_done:
        warn(run.measured(), run.history[-run.epoch_steps:, RECORDED.index("D(G(z))")])
    with open(out / "log.csv", "w") as file:
        columns = ["epoch", "step", *RECORDED, "frechet", "diversity"]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(run.log)

def save_checkpoint(run, args):
    """Write checkpoint.pt into args.out, all that --resume needs. Not in a dry run.

    After the best epoch so far, best.pt goes first: the averaged generator, for --generate."""
    if args.dry_run:
        return
    unsaved = {"out", "resume", "generate", "last", "device", "dry_run"}
    settings = {name: value for name, value in vars(args).items() if name not in unsaved}
    best = best_epoch(run.measured())
    if best and best["step"] == run.step:
        few = {name: settings[name] for name in ("width", "image_size", "activation", "seed")}
        with atomic_write(Path(args.out, "best.pt")) as path:
            torch.save({"ema": run.ema.state_dict(), "settings": few, "epoch": run.epoch}, path)
    with atomic_write(Path(args.out, "checkpoint.pt")) as path:
        torch.save({**run.state_dict(), "settings": settings, "epoch": run.epoch}, path)

def start(args, checkpoint):
    """What a training begins with: its pictures, its Run and whether it computes in bf16."""
    rank, ranks = from_torchrun("RANK"), from_torchrun("WORLD_SIZE", 1)
    out = Path(args.out)
    if args.batch_size % ranks:
        raise UserError(f"{ranks} processes cannot share --batch-size {args.batch_size} evenly")
    if not checkpoint and any(out.glob("*.pt")):
        raise UserError(f"--out {out} holds a run: go on with --resume, or choose another --out")
    if args.data != "toy" and out.resolve().is_relative_to(Path(args.data).resolve()):
        raise UserError(f"--out {out} is inside --data: its pictures would be taken for yours")
    images = load_shared(args, checkpoint)
    run = Run(args, images)
    if checkpoint:
        run.load_state_dict(checkpoint)
    if ranks > 1:
        share_gradients(run.G)
        share_gradients(run.D)
    if rank == 0:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        save_image(run.real[:64] / 255, out / "real.png")
    else:
        run.rng.manual_seed(args.seed + run.step + rank)        # noise of its own
    bf16 = args.precision == "bf16"
    precision = args.precision
    if precision == "auto":
        bf16 = native_bf16(args.device)
        precision = "bf16" if bf16 else "fp32 (bf16 is not native here)"
    sizes = " + ".join(f"{sum(map(torch.numel, net.parameters())):,}" for net in (run.G, run.D))
    report(f"{args.data}: {len(images):,} pictures; {args.device}, {precision}; "
           f"{sizes} parameters")
    torch.backends.cudnn.benchmark = True       # tries the convolution algorithms once
    return images, run, bf16

def train(args, checkpoint=None):
    """Train as the flags say, from a checkpoint if given, into args.out; in torchrun, as a rank."""
    images, run, bf16 = start(args, checkpoint)
    rank, ranks = from_torchrun("RANK"), from_torchrun("WORLD_SIZE", 1)
    out = Path(args.out)
    steps = shuffled(len(images), args.batch_size, run.step, run.last_step, args.seed,
                     images.device)
    bar = tqdm(total=run.last_step, initial=run.step, disable=rank > 0 or None)
    with bar, stop_requests() as stop:      # a list, empty until Ctrl-C
        for step, index in steps:
            batch = to_batch(images, index[rank::ranks], args.device, args.flip, run.rng)
            losses = train_step(run.G, run.D, run.optimizer_g, run.optimizer_d, batch,
                                bf16=bf16, fresh_noise=args.fresh_noise, rng=run.rng,
                                label_smoothing=args.label_smoothing, flip_labels=args.flip_labels)
            # the first weights are random: early on, average about the last ninth of the steps so
            # far (with 0.999, up to step 8,991)
            update_average(run.ema, run.G, min(args.ema, step / (9 + step)))
            if rank > 0:
                continue
            run.step = step
            run.unread.append(losses)
            bar.update()
            logged = run.epoch_done or step % args.log_interval == 0
            stopping = bool(stop)       # asked once, for the signal may come at any time
            if logged or stopping:
                run.read_losses()
            if logged:
                log_losses(run, out)
            if run.epoch_done or stopping:
                save_checkpoint(run, args)
            if stopping:
                report(f"stopped after step {step}: go on with --resume")
                raise SystemExit(128 + stop[0])
    if rank == 0:
        animate(out / "samples", run.epoch, out / "samples.gif")
        report(f"done: see {out}")

def generate(checkpoint, count, folder, seed=42, device="cpu"):
    """Write `count` pictures from a checkpoint into `folder`; beside it a grid of 64 and walk.png.

    Each row of the walk goes straight from one latent to another. A gradual change speaks for
    learning, a sudden one for memorising (Radford et al. 2016, section 6.1)."""
    folder = Path(folder)
    G = build_generator(checkpoint["settings"])
    G.load_state_dict(checkpoint["ema"])
    G.to(device).eval()
    folder.mkdir(exist_ok=True)
    for file in folder.glob(f"{'[0-9]' * 6}.png"):      # an earlier call's
        file.unlink()
    rng = torch.Generator().manual_seed(seed)
    begin, end = torch.randn(2, 8, 1, LATENT_DIM, generator=rng)
    walk = begin.lerp(end, torch.linspace(0, 1, 8)[:, None])       # 8 x 8 x LATENT_DIM
    save_image(sample(G, walk.flatten(0, 1).to(device)) / 255, folder.parent / "walk.png")
    latents = torch.randn(count, LATENT_DIM, generator=rng).to(device)
    images = (image for part in latents.split(128) for image in sample(G, part))
    for i, image in enumerate(tqdm(images, "generating", count, disable=None), 1):
        save_image(image / 255, folder / f"{i:06d}.png")
    save_image(sample(G, latents[:64]) / 255, f"{folder}.png")
    report(f"epoch {checkpoint['epoch']}: {count} pictures in {folder}, a grid in {folder}.png")

# ---- The command line ----------------------------------------------------------------------------

def between(kind, low, high=float("inf")):
    """An argparse type: a number of that kind from low to high."""
    def number(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
    return number

def existing_device(name):
    """An argparse type: the device of that name; in torchrun, "cuda" is a GPU for each process."""
    processes, gpus = from_torchrun("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
    if name == "cuda" and processes > 1:
        if processes > gpus:
            raise argparse.ArgumentTypeError(f"{processes} processes, but {gpus} GPUs")
        name = f"cuda:{from_torchrun('LOCAL_RANK')}"
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:      # each kind of device has errors of its own
        raise argparse.ArgumentTypeError(f"{name} cannot be used: {error}; try --device cpu")
    return torch.device(name)

def parse_args(argv=None, settings=None):
    """The command line as a namespace; `settings` are a checkpoint's, instead of the defaults."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail     # one line instead of the usage

    def flag(name, kind, default, text, **options):        # in the latest group
        group.add_argument(name, type=kind, default=default, help=text, **options)

    def switch(name, text):
        group.add_argument(name, action="store_true", help=text)

    count, share, rate = between(int, 1), between(float, 0, 1), between(float, 0)
    group = parser.add_argument_group("data")
    flag("--data", str, str(CELEBA_FOLDER), "folder or .zip of pictures, or toy")
    flag("--image-size", int, 64, "in pixels", choices=WIDTHS)
    flag("--crop", count, None, "pixels of the centre crop (160 for CelebA, else the largest)")
    group = parser.add_argument_group("networks and training")
    flag("--width", count, 64, "channels at half the image size")
    flag("--activation", str, "leaky_relu", "the generator's", choices=("leaky_relu", "relu"))
    flag("--ema", share, 0.999, "decay of the generator's moving average")
    flag("--epochs", count, 20, "passes over the pictures")
    flag("--batch-size", count, 128, "images a step")
    flag("--lr-g", rate, 4e-4, "generator's learning rate")
    flag("--lr-d", rate, 4e-4, "discriminator's learning rate")
    flag("--beta1", between(float, 0, 0.999), 0.25, "of Adam")
    flag("--optimizer-d", str, "adam", "the discriminator's", choices=("adam", "sgd"))
    group = parser.add_argument_group("tricks, off by default")
    switch("--fresh-noise", "new noise for the generator's half of a step")
    flag("--label-smoothing", share, 0.0, "real labels are 1 - S", metavar="S")
    flag("--flip-labels", share, 0.0, "share of D's labels swapped", metavar="P")
    switch("--flip", "mirror half of the real images")
    group = parser.add_argument_group("run")
    flag("--out", str, "out", "folder for everything that the run makes")
    switch("--resume", "go on from the checkpoint in --out")
    flag("--generate", count, None, "write N pictures from the run's best epoch", metavar="N")
    switch("--last", "with --generate: from where the run stands")
    flag("--seed", between(int, 0, 2**63), 42, "decides all that is random")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    flag("--device", existing_device, str(found), "cpu, cuda, cuda:1, mps, ...")
    flag("--precision", str, "auto", "bf16 if native", choices=("auto", "bf16", "fp32"))
    flag("--log-interval", count, 100, "steps between rows", metavar="N")
    switch("--dry-run", "one step, one of each picture, no checkpoint")
    return parser.parse_args(argv, argparse.Namespace(**settings or {}))

def read_checkpoint(argv, args):
    """The command line again, with a checkpoint's settings for defaults, and that checkpoint.

    UserError if there is none, or if the command line contradicts what shapes the run."""
    best = args.generate and not args.last
    path = Path(args.out, "best.pt" if best else "checkpoint.pt")
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)
        settings = checkpoint["settings"]
        checkpoint["epoch"]         # a KeyError for that of an older version
    except Exception:
        hint = "; --last needs no best.pt" if best else ""
        raise UserError(f"{path} is not there, damaged or of an older version{hint}")
    args = parse_args(argv, settings)
    free = {"data", "epochs", "log_interval", "precision"}      # may differ from the run's
    if args.generate:
        free.add("seed")
    for name, value in settings.items():
        if name not in free and getattr(args, name) != value:
            raise UserError(f"the run in {args.out} has --{name.replace('_', '-')} {value}")
    return args, checkpoint

def main(argv=None):
    """Train or generate, as the command line says."""
    with signals(leave):
        try:
            args = parse_args(argv)
            checkpoint = None
            if args.resume or args.generate:
                args, checkpoint = read_checkpoint(argv, args)
            if not args.generate:
                train(args, checkpoint)
            elif from_torchrun("RANK") == 0:
                generate(checkpoint, args.generate, f"{args.out}/generated", args.seed, args.device)
        except (UserError, OSError, BadZipFile, torch.OutOfMemoryError) as error:
            fail(error)

if __name__ == "__main__":
    main()
