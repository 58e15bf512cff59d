# SPDX-License-Identifier: MIT
"""DCGAN in one file: learn from photos of faces to draw new ones.

    python dcgan.py --data toy --width 16 --out out-toy     drawn faces, no download
    python dcgan.py --epochs 20                             CelebA, the lecture's faces
    python dcgan.py --generate 1000                         new faces, from the best epoch
    python dcgan.py --resume                                continue a run, however it ended
    python dcgan.py --resume --epochs 40                    or extend it

Exit status: 0 on success, 1 for an error you can fix, 2 for a wrong flag, 130 after Ctrl-C.
Sources: Radford et al. 2016, arXiv:1511.06434; Raschka 2021, STAT 453, lecture 18.6.
"""
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# ---- Networks (Radford et al. 2016, section 3) ----------------------------------------------
LATENT_DIM = 100

def plan_maps(image_size, width):
    """Return the channels of D's feature maps, largest map first, and the last map's side:
    plan_maps(64, 64) is ([64, 128, 256, 512], 4). G reverses them. ValueError unless
    image_size is 4, 5, 6 or 7 times 2, 4, 8 or another power of two."""
    channels = []
    side = image_size
    # Each halving of the side doubles the channels, up to 8 * width.
    while side >= 8 and side % 2 == 0:
        side //= 2
        channels.append(width * min(8, 2 ** len(channels)))
    if not channels or side >= 8:
        raise ValueError(f"image_size {image_size} is not 4, 5, 6 or 7 times 2, 4, 8, ...")
    return channels, side

def init_weights(module):
    """Weights ~ N(0, 0.02^2), batch norm scales ~ N(1, 0.02^2), as in Radford et al.'s code.
    Biases keep torch's defaults."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)

class Generator(nn.Module):
    """Latents N x latent_dim (or N x latent_dim x 1 x 1) -> images in [-1, 1],
    N x image_channels x image_size x image_size. `slope` is LeakyReLU's negative slope: by
    default 0.2, as in the paper's D. The paper's G has 0 (ReLU), the lecture's 0.01."""

    def __init__(self, latent_dim=LATENT_DIM, image_channels=3, width=64, image_size=64, slope=0.2):
        super().__init__()
        channels, side = plan_maps(image_size, width)
        channels.reverse()
        # Shapes at the defaults: 100 x 1 x 1 -> 512 x 4 x 4
        layers = [nn.ConvTranspose2d(latent_dim, channels[0], side, bias=False)]
        # -> 256 x 8 x 8 -> 128 x 16 x 16 -> 64 x 32 x 32 -> 3 x 64 x 64
        for before, after in pairwise([*channels, image_channels]):
            layers += [
                nn.BatchNorm2d(before),
                nn.LeakyReLU(slope, inplace=True),
                # kernel 4, stride 2 and padding 1 double the side
                nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False),
            ]
        self.layers = nn.Sequential(*layers, nn.Tanh())
        self.apply(init_weights)

    def forward(self, latents):
        maps = latents.reshape(latents.shape[0], -1, 1, 1)
        return self.layers(maps)

class Discriminator(nn.Module):
    """Images in [-1, 1], N x image_channels x image_size x image_size -> float32 logits N x 1,
    positive for real. ValueError for images of another shape. With spectral norm or a gradient
    penalty, pass `norm=nn.Identity`, which also skips init_weights (reason below)."""

    def __init__(self, image_channels=3, width=64, image_size=64, slope=0.2, norm=nn.BatchNorm2d):
        super().__init__()
        self.image_shape = (image_channels, image_size, image_size)
        channels, side = plan_maps(image_size, width)
        # Shapes at the defaults: 3 x 64 x 64 -> 64 x 32 x 32
        layers = [
            # kernel 4, stride 2 and padding 1 halve the side
            nn.Conv2d(image_channels, channels[0], 4, 2, 1),
            nn.LeakyReLU(slope, inplace=True),
        ]
        # -> 128 x 16 x 16 -> 256 x 8 x 8 -> 512 x 4 x 4
        for before, after in pairwise(channels):
            layers += [
                nn.Conv2d(before, after, 4, 2, 1, bias=norm is not nn.BatchNorm2d),
                norm(after),
                nn.LeakyReLU(slope, inplace=True),
            ]
        # -> 1 x 1 x 1 -> 1
        last = nn.Conv2d(channels[-1], 1, side)
        self.layers = nn.Sequential(*layers, last, nn.Flatten())
        # Without a norm, weights this small would make the signal vanish.
        if norm is not nn.Identity:
            self.apply(init_weights)

    def forward(self, images, features=False):
        """With `features`, return the last feature maps: N x 512 x 4 x 4 at the defaults."""
        # Without this, a larger image would silently give several logits.
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"D takes N x {self.image_shape}, not {tuple(images.shape)}")
        # Features come before the last convolution and Flatten.
        layers = self.layers[:-2] if features else self.layers
        # float32 for the losses, even under autocast.
        return layers(images).float()

# ---- The game (Goodfellow et al. 2014; lecture 18.6) ----------------------------------------
def discriminator_loss(real_logits, fake_logits):
    """Mean binary cross-entropy, with labels 1 for real and 0 for fake."""
    bce = F.binary_cross_entropy_with_logits
    loss_real = bce(real_logits, torch.ones_like(real_logits))
    loss_fake = bce(fake_logits, torch.zeros_like(fake_logits))
    return (loss_real + loss_fake) / 2

def generator_loss(fake_logits):
    """The non-saturating loss: binary cross-entropy with the label of real images."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))

def train_step(
    G, D, optimizer_g, optimizer_d, real, latent_dim=LATENT_DIM, *, fresh_noise=False,
    loss_for_d=discriminator_loss, loss_for_g=generator_loss,
):
    """Update D, then G, on one batch of real images, N x channels x S x S in [-1, 1].
    G maps latents z ~ N(0, 1), N x latent_dim, to images. D maps images to logits N x 1; the
    sigmoid of a logit is D(x), the estimated probability that x is real. `fresh_noise` draws
    new latents for G's half. Returns one detached tensor: loss_d, loss_g, mean D(x), mean
    D(G(z)). If you pass other losses, D(x) and D(G(z)) mean little."""
    # (1) D learns to tell real from fake: maximise log D(x) + log(1 - D(G(z))).
    # Real and fake go through D separately, so that batch norm does not mix them.
    latents = torch.randn(len(real), latent_dim, device=real.device)
    fake = G(latents)
    real_logits = D(real)
    fake_logits = D(fake.detach())  # detached: D's gradient stops here
    loss_d = loss_for_d(real_logits, fake_logits)
    optimizer_d.zero_grad()
    loss_d.backward()
    optimizer_d.step()
    # If the caller uses autocast, its cache still holds bfloat16 copies of D's old weights.
    torch.clear_autocast_cache()

    # (2) G learns to fool the updated D: maximise log D(G(z)).
    # Minimising log(1 - D(G(z))) has the same goal, but its gradient vanishes while D spots
    # every fake.
    if fresh_noise:
        fake = G(torch.randn_like(latents))
    loss_g = loss_for_g(D(fake))  # again, because D was just updated
    optimizer_g.zero_grad()
    loss_g.backward(inputs=list(G.parameters()))  # through D, but not into it
    optimizer_g.step()
    torch.clear_autocast_cache()  # likewise for G

    d_real = real_logits.sigmoid().mean()
    d_fake = fake_logits.sigmoid().mean()
    return torch.stack([loss_d, loss_g, d_real, d_fake]).detach()

@torch.no_grad()
def update_average(average, G, decay, step):
    """Move `average`, initially copy.deepcopy(G).eval(), towards G. `step` counts from 1.
    G and D tend to circle an optimum; averaged weights are often nearer to it and draw better
    (Yazici et al. 2019, arXiv:1806.04498)."""
    # Warm-up: the decay grows from 0.1, because early weights are near random.
    decay = min(decay, step / (9 + step))
    # A state dict holds the network's own tensors: writing into them changes the network.
    means = average.state_dict().values()
    for mean, latest in zip(means, G.state_dict().values(), strict=True):
        if mean.is_floating_point():  # not batch norm's counters, which nothing reads
            mean.lerp_(latest, 1 - decay)

def adam(network, lr=4e-4, beta1=0.25):
    """Each network's optimiser. These settings learn faster than the paper's and the lecture's,
    which are lr 2e-4 and beta1 0.5 (measured in .github/RESULTS.md)."""
    return torch.optim.Adam(network.parameters(), lr, (beta1, 0.999), fused=True)

def train_steps(G, D, average, optimizer_g, optimizer_d, reals, done=0, decay=0.999, **options):
    """Train on each batch of `reals`; after each step, yield its number and what train_step
    returned. `done` counts the steps before `reals`: without it, a second call restarts the
    average's warm-up. `options` are those of train_step."""
    for step, real in enumerate(reals, start=done + 1):
        losses = train_step(G, D, optimizer_g, optimizer_d, real, **options)
        update_average(average, G, decay, step)
        yield step, losses

# ==== Above: the whole DCGAN. It needs only torch: copy it as it is ==========================
# Below: data, monitoring and checkpoints, with imports of their own.
# ruff: noqa: E402
import argparse
import copy
import csv
import hashlib
import os
import random
import re
import socket
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from functools import partial
from glob import glob
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import MethodType
from zipfile import BadZipFile, Path as ZipPath, ZipFile
from zlib import crc32, error as ZlibError

import numpy
from PIL import Image, ImageDraw, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_url
from torchvision.transforms import functional as TF
from torchvision.utils import save_image
from tqdm import tqdm

# Prints a line above tqdm's bar.
say = tqdm.write

class UserError(Exception):
    """An error the user can fix: main prints it as one line."""

@contextmanager
def atomic_write(path):
    """Yield an open file: on success it replaces `path`, on failure it is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            yield file
            # Without this, `path` could be empty after a power failure.
            file.flush()
            os.fsync(file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)

# ---- Pictures in: from a path to one uint8 tensor, from that tensor to batches in [-1, 1] ---
CELEBA = Path("data/celeba/img_align_celeba.zip")
CELEBA_MD5 = "00d2c5bc6d35e252742224ab0c1e8fcb"
CELEBA_URLS = (
    "https://drive.google.com/file/d/0B7EVK8r0v71pZjFTYXZWM3FlRnM/view",
    f"https://cseweb.ucsd.edu/~weijian/static/datasets/celeba/{CELEBA.name}",
    f"https://graal.ift.ulaval.ca/public/celeba/{CELEBA.name}",
)
CELEBA_COUNT = 202_599
CELEBA_TRAINING_COUNT = 162_770
ENDINGS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".avif")
# Hidden files and folders, and those of systems: .git, ._a.jpg, @eaDir, #recycle, $RECYCLE.BIN.
HIDDEN = r"(^|[/\\])[.@#$]"

def toy_faces(count=4096, image_size=64):
    """Draw simple faces, all different: uint8, count x 3 x image_size x image_size."""
    rng = random.Random(0)
    faces = []
    for _ in range(count):
        background = f"hsl({rng.randint(0, 360)}, 30%, 60%)"
        hair = f"hsl(30, 50%, {rng.randint(5, 50)}%)"
        lightness = rng.randint(45, 85)
        size = image_size * rng.uniform(0.7, 1)
        corner = rng.uniform(0, image_size - size)
        image = Image.new("RGB", (image_size, image_size), background)
        draw = ImageDraw.Draw(image)
        # Hair, skin, lips and two eyes: left, top, right and bottom as shares of the head.
        for color, *edges in (
            (hair, 0.15, 0.05, 0.85, 0.85),
            (f"hsl(25, 50%, {lightness}%)", 0.22, 0.15, 0.78, 0.95),
            (f"hsl(0, 60%, {lightness - 20}%)", 0.35, 0.70, 0.60, 0.77),
            ("#123", 0.32, 0.42, 0.42, 0.50),
            ("#123", 0.58, 0.42, 0.68, 0.50),
        ):
            draw.ellipse([corner + size * edge for edge in edges], color)
        faces.append(TF.pil_to_tensor(image))
    return torch.stack(faces)

def download_celeba():
    """Download CelebA's aligned faces (1.4 GB) from the first source that works, if any does."""
    unfinished = CELEBA.with_suffix(".part")
    # Give up on a server after a minute's silence.
    socket.setdefaulttimeout(60)
    for url in CELEBA_URLS:
        try:
            download_url(url, CELEBA.parent, unfinished.name, CELEBA_MD5)
            unfinished.replace(CELEBA)
            return
        except Exception as error:
            # Google Drive, the network and the disk fail in many ways.
            say(f"no CelebA from {url}: {error!r}")

def list_pictures(source):
    """Return the sorted paths of all pictures in a folder (recursive, following links) or in a
    .zip. UserError for anything else."""
    if source.is_dir():
        root = source
        names = glob("**", root_dir=source, recursive=True)
    else:
        try:
            archive = ZipFile(source)
        except Exception as error:
            # zipfile raises many kinds of errors.
            raise UserError(
                f"{source} is neither a folder nor a readable .zip ({error}); use --data toy or "
                f"FOLDER_OR_ZIP, or put {CELEBA.name} into {CELEBA.parent}"
            )
        # Paths in a .zip can be read like those in a folder.
        root = ZipPath(archive)
        names = archive.namelist()
    paths = []
    for name in sorted(names):
        path = root / name
        hidden = re.search(HIDDEN, name)
        # Only files, because opening a pipe would block forever.
        if name.lower().endswith(ENDINGS) and not hidden and path.is_file():
            paths.append(path)
    return paths

def decode(data, image_size=64, crop=None):
    """An encoded picture (bytes) -> its centred square, resized: RGB (PIL). `crop` is the side
    of the square: by default 160 for pictures of CelebA's 178 x 218 pixels, as in the lecture,
    and the largest for others. ValueError for Pillow's modes of more than 8 bits a channel."""
    # This checks all of a PNG's checksums, but the picture must then be opened again.
    Image.open(BytesIO(data)).verify()
    picture = Image.open(BytesIO(data))
    # Converting would clip these: I and I;16 (integers) and F (floats).
    if picture.mode[0] in "IF":
        raise ValueError("more than 8 bits a channel")
    # Read the pixels first: broken ones are an error, malformed EXIF data are not.
    picture.load()
    with suppress(Exception):
        picture = ImageOps.exif_transpose(picture)

    if crop is None:
        crop = 160 if picture.size == (178, 218) else min(picture.size)
    square = TF.center_crop(picture, min(crop, *picture.size))
    return TF.resize(square.convert("RGB"), image_size)

def write_cache(cache, pictures, image_size, crop):
    """Write the RGB bytes of one picture after another, broken ones left out. UserError if all
    are broken."""
    broken = []

    def prepare(picture):
        data = b""
        # A damaged .zip leaves `data` empty, which `decode` rejects. A system error, such as too
        # many open files, must end the program: else the cache would lack that picture for good.
        with suppress(BadZipFile, ZlibError, EOFError, RuntimeError):
            data = picture.read_bytes()
        try:
            return decode(data, image_size, crop).tobytes()
        except MemoryError:
            raise
        except Exception as error:
            # A broken picture may raise anything, also an OSError of Pillow's.
            broken.append(f"skipped {str(picture)!r}: {error!r}")
            return b""

    # More threads than cores cost time; more than eight could fill the memory.
    threads = ThreadPool(min(8, os.cpu_count()))
    with threads, atomic_write(cache) as file:
        prepared = threads.imap(prepare, pictures, chunksize=64)
        file.writelines(tqdm(prepared, "preparing", len(pictures), disable=None))
        for line in broken[:10]:
            say(line)
        if not file.tell():
            raise UserError("--data has no picture that can be read")

def load_images(path, image_size=64, crop=None):
    """A folder, a .zip or "toy" as one tensor: uint8, N x 3 x image_size x image_size.
    UserError if no picture can be read. Except for toy, it is mapped from a cache in data/, not
    read into memory; writing to it crashes Python. Delete the cache after changing `decode`."""
    if path == "toy":
        return toy_faces(image_size=image_size)
    source = Path(path).resolve()
    # CelebA's folder stands for the .zip in it, unless the pictures were unpacked there.
    unpacked = any(CELEBA.parent.rglob("*.jpg"))
    if source == CELEBA.parent.resolve() and not unpacked:
        source /= CELEBA.name
        if not source.exists():
            download_celeba()
    pictures = list_pictures(source)
    # Of the complete CelebA, keep the training partition.
    if len(pictures) == CELEBA_COUNT:
        del pictures[CELEBA_TRAINING_COUNT:]

    # Any change to a file changes one of these, and with it the cache's name.
    key = [image_size, crop]
    for file in pictures if source.is_dir() else [source]:
        stat = file.stat()
        key += [str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    cache = Path("data", f"{digest}.dcgan")
    if not cache.exists():
        write_cache(cache, pictures, image_size, crop)

    # torch would warn that this tensor cannot be written to.
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    pixels = numpy.memmap(cache, mode="r").reshape(-1, image_size, image_size, 3)
    say(f"{path}: {len(pixels)} of {len(pictures)} pictures can be read")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)

def batches(images, batch_size, epochs=1, seed=42, done=0, device="cpu"):
    """uint8 images N x C x S x S -> batches of floats in [-1, 1], without the first `done`; an
    incomplete last batch is dropped. Seed and epoch decide the order. Side effect: before each
    batch, torch is reseeded from seed and step, so that a resumed run draws the same noise."""
    if images.dtype != torch.uint8:
        raise ValueError(f"batches takes a uint8 tensor, not {images.dtype} in {type(images)}")
    step = 0
    for epoch in range(epochs):
        torch.manual_seed(crc32(f"order {seed} {epoch}".encode()))
        order = torch.randperm(len(images)).to(images.device)
        for chosen in order.split(batch_size)[:len(images) // batch_size]:
            step += 1
            if step <= done:
                continue
            batch = images[chosen].to(device) / 127.5 - 1
            # The 0 means nothing now, but without it older runs could not be repeated.
            torch.manual_seed(crc32(f"noise {seed} {step} 0".encode()))
            yield batch.contiguous(memory_format=torch.channels_last)

# ---- Pictures out: sample, measure, plot, animate -------------------------------------------
@torch.no_grad()
def sample(G, latents):
    """Latents N x latent_dim -> uint8 N x channels x S x S on the CPU. ValueError if G is in
    training mode, in which sampling would change its batch norm."""
    if G.training:
        raise ValueError("sample needs G in eval mode: call G.eval() first")
    device = next(G.parameters()).device
    parts = [G(part.to(device)).cpu() for part in latents.split(128)]
    return (torch.cat(parts) * 127.5 + 127.5).round().byte()

def random_features(images):
    """uint8 images N x C x S x S -> N x 512 features of a fixed, untrained network. Its random
    filters see texture, blur and shape (Naeem et al. 2020, arXiv:2002.09797)."""
    rng = torch.Generator().manual_seed(0)
    maps = images / 127.5 - 1
    for channels in 32, 64, 128:
        filters = torch.empty(channels, maps.shape[1], 4, 4)
        nn.init.kaiming_normal_(filters, generator=rng)
        if channels == 32:
            # The first filters sum to zero, so that brightness alone does not count.
            filters -= filters.mean([1, 2, 3], keepdim=True)
        maps = F.conv2d(maps, filters, stride=2, padding=1).relu()
    return F.adaptive_avg_pool2d(maps, 2).flatten(1)

def compare(fake, real):
    """uint8 images N x C x S x S -> Frechet distance (lower is better) and diversity (1 is
    healthy, near 0 is a collapse). ValueError for fewer than two images. The distance is FID's
    (Heusel et al. 2017, arXiv:1706.08500), but on random features. Diversity is the fakes' mean
    distance to a near neighbour, divided by the reals': coarse noise raises it, and it is blind
    to missing kinds of faces."""
    if min(len(fake), len(real)) < 2:
        raise ValueError("compare needs at least two images of each kind")

    def moments(images):
        features = torch.cat([random_features(part) for part in images.split(128)]).double()
        return features.mean(0), features.T.cov()

    def spread(images):
        points = F.adaptive_avg_pool2d(images.float(), 8).flatten(1)
        # The nearest is the image itself. Of many images, 1 in 32 is skipped as well: near-copies
        # that differ only by noise must not count as diverse.
        k = 2 + len(images) // 32
        return torch.cdist(points, points).kthvalue(k).values.mean()

    (fake_mean, fake_cov), (real_mean, real_cov) = moments(fake), moments(real)
    # |gap|^2 + trace(A + B - 2 sqrt(A B)) for covariances A, B. The trace of a root is the sum
    # of the roots of the eigenvalues.
    gap = fake_mean - real_mean
    roots = torch.linalg.eigvals(fake_cov @ real_cov).sqrt().real
    distance = gap @ gap + (fake_cov + real_cov).trace() - 2 * roots.sum()
    return distance.item(), (spread(fake) / spread(real)).item()

def plot_losses(losses, epochs, path):
    """Plot loss_d and loss_g (steps x 2) on a logarithmic axis from 0.01 to 100."""
    image = Image.new("RGB", (680, 380), "white")
    draw = ImageDraw.Draw(image)
    for exponent in range(-2, 3):
        y = 190 - 80 * exponent
        draw.line((50, y, 650, y), "lightgrey")
        draw.text((15, y - 6), f"{10.0**exponent:g}", "black")
    # At most ten numbers, whatever the length of the run.
    for epoch in range(0, epochs + 1, 1 + epochs // 10):
        # Three pixels to the left, which centres a digit.
        x = 47 + 600 * epoch / epochs
        draw.text((x, 358), str(epoch), "black")

    # Averaged to 600 points, so that a long run does not become a blot.
    means = F.adaptive_avg_pool1d(losses.T, 600)
    heights = 190 - 80 * means.clamp(0.01, 100).log10()
    curve_d, curve_g = heights.tolist()
    for name, left, color, curve in (
        ("generator", 150, "#d2691e", curve_g),
        ("discriminator", 50, "#1f5fa8", curve_d),
    ):
        draw.text((left, 8), name, color)
        draw.line(list(enumerate(curve, 50)), color, width=2)
    image.save(path)

def animate(folder, epochs, path):
    """Make a GIF of the readable grids in `folder`: at most 100, counting back from the last."""
    frames = []
    every = 1 + epochs // 100
    for epoch in range(epochs, 0, -every):
        grid = folder / f"epoch_{epoch:03d}.png"
        # Pillow raises a SyntaxError for a broken PNG.
        with suppress(OSError, SyntaxError):
            frames.insert(0, Image.open(grid).copy())
    if frames:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=500, loop=0)

# ---- The run --------------------------------------------------------------------------------
# In seconds, not in steps: a step takes a second on a CPU and milliseconds on a GPU.
SAVE_SECONDS = 60
# Steps between printed lines.
LOG_STEPS = 100
# Settings that --resume may change.
MAY_CHANGE = "data", "epochs", "device", "precision", "resume"
COLUMNS = "epoch", "step", "loss_d", "loss_g", "D(x)", "D(G(z))", "frechet", "diversity", "best"

def log(*numbers, end=""):
    """Print numbers in the order of COLUMNS (in mid-epoch, the first six only). Return them
    rounded, as a row of log.csv."""
    row = [round(number, 4) for number in numbers]
    say(" ".join(f"{name} {number}" for name, number in zip(COLUMNS, row)) + end)
    return row

def find_device(name):
    """Return the device; "auto" is an accelerator if torch finds one. UserError if it cannot
    be used."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.zeros(1, device=name).device
    except Exception as error:
        # Each kind of device has errors of its own.
        raise UserError(f"--device {name} cannot be used, try --device cpu: {error!r}")

def has_bf16(device):
    """Whether the device has native bfloat16, which is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The public form, torch.cpu.get_capabilities, is missing in torch 2.7.
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()

def flipped_loss(share, real_logits, fake_logits):
    """discriminator_loss with a share of the labels swapped (ganhacks, trick 6). For binary
    cross-entropy, negating a logit swaps its label."""
    def swap(logits):
        return torch.where(torch.rand_like(logits) < share, -logits, logits)

    return discriminator_loss(swap(real_logits), swap(fake_logits))

class Run:
    """All training state. A checkpoint holds each attribute under its own name, networks and
    optimisers as state_dicts; so renaming one changes the file format."""

    def __init__(self, args, device):
        torch.manual_seed(args.seed)
        # With these, a checkpoint's networks are built again.
        sizes = {"width": args.width, "image_size": args.image_size}
        self.G_arguments = {"slope": args.slope_g, **sizes}
        self.D_arguments = {"slope": args.slope_d, **sizes}
        self.G = Generator(**self.G_arguments)
        self.D = Discriminator(**self.D_arguments)
        for network in self.G, self.D:
            network.to(device, memory_format=torch.channels_last)
        # All pictures are drawn by this average of G.
        self.average = copy.deepcopy(self.G).eval()
        self.optimizer_g = adam(self.G, args.lr_g, args.beta1)
        if args.optimizer_d == "sgd":
            self.optimizer_d = torch.optim.SGD(self.D.parameters(), args.lr_d)
        else:
            self.optimizer_d = adam(self.D, args.lr_d, args.beta1)

        self.fixed_noise = torch.randn(1024, LATENT_DIM)
        # What train_step returned for each step, and a row of log.csv for each finished epoch.
        self.losses = torch.empty(0, 4)
        self.rows = []
        # The lowest distance so far, and its epoch.
        self.best = (torch.inf, 0)
        self.settings = vars(args).copy()
        # The folder may be renamed.
        del self.settings["out"]

    def save(self, path):
        """Write a checkpoint. UserError if a weight or a loss is infinite or NaN."""
        # One norm of all tensors, so that the host waits for the GPU once.
        tensors = self.losses, *self.G.parameters(), *self.D.parameters()
        if not nn.utils.get_total_norm(tensors).isfinite():
            raise UserError(
                f"a loss or weight is not finite at step {len(self.losses)}, so it is not saved; "
                "try a lower --lr-g and --lr-d with a new --out"
            )
        state = {}
        for name, value in vars(self).items():
            state[name] = value.state_dict() if hasattr(value, "state_dict") else value
        # Via memory, because on a full disk torch.save would not raise an OSError.
        buffer = BytesIO()
        torch.save(state, buffer)
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())

    def load(self, state):
        """Restore what `save` wrote, except the settings. UserError if a setting differs that may
        not change, or if the checkpoint is another version's."""
        try:
            for name, old in state["settings"].items():
                if self.settings[name] != old and name not in MAY_CHANGE:
                    raise UserError(f"this run's {name} is {old} and cannot change")
            for name, value in vars(self).items():
                if hasattr(value, "load_state_dict"):
                    value.load_state_dict(state[name])
                elif name != "settings":
                    setattr(self, name, state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit this version of dcgan.py: {error!r}")

def end_epoch(run, args, real, seconds):
    """Draw and measure the average's fakes, print the epoch's line, write its files, and keep
    the best epoch. `seconds` is the time since this start of the training."""
    losses = run.losses.cpu()
    epoch = len(run.rows) + 1
    means = losses[-args.epoch_steps:].mean(0).tolist()
    fakes = sample(run.average, run.fixed_noise)
    frechet, diversity = compare(fakes, real)
    # Ties go to the earlier epoch.
    run.best = min(run.best, (frechet, epoch))
    best_epoch = run.best[1]
    numbers = epoch, len(losses), *means, frechet, diversity, best_epoch
    run.rows.append(log(*numbers, end=f" minutes {seconds / 60:.1f}"))
    # Early on, fakes look alike even in healthy runs.
    if len(losses) > 500 and diversity < 0.7:
        say("warning: the generator is collapsing: its pictures are too similar")

    save_image(fakes[:64] / 255, args.out / "samples" / f"epoch_{epoch:03d}.png")
    plot_losses(losses[:, :2], epoch, args.out / "losses.png")
    try:
        with open(args.out / "log.csv", "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *run.rows])
    except OSError as error:
        # On Windows, a file that is open in Excel cannot be written.
        say(f"log.csv was not updated, its rows are in checkpoint.pt: {error}")
    if best_epoch == epoch:
        run.save(args.out / "best.pt")

def train(run, args, images, device):
    """Train a new or loaded run on uint8 images until args.epochs are done."""
    # What fakes are compared with: evenly spread, 512 to 1,024 pictures, or all of fewer.
    real = images[::len(images) // 1024 + 1]
    checkpoint = args.out / "checkpoint.pt"
    # From now on, a new run into this folder is refused.
    run.save(checkpoint)
    (args.out / "samples").mkdir(exist_ok=True)
    save_image(real[:64] / 255, args.out / "real.png")
    # Indexing is fastest on the GPU. Half of its free memory is left for training.
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)

    bf16 = args.precision == "bf16" or (args.precision == "auto" and has_bf16(device))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    # Of these two instances, forward runs under autocast; the losses and the average do not.
    # Bound anew, so that a deep copy of G would call its own forward.
    for network in run.G, run.D:
        network.forward = MethodType(autocast(type(network).forward), network)
    # All batches have one shape, so let cuDNN try out its kernels and keep the fastest.
    torch.backends.cudnn.benchmark = True
    options = {"decay": args.ema, "fresh_noise": args.fresh_noise}
    if args.flip_labels:
        options["loss_for_d"] = partial(flipped_loss, args.flip_labels)
    done = len(run.losses)
    total = args.epochs * args.epoch_steps
    reals = batches(images, args.batch_size, args.epochs, args.seed, done, device)
    steps = train_steps(
        run.G, run.D, run.average, run.optimizer_g, run.optimizer_d, reals, done, **options
    )
    say(f"{device}, bf16 {bf16}; {done} of {total} steps are done; see {args.out}")
    started = saved_at = time.monotonic()
    for step, losses in tqdm(steps, initial=done, total=total, disable=None):
        # Kept on the GPU, as fetching them would make the host wait at each step. The growing
        # copy is cheap: 400 KB after 20 epochs of CelebA.
        run.losses = torch.cat([run.losses.to(device), losses[None]])
        epoch_ended = step % args.epoch_steps == 0
        if epoch_ended:
            end_epoch(run, args, real, time.monotonic() - started)
        elif step % LOG_STEPS == 0:
            log(len(run.rows) + 1, step, *losses.tolist())
        if epoch_ended or time.monotonic() - saved_at > SAVE_SECONDS:
            run.save(checkpoint)
            saved_at = time.monotonic()
    animate(args.out / "samples", args.epochs, args.out / "samples.gif")

def generate(args):
    """Draw args.generate pictures with the average of the best epoch, and save a grid of the
    first 64."""
    saved, _ = read_checkpoint(args.out / "best.pt")
    G = Generator(**saved["G_arguments"]).eval()
    G.load_state_dict(saved["average"])
    G.to(find_device(args.device))
    torch.manual_seed(args.seed)
    images = sample(G, torch.randn(args.generate, LATENT_DIM))
    save_image(images[:64] / 255, args.out / "generated.png")

    # Named by the count, so that no picture of an earlier call stays among these.
    folder = args.out / f"generated-{args.generate}"
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images, 1):
        save_image(image / 255, folder / f"{i:06d}.png")
    say(f"epoch {saved['best'][1]}: {len(images)} pictures in {folder}")

# ---- The command line -----------------------------------------------------------------------
def parse_args(argv, **settings):
    """Return the command line as a namespace; a checkpoint's `settings` replace defaults."""
    def natural(text):
        if int(text) < 1:
            raise ValueError
        return int(text)

    def fraction(text):
        if not 0 <= float(text) < 1:
            raise ValueError
        return float(text)

    parser = argparse.ArgumentParser(
        description="Train a DCGAN on photos of faces, or draw new faces with a trained one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def flag(name, kind, default, text, choices=None):
        parser.add_argument(name, type=kind, default=default, help=text, choices=choices)

    flag("--data", str, str(CELEBA.parent), "folder or .zip of pictures, or toy")
    flag("--image-size", int, 64, "in pixels", [32, 64, 96, 128, 256])
    flag("--crop", natural, None, "side of the centre crop; CelebA: 160, else the largest")
    flag("--width", natural, 64, "channels of the feature maps next to the image")
    flag("--slope-g", fraction, 0.2, "negative slope of the generator's LeakyReLU; 0 is ReLU")
    flag("--slope-d", fraction, 0.2, "negative slope of the discriminator's LeakyReLU")
    flag("--ema", fraction, 0.999, "decay of the generator's moving average")
    flag("--epochs", natural, 20, "passes over the pictures")
    flag("--batch-size", natural, 128, "images per step")
    flag("--lr-g", fraction, 4e-4, "generator's learning rate (the paper: 2e-4)")
    flag("--lr-d", fraction, 4e-4, "discriminator's learning rate (the paper: 2e-4)")
    flag("--beta1", fraction, 0.25, "of both Adams (the paper: 0.5)")
    flag("--optimizer-d", str, "adam", "discriminator's optimiser", ["adam", "sgd"])
    flag("--flip-labels", fraction, 0.0, "share of the discriminator's labels to swap")
    flag("--out", Path, "out", "output folder")
    flag("--seed", int, 42, "random seed")
    flag("--device", str, "auto", "auto, cpu, cuda, cuda:1, mps, ...")
    flag("--precision", str, "auto", "auto: bf16 if native", ["auto", "bf16", "fp32"])
    parser.add_argument("--fresh-noise", action="store_true", help="new noise for G's update")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue the run in --out")
    either.add_argument("--generate", type=natural, metavar="N", help="draw N pictures instead")
    parser.set_defaults(**settings)
    return parser.parse_args(argv)

def read_checkpoint(path):
    """Return a checkpoint, a dict of tensors and plain values, and the settings in it."""
    try:
        saved = torch.load(path, "cpu", weights_only=True)
        return saved, saved["settings"]
    except Exception as error:
        kind = type(error).__name__
        raise UserError(f"cannot read {path} ({kind}): train first, or check --out")

def start(argv):
    """Train or generate, as the command line says."""
    args = parse_args(argv)
    if args.generate:
        return generate(args)
    checkpoint = args.out / "checkpoint.pt"
    if args.resume:
        saved, settings = read_checkpoint(checkpoint)
        args = parse_args(argv, **settings)
    elif checkpoint.exists():
        raise UserError(f"{args.out} holds a run: --resume it, delete it or use another --out")
    device = find_device(args.device)
    images = load_images(args.data, args.image_size, args.crop)
    # `compare` needs at least two pictures.
    needed = max(2, args.batch_size)
    if len(images) < needed:
        raise UserError(f"--data has {len(images)} pictures, a batch needs {needed}")
    # Saved with the settings, so that Run.load refuses data of another size.
    args.epoch_steps = len(images) // args.batch_size
    run = Run(args, device)
    if args.resume:
        run.load(saved)
    train(run, args, images, device)

def main(argv=None):
    """Train or generate. Errors the user can fix become one line on standard error."""
    try:
        start(argv)
    except KeyboardInterrupt:
        print("dcgan.py: interrupted; if training had begun, --resume continues", file=sys.stderr)
        raise SystemExit(130)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise SystemExit(f"dcgan.py: error: {reason[:400]}")

if __name__ == "__main__":
    # A file's name may contain characters that the console cannot show.
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    main()
